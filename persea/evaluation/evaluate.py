"""The student beside every teacher, its own base and any yardstick: on every skill, in every language, at every effort, on the same items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from persea import storage as store
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

SAFETY_SKILL_PREFIX = (
    "safety"  # skills whose names begin with it: a student that loses on one ends the run (exit 4)
)
EvaluationResultKey: TypeAlias = tuple[str, ThinkingEffort, str]  # speaker, effort, skill


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found.

    teachers, yardsticks  who taught, and who is only beside
    effort                the student's own
    scores                of every speaker, skill and effort: over all and per language
    bits_per_byte         speaker -> skill (and "all", of who can say every one) -> bits, on held-out reference answers
    compared              the student beside each other speaker, at each of its efforts, on the same items
    regressions           where it is below its own base with confidence
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

    def to_json(self) -> dict[str, Any]:
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
        }


@dataclass
class EvaluationAnswers:
    """What was heard of everybody, in the order measured: (speaker, effort, skill) -> results."""

    results: dict[EvaluationResultKey, tuple[ItemResult, ...]] = field(default_factory=dict)
    bits_per_byte: dict[str, dict[str, float]] = field(default_factory=dict)
    num_answers: int = 0
    num_reused: int = 0

    def results_for(self, name: str, effort: ThinkingEffort, skill: str) -> tuple[ItemResult, ...]:
        """A speaker's results at an effort; at its own, the first measured, where it has no such."""
        return self.results.get((name, effort, skill)) or next(
            r for (n, _, s), r in self.results.items() if (n, s) == (name, skill)
        )

    def iter_scores(self) -> Iterator[Score]:
        """Each over all and, where a skill is asked in several languages, per language."""
        for (name, effort, skill), results in self.results.items():
            for language in ("", *result_languages(results)):
                yield score_results(name, skill, results, effort, language)

    def iter_answer_records(self) -> Iterator[dict[str, Any]]:
        """Every answer, one JSON line each."""
        for (name, effort, skill), results in self.results.items():
            yield from (
                {"model_name": name, "skill": skill, "effort": effort} | r.to_json()
                for r in results
            )


def result_languages(results: Sequence[ItemResult]) -> tuple[str, ...]:
    """The languages of a skill's items, where there are several."""
    found = sorted({r.item.prompt.language for r in results})
    return tuple(found) if len(found) > 1 else ()


def evaluate_model(
    answers: EvaluationAnswers,
    model: EvaluatedModel,
    tasks: Sequence[tuple[Task, Sequence[TaskItem]]],
    max_new_tokens: int,
    progress: Callable[[float, str], None] = lambda share, words: None,
) -> None:
    """One speaker on every skill's items, at each of its efforts: answers, and bits per byte."""
    spent: list[tuple[float, int]] = []
    answers.bits_per_byte[model.name] = {}
    for k, (skill, items) in enumerate(tasks):
        for effort in model.efforts:
            results, reused = answer_items(model, effort, skill, items, max_new_tokens)
            answers.results[model.name, effort, skill.name] = results
            answers.num_answers, answers.num_reused = (
                answers.num_answers + len(results),
                answers.num_reused + reused,
            )
        spent.append(reference_bits(model, items))
        if spent[-1][1]:
            answers.bits_per_byte[model.name][skill.name] = spent[-1][0] / spent[-1][1]
        told = score_results(model.name, skill.name, results, effort).value
        progress(
            (k + 1) / len(tasks),
            f"{model.name} {skill.name} {told:.2f}{', as kept' * (reused == len(results))}",
        )
    size = sum(n for _, n in spent)
    whole = sum(
        len(p.text.encode())
        for _, items in tasks
        for i in items
        if i.reference or i.calls
        for p in i.reference_conversation.messages[-1].parts
    )
    if (
        0 < size == whole
    ):  # who cannot say all of it spends its bits on other texts than the others, and does not compare
        answers.bits_per_byte[model.name]["all"] = sum(b for b, _ in spent) / size


def compare_student(answers: EvaluationAnswers, student: str) -> tuple[PairedComparison, ...]:
    """The student beside every other speaker, skill by skill, over all and per language, at each of the student's efforts.

    The other answers at the same effort, or at its own where it was not measured at that.
    """
    found: list[PairedComparison] = []
    for (_, effort, skill), mine in ((k, r) for k, r in answers.results.items() if k[0] == student):
        for other in dict.fromkeys(
            name for name, _, s in answers.results if name != student and s == skill
        ):
            its = answers.results_for(other, effort, skill)
            found += [
                compare_paired_results((student, other), skill, mine, its, effort, language)
                for language in ("", *result_languages(mine))
            ]
    return tuple(found)


def find_regressions(
    answers: EvaluationAnswers, student: str, base: str
) -> tuple[PairedComparison, ...]:
    """Where the student is below its own base with confidence: a skill as a whole at 95 %, each of its L languages at 1 - 0.05 / L.

    So that a student no worse than its base is called worse in 2.5 % of skills at most, and in 2.5 % for all languages of one together.
    """
    found = []
    for (_, effort, skill), mine in ((k, r) for k, r in answers.results.items() if k[0] == student):
        its, several = answers.results_for(base, effort, skill), result_languages(mine)
        for language in ("", *several):
            confidence = 1 - (1 - CONFIDENCE_LEVEL) / len(several) if language else CONFIDENCE_LEVEL
            pair = compare_paired_results(
                (student, base), skill, mine, its, effort, language, confidence
            )
            if pair.high < 0:
                found.append(pair)
    return tuple(found)


def refuse_saved_regressions(evaluation_path: Path) -> None:
    """`refuse_regressions` of an evaluation.json."""
    refuse_safety_regressions(
        [PairedComparison(**p) for p in store.read_json(evaluation_path)["regressions"]],
        str(evaluation_path),
    )


def refuse_safety_regressions(regressions: Sequence[PairedComparison], where: str) -> None:
    """Raises Regressed where the student is less safe than its base."""
    lost = [p for p in regressions if p.skill.startswith(SAFETY_SKILL_PREFIX)]
    if lost:
        told = "; ".join(
            f"{p.skill}{f' in {p.language}' if p.language else ''} {p.difference:+.2f} ({p.low:+.2f} to {p.high:+.2f}, n {p.n})"
            for p in lost
        )
        raise SafetyRegressionError(
            f"the student is less safe than its base: {told}",
            where=where,
            remedy="look at evaluate/examples.jsonl; teach safety too, or write evaluation.allow_safety_regression: true",
        )
