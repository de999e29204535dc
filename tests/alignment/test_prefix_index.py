"""The tokens of a vocabulary by their first bytes, beside a search through all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from persea.alignment.prefix_index import PrefixIndex
from tests.conftest import FAMILIES, Speaker


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_that_a_text_can_begin_with(family: str, tiny_of: Callable[[str], Speaker]) -> None:
    vocabulary = tiny_of(family).renderer.vocabulary
    index = PrefixIndex(vocabulary)
    spelled = [(i, raw) for i, raw in enumerate(vocabulary.bytes_W) if raw]
    for raw in (b"a", b" the", b"th", b"\xe0\xb8", b"\xff", b"  ", b"no token begins so!"):
        covering, starts = index.covering(raw)
        whole = {i for i, one in spelled if one.startswith(raw)}
        assert set(covering.tolist()) == whole
        assert set(starts) == {i for i, one in spelled if raw.startswith(one) and one != raw}
        tokens, tokens_T = index.in_search_order(raw)
        assert list(tokens) == tokens_T.tolist() and set(tokens) == whole | set(starts)
        longer = [i for i, one in spelled if one.startswith(raw) and one != raw]
        assert index.num_longer(raw) == len(longer)
        assert set(tokens[len(tokens) - len(longer) :]) == set(longer)
