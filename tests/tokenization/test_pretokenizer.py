"""A split rule of a character class holds for every member, in every tokenizer's own pattern."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from persea.tokenization.pretokenizer import (
    LOOKAHEAD_CHARS,
    PROBE_PREFIXES,
    Pretokenizer,
    char_to_byte_offsets,
    decode_whole_characters,
    load_pretokenizer,
)
from persea.tokenization.vocabulary import BYTE_TO_CHAR, load_vocabulary
from tests.conftest import FAMILIES, Speaker

ODD = "aZéß'’sStTrRlL \t\n\r\u3000.,/-_(1234๑你ตั\u0301ကျ☕👩\u200dʰªⅧ½ſK"
texts = st.text(st.one_of(st.sampled_from(ODD), st.characters(codec="utf-8")), max_size=9)


@pytest.fixture(scope="module")
def pretokens_of(tiny_of: Callable[[str], Speaker]) -> dict[str, Pretokenizer]:
    return {family: load_pretokenizer(tiny_of(family).renderer.vocabulary) for family in FAMILIES}


def split_by(pattern: str) -> Pretokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={BYTE_TO_CHAR[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return load_pretokenizer(load_vocabulary(tokenizer, pattern))


HAN = split_by(r"[一-龥]+|\p{L}+|\p{N}|[^\p{L}\p{N}]")  # a pattern with a range
DIGITS = split_by(r"[a-f0-9]+|.")


@given(before=texts.filter(len), after=texts.filter(len))
def test_can_split_is_sound(pretokens_of: dict[str, Pretokenizer], before: str, after: str):
    """Sound: where `can_split` is False no such text is split, whatever precedes the word."""
    for pretokens in (*pretokens_of.values(), HAN, DIGITS):
        text, at = before + after, len(before)
        cuts = pretokens.split_positions(text)
        word = before[max(c for c in cuts if c < at) :]
        for size in range(1, len(after.encode()) + 1):  # also a token that ends inside a character
            if not pretokens.can_split(
                pretokens.class_signature(word), pretokens.leading_signatures(after.encode()[:size])
            ):
                assert at not in cuts, (pretokens.unicode_properties, before, after, size)


@given(
    before=texts.filter(len),
    after=texts.filter(lambda t: len(t) >= LOOKAHEAD_CHARS and not t[:LOOKAHEAD_CHARS].isspace()),
)
def test_can_split_is_exact_where_enough_is_known(
    pretokens_of: dict[str, Pretokenizer], before: str, after: str
):
    """Exact if enough is known: three characters that are not all white space decide."""
    for pretokens in (*(pretokens_of[f] for f in ("llama", "qwen", "gpt-oss")), HAN):
        text, at = before + after, len(before)
        cuts = pretokens.split_positions(text)
        word = before[max(c for c in cuts if c < at) :]
        if not before[0].isspace() and pretokens.split_positions(
            before + after[:LOOKAHEAD_CHARS]
        ) == [c for c in cuts if c < at + LOOKAHEAD_CHARS]:
            assert pretokens.can_split(
                pretokens.class_signature(word), pretokens.leading_signatures(after.encode())
            ) == (at in pretokens.split_positions(before + after[:LOOKAHEAD_CHARS]))


def test_split_patterns(pretokens_of: dict[str, Pretokenizer]):
    llama, oss, gemma = pretokens_of["llama"], pretokens_of["gpt-oss"], pretokens_of["gemma"]

    def may(pretokens: Pretokenizer, before: str, after: str) -> bool:
        return pretokens.can_split(
            pretokens.class_signature(before), pretokens.leading_signatures(after.encode())
        )

    assert (
        not may(llama, " hel", "lo!") and may(llama, " hello", " wo") and may(llama, "don", "'t ")
    )
    assert not may(llama, "12", "3"), "three digits are one word"
    assert may(llama, "123", "4")
    assert may(pretokens_of["qwen"], "1", "2")
    assert may(llama, "'s", "oon") and not may(llama, "'", "soon"), (
        "a contraction ends a word, also in the middle of one"
    )
    assert may(oss, "hello", "World") and not may(llama, "hello", "World"), (
        "o200k splits where capitals begin"
    )
    assert not may(oss, "hello", "'s "), "and keeps contractions with their words"
    assert not may(gemma, "any", "thing") and gemma.never_splits and not gemma.unsupported
    assert may(llama, " ", " x") and not may(llama, "  ", "x"), (
        "of a run of spaces the last goes with the word"
    )


def test_a_partial_character_has_all_its_completions(pretokens_of: dict[str, Pretokenizer]):
    llama = pretokens_of["llama"]
    thai = "ต".encode()
    assert len(llama.leading_signatures(thai)) == 1
    begun = llama.leading_signatures(thai[:2])
    assert len(begun) > 1, "letters, marks and signs begin alike"
    assert llama.can_split(llama.class_signature("ก"), begun), "a mark would end the word"
    assert not llama.can_split(llama.class_signature("ก"), llama.leading_signatures(thai)), (
        "this letter does not"
    )
    assert llama.can_split(llama.class_signature("ก"), llama.leading_signatures("ั".encode())), (
        "this mark does"
    )
    assert llama.leading_signatures(b"\xf0") == (), "too many to tell"
    assert llama.can_split(llama.class_signature("a"), ()), "what cannot be told may be cut"
    assert llama.leading_signatures(b"\x80abc") == ()


def test_an_unknown_pre_tokenizer_may_split_anywhere():
    tokenizer = Tokenizer(models.BPE(vocab={BYTE_TO_CHAR[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    known = load_pretokenizer(load_vocabulary(tokenizer, "gpt2"))
    assert not known.unsupported and not known.can_split(
        known.class_signature("hel"), known.leading_signatures(b"lo!")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.FixedLength(3), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    odd = load_pretokenizer(load_vocabulary(tokenizer, "threes"))
    assert odd.unsupported == "FixedLength"
    assert odd.can_split(odd.class_signature("hel"), odd.leading_signatures(b"lo!"))
    assert split_by(r"\d{1,3}(?=(?:\d{3})*(?!\d))|\D+").unsupported, (
        "a look-around may turn a join into a cut far behind"
    )
    assert split_by(r"[[:alpha:]]+|.").unsupported.startswith("pattern")


@given(text=texts)
def test_places_are_bytes(text: str):
    assert char_to_byte_offsets(text, list(range(len(text) + 1))).tolist() == [
        len(text[:k].encode()) for k in range(len(text) + 1)
    ]
    raw = text.encode()
    for size in range(len(raw) + 1):
        whole, rest = decode_whole_characters(raw[:size])
        assert whole.encode() + rest == raw[:size]
        assert text.startswith(whole) and len(rest) < 4


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        (r"[xy]{1,3}|.", {"x", "xx", "y", "yy"}),
        (r"[k-m]{2,4}|.", {"k", "kk", "kkk"}),
        (r"\p{N}{1,3}|\D+", {"1", "11"}),
        (r"\p{L}+|\P{L}", set()),
    ],
)
def test_words_of_limited_length_are_probed_to_their_end(pattern: str, wanted: set[str]) -> None:
    found = set(split_by(pattern).probe_prefixes) - set(PROBE_PREFIXES)
    assert found >= wanted - set(PROBE_PREFIXES) and bool(found) == bool(wanted)


def test_words_of_great_limited_length_may_end_anywhere() -> None:
    assert not split_by(r"[ab]{1,8}|.").unsupported
    assert "{1,9}" in split_by(r"[ab]{1,9}|.").unsupported
