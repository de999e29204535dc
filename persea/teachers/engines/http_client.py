"""Line: requests to one server, many at once, each answered exactly once; what fails is asked again, later, and given up in the end.

The watchdog looks at tokens: a server whose health route answers and that says no token is a dead one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from persea.errors import RefusedError, TeacherError
from persea.teachers.engines import EngineFailure
from persea.teachers.engines.response_validation import (
    MalformedResponseError,
    parse_json,
    refuse_error_body,
)

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")
MAX_RETRY_AFTER_S = 300.0  # seconds a server's Retry-After is obeyed for; 1e9 and dates of next year mean "later", not "never"
INITIAL_BACKOFF_S, MAX_BACKOFF_S = (
    0.5,
    30.0,
)  # seconds before the second attempt, doubled each time up to MOST, where the server names none
MAX_RESPONSE_BYTES = (
    256 << 20
)  # bytes of an answer: 32k positions of 20 named tokens are 60 MB of JSON
RETRYABLE_STATUS_CODES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
FATAL_STATUS_REASONS = {
    401: "the key is missing or wrong",
    403: "the key may not ask this",
    404: "no such route or model",
    405: "no such route",
}
MAX_FAILED_REQUEST_SHARE = (
    0.05  # share of prompts given up, from TRIED on, at which it is the server that is broken
)
MIN_REQUESTS_BEFORE_GIVING_UP = 20


@dataclass(frozen=True)
class RetryPolicy:
    """How a server is asked.

    concurrency  requests at once
    attempts     of one request, before it is given up
    stall        seconds without a token (of a scored prompt: in all) after which a request is broken off
    patience     seconds without any answer after which the server is given up
    budget       tokens, asked and said, of one run; 0 = no limit
    """

    concurrency: int = 8
    max_attempts: int = 5
    stall_timeout_s: float = 60.0
    give_up_after_s: float = 600.0
    max_total_tokens: int = 0


@dataclass(frozen=True)
class Request(Generic[T]):
    """One request. read: the whole answer, or of a stream all its events -> what it says; raises Malformed.

    body     None = a GET
    cost     answer -> tokens asked and said, for the budget
    told     event -> whether it brings a token; given where the answer is streamed
    """

    path: str
    body: Mapping[str, Any] | None
    parse_response: Callable[[Any], T]
    count_tokens: Callable[[T], int] = lambda answer: 0
    event_has_token: Callable[[Any], bool] | None = None


class RetryableError(Exception):
    """An attempt failed and may be made again, not before `wait` seconds (None = the server names none). lost: the connection broke."""

    def __init__(
        self, reason: str, retry_after_s: float | None = None, connection_lost: bool = False
    ) -> None:
        super().__init__(reason)
        self.retry_after_s, self.connection_lost = retry_after_s, connection_lost


class RejectedRequestError(Exception):
    """The server refuses this request for good."""


@dataclass(eq=False)
class HttpClient:
    """A server. key is sent as a bearer token and shown nowhere.

    spent    tokens so far; failed, asked: requests given up, and made
    breaks   connections that broke: whoever is there afterwards may be another
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
    _paused_until: float = 0.0
    _last_response_at: float = 0.0

    def send_all(self, requests: Sequence[Request[T]]) -> list[T | EngineFailure]:
        """Every job's answer, in order. Raises TeacherError where the server is given up, Refused where the budget is spent."""
        return asyncio.run(self._send_all_async(requests)) if requests else []

    def send(self, request: Request[T]) -> T:
        """One answer. Raises TeacherError where there is none."""
        (answer,) = self.send_all([request])
        if isinstance(answer, EngineFailure):
            self._raise_server_error(answer.reason, "look at the server's own log")
        return answer

    async def _send_all_async(self, requests: Sequence[Request[T]]) -> list[T | EngineFailure]:
        tasks: list[asyncio.Task[T | EngineFailure]] = []
        self._last_response_at = self.clock()
        self._paused_until = min(self._paused_until, self._last_response_at + MAX_RETRY_AFTER_S)
        slots = asyncio.Semaphore(self.retry_policy.concurrency)
        async with self._open_client() as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for job in requests:
                        work = self._send_with_retries(client, slots, job)
                        tasks.append(group.create_task(work))
            except BaseExceptionGroup as error:
                raise error.exceptions[
                    0
                ] from None  # the first that ended it; the others were cancelled
        return [t.result() for t in tasks]

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
            trust_env=False,
            limits=httpx2.Limits(max_connections=n, max_keepalive_connections=n),
        )

    async def _send_with_retries(
        self, client: httpx2.AsyncClient, slots: asyncio.Semaphore, request: Request[T]
    ) -> T | EngineFailure:
        why = ""
        for attempt in range(self.retry_policy.max_attempts):
            async with slots:
                while (
                    wait := self._paused_until - self.clock()
                ) > 0:  # the whole pool waits: others' requests are what the server is tired of
                    await self.sleep(wait)
                self._refuse_spent_budget()
                try:
                    answer = await self._attempt(client, request)
                except RetryableError as error:
                    why = str(error)
                    self.num_lost_connections += error.connection_lost
                    if self.clock() - self._last_response_at > self.retry_policy.give_up_after_s:
                        self._raise_server_error(
                            f"no answer for {self.retry_policy.give_up_after_s:g} s: {why}",
                            "is it running? the same command goes on where it was",
                        )
                    if error.retry_after_s is not None:
                        self._paused_until = max(
                            self._paused_until,
                            self.clock() + min(error.retry_after_s, MAX_RETRY_AFTER_S),
                        )
                        pause = 0.0
                    else:
                        pause = min(MAX_BACKOFF_S, INITIAL_BACKOFF_S * 2**attempt)
                except RejectedRequestError as error:
                    return self._record_failure(str(error))
                else:
                    self._last_response_at = self.clock()
                    self.num_requests += 1
                    self.num_tokens_used += request.count_tokens(answer)
                    return answer
            if attempt + 1 < self.retry_policy.max_attempts:
                await self.sleep(pause)
        return self._record_failure(
            f"{self.retry_policy.max_attempts} attempts failed, the last: {why}"
        )

    def _record_failure(self, reason: str) -> EngineFailure:
        self.num_requests += 1
        self.num_failed_requests += 1
        if (
            self.num_requests >= MIN_REQUESTS_BEFORE_GIVING_UP
            and self.num_failed_requests > MAX_FAILED_REQUEST_SHARE * self.num_requests
        ):
            self._raise_server_error(
                f"{self.num_failed_requests} of {self.num_requests} requests failed, the last: {reason}",
                "look at the server's own log, then run again",
            )
        return EngineFailure(self.redact(reason))

    def _refuse_spent_budget(self) -> None:
        if (
            self.retry_policy.max_total_tokens
            and self.num_tokens_used >= self.retry_policy.max_total_tokens
        ):
            raise RefusedError(
                f"the budget is spent: {self.num_tokens_used:,} tokens",
                where=self.name,
                remedy="raise `max_total_tokens:` of its endpoint and run again: what is committed stays",
            )

    def _raise_server_error(self, reason: str, remedy: str) -> NoReturn:
        raise TeacherError(self.redact(reason), where=f"{self.name}, {self.url}", remedy=remedy)

    def redact(self, text: str) -> str:
        """The text without the key, should the server have said it back."""
        return text.replace(self.api_key, "***") if self.api_key else text

    async def _attempt(self, client: httpx2.AsyncClient, request: Request[T]) -> T:
        import httpx2

        try:
            async with (
                asyncio.timeout(self.retry_policy.stall_timeout_s) as watch,
                self._open_response(client, request) as response,
            ):
                await self._raise_for_status(response)
                if request.event_has_token is None:
                    said = parse_json(await _read_body(response))
                    refuse_error_body(said)
                    return request.parse_response(said)
                events = []
                async for event in _iter_events(response):
                    refuse_error_body(event)
                    events.append(event)
                    if request.event_has_token(event):
                        watch.reschedule(
                            asyncio.get_running_loop().time() + self.retry_policy.stall_timeout_s
                        )
                return request.parse_response(events)
        except MalformedResponseError as error:
            raise RetryableError(str(error)) from error
        except TimeoutError as error:
            raise RetryableError(f"no token for {self.retry_policy.stall_timeout_s:g} s") from error
        except httpx2.TimeoutException as error:
            raise RetryableError(f"no byte for {self.retry_policy.stall_timeout_s:g} s") from error
        except httpx2.TransportError as error:
            raise RetryableError(
                f"{type(error).__name__}: {error}", connection_lost=True
            ) from error
        except httpx2.InvalidURL as error:
            self._raise_server_error(f"{error}", "give `url:` as http://host:port")

    @asynccontextmanager
    async def _open_response(
        self, client: httpx2.AsyncClient, request: Request[T]
    ) -> AsyncIterator[httpx2.Response]:
        if request.body is None:
            async with client.stream("GET", request.path) as response:
                yield response
        else:
            async with client.stream("POST", request.path, json=request.body) as response:
                yield response

    async def _raise_for_status(self, response: httpx2.Response) -> None:
        if response.status_code == 200:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise MalformedResponseError("a packed answer, which was not asked for")
            return
        code, said = (
            response.status_code,
            (await _read_body(response))[:300].decode(errors="replace"),
        )
        why = f"status {code}: {said}"
        if code in RETRYABLE_STATUS_CODES:
            raise RetryableError(why, _parse_retry_after(response.headers))
        if code in FATAL_STATUS_REASONS:
            self._raise_server_error(
                f"{FATAL_STATUS_REASONS[code]}: {why}",
                "look at `url:`, `served_model_name:` and the variable that `key_env:` names",
            )
        raise RejectedRequestError(why)


