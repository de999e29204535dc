"""The ledger of a run: what every attempt at a unit of work cost, and what was kept of it.

`RUN/ledger.jsonl` has one JSON object a line, appended by the process that holds the run folder.
The ledger explains costs; it decides nothing. A unit exists if its commit record does, and a line
that a crash lost is written again when the run is resumed.

Keys of a line:

- `stage`: the stage, such as "capture".
- `event`: one of `LedgerEvent`.
- `at`: time of the line, seconds since 1970, for people only. Durations come from another clock.
- `unit`, `group`: the unit's name, and its teacher.
- `attempt`, `worker`: number of the attempt at this unit from 1, and who made it.
- `seconds`: how long the attempt ran.
- `tokens_paid`: tokens of all conversations that a teacher read or wrote in the attempt, answers
  that are left out included; null if nobody knows, because the worker is gone.
- `tokens_kept`: tokens in the unit that this attempt committed; 0 for every other event.
- `reason`: why an attempt failed or a unit is in quarantine.

A line `planned` begins each start of a stage, with `planned`, `committed` and `tokens_kept`: units
of the plan, and what is committed of them at that time. Therefore, at any line,

    planned = committed + quarantined + pending

and the tokens paid by all attempts are the sum of `tokens_paid` over all lines.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from persea import storage
from persea.errors import DataError

LEDGER_FILE = "ledger.jsonl"


class LedgerEvent(StrEnum):
    """What a line of the ledger records.

    PLANNED: a stage starts or resumes. STARTED: an attempt was given to a worker. COMMITTED: an
    attempt's result became the unit. REUSED: a unit came from the shared store, or from an attempt
    whose own line was lost. DUPLICATE: an attempt finished after another one had committed. FAILED,
    LOST, CANCELLED: an attempt ended with an error, with its worker, or because it took too long or
    was not needed any more. QUARANTINED: a unit failed so often that the run leaves it out.
    """

    PLANNED = "planned"
    STARTED = "started"
    COMMITTED = "committed"
    REUSED = "reused"
    DUPLICATE = "duplicate"
    FAILED = "failed"
    LOST = "lost"
    CANCELLED = "cancelled"
    QUARANTINED = "quarantined"


ATTEMPT_ENDS = frozenset(
    {
        LedgerEvent.COMMITTED,
        LedgerEvent.DUPLICATE,
        LedgerEvent.FAILED,
        LedgerEvent.LOST,
        LedgerEvent.CANCELLED,
    }
)
COMMITS = frozenset({LedgerEvent.COMMITTED, LedgerEvent.REUSED})


@dataclass(frozen=True)
class RunningAttempt:
    """An attempt that has started and not ended.

    Attributes:
        unit: Name of the unit.
        group: Its teacher.
        attempt: Number of the attempt, from 1.
        worker: Who runs it; "" if the executor chooses later.
        started_at: Seconds since 1970.
    """

    unit: str
    group: str
    attempt: int
    worker: str
    started_at: float


@dataclass
class StageLedger:
    """The lines of one stage, summed up.

    Attributes:
        planned: Units of the plan.
        committed: Units of the plan that are committed.
        quarantined: Unit -> reason, since the stage was started last.
        tokens_paid: Tokens that all attempts paid, as far as known.
        tokens_kept: Tokens in the plan's committed units.
        num_attempts: Attempts of all starts.
        num_duplicates: Attempts that finished after another one had committed.
        num_failed: Attempts that ended with an error or were cancelled.
        num_lost: Attempts that ended with their worker.
        num_unknown: Attempts whose tokens nobody knows.
        running: Attempts without an end.
        seconds_by_group: Teacher -> seconds of each committed attempt, in order.
        first_at: Time of the stage's first line, seconds since 1970.
        last_at: Time of its last line.
        tokens_paid_by_group: Teacher -> tokens that all attempts paid.
    """

    planned: int = 0
    committed: int = 0
    quarantined: dict[str, str] = field(default_factory=dict)
    tokens_paid: int = 0
    tokens_kept: int = 0
    num_attempts: int = 0
    num_duplicates: int = 0
    num_failed: int = 0
    num_lost: int = 0
    num_unknown: int = 0
    running: dict[tuple[str, int], RunningAttempt] = field(default_factory=dict)
    seconds_by_group: dict[str, list[float]] = field(default_factory=dict)
    first_at: float = 0.0
    last_at: float = 0.0
    tokens_paid_by_group: dict[str, int] = field(default_factory=dict)

    @property
    def pending(self) -> int:
        """Units of the plan that are neither committed nor in quarantine."""
        return self.planned - self.committed - len(self.quarantined)

    def add(self, line: Mapping[str, Any]) -> None:
        """Count one line.

        Raises:
            KeyError: The line lacks a key of its event.
            ValueError: The event is unknown.
        """
        event = LedgerEvent(line["event"])
        self.first_at = self.first_at or float(line["at"])
        self.last_at = float(line["at"])
        if event is LedgerEvent.PLANNED:
            self.planned, self.committed = int(line["planned"]), int(line["committed"])
            self.tokens_kept = int(line["tokens_kept"])
            self.quarantined, self.running = {}, {}
            return
        unit, group = str(line["unit"]), str(line["group"])
        if event is LedgerEvent.STARTED:
            number = int(line["attempt"])
            self.num_attempts += 1
            self.running[unit, number] = RunningAttempt(
                unit, group, number, str(line.get("worker", "")), self.last_at
            )
            return
        if event is LedgerEvent.QUARANTINED:
            self.quarantined[unit] = str(line["reason"])
            return
        if event in ATTEMPT_ENDS:
            self._end_attempt(event, unit, group, line)
        if event in COMMITS:
            self.committed += 1
            self.tokens_kept += int(line["tokens_kept"])

    def _end_attempt(
        self, event: LedgerEvent, unit: str, group: str, line: Mapping[str, Any]
    ) -> None:
        self.running.pop((unit, int(line["attempt"])), None)
        self.num_duplicates += event is LedgerEvent.DUPLICATE
        self.num_lost += event is LedgerEvent.LOST
        self.num_failed += event in (LedgerEvent.FAILED, LedgerEvent.CANCELLED)
        if event is LedgerEvent.COMMITTED:
            self.seconds_by_group.setdefault(group, []).append(float(line["seconds"]))
        paid = line["tokens_paid"]
        if paid is None:
            self.num_unknown += 1
            return
        self.tokens_paid += int(paid)
        self.tokens_paid_by_group[group] = self.tokens_paid_by_group.get(group, 0) + int(paid)


def read_ledger(run_folder: Path) -> dict[str, StageLedger]:
    """Sum up the ledger of a running, finished or dead run.

    Args:
        run_folder: The run folder.

    Returns:
        Stage -> its sums; empty if the run has no ledger. A last line that a crash cut is ignored.

    Raises:
        DataError: Another line is no line of a ledger.
    """
    stages: dict[str, StageLedger] = {}
    for number, line in _read_lines(run_folder / LEDGER_FILE):
        try:
            stages.setdefault(line["stage"], StageLedger()).add(line)
        except (KeyError, ValueError, TypeError) as error:
            raise _broken_line(run_folder / LEDGER_FILE, number, repr(error)) from error
    return stages


def _read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 1, line) of each complete line."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage.unreadable_file_error(path, error) from error
    with file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                return  # cut by a crash
            try:
                line = json.loads(raw)
            except ValueError as error:
                raise _broken_line(path, number, str(error)) from error
            if not isinstance(line, dict):
                raise _broken_line(path, number, "no JSON object")
            yield number, line


def _broken_line(path: Path, number: int, problem: str) -> DataError:
    return DataError(
        f"not a line of a ledger: {problem}",
        where=f"{path}:{number}",
        remedy="move the file away; committed units stay, and the next run begins a new ledger",
    )


class Ledger:
    """Appends the lines of one stage to a run's ledger. One process writes it: the run's own.

    Args:
        run_folder: The run folder, locked by this process.
        stage: Name of the stage.
        clock: Returns seconds since 1970.

    Raises:
        DataError: The ledger is broken. A last line that a crash cut is removed instead.
    """

    def __init__(
        self, run_folder: Path, stage: str, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = run_folder / LEDGER_FILE
        self.stage, self.clock = stage, clock
        self.sums = StageLedger()
        self._kept: dict[str, int] = {}  # unit -> tokens, of all plans
        self._attempts: dict[str, int] = {}  # unit -> attempts so far
        self._size = 0
        for number, line in _read_lines(self.path):
            if line.get("stage") == stage:
                try:
                    self._count(line)
                except (KeyError, ValueError, TypeError) as error:
                    raise _broken_line(self.path, number, repr(error)) from error
        self._size = _complete_size(self.path)

    def begin(
        self, unit_groups: Mapping[str, str], committed: Sequence[str], tokens: Callable[[str], int]
    ) -> None:
        """Record the plan, and account for committed units that no line explains.

        Args:
            unit_groups: Unit -> teacher, of the whole plan.
            committed: The plan's units that are committed.
            tokens: Returns the tokens of a committed unit; called for units without a line.
        """
        lines: list[dict[str, Any]] = []
        for (unit, number), attempt in self.sums.running.items():  # of a driver that died
            lines.append(
                self._line(
                    LedgerEvent.LOST,
                    unit=unit,
                    group=attempt.group,
                    attempt=number,
                    worker=attempt.worker,
                    seconds=None,
                    tokens_paid=None,
                    tokens_kept=0,
                    reason="the run ended before the attempt did",
                )
            )
        for unit in committed:
            if unit not in self._kept:
                lines.append(
                    self._line(
                        LedgerEvent.REUSED,
                        unit=unit,
                        group=unit_groups[unit],
                        tokens_kept=tokens(unit),
                    )
                )
                self._kept[unit] = int(lines[-1]["tokens_kept"])
        kept = sum(self._kept[unit] for unit in committed)
        lines.append(
            self._line(
                LedgerEvent.PLANNED,
                planned=len(unit_groups),
                committed=len(committed),
                tokens_kept=kept,
            )
        )
        self._append(lines)

    @property
    def kept_units(self) -> Sequence[str]:
        """Units that a line says are committed, over all starts of the run."""
        return tuple(self._kept)

    def tokens_kept(self, unit: str) -> int:
        """Return the tokens of a committed unit. Raises KeyError if no line explains it."""
        return self._kept[unit]

    def next_attempt(self, unit: str) -> int:
        """Return the number of the next attempt at a unit, over all starts of the run."""
        return self._attempts.get(unit, 0) + 1

    def record(self, event: LedgerEvent, unit: str, group: str, **values: Any) -> None:
        """Append one line.

        Raises:
            StorageError: The line cannot be written.
        """
        self._append([self._line(event, unit=unit, group=group, **values)])

    def _line(self, event: LedgerEvent, **values: Any) -> dict[str, Any]:
        head = {"stage": self.stage, "event": event.value, "at": round(self.clock(), 3)}
        return head | values

    def _append(self, lines: Sequence[dict[str, Any]]) -> None:
        data = b"".join((json.dumps(line, ensure_ascii=False) + "\n").encode() for line in lines)
        storage.append_bytes(self.path, self._size, data)
        self._size += len(data)
        for line in lines:
            self._count(line)

    def _count(self, line: Mapping[str, Any]) -> None:
        self.sums.add(line)
        if line["event"] == LedgerEvent.STARTED:
            self._attempts[line["unit"]] = max(self._attempts.get(line["unit"], 0), line["attempt"])
        if line["event"] in COMMITS:
            self._kept[line["unit"]] = int(line["tokens_kept"])


def _complete_size(path: Path) -> int:
    """Return the bytes of a file up to its last line end."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return 0
    with path.open("rb") as file:
        while size:
            begin = max(0, size - 65536)
            file.seek(begin)
            end = file.read(size - begin).rfind(b"\n")
            if end >= 0:
                return begin + end + 1
            size = begin
    return 0
