"""HTTP client for one server: many requests at once, each answered exactly once, with retries.

The watchdog counts tokens, not connections: a server whose health route answers but that generates
no token within `stall_timeout_s` counts as dead.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from persea.errors import RefusedError, TeacherError
from persea.teachers.engines import EngineFailure
from persea.teachers.engines.redaction import redact_text, redact_value
from persea.teachers.engines.response_validation import (
    RETRYABLE_STATUS_CODES,
    MalformedResponseError,
    RejectedRequestError,
    parse_json,
    refuse_error_body,
)

if TYPE_CHECKING:
    import ssl

    import httpx2

T = TypeVar("T")
# Longest Retry-After that is obeyed, in seconds: servers send 1e9 or a date in a year for "later".
MAX_RETRY_AFTER_S = 300.0
# Delay before the second attempt where the server names none; doubled for each further attempt.
INITIAL_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
MAX_SHOWN_BODY_CHARS = 300  # of an error that a server sent
MAX_RESPONSE_BYTES = 256 << 20  # 32k positions with 20 tokens each are 60 MB of JSON
# The server is overloaded, or starts: the same request is repeated for as long as it may take.
UNAVAILABLE_STATUS_CODES = frozenset({429, 502, 503})
FATAL_STATUS_REASONS = {
    401: "the key is missing or wrong",
    403: "the key has no permission for this request",
    404: "no such route or model",
    405: "no such route",
}
# Text in the body of a fatal status -> (reason, remedy), where the usual reason would be wrong.
KNOWN_STATUS_BODIES = {
    "--enable-scale-out": (
        "the server's token route is switched off",
        "start `vllm serve` with --enable-scale-out, or use `protocol: completions`",
    ),
}
MIN_REQUESTS_BEFORE_GIVING_UP = 20  # the share of failed requests is not judged below it


@dataclass(frozen=True)
class RetryPolicy:
    """When requests are repeated and when a server is given up.

    Attributes:
        concurrency: Requests at once.
        max_attempts: Attempts per request before it counts as failed.
        stall_timeout_s: Seconds without a new token (or, for a scored prompt, without an answer)
            after which an attempt is aborted.
        give_up_after_s: Seconds without any answer after which the server is given up.
        max_total_tokens: Tokens, prompts and answers, that this client may use; 0 = no limit. It
            is checked before each request, so requests in flight can exceed it.
        max_failed_share: Share of failed requests above which the server counts as broken, from
            MIN_REQUESTS_BEFORE_GIVING_UP requests on.
        max_answer_s: Seconds that one answer may take in all, however steadily tokens come.
    """

    concurrency: int = 8
    max_attempts: int = 5
    stall_timeout_s: float = 60.0
    give_up_after_s: float = 600.0
    max_total_tokens: int = 0
    max_failed_share: float = 0.05
    max_answer_s: float = 3600.0


@dataclass(frozen=True)
class Request(Generic[T]):
    """One request.

    Attributes:
        path: Path below the server's URL.
        body: JSON body of a POST; None sends a GET.
        parse_response: Converts the JSON answer (for a stream, the list of its events); raises
            MalformedResponseError.
        count_tokens: Number of tokens of prompt and answer, for the budget.
        event_has_token: Whether an event holds a token; None if the answer is not streamed.
        event_is_final: Whether an event ends a streamed answer: some servers close the connection
            after it, without [DONE].
        max_token_events: Most events with a token that an answer may have; 0 = no limit.
        expected_tokens: Tokens of the prompt and of the longest answer: the load that the request
            is for a server.
        num_silent_tokens: Tokens that may be generated before anything comes, each of which may
            take `stall_timeout_s`; more than 1 for a generated answer that is not streamed.
    """

    path: str
    body: Mapping[str, Any] | None
    parse_response: Callable[[Any], T]
    count_tokens: Callable[[T], int] = lambda answer: 0
    event_has_token: Callable[[Any], bool] | None = None
    event_is_final: Callable[[Any], bool] = lambda event: False
    max_token_events: int = 0
    expected_tokens: int = 1
    num_silent_tokens: int = 1


class RetryableError(Exception):
    """An attempt failed and may be repeated.

    Attributes:
        retry_after_s: Seconds to wait before it; None if the server names none.
        connection_lost: Whether the connection broke.
        unavailable: Whether the server is not there, or too busy to look at the request.
        stalled: Whether no token came for too long.
    """

    def __init__(
        self,
        reason: str,
        retry_after_s: float | None = None,
        connection_lost: bool = False,
        unavailable: bool = False,
        stalled: bool = False,
    ) -> None:
        super().__init__(reason)
        self.retry_after_s, self.connection_lost = retry_after_s, connection_lost
        self.unavailable, self.stalled = unavailable, stalled


@dataclass(eq=False)
class HttpClient:
    """A connection to one server.

    Attributes:
        url: Base URL.
        name: Name of the teacher, for messages.
        retry_policy: See RetryPolicy.
        api_key: Sent as a bearer token and removed from all messages.
        clock: Monotonic seconds; replaced in tests.
        sleep: Replaced in tests.
        num_tokens_used: Tokens of all answered requests.
        num_requests: Finished requests, failed ones included.
        num_failed_requests: Requests that were given up.
        num_lost_connections: Broken connections; another server may answer after one.
        is_silent: Whether the last attempt brought no answer at all.
    """

    url: str
    name: str
    retry_policy: RetryPolicy = RetryPolicy()
    api_key: str = field(default="", repr=False)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    num_tokens_used: int = 0
    num_requests: int = 0
    num_failed_requests: int = 0
    num_lost_connections: int = 0
    is_silent: bool = False
    _paused_until: float = 0.0
    _last_response_at: float = 0.0

    def send_all(self, requests: Sequence[Request[T]]) -> list[T | EngineFailure]:
        """Send requests concurrently, and return their answers in order.

        Works inside a running event loop too, as in a notebook; it blocks that loop.

        Raises:
            TeacherError: The server was given up.
            RefusedError: The token budget is used up.
        """
        return _run_coroutine(self._send_all_async(requests)) if requests else []

    def send(self, request: Request[T]) -> T:
        """Send one request. Raises TeacherError if it fails."""
        (answer,) = self.send_all([request])
        if isinstance(answer, EngineFailure):
            self._raise_server_error(answer.reason, "look at the server's own log")
        return answer

    def probe(self, request: Request[T]) -> T | EngineFailure:
        """Send a request that may fail: it does not count among the failed ones."""
        before = self.num_requests, self.num_failed_requests
        (answer,) = self.send_all([request])
        if isinstance(answer, EngineFailure):
            self.num_requests, self.num_failed_requests = before
        return answer

    def check_servers(self, check: Callable[[HttpClient], None]) -> None:
        """Run a check of the model with the client of every server in use: here, this one."""
        check(self)

    async def _send_all_async(self, requests: Sequence[Request[T]]) -> list[T | EngineFailure]:
        tasks: list[asyncio.Task[T | EngineFailure]] = []
        self._last_response_at = self.clock()
        self._paused_until = min(self._paused_until, self._last_response_at + MAX_RETRY_AFTER_S)
        slots = asyncio.Semaphore(self.retry_policy.concurrency)
        async with self._open_client() as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for request in requests:
                        work = self._send_with_retries(client, slots, request)
                        tasks.append(group.create_task(work))
            except BaseExceptionGroup as error:
                raise error.exceptions[0] from None  # the cause; the others were cancelled
        return [t.result() for t in tasks]

    @cached_property
    def _ssl_context(self) -> ssl.SSLContext:
        """Certificates are read once, not for every client, and not at all for http://."""
        import httpx2

        is_encrypted = not self.url.lower().startswith("http://")
        return httpx2.create_ssl_context(verify=is_encrypted, trust_env=False)

    def _open_client(self) -> httpx2.AsyncClient:
        import httpx2

        headers = {"accept-encoding": "identity"} | (
            {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        )
        n, stall = self.retry_policy.concurrency, self.retry_policy.stall_timeout_s
        return httpx2.AsyncClient(
            base_url=self.url.rstrip("/"),
            headers=headers,
            timeout=httpx2.Timeout(stall, pool=None),
            verify=self._ssl_context,
            trust_env=False,
            limits=httpx2.Limits(max_connections=n, max_keepalive_connections=n),
        )

    async def _send_with_retries(
        self, client: httpx2.AsyncClient, slots: asyncio.Semaphore, request: Request[T]
    ) -> T | EngineFailure:
        attempt, failures, begin = 0, 0, self.clock()
        while True:
            async with slots:
                # All requests wait, not only this one: the server is overloaded by their sum.
                while (wait := self._paused_until - self.clock()) > 0:
                    await self.sleep(wait)
                self._refuse_spent_budget()
                try:
                    answer = await self._attempt(client, request)
                except RetryableError as error:
                    reason = str(error)
                    delay = self._handle_retryable(error, failures)
                    failures += 1
                    attempt += not self._is_worth_waiting(error, begin)
                except RejectedRequestError as error:
                    return self._record_failure(str(error))
                else:
                    self._last_response_at, self.is_silent = self.clock(), False
                    self.num_requests += 1
                    self.num_tokens_used += request.count_tokens(answer)
                    return answer
            if attempt == self.retry_policy.max_attempts:
                return self._record_failure(f"{attempt} attempts failed, the last: {reason}")
            await self.sleep(delay)

    def _is_worth_waiting(self, error: RetryableError, begin: float) -> bool:
        """Return whether a failed attempt costs its request none of its attempts.

        So it is while a server that has answered before restarts, or is too busy. A server that
        has never answered may have another address: there every attempt counts.
        """
        return (
            error.unavailable
            and self.num_requests > self.num_failed_requests
            and self.clock() - begin <= self.retry_policy.give_up_after_s
        )

    def _handle_retryable(self, error: RetryableError, attempt: int) -> float:
        """Count a failed attempt, and return the seconds that its request waits by itself."""
        self.num_lost_connections += error.connection_lost
        self.is_silent = error.connection_lost or error.stalled or error.unavailable
        if self.clock() - self._last_response_at > self.retry_policy.give_up_after_s:
            self._raise_server_error(
                f"no answer for {self.retry_policy.give_up_after_s:g} s: {error}",
                "is it running? the same command continues where it stopped",
            )
        if error.retry_after_s is None:
            return float(min(MAX_BACKOFF_S, INITIAL_BACKOFF_S * 2**attempt))
        pause = min(error.retry_after_s, MAX_RETRY_AFTER_S)
        self._paused_until = max(self._paused_until, self.clock() + pause)
        return 0.0

    def _record_failure(self, reason: str) -> EngineFailure:
        self.num_requests += 1
        self.num_failed_requests += 1
        allowed = self.retry_policy.max_failed_share * self.num_requests
        if (
            self.num_requests >= MIN_REQUESTS_BEFORE_GIVING_UP
            and self.num_failed_requests > allowed
        ):
            self._raise_server_error(
                f"{self.num_failed_requests} of {self.num_requests} requests failed, "
                f"the last: {reason}",
                "look at the server's own log, then run again",
            )
        return EngineFailure(self.redact(reason))

    def _refuse_spent_budget(self) -> None:
        if (
            self.retry_policy.max_total_tokens
            and self.num_tokens_used >= self.retry_policy.max_total_tokens
        ):
            raise RefusedError(
                f"the token budget is used up: {self.num_tokens_used:,} tokens",
                where=self.name,
                remedy="raise `max_total_tokens:` of its endpoint and run again: "
                "cached answers are kept",
            )

    def _raise_server_error(self, reason: str, remedy: str) -> NoReturn:
        raise TeacherError(self.redact(reason), where=f"{self.name}, {self.url}", remedy=remedy)

    def _redact_value(self, value: Any, request: Request[T]) -> Any:
        """Remove the API key from a response; pieces too, where it holds no teacher's text."""
        return redact_value(value, self.api_key, with_pieces=request.body is None)

    def redact(self, text: str) -> str:
        """Remove the API key from a text, in case the server repeated it."""
        return redact_text(text, self.api_key)

    async def _attempt(self, client: httpx2.AsyncClient, request: Request[T]) -> T:
        import httpx2

        limit, stall = asyncio.timeout(self.retry_policy.max_answer_s), self._max_silence_s(request)
        try:
            async with (
                limit,
                asyncio.timeout(stall) as watch,
                self._open_response(client, request) as response,
            ):
                await self._raise_for_status(response)
                if request.event_has_token is None:
                    body = self._redact_value(parse_json(await _read_body(response)), request)
                    refuse_error_body(body)
                    return request.parse_response(body)
                events: list[Any] = []
                num_token_events = 0
                async for raw_event in _iter_events(response, request.event_is_final):
                    event = self._redact_value(raw_event, request)
                    refuse_error_body(event)
                    events.append(event)
                    if request.event_has_token(event):
                        num_token_events += 1
                        if 0 < request.max_token_events < num_token_events:
                            raise MalformedResponseError(
                                f"more than {request.max_token_events} tokens came, which is the "
                                "limit of the request"
                            )
                        watch.reschedule(asyncio.get_running_loop().time() + stall)
                return request.parse_response(events)
        except MalformedResponseError as error:
            raise RetryableError(str(error)) from error
        except TimeoutError as error:
            if limit.expired():
                raise RejectedRequestError(
                    f"the answer had no end after {self.retry_policy.max_answer_s:g} s"
                ) from error
            reason = f"no token for {stall:g} s"
            raise RetryableError(reason, stalled=True) from error
        except httpx2.TimeoutException as error:
            reason = f"no byte for {stall:g} s"
            raise RetryableError(reason, stalled=True) from error
        except httpx2.TransportError as error:
            raise RetryableError(
                f"{type(error).__name__}: {error}",
                connection_lost=True,
                unavailable=isinstance(error, httpx2.ConnectError),
            ) from error
        except httpx2.InvalidURL as error:
            self._raise_server_error(f"{error}", "give `url:` as http://host:port")

    def _max_silence_s(self, request: Request[T]) -> float:
        policy = self.retry_policy
        return min(policy.max_answer_s, policy.stall_timeout_s * request.num_silent_tokens)

    @asynccontextmanager
    async def _open_response(
        self, client: httpx2.AsyncClient, request: Request[T]
    ) -> AsyncIterator[httpx2.Response]:
        import httpx2

        if request.body is None:
            async with client.stream("GET", request.path) as response:
                yield response
        else:
            timeout = httpx2.Timeout(
                self.retry_policy.stall_timeout_s, read=self._max_silence_s(request), pool=None
            )
            async with client.stream(
                "POST", request.path, json=request.body, timeout=timeout
            ) as response:
                yield response

    async def _raise_for_status(self, response: httpx2.Response) -> None:
        if response.status_code == 200:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise MalformedResponseError("a compressed answer, which was not requested")
            return
        code = response.status_code
        whole = (await _read_body(response)).decode(errors="replace")
        body = self.redact(whole)[:MAX_SHOWN_BODY_CHARS]
        reason = f"status {code}: {body}"
        if code in RETRYABLE_STATUS_CODES:
            raise RetryableError(
                reason,
                _parse_retry_after(response.headers),
                unavailable=code in UNAVAILABLE_STATUS_CODES,
            )
        if code in FATAL_STATUS_REASONS:
            why, remedy = next(
                (known for text, known in KNOWN_STATUS_BODIES.items() if text in body),
                (
                    FATAL_STATUS_REASONS[code],
                    "look at `url:`, `served_model_name:` and the variable that `key_env:` names",
                ),
            )
            self._raise_server_error(f"{why}: {reason}", remedy)
        raise RejectedRequestError(reason)


def _run_coroutine(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end; in a thread of its own if this one has a running event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def _parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of Retry-After, a number or a date by the server's own clock; None if
    malformed.
    """
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            then = parsedate_to_datetime(value)
            now = parsedate_to_datetime(headers["date"])
            seconds = (then - now).total_seconds()
        except (ValueError, KeyError, TypeError, OverflowError):
            return None
    return seconds if 0 <= seconds < float("inf") else None


async def _read_body(response: httpx2.Response) -> bytes:
    """Read a whole body, up to MAX_RESPONSE_BYTES."""
    parts, size = [], 0
    async for part in response.aiter_raw():
        size += len(part)
        if size > MAX_RESPONSE_BYTES:
            raise MalformedResponseError(f"an answer of more than {MAX_RESPONSE_BYTES >> 20} MiB")
        parts.append(part)
    return b"".join(parts)


async def _iter_events(
    response: httpx2.Response, is_final: Callable[[Any], bool]
) -> AsyncIterator[Any]:
    """Yield the events of a server-sent stream as JSON.

    A stream that ends neither with [DONE] nor after a final event was cut off.
    """
    rest, size, has_ended = b"", 0, False
    async for part in response.aiter_raw():
        size += len(part)
        if size > MAX_RESPONSE_BYTES:
            raise MalformedResponseError(f"an answer of more than {MAX_RESPONSE_BYTES >> 20} MiB")
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            data = line.strip().removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
            if data == b"[DONE]":
                return
            if data:
                event = parse_json(data)
                yield event
                has_ended = has_ended or is_final(event)
    if has_ended and not rest.strip():
        return
    cut = f": {rest[:60]!r}" if rest.strip() else ""
    raise MalformedResponseError(f"the stream ended without [DONE] or a finish reason{cut}")
