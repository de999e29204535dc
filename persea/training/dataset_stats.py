"""Counts of the cached answers that became examples, and of those that were skipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.alignment.spans import SupervisionKind
from persea.cache.unit import CachedAnswer
from persea.chat.messages import ThinkingEffort
from persea.errors import DataError
from persea.training.example import NUM_COUNTS, Example, training_effort

MAX_SKIP_REASONS = 100  # reasons of skipped answers that are reported


@dataclass(frozen=True)
class DatasetStats:
    """Counts of one pass over the cached answers, before the first step (train/dataset.json).

    Attributes:
        examples: answers that became examples, by teacher.
        skipped: answers that were skipped, by teacher.
        too_long: skipped answers with more than `max_length` tokens.
        unrenderable: skipped answers that the student's template or tokenizer cannot write.
        reasons: why, for the first MAX_SKIP_REASONS of the unrenderable answers.
        supervision: by teacher and language, the sum of `Example.counts`.
        efforts: examples by the thinking effort at which they are learned.
        thinking_dropped: examples that are learned as direct answers although the teacher thought
            first: the student does not see the thinking.
    """

    examples: Mapping[str, int]
    skipped: Mapping[str, int]
    too_long: int
    unrenderable: int
    reasons: tuple[str, ...]
    supervision: Mapping[tuple[str, str], npt.NDArray[np.float64]]
    efforts: Mapping[str, int]
    thinking_dropped: int

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON.

        `supervision` has a row for each teacher and language: the share of supervised tokens of
        each `SupervisionKind`, the share of common boundaries whose two tokens are different
        events, and the share of the teacher's mass that events and masks retain.
        """
        rows = []
        for (teacher, language), counts in sorted(self.supervision.items()):
            kinds = counts[: len(SupervisionKind)]
            differ, mass, retained = counts[len(SupervisionKind) :].tolist()
            total = max(1.0, kinds.sum())
            rows.append(
                {
                    "teacher": teacher,
                    "language": language,
                    "tokens": int(kinds.sum()),
                    **{k.name.lower(): round(float(kinds[k] / total), 4) for k in SupervisionKind},
                    "disagreement": round(differ / max(1.0, kinds[SupervisionKind.EVENT]), 4),
                    "mass_retained": round(retained / mass, 4) if mass else None,
                }
            )
        return {
            "examples": dict(self.examples),
            "skipped": dict(self.skipped),
            "too_long": self.too_long,
            "unrenderable": self.unrenderable,
            "reasons": list(self.reasons),
            "supervision": rows,
            "efforts": dict(self.efforts),
            "thinking_dropped": self.thinking_dropped,
        }


class DatasetSurvey:
    """Counts of the pass over all answers; see `DatasetStats`."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.examples, self.skipped, self.efforts = Counter[str](), Counter[str](), Counter[str]()
        self.too_long = self.unrenderable = self.thinking_dropped = 0
        self.reasons: list[str] = []
        self.supervision: dict[tuple[str, str], npt.NDArray[np.float64]] = {}

    def add_unrenderable(self, answer: CachedAnswer, error: DataError) -> None:
        """Count an answer that the student cannot write."""
        self.unrenderable += 1
        self.skipped[answer.answer.teacher] += 1
        if len(self.reasons) < MAX_SKIP_REASONS:
            self.reasons.append(f"{answer.answer.prompt_id}: {error}")

    def add(self, answer: CachedAnswer, example: Example) -> bool:
        """Count an example; False if it is too long."""
        if len(example.tokens) > self.max_length:
            self.too_long += 1
            self.skipped[example.teacher] += 1
            return False
        effort = training_effort(answer)
        self.examples[example.teacher] += 1
        self.efforts[effort.value] += 1
        self.thinking_dropped += bool(
            effort is ThinkingEffort.NONE and answer.answer.conversation.messages[-1].thinking
        )
        key = example.teacher, example.language
        self.supervision[key] = self.supervision.get(key, np.zeros(NUM_COUNTS)) + example.counts
        return True

    def stats(self) -> DatasetStats:
        """Return the counts."""
        return DatasetStats(
            self.examples,
            self.skipped,
            self.too_long,
            self.unrenderable,
            tuple(self.reasons),
            self.supervision,
            self.efforts,
            self.thinking_dropped,
        )
