"""A teacher answers in its own voice and scores what was said; what it says first is what it finds likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from persea.chat.messages import Conversation, Effort, Finish, Text, Thinking
from persea.data.prompts import Prompt
from persea.errors import DataError
from persea.tasks.generated import CODE, LANGUAGES, REASONING, TOOLS
from persea.tasks.task import Split
from persea.teachers.engines import Engine
from persea.teachers.teacher import Answer, Teacher
from tests.teachers.engines.test_transformers import NAMES, engine, opened


@dataclass
class Scripted:
    """An engine that says what it is told to, one answer a prompt, and notes what it was asked; it scores with a real one."""

    real: Engine
    says: list[list[int]]
    asked: list[list[int]] = field(default_factory=list)

    def generate(self, prompts: Sequence[np.ndarray], stop_ids: Sequence[int], max_new_tokens: int) -> list[np.ndarray]:
        begin = len(self.asked)
        self.asked += [p.tolist() for p in prompts]
        return [np.array(ids[:max_new_tokens], np.int32) for ids in self.says[begin:begin + len(prompts)]]

    def score(self, sequences: Sequence[np.ndarray], learn: Sequence[np.ndarray]) -> object:
        return self.real.score(sequences, learn)

    def pieces(self, sequences: Sequence[np.ndarray], learn: Sequence[np.ndarray]) -> object:
        return self.real.pieces(sequences, learn)


def teacher(name: str, effort: Effort = Effort.NONE) -> Teacher:
    return Teacher(name, opened(name)[0], engine(name), effort)


def scripted(name: str, *says: list[int], effort: Effort = Effort.NONE) -> Teacher:
    return Teacher(name, opened(name)[0], Scripted(engine(name), list(says)), effort)


def prompts(n: int) -> list[Prompt]:
    return [i.prompt for skill in (LANGUAGES, CODE, REASONING) for i in skill.items(Split.TEST, n, 0)]


def words(name: str, text: str, *stop: str) -> list[int]:
    """Token ids of a text in a sapling's vocabulary, and control tokens after it."""
    vocabulary = opened(name)[0].vocabulary
    return [*next(iter(vocabulary.encode_batch([text]))), *(vocabulary.control[s] for s in stop)]


@pytest.mark.parametrize("name", NAMES)
def test_answers_come_in_order_and_greedy_words_are_the_likeliest_of_their_rows(name: str) -> None:
    asked = prompts(4)
    answers = teacher(name).answer(asked, 40)
    assert [(a.prompt_id, a.skill, a.language, a.teacher) for a in answers] == [(p.id, p.skill, p.language, name) for p in asked]
    assert all(a.conversation.messages[:-1] == p.conversation.messages for a, p in zip(answers, asked, strict=True))
    whole = [a for a in answers if a.finish is Finish.STOP]
    assert whole
    generated = teacher(name).engine.generate([teacher(name).voice.prompt(p.conversation).ids_T for p in asked], teacher(name).voice.stop_ids, 40)
    said = [ids for ids, a in zip(generated, answers, strict=True) if a.finish is Finish.STOP]
    same = 0
    for (tokens, rows), ids in zip(teacher(name).score([a.conversation for a in whole]), said, strict=True):
        learned = tokens.ids_T[tokens.learn_T]
        assert rows.shape == (len(learned), len(teacher(name).voice.vocabulary))
        assert torch.allclose(rows.double().exp().sum(-1), torch.ones(len(rows), dtype=torch.float64), atol=1e-5)
        if np.array_equal(learned, ids):  # else the model split its words as its tokenizer would not
            assert rows.argmax(-1).tolist() == ids.tolist()
            same += 1
    assert same >= len(whole) / 2


def test_the_effort_is_the_teachers_and_reaches_its_template() -> None:
    name = "gpt-oss-sapling"
    control = opened(name)[0].vocabulary.control
    ids = [control["<|channel|>"], *words(name, "final"), control["<|message|>"], *words(name, "42", "<|return|>")]
    asked, seen = prompts(1)[:1], []
    for effort in (Effort.LOW, Effort.HIGH):
        speaker = scripted(name, ids, effort=effort)
        answer, = speaker.answer(asked, 40)
        assert (answer.conversation.effort, answer.text, answer.finish) == (effort, "42", Finish.STOP)
        seen.append(speaker.engine.asked)
    assert seen[0] != seen[1]
    assert seen[1] == [opened(name)[0].prompt(replace(asked[0].conversation, effort=Effort.HIGH)).ids_T.tolist()]


