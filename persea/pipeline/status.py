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
from persea.errors import DataError, PerseaError, Stopped, StorageError

if TYPE_CHECKING:
    from persea.pipeline.run_context import Tell

NAME, EVERY = "status.json", 2.0  # seconds: the file is synced to the disk, and a day of them is 43,200 writes
STAGES = ("check", "audition", "capture", "train", "evaluate", "lineage", "report")


class Life(StrEnum):
    """RUNS: a process holds the folder. DONE, STOPPED (by a signal), FAILED: it said so. DIED: it said nothing and holds nothing. NEW: never ran."""

    NEW = "new"
    RUNS = "runs"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"
    DIED = "died"


@dataclass(frozen=True)
class Status:
    """A run folder at a glance.

    stands       stages whose record is there, with the seconds they took
    stage        the last that was worked on; share of it in [0, 1], words it said; when it was last heard of, seconds since 1970
    left         seconds until the end of that stage at its pace so far; None where nobody can say
    error        what it ended with last, one line; "" = nothing
    checkpoint   newest checkpoint of the training, its step
    """

    life: Life
    stands: dict[str, float]
    stage: str
    share: float
    words: str
    heard: float
    left: float | None
    holder: str
    error: str
    checkpoint: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def journal(folder: Path, name: str, tell: Tell) -> Iterator[Tell]:
    """A `tell` that also keeps status.json; what ends the run is written there and goes on its way."""
    begun = {"pid": os.getpid(), "host": socket.gethostname(), "name": name, "started": round(time.time(), 1)}
    now: dict[str, Any] = {"life": Life.RUNS, "stage": "", "share": 0.0, "words": "", "left": None, "error": ""}
    first: dict[str, tuple[float, float]] = {}
    written = [0.0]
    for half in folder.glob(".*.tmp"):  # a killed run's; the lock says that nobody writes them now
        store.DISK.remove(half)

    def write() -> None:
        written[0] = time.monotonic()
        store.publish_json(folder / NAME, begun | now | {"heard": round(time.time(), 1)})

    def told(stage: str, share: float, words: str) -> None:
        tell(stage, share, words)
        clock = time.monotonic()
        if stage != now["stage"] or (stage not in first and words):
            first[stage] = share, clock
        since, begin = first.get(stage, (share, clock))
        left = round((clock - begin) / (share - since) * (1 - share), 1) if share > since else None
        turns = stage != now["stage"] or share in (0.0, 1.0)
        now.update(stage=stage, share=round(share, 6), words=words, left=left)
        if turns or clock - written[0] >= EVERY:
            write()

    try:
        yield told
        now.update(life=Life.DONE, left=None)
        write()
    except BaseException as error:
        known = isinstance(error, PerseaError | Stopped)
        now.update(life=Life.STOPPED if isinstance(error, Stopped) else Life.FAILED, left=None,
                   error=str(error) if known else f"a bug of persea: {type(error).__name__}: {error}")
        with suppress(StorageError):  # a disk that takes no more is told by the error that is on its way
            write()
        raise


def status(folder: Path) -> Status:
    """What a run folder's files say. DataError where it is none, or status.json is broken."""
    if not (folder / "lock").is_file():
        raise DataError("no run has been here", where=str(folder), remedy="give a run folder, such as runs/quickstart")
    stands = {s: float(store.read_sealed(folder / s / "done.json", "delete it and run the stage again")["seconds"])
              for s in STAGES if (folder / s / "done.json").is_file()}
    holder = store.holder(folder)
    try:
        said = json.loads((folder / NAME).read_bytes()) if (folder / NAME).is_file() else {}
        life = Life(said["life"]) if said else Life.NEW
        if holder or life is Life.RUNS:
            life = Life.RUNS if holder else Life.DIED
        steps = [int(p.stem.partition("-")[2]) for p in (folder / "train" / "checkpoints").glob("step-*.json")]
        return Status(life, stands, said.get("stage", ""), float(said.get("share", 0)), said.get("words", ""), float(said.get("heard", 0)),
                      said.get("left") if life is Life.RUNS else None, holder, _ended(life, said), max(steps, default=None))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"not a status: {error!r}", where=str(folder / NAME), remedy="delete it; a run writes it anew") from error


def _ended(life: Life, said: dict[str, Any]) -> str:
    if life is Life.DIED:
        return f"it ended without a word (killed, out of memory, or the power went): pid {said['pid']} on {said['host']} -> the same command goes on"
    return str(said.get("error", ""))


def lines(told: Status, now: float) -> list[str]:
    """The status in words, a line each."""
    ago = f", {_time(now - told.heard)} ago" if told.heard else ""
    at = f" in {told.stage} ({told.share:.0%})" if told.stage and told.life is not Life.DONE else ""
    rows = [f"{' '.join(filter(None, (told.life.value, at.strip())))}{ago}" + (f", held by {told.holder}" if told.holder else "")]
    rows += [f"{stage:>9} {'stands, ' + _time(told.stands[stage]) if stage in told.stands else _doing(told, stage)}" for stage in STAGES]
    return rows + ([f"    error {told.error}"] if told.error else [])


def _doing(told: Status, stage: str) -> str:
    if stage != told.stage:
        return "-"
    left = f"; {_time(told.left)} left" if told.left is not None else ""
    saved = f"; step {told.checkpoint:,} is saved" if stage == "train" and told.checkpoint is not None else ""
    return f"{told.share:.0%} {told.words}{left}{saved}"


def _time(seconds: float) -> str:
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 120 else f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h {whole % 3600 // 60} min"
