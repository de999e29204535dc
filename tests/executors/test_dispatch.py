"""The first result of a unit wins, whatever an executor does with attempts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from persea.errors import (
    DataError,
    MissingRequirementError,
    StorageError,
    TeacherError,
)
from persea.executors.dispatch import Dispatcher, DispatchPolicy, missing_units, raise_quarantine
from persea.executors.executor import (
    Attempt,
    Failure,
    Outcome,
    PartDone,
    Receipt,
    WorkUnit,
    failure_of,
)
from persea.executors.ledger import Ledger, StageLedger, read_ledger


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Scripted:
    """An executor of a script: `plan` says how each attempt ends, and after how many seconds."""

    clock: Clock
    plan: dict[str, tuple[str, float]] = field(default_factory=dict)  # "unit-attempt" -> end
    num_workers: int = 2
    running: dict[str, tuple[Attempt, float]] = field(default_factory=dict)
    begun: set[str] = field(default_factory=set)
    submitted: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    is_closed: bool = False

    def submit(self, attempt: Attempt) -> str:
        assert len(self.running) < self.num_workers, "more attempts than workers"
        self.submitted.append(attempt.id)
        self.running[attempt.id] = (attempt, self.clock.now)
        return "w"

    def receive(self, timeout_s: float) -> Sequence[Outcome]:
        outcomes: list[Outcome] = []
        for name, (attempt, since) in list(self.running.items()):
            if name not in self.begun:
                self.begun.add(name)
                outcomes.append(PartDone(name, 0.0))
            end, seconds = self.plan.get(name, ("ok", 1.0))
            if self.clock.now - since >= seconds:
                del self.running[name]
                outcomes.append(self.end_of(attempt, end, seconds))
        self.clock.now += timeout_s
        return outcomes

    def end_of(self, attempt: Attempt, end: str, seconds: float) -> Outcome:
        if end == "ok":
            return Receipt(attempt.id, "w", seconds, 10, 9, f"digest of {attempt.unit.name}")
        if end == "lost":
            return Failure(attempt.id, "w", None, "the worker died")
        error = {"teacher": TeacherError, "data": DataError}[end]("it fails")
        return failure_of(attempt, "w", error)

    def cancel(self, attempt_id: str) -> None:
        self.cancelled.append(attempt_id)
        self.running.pop(attempt_id, None)

    def close(self) -> None:
        self.is_closed = True


@dataclass
class Published:
    """Keeps the first result of a unit."""

    units: dict[str, str] = field(default_factory=dict)

    def __call__(self, unit: WorkUnit, attempt: Attempt, receipt: Receipt) -> bool:
        return self.units.setdefault(unit.name, attempt.id) == attempt.id


def work(n: int) -> list[WorkUnit]:
    return [WorkUnit(f"u{k}", "teacher") for k in range(n)]


def dispatched(
    folder: Path, n: int, plan: dict[str, tuple[str, float]], **changes: object
) -> tuple[Scripted, Published, StageLedger, dict[str, str]]:
    clock, published = Clock(), Published()
    executor = Scripted(clock, plan, num_workers=int(str(changes.pop("workers", 2))))
    ledger = Ledger(folder, "capture", clock)
    ledger.begin({u.name: u.group for u in work(n)}, [], lambda unit: 0)
    policy = DispatchPolicy(**changes)  # type: ignore[arg-type]
    result = Dispatcher(executor, ledger, published, policy, clock=clock).run(work(n))
    assert executor.is_closed
    sums = read_ledger(folder)["capture"]
    assert sums.planned == sums.committed + len(sums.quarantined) + sums.pending
    assert not sums.running
    assert set(result.committed) == set(published.units)
    assert result.quarantined == sums.quarantined
    return executor, published, sums, result.quarantined


def test_every_unit_is_committed_once(tmp_path: Path) -> None:
    executor, published, sums, _ = dispatched(tmp_path, 5, {})
    assert executor.submitted == [f"u{k}-1" for k in range(5)]
    assert len(published.units) == sums.committed == 5
    assert (sums.tokens_paid, sums.tokens_kept, sums.pending) == (50, 45, 0)


@pytest.mark.parametrize("end", ["lost", "teacher"])
def test_a_lost_or_failed_attempt_is_repeated(tmp_path: Path, end: str) -> None:
    executor, published, sums, _ = dispatched(tmp_path, 3, {"u1-1": (end, 1.0)})
    assert executor.submitted.count("u1-2") == 1
    assert published.units["u1"] == "u1-2"
    assert (sums.num_lost, sums.num_failed) == ((1, 0) if end == "lost" else (0, 1))
    assert (sums.num_unknown, sums.tokens_paid) == (1, 30)


def test_a_unit_that_always_fails_is_quarantined_with_its_reason(tmp_path: Path) -> None:
    plan = {f"u1-{k}": ("teacher", 1.0) for k in range(1, 9)}
    executor, published, sums, quarantined = dispatched(tmp_path, 3, plan)
    assert [s for s in executor.submitted if s.startswith("u1")] == ["u1-1", "u1-2", "u1-3"]
    assert set(published.units) == {"u0", "u2"}
    assert quarantined == {"u1": "it fails"}
    assert (sums.committed, sums.pending) == (2, 0)
    from persea.executors.dispatch import DispatchResult

    with pytest.raises(TeacherError, match="1 of 3 units failed every time; unit u1: it fails"):
        raise_quarantine(DispatchResult(("u0",), quarantined), 3, TeacherError, "capture")
    raise_quarantine(DispatchResult(("u0",), {}), 3, TeacherError, "capture")


def test_an_error_that_every_attempt_would_meet_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it fails"):
        dispatched(tmp_path, 3, {"u1-1": ("data", 1.0)})
    sums = read_ledger(tmp_path)["capture"]
    assert not sums.running
    assert sums.num_failed >= 1


def test_a_straggler_gets_one_copy_and_the_first_result_wins(tmp_path: Path) -> None:
    executor, published, sums, _ = dispatched(tmp_path, 5, {"u4-1": ("ok", 50.0)})
    assert published.units["u4"] == "u4-2"
    assert executor.cancelled == ["u4-1"]
    assert [s for s in executor.submitted if s.startswith("u4")] == ["u4-1", "u4-2"]
    assert (sums.tokens_paid, sums.num_failed, sums.num_unknown) == (50, 1, 1)


def test_a_copy_that_comes_second_is_paid_and_not_kept(tmp_path: Path) -> None:
    """Both results come at once, before the second could be cancelled."""

    class Together(Scripted):
        def receive(self, timeout_s: float) -> Sequence[Outcome]:
            if "u4-2" in self.running:  # the copy has begun: both end now
                self.plan |= {"u4-1": ("ok", 0.0), "u4-2": ("ok", 0.0)}
            return super().receive(timeout_s)

    clock, published = Clock(), Published()
    ledger = Ledger(tmp_path, "capture", clock)
    ledger.begin({u.name: u.group for u in work(5)}, [], lambda unit: 0)
    executor = Together(clock, {"u4-1": ("ok", 1e9)})
    Dispatcher(executor, ledger, published, clock=clock).run(work(5))
    assert published.units["u4"] == "u4-1"
    sums = ledger.sums
    assert (sums.num_duplicates, sums.num_failed, sums.committed) == (1, 0, 5)
    assert (sums.tokens_paid, sums.tokens_kept) == (60, 45)


def test_an_attempt_that_takes_too_long_is_cancelled_and_repeated(tmp_path: Path) -> None:
    executor, published, sums, _ = dispatched(
        tmp_path, 6, {"u1-1": ("ok", 1e9)}, min_timeout_s=8, max_copies=1
    )
    assert executor.cancelled == ["u1-1"]
    assert published.units["u1"] == "u1-2"
    assert sums.committed == 6


def test_no_attempt_is_cancelled_before_the_least_timeout(tmp_path: Path) -> None:
    executor, published, _, _ = dispatched(
        tmp_path, 6, {"u1-1": ("ok", 40.0)}, min_timeout_s=60, max_copies=1
    )
    assert executor.cancelled == []
    assert published.units["u1"] == "u1-1"


def test_loading_a_teacher_is_no_part_of_a_units_time(tmp_path: Path) -> None:
    class Loading(Scripted):
        def receive(self, timeout_s: float) -> Sequence[Outcome]:
            if self.clock.now < 100 and "u0-1" in self.running:
                self.begun.add("u0-1")  # says nothing while it loads
                if self.clock.now > 95:
                    self.begun.discard("u0-1")
            return super().receive(timeout_s)

    clock, published = Clock(), Published()
    ledger = Ledger(tmp_path, "capture", clock)
    ledger.begin({u.name: u.group for u in work(6)}, [], lambda unit: 0)
    executor = Loading(clock, {"u0-1": ("ok", 98.0)})
    policy = DispatchPolicy(min_timeout_s=8, max_copies=1)
    Dispatcher(executor, ledger, published, policy, clock=clock).run(work(6))
    assert executor.cancelled == []
    assert published.units["u0"] == "u0-1"


def test_an_idle_worker_overtakes_one_that_still_loads(tmp_path: Path) -> None:
    class Loading(Scripted):
        def receive(self, timeout_s: float) -> Sequence[Outcome]:
            self.begun.add("u0-1")  # says nothing
            return super().receive(timeout_s)

    clock, published = Clock(), Published()
    ledger = Ledger(tmp_path, "capture", clock)
    ledger.begin({u.name: u.group for u in work(6)}, [], lambda unit: 0)
    executor = Loading(clock, {"u0-1": ("ok", 1e9)})
    Dispatcher(executor, ledger, published, clock=clock).run(work(6))
    assert executor.cancelled == ["u0-1"]
    assert published.units["u0"] == "u0-2"


def test_no_worker_for_too_long_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingRequirementError, match="no worker for 20 s, and 3 units wait"):
        dispatched(tmp_path, 3, {}, workers=0, no_worker_timeout_s=20)


def test_a_full_disk_ends_the_run_and_stops_the_workers(tmp_path: Path) -> None:
    def full(unit: WorkUnit, attempt: Attempt, receipt: Receipt) -> bool:
        raise StorageError("cannot write: No space left on device", where="units")

    clock = Clock()
    executor = Scripted(clock)
    ledger = Ledger(tmp_path, "capture", clock)
    ledger.begin({u.name: u.group for u in work(3)}, [], lambda unit: 0)
    with pytest.raises(StorageError):
        Dispatcher(executor, ledger, full, clock=clock).run(work(3))
    assert executor.is_closed
    assert ledger.sums.committed == 0


@pytest.mark.parametrize("seed", range(20))
def test_random_faults_lose_and_double_nothing(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    ends = ["ok", "ok", "ok", "lost", "teacher"]
    plan = {
        f"u{k}-{a}": (rng.choice(ends), rng.choice([1.0, 1.0, 2.0, 30.0, 1e9]))
        for k in range(12)
        for a in range(1, 5)
    }
    executor, published, sums, quarantined = dispatched(
        tmp_path, 12, plan, workers=rng.randint(1, 4), min_timeout_s=10, silence_timeout_s=100
    )
    assert len(published.units) + len(quarantined) == 12
    assert not set(published.units) & set(quarantined)
    assert sums.tokens_kept == 9 * len(published.units)
    assert sums.num_attempts == len(executor.submitted) == len(set(executor.submitted))


def test_missing_units_follow_the_plan() -> None:
    assert missing_units(["a", "b", "c"], ["c", "x", "a"]) == ["b"]
