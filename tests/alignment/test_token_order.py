"""Asked for many tokens at once, a token order says what it says of each alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from persea.alignment import impossible_pairs, token_order
from persea.alignment.token_order import TokenOrder
from persea.tokenization.bpe import derive_bpe
from persea.tokenization.pretokenizer import load_pretokenizer
from tests.conftest import FAMILIES, Speaker

TEXT = "Hello, two  words isn't 12 cats: \u4f60\u597d \u0e2a\u0e27\u0e31\n\tx"
BEGINNINGS = (b"e", b"th", b" ", b"  ", b"\n", b"'", b"a", b"1", b"\xe0", b"\xe0\xb8", b".")


@pytest.fixture(params=FAMILIES)
def order(request: pytest.FixtureRequest, tiny_of: Callable[[str], Speaker]) -> TokenOrder:
    vocabulary = tiny_of(request.param).renderer.vocabulary
    return TokenOrder(vocabulary, derive_bpe(vocabulary), load_pretokenizer(vocabulary))


def test_tokens_that_follow_are_those_of_each_alone(
    order: TokenOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_order, "MIN_VECTOR_TOKENS", 2)
    # with and without bits of a state
    for asked in (0, 1 << 30):
        monkeypatch.setattr(impossible_pairs, "MIN_ASKED_TOKENS", asked)
        fresh, vectorised = replace(order), 0
        for state in sorted(set(order.vocabulary.encode(TEXT))):
            for rest in BEGINNINGS:
                tokens = order.prefixes.in_search_order(rest)[0]
                alone = [
                    (token, place)
                    for place, token in enumerate(tokens)
                    if order.can_follow(state, token, rest)
                ]
                assert list(fresh.following_tokens(state, rest)) == alone
                vectorised += 0 < len(alone) < len(tokens)
        assert vectorised >= 10
        assert bool(fresh._pairs.bits) is (asked == 0)


def test_some_tokens_of_a_context_are_answered_as_all_are(
    order: TokenOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.array(order.vocabulary.encode(TEXT))
    contexts = set(order.context_ids(ids, range(1, len(ids))).tolist())
    everything = np.arange(len(order.vocabulary))
    asked = np.random.default_rng(0).choice(everything, (7, 5))
    for limit in (0, 1 << 30):
        monkeypatch.setattr(impossible_pairs, "MIN_ASKED_TOKENS", limit)
        refused = 0
        for context in contexts:
            impossible = order.impossible_next_tokens(context)
            found = order.cannot_follow(context, asked)
            assert np.array_equal(found, np.isin(asked, impossible))
            assert np.array_equal(everything[order.cannot_follow(context, everything)], impossible)
            refused += int(found.sum())
        assert refused
