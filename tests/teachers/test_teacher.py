"""A teacher answers in its own template and scores text; its own greedy answers are its most likely
ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from persea.chat.messages import Conversation, FinishReason, Text, Thinking, ThinkingEffort
from persea.data.prompts import Prompt
from persea.errors import DataError
from persea.tasks.generated import CODE_TASK, LANGUAGES_TASK, REASONING_TASK, TOOLS_TASK
from persea.tasks.task import Split
from persea.teachers.engines import FULL_DISTRIBUTIONS, Engine, EngineCapabilities
from persea.teachers.teacher import Answer, Teacher
from tests.teachers.engines.test_transformers import NAMES, engine, opened


@dataclass
class Scripted(Engine):
    """An engine with scripted answers, one per prompt; it records its prompts and scores with a
    real engine.
    """

    real: Engine
    says: list[list[int]]
    asked: list[list[int]] = field(default_factory=list)

    @property
    def capabilities(self) -> EngineCapabilities:
        return FULL_DISTRIBUTIONS

    def generate(
        self, prompts: Sequence[np.ndarray], stop_ids: Sequence[int], max_new_tokens: int
    ) -> list[np.ndarray]:
        begin = len(self.asked)
        self.asked += [p.tolist() for p in prompts]
        return [
            np.array(ids[:max_new_tokens], np.int32)
            for ids in self.says[begin : begin + len(prompts)]
        ]

    def compute_logprobs(
        self, sequences: Sequence[np.ndarray], learn: Sequence[np.ndarray]
    ) -> object:
        return self.real.compute_logprobs(sequences, learn)

    def iter_logprobs(self, sequences: Sequence[np.ndarray], learn: Sequence[np.ndarray]) -> object:
        return self.real.iter_logprobs(sequences, learn)


def teacher(name: str, effort: ThinkingEffort = ThinkingEffort.NONE) -> Teacher:
    return Teacher(name, opened(name)[0], engine(name), effort)


def scripted(name: str, *says: list[int], effort: ThinkingEffort = ThinkingEffort.NONE) -> Teacher:
    return Teacher(name, opened(name)[0], Scripted(engine(name), list(says)), effort)


def prompts(n: int) -> list[Prompt]:
    return [
        i.prompt
        for skill in (LANGUAGES_TASK, CODE_TASK, REASONING_TASK)
        for i in skill.items(Split.TEST, n, 0)
    ]


def words(name: str, text: str, *stop: str) -> list[int]:
    """Token ids of a text in a sapling's vocabulary, and control tokens after it."""
    vocabulary = opened(name)[0].vocabulary
    return [
        *next(iter(vocabulary.encode_batch([text]))),
        *(vocabulary.control_token_ids[s] for s in stop),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_answers_come_in_order_and_greedy_words_are_the_likeliest_of_their_rows(name: str) -> None:
    asked = prompts(4)
    answers = teacher(name).answer(asked, 40)
    assert [(a.prompt_id, a.skill, a.language, a.teacher) for a in answers] == [
        (p.id, p.skill, p.language, name) for p in asked
    ]
    assert all(
        a.conversation.messages[:-1] == p.conversation.messages
        for a, p in zip(answers, asked, strict=True)
    )
    whole = [a for a in answers if a.finish is FinishReason.STOP]
    assert whole
    generated = teacher(name).engine.generate(
        [teacher(name).renderer.render_prompt(p.conversation).ids_T for p in asked],
        teacher(name).renderer.stop_ids,
        40,
    )
    said = [ids for ids, a in zip(generated, answers, strict=True) if a.finish is FinishReason.STOP]
    same = 0
    for (tokens, rows), ids in zip(
        teacher(name).compute_logprobs([a.conversation for a in whole]), said, strict=True
    ):
        learned = tokens.ids_T[tokens.loss_mask_T]
        assert rows.shape == (len(learned), len(teacher(name).renderer.vocabulary))
        assert torch.allclose(
            rows.double().exp().sum(-1), torch.ones(len(rows), dtype=torch.float64), atol=1e-5
        )
        if np.array_equal(
            learned, ids
        ):  # else the model split its words as its tokenizer would not
            assert rows.argmax(-1).tolist() == ids.tolist()
            same += 1
    assert same >= len(whole) / 2


def test_the_effort_is_the_teachers_and_reaches_its_template() -> None:
    name = "gpt-oss-sapling"
    control = opened(name)[0].vocabulary.control_token_ids
    ids = [
        control["<|channel|>"],
        *words(name, "final"),
        control["<|message|>"],
        *words(name, "42", "<|return|>"),
    ]
    asked, seen = prompts(1)[:1], []
    for effort in (ThinkingEffort.LOW, ThinkingEffort.HIGH):
        speaker = scripted(name, ids, effort=effort)
        (answer,) = speaker.answer(asked, 40)
        assert (answer.conversation.effort, answer.text, answer.finish) == (
            effort,
            "42",
            FinishReason.STOP,
        )
        seen.append(speaker.engine.asked)
    assert seen[0] != seen[1]
    assert seen[1] == [
        opened(name)[0]
        .render_prompt(replace(asked[0].conversation, effort=ThinkingEffort.HIGH))
        .ids_T.tolist()
    ]


def test_each_prompt_is_asked_at_its_own_effort() -> None:
    """In one batch: what a prompt does not say is the teacher's to say."""
    name = "qwen-sapling"
    asked = [
        replace(p, effort=effort)
        for p, effort in zip(
            prompts(2), (None, ThinkingEffort.NONE, ThinkingEffort.HIGH), strict=False
        )
    ]
    control = opened(name)[0].vocabulary.control_token_ids
    thinks = [
        control["<think>"],
        *words(name, "\nhm\n"),
        control["</think>"],
        *words(name, "\n\n42", "<|im_end|>"),
    ]
    speaker = scripted(
        name, thinks, words(name, "42", "<|im_end|>"), thinks, effort=ThinkingEffort.LOW
    )
    answers = speaker.answer(asked, 40)
    assert [(a.conversation.effort, a.effort) for a in answers] == [
        (ThinkingEffort.LOW, None),
        (ThinkingEffort.NONE, ThinkingEffort.NONE),
        (ThinkingEffort.HIGH, ThinkingEffort.HIGH),
    ]
    assert [a.conversation.messages[-1].parts for a in answers] == [
        (Thinking("hm"), Text("42")),
        (Text("42"),),
        (Thinking("hm"), Text("42")),
    ]
    renderer = opened(name)[0]
    assert speaker.engine.asked == [
        renderer.render_prompt(
            replace(p.conversation, effort=p.effort or ThinkingEffort.LOW)
        ).ids_T.tolist()
        for p in asked
    ]
    assert (
        len(
            {
                len(ids) - len(renderer.render_prompt(p.conversation).ids_T)
                for ids, p in zip(speaker.engine.asked, asked, strict=True)
            }
        )
        == 2
    )
    assert [Answer.from_json(a.to_json()) for a in answers] == answers
    assert ["mode" in a.to_json() for a in answers] == [False, True, True]


def test_an_answer_that_is_cut_or_malformed_says_so() -> None:
    llama, oss = "llama-sapling", "gpt-oss-sapling"
    control = opened(oss)[0].vocabulary.control_token_ids
    speaker = scripted(
        llama,
        words(llama, "whole", "<|eot_id|>"),
        words(llama, "cut "),
        words(llama, "odd", "<|begin_of_text|>", "<|eot_id|>"),
        words(llama, "", "<|eot_id|>"),
    )
    answers = speaker.answer([*prompts(1), prompts(2)[1]], 40)
    assert [(a.finish, a.text) for a in answers] == [
        (FinishReason.STOP, "whole"),
        (FinishReason.LENGTH, "cut "),
        (FinishReason.MALFORMED, ""),
        (FinishReason.STOP, ""),
    ]
    thinks = [
        control["<|channel|>"],
        *words(oss, "analysis"),
        control["<|message|>"],
        *words(oss, "hm", "<|end|>"),
        control["<|return|>"],
    ]
    (answer,) = scripted(oss, thinks).answer(prompts(1)[:1], 40)
    assert answer.finish is FinishReason.MALFORMED


def test_an_answer_comes_back_from_json() -> None:
    asked = Conversation.from_question("q", system="s", effort=ThinkingEffort.HIGH)
    for finish in FinishReason:
        answer = Answer(
            "id", "t", "code", "vi", asked.with_answer(Thinking("hm"), Text("ありがとう")), finish
        )
        assert Answer.from_json(answer.to_json()) == answer
        assert answer.text == "ありがとう"


def test_a_prompt_that_the_template_cannot_say_ends_refused_and_the_others_are_asked() -> None:
    name = "gemma-sapling"
    asked = [i.prompt for i in CODE_TASK.items(Split.TEST, 2, 0)]
    asked.insert(1, next(iter(TOOLS_TASK.items(Split.TEST, 1, 0))).prompt)
    speaker = scripted(name, *(words(name, text, "<end_of_turn>") for text in ("one", "two")))
    answers = speaker.answer(asked, 9)
    assert [(a.prompt_id, a.text, a.finish) for a in answers] == [
        (asked[0].id, "one", FinishReason.STOP),
        (asked[1].id, "", FinishReason.REFUSED),
        (asked[2].id, "two", FinishReason.STOP),
    ]
    assert [speaker.can_render(a.conversation) for a in answers] == [True, False, True]
    with pytest.raises(DataError, match="drops tools"):
        list(speaker.compute_logprobs([answers[1].conversation]))
