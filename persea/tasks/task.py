"""Skill and Score: one number with its n and interval. Audition and evaluation are the same measurement."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from math import isfinite
from typing import Any

from persea.chat.messages import Conversation, Effort, Finish, Message, Text, ToolCall
from persea.data.prompts import Prompt
from persea.errors import EnvironmentLacks, Refused, StorageError, TeacherError
from persea.tasks.intervals import CONFIDENCE, of_difference, of_mean, of_ratio


class Split(StrEnum):
    """Who may see an item. An item belongs to exactly one split, by the hash of its question, for ever."""

    GROW = "grow"  # what saplings were grown on
    TEACH = "teach"  # what the cast is asked and the student learns from
    AUDITION = "audition"  # what teachers are chosen by
    TEST = "test"  # what everybody is compared on


def split_of(question: str) -> Split:
    """The split of a question: 60 % GROW, 26 % TEACH, 6 % AUDITION, 8 % TEST."""
    bucket = hashlib.sha256(question.encode()).digest()[0] * 100 // 256
    return Split.GROW if bucket < 60 else Split.TEACH if bucket < 86 else Split.AUDITION if bucket < 92 else Split.TEST


class Verdict(StrEnum):
    RIGHT = "right"
    WRONG = "wrong"
    MALFORMED = "malformed"
    FAILED = "failed"  # the grader itself broke on this answer: counted and named, never right


@dataclass(frozen=True)
class Grade:
    """A verdict and how good the answer is: value in [0, 1], such as chrF / 100; `why` says what the grader saw, where that helps."""

    verdict: Verdict
    value: float
    why: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:  # false of NaN too
            raise ValueError(f"a grade of {self.value}, not in [0, 1]")


@dataclass(frozen=True)
class Item:
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
    key: str = ""

    @property
    def answered(self) -> Conversation:
        """The question with its right answer."""
        words = (Text(self.reference),) if self.reference or not self.calls else ()
        return self.prompt.conversation.answered(*words, *self.calls)


@dataclass(frozen=True)
class Skill:
    """One thing to be good at.

    items   (split, n, seed) -> at most n different items of that split, in a fixed order
    grade   (item, the assistant's message) -> verdict, or a Grade where an answer may be good in part; a verdict alone is worth 1 if RIGHT, else 0
    """

    name: str
    languages: tuple[str, ...]
    items: Callable[[Split, int, int], tuple[Item, ...]]
    grade: Callable[[Item, Message], Verdict | Grade]


@dataclass(frozen=True)
class Score:
    """One number: the mean value of n items (a share, where each is right or not), with its 95 % interval [low, high]."""

    speaker: str
    skill: str
    language: str  # "" = all
    effort: Effort
    value: float
    n: int
    low: float
    high: float
    failed: int = 0  # answers the grader broke on; they count as 0
    malformed: int = 0  # answers that did not stop, or could not be read; they count as 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Paired:
    """Two speakers on the same n items: `difference` of their means (speaker - other) and the share `kept` (speaker / other), with intervals.

    kept is None where the other has nothing right; most is None where the data do not bound it.
    """

    speaker: str
    other: str
    skill: str
    language: str  # "" = all
    effort: Effort  # the speaker's
    n: int
    difference: float
    low: float
    high: float
    kept: float | None = None
    least: float | None = None
    most: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Result:
    """One item's outcome, kept so that a score can be inspected."""

    item: Item
    answer: Message
    finish: Finish
    verdict: Verdict
    value: float
    why: str = ""
    likelihoods: tuple[float, ...] = ()  # of the item's choices, in nats a byte

    def to_json(self) -> dict[str, Any]:
        """Thinking, calls, the grader's words and likelihoods only where there are some."""
        said = {"thinking": self.answer.thinking, "calls": [vars(c) for c in self.answer.calls], "why": self.why,
                "likelihoods": list(self.likelihoods)}
        return {"id": self.item.prompt.id, "language": self.item.prompt.language, "question": self.item.prompt.conversation.messages[-1].text,
                "reference": self.item.reference, "answer": self.answer.text, "finish": self.finish, "verdict": self.verdict,
                "value": self.value, **{name: value for name, value in said.items() if value}}


def grade(skill: Skill, items: Sequence[Item], answers: Sequence[tuple[Message, Finish]]) -> tuple[Result, ...]:
    """Results of answers, in order; an answer that did not stop by itself is malformed, whatever it says.

    A grader that raises does not end a run: its answer is FAILED, worth 0, and `why` names the exception. Where what it grades with is gone
    (a sandbox, a judge's server or its budget, the disk), that is no answer's fault: such an error is raised.
    """
    results = []
    for item, (said, finish) in zip(items, answers, strict=True):
        found = _graded(skill, item, said) if finish is Finish.STOP else Grade(Verdict.MALFORMED, 0.0)
        results.append(Result(item, said, finish, found.verdict, found.value, found.why))
    return tuple(results)


def _graded(skill: Skill, item: Item, said: Message) -> Grade:
    try:
        found = skill.grade(item, said)
        return found if isinstance(found, Grade) else Grade(found, float(found is Verdict.RIGHT))
    except (EnvironmentLacks, Refused, StorageError, TeacherError):
        raise
    except Exception as error:
        return Grade(Verdict.FAILED, 0.0, f"{type(error).__name__}: {error}"[:300])


def score(speaker: str, skill: str, results: Sequence[Result], effort: Effort, language: str = "") -> Score:
    """Mean value of results (of one language, or of all) with its interval."""
    mine = [r for r in results if not language or r.item.prompt.language == language]
    values = [r.value for r in mine]
    low, high = of_mean(values)
    failed, malformed = (sum(r.verdict is v for r in mine) for v in (Verdict.FAILED, Verdict.MALFORMED))
    return Score(speaker, skill, language, effort, sum(values) / max(1, len(values)), len(values), low, high, failed, malformed)


def paired(names: tuple[str, str], skill: str, ones: Sequence[Result], others: Sequence[Result], effort: Effort, language: str = "",
           confidence: float = CONFIDENCE) -> Paired:
    """One speaker beside another on the items both were asked (of one language, or of all), in whatever order.

    Raises ValueError where they have no item in common.
    """
    said = {r.item.prompt.id: r.value for r in others if not language or r.item.prompt.language == language}
    pairs = [(r.value, said[r.item.prompt.id]) for r in ones if r.item.prompt.id in said]
    return pair(names, skill, pairs, effort, language, confidence)


def pair(names: tuple[str, str], skill: str, pairs: Sequence[tuple[float, float]], effort: Effort, language: str = "",
         confidence: float = CONFIDENCE) -> Paired:
    """The same, of values laid side by side already."""
    x, y = [a for a, _ in pairs], [b for _, b in pairs]
    (low, high), (least, most) = of_difference(x, y, confidence), of_ratio(x, y, confidence)
    kept = sum(x) / sum(y) if sum(y) else None
    return Paired(*names, skill, language, effort, len(pairs), (sum(x) - sum(y)) / len(pairs), low, high,
                  kept, least if kept is not None else None, most if kept is not None and isfinite(most) else None)


def draw(make: Callable[[int], tuple[str, Item]], split: Split, n: int, seed: int) -> tuple[Item, ...]:
    """n different items of a split from a generator `make(number) -> (key, item)`, or all that can be found.

    Gives up after 60 tries per item, so that a small item space ends; the caller sees fewer items.
    """
    items: dict[str, Item] = {}
    for number in range(60 * n + 1000):
        if len(items) == n:
            break
        key, item = make(number * 1_000_003 + seed)
        if split_of(key) is split:
            items.setdefault(key, item)
    return tuple(items.values())
