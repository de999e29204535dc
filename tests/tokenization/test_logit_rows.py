"""Control tokens without a row of logits are left out; a token of text without one is refused."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import AddedToken

from persea.alignment.event_map import build_event_map, event_map_digest
from persea.errors import DataError
from persea.tokenization.logit_rows import limit_to_rows, tokens_without_row
from persea.tokenization.vocabulary import Vocabulary, load_vocabulary
from tests.alignment.test_event_map import SAID, byte_level, renderer_of, sentencepiece


def with_placeholder(content: str = "<image_soft_token>", special: bool = True) -> Vocabulary:
    tokenizer = sentencepiece(SAID, 300)
    tokenizer.add_tokens([AddedToken(content, special=special, normalized=False)])
    return load_vocabulary(tokenizer, "pictures")


def test_a_control_token_without_a_row_is_left_out():
    whole = with_placeholder()
    rows = len(whole) - 1
    limited = limit_to_rows(whole, rows, "w")
    assert len(limited) == rows
    assert tokens_without_row(limited) == ("<image_soft_token>",)
    assert tokens_without_row(whole) == ()
    text = "a <image_soft_token> b"
    assert limited.encode(text) == whole.encode(text)
    assert max(limited.encode(text)) < rows
    with pytest.raises(DataError, match="image_soft_token"):
        limited.decode([rows])
    with pytest.raises(DataError, match="outside the vocabulary"):
        limited.decode_pieces([rows])


@pytest.mark.parametrize("more", [0, 1, 63])
def test_padded_rows_change_nothing(more: int):
    whole = with_placeholder()
    assert limit_to_rows(whole, len(whole) + more, "w") is whole


def test_a_token_of_text_without_a_row_is_refused():
    whole = with_placeholder("plain words", special=False)
    with pytest.raises(DataError, match=r"1 tokens of text have none, the first is 'plain words'"):
        limit_to_rows(whole, len(whole) - 1, "w")
    with pytest.raises(DataError, match="do not belong together"):
        limit_to_rows(with_placeholder(), 200, "w")


def test_one_tokenizer_with_and_without_the_row_is_the_same_tokenizer():
    """A control token with a row on one side only has no event; all others are their own."""
    whole = renderer_of(byte_level(SAID, 300), "whole")
    tokenizer = byte_level(SAID, 300)
    tokenizer.add_special_tokens(["<|picture|>"])
    more = renderer_of(tokenizer, "more")
    limited = renderer_of(tokenizer, "limited")
    object.__setattr__(
        limited, "vocabulary", limit_to_rows(limited.vocabulary, len(more.vocabulary) - 1, "w")
    )
    rows = len(limited.vocabulary)
    for teacher, student in ((more, limited), (limited, more)):
        emap = build_event_map(teacher, student)
        assert emap.num_events == rows
        assert emap.teacher_mask is None
        for event_X in (emap.teacher_event_W, emap.student_event_V):
            assert (event_X[:rows] == np.arange(rows)).all()
            assert (event_X[rows:] == -1).all()
    assert event_map_digest(more, limited) != event_map_digest(more, more)
    assert build_event_map(limited, limited).is_identity
    other = build_event_map(limited, whole)
    assert len(other.teacher_event_W) == rows
