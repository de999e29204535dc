"""Tasks, graders and scores, shared by the audition and the evaluation.

A task supplies items (questions with a reference answer) and a grader. `grade_answers` grades a
model's answers, `score_results` averages them into a `Score`, and `compare_paired_results` compares
two models on the same items. Every number comes with its n and a confidence interval
(persea.tasks.intervals).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from math import isfinite
from typing import Any

from persea.chat.messages import Conversation, FinishReason, Message, Text, ThinkingEffort, ToolCall
from persea.data.prompts import Prompt
from persea.errors import MissingRequirementError, RefusedError, StorageError, TeacherError
from persea.tasks.intervals import (
    CONFIDENCE_LEVEL,
    mean_interval,
    paired_difference_interval,
    paired_ratio_interval,
)

# Upper ends of the buckets 0..99 of each split: 60 % pretrain, 26 % train, 6 % audition, 8 % test.
# Fixed for ever: another bound would put test items into the text that the saplings were trained
# on.
PRETRAIN_BELOW, TRAIN_BELOW, AUDITION_BELOW = 60, 86, 92
MAX_GRADER_ERROR_CHARS = 300  # of a grader's exception, in the examples


class Split(StrEnum):
    """The use of an item.

    The hash of its question assigns each item to exactly one split, for ever.
    """

    PRETRAIN = "grow"  # the text that the saplings were pretrained on
    TRAIN = "teach"  # prompts that teachers answer and the student learns from
    AUDITION = "audition"  # items that choose the teachers
    TEST = "test"  # items that compare all models


def assign_split(question: str) -> Split:
    """Return the split of a question.

    60 % PRETRAIN, 26 % TRAIN, 6 % AUDITION, 8 % TEST, by its SHA-256.
    """
    bucket = hashlib.sha256(question.encode()).digest()[0] * 100 // 256
    if bucket < PRETRAIN_BELOW:
        return Split.PRETRAIN
    if bucket < TRAIN_BELOW:
        return Split.TRAIN
    return Split.AUDITION if bucket < AUDITION_BELOW else Split.TEST


class Verdict(StrEnum):
    """The outcome of grading one answer."""

    RIGHT = "right"
    WRONG = "wrong"
    MALFORMED = "malformed"  # cut off, or in no form that the grader can read
    GRADER_ERROR = "failed"  # the grader raised on this answer: worth 0, counted and reported


@dataclass(frozen=True)
class Grade:
    """A verdict, the answer's value in [0, 1] (such as chrF / 100), and a short reason.

    Raises:
        ValueError: If the value is NaN or outside [0, 1].
    """

    verdict: Verdict
    value: float
    reason: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:  # also false for NaN
            raise ValueError(f"a grade of {self.value}, not in [0, 1]")


@dataclass(frozen=True)
class TaskItem:
    """A question and one right answer.

    Attributes:
        prompt: The question, with its id, task and language.
        reference: Text of the right answer.
        calls: Tool calls of the right answer, after its text.
        choices: Answers to rank by likelihood; `reference` is one of them. Empty if the model
            answers freely.
        answer_key: Data that the grader needs besides the reference, in the task's own format
            (tests, constraints).
    """

    prompt: Prompt
    reference: str
    calls: tuple[ToolCall, ...] = ()
    choices: tuple[str, ...] = ()
    answer_key: str = ""

    @property
    def reference_conversation(self) -> Conversation:
        """The question with its right answer."""
        text = (Text(self.reference),) if self.reference or not self.calls else ()
        return self.prompt.conversation.with_answer(*text, *self.calls)


@dataclass(frozen=True)
class Task:
    """A skill: items to ask and a grader.

    Attributes:
        name: The name that a recipe uses.
        languages: Languages of the items.
        items: (split, n, seed) -> at most n different items of the split, in a fixed order.
        grade: (item, answer) -> a verdict, worth 1 if RIGHT and else 0; or a Grade if an answer can
            be partly right.
        num_train_items: Different items of split TRAIN; None = unknown.
    """

    name: str
    languages: tuple[str, ...]
    items: Callable[[Split, int, int], tuple[TaskItem, ...]]
    grade: Callable[[TaskItem, Message], Verdict | Grade]
    num_train_items: int | None = None


@dataclass(frozen=True)
class Score:
    """A model's mean value over n items, with its confidence interval [low, high].

    Attributes:
        model_name: Name of the measured model.
        skill: Name of the task.
        language: Language of the items; "" = all.
        effort: Thinking effort of the answers.
        value: Mean value in [0, 1]: the share right, if every item is right or wrong.
        n: Number of items.
        low: Lower end of the confidence interval.
        high: Upper end of the confidence interval.
        grader_errors: Answers that the grader raised on; each counts as 0.
        malformed: Answers that did not stop or could not be read; each counts as 0.
    """

    model_name: str
    skill: str
    language: str
    effort: ThinkingEffort
    value: float
    n: int
    low: float
    high: float
    grader_errors: int = 0
    malformed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class PairedComparison:
    """Two models on the same n items: difference and ratio of their means, each with its interval.

    Attributes:
        model_name: The first model.
        other_model_name: The second model.
        skill: Name of the task.
        language: Language of the items; "" = all.
        effort: Thinking effort of the first model.
        n: Number of common items.
        difference: Mean of the first model minus mean of the second.
        low: Lower end of the interval of the difference.
        high: Upper end of the interval of the difference.
        retained: Mean of the first model divided by mean of the second; None if the second has
            nothing right.
        retained_low: Lower end of the interval of the ratio; None if `retained` is.
        retained_high: Upper end of the interval of the ratio; None if the data do not bound it.
    """

    model_name: str
    other_model_name: str
    skill: str
    language: str
    effort: ThinkingEffort
    n: int
    difference: float
    low: float
    high: float
    retained: float | None = None
    retained_low: float | None = None
    retained_high: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class ItemResult:
    """One graded answer, kept so that a score can be inspected.

    `choice_logprobs_per_byte` holds the log-probability of each choice of the item divided by its
    UTF-8 length, in nats per byte.
    """

    item: TaskItem
    answer: Message
    finish: FinishReason
    verdict: Verdict
    value: float
    reason: str = ""
    choice_logprobs_per_byte: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the line of examples.jsonl.

        Thinking, calls, reason and choice log-probabilities only if there are any.
        """
        optional = {
            "thinking": self.answer.thinking,
            "calls": [vars(c) for c in self.answer.calls],
            "reason": self.reason,
            "choice_logprobs_per_byte": list(self.choice_logprobs_per_byte),
        }
        return {
            "id": self.item.prompt.id,
            "language": self.item.prompt.language,
            "question": self.item.prompt.conversation.messages[-1].text,
            "reference": self.item.reference,
            "answer": self.answer.text,
            "finish": self.finish,
            "verdict": self.verdict,
            "value": self.value,
            **{name: value for name, value in optional.items() if value},
        }


