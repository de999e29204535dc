"""Impossible token pairs never occur, and all others do: checked against the tokenizer itself."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from persea.tokenization.bpe import derive_bpe, expand_groups, group_offsets
from persea.tokenization.vocabulary import BYTE_TO_CHAR, Vocabulary, load_vocabulary
from tests.conftest import FAMILIES, Speaker


def byte_pairs(chosen: list[tuple[int, int]], alphabet: bytes = b"abc ") -> Vocabulary:
    """A byte-level BPE without pre-tokenizer; merge k joins two of the pieces that exist by
    then."""
    pieces = [BYTE_TO_CHAR[b] for b in range(256)]
    merges: list[tuple[str, str]] = []
    start = [BYTE_TO_CHAR[b] for b in alphabet]
    for a, b in chosen:
        known = [*start, *pieces[256:]]
        pair = known[a % len(known)], known[b % len(known)]
        if pair not in merges and "".join(pair) not in pieces and len("".join(pair)) <= 6:
            merges.append(pair)
            pieces.append("".join(pair))
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return load_vocabulary(tokenizer, "pairs")


chosen = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=14)


def bytes_of(vocabulary: Vocabulary, *ids: int) -> list[int]:
    return [
        t.id
        for t in vocabulary.backend.model.tokenize(
            "".join(BYTE_TO_CHAR[b] for i in ids for b in vocabulary.bytes_W[i] or b"")
        )
    ]


@given(chosen=chosen)
def test_possible_and_impossible_pairs_match_the_encoder(chosen: list[tuple[int, int]]):
    """For every pair, encoding its bytes gives the two tokens, unless a merge crosses."""
    vocabulary = byte_pairs(chosen)
    merges = derive_bpe(vocabulary)
    tokens = [*(i for i, raw in enumerate(vocabulary.bytes_W) if raw and set(raw) <= set(b"abc "))]
    for a in tokens:
        assert merges.derivable_V[a] == (bytes_of(vocabulary, a) == [a])
        after = merges.impossible_next_tokens(a).tolist()
        assert after == sorted(set(after))
        for b in tokens:
            assert (b in after) == merges.is_impossible_pair(a, b)
            if not (merges.derivable_V[a] and merges.derivable_V[b]):
                assert b in after
            else:
                assert (bytes_of(vocabulary, a, b) == [a, b]) == (b not in after), (
                    vocabulary.bytes_W[a],
                    vocabulary.bytes_W[b],
                )


@given(chosen=chosen, text=st.text("abc ", min_size=2, max_size=14))
def test_a_sequence_is_canonical_if_every_pair_is(chosen: list[tuple[int, int]], text: str):
    vocabulary = byte_pairs(chosen)
    merges = derive_bpe(vocabulary)
    ids = vocabulary.encode(text)
    assert not any(merges.is_impossible_pair(a, b) for a, b in pairwise(ids))
    cut = (
        len(ids) // 2
    )  # two parts encoded apart: the whole is their chain, or a merge crosses where they meet
    left, right = (
        (
            vocabulary.encode(vocabulary.decode(part).decode())
            for part in (ids[:cut], ids[cut:])
            if part
        )
        if cut
        else ([], ids)
    )
    other = vocabulary.encode("".join(reversed(text)))
    joined = [*ids, *other]
    whole = vocabulary.encode(text + "".join(reversed(text)))
    assert (whole == joined) == (not merges.is_impossible_pair(ids[-1], other[0]))
    assert [*left, *right] == ids


def test_the_same_pair_twice_merges_from_the_left():
    vocabulary = byte_pairs([(0, 0)])  # aa
    merges, aa = derive_bpe(vocabulary), len(vocabulary) - 2
    assert vocabulary.bytes_W[aa] == b"aa"
    assert vocabulary.encode("aaa") == [aa, ord("a")]
    assert not merges.is_impossible_pair(aa, ord("a"))
    assert merges.is_impossible_pair(ord("a"), aa)
    assert merges.is_impossible_pair(ord("a"), ord("a"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_derivations(tiny_of: Callable[[str], Speaker], family: str):
    """Edges are tokens of the right bytes, ranks rise along a derivation, fallback bytes merge with
    nothing."""
    vocabulary = tiny_of(family).renderer.vocabulary
    merges = derive_bpe(vocabulary)
    made = np.flatnonzero(merges.left_V >= 0)
    assert len(made) > 100
    for i in made.tolist():
        left, right = int(merges.left_V[i]), int(merges.right_V[i])
        assert (vocabulary.bytes_W[left] or b"") + (
            vocabulary.bytes_W[right] or b""
        ) == vocabulary.bytes_W[i]
        assert merges.max_rank_V[i] >= max(
            merges.rank_V[i], merges.max_rank_V[left], merges.max_rank_V[right]
        )
    content = np.array([raw is not None for raw in vocabulary.bytes_W])
    assert merges.derivable_V[content].mean() > 0.9
    assert not merges.derivable_V[~content].any()
    if family == "gemma":
        byte = vocabulary.backend.token_to_id("<0x41>")
        assert not merges.derivable_V[byte], "A has a token of its own"
        lead = vocabulary.backend.token_to_id("<0xF0>")
        assert merges.derivable_V[lead]
        assert not merges.derivable_V[merges.impossible_next_tokens(lead)].any()


def test_expand_lays_lists_end_to_end():
    offsets = group_offsets(np.array([2, 0, 2, 2]), 4)
    assert offsets.tolist() == [0, 1, 1, 4, 4]
    at, row = expand_groups(offsets, np.array([2, 1, 0, 3, 2]))
    assert at.tolist() == [1, 2, 3, 0, 1, 2, 3]
    assert row.tolist() == [0, 0, 0, 2, 4, 4, 4]


@pytest.mark.realdata
def test_real_pairs(real: Speaker):
    """The tokenizer itself agrees on random pairs and on pairs that count as impossible."""
    vocabulary = real.renderer.vocabulary
    merges = derive_bpe(vocabulary)
    made = np.flatnonzero(merges.derivable_V)
    assert len(made) > 0.98 * sum(raw is not None for raw in vocabulary.bytes_W)
    if not vocabulary.byte_level:
        # its model takes no bytes; tests/alignment/test_boundary_mask.py sees it through texts
        return
    rng, crossing, standing = np.random.default_rng(0), 0, 0
    for a in rng.choice(made, 60).tolist():
        after = merges.impossible_next_tokens(a)
        some = [
            *rng.choice(made, 30).tolist(),
            *(rng.choice(after, 30).tolist() if len(after) else []),
        ]
        cannot = set(after.tolist())
        for b in some:
            assert (bytes_of(vocabulary, a, b) == [a, b]) == (
                b not in cannot
            ) or vocabulary.bytes_W[b] is None
            crossing, standing = crossing + (b in cannot), standing + (b not in cannot)
    assert crossing > 1000 and standing > 1000
