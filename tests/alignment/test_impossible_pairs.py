"""Asked one by one or all at once, the same tokens are impossible."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from persea.alignment import impossible_pairs
from persea.alignment.impossible_pairs import ImpossiblePairs
from persea.alignment.token_order import get_token_order
from tests.conftest import Speaker


@pytest.mark.parametrize("family", ["qwen", "gemma"])
def test_few_tokens_and_many(
    family: str, tiny_of: Callable[[str], Speaker], monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = tiny_of(family).renderer.vocabulary
    derivations = get_token_order(vocabulary).derivations
    pairs = ImpossiblePairs(derivations, len(vocabulary))
    monkeypatch.setattr(impossible_pairs, "MAX_CACHED_BITS", 2)
    everything = np.arange(len(vocabulary))
    some = everything[1::7][:60].reshape(-1, 4)
    for state in map(derivations.state_of, vocabulary.encode("hello there, you")[:4]):
        impossible = np.isin(everything, derivations.impossible_next_tokens(state))
        for _ in range(4):  # asked often enough, the state keeps its bits
            assert np.array_equal(pairs.are_impossible(state, some), impossible[some])
        assert state in pairs.bits and len(pairs.bits) <= 2
        assert np.array_equal(pairs.are_impossible(state, everything), impossible)
        assert 0 < impossible.sum() < len(everything)