def test_each_prompt_is_asked_at_its_own_effort() -> None:
    """In one batch: what a prompt does not say is the teacher's to say."""
    name = "qwen-sapling"
    asked = [replace(p, effort=effort) for p, effort in zip(prompts(2), (None, Effort.NONE, Effort.HIGH), strict=False)]
    control = opened(name)[0].vocabulary.control
    thinks = [control["<think>"], *words(name, "\nhm\n"), control["</think>"], *words(name, "\n\n42", "<|im_end|>")]
    speaker = scripted(name, thinks, words(name, "42", "<|im_end|>"), thinks, effort=Effort.LOW)
    answers = speaker.answer(asked, 40)
    assert [(a.conversation.effort, a.mode) for a in answers] == [(Effort.LOW, None), (Effort.NONE, Effort.NONE), (Effort.HIGH, Effort.HIGH)]
    assert [a.conversation.messages[-1].parts for a in answers] == [(Thinking("hm"), Text("42")), (Text("42"),), (Thinking("hm"), Text("42"))]
    voice = opened(name)[0]
    assert speaker.engine.asked == [voice.prompt(replace(p.conversation, effort=p.effort or Effort.LOW)).ids_T.tolist() for p in asked]
    assert len({len(ids) - len(voice.prompt(p.conversation).ids_T) for ids, p in zip(speaker.engine.asked, asked, strict=True)}) == 2
    assert [Answer.from_json(a.to_json()) for a in answers] == answers
    assert ["mode" in a.to_json() for a in answers] == [False, True, True]


def test_an_answer_that_is_cut_or_malformed_says_so() -> None:
    llama, oss = "llama-sapling", "gpt-oss-sapling"
    control = opened(oss)[0].vocabulary.control
    speaker = scripted(llama, words(llama, "whole", "<|eot_id|>"), words(llama, "cut "), words(llama, "odd", "<|begin_of_text|>", "<|eot_id|>"),
                       words(llama, "", "<|eot_id|>"))
    answers = speaker.answer([*prompts(1), prompts(2)[1]], 40)
    assert [(a.finish, a.text) for a in answers] == [(Finish.STOP, "whole"), (Finish.LENGTH, "cut "), (Finish.MALFORMED, ""), (Finish.STOP, "")]
    thinks = [control["<|channel|>"], *words(oss, "analysis"), control["<|message|>"], *words(oss, "hm", "<|end|>"), control["<|return|>"]]
    answer, = scripted(oss, thinks).answer(prompts(1)[:1], 40)
    assert answer.finish is Finish.MALFORMED


def test_an_answer_comes_back_from_json() -> None:
    asked = Conversation.ask("q", system="s", effort=Effort.HIGH)
    for finish in Finish:
        answer = Answer("id", "t", "code", "vi", asked.answered(Thinking("hm"), Text("ありがとう")), finish)
        assert Answer.from_json(answer.to_json()) == answer
        assert answer.text == "ありがとう"


def test_a_prompt_that_the_template_cannot_say_ends_refused_and_the_others_are_asked() -> None:
    name = "gemma-sapling"
    asked = [i.prompt for i in CODE.items(Split.TEST, 2, 0)]
    asked.insert(1, next(iter(TOOLS.items(Split.TEST, 1, 0))).prompt)
    speaker = scripted(name, *(words(name, text, "<end_of_turn>") for text in ("one", "two")))
    answers = speaker.answer(asked, 9)
    assert [(a.prompt_id, a.text, a.finish) for a in answers] == [
        (asked[0].id, "one", Finish.STOP), (asked[1].id, "", Finish.REFUSED), (asked[2].id, "two", Finish.STOP)]
    assert [speaker.can_say(a.conversation) for a in answers] == [True, False, True]
    with pytest.raises(DataError, match="drops tools"):
        list(speaker.score([answers[1].conversation]))
