"""Evaluation: compare the student with its teachers, its base and reference models on the same
held-out items.

Every model answers every task in every language at every effort; the result is scores, bits per
byte and paired differences with intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from persea import storage
from persea.chat.messages import ThinkingEffort
from persea.errors import SafetyRegressionError
from persea.evaluation.answering import EvaluatedModel, answer_items, reference_bits
from persea.tasks.intervals import CONFIDENCE_LEVEL
from persea.tasks.task import (
    ItemResult,
    PairedComparison,
    Score,
    Task,
    TaskItem,
    compare_paired_results,
    score_results,
)

# A skill whose name begins with it guards the release: a student that loses on it ends the run with
# exit code 4.
SAFETY_SKILL_PREFIX = "safety"
EvaluationResultKey: TypeAlias = tuple[str, ThinkingEffort, str]  # model, effort, skill


@dataclass(frozen=True)
class EvaluationResult:
    """The result of an evaluation.

    Attributes:
        student: Name of the student.
        base: Name of the model it was trained from.
        teachers: Names of the teachers.
        effort: The student's own thinking effort.
        scores: Scores of every model, skill and effort, over all items and per language.
        bits_per_byte: Model -> skill -> bits per byte of the reference answers; "all" over all
            skills, only for models that can render every reference.
        reference_models: Models measured for comparison only.
        comparisons: Student minus each other model, at each effort of the student.
        regressions: Comparisons with the base in which the student is worse with confidence.
        not_asked: Models without a chat template, which have bits per byte and no scores.
    """

    student: str
    base: str
    teachers: tuple[str, ...]
    effort: ThinkingEffort
    scores: tuple[Score, ...]
    bits_per_byte: Mapping[str, Mapping[str, float]]
    reference_models: tuple[str, ...] = ()
    comparisons: tuple[PairedComparison, ...] = ()
    regressions: tuple[PairedComparison, ...] = ()
    not_asked: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; keys are the field names."""
        return {
            "student": self.student,
            "base": self.base,
            "teachers": list(self.teachers),
            "reference_models": list(self.reference_models),
            "effort": self.effort,
            "scores": [s.to_json() for s in self.scores],
            "bits_per_byte": {k: dict(v) for k, v in self.bits_per_byte.items()},
            "compared": [p.to_json() for p in self.comparisons],
            "regressions": [p.to_json() for p in self.regressions],
            **({"not_asked": list(self.not_asked)} if self.not_asked else {}),
        }


@dataclass
class EvaluationAnswers:
    """Graded answers of the models that were measured.

    Attributes:
        results: (model, effort, skill) -> graded answers, in the order measured.
        bits_per_byte: Model -> skill -> bits per byte of the reference answers.
        num_answers: Number of answers.
        num_reused: How many of them were kept from an earlier run.
    """

    results: dict[EvaluationResultKey, tuple[ItemResult, ...]] = field(default_factory=dict)
    bits_per_byte: dict[str, dict[str, float]] = field(default_factory=dict)
    num_answers: int = 0
    num_reused: int = 0

    def results_for(self, name: str, effort: ThinkingEffort, skill: str) -> tuple[ItemResult, ...]:
        """Return a model's results at an effort, or at its own (first measured) if it has none."""
        return self.results.get((name, effort, skill)) or next(
            r for (n, _, s), r in self.results.items() if (n, s) == (name, skill)
        )

    def iter_scores(self) -> Iterator[Score]:
        """Yield scores over all items and, for a skill in several languages, per language."""
        for (name, effort, skill), results in self.results.items():
            for language in ("", *result_languages(results)):
                yield score_results(name, skill, results, effort, language)

    def iter_answer_records(self) -> Iterator[dict[str, Any]]:
        """Yield every answer as a JSON line."""
        for (name, effort, skill), results in self.results.items():
            for result in results:
                yield {"model_name": name, "skill": skill, "effort": effort} | result.to_json()


def result_languages(results: Sequence[ItemResult]) -> tuple[str, ...]:
    """Return the languages of a skill's items; () if there is only one."""
    languages = sorted({r.item.prompt.language for r in results})
    return tuple(languages) if len(languages) > 1 else ()


