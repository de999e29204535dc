"""Account for a capture: its speed, its budget, and the outcome of every prompt."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persea.cache.unit import read_record
from persea.chat.messages import FinishReason
from persea.data.prompts import MALFORMED_LINE_REASON, Corpus, MalformedLine
from persea.errors import RefusedError

if TYPE_CHECKING:
    from persea.cache.capture import CaptureUnit


@dataclass(frozen=True)
class UnitProgress:
    """A finished unit.

    Attributes:
        num_prompts: Its prompts.
        num_tokens: Tokens that are stored.
        is_new: Whether this run captured it.
        name: Name of the unit.
    """

    num_prompts: int
    num_tokens: int
    is_new: bool
    name: str = ""


def capture_summary(units: Sequence[CaptureUnit], folder: Path) -> dict[str, Any]:
    """Count the answers of all units. prompts = kept + left out, always.

    Args:
        units: The units of the run.
        folder: The cache folder.

    Returns:
        Counts in total and by teacher, and the answers that are left out by reason.

    Raises:
        DataError: A unit is not committed.
        RefusedError: No answer is complete.
    """
    total: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    teachers: dict[str, Counter[str]] = {}
    for unit in units:
        record = read_record(folder, unit.name)
        counts = {
            "prompts": len(unit.prompts),
            "kept": record["answers"],
            **{k: record[k] for k in ("tokens", "positions", "entries", "bytes")},
        }
        total.update(counts)
        left_out.update(record["dropped"])
        teachers.setdefault(unit.teacher, Counter()).update(counts)
    if not total["kept"]:
        raise RefusedError(
            f"none of {total['prompts']} answers is complete ({dict(left_out)})",
            where="capture",
            remedy="raise capture.max_new_tokens, or look at the answers: the teachers may not "
            "follow their templates",
        )
    return {
        **total,
        "left_out": dict(left_out),
        "teachers": {k: dict(v) for k, v in teachers.items()},
    }


MAX_QUARANTINE_IN_SUMMARY = 100  # quarantine.jsonl holds all


def quarantine_records(
    units: Sequence[CaptureUnit], folder: Path, malformed: Sequence[MalformedLine]
) -> list[dict[str, Any]]:
    """Return a record of every line and prompt that was not asked: location and reason.

    Args:
        units: The units of the run.
        folder: The cache folder.
        malformed: Lines of prompt files that could not be read.
    """
    return [asdict(b) for b in malformed] + [
        {"location": f"prompt {prompt}, {unit.teacher}, unit {unit.name}", "reason": reason}
        for unit in units
        for prompt, reason in read_record(folder, unit.name)["quarantine"]
    ]


def account_for_prompts(
    totals: dict[str, Any], corpus: Corpus, quarantine: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return how many prompts were kept, skipped or quarantined.

    Raises:
        AssertionError: The counts do not add up to the prompts that came in: a bug in persea.
    """
    skipped = (
        len(corpus.removed)
        + sum(totals["left_out"].values())
        - totals["left_out"].get(FinishReason.REFUSED.value, 0)
    )
    found = {
        "in": corpus.num_inputs,
        "kept": totals["kept"],
        "skipped": skipped,
        "quarantined": len(quarantine),
    }
    if found["in"] != totals["kept"] + skipped + len(quarantine):
        raise AssertionError(f"prompts were lost: {found}")
    return found | {
        "quarantine": [
            {"location": q["location"], "reason": q["reason"]}
            for q in quarantine[:MAX_QUARANTINE_IN_SUMMARY]
        ],
    }


def count_left_out(summary: Mapping[str, Any]) -> dict[str, int]:
    """Return reason -> number of prompts, texts and lines that a capture left out.

    Args:
        summary: The content of capture/summary.json.
    """
    counts = Counter(summary.get("removed", {})) + Counter(summary["left_out"])
    refused = summary["left_out"].get(FinishReason.REFUSED.value, 0)
    counts[MALFORMED_LINE_REASON] += summary["quarantined"] - refused
    return dict(+counts)


