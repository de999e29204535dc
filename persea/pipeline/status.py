"""The status of a run: written while it runs, and read from files alone, also after a crash.

status.json in the run folder is written when a stage begins or ends, and at most every 2 s in
between. Whether a run is alive is read from the folder's lock, which a dead process cannot hold.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persea import storage
from persea.errors import DataError, PerseaError, RunInterrupted, StorageError
from persea.pipeline.ledger_status import UnitsStatus, read_units_status
from persea.pipeline.stage_keys import STAGE_NAMES
from persea.pipeline.stage_store import StageStore
from persea.pipeline.time_left import TimeLeft

if TYPE_CHECKING:
    from persea.vocab_extension.resize_model import ProgressCallback

STATUS_FILE = "status.json"
WRITE_INTERVAL_S = 2.0  # each write is synced to the disk: 43,200 writes a day


class RunState(StrEnum):
    """State of a run.

    RUNNING: a process holds the folder. DONE, STOPPED (by a signal) and FAILED: the run ended and
    recorded it. DIED: the run recorded no end, and no process holds the folder. NEW: no run yet.
    """

    NEW = "new"
    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"
    DIED = "died"


@dataclass(frozen=True)
class RunStatus:
    """A run folder at a glance.

    Attributes:
        state: State of the run.
        seconds_by_stage: Finished stage -> seconds that it took.
        stage: The stage that was worked on last.
        fraction_done: Fraction of that stage that is done, in [0, 1].
        message: The stage's last progress message.
        updated_at: Time of the last update, seconds since 1970.
        seconds_left: Seconds until that stage ends at its present pace; None = unknown.
        lock_holder: Process that holds the folder; "" = none.
        error: Why the run ended, one line; "" = nothing.
        checkpoint_step: Step of the newest checkpoint of the training; None = no checkpoint.
        units: Units of work by stage, from the ledger; () = the run has none.
    """

    state: RunState
    seconds_by_stage: dict[str, float]
    stage: str
    fraction_done: float
    message: str
    updated_at: float
    seconds_left: float | None
    lock_holder: str
    error: str
    checkpoint_step: int | None
    units: tuple[UnitsStatus, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the status as JSON."""
        return asdict(self)


@contextmanager
def record_status(
    folder: Path,
    run_name: str,
    progress: ProgressCallback,
    on_written: Callable[[bool], None] = lambda is_end: None,
) -> Iterator[ProgressCallback]:
    """Record a run's progress and its end in status.json.

    Args:
        folder: The run folder, locked by this process.
        run_name: Name of the recipe.
        progress: Called with everything that the yielded callback is called with.
        on_written: Called after status.json is written, with whether the run ends.

    Yields:
        A progress callback that also writes status.json. An exception is recorded and raised on.
    """
    header = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "name": run_name,
        "started_at": round(time.time(), 1),
    }
    current: dict[str, Any] = {
        "state": RunState.RUNNING,
        "stage": "",
        "fraction_done": 0.0,
        "message": "",
        "seconds_left": None,
        "error": "",
    }
    time_left = TimeLeft(lambda: time.monotonic())
    last_write = 0.0
    for partial in folder.glob(".*.tmp"):  # of a killed run: the lock excludes a live one
        storage.DISK.remove(partial)

    def write() -> None:
        nonlocal last_write
        last_write = time.monotonic()
        updated = {"updated_at": round(time.time(), 1)}
        storage.write_json(folder / STATUS_FILE, header | current | updated)
        on_written(current["state"] is not RunState.RUNNING)

    def recorded_progress(stage: str, fraction: float, message: str) -> None:
        progress(stage, fraction, message)
        clock, is_new_stage = time.monotonic(), stage != current["stage"]
        is_first_message = not current["message"] and bool(message)
        left = time_left.update(stage, fraction, message)
        current.update(
            stage=stage,
            fraction_done=round(fraction, 6),
            message=message,
            seconds_left=None if left is None else round(left, 1),
        )
        if (
            is_new_stage
            or is_first_message
            or fraction == 1.0
            or clock - last_write >= WRITE_INTERVAL_S
        ):
            write()

    try:
        yield recorded_progress
        current.update(state=RunState.DONE, seconds_left=None)
        write()
    except BaseException as error:
        is_known = isinstance(error, PerseaError | RunInterrupted)
        current.update(
            state=RunState.STOPPED if isinstance(error, RunInterrupted) else RunState.FAILED,
            seconds_left=None,
            error=str(error) if is_known else f"a bug in persea: {type(error).__name__}: {error}",
        )
        with suppress(StorageError):  # `error` already reports a full disk
            write()
        raise


