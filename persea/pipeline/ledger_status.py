"""What the ledger of a run says of its units: done, speed, cost so far, stragglers, quarantine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from persea.executors.ledger import StageLedger, read_ledger

STRAGGLER_FACTOR = 2.0  # times the median of the teacher's units
MIN_UNITS_OF_MEDIAN = 3
MAX_LISTED = 3  # units in text; JSON has all
MIN_RATE_S = 1e-3


@dataclass(frozen=True)
class Straggler:
    """A running attempt that takes longer than others of its teacher.

    Attributes:
        unit: Name of the unit.
        teacher: Its teacher.
        worker: Who runs it; "" = unknown.
        seconds: How long it has run.
        median_seconds: Median of the teacher's finished units.
    """

    unit: str
    teacher: str
    worker: str
    seconds: float
    median_seconds: float


@dataclass(frozen=True)
class UnitsStatus:
    """The units of one stage.

    Attributes:
        stage: The stage.
        planned: Units of the plan.
        committed: Units that are done.
        pending: Units that are neither done nor in quarantine.
        running: Attempts that have started and not ended.
        quarantined: Unit -> why it was left out.
        tokens_paid: Tokens that all attempts paid.
        tokens_kept: Tokens of the committed units.
        tokens_per_second: Tokens that one worker commits a second; None = nothing is committed.
        worker_hours: Hours of all workers in committed units.
        money: worker_hours times the recipe's `plan.price_per_hour`; None = no price.
        stragglers: Attempts that take more than twice the median of their teacher.
        num_failed: Attempts that failed or were cancelled.
        num_lost: Attempts that ended with their worker.
    """

    stage: str
    planned: int
    committed: int
    pending: int
    running: int
    quarantined: Mapping[str, str]
    tokens_paid: int
    tokens_kept: int
    tokens_per_second: float | None
    worker_hours: float
    money: float | None
    stragglers: tuple[Straggler, ...]
    num_failed: int
    num_lost: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the units as lines of text."""
        parts = [f"{self.committed:,} of {self.planned:,} units done", f"{self.pending:,} pending"]
        parts += [f"{self.running:,} running"] * (self.running > 0)
        parts += [f"{len(self.quarantined):,} in quarantine"] * (len(self.quarantined) > 0)
        lines = [", ".join(parts)]
        tokens = f"{self.tokens_kept:,} tokens kept of {self.tokens_paid:,} paid"
        if self.tokens_per_second is not None:
            tokens += f", {self.tokens_per_second:,.0f} tokens/s a worker"
        tokens += f", {self.worker_hours:,.2f} worker hours"
        if self.money is not None:
            tokens += f", cost so far {self.money:,.2f}"
        lines.append(tokens)
        if self.num_failed or self.num_lost:
            lines.append(f"{self.num_failed:,} attempts failed, {self.num_lost:,} lost")
        lines += [
            f"slow: unit {s.unit[:12]} of {s.teacher} for {s.seconds:,.0f} s, others take "
            f"{s.median_seconds:,.0f} s" + (f" ({s.worker})" if s.worker else "")
            for s in self.stragglers[:MAX_LISTED]
        ]
        listed = list(self.quarantined.items())[:MAX_LISTED]
        lines += [f"quarantine: unit {unit[:12]}: {reason}" for unit, reason in listed]
        return lines


def read_units_status(folder: Path, now: float, *, is_running: bool) -> tuple[UnitsStatus, ...]:
    """Read the ledger of a running, finished or dead run.

    Args:
        folder: The run folder.
        now: The time, seconds since 1970.
        is_running: Whether a process holds the folder: otherwise nothing runs.

    Returns:
        The stages of the ledger, in its order; none if the run has no ledger.

    Raises:
        DataError: The ledger is broken.
    """
    price = _price_per_hour(folder)
    return tuple(
        _stage_status(stage, sums, now if is_running else None, price)
        for stage, sums in read_ledger(folder).items()
    )


def _stage_status(
    stage: str, sums: StageLedger, now: float | None, price: float | None
) -> UnitsStatus:
    seconds = [s for group in sums.seconds_by_group.values() for s in group]
    hours = sum(seconds) / 3600
    return UnitsStatus(
        stage,
        sums.planned,
        sums.committed,
        sums.pending,
        len(sums.running) if now is not None else 0,
        dict(sums.quarantined),
        sums.tokens_paid,
        sums.tokens_kept,
        sums.tokens_kept / max(sum(seconds), MIN_RATE_S) if seconds and sums.tokens_kept else None,
        hours,
        None if price is None else hours * price,
        tuple(_stragglers(sums, now)) if now is not None else (),
        sums.num_failed,
        sums.num_lost,
    )


def _stragglers(sums: StageLedger, now: float) -> list[Straggler]:
    """Return the running attempts that take too long, the longest first."""
    found = []
    for attempt in sums.running.values():
        finished: Sequence[float] = sums.seconds_by_group.get(attempt.group, ())
        if len(finished) < MIN_UNITS_OF_MEDIAN:
            continue
        median, spent = statistics.median(finished), now - attempt.started_at
        if spent > STRAGGLER_FACTOR * median:
            found.append(Straggler(attempt.unit, attempt.group, attempt.worker, spent, median))
    return sorted(found, key=lambda one: -one.seconds)


def _price_per_hour(folder: Path) -> float | None:
    """Return `plan.price_per_hour` of the recipe in a run folder; None if it has none."""
    try:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        price = recipe["plan"]["price_per_hour"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None
    return float(price) if isinstance(price, int | float) else None
