"""Skill and Score: one number with its n and interval. Audition and evaluation are the same measurement."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from math import sqrt
from typing import Any

from persea.chat import Conversation, Effort, Finish, Message, Text, ToolCall
from persea.corpus import Prompt

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution


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

    def to_json(self) -> dict[str, Any]:
        """Thinking, calls and the grader's words only where there are some."""
        said = {"thinking": self.answer.thinking, "calls": [vars(c) for c in self.answer.calls], "why": self.why}
        return {"id": self.item.prompt.id, "language": self.item.prompt.language, "question": self.item.prompt.conversation.messages[-1].text,
                "reference": self.item.reference, "answer": self.answer.text, "finish": self.finish, "verdict": self.verdict,
                "value": self.value, **{name: value for name, value in said.items() if value}}


def wilson(right: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): never leaves [0, 1], not empty at 0 or n right."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean of values in [0, 1]: Wilson's for shares.

    For values between, Wilson's too, whose variance p (1 - p) no spread in [0, 1] of the same mean exceeds: never too narrow.
    """
    return wilson(sum(values), len(values))


def grade(skill: Skill, items: Sequence[Item], answers: Sequence[tuple[Message, Finish]]) -> tuple[Result, ...]:
    """Results of answers, in order; an answer that did not stop by itself is malformed, whatever it says.

    A grader that raises does not end a run: its answer is FAILED, worth 0, and `why` names the exception.
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
    except Exception as error:
        return Grade(Verdict.FAILED, 0.0, f"{type(error).__name__}: {error}"[:300])


def score(speaker: str, skill: str, results: Sequence[Result], effort: Effort, language: str = "") -> Score:
    """Mean value of results (of one language, or of all) with its interval."""
    values = [r.value for r in results if not language or r.item.prompt.language == language]
    low, high = interval(values)
    return Score(speaker, skill, language, effort, sum(values) / max(1, len(values)), len(values), low, high)


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