def grade_answers(
    task: Task, items: Sequence[TaskItem], answers: Sequence[tuple[Message, FinishReason]]
) -> tuple[ItemResult, ...]:
    """Grade answers in order.

    An answer that did not stop by itself is malformed, whatever its text.

    An exception of the grader does not end the run: the answer gets GRADER_ERROR and value 0, and
    the reason names the exception.

    Args:
        task: The task whose grader is used.
        items: N items.
        answers: N pairs of answer and finish reason, in the order of the items.

    Returns:
        N results.

    Raises:
        ValueError: If there are not as many answers as items.
        MissingRequirementError: If the grader cannot run here, such as without a sandbox (exit 7).
        RefusedError: If the judge's server refuses to answer.
        StorageError: If the disk fails.
        TeacherError: If the judge is gone or its budget is used up.
    """
    results = []
    for item, (answer, finish) in zip(items, answers, strict=True):
        grade = (
            _grade_one(task, item, answer)
            if finish is FinishReason.STOP
            else Grade(Verdict.MALFORMED, 0.0)
        )
        results.append(ItemResult(item, answer, finish, grade.verdict, grade.value, grade.reason))
    return tuple(results)


def _grade_one(task: Task, item: TaskItem, answer: Message) -> Grade:
    try:
        found = task.grade(item, answer)
        return found if isinstance(found, Grade) else Grade(found, float(found is Verdict.RIGHT))
    except (MissingRequirementError, RefusedError, StorageError, TeacherError):
        raise  # the grader's resources are gone, which is no fault of the answer
    except Exception as error:
        return Grade(
            Verdict.GRADER_ERROR, 0.0, f"{type(error).__name__}: {error}"[:MAX_GRADER_ERROR_CHARS]
        )


