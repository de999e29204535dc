"""Worker processes bring receipts and errors back, die, are killed, and end with their parent."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from persea.errors import DataError, MissingRequirementError, TeacherError
from persea.executors import local
from persea.executors.executor import (
    Attempt,
    Executor,
    Failure,
    Outcome,
    PartDone,
    Receipt,
    WorkUnit,
)
from persea.executors.local import InProcessExecutor, ProcessExecutor


class Runner:
    """Does what the payload says."""

    def run(self, attempt: Attempt, on_part: Callable[[float], None]) -> Receipt:
        on_part(0.0)
        what = attempt.unit.payload
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hang":
            time.sleep(1000)
        if what == "data":
            raise DataError("no such row", where="file:3", remedy="mend it")
        if what == "bug":
            raise ValueError("half a number")
        return Receipt(attempt.id, f"pid {os.getpid()}", 0.1, 2, 1, "digest")


def broken() -> Runner:
    os._exit(3)


def attempt(name: str, what: str = "") -> Attempt:
    return Attempt(WorkUnit(name, "teacher", what), 1)


def ends(executor: Executor, n: int) -> list[Outcome]:
    """The next n outcomes that end an attempt."""
    found: list[Outcome] = []
    until = time.monotonic() + 120
    while len(found) < n and time.monotonic() < until:
        found += [o for o in executor.receive(1.0) if not isinstance(o, PartDone)]
    assert len(found) == n
    return found


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessExecutor]:
    monkeypatch.setattr(local, "PRELOADED_MODULES", ())
    executor = ProcessExecutor(Runner, 2)
    yield executor
    executor.close()


def test_processes_run_attempts_and_come_back_with_receipts_and_errors(
    workers: ProcessExecutor,
) -> None:
    names = [workers.submit(attempt("a")), workers.submit(attempt("b", "data"))]
    assert len(set(names)) == 2
    by_id = {o.attempt_id: o for o in ends(workers, 2)}
    assert by_id["a-1"] == Receipt("a-1", names[0], 0.1, 2, 1, "digest")
    failure = by_id["b-1"]
    assert isinstance(failure, Failure)
    assert failure.is_final and not failure.is_lost
    assert str(failure.error) == "file:3: no such row -> mend it"
    assert workers.submit(attempt("c", "bug")) in names  # the process goes on after an error
    (bug,) = ends(workers, 1)
    assert isinstance(bug, Failure)
    assert isinstance(bug.error, TeacherError) and not bug.is_final
    assert "ValueError: half a number" in bug.reason


def test_a_worker_that_dies_loses_its_attempt_and_is_replaced(workers: ProcessExecutor) -> None:
    workers.submit(attempt("z"))
    ends(workers, 1)
    first = workers.submit(attempt("a", "die"))
    (lost,) = ends(workers, 1)
    assert isinstance(lost, Failure)
    assert lost.is_lost
    assert lost.reason == "the worker died: SIGKILL"
    assert workers.submit(attempt("b")) != first
    assert isinstance(ends(workers, 1)[0], Receipt)


def test_a_cancelled_attempt_is_killed_and_brings_nothing(workers: ProcessExecutor) -> None:
    name = workers.submit(attempt("a", "hang"))
    workers.cancel("a-1")
    with pytest.raises(ProcessLookupError):
        os.kill(int(name.split()[1]), 0)
    workers.submit(attempt("b"))
    assert [o.attempt_id for o in ends(workers, 1)] == ["b-1"]


def test_workers_that_cannot_begin_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "PRELOADED_MODULES", ())
    executor = ProcessExecutor(broken, 1)
    with pytest.raises(MissingRequirementError, match=r"3 workers died before .* exit code 3"):
        for k in range(5):
            executor.submit(attempt(f"u{k}"))
            ends(executor, 1)
    executor.close()


def test_this_process_runs_one_attempt_after_the_other(tmp_path: Path) -> None:
    parts: list[tuple[str, float]] = []
    executor = InProcessExecutor(Runner, lambda a, share: parts.append((a.id, share)))
    assert executor.receive(0) == ()
    executor.submit(attempt("a"))
    executor.submit(attempt("b"))
    executor.cancel("b-1")
    (receipt,) = executor.receive(0)
    assert receipt.attempt_id == "a-1"
    assert (executor.receive(0), parts) == ((), [("a-1", 0.0)])
    executor.submit(attempt("c", "data"))
    with pytest.raises(DataError, match="no such row"):
        executor.receive(0)
    executor.close()
