"""Who is stopped, killed or fails among processes that train together is named, and nobody is left
behind.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from pathlib import Path

import pytest

from persea.errors import (
    DataError,
    MissingRequirementError,
    PerseaError,
    RefusedError,
    RunInterrupted,
    StorageError,
)
from persea.training.distributed.heartbeat import decode_failure, encode_failure
from persea.training.distributed.launcher import launch_processes
from persea.training.distributed.world import ParallelStrategy
from tests.cli.test_cli import warm
from tests.worlds_of_two import SETTINGS, Trouble, student_run


@pytest.fixture(autouse=True, scope="module")
def server() -> None:
    """Children come from the server that the other tests use, where torch is imported already."""
    warm().Process(target=print).start()


@pytest.mark.parametrize(
    "error",
    [
        DataError("broken", where="file", remedy="mend it"),
        RefusedError("no"),
        StorageError("full", where="/x"),
        MissingRequirementError("gone"),
    ],
)
def test_an_error_comes_back_as_it_was(error: PerseaError) -> None:
    again = decode_failure(encode_failure(1, error))
    assert (type(again), str(again)) == (type(error), str(error))


def test_a_signal_and_a_bug_come_back_too() -> None:
    again = decode_failure(encode_failure(1, RunInterrupted(15, "step 3 is saved")))
    assert isinstance(again, RunInterrupted)
    assert (again.exit_code, str(again)) == (143, str(RunInterrupted(15, "step 3 is saved")))
    try:
        os.stat("/nowhere/at/all")
    except OSError as error:
        bug = decode_failure(encode_failure(1, error))
    assert isinstance(bug, RuntimeError)
    assert "rank 1:" in str(bug)
    assert os.strerror(errno.ENOENT) in str(bug)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_or_killed_is_named(
    tmp_path: Path, number: signal.Signals, rank: int
) -> None:
    begin = time.monotonic()
    with pytest.raises(MissingRequirementError) as caught:
        launch_processes(
            student_run,
            (tmp_path, ParallelStrategy.DDP, SETTINGS, Trouble(rank, 3, number)),
            2,
            lambda told: None,
        )
    assert time.monotonic() - begin < 60
    assert caught.value.exit_code == 7
    found = re.match(rf"train: rank {rank} \(pid (\d+)", str(caught.value))
    assert found, caught.value
    assert ("no heartbeat for 2 s" in str(caught.value)) == (number == signal.SIGSTOP)
    assert not alive(int(found[1]))
    assert (
        tmp_path / "checkpoints" / "step-00000002.json"
    ).is_file()  # what the same command goes on from
