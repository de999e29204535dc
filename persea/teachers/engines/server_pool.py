"""Several servers that run one teacher: each request goes to the server with the least load.

The load of a server is the tokens of the requests that it works on. A server is healthy while
answers come from it: one that refuses connections, breaks them or stalls is left, its requests go
to the others, and it is asked again later. It comes back after the handshake of a new server, which
must have the fingerprint of the first one, so that answers of two models never mix.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from persea.errors import OtherModelError, TeacherError
from persea.teachers.engines import EngineFailure
from persea.teachers.engines.http_client import (
    INITIAL_BACKOFF_S,
    MAX_BACKOFF_S,
    MAX_RETRY_AFTER_S,
    HttpClient,
    Request,
    RetryableError,
    RetryPolicy,
)
from persea.teachers.engines.response_validation import RejectedRequestError
from persea.teachers.engines.server import ServerEngine

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")
LOGGER = logging.getLogger(__name__)
# Attempts in a row without an answer after which a server is left; one if it refuses connections.
FAILURES_BEFORE_LEAVING = 2
CHECK_ATTEMPTS = 2  # of each request of a handshake: a dead server must not delay the others
MAX_CHECKS_AT_ONCE = 16
MAX_SHOWN_URLS = 3


class CheckClient(HttpClient):
    """Connection for checks: nobody waits for a server that is not there, others do its work."""

    def _is_worth_waiting(self, error: RetryableError, begin: float) -> bool:
        return False


@dataclass(eq=False)
class PoolServer:
    """One server of a pool.

    Attributes:
        client: Connection for the requests.
        checker: Connection for handshakes and for the check of the model.
        num_requests: Requests that it works on.
        num_tokens: Tokens of these requests.
        num_answers: Requests that it answered.
        num_failures: Attempts without an answer since the last answer.
        left_because: Why it is left; "" while it is in use.
        next_check_at: When a server that was left is asked again.
        num_checks: Checks since it was left.
        is_checking: Whether a check runs.
        error: What ends the run: another model answers there.
    """

    client: HttpClient
    checker: HttpClient
    num_requests: int = 0
    num_tokens: int = 0
    num_answers: int = 0
    num_failures: int = 0
    left_because: str = ""
    next_check_at: float = 0.0
    num_checks: int = 0
    is_checking: bool = False
    error: TeacherError | None = None

    @property
    def url(self) -> str:
        """Address of the server."""
        return self.client.url


@dataclass
class _Work:
    """A request on its way, with its place among the answers."""

    place: int
    request: Request[Any]
    begin: float
    attempt: int = 0
    failures: int = 0


@dataclass(eq=False)
class ServerPool(HttpClient):
    """Connections to several servers of one model, used as one.

    Attributes:
        servers: The servers, in the recipe's order.
        admit: The handshake of a server that was left; None before the first handshake.
    """

    servers: list[PoolServer] = field(default_factory=list)
    admit: Callable[[HttpClient], None] | None = None

    @property
    def in_use(self) -> list[PoolServer]:
        """The servers that are not left."""
        return [s for s in self.servers if not s.left_because]

    def leave(self, server: PoolServer, reason: str) -> None:
        """Send nothing more to a server until a check finds it well."""
        if not server.left_because:
            server.num_checks = 0
            LOGGER.warning("%s: %s is left for now: %s", self.name, server.url, reason)
        delay = min(MAX_BACKOFF_S, INITIAL_BACKOFF_S * 2**server.num_checks)
        server.left_because, server.next_check_at = reason, self.clock() + delay

    # --- checks ---

    def check_servers(self, check: Callable[[HttpClient], None]) -> None:
        """Run a check of the model at every server in use, and leave the servers that fail it.

        Raises:
            OtherModelError: A server runs another model.
        """
        self._check_all(self.in_use, check)

    def handshake(self, servers: Sequence[PoolServer], check: Callable[[HttpClient], None]) -> None:
        """Run the first handshake of some servers. One that is not there is left for now.

        Raises:
            TeacherError: A server answers, and cannot be used.
        """
        self._check_all(servers, check, is_first=True)

    def _check_all(
        self,
        servers: Sequence[PoolServer],
        check: Callable[[HttpClient], None],
        is_first: bool = False,
    ) -> None:
        self._raise_found_error()
        if not servers:
            return
        used = [s.checker.num_tokens_used for s in servers]
        with ThreadPoolExecutor(max_workers=min(len(servers), MAX_CHECKS_AT_ONCE)) as threads:
            list(threads.map(lambda s: self._check_one(s, check, is_first), servers))
        spent = (s.checker.num_tokens_used - n for s, n in zip(servers, used, strict=True))
        self.num_tokens_used += sum(spent)
        self._raise_found_error()

    def _check_one(
        self, server: PoolServer, check: Callable[[HttpClient], None], is_first: bool = False
    ) -> None:
        try:
            check(server.checker)
        except OtherModelError as error:
            server.error = error
        except TeacherError as error:
            if is_first and not server.checker.is_silent:
                server.error = error
            self.leave(server, error.message)
        else:
            if server.left_because:
                LOGGER.warning("%s: %s is used again", self.name, server.url)
            server.left_because, server.num_failures = "", 0

    def _raise_found_error(self) -> None:
        for server in self.servers:
            if server.error is not None:
                raise server.error

    def _start_checks(self, wake: Callable[[], None]) -> None:
        """Ask the servers again whose time has come, each in a thread: a handshake waits long."""
        if self.admit is None:
            return
        for server in self.servers:
            due = server.left_because and self.clock() >= server.next_check_at
            if due and not server.is_checking:
                server.is_checking, server.num_checks = True, server.num_checks + 1
                args = (server, self.admit, wake)
                threading.Thread(target=self._check_again, args=args, daemon=True).start()

    def _check_again(
        self, server: PoolServer, admit: Callable[[HttpClient], None], wake: Callable[[], None]
    ) -> None:
        used = server.checker.num_tokens_used
        try:
            self._check_one(server, admit)
        finally:
            self.num_tokens_used += server.checker.num_tokens_used - used
            server.is_checking = False
            with suppress(RuntimeError):  # the loop of that batch has ended
                wake()

    # --- requests ---

    async def _send_all_async(self, requests: Sequence[Request[T]]) -> list[T | EngineFailure]:
        now = self._last_response_at = self.clock()
        for server in self.servers:
            pause = min(server.client._paused_until, now + MAX_RETRY_AFTER_S)
            server.client._paused_until = pause
        batch = _Batch(self, [_Work(k, r, now) for k, r in enumerate(requests)])
        try:
            async with AsyncExitStack() as stack:
                for server in self.servers:
                    client = server.client._open_client()
                    batch.connections[server] = await stack.enter_async_context(client)
                async with asyncio.TaskGroup() as group:
                    await batch.dispatch(group)
        except BaseExceptionGroup as error:
            raise error.exceptions[0] from None  # the cause; the others were cancelled
        return [batch.answers[k] for k in range(len(requests))]

    def choose(self) -> PoolServer | None:
        """Return the server with the least load that takes one more request; None if all wait."""
        now = self.clock()
        free = [
            s
            for s in self.in_use
            if s.num_requests < self.retry_policy.concurrency and s.client._paused_until <= now
        ]
        return min(free, key=lambda s: (s.num_tokens, s.num_requests), default=None)

    def seconds_to_wait(self) -> float:
        """Return the seconds until a pause ends, a check is due, or the servers are given up.

        Raises:
            TeacherError: No server has answered for too long.
        """
        self._raise_found_error()
        now, limit = self.clock(), self.retry_policy.give_up_after_s
        if not self.in_use and now - self._last_response_at > limit:
            reasons = "; ".join(f"{s.url}: {s.left_because}" for s in self.servers)
            self._raise_server_error(
                f"none of {len(self.servers)} servers answered for {limit:g} s: {reasons}",
                "are they running? the same command continues where it stopped",
            )
        times = [s.client._paused_until for s in self.in_use]
        times += [s.next_check_at for s in self.servers if s.left_because and not s.is_checking]
        times += [] if self.in_use else [self._last_response_at + limit]
        return max(0.001, min((t - now for t in times if t > now), default=MAX_BACKOFF_S))

    def record_answer(self, server: PoolServer, num_tokens: int) -> None:
        """Count an answer."""
        self._last_response_at = self.clock()
        self.num_requests, self.num_tokens_used = (
            self.num_requests + 1,
            self.num_tokens_used + num_tokens,
        )
        server.num_failures, server.num_answers = 0, server.num_answers + 1

    def record_failed_attempt(
        self, server: PoolServer, error: RetryableError, work: _Work
    ) -> float:
        """Count a failed attempt, and return the seconds that its request waits by itself."""
        self.num_lost_connections += error.connection_lost
        refused = error.unavailable and error.connection_lost
        if error.connection_lost or error.stalled:
            server.num_failures += 1
        if refused or server.num_failures >= FAILURES_BEFORE_LEAVING:
            self.leave(server, self.redact(str(error)))
        elif error.unavailable or error.retry_after_s is not None:  # too busy: the others take over
            delay = min(MAX_BACKOFF_S, INITIAL_BACKOFF_S * 2**work.failures)
            pause = delay if error.retry_after_s is None else error.retry_after_s
            until = self.clock() + min(pause, MAX_RETRY_AFTER_S)
            server.client._paused_until = max(server.client._paused_until, until)
        work.failures += 1
        if not error.unavailable or self.clock() - work.begin > self.retry_policy.give_up_after_s:
            work.attempt += 1
        if server.left_because or error.unavailable:
            return 0.0
        return float(min(MAX_BACKOFF_S, INITIAL_BACKOFF_S * 2 ** (work.failures - 1)))


@dataclass(eq=False)
class _Batch:
    """The requests of one call, and their answers so far."""

    pool: ServerPool
    waiting: list[_Work]
    answers: dict[int, Any] = field(default_factory=dict)
    connections: dict[PoolServer, httpx2.AsyncClient] = field(default_factory=dict)

    async def dispatch(self, group: asyncio.TaskGroup) -> None:
        """Give each request to a server, until all are answered."""
        total, queue = len(self.waiting), deque(self.waiting)
        changed, loop = asyncio.Event(), asyncio.get_running_loop()
        while len(self.answers) < total:
            changed.clear()
            while queue and (server := self.pool.choose()) is not None:
                self.pool._refuse_spent_budget()
                work = queue.popleft()
                server.num_requests += 1
                server.num_tokens += work.request.expected_tokens
                group.create_task(self._send(server, work, queue, changed))
            self.pool._start_checks(lambda: _wake(loop, changed))
            with suppress(TimeoutError):
                async with asyncio.timeout(self.pool.seconds_to_wait()):
                    await changed.wait()

    async def _send(
        self, server: PoolServer, work: _Work, queue: deque[_Work], changed: asyncio.Event
    ) -> None:
        delay = 0.0
        try:
            answer = await server.client._attempt(self.connections[server], work.request)
        except RetryableError as error:
            delay = self.pool.record_failed_attempt(server, error, work)
            if work.attempt >= self.pool.retry_policy.max_attempts:
                reason = f"{work.attempt} attempts failed, the last: {error}"
                self.answers[work.place] = self.pool._record_failure(reason)
        except RejectedRequestError as error:
            self.answers[work.place] = self.pool._record_failure(str(error))
        else:
            self.pool.record_answer(server, work.request.count_tokens(answer))
            self.answers[work.place] = answer
        finally:
            server.num_requests -= 1
            server.num_tokens -= work.request.expected_tokens
            changed.set()
        if work.place not in self.answers:
            if delay:
                await self.pool.sleep(delay)
            queue.appendleft(work)
            changed.set()


def _wake(loop: asyncio.AbstractEventLoop, changed: asyncio.Event) -> None:
    loop.call_soon_threadsafe(changed.set)


def open_pool(urls: Sequence[str], name: str, policy: RetryPolicy, key: str = "") -> ServerPool:
    """Return the pool of these servers; the first handshake connects to them."""
    quick = replace(policy, max_attempts=CHECK_ATTEMPTS, max_total_tokens=0)
    servers = [
        PoolServer(HttpClient(u, name, policy, key), CheckClient(u, name, quick, key)) for u in urls
    ]
    more = f" and {len(urls) - MAX_SHOWN_URLS} more" if len(urls) > MAX_SHOWN_URLS else ""
    shown = ", ".join(urls[:MAX_SHOWN_URLS]) + more
    return ServerPool(shown, name, policy, key, servers=servers)


def handshake_all(engine: ServerEngine) -> None:
    """Run the handshake of an engine with each of its servers, which must run the same model.

    The first server that answers is binding. One that is not there is left, and asked again later.

    Raises:
        TeacherError: No server answers, one cannot be used, or two run different models.
    """
    pool = engine.client
    if not isinstance(pool, ServerPool):
        engine.handshake()
        return

    def bind(client: HttpClient) -> None:
        engine.with_client(client).handshake()

    for server in pool.servers:
        pool.handshake([server], bind)
        if not server.left_because:
            break
    else:
        reasons = "; ".join(f"{s.url}: {s.left_because}" for s in pool.servers)
        raise TeacherError(
            f"none of {len(pool.servers)} servers answers: {reasons}",
            where=pool.name,
            remedy="start one of them, or mend `urls:` of the endpoint",
        )
    binding = server

    def admit(client: HttpClient) -> None:
        _admit(engine, client, binding.url)

    others = pool.servers[pool.servers.index(binding) + 1 :]
    pool.handshake(others, admit)
    pool.admit = admit


def _admit(engine: ServerEngine, client: HttpClient, binding_url: str) -> None:
    """Run the handshake with one more server.

    Raises:
        OtherModelError: It runs another model than the first one.
        TeacherError: It cannot be used.
    """
    own_fields: dict[str, Any] = (
        {"handshake_fields": {}} if hasattr(engine, "handshake_fields") else {}
    )
    newcomer: Any = engine.with_client(client, fingerprints=[], **own_fields)
    fingerprint = newcomer.handshake()
    where = f"{client.name}, {client.url}"
    remedy = "start both with the same weights, precision and options, or delete one of `urls:`"
    try:
        engine.fingerprints[0].refuse_other_model(fingerprint, where, engine.max_fingerprint_drift)
    except OtherModelError as error:
        reason = error.message.partition(": ")[2]
        raise OtherModelError(
            f"another model than at {binding_url}: {reason}", where=where, remedy=remedy
        ) from error
    if own_fields and newcomer.handshake_fields != cast(Any, engine).handshake_fields:
        raise OtherModelError(
            f"takes other sampling fields than {binding_url}", where=where, remedy=remedy
        )
