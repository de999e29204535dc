"""Counts of the cached answers that became examples, and of those that were skipped."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
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
EFFORTS = tuple(ThinkingEffort)


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


@dataclass(frozen=True, eq=False)
class ExampleSummary:
    """What the survey counts of A answers, one after another.

    Attributes:
        teachers: names that `teacher_A` numbers.
        languages: names that `language_A` numbers.
        teacher_A: int32, teacher of each answer.
        language_A: int32, language of its prompt.
        length_A: int32, tokens of the example; 0 = the student cannot write the answer.
        effort_A: int8, thinking effort at which it is learned, by its place in ThinkingEffort.
        thinking_dropped_A: bool, learned as a direct answer although the teacher thought first.
        counts_AC: float64, `Example.counts` of each.
        errors: (number of the answer, why the student cannot write it) of the first ones.
    """

    teachers: tuple[str, ...]
    languages: tuple[str, ...]
    teacher_A: npt.NDArray[np.int32]
    language_A: npt.NDArray[np.int32]
    length_A: npt.NDArray[np.int32]
    effort_A: npt.NDArray[np.int8]
    thinking_dropped_A: npt.NDArray[np.bool_]
    counts_AC: npt.NDArray[np.float64]
    errors: tuple[tuple[int, str], ...]


class ExampleSummaryBuilder:
    """Collects the counts of answers for an `ExampleSummary`."""

    def __init__(self) -> None:
        self._teachers: dict[str, int] = {}
        self._languages: dict[str, int] = {}
        self._numbers = array("q")  # four a answer: teacher, language, length, effort
        self._dropped = array("b")
        self._counts = array("d")
        self._errors: list[tuple[int, str]] = []

    def add_unrenderable(self, answer: CachedAnswer, error: DataError) -> None:
        """Add an answer that the student cannot write."""
        if len(self._errors) < MAX_SKIP_REASONS:
            self._errors.append((len(self._dropped), f"{answer.answer.prompt_id}: {error}"))
        self._add(answer, 0, np.zeros(NUM_COUNTS))

    def add(self, answer: CachedAnswer, example: Example) -> None:
        """Add an answer and its example."""
        self._add(answer, len(example.tokens), example.counts)

    def _add(self, answer: CachedAnswer, length: int, counts: npt.NDArray[np.float64]) -> None:
        one, effort = answer.answer, training_effort(answer)
        self._numbers.extend(
            (
                self._teachers.setdefault(one.teacher, len(self._teachers)),
                self._languages.setdefault(one.language, len(self._languages)),
                length,
                EFFORTS.index(effort),
            )
        )
        self._dropped.append(
            effort is ThinkingEffort.NONE and bool(one.conversation.messages[-1].thinking)
        )
        self._counts.extend(counts.tolist())

    def build(self) -> ExampleSummary:
        """Return the summary of all answers that were added."""
        numbers_A4 = np.array(self._numbers, np.int64).reshape(-1, 4)
        return ExampleSummary(
            tuple(self._teachers),
            tuple(self._languages),
            numbers_A4[:, 0].astype(np.int32),
            numbers_A4[:, 1].astype(np.int32),
            numbers_A4[:, 2].astype(np.int32),
            numbers_A4[:, 3].astype(np.int8),
            np.array(self._dropped, np.bool_),
            np.array(self._counts, np.float64).reshape(-1, NUM_COUNTS),
            tuple(self._errors),
        )


class DatasetSurvey:
    """Counts of the pass over all answers; see `DatasetStats`."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.examples, self.skipped, self.efforts = Counter[str](), Counter[str](), Counter[str]()
        self.too_long = self.unrenderable = self.thinking_dropped = 0
        self.reasons: list[str] = []
        self.supervision: dict[tuple[str, str], npt.NDArray[np.float64]] = {}

    def add(
        self, summary: ExampleSummary, selected: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.int64]:
        """Count answers.

        Args:
            summary: counts of the answers.
            selected: numbers of the answers to count, rising; None = all.

        Returns:
            int64, the numbers of the answers that become examples.
        """
        chosen = np.arange(len(summary.length_A)) if selected is None else selected
        length = summary.length_A[chosen]
        kept, lost = chosen[(length > 0) & (length <= self.max_length)], chosen[length == 0]
        self.unrenderable += len(lost)
        self.too_long += len(chosen) - len(kept) - len(lost)
        is_lost = set(lost.tolist())
        room = MAX_SKIP_REASONS - len(self.reasons)
        self.reasons += [words for number, words in summary.errors if number in is_lost][:room]
        skipped = chosen[(length == 0) | (length > self.max_length)]
        _count(self.skipped, summary.teachers, summary.teacher_A[skipped])
        _count(self.examples, summary.teachers, summary.teacher_A[kept])
        _count(self.efforts, [effort.value for effort in EFFORTS], summary.effort_A[kept])
        self.thinking_dropped += int(summary.thinking_dropped_A[kept].sum())
        parts = summary.teacher_A[kept].astype(np.int64) * max(1, len(summary.languages))
        parts += summary.language_A[kept]
        for part in np.unique(parts).tolist():
            teacher, language = divmod(part, max(1, len(summary.languages)))
            key = summary.teachers[teacher], summary.languages[language]
            counts = summary.counts_AC[kept[parts == part]].sum(axis=0)
            self.supervision[key] = self.supervision.get(key, np.zeros(NUM_COUNTS)) + counts
        return kept

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


def _count(
    into: Counter[str], names: Sequence[str], numbers: npt.NDArray[np.signedinteger]
) -> None:
    for number, count in zip(*np.unique(numbers, return_counts=True), strict=True):
        into[names[int(number)]] += int(count)
