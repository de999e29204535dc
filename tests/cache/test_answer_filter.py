"""What teaches: right answers, and those nobody can verify; wrong ones are kept aside with the grader's word."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from persea.cache.answer_filter import Question, Sifted, left, question, sift
from persea.cache.unit import Capture
from persea.chat.messages import Conversation, Effort, Finish, Message
from persea.config.schema import CorpusPart
from persea.data.prompts import Prompt
from persea.errors import Refused
from persea.pipeline.tasks_and_prompts import known
from persea.tasks import generated as skills
from persea.tasks.task import Item, Skill, Split, Verdict
from persea.teachers.teacher import Answer


class Held(list[Any]):
    """Captures in memory, read in the order of their numbers."""

    def order(self, seed: int, epoch: int) -> Any:
        return np.arange(len(self))


def prompt(k: int, answer: str = "Answer: 4", skill: str = "reasoning") -> Prompt:
    return Prompt(f"p{k}", Conversation.ask(f"Question {k}?"), skill, "en", answer)


def items(prompts: list[Prompt]) -> dict[Question, Item]:
    return {question(p.conversation): Item(p, p.answer, key=p.answer[-1:]) for p in prompts}


def said(asked: Prompt, text: str, teacher: str = "a") -> Any:
    conversation = replace(asked.conversation).answered(*Message.said(text).parts)
    return Capture(Answer(asked.id, teacher, asked.skill, "en", conversation, Finish.STOP), None, None)  # type: ignore[arg-type]


def breaks(item: Item, message: Message) -> Verdict:
    raise ZeroDivisionError("no grade")


def ends(item: Item, message: Message) -> Verdict:
    """Right where the last word is the key's, malformed where it is no number."""
    last = message.text.split()[-1]
    return Verdict.MALFORMED if not last.isdecimal() else Verdict.RIGHT if last == item.key else Verdict.WRONG


SKILLS = {"reasoning": Skill("reasoning", (), lambda *_: (), ends), "broken": Skill("broken", (), lambda *_: (), breaks)}


def test_wrong_answers_are_aside_and_the_rest_teaches():
    prompts = [prompt(0), prompt(1), prompt(2), prompt(3, answer=""), prompt(4, skill="broken")]
    first = Held([said(prompts[0], "2 + 2. Answer: 4"), said(prompts[1], "Answer: 5")])
    second = Held([said(prompts[2], "I do not know", "b"), said(prompts[3], "Anything", "b"), said(prompts[4], "4", "b")])
    sifted = sift([first, second], items(prompts), SKILLS)
    assert (sifted.right, sifted.unverified) == (1, 1)
    assert [(a["cache"], a["number"], a["id"], a["teacher"], a["verdict"], a["answer"]) for a in sifted.aside] == [
        (0, 1, "p1", "a", "wrong", "Answer: 5"), (1, 0, "p2", "b", "malformed", "I do not know"), (1, 2, "p4", "b", "failed", "4")]
    assert sifted.aside[2]["why"] == "ZeroDivisionError: no grade"
    assert all(a["reference"] == "Answer: 4" for a in sifted.aside)
    assert sifted.to_json() == {"right": 1, "unverified": 1, "aside": {"wrong": 1, "malformed": 1, "failed": 1}}
    caches = left([(first, 3.0), (second, 7.0)], sifted.aside)
    assert [share for _, share in caches] == [3.0, 7.0]
    assert [[c[n].answer.prompt_id for n in range(len(c))] for c, _ in caches] == [["p0"], ["p3"]]


def test_nothing_left_to_teach_is_refused():
    prompts = [prompt(0), prompt(1)]
    with pytest.raises(Refused, match=r"no answer of 2 is right \(p0: wrong\)") as caught:
        sift([Held([said(p, "Answer: 5") for p in prompts])], items(prompts), SKILLS).refuse_nothing()
    assert caught.value.where == "capture.verify"
    nothing = sift([Held()], {}, SKILLS)
    assert nothing == Sifted(0, 0, ())
    nothing.refuse_nothing()  # who asked nothing hears it elsewhere


def test_prompts_are_known_by_their_words_not_by_their_names():
    one, other = prompt(0), replace(prompt(1, answer="Answer: 5"), id="p0")
    sifted = sift([Held([said(one, "Answer: 4"), said(other, "Answer: 5")])], items([one, other]), SKILLS)
    assert (sifted.right, sifted.aside) == (2, ())


def test_the_same_words_with_other_tools_are_another_question():
    """Where the tool is not there, the right answer is no call: of 1,000 questions of the generator, 285 texts of 472 come so."""
    part, skill = CorpusPart(skill="tools", generate=300), skills.named("tools")
    made = skill.items(Split.TEACH, 300, 0)
    assert len({i.prompt.conversation.messages for i in made}) < len(made)
    asked = [replace(i.prompt, conversation=Conversation.from_json(i.prompt.conversation.to_json())) for i in made]
    items = known([part], [skill], asked, 0)
    answered = Held([Capture(Answer(i.prompt.id, "a", "tools", "en", replace(i.answered, effort=Effort.HIGH), Finish.STOP), None, None)  # type: ignore[arg-type]
                     for i in made])
    sifted = sift([answered], items, {"tools": skill})
    assert (sifted.right, sifted.unverified, sifted.aside) == (300, 0, ())
