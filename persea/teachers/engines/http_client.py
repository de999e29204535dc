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

from persea.errors import Refused, TeacherError
from persea.teachers.engines import Failed
from persea.teachers.engines.response_validation import Malformed, parsed, refuse_error

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")
LONGEST = 300.0  # seconds a server's Retry-After is obeyed for; 1e9 and dates of next year mean "later", not "never"
FIRST, MOST = 0.5, 30.0  # seconds before the second attempt, doubled each time up to MOST, where the server names none
BODY = 256 << 20  # bytes of an answer: 32k positions of 20 named tokens are 60 MB of JSON
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
HOPELESS = {401: "the key is missing or wrong", 403: "the key may not ask this", 404: "no such route or model", 405: "no such route"}
POISON = 0.05  # share of prompts given up, from TRIED on, at which it is the server that is broken
TRIED = 20


@dataclass(frozen=True)
class Manners:
    """How a server is asked.

    concurrency  requests at once
    attempts     of one request, before it is given up
    stall        seconds without a token (of a scored prompt: in all) after which a request is broken off
    patience     seconds without any answer after which the server is given up
    budget       tokens, asked and said, of one run; 0 = no limit
    """

    concurrency: int = 8
    attempts: int = 5
    stall: float = 60.0
    patience: float = 600.0
    budget: int = 0


@dataclass(frozen=True)
class Job(Generic[T]):
    """One request. read: the whole answer, or of a stream all its events -> what it says; raises Malformed.

    body     None = a GET
    cost     answer -> tokens asked and said, for the budget
    told     event -> whether it brings a token; given where the answer is streamed
    """

    path: str
    body: Mapping[str, Any] | None
    read: Callable[[Any], T]
    cost: Callable[[T], int] = lambda answer: 0
    told: Callable[[Any], bool] | None = None


class Again(Exception):
    """An attempt failed and may be made again, not before `wait` seconds (None = the server names none). lost: the connection broke."""

    def __init__(self, why: str, wait: float | None = None, lost: bool = False) -> None:
        super().__init__(why)
        self.wait, self.lost = wait, lost


class Given(Exception):
    """The server refuses this request for good."""


