"""What a run did, does, and died of: written as it goes, and read from files alone, also of a dead run.

status.json in the run folder is written at most every 2 s, and whenever a stage begins or ends. Whether the run that wrote it still lives
is not asked of it but of the folder's lock, which a dead process cannot hold.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persea import storage as store
from persea.errors import DataError, PerseaError, RunInterrupted, StorageError

if TYPE_CHECKING:
    from persea.pipeline.run_context import ProgressCallback

STATUS_FILE, WRITE_INTERVAL_S = (
    "status.json",
    2.0,
)  # seconds: the file is synced to the disk, and a day of them is 43,200 writes
STAGE_NAMES = ("check", "audition", "capture", "train", "evaluate", "lineage", "report")


class RunState(StrEnum):
    """RUNS: a process holds the folder. DONE, STOPPED (by a signal), FAILED: it said so. DIED: it said nothing and holds nothing. NEW: never ran."""

    NEW = "new"
    RUNNING = "runs"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"
    DIED = "died"


@dataclass(frozen=True)
class RunStatus:
    """A run folder at a glance.

    stands       stages whose record is there, with the seconds they took
    stage        the last that was worked on; share of it in [0, 1], words it said; when it was last heard of, seconds since 1970
    left         seconds until the end of that stage at its pace so far; None where nobody can say
    error        what it ended with last, one line; "" = nothing
    checkpoint   newest checkpoint of the training, its step
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def record_status(
    folder: Path, run_name: str, progress: ProgressCallback
) -> Iterator[ProgressCallback]:
    """A `tell` that also keeps status.json; what ends the run is written there and goes on its way."""
    begun = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "name": run_name,
        "started": round(time.time(), 1),
    }
    now: dict[str, Any] = {
        "life": RunState.RUNNING,
        "stage": "",
        "share": 0.0,
        "words": "",
        "left": None,
        "error": "",
    }
    first: dict[str, tuple[float, float]] = {}
    written = [0.0]
    for half in folder.glob(".*.tmp"):  # a killed run's; the lock says that nobody writes them now
        store.DISK.remove(half)

    def write() -> None:
        written[0] = time.monotonic()
        store.write_json(folder / STATUS_FILE, begun | now | {"heard": round(time.time(), 1)})

    def told(stage: str, share: float, words: str) -> None:
        progress(stage, share, words)
        clock = time.monotonic()
        if stage != now["stage"] or (stage not in first and words):
            first[stage] = share, clock
        since, begin = first.get(stage, (share, clock))
        left = round((clock - begin) / (share - since) * (1 - share), 1) if share > since else None
        turns = stage != now["stage"] or share in (0.0, 1.0)
        now.update(stage=stage, share=round(share, 6), words=words, left=left)
        if turns or clock - written[0] >= WRITE_INTERVAL_S:
            write()

    try:
        yield told
        now.update(life=RunState.DONE, left=None)
        write()
    except BaseException as error:
        known = isinstance(error, PerseaError | RunInterrupted)
        now.update(
            life=RunState.STOPPED if isinstance(error, RunInterrupted) else RunState.FAILED,
            left=None,
            error=str(error) if known else f"a bug of persea: {type(error).__name__}: {error}",
        )
        with suppress(
            StorageError
        ):  # a disk that takes no more is told by the error that is on its way
            write()
        raise


def read_status(folder: Path) -> RunStatus:
    """What a run folder's files say. DataError where it is none, or status.json is broken."""
    if not (folder / "lock").is_file():
        raise DataError(
            "no run has been here",
            where=str(folder),
            remedy="give a run folder, such as runs/quickstart",
        )
    stands = {
        s: float(
            store.read_json_with_checksum(
                folder / s / "done.json", "delete it and run the stage again"
            )["seconds"]
        )
        for s in STAGE_NAMES
        if (folder / s / "done.json").is_file()
    }
    holder = store.lock_holder(folder)
    try:
        said = (
            json.loads((folder / STATUS_FILE).read_bytes())
            if (folder / STATUS_FILE).is_file()
            else {}
        )
        life = RunState(said["life"]) if said else RunState.NEW
        if holder or life is RunState.RUNNING:
            life = RunState.RUNNING if holder else RunState.DIED
        steps = [
            int(p.stem.partition("-")[2])
            for p in (folder / "train" / "checkpoints").glob("step-*.json")
        ]
        return RunStatus(
            life,
            stands,
            said.get("stage", ""),
            float(said.get("share", 0)),
            said.get("words", ""),
            float(said.get("heard", 0)),
            said.get("left") if life is RunState.RUNNING else None,
            holder,
            _end_message(life, said),
            max(steps, default=None),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"not a status: {error!r}",
            where=str(folder / STATUS_FILE),
            remedy="delete it; a run writes it anew",
        ) from error


def _end_message(state: RunState, recorded: dict[str, Any]) -> str:
    if state is RunState.DIED:
        return f"it ended without a word (killed, out of memory, or the power went): pid {recorded['pid']} on {recorded['host']} -> the same command goes on"
    return str(recorded.get("error", ""))


def status_lines(run_status: RunStatus, now: float) -> list[str]:
    """The status in words, a line each."""
    ago = f", {_format_seconds(now - run_status.updated_at)} ago" if run_status.updated_at else ""
    at = (
        f" in {run_status.stage} ({run_status.fraction_done:.0%})"
        if run_status.stage and run_status.state is not RunState.DONE
        else ""
    )
    rows = [
        f"{' '.join(filter(None, (run_status.state.value, at.strip())))}{ago}"
        + (f", held by {run_status.lock_holder}" if run_status.lock_holder else "")
    ]
    rows += [
        f"{stage:>9} {'stands, ' + _format_seconds(run_status.seconds_by_stage[stage]) if stage in run_status.seconds_by_stage else _stage_line(run_status, stage)}"
        for stage in STAGE_NAMES
    ]
    return rows + ([f"    error {run_status.error}"] if run_status.error else [])


def _stage_line(run_status: RunStatus, stage: str) -> str:
    if stage != run_status.stage:
        return "-"
    left = (
        f"; {_format_seconds(run_status.seconds_left)} left"
        if run_status.seconds_left is not None
        else ""
    )
    saved = (
        f"; step {run_status.checkpoint_step:,} is saved"
        if stage == "train" and run_status.checkpoint_step is not None
        else ""
    )
    return f"{run_status.fraction_done:.0%} {run_status.message}{left}{saved}"


def _format_seconds(seconds: float) -> str:
    whole = max(0, round(seconds))
    return (
        f"{whole} s"
        if whole < 120
        else f"{whole // 60} min"
        if whole < 7200
        else f"{whole // 3600} h {whole % 3600 // 60} min"
    )
