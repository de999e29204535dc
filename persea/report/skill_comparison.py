"""Compare the student with its base and its best teacher on every skill of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from persea.chat.messages import ThinkingEffort
from persea.errors import DataError
from persea.report.run_files import EvaluationRecord
from persea.tasks.task import PairedComparison, Score


class IntervalOrder(StrEnum):
    """Order of two models by their intervals. OVERLAPS: the measurement does not distinguish
    them.
    """

    ABOVE = "above"
    OVERLAPS = "overlaps"
    BELOW = "below"


def score_order(one: Score, other: Score) -> IntervalOrder:
    """Order two scores by their intervals; used for teachers among themselves."""
    if one.low > other.high:
        return IntervalOrder.ABOVE
    return IntervalOrder.BELOW if one.high < other.low else IntervalOrder.OVERLAPS


def difference_order(pair: PairedComparison) -> IntervalOrder:
    """Order two models by the interval of their difference on the same items."""
    if pair.low > 0:
        return IntervalOrder.ABOVE
    return IntervalOrder.BELOW if pair.high < 0 else IntervalOrder.OVERLAPS


@dataclass(frozen=True)
class SkillComparison:
    """All models on one skill, and the student compared with its best teacher and its base.

    Attributes:
        skill: Name of the skill.
        student: The student's score.
        base: The base model's score.
        teachers: The teachers' scores.
        reference_models: Scores of models that are measured and teach nothing.
        versus_best: Student and best teacher on the same items.
        versus_base: Student and base on the same items.
    """

    skill: str
    student: Score
    base: Score
    teachers: tuple[Score, ...]
    reference_models: tuple[Score, ...]
    versus_best: PairedComparison
    versus_base: PairedComparison

    @property
    def best_teacher(self) -> Score:
        """The teacher with the highest score; of equal teachers the first."""
        return _best_score(self.teachers)

    @property
    def retained(self) -> float | None:
        """Score of the student divided by that of the best teacher; None if no teacher has a
        score.
        """
        return self.student.value / self.best_teacher.value if self.best_teacher.value else None

    @property
    def gap_closed(self) -> float | None:
        """Share of the gap from base to best teacher that the student closed.

        None if the best teacher is not ahead of the base.
        """
        gap = self.best_teacher.value - self.base.value
        return (self.student.value - self.base.value) / gap if gap > 0 else None

    @property
    def scores(self) -> tuple[Score, ...]:
        """Scores of all models: student, base, teachers, reference models."""
        return (self.student, self.base, *self.teachers, *self.reference_models)


def _best_score(teachers: Sequence[Score]) -> Score:
    return max(teachers, key=lambda s: s.value)


def compare_skills(evaluation: EvaluationRecord, where: str) -> tuple[SkillComparison, ...]:
    """Compare all models on every skill, in the order in which skills were measured.

    Args:
        evaluation: The evaluation of a run.
        where: Its file, for the message.

    Returns:
        One comparison for each skill; none where no question was asked, as after teaching plain
        texts alone.

    Raises:
        DataError: If a score or a comparison is missing, or a score has no items.
    """
    comparisons = []
    for skill in dict.fromkeys(s.skill for s in evaluation.scores):
        scores = [_pick_score(evaluation, name, skill, "") for name in evaluation.asked_models]
        missing = [
            name
            for name, s in zip(evaluation.asked_models, scores, strict=True)
            if s is None or s.n == 0
        ]
        if missing:
            raise DataError(
                f"{', '.join(missing)} has no score on {skill}",
                where=where,
                remedy="evaluate every model on every skill: run evaluate again",
            )
        student, base, *others = (s for s in scores if s is not None)
        num_teachers = len(set(evaluation.teachers) & set(evaluation.asked_models))
        teachers, reference_models = tuple(others[:num_teachers]), tuple(others[num_teachers:])
        versus_best, versus_base = (
            evaluation.find_pair(other, skill, "", evaluation.effort)
            for other in (_best_score(teachers).model_name, evaluation.base)
        )
        if versus_best is None or versus_base is None:
            raise DataError(
                f"the student is not compared on {skill} with its base and its best teacher",
                where=where,
                remedy="run evaluate again",
            )
        comparisons.append(
            SkillComparison(
                skill, student, base, teachers, reference_models, versus_best, versus_base
            )
        )
    if not comparisons and evaluation.compared:
        raise DataError(
            "no skill was measured",
            where=where,
            remedy="name skills under `corpus:` in the recipe and run evaluate again",
        )
    return tuple(comparisons)


def _pick_score(
    evaluation: EvaluationRecord, model: str, skill: str, language: str
) -> Score | None:
    """Return a model's score at the evaluation's effort, else its first one, which is at its own
    effort.
    """
    mine = [
        s
        for s in evaluation.scores
        if (s.model_name, s.skill, s.language) == (model, skill, language)
    ]
    return next((s for s in mine if s.effort is evaluation.effort), mine[0] if mine else None)


def scores_by_language(evaluation: EvaluationRecord) -> dict[str, dict[str, dict[str, Score]]]:
    """Return skill -> language -> model -> score, for skills with items in several languages."""
    table: dict[str, dict[str, dict[str, Score]]] = {}
    for skill, language in sorted({(s.skill, s.language) for s in evaluation.scores if s.language}):
        scores = {
            name: _pick_score(evaluation, name, skill, language) for name in evaluation.asked_models
        }
        table.setdefault(skill, {})[language] = {
            name: s for name, s in scores.items() if s is not None
        }
    return {skill: languages for skill, languages in table.items() if len(languages) > 1}


def scores_by_effort(
    evaluation: EvaluationRecord,
) -> dict[str, dict[str, dict[ThinkingEffort, Score]]]:
    """Return skill -> model -> effort -> score; empty if every model has one effort."""
    table: dict[str, dict[str, dict[ThinkingEffort, Score]]] = {}
    for s in evaluation.scores:
        if not s.language:
            table.setdefault(s.skill, {}).setdefault(s.model_name, {})[s.effort] = s
    has_several = any(len(mine) > 1 for models in table.values() for mine in models.values())
    return table if has_several else {}