def read_status(folder: Path) -> RunStatus:
    """Read the status of a run from its folder.

    Raises:
        DataError: The folder is no run folder, or status.json or a stage's record is broken.
    """
    if not (folder / "lock").is_file():
        raise DataError(
            "not a run folder",
            where=str(folder),
            remedy="give the folder of a run, such as runs/quickstart",
        )
    seconds_by_stage = _read_stage_seconds(folder)
    lock_holder = storage.lock_holder(folder)
    units = read_units_status(folder, time.time(), is_running=bool(lock_holder))
    try:
        recorded = (
            json.loads((folder / STATUS_FILE).read_bytes())
            if (folder / STATUS_FILE).is_file()
            else {}
        )
        state = RunState(recorded["state"]) if recorded else RunState.NEW
        if lock_holder or state is RunState.RUNNING:
            state = RunState.RUNNING if lock_holder else RunState.DIED
        steps = [
            int(p.stem.partition("-")[2])
            for p in (folder / "train" / "checkpoints").glob("step-*.json")
        ]
        return RunStatus(
            state,
            seconds_by_stage,
            recorded.get("stage", ""),
            float(recorded.get("fraction_done", 0)),
            recorded.get("message", ""),
            float(recorded.get("updated_at", 0)),
            recorded.get("seconds_left") if state is RunState.RUNNING else None,
            lock_holder,
            _end_message(state, recorded),
            max(steps, default=None),
            units,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"not a status file: {error!r}",
            where=str(folder / STATUS_FILE),
            remedy="delete it; the next run writes it anew",
        ) from error


def _read_stage_seconds(folder: Path) -> dict[str, float]:
    stages = StageStore(folder)
    return {
        stage: float(stages.read_record(stage)["seconds"])
        for stage in STAGE_NAMES
        if stages.has_record(stage)
    }


def _end_message(state: RunState, recorded: dict[str, Any]) -> str:
    if state is RunState.DIED:
        return (
            "the run ended without recording why (killed, out of memory, or a power loss): "
            f"pid {recorded['pid']} on {recorded['host']} -> run the same command to continue"
        )
    return str(recorded.get("error", ""))


def status_lines(run_status: RunStatus, now: float) -> list[str]:
    """Return the status as lines of text: the run, each stage, and the last error.

    Args:
        run_status: The status.
        now: The time, seconds since 1970.
    """
    head = run_status.state.value
    if run_status.stage and run_status.state is not RunState.DONE:
        head += f" in {run_status.stage} ({run_status.fraction_done:.0%})"
    if run_status.updated_at:
        head += f", {_format_seconds(now - run_status.updated_at)} ago"
    if run_status.lock_holder:
        head += f", held by {run_status.lock_holder}"
    units = {one.stage: one.lines() for one in run_status.units}
    lines = [head]
    for stage in STAGE_NAMES:
        lines.append(f"{stage:>9} {_stage_line(run_status, stage)}")
        lines += [f"{'':9} {line}" for line in units.get(stage, ())]
    return lines + ([f"    error {run_status.error}"] if run_status.error else [])


def _stage_line(run_status: RunStatus, stage: str) -> str:
    if stage in run_status.seconds_by_stage:
        return f"done in {_format_seconds(run_status.seconds_by_stage[stage])}"
    if stage != run_status.stage:
        return "-"
    line = f"{run_status.fraction_done:.0%} {run_status.message}"
    if run_status.seconds_left is not None:
        line += f"; {_format_seconds(run_status.seconds_left)} left"
    if stage == "train" and run_status.checkpoint_step is not None:
        line += f"; step {run_status.checkpoint_step:,} is saved"
    return line


def _format_seconds(seconds: float) -> str:
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
