"""A teacher's answers before they teach: the skill's own grader looks at each whose prompt brought a right answer; wrong ones are kept aside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from persea import storage as store
from persea.cache.reader import AnswerSource, AnswerSubset
from persea.cache.unit import CachedAnswer
from persea.chat.messages import Conversation, FinishReason, Message, Tool
from persea.errors import RefusedError
from persea.tasks.task import Task, TaskItem, Verdict, grade_answers

QuestionKey: TypeAlias = tuple[tuple[Message, ...], tuple[Tool, ...]]


def question_key(conversation: Conversation) -> QuestionKey:
    """What tells a question from another: with other tools the same words have another right answer."""
    return conversation.messages, conversation.tools


@dataclass(frozen=True)
class AnswerFilterResult:
    """right, unverified: how many are taught, and how many of all had nothing to be verified by; aside: what is not taught, one record each."""

    num_right: int
    num_unverified: int
    rejected: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "right": self.num_right,
            "unverified": self.num_unverified,
            "aside": dict(Counter(a["verdict"] for a in self.rejected)),
        }

    def refuse_all_rejected(self) -> None:
        """Raises Refused where there are answers, and none is left to teach."""
        if self.rejected and not self.num_right and not self.num_unverified:
            first = self.rejected[0]
            raise RefusedError(
                f"no answer of {len(self.rejected):,} is right ({first['id']}: {first['why'] or first['verdict']})",
                where="capture.drop_wrong_answers",
                remedy="look at capture/wrong.json; the prompts' answers may be of another form than the skill's grader reads",
            )


def verify_answers(
    caches: Sequence[AnswerSource],
    items_by_question: Mapping[QuestionKey, TaskItem],
    tasks: Sequence[Task],
    folder: Path,
) -> dict[str, Any]:
    """`sift`, what is aside written to wrong.json. Refused where nothing is left to teach."""
    sifted = filter_answers(caches, items_by_question, {skill.name: skill for skill in tasks})
    store.write_json(folder / "wrong.json", sifted.rejected)
    sifted.refuse_all_rejected()
    return sifted.to_json()


def filter_answers(
    caches: Sequence[AnswerSource],
    items_by_question: Mapping[QuestionKey, TaskItem],
    tasks: Mapping[str, Task],
) -> AnswerFilterResult:
    """Grade every captured answer by the item that stands for its question (items: question -> item).

    A grader that raises does not end the run: its answer is aside, with the exception's name.
    """
    aside: list[dict[str, Any]] = []
    right = unverified = 0
    for cache, number, capture in _iter_answers(caches):
        *before, said = capture.answer.conversation.messages
        item = items_by_question[tuple(before), capture.answer.conversation.tools]
        if not item.reference and not item.calls:
            unverified += 1
            continue
        (result,) = grade_answers(tasks[item.prompt.skill], [item], [(said, FinishReason.STOP)])
        verdict, why = result.verdict, result.reason
        if verdict is Verdict.RIGHT:
            right += 1
            continue
        aside.append(
            {
                "cache": cache,
                "number": number,
                "id": item.prompt.id,
                "teacher": capture.answer.teacher,
                "verdict": verdict,
                "why": why,
                "reference": item.reference,
                "answer": said.text,
            }
        )
    return AnswerFilterResult(right, unverified, tuple(aside))


def _iter_answers(caches: Sequence[AnswerSource]) -> Iterator[tuple[int, int, CachedAnswer]]:
    for k, cache in enumerate(caches):
        for number in range(len(cache)):
            yield k, number, cache[number]


def without_rejected(
    caches: Sequence[tuple[AnswerSource, float]], rejected: Sequence[Mapping[str, Any]]
) -> tuple[tuple[AnswerSource, float], ...]:
    """The caches without what is aside; their shares stay, so that a teacher that errs more is not heard less on what it knows."""
    out: list[tuple[AnswerSource, float]] = []
    for k, (cache, share) in enumerate(caches):
        wrong = {a["number"] for a in rejected if a["cache"] == k}
        out.append(
            (
                AnswerSubset(
                    cache, np.array([n for n in range(len(cache)) if n not in wrong], np.int64)
                ),
                share,
            )
        )
    return tuple(out)
