"""Skill and Score: one number with its n and interval. Audition and evaluation are the same measurement."""

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


class Split(StrEnum):
    """Who may see an item. An item belongs to exactly one split, by the hash of its question, for ever."""

    PRETRAIN = "grow"  # what saplings were grown on
    TRAIN = "teach"  # what the cast is asked and the student learns from
    AUDITION = "audition"  # what teachers are chosen by
    TEST = "test"  # what everybody is compared on


def assign_split(question: str) -> Split:
    """The split of a question: 60 % GROW, 26 % TEACH, 6 % AUDITION, 8 % TEST."""
    bucket = hashlib.sha256(question.encode()).digest()[0] * 100 // 256
    return (
        Split.PRETRAIN
        if bucket < 60
        else Split.TRAIN
        if bucket < 86
        else Split.AUDITION
        if bucket < 92
        else Split.TEST
    )


class Verdict(StrEnum):
    RIGHT = "right"
    WRONG = "wrong"
    MALFORMED = "malformed"
    GRADER_ERROR = (
        "failed"  # the grader itself broke on this answer: counted and named, never right
    )


@dataclass(frozen=True)
class Grade:
    """A verdict and how good the answer is: value in [0, 1], such as chrF / 100; `why` says what the grader saw, where that helps."""

    verdict: Verdict
    value: float
    reason: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:  # false of NaN too
            raise ValueError(f"a grade of {self.value}, not in [0, 1]")


@dataclass(frozen=True)
class TaskItem:
    """A question and one right answer.

    reference  the right answer's words
    calls      the right answer's tool calls, behind its words
    choices    what to choose among by likelihood, the reference one of them; empty = the answer is written freely
    key        what the grader must know beyond the reference, in a form of its skill's own (tests, constraints)
    """

    prompt: Prompt
    reference: str
    calls: tuple[ToolCall, ...] = ()
    choices: tuple[str, ...] = ()
    answer_key: str = ""

    @property
    def reference_conversation(self) -> Conversation:
        """The question with its right answer."""
        words = (Text(self.reference),) if self.reference or not self.calls else ()
        return self.prompt.conversation.with_answer(*words, *self.calls)


@dataclass(frozen=True)
class Task:
    """One thing to be good at.

    items   (split, n, seed) -> at most n different items of that split, in a fixed order
    grade   (item, the assistant's message) -> verdict, or a Grade where an answer may be good in part; a verdict alone is worth 1 if RIGHT, else 0
    """

    name: str
    languages: tuple[str, ...]
    items: Callable[[Split, int, int], tuple[TaskItem, ...]]
    grade: Callable[[TaskItem, Message], Verdict | Grade]


@dataclass(frozen=True)
class Score:
    """One number: the mean value of n items (a share, where each is right or not), with its 95 % interval [low, high]."""

    model_name: str
    skill: str
    language: str  # "" = all
    effort: ThinkingEffort
    value: float
    n: int
    low: float
    high: float
    grader_errors: int = 0  # answers the grader broke on; they count as 0
    malformed: int = 0  # answers that did not stop, or could not be read; they count as 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PairedComparison:
    """Two speakers on the same n items: `difference` of their means (speaker - other) and the share `kept` (speaker / other), with intervals.

    kept is None where the other has nothing right; most is None where the data do not bound it.
    """

    model_name: str
    other_model_name: str
    skill: str
    language: str  # "" = all
    effort: ThinkingEffort  # the speaker's
    n: int
    difference: float
    low: float
    high: float
    retained: float | None = None
    retained_low: float | None = None
    retained_high: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ItemResult:
    """One item's outcome, kept so that a score can be inspected."""

    item: TaskItem
    answer: Message
    finish: FinishReason
    verdict: Verdict
    value: float
    reason: str = ""
    choice_logprobs_per_byte: tuple[float, ...] = ()  # of the item's choices, in nats a byte

    def to_json(self) -> dict[str, Any]:
        """Thinking, calls, the grader's words and likelihoods only where there are some."""
        said = {
            "thinking": self.answer.thinking,
            "calls": [vars(c) for c in self.answer.calls],
            "why": self.reason,
            "likelihoods": list(self.choice_logprobs_per_byte),
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
            **{name: value for name, value in said.items() if value},
        }


