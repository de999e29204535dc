"""A sequence of tokens is possible exactly if Unigram's own search finds it: by enumeration."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from persea.errors import DataError
from persea.tokenization.unigram import UnigramLattice, derive_unigram
from persea.tokenization.vocabulary import Vocabulary, load_vocabulary
from tests.tokenization.traits import BYTES, CORPUS, PREFIX_FORMS, SPM_DECODERS, unigram

ALPHABET = "ab "


def toy_unigram(
    pieces: Sequence[tuple[str, float]],
    *,
    fallback: bool = True,
    words: bool = False,
    added: Sequence[str] = (),
) -> Vocabulary:
    """A Unigram of these pieces, "▁" written as a space; with byte fallback and the whole ASCII."""
    known = {text.replace(" ", "▁") for text, _ in pieces}
    singles = [chr(b) for b in range(33, 127)] + ["▁", "\n", "\t"] if not fallback else []
    entries = [
        ("<unk>", 0.0),
        *((t.replace(" ", "▁"), s) for t, s in pieces),
        *((c, -12.0) for c in singles if c not in known),
        *((b, -15.0) for b in (BYTES if fallback else ())),
    ]
    tokenizer = Tokenizer(models.Unigram(entries, 0, fallback))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    if words:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=True)
    tokenizer.decoder = decoders.Sequence(SPM_DECODERS)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    tokenizer.add_special_tokens(["<|end|>"])
    return load_vocabulary(tokenizer, "toy unigram")


@st.composite
def toys(
    draw: st.DrawFn, *, fallback: bool = True, words: bool = False, added: Sequence[str] = ()
) -> Vocabulary:
    """Random pieces over ALPHABET with random scores; sometimes a letter has no piece."""
    texts = draw(
        st.lists(st.text(ALPHABET, min_size=2, max_size=4), min_size=1, max_size=10, unique=True)
    )
    singles = draw(st.sampled_from([ALPHABET, ALPHABET, "a "])) if fallback else ALPHABET
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    pieces = [(t, float(rng.uniform(-8, -1)) - 0.5 * len(t)) for t in (*singles, *texts)]
    return toy_unigram(pieces, fallback=fallback, words=words, added=added)


def is_possible(lattice: UnigramLattice, ids: Sequence[int]) -> bool:
    """Whether the lattice allows each token after the ones before."""
    if not lattice.derivable_V[list(ids)].all():
        return False
    state = lattice.state_of(ids[0])
    for token in ids[1:]:
        if lattice.is_impossible_pair(state, token):
            return False
        state = lattice.extend(state, token)
    return True


@settings(max_examples=25)
@given(vocabulary=toys(), seed=st.integers(0, 999))
def test_a_sequence_is_possible_if_and_only_if_the_tokenizer_makes_it(
    vocabulary: Vocabulary, seed: int
):
    lattice = derive_unigram(vocabulary, cuts_at_spaces=False)
    for text in ("".join(s) for n in range(1, 6) for s in product(ALPHABET, repeat=n)):
        assert is_possible(lattice, vocabulary.encode(text)), text
    pieces = [i for i, text in enumerate(lattice.pieces) if text is not None]
    rng = np.random.default_rng(seed)
    for _ in range(200):
        ids = rng.choice(pieces, int(rng.integers(1, 6))).tolist()
        own = vocabulary.encode(vocabulary.decode(ids).decode())
        if is_possible(lattice, ids) != (own == ids):
            # the same pieces in another order: which one wins is decided by the last bits
            assert is_possible(lattice, ids)
            difference = score_of(lattice, own) - score_of(lattice, ids)
            assert abs(difference) < 1e-6


def score_of(lattice: UnigramLattice, ids: Sequence[int]) -> float:
    return sum(
        lattice.unknown_score if lattice.pieces[i] is None else lattice.scores[i] for i in ids
    )


@settings(max_examples=15)
@given(vocabulary=toys(), seed=st.integers(0, 999))
def test_impossible_next_tokens_are_the_impossible_pairs(vocabulary: Vocabulary, seed: int):
    lattice = derive_unigram(vocabulary, cuts_at_spaces=False)
    rng = np.random.default_rng(seed)
    for _ in range(12):
        text = "".join(rng.choice(list(ALPHABET), int(rng.integers(1, 9))))
        ids = vocabulary.encode(text)
        state = lattice.state_of(ids[0])
        for token in ids[1:]:
            state = lattice.extend(state, token)
        assert lattice.last_token(state) == ids[-1]
        found = lattice.impossible_next_tokens(state).tolist()
        text_tokens = [i for i, raw in enumerate(vocabulary.bytes_W) if raw is not None]
        assert [i for i in found if i in text_tokens] == [
            i for i in text_tokens if lattice.is_impossible_pair(state, i)
        ]


def test_a_piece_that_two_others_beat_is_never_realised():
    vocabulary = toy_unigram([("a", -1.0), ("b", -1.0), (" ", -1.0), ("ab", -3.0), ("ba", -1.5)])
    lattice = derive_unigram(vocabulary, cuts_at_spaces=False)
    names = {raw: i for i, raw in enumerate(vocabulary.bytes_W)}
    assert not lattice.derivable_V[names[b"ab"]] and lattice.derivable_V[names[b"ba"]]
    a, b = (vocabulary.encode(c)[0] for c in "ab")
    assert lattice.is_impossible_pair(lattice.state_of(b), a)
    assert not lattice.is_impossible_pair(lattice.state_of(a), b)
    # a byte token only spells a character without a piece
    assert names[b"a"] != a and not lattice.derivable_V[names[b"a"]]
    assert lattice.derivable_V[names[b"c"]] and lattice.derivable_V[names[b"\xe4"]]


def test_three_tokens_that_only_a_long_piece_beats():
    """Each pair alone is possible; the three together are one piece."""
    vocabulary = toy_unigram([("a", -1.0), ("b", -1.0), (" ", -1.0), ("ab ", -2.0)])
    lattice = derive_unigram(vocabulary, cuts_at_spaces=False)
    a, b, space = (vocabulary.encode(c)[0] for c in "ab ")
    state = lattice.state_of(a)
    assert not lattice.is_impossible_pair(state, b)
    assert not lattice.is_impossible_pair(lattice.state_of(b), space)
    assert lattice.is_impossible_pair(lattice.extend(state, b), space)
    assert lattice.extend(lattice.extend(state, b), space) == lattice.state_of(space)


def test_pieces_that_the_pretokenizer_cuts_are_never_realised():
    pieces = [("a", -1.0), ("b", -1.0), (" ", -1.0), ("a b", -1.0), (" b", -1.5)]
    words = derive_unigram(toy_unigram(pieces, words=True), cuts_at_spaces=True)
    whole = derive_unigram(toy_unigram(pieces), cuts_at_spaces=False)
    long = words.pieces.index(None, 1)
    assert whole.pieces[long] == "a▁b" and whole.derivable_V[long] and not words.derivable_V[long]


def test_no_control_token_and_no_byte_token_is_read_in_a_text():
    vocabulary = load_vocabulary(unigram(), "unigram")
    controls = set(vocabulary.control_token_ids.values())
    assert {"<unk>", "<s>", "<|end|>"} <= set(vocabulary.control_token_ids)
    for text in ("<s>", "a</s>b", "<|user|>\n", "<unk>"):
        ids = vocabulary.encode(text)
        assert not controls.intersection(ids)
        assert vocabulary.decode(ids) == text.encode()
    with pytest.raises(DataError, match="byte 0 of '<0x41>'"):
        vocabulary.encode("<0x41>")  # the tokenizer reads the byte 41 there


def test_without_byte_fallback_a_character_without_a_piece_is_refused_by_place():
    vocabulary = load_vocabulary(unigram(fallback=False), "no bytes")
    assert vocabulary.decode(vocabulary.encode("the cat 你好")) == "the cat 你好".encode()
    with pytest.raises(DataError, match="no token for the bytes d0 b6 at character 4"):
        vocabulary.encode("the ж")


@pytest.mark.parametrize("form", PREFIX_FORMS)
@pytest.mark.parametrize("fallback", [True, False], ids=["fallback", "no fallback"])
def test_every_form_opens(form: str, fallback: bool):
    vocabulary = load_vocabulary(unigram(form, fallback=fallback), form)
    assert not vocabulary.byte_level and vocabulary.is_unigram
    for text in CORPUS:
        text = unicodedata.normalize("NFC", text)
        if vocabulary.can_write(text.encode()):
            assert vocabulary.decode(vocabulary.encode(text)) == text.encode()
    assert (vocabulary.prefix_space is None) == (form == "none")
