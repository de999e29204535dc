"""What a vocabulary cannot write is left out, counted, and refused above a share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from persea.alignment.event_map import build_event_map
from persea.alignment.spans import align_batch
from persea.chat.messages import Conversation, Text
from persea.chat.renderer import ChatRenderer
from persea.errors import RefusedError
from persea.evaluation.compatibility import ConversationSample
from persea.evaluation.retained_mass import make_retained_mass
from persea.evaluation.unwritable import (
    UnwritableTexts,
    UnwritableTokens,
    find_unwritable_tokens,
    leave_out_unwritable,
    refuse_unwritable_texts,
    tokens_without_event,
)
from persea.teachers.teacher import Teacher
from persea.tokenization.tokens import RenderedTokens
from tests.alignment.test_event_map import SAID, byte_level, renderer_of

RICH = renderer_of(byte_level(SAID, 300), "rich")
POOR = renderer_of(byte_level(SAID, 300, missing=b"\x04\xc0\xf1"), "poor")


def sample(*texts: str) -> ConversationSample:
    return ConversationSample(
        "texts",
        "en",
        tuple(Conversation.from_question("").with_answer(Text(t)) for t in texts),
        tuple(f"en.txt:{k}" for k in range(1, len(texts) + 1)),
    )


def test_texts_that_a_model_cannot_write_are_left_out_and_counted():
    samples = [sample("hello", "a \x04 b", "hello world"), sample("\x04")]
    kept, found = leave_out_unwritable(
        samples, {"student": POOR.vocabulary, "gemma": RICH.vocabulary}
    )
    assert kept == (
        ConversationSample(
            "texts",
            "en",
            (samples[0].conversations[0], samples[0].conversations[2]),
            ("en.txt:1", "en.txt:3"),
        ),
        ConversationSample("texts", "en", (), ()),
    )
    assert found == [UnwritableTexts("student", "04 c0 f1", 2, 4, "en.txt:2")]
    refuse_unwritable_texts(found, 0.5)
    with pytest.raises(
        RefusedError, match=r"cannot write 2 of 4 texts \(50.0%, at most 49"
    ) as caught:
        refuse_unwritable_texts(found, 0.49)
    assert caught.value.where == "student"
    assert "check.max_unwritable_share" in caught.value.remedy


def test_nothing_is_left_out_where_all_bytes_have_tokens():
    samples = [sample("a \x04 b")]
    assert leave_out_unwritable(samples, {"student": RICH.vocabulary}) == (tuple(samples), [])
    kept, found = leave_out_unwritable([sample("hello")], {"student": POOR.vocabulary})
    assert kept == (sample("hello"),)
    refuse_unwritable_texts(found, 0.0)
    refuse_unwritable_texts([], 0.0)


@pytest.mark.parametrize("poor_teaches", [True, False])
def test_tokens_without_an_event_are_counted(poor_teaches: bool):
    teacher, student = (POOR, RICH) if poor_teaches else (RICH, POOR)
    emap = build_event_map(teacher, student)
    found = find_unwritable_tokens("t", teacher.vocabulary, student.vocabulary, emap)
    side = "student" if poor_teaches else "teacher"
    assert found == [UnwritableTokens("t", side, 3, len(RICH.vocabulary))]
    event_X = emap.student_event_V if poor_teaches else emap.teacher_event_W
    ids = tokens_without_event(RICH.vocabulary, event_X).tolist()
    assert sorted(RICH.vocabulary.bytes_W[i] or b"" for i in ids) == [b"\x04", b"\xc0", b"\xf1"]


def test_the_mass_of_tokens_that_the_student_cannot_write_is_not_retained():
    def tokens(renderer: ChatRenderer) -> RenderedTokens:
        ids_T = np.array(renderer.vocabulary.encode("hello hello"), np.int32)
        ends_T = np.cumsum(renderer.vocabulary.lengths_W[ids_T]).astype(np.int32)
        starts_T = (ends_T - renderer.vocabulary.lengths_W[ids_T]).astype(np.int32)
        return RenderedTokens(ids_T, starts_T, ends_T, np.ones(len(ids_T), bool))

    own, theirs = tokens(POOR), tokens(RICH)
    unwritable = RICH.vocabulary.bytes_W.index(b"\x04")
    probs_NW = torch.zeros((len(theirs), len(RICH.vocabulary)))
    probs_NW[torch.arange(len(theirs)), torch.from_numpy(theirs.ids_T).long()] = 0.75
    probs_NW[:, unwritable] = 0.25
    engine = SimpleNamespace(compute_logprobs=lambda ids, masks: [probs_NW.log()])
    retained_mass = make_retained_mass(
        cast(Teacher, SimpleNamespace(engine=engine)), build_event_map(RICH, POOR)
    )
    mass_C = retained_mass([own], [theirs], align_batch([own], [theirs]).boundaries)
    assert len(mass_C) >= 2
    assert mass_C == pytest.approx(0.75)
