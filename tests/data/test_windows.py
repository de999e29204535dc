"""The windows of a document are its bytes, each once and in order, and fit every tokenizer."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest

from persea.data.windows import MIN_WINDOW_TOKENS, TokenLimit, split_document
from persea.models.loading import load_renderer
from tests.conftest import Speaker

SENTENCES = (
    "The cat sat on the mat. ",
    "Harga beras naik lagi.\n",
    "สวัสดีชาวโลก สามร้อยสี่สิบสอง",
    "你好，世界。我们三百四十二只猫。",
    "မင်္ဂလာပါ ",
    "👩‍👩‍👧‍👦🏳️‍🌈 ",
    "\n\n",
    "    ",
    "x = [1]\t",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "e\u0301\u0323",
)


def random_document(rng: np.random.Generator) -> str:
    picks = rng.integers(0, len(SENTENCES), rng.integers(1, 40))
    return unicodedata.normalize("NFC", "".join(SENTENCES[i] for i in picks))


@pytest.mark.parametrize("seed", range(20))
def test_every_byte_is_in_one_window_that_fits(seed: int, tiny_of):
    rng = np.random.default_rng(seed)
    text = random_document(rng)
    speakers: list[Speaker] = [tiny_of(f) for f in ("llama", "gemma", "qwen")]
    limits = [
        TokenLimit(s.renderer.vocabulary, int(rng.integers(MIN_WINDOW_TOKENS, 60)))
        for s in speakers[: rng.integers(1, 4)]
    ]
    windows = split_document(text, limits)
    assert "".join(windows) == text
    assert all(windows)
    for limit in limits:
        for window in windows:
            assert len(limit.vocabulary.encode(window)) <= limit.max_tokens


def test_a_short_document_is_one_window(tiny_of):
    limit = TokenLimit(tiny_of("llama").renderer.vocabulary, 100)
    text = "word " * 19
    assert split_document(text, [limit]) == [text]
    assert split_document(text * 100, []) == [text * 100]


def test_cuts_are_made_at_lines_then_spaces_then_stops():
    limit = TokenLimit(load_renderer("saplings/qwen-sapling").vocabulary, 48)
    lines = "First line here.\nSecond line is here.\nThird line here too.\n" * 4
    assert all(w.endswith("\n") for w in split_document(lines, [limit]))
    words = "alpha beta gamma delta epsilon zeta eta theta " * 5
    assert all(w.startswith((" ", "alpha")) for w in split_document(words, [limit]))
    chinese = "我们三百四十二只猫。" * 20
    assert all(w.endswith("。") for w in split_document(chinese, [limit]))


def test_windows_are_even():
    vocabulary = load_renderer("saplings/qwen-sapling").vocabulary
    text = "one two three four five six seven eight nine ten " * 30
    total = len(vocabulary.encode(text))
    windows = split_document(text, [TokenLimit(vocabulary, total - 1)])
    sizes = [len(vocabulary.encode(w)) for w in windows]
    assert len(sizes) == 2
    assert min(sizes) > total // 3


def test_no_window_begins_with_a_combining_mark():
    limit = TokenLimit(load_renderer("saplings/llama-sapling").vocabulary, 16)
    text = unicodedata.normalize("NFC", "กี่ที่นี่" * 30)
    for window in split_document(text, [limit]):
        assert unicodedata.category(window[0])[0] != "M"


def test_a_text_that_a_tokenizer_cannot_write_is_split_by_its_bytes(tiny_of):
    limit = TokenLimit(tiny_of("gemma").renderer.vocabulary, 20)
    text = "abc ▁ def " * 20  # a literal U+2581 is a space to SentencePiece
    windows = split_document(text, [limit])
    assert "".join(windows) == text
    assert all(len(w.encode()) <= 20 for w in windows if "▁" in w)


def test_a_limit_below_one_character_is_a_programming_error(tiny_of):
    with pytest.raises(ValueError, match="less than 4 tokens"):
        split_document("x", [TokenLimit(tiny_of("llama").renderer.vocabulary, 3)])
