"""Given answers and documents are scored, others are asked, and the cache says which is which."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from persea.cache import unit as cache
from persea.cache.capture import CaptureUnit
from persea.cache.given_answers import count_prompt_tokens, refuse_missing_answers
from persea.chat.messages import Conversation
from persea.data.prompts import Prompt
from persea.errors import DataError
from persea.models.loading import ModelSource, load_renderer
from persea.teachers.teacher import Answer, Teacher
from tests.cache.test_capture import Counting, ask, names, prompts, read, units
from tests.teachers.engines.test_transformers import engine, opened

TEXTS = ("Selamat pagi, dunia.", "Harga beras naik.\n\nKata menteri.", "x")


def documents(skill: str = "languages") -> list[Prompt]:
    return [
        Prompt(f"t:{k}", Conversation.from_document(text), skill, "id")
        for k, text in enumerate(TEXTS)
    ]


def teacher(**changes: object) -> tuple[Teacher, Counting]:
    counting = Counting(engine("qwen-sapling"))
    return replace(
        Teacher("qwen-sapling", opened("qwen-sapling")[0], counting), **changes
    ), counting


def test_documents_are_scored_beside_prompts_that_are_asked(tmp_path: Path) -> None:
    asked = prompts(2)[:2]
    planned = units([asked[0], *documents(), asked[1]], size=10)
    speaker, counting = teacher()
    assert ask(planned, tmp_path, speaker) == [5]
    assert len(counting.asked) == 2
    found = {c.prompt_id: c for c in read(planned, tmp_path)}
    for prompt in documents():
        captured = found[prompt.id]
        assert captured.answer.conversation == prompt.conversation
        assert not captured.answer.is_own
        rendered = speaker.renderer.render(prompt.conversation)
        for name in ("ids_T", "starts_T", "ends_T", "loss_mask_T"):
            assert np.array_equal(getattr(captured.tokens, name), getattr(rendered, name))
        assert len(captured.distributions) == int(rendered.loss_mask_T.sum())
    assert all(found[p.id].answer.is_own for p in asked if p.id in found)


def test_a_given_answer_is_marked(tmp_path: Path) -> None:
    planned = units(prompts(1)[:1], answers="given")
    ask(planned, tmp_path, use_given_answers=True)
    (captured,) = read(planned, tmp_path)
    assert captured.answer.given
    assert not captured.answer.is_own
    assert Answer.from_json(captured.answer.to_json()) == captured.answer
    assert "given" not in replace(captured.answer, given=False).to_json()


def test_a_document_is_another_unit_than_a_question_of_the_same_words() -> None:
    (document,) = documents()[:1]
    question = replace(document, conversation=Conversation.from_question(TEXTS[0]))
    window = replace(document, conversation=Conversation.from_document(TEXTS[0], ends=False))
    assert len({names(units([p]))[0] for p in (document, question, window)}) == 3


def test_a_model_without_a_template_scores_documents_and_given_answers(
    tmp_path: Path,
) -> None:
    renderer = load_renderer(ModelSource("saplings/qwen-sapling", family="text"), "w")
    speaker, counting = teacher(renderer=renderer)
    planned = units([*documents(), *prompts(1)[:1]], size=10)
    ask(planned, tmp_path, speaker, use_given_answers=True)
    assert not counting.asked
    assert len(read(planned, tmp_path)) == 4


def test_a_document_longer_than_the_model_is_quarantined(tmp_path: Path) -> None:
    speaker, _ = teacher(max_context_tokens=8)
    planned: tuple[CaptureUnit, ...] = units(documents(), size=10)
    ask(planned, tmp_path, speaker)
    record = cache.read_record(tmp_path, planned[0].name)
    assert [name for name, _ in record["quarantine"]] == ["t:0", "t:1"]
    assert "has positions for 8" in record["quarantine"][0][1]
    assert count_prompt_tokens(documents()[2], speaker) == 2  # start and text; the end may be last


def test_a_missing_answer_is_found_before_the_capture() -> None:
    refuse_missing_answers([documents(), prompts(1)])
    with pytest.raises(DataError, match="has no answer of its own"):
        refuse_missing_answers([documents(), [replace(prompts(1)[0], answer="")]])