@dataclass(eq=False)
class Line:
    """A server. key is sent as a bearer token and shown nowhere.

    spent    tokens so far; failed, asked: requests given up, and made
    breaks   connections that broke: whoever is there afterwards may be another
    """

    url: str
    name: str
    manners: Manners = Manners()
    key: str = field(default="", repr=False)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    spent: int = 0
    asked: int = 0
    failed: int = 0
    breaks: int = 0
    _until: float = 0.0
    _heard: float = 0.0

    def ask(self, jobs: Sequence[Job[T]]) -> list[T | Failed]:
        """Every job's answer, in order. Raises TeacherError where the server is given up, Refused where the budget is spent."""
        return asyncio.run(self._all(jobs)) if jobs else []

    def one(self, job: Job[T]) -> T:
        """One answer. Raises TeacherError where there is none."""
        (answer,) = self.ask([job])
        if isinstance(answer, Failed):
            self._refuse(answer.why, "look at the server's own log")
        return answer

    async def _all(self, jobs: Sequence[Job[T]]) -> list[T | Failed]:
        tasks: list[asyncio.Task[T | Failed]] = []
        self._heard = self.clock()
        self._until = min(self._until, self._heard + LONGEST)
        slots = asyncio.Semaphore(self.manners.concurrency)
        async with self._client() as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for job in jobs:
                        work = self._until_done(client, slots, job)
                        tasks.append(group.create_task(work))
            except BaseExceptionGroup as error:
                raise error.exceptions[0] from None  # the first that ended it; the others were cancelled
        return [t.result() for t in tasks]

    def _client(self) -> httpx2.AsyncClient:
        import httpx2

        headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {self.key}"} if self.key else {})
        n, stall = self.manners.concurrency, self.manners.stall
        return httpx2.AsyncClient(base_url=self.url.rstrip("/"), headers=headers, timeout=httpx2.Timeout(stall, pool=None), trust_env=False,
                                  limits=httpx2.Limits(max_connections=n, max_keepalive_connections=n))

    async def _until_done(self, client: httpx2.AsyncClient, slots: asyncio.Semaphore, job: Job[T]) -> T | Failed:
        why = ""
        for attempt in range(self.manners.attempts):
            async with slots:
                while (wait := self._until - self.clock()) > 0:  # the whole pool waits: others' requests are what the server is tired of
                    await self.sleep(wait)
                self._refuse_spent()
                try:
                    answer = await self._try(client, job)
                except Again as error:
                    why = str(error)
                    self.breaks += error.lost
                    if self.clock() - self._heard > self.manners.patience:
                        self._refuse(f"no answer for {self.manners.patience:g} s: {why}", "is it running? the same command goes on where it was")
                    if error.wait is not None:
                        self._until = max(self._until, self.clock() + min(error.wait, LONGEST))
                        pause = 0.0
                    else:
                        pause = min(MOST, FIRST * 2 ** attempt)
                except Given as error:
                    return self._gave_up(str(error))
                else:
                    self._heard = self.clock()
                    self.asked += 1
                    self.spent += job.cost(answer)
                    return answer
            if attempt + 1 < self.manners.attempts:
                await self.sleep(pause)
        return self._gave_up(f"{self.manners.attempts} attempts failed, the last: {why}")

    def _gave_up(self, why: str) -> Failed:
        self.asked += 1
        self.failed += 1
        if self.asked >= TRIED and self.failed > POISON * self.asked:
            self._refuse(f"{self.failed} of {self.asked} requests failed, the last: {why}", "look at the server's own log, then run again")
        return Failed(self.redacted(why))

    def _refuse_spent(self) -> None:
        if self.manners.budget and self.spent >= self.manners.budget:
            raise Refused(f"the budget is spent: {self.spent:,} tokens", where=self.name,
                          remedy="raise `budget:` of its endpoint and run again: what is committed stays")

    def _refuse(self, why: str, remedy: str) -> NoReturn:
        raise TeacherError(self.redacted(why), where=f"{self.name}, {self.url}", remedy=remedy)

    def redacted(self, text: str) -> str:
        """The text without the key, should the server have said it back."""
        return text.replace(self.key, "***") if self.key else text

    async def _try(self, client: httpx2.AsyncClient, job: Job[T]) -> T:
        import httpx2

        try:
            async with asyncio.timeout(self.manners.stall) as watch, self._sent(client, job) as response:
                await self._refuse_status(response)
                if job.told is None:
                    said = parsed(await _body(response))
                    refuse_error(said)
                    return job.read(said)
                events = []
                async for event in _events(response):
                    refuse_error(event)
                    events.append(event)
                    if job.told(event):
                        watch.reschedule(asyncio.get_running_loop().time() + self.manners.stall)
                return job.read(events)
        except Malformed as error:
            raise Again(str(error)) from error
        except TimeoutError as error:
            raise Again(f"no token for {self.manners.stall:g} s") from error
        except httpx2.TimeoutException as error:
            raise Again(f"no byte for {self.manners.stall:g} s") from error
        except httpx2.TransportError as error:
            raise Again(f"{type(error).__name__}: {error}", lost=True) from error
        except httpx2.InvalidURL as error:
            self._refuse(f"{error}", "give `url:` as http://host:port")

    @asynccontextmanager
    async def _sent(self, client: httpx2.AsyncClient, job: Job[T]) -> AsyncIterator[httpx2.Response]:
        if job.body is None:
            async with client.stream("GET", job.path) as response:
                yield response
        else:
            async with client.stream("POST", job.path, json=job.body) as response:
                yield response

    async def _refuse_status(self, response: httpx2.Response) -> None:
        if response.status_code == 200:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise Malformed("a packed answer, which was not asked for")
            return
        code, said = response.status_code, (await _body(response))[:300].decode(errors="replace")
        why = f"status {code}: {said}"
        if code in AGAIN:
            raise Again(why, _wait(response.headers))
        if code in HOPELESS:
            self._refuse(f"{HOPELESS[code]}: {why}", "look at `url:`, `served:` and the variable that `key_env:` names")
        raise Given(why)


def _wait(headers: Mapping[str, str]) -> float | None:
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


async def _body(response: httpx2.Response) -> bytes:
    parts, size = [], 0
    async for part in response.aiter_raw():
        size += len(part)
        if size > BODY:
            raise Malformed(f"an answer of more than {BODY >> 20} MiB")
        parts.append(part)
    return b"".join(parts)


async def _events(response: httpx2.Response) -> AsyncIterator[Any]:
    """Events of a server-sent stream as JSON, up to its [DONE], without which it was cut off."""
    kept, size = b"", 0
    async for part in response.aiter_raw():
        size += len(part)
        if size > BODY:
            raise Malformed(f"an answer of more than {BODY >> 20} MiB")
        *lines, kept = (kept + part).split(b"\n")
        for line in lines:
            data = line.strip().removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
            if data == b"[DONE]":
                return
            if data:
                yield parsed(data)
    raise Malformed(f"the stream ended without its end: {kept[:60]!r}" if kept.strip() else "the stream ended without its end")
