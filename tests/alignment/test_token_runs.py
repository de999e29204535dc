"""Bytes and words of a run of tokens are those of its text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from persea.alignment.token_runs import split_run
from persea.tokenization.pretokenizer import load_pretokenizer
from tests.conftest import FAMILIES, Speaker


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["Hello, two  words and 1234 cats.", "สวัสดี ชาวโลก", "a\n\nb é"])
def test_words_begin_where_the_text_is_split(
    family: str, text: str, tiny_of: Callable[[str], Speaker]
) -> None:
    vocabulary = tiny_of(family).renderer.vocabulary
    splits = load_pretokenizer(vocabulary)
    ids = np.array(vocabulary.encode(text), np.int64)
    raw, cuts, ends_T = split_run(ids, vocabulary, splits, ())
    assert raw.decode() == text
    assert ends_T.tolist() == np.cumsum(vocabulary.lengths_W[ids]).tolist()
    wanted = [len(text[:c].encode()) for c in splits.split_positions(text)]
    assert cuts.tolist() == wanted


def test_an_added_token_is_a_word(tiny_of: Callable[[str], Speaker]) -> None:
    vocabulary = tiny_of("llama").renderer.vocabulary
    splits = load_pretokenizer(vocabulary)
    ids = np.array(vocabulary.encode("one two three"), np.int64)
    ends = np.cumsum(vocabulary.lengths_W[ids]).tolist()
    middle = vocabulary.bytes_W[int(ids[1])]
    assert middle is not None
    before = split_run(ids, vocabulary, splits, ())[1].tolist()
    after = split_run(ids, vocabulary, splits, (middle,))[1].tolist()
    assert set(after) >= {*before, ends[0], ends[1]}