def grade_answers(
    task: Task, items: Sequence[TaskItem], answers: Sequence[tuple[Message, FinishReason]]
) -> tuple[ItemResult, ...]:
    """Results of answers, in order; an answer that did not stop by itself is malformed, whatever it says.

    A grader that raises does not end a run: its answer is FAILED, worth 0, and `why` names the exception. Where what it grades with is gone
    (a sandbox, a judge's server or its budget, the disk), that is no answer's fault: such an error is raised.
    """
    results = []
    for item, (said, finish) in zip(items, answers, strict=True):
        found = (
            _grade_one(task, item, said)
            if finish is FinishReason.STOP
            else Grade(Verdict.MALFORMED, 0.0)
        )
        results.append(ItemResult(item, said, finish, found.verdict, found.value, found.reason))
    return tuple(results)


def _grade_one(task: Task, item: TaskItem, answer: Message) -> Grade:
    try:
        found = task.grade(item, answer)
        return found if isinstance(found, Grade) else Grade(found, float(found is Verdict.RIGHT))
    except (MissingRequirementError, RefusedError, StorageError, TeacherError):
        raise
    except Exception as error:
        return Grade(Verdict.GRADER_ERROR, 0.0, f"{type(error).__name__}: {error}"[:300])


def score_results(
    model_name: str,
    skill: str,
    results: Sequence[ItemResult],
    effort: ThinkingEffort,
    language: str = "",
) -> Score:
    """Mean value of results (of one language, or of all) with its interval."""
    mine = [r for r in results if not language or r.item.prompt.language == language]
    values = [r.value for r in mine]
    low, high = mean_interval(values)
    failed, malformed = (
        sum(r.verdict is v for r in mine) for v in (Verdict.GRADER_ERROR, Verdict.MALFORMED)
    )
    return Score(
        model_name,
        skill,
        language,
        effort,
        sum(values) / max(1, len(values)),
        len(values),
        low,
        high,
        failed,
        malformed,
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
    """One speaker beside another on the items both were asked (of one language, or of all), in whatever order.

    Raises ValueError where they have no item in common.
    """
    said = {
        r.item.prompt.id: r.value
        for r in results_b
        if not language or r.item.prompt.language == language
    }
    pairs = [(r.value, said[r.item.prompt.id]) for r in results_a if r.item.prompt.id in said]
    return compare_paired_values(model_names, skill, pairs, effort, language, confidence)


def compare_paired_values(
    model_names: tuple[str, str],
    skill: str,
    value_pairs: Sequence[tuple[float, float]],
    effort: ThinkingEffort,
    language: str = "",
    confidence: float = CONFIDENCE_LEVEL,
) -> PairedComparison:
    """The same, of values laid side by side already."""
    x, y = [a for a, _ in value_pairs], [b for _, b in value_pairs]
    (low, high), (least, most) = (
        paired_difference_interval(x, y, confidence),
        paired_ratio_interval(x, y, confidence),
    )
    kept = sum(x) / sum(y) if sum(y) else None
    return PairedComparison(
        *model_names,
        skill,
        language,
        effort,
        len(value_pairs),
        (sum(x) - sum(y)) / len(value_pairs),
        low,
        high,
        kept,
        least if kept is not None else None,
        most if kept is not None and isfinite(most) else None,
    )


def draw_items(
    make_item: Callable[[int], tuple[str, TaskItem]], split: Split, n: int, seed: int
) -> tuple[TaskItem, ...]:
    """N different items of a split from a generator `make(number) -> (key, item)`, or all that can be found.

    Gives up after 60 tries per item, so that a small item space ends; the caller sees fewer items.
    """
    items: dict[str, TaskItem] = {}
    for number in range(60 * n + 1000):
        if len(items) == n:
            break
        key, item = make_item(number * 1_000_003 + seed)
        if assign_split(key) is split:
            items.setdefault(key, item)
    return tuple(items.values())