def left_out_lines(counts: Mapping[str, int]) -> list[str]:
    """Return a line for each reason why prompts and texts were left out."""
    return [f"{count:,} left out: {reason}" for reason, count in counts.items() if count]


class CaptureBudget:
    """Measures the speed of a capture, and stops it when it has cost enough.

    Args:
        num_prompts: Prompts of the whole capture.
        max_tokens: Most tokens to store, those of earlier runs included; 0 = no limit.
        max_hours: Most hours of this run; 0 = no limit.
        clock: Returns seconds.
        work_by_unit: Unit -> its work, such as bytes of text times weights of the teacher. The time
            left follows from it; without it from the number of prompts.
    """

    def __init__(
        self,
        num_prompts: int,
        max_tokens: int = 0,
        max_hours: float = 0,
        clock: Callable[[], float] = time.monotonic,
        work_by_unit: Mapping[str, float] | None = None,
    ) -> None:
        self.num_prompts = num_prompts
        self.max_tokens = max_tokens
        self.max_hours = max_hours
        self.clock = clock
        self._start_s = clock()
        self._work_by_unit = work_by_unit or {}
        self._total_work = sum(self._work_by_unit.values()) or float(num_prompts)
        self._work_done = self._new_work = 0.0
        self._work_start_s: float | None = None  # loading the teacher is no work
        self._prompts_done = 0
        self._tokens_cached = self._new_tokens = 0

    def record_unit(self, unit: UnitProgress) -> tuple[float, str]:
        """Count a finished unit.

        Returns:
            The fraction of prompts that is done, and a message: prompts, tokens a second, time
            left.

        Raises:
            RefusedError: A limit is reached, and prompts are left.
        """
        self._prompts_done += unit.num_prompts
        self._tokens_cached += unit.num_tokens
        work = self._work_by_unit.get(unit.name, float(unit.num_prompts))
        self._work_done += work
        self._new_work += work if unit.is_new else 0
        self._new_tokens += unit.num_tokens if unit.is_new else 0
        now = self.clock()
        self._refuse_overspending((now - self._start_s) / 3600)
        return self._describe(now, 0.0)

    @property
    def fraction_done(self) -> float:
        """The fraction of the work that is done."""
        return min(1.0, self._work_done / self._total_work) if self._total_work else 0.0

    def record_part(self, unit_name: str, share: float) -> tuple[float, str]:
        """Return the same inside a unit, of which a share is done. The first call starts the clock
        of the work.
        """
        now = self.clock()
        if self._work_start_s is None:
            self._work_start_s = now
        return self._describe(now, share * self._work_by_unit.get(unit_name, 0.0))

    def _describe(self, now: float, part_work: float) -> tuple[float, str]:
        seconds = now - (self._start_s if self._work_start_s is None else self._work_start_s)
        new_work, done = self._new_work + part_work, self._work_done + part_work
        message = f"{self._prompts_done}/{self.num_prompts} prompts"
        if new_work and seconds > 0:
            if self._new_tokens:
                message += f", {self._new_tokens / seconds:,.0f} tokens/s"
            left = max(0.0, self._total_work - done) * seconds / new_work
            message += f", {_format_seconds_left(left)} left" if left else ""
        return min(1.0, done / self._total_work), message

    def _refuse_overspending(self, hours: float) -> None:
        tokens = self._tokens_cached
        for limit, spent, key, amount in (
            (self.max_tokens, tokens, "capture.max_total_tokens", f"{tokens:,} tokens"),
            (self.max_hours, hours, "capture.max_hours", f"{hours:.2f} hours"),
        ):
            if limit and spent >= limit and self._prompts_done < self.num_prompts:
                raise RefusedError(
                    f"the budget is spent: {amount} for {self._prompts_done:,} of "
                    f"{self.num_prompts:,} prompts",
                    where=key,
                    remedy=f"raise {key} and run again: committed units stay",
                )


def _format_seconds_left(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