def _parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that Retry-After asks for, as a number or as a date by the server's own clock; None where it makes no sense."""
    said = headers.get("retry-after", "").strip()
    try:
        seconds = float(said)
    except ValueError:
        try:
            then = parsedate_to_datetime(said)
            now = parsedate_to_datetime(headers["date"])
            seconds = (then - now).total_seconds()
        except (ValueError, KeyError, TypeError, OverflowError):
            return None
    return seconds if 0 <= seconds < float("inf") else None


async def _read_body(response: httpx2.Response) -> bytes:
    parts, size = [], 0
    async for part in response.aiter_raw():
        size += len(part)
        if size > MAX_RESPONSE_BYTES:
            raise MalformedResponseError(f"an answer of more than {MAX_RESPONSE_BYTES >> 20} MiB")
        parts.append(part)
    return b"".join(parts)


async def _iter_events(response: httpx2.Response) -> AsyncIterator[Any]:
    """Events of a server-sent stream as JSON, up to its [DONE], without which it was cut off."""
    kept, size = b"", 0
    async for part in response.aiter_raw():
        size += len(part)
        if size > MAX_RESPONSE_BYTES:
            raise MalformedResponseError(f"an answer of more than {MAX_RESPONSE_BYTES >> 20} MiB")
        *lines, kept = (kept + part).split(b"\n")
        for line in lines:
            data = line.strip().removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
            if data == b"[DONE]":
                return
            if data:
                yield parse_json(data)
    raise MalformedResponseError(
        f"the stream ended without its end: {kept[:60]!r}"
        if kept.strip()
        else "the stream ended without its end"
    )
