"""Grade captured answers before training, and leave out those that are not right.

An answer is graded by its skill's grader if its prompt has a reference answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from persea import storage
from persea.cache.reader import AnswerSource, AnswerSubset
from persea.cache.unit import CachedAnswer
from persea.chat.messages import Conversation, FinishReason, Message, Tool
from persea.errors import RefusedError
from persea.tasks.task import Task, TaskItem, Verdict, grade_answers

QuestionKey: TypeAlias = tuple[tuple[Message, ...], tuple[Tool, ...]]


def question_key(conversation: Conversation) -> QuestionKey:
    """Return the identity of a question: its messages and its tools.

    With other tools the same messages have another right answer.
    """
    return conversation.messages, conversation.tools


@dataclass(frozen=True)
class AnswerFilterResult:
    """The outcome of grading.

    Attributes:
        num_right: Answers that are right.
        num_unverified: Documents, and answers whose prompt has no reference answer. They are
            trained on.
        rejected: A record of each answer that is left out.
    """

    num_right: int
    num_unverified: int
    rejected: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """Return counts as JSON; rejected answers are counted by verdict."""
        return {
            "right": self.num_right,
            "unverified": self.num_unverified,
            "rejected": dict(Counter(a["verdict"] for a in self.rejected)),
        }

    def refuse_all_rejected(self) -> None:
        """Raise if there are answers and none is left to train on.

        Raises:
            RefusedError: Every answer was rejected.
        """
        if self.rejected and not self.num_right and not self.num_unverified:
            first = self.rejected[0]
            raise RefusedError(
                f"none of {len(self.rejected):,} answers is right "
                f"({first['prompt_id']}: {first['reason'] or first['verdict']})",
                where="capture.drop_wrong_answers",
                remedy="look at capture/rejected.json; the prompts' reference answers may have "
                "another form than the skill's grader reads",
            )


def verify_answers(
    caches: Sequence[AnswerSource],
    items_by_question: Mapping[QuestionKey, TaskItem],
    tasks: Sequence[Task],
    folder: Path,
) -> dict[str, Any]:
    """Grade all answers, and write the rejected ones to rejected.json.

    Args:
        caches: The caches of all teachers.
        items_by_question: Question -> the item that grades its answers.
        tasks: The run's tasks.
        folder: Where rejected.json is written.

    Returns:
        The counts as JSON.

    Raises:
        RefusedError: Every answer was rejected.
    """
    result = filter_answers(caches, items_by_question, {task.name: task for task in tasks})
    storage.write_json(folder / "rejected.json", result.rejected)
    result.refuse_all_rejected()
    return result.to_json()


def filter_answers(
    caches: Sequence[AnswerSource],
    items_by_question: Mapping[QuestionKey, TaskItem],
    tasks: Mapping[str, Task],
) -> AnswerFilterResult:
    """Grade every cached answer by the item of its question.

    A grader that raises does not end the run: the answer is rejected with the exception's name.

    Args:
        caches: The caches of all teachers.
        items_by_question: Question -> the item that grades its answers.
        tasks: Skill -> task.
    """
    rejected: list[dict[str, Any]] = []
    num_right = num_unverified = 0
    for k, number, cached in _iter_answers(caches):
        if cached.answer.conversation.is_document:
            num_unverified += 1
            continue
        *question, answer = cached.answer.conversation.messages
        item = items_by_question[tuple(question), cached.answer.conversation.tools]
        if not item.reference and not item.calls:
            num_unverified += 1
            continue
        (result,) = grade_answers(tasks[item.prompt.skill], [item], [(answer, FinishReason.STOP)])
        if result.verdict is Verdict.RIGHT:
            num_right += 1
            continue
        rejected.append(
            {
                "cache": k,
                "number": number,
                "prompt_id": item.prompt.id,
                "teacher": cached.answer.teacher,
                "verdict": result.verdict,
                "reason": result.reason,
                "reference": item.reference,
                "answer": answer.text,
            }
        )
    return AnswerFilterResult(num_right, num_unverified, tuple(rejected))


def _iter_answers(caches: Sequence[AnswerSource]) -> Iterator[tuple[int, int, CachedAnswer]]:
    for k, cache in enumerate(caches):
        for number in range(len(cache)):
            yield k, number, cache[number]


def without_rejected(
    caches: Sequence[tuple[AnswerSource, float]], rejected: Sequence[Mapping[str, Any]]
) -> tuple[tuple[AnswerSource, float], ...]:
    """Return the caches without the rejected answers.

    The shares stay: a teacher with more rejected answers does not lose weight in the mixture.
    """
    filtered: list[tuple[AnswerSource, float]] = []
    for k, (cache, share) in enumerate(caches):
        numbers = {a["number"] for a in rejected if a["cache"] == k}
        filtered.append(
            (
                AnswerSubset(
                    cache, np.array([n for n in range(len(cache)) if n not in numbers], np.int64)
                ),
                share,
            )
        )
    return tuple(filtered)