def score_results(
    model_name: str,
    skill: str,
    results: Sequence[ItemResult],
    effort: ThinkingEffort,
    language: str = "",
    confidence: float = CONFIDENCE_LEVEL,
) -> Score:
    """Average results into a score with its interval.

    Args:
        model_name: Name of the model that answered.
        skill: Name of the task.
        results: Graded answers.
        effort: Thinking effort of the answers.
        language: Count only items of this language; "" = all.
        confidence: Coverage of the interval.

    Returns:
        The score; value 0 and interval [0, 1] if no item is left.
    """
    selected = [r for r in results if not language or r.item.prompt.language == language]
    values = [r.value for r in selected]
    low, high = mean_interval(values, confidence)
    return Score(
        model_name,
        skill,
        language,
        effort,
        sum(values) / max(1, len(values)),
        len(values),
        low,
        high,
        grader_errors=sum(r.verdict is Verdict.GRADER_ERROR for r in selected),
        malformed=sum(r.verdict is Verdict.MALFORMED for r in selected),
    )


def compare_paired_results(
    model_names: tuple[str, str],
    skill: str,
    results_a: Sequence[ItemResult],
    results_b: Sequence[ItemResult],
    effort: ThinkingEffort,
    language: str = "",
    confidence: float = CONFIDENCE_LEVEL,
) -> PairedComparison:
    """Compare two models on the items that both answered, in whatever order.

    Args:
        model_names: Names of the two models.
        skill: Name of the task.
        results_a: Results of the first model.
        results_b: Results of the second model.
        effort: Thinking effort of the first model.
        language: Count only items of this language; "" = all.
        confidence: Coverage of the intervals.

    Returns:
        The comparison over the common items.

    Raises:
        ValueError: If they have no item in common.
    """
    others = {
        r.item.prompt.id: r.value
        for r in results_b
        if not language or r.item.prompt.language == language
    }
    pairs = [(r.value, others[r.item.prompt.id]) for r in results_a if r.item.prompt.id in others]
    return compare_paired_values(model_names, skill, pairs, effort, language, confidence)


def compare_paired_values(
    model_names: tuple[str, str],
    skill: str,
    value_pairs: Sequence[tuple[float, float]],
    effort: ThinkingEffort,
    language: str = "",
    confidence: float = CONFIDENCE_LEVEL,
) -> PairedComparison:
    """Compare two models by pairs of values, one pair for each common item.

    Takes the same arguments as `compare_paired_results`, with pairs of values instead of results.

    Raises:
        ValueError: If there is no pair.
    """
    values_a, values_b = [a for a, _ in value_pairs], [b for _, b in value_pairs]
    low, high = paired_difference_interval(values_a, values_b, confidence)
    retained_low, retained_high = paired_ratio_interval(values_a, values_b, confidence)
    retained = sum(values_a) / sum(values_b) if sum(values_b) else None
    return PairedComparison(
        *model_names,
        skill,
        language,
        effort,
        len(value_pairs),
        (sum(values_a) - sum(values_b)) / len(value_pairs),
        low,
        high,
        retained,
        retained_low if retained is not None else None,
        retained_high if retained is not None and isfinite(retained_high) else None,
    )
