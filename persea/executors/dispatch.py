"""Give units to an executor, decide which attempt becomes the unit, and account for all of them.

An executor may run an attempt twice, lose it, or bring it late. The dispatcher publishes the first
result of a unit and drops later ones; it repeats what failed or was lost a few times, cancels what
takes much longer than the others, and starts a second copy of the last stragglers.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from persea.errors import MissingRequirementError, PerseaError, StorageError
from persea.executors.executor import (
    RETRIED_ERRORS,
    Attempt,
    Executor,
    Failure,
    PartDone,
    Receipt,
    WorkUnit,
)
from persea.executors.ledger import Ledger, LedgerEvent

POLL_S = 1.0  # longest wait for outcomes before timeouts are looked at
MIN_UNITS_FOR_MEDIAN = 3  # committed units of a teacher, before a median means anything


@dataclass(frozen=True)
class DispatchPolicy:
    """When an attempt is repeated, cancelled or copied.

    Attributes:
        max_attempts: Attempts at a unit in one run before it goes into quarantine.
        timeout_medians: An attempt that takes so many times the median of its teacher's units is
            cancelled.
        min_timeout_s: No attempt is cancelled before, in seconds.
        straggler_medians: An attempt that takes so many times the median gets a copy, once no unit
            waits and a worker is free.
        max_copies: Attempts at one unit at the same time.
        no_worker_timeout_s: Seconds without any worker before the run gives up.
        silence_timeout_s: Seconds without progress after which an attempt is cancelled although no
            median is known: while a worker loads a teacher, and in a teacher's first units.
    """

    max_attempts: int = 3
    timeout_medians: float = 5.0
    min_timeout_s: float = 60.0
    straggler_medians: float = 1.5
    max_copies: int = 2
    no_worker_timeout_s: float = 120.0
    silence_timeout_s: float = 3600.0


@dataclass(frozen=True)
class DispatchResult:
    """Where every unit is in the end.

    Attributes:
        committed: Names of the committed units, in the order in which they were committed.
        quarantined: Name -> reason of the units that failed too often.
    """

    committed: tuple[str, ...]
    quarantined: dict[str, str]


@dataclass
class _Running:
    attempt: Attempt
    worker: str
    since_s: float
    progress_s: float  # time of the last progress
    has_begun: bool = False  # False while the worker loads the teacher
    share: float = 0.0


@dataclass
class Dispatcher:
    """Runs units on an executor.

    Attributes:
        executor: Where they run. The dispatcher closes it, unless it keeps it.
        ledger: Where every attempt is recorded.
        publish: Makes an attempt's result the unit: `publish(unit, attempt, receipt)` returns False
            if the unit exists already, and then drops the result. With one of RETRIED_ERRORS it
            refuses the result, and the unit is tried again.
        policy: When attempts are repeated.
        on_committed: Called after each commit.
        on_part: Called with (unit, share done) inside an attempt.
        clock: Monotonic seconds: a clock of the system that jumps changes nothing.
        keeps_executor: Whether the executor stays open for further units; its owner closes it.
    """

    executor: Executor
    ledger: Ledger
    publish: Callable[[WorkUnit, Attempt, Receipt], bool]
    policy: DispatchPolicy = field(default_factory=DispatchPolicy)
    on_committed: Callable[[WorkUnit], None] = lambda unit: None
    on_part: Callable[[WorkUnit, float], None] = lambda unit, share: None
    clock: Callable[[], float] = time.monotonic
    keeps_executor: bool = False
    _running: dict[str, _Running] = field(default_factory=dict, init=False)
    _waiting: deque[WorkUnit] = field(default_factory=deque, init=False)
    _seconds: dict[str, list[float]] = field(
        default_factory=lambda: defaultdict(list), init=False
    )  # of a teacher's committed units, sorted: the median is asked for in every round
    _attempts: dict[str, int] = field(default_factory=lambda: defaultdict(int), init=False)
    _committed: dict[str, None] = field(default_factory=dict, init=False)
    _quarantined: dict[str, str] = field(default_factory=dict, init=False)

    def run(self, units: Iterable[WorkUnit]) -> DispatchResult:
        """Run units until each is committed or in quarantine.

        Args:
            units: Units that are not committed, those of one group together.

        Raises:
            PerseaError: An error that further attempts would meet too; or no worker is left.
        """
        self._waiting.extend(units)
        try:
            since = self.clock()
            while self._waiting or self._running:
                self._submit()
                for outcome in self.executor.receive(POLL_S):
                    self._handle(outcome)
                self._cancel_needless()
                self._cancel_overdue()
                since = self._refuse_endless_wait(since)
        except BaseException as error:
            with suppress(StorageError):  # `error` may be that the disk is full
                for running in list(self._running.values()):
                    self._record_end(LedgerEvent.FAILED, running, f"the run stopped: {error}")
            raise
        finally:
            if not self.keeps_executor:
                self.executor.close()
        return DispatchResult(tuple(self._committed), dict(self._quarantined))

    # --- what to run ---

    def _submit(self) -> None:
        """Give a unit to every free worker: at most one attempt a worker waits in the executor."""
        while len(self._running) < self.executor.num_workers:
            unit = self._next_unit()
            if unit is None:
                return
            attempt = Attempt(unit, self.ledger.next_attempt(unit.name))
            self._attempts[unit.name] += 1
            worker = self.executor.submit(attempt)
            now = self.clock()
            self._running[attempt.id] = _Running(attempt, worker, now, now)
            self._record(LedgerEvent.STARTED, attempt, worker)

    def _next_unit(self) -> WorkUnit | None:
        while self._waiting:
            unit = self._waiting.popleft()
            if unit.name not in self._committed and unit.name not in self._quarantined:
                return unit
        return self._straggler()

    def _straggler(self) -> WorkUnit | None:
        """Return the unit of the slowest attempt, if a second copy may overtake it.

        An attempt whose worker still loads the teacher counts: another worker holds it already.
        """
        if self.policy.max_copies < 2:
            return None
        for running in sorted(self._running.values(), key=lambda r: r.since_s):
            unit, seconds = running.attempt.unit, self.clock() - running.since_s
            median = self._median(unit.group)
            copies = sum(r.attempt.unit.name == unit.name for r in self._running.values())
            if (
                median is not None
                and seconds > self.policy.straggler_medians * median
                and copies < self.policy.max_copies
                and self._attempts[unit.name] < self.policy.max_attempts
            ):
                return unit
        return None

    def _median(self, group: str) -> float | None:
        seconds, half = self._seconds[group], len(self._seconds[group]) // 2
        if len(seconds) < MIN_UNITS_FOR_MEDIAN:
            return None
        return seconds[half] if len(seconds) % 2 else (seconds[half - 1] + seconds[half]) / 2

    # --- what came back ---

    def _handle(self, outcome: Receipt | Failure | PartDone) -> None:
        running = self._running.get(outcome.attempt_id)
        if isinstance(outcome, PartDone):
            if running:
                if not running.has_begun:
                    running.has_begun = True
                    running.since_s = running.progress_s = self.clock()
                if outcome.share > running.share:
                    running.share, running.progress_s = outcome.share, self.clock()
                self.on_part(running.attempt.unit, outcome.share)
            return
        if running is None:
            return  # cancelled while its outcome was on the way; recorded then
        del self._running[outcome.attempt_id]
        if isinstance(outcome, Receipt):
            self._finish(running, outcome)
        else:
            self._fail(running, outcome)

    def _finish(self, running: _Running, receipt: Receipt) -> None:
        attempt, unit = running.attempt, running.attempt.unit
        values: dict[str, object] = {
            "seconds": round(receipt.seconds, 3),
            "tokens_paid": receipt.tokens_paid,
        }
        try:
            is_first = self.publish(unit, attempt, receipt)
        except RETRIED_ERRORS as error:
            values |= {"tokens_kept": 0, "reason": str(error)}
            self._record(LedgerEvent.FAILED, attempt, receipt.worker, **values)
            self._try_again(unit, str(error))
            return
        values["tokens_kept"] = receipt.tokens_kept if is_first else 0
        event = LedgerEvent.COMMITTED if is_first else LedgerEvent.DUPLICATE
        self._record(event, attempt, receipt.worker, **values)
        if unit.name in self._committed:
            return
        self._committed[unit.name] = None
        insort(self._seconds[unit.group], receipt.seconds)
        self.on_committed(unit)

    def _fail(self, running: _Running, failure: Failure) -> None:
        event = LedgerEvent.LOST if failure.is_lost else LedgerEvent.FAILED
        self._record_end(event, running, failure.reason, failure.worker)
        if failure.error is not None and failure.is_final:
            raise failure.error
        self._try_again(running.attempt.unit, failure.reason)

    def _try_again(self, unit: WorkUnit, reason: str) -> None:
        if any(r.attempt.unit.name == unit.name for r in self._running.values()):
            return  # a copy still runs
        if self._attempts[unit.name] < self.policy.max_attempts:
            self._waiting.append(unit)
            return
        self._quarantined[unit.name] = reason
        self.ledger.record(LedgerEvent.QUARANTINED, unit.name, unit.group, reason=reason)

    def _cancel_needless(self) -> None:
        for running in list(self._running.values()):
            if running.attempt.unit.name in self._committed:
                self._cancel(running, "another attempt committed the unit")

    def _cancel_overdue(self) -> None:
        for running in list(self._running.values()):
            reason = self._overdue(running)
            if reason:
                self._cancel(running, reason)
                self._try_again(running.attempt.unit, reason)

    def _overdue(self, running: _Running) -> str:
        """Return why an attempt is cancelled; "" if it may go on."""
        now, median = self.clock(), self._median(running.attempt.unit.group)
        if running.has_begun and median is not None:
            seconds = now - running.since_s
            limit = max(self.policy.min_timeout_s, self.policy.timeout_medians * median)
            reason = f"no result after {seconds:.0f} s; the median is {median:.1f} s"
            return reason if seconds > limit else ""
        if now - running.progress_s <= self.policy.silence_timeout_s:
            return ""
        return f"no progress for {self.policy.silence_timeout_s:.0f} s"

    def _cancel(self, running: _Running, reason: str) -> None:
        self._running.pop(running.attempt.id, None)
        self.executor.cancel(running.attempt.id)
        self._record_end(LedgerEvent.CANCELLED, running, reason)

    def _refuse_endless_wait(self, since: float) -> float:
        """Return since when there is no worker, or now if there is one."""
        now = self.clock()
        if self.executor.num_workers:
            return now
        if now - since > self.policy.no_worker_timeout_s:
            raise MissingRequirementError(
                f"no worker for {self.policy.no_worker_timeout_s:.0f} s, and "
                f"{len(self._waiting) + len(self._running):,} units wait",
                where="executor",
                remedy="add nodes, or ask for fewer CPUs and GPUs a worker "
                "(`executor.cpus_per_worker`, `executor.gpus_per_worker`); committed units stay",
            )
        return since

    # --- the ledger ---

    def _record(self, event: LedgerEvent, attempt: Attempt, worker: str, **values: object) -> None:
        unit = attempt.unit
        self.ledger.record(
            event, unit.name, unit.group, attempt=attempt.number, worker=worker, **values
        )

    def _record_end(
        self, event: LedgerEvent, running: _Running, reason: str, worker: str = ""
    ) -> None:
        self._record(
            event,
            running.attempt,
            worker or running.worker,
            seconds=round(self.clock() - running.since_s, 3),
            tokens_paid=None,
            tokens_kept=0,
            reason=reason,
        )


def raise_quarantine(
    result: DispatchResult, num_planned: int, error: type[PerseaError], stage: str
) -> None:
    """Raise if a unit is in quarantine: a student must not learn from a part without notice.

    Raises:
        PerseaError: Units are in quarantine. The message names the first and its reason.
    """
    if result.quarantined:
        name, reason = next(iter(result.quarantined.items()))
        raise error(
            f"{len(result.quarantined):,} of {num_planned:,} units failed every time; "
            f"unit {name}: {reason}",
            where=stage,
            remedy="mend the cause and run again: committed units stay, and only these are tried",
        )


def missing_units(planned: Sequence[str], committed: Iterable[str]) -> list[str]:
    """Return the planned units that are not committed, in the order of the plan."""
    done = frozenset(committed)
    return [name for name in planned if name not in done]