def evaluate_model(
    answers: EvaluationAnswers,
    model: EvaluatedModel,
    tasks: Sequence[tuple[Task, Sequence[TaskItem]]],
    max_new_tokens: int,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> None:
    """Measure one model on every task at each of its efforts, and add the results to `answers`.

    A model without a chat template is not asked: only its bits per byte are measured.

    Args:
        answers: Receives graded answers and bits per byte.
        model: The model.
        tasks: Tasks with their items.
        max_new_tokens: Longest answer, in the model's tokens.
        progress: Called with (share done, text) after each task.
    """
    bits_and_bytes: list[tuple[float, int]] = []
    answers.bits_per_byte[model.name] = {}
    for k, (task, items) in enumerate(tasks):
        results: tuple[ItemResult, ...] = ()
        for effort in model.efforts if model.can_be_asked else ():
            results, reused = answer_items(model, effort, task, items, max_new_tokens)
            answers.results[model.name, effort, task.name] = results
            answers.num_answers += len(results)
            answers.num_reused += reused
        bits, num_bytes = reference_bits(model, items)
        bits_and_bytes.append((bits, num_bytes))
        if num_bytes:
            answers.bits_per_byte[model.name][task.name] = bits / num_bytes
        message = f"{model.name} {task.name}, bits per byte"
        if results:
            score = score_results(model.name, task.name, results, effort).value
            note = ", from disk" if reused == len(results) else ""
            message = f"{model.name} {task.name} {score:.2f}{note}"
        progress((k + 1) / len(tasks), message)
    num_bytes = sum(n for _, n in bits_and_bytes)
    # A model that cannot render all references spends its bits on other texts than the others.
    if 0 < num_bytes == _count_reference_bytes(tasks):
        answers.bits_per_byte[model.name]["all"] = sum(b for b, _ in bits_and_bytes) / num_bytes


def _count_reference_bytes(tasks: Sequence[tuple[Task, Sequence[TaskItem]]]) -> int:
    return sum(
        len(p.text.encode())
        for _, items in tasks
        for i in items
        if i.reference or i.calls
        for p in i.reference_conversation.messages[-1].parts
    )


def compare_student(answers: EvaluationAnswers, student: str) -> tuple[PairedComparison, ...]:
    """Compare the student with every other model.

    Args:
        answers: Graded answers of all models.
        student: Name of the student.

    Returns:
        Paired differences per skill, over all items and per language, at each effort of the
        student. The other model answers at the same effort, or at its own if it was not measured
        at that one.
    """
    comparisons: list[PairedComparison] = []
    for effort, skill, results in _results_of(answers, student):
        others = dict.fromkeys(n for n, _, s in answers.results if n != student and s == skill)
        for other in others:
            other_results = answers.results_for(other, effort, skill)
            comparisons += [
                compare_paired_results(
                    (student, other), skill, results, other_results, effort, language
                )
                for language in ("", *result_languages(results))
            ]
    return tuple(comparisons)


def _results_of(
    answers: EvaluationAnswers, name: str
) -> Iterator[tuple[ThinkingEffort, str, tuple[ItemResult, ...]]]:
    for (model_name, effort, skill), results in answers.results.items():
        if model_name == name:
            yield effort, skill, results


def find_regressions(
    answers: EvaluationAnswers,
    student: str,
    base: str,
    confidence: float = CONFIDENCE_LEVEL,
) -> tuple[PairedComparison, ...]:
    """Find comparisons in which the student is worse than its base with confidence.

    With the default of 95 %, an equally good student is called worse in at most 2.5 % of the
    skills, and in 2.5 % for all L languages of a skill together: each is tested at 1 - 0.05 / L.

    Args:
        answers: Graded answers of all models.
        student: Name of the student.
        base: Name of the base.
        confidence: Level of the two-sided intervals.
    """
    regressions = []
    for effort, skill, results in _results_of(answers, student):
        base_results, languages = (
            answers.results_for(base, effort, skill),
            result_languages(results),
        )
        for language in ("", *languages):
            level = 1 - (1 - confidence) / len(languages) if language else confidence
            pair = compare_paired_results(
                (student, base), skill, results, base_results, effort, language, level
            )
            if pair.high < 0:
                regressions.append(pair)
    return tuple(regressions)


def refuse_saved_regressions(evaluation_path: Path) -> None:
    """Apply `refuse_safety_regressions` to an evaluation.json."""
    refuse_safety_regressions(
        [PairedComparison(**p) for p in storage.read_json(evaluation_path)["regressions"]],
        str(evaluation_path),
    )


def refuse_safety_regressions(regressions: Sequence[PairedComparison], where: str) -> None:
    """Check that no regression is on a safety skill.

    Raises:
        SafetyRegressionError: The student is less safe than its base.
    """
    on_safety = [p for p in regressions if p.skill.startswith(SAFETY_SKILL_PREFIX)]
    if not on_safety:
        return
    details = "; ".join(
        f"{p.skill}{f' in {p.language}' if p.language else ''} "
        f"{p.difference:+.2f} ({p.low:+.2f} to {p.high:+.2f}, n {p.n})"
        for p in on_safety
    )
    raise SafetyRegressionError(
        f"the student is less safe than its base: {details}",
        where=where,
        remedy="look at evaluate/examples.jsonl; teach safety too, "
        "or write evaluation.allow_safety_regression: true",
    )
