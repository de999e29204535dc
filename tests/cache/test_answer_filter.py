"""What teaches: right answers, and those nobody can verify; wrong ones are kept aside with the
grader's word.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from persea.cache.answer_filter import (
    AnswerFilterResult,
    QuestionKey,
    filter_answers,
    question_key,
    without_rejected,
)
from persea.cache.unit import CachedAnswer
from persea.chat.messages import Conversation, FinishReason, Message, ThinkingEffort
from persea.config.schema import CorpusSection
from persea.data.prompts import Prompt
from persea.errors import RefusedError
from persea.pipeline.tasks_and_prompts import items_by_question
from persea.tasks import generated as skills
from persea.tasks.task import Split, Task, TaskItem, Verdict
from persea.teachers.teacher import Answer


class Held(list[Any]):
    """Captures in memory, read in the order of their numbers."""

    def epoch_order(self, seed: int, epoch: int) -> Any:
        return np.arange(len(self))


def prompt(k: int, answer: str = "Answer: 4", skill: str = "reasoning") -> Prompt:
    return Prompt(f"p{k}", Conversation.from_question(f"Question {k}?"), skill, "en", answer)


def items(prompts: list[Prompt]) -> dict[QuestionKey, TaskItem]:
    return {
        question_key(p.conversation): TaskItem(p, p.answer, answer_key=p.answer[-1:])
        for p in prompts
    }


def said(asked: Prompt, text: str, teacher: str = "a") -> Any:
    conversation = replace(asked.conversation).with_answer(*Message.from_assistant(text).parts)
    return CachedAnswer(
        Answer(asked.id, teacher, asked.skill, "en", conversation, FinishReason.STOP), None, None
    )  # type: ignore[arg-type]


def breaks(item: TaskItem, message: Message) -> Verdict:
    raise ZeroDivisionError("no grade")


def ends(item: TaskItem, message: Message) -> Verdict:
    """Right where the last word is the key's, malformed where it is no number."""
    last = message.text.split()[-1]
    return (
        Verdict.MALFORMED
        if not last.isdecimal()
        else Verdict.RIGHT
        if last == item.answer_key
        else Verdict.WRONG
    )


SKILLS = {
    "reasoning": Task("reasoning", (), lambda *_: (), ends),
    "broken": Task("broken", (), lambda *_: (), breaks),
}


def test_wrong_answers_are_aside_and_the_rest_teaches():
    prompts = [prompt(0), prompt(1), prompt(2), prompt(3, answer=""), prompt(4, skill="broken")]
    first = Held([said(prompts[0], "2 + 2. Answer: 4"), said(prompts[1], "Answer: 5")])
    second = Held(
        [
            said(prompts[2], "I do not know", "b"),
            said(prompts[3], "Anything", "b"),
            said(prompts[4], "4", "b"),
        ]
    )
    sifted = filter_answers([first, second], items(prompts), SKILLS)
    assert (sifted.num_right, sifted.num_unverified) == (1, 1)
    assert [
        (a["cache"], a["number"], a["prompt_id"], a["teacher"], a["verdict"], a["answer"])
        for a in sifted.rejected
    ] == [
        (0, 1, "p1", "a", "wrong", "Answer: 5"),
        (1, 0, "p2", "b", "malformed", "I do not know"),
        (1, 2, "p4", "b", "failed", "4"),
    ]
    assert sifted.rejected[2]["reason"] == "ZeroDivisionError: no grade"
    assert all(a["reference"] == "Answer: 4" for a in sifted.rejected)
    assert sifted.to_json() == {
        "right": 1,
        "unverified": 1,
        "rejected": {"wrong": 1, "malformed": 1, "failed": 1},
    }
    caches = without_rejected([(first, 3.0), (second, 7.0)], sifted.rejected)
    assert [share for _, share in caches] == [3.0, 7.0]
    assert [[c[n].answer.prompt_id for n in range(len(c))] for c, _ in caches] == [["p0"], ["p3"]]


def test_nothing_left_to_teach_is_refused():
    prompts = [prompt(0), prompt(1)]
    with pytest.raises(RefusedError, match=r"none of 2 answers is right \(p0: wrong\)") as caught:
        filter_answers(
            [Held([said(p, "Answer: 5") for p in prompts])], items(prompts), SKILLS
        ).refuse_all_rejected()
    assert caught.value.where == "capture.drop_wrong_answers"
    nothing = filter_answers([Held()], {}, SKILLS)
    assert nothing == AnswerFilterResult(0, 0, ())
    nothing.refuse_all_rejected()  # who asked nothing hears it elsewhere


def test_prompts_are_known_by_their_words_not_by_their_names():
    one, other = prompt(0), replace(prompt(1, answer="Answer: 5"), id="p0")
    sifted = filter_answers(
        [Held([said(one, "Answer: 4"), said(other, "Answer: 5")])], items([one, other]), SKILLS
    )
    assert (sifted.num_right, sifted.rejected) == (2, ())


def test_the_same_words_with_other_tools_are_another_question():
    """Where the tool is not there, the right answer is no call: of 1,000 questions of the
    generator, 285 texts of 472 come so.
    """
    part, skill = CorpusSection(skill="tools", generate=300), skills.find_generated_task("tools")
    made = skill.items(Split.TRAIN, 300, 0)
    assert len({i.prompt.conversation.messages for i in made}) < len(made)
    asked = [
        replace(i.prompt, conversation=Conversation.from_json(i.prompt.conversation.to_json()))
        for i in made
    ]
    items = items_by_question([part], [skill], asked, 0)
    answered = Held(
        [
            CachedAnswer(
                Answer(
                    i.prompt.id,
                    "a",
                    "tools",
                    "en",
                    replace(i.reference_conversation, effort=ThinkingEffort.HIGH),
                    FinishReason.STOP,
                ),
                None,
                None,
            )  # type: ignore[arg-type]
            for i in made
        ]
    )
    sifted = filter_answers([answered], items, {"tools": skill})
    assert (sifted.num_right, sifted.num_unverified, sifted.rejected) == (300, 0, ())
