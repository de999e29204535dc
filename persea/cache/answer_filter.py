"""A teacher's answers before they teach: the skill's own grader looks at each whose prompt brought a right answer; wrong ones are kept aside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from persea import storage as store
from persea.cache.reader import Chosen, Ordered
from persea.cache.unit import Capture
from persea.chat.messages import Conversation, Finish, Message, Tool
from persea.errors import Refused
from persea.tasks.task import Item, Skill, Verdict, grade

Question: TypeAlias = tuple[tuple[Message, ...], tuple[Tool, ...]]


def question(conversation: Conversation) -> Question:
    """What tells a question from another: with other tools the same words have another right answer."""
    return conversation.messages, conversation.tools


@dataclass(frozen=True)
class Sifted:
    """right, unverified: how many are taught, and how many of all had nothing to be verified by; aside: what is not taught, one record each."""

    right: int
    unverified: int
    aside: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        return {"right": self.right, "unverified": self.unverified, "aside": dict(Counter(a["verdict"] for a in self.aside))}

    def refuse_nothing(self) -> None:
        """Raises Refused where there are answers, and none is left to teach."""
        if self.aside and not self.right and not self.unverified:
            first = self.aside[0]
            raise Refused(f"no answer of {len(self.aside):,} is right ({first['id']}: {first['why'] or first['verdict']})", where="capture.verify",
                          remedy="look at capture/wrong.json; the prompts' answers may be of another form than the skill's grader reads")


def verify(caches: Sequence[Ordered], items: Mapping[Question, Item], skills: Sequence[Skill], folder: Path) -> dict[str, Any]:
    """`sift`, what is aside written to wrong.json. Refused where nothing is left to teach."""
    sifted = sift(caches, items, {skill.name: skill for skill in skills})
    store.publish_json(folder / "wrong.json", sifted.aside)
    sifted.refuse_nothing()
    return sifted.to_json()


def sift(caches: Sequence[Ordered], items: Mapping[Question, Item], skills: Mapping[str, Skill]) -> Sifted:
    """Grade every captured answer by the item that stands for its question (items: question -> item).

    A grader that raises does not end the run: its answer is aside, with the exception's name.
    """
    aside: list[dict[str, Any]] = []
    right = unverified = 0
    for cache, number, capture in _all(caches):
        *before, said = capture.answer.conversation.messages
        item = items[tuple(before), capture.answer.conversation.tools]
        if not item.reference and not item.calls:
            unverified += 1
            continue
        (result,) = grade(skills[item.prompt.skill], [item], [(said, Finish.STOP)])
        verdict, why = result.verdict, result.why
        if verdict is Verdict.RIGHT:
            right += 1
            continue
        aside.append({"cache": cache, "number": number, "id": item.prompt.id, "teacher": capture.answer.teacher, "verdict": verdict, "why": why,
                      "reference": item.reference, "answer": said.text})
    return Sifted(right, unverified, tuple(aside))


def _all(caches: Sequence[Ordered]) -> Iterator[tuple[int, int, Capture]]:
    for k, cache in enumerate(caches):
        for number in range(len(cache)):
            yield k, number, cache[number]


def left(caches: Sequence[tuple[Ordered, float]], aside: Sequence[Mapping[str, Any]]) -> tuple[tuple[Ordered, float], ...]:
    """The caches without what is aside; their shares stay, so that a teacher that errs more is not heard less on what it knows."""
    out: list[tuple[Ordered, float]] = []
    for k, (cache, share) in enumerate(caches):
        wrong = {a["number"] for a in aside if a["cache"] == k}
        out.append((Chosen(cache, np.array([n for n in range(len(cache)) if n not in wrong], np.int64)), share))
    return tuple(out)
