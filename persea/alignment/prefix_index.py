"""The tokens of a vocabulary by their first bytes."""

from __future__ import annotations

from bisect import bisect_left
from functools import cached_property

import numpy as np
import numpy.typing as npt

from persea.tokenization.vocabulary import Vocabulary


class PrefixIndex:
    """Finds the tokens that a text with some beginning can begin with.

    Each step of a search asks about the same few bytes, so answers are kept.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._covering: dict[bytes, tuple[npt.NDArray[np.int64], tuple[int, ...]]] = {}
        self._in_order: dict[bytes, tuple[tuple[int, ...], npt.NDArray[np.int64]]] = {}

    @cached_property
    def _sorted_tokens(self) -> tuple[list[bytes], npt.NDArray[np.int64]]:
        """(bytes in sorted order, token id by rank)."""
        pairs = sorted((raw, i) for i, raw in enumerate(self._vocabulary.bytes_W) if raw)
        return [raw for raw, _ in pairs], np.array([i for _, i in pairs], np.int64)

    @cached_property
    def tokens_by_bytes(self) -> dict[bytes, tuple[int, ...]]:
        """Bytes -> all tokens with these bytes."""
        found: dict[bytes, tuple[int, ...]] = {}
        for i, raw in enumerate(self._vocabulary.bytes_W):
            if raw:
                found[raw] = (*found.get(raw, ()), i)
        return found

    def covering(self, raw: bytes) -> tuple[npt.NDArray[np.int64], tuple[int, ...]]:
        """Return the tokens that a text with this beginning can begin with.

        Args:
            raw: The first bytes of the text.

        Returns:
            (tokens that start with all of `raw`, tokens that are a shorter prefix of it).
        """
        if raw not in self._covering:
            ordered, token_by_rank = self._sorted_tokens
            low, after = bisect_left(ordered, raw), raw.rstrip(b"\xff")
            high = (
                bisect_left(ordered, after[:-1] + bytes([after[-1] + 1])) if after else len(ordered)
            )
            self._covering[raw] = (
                token_by_rank[low:high],
                tuple(u for n in range(1, len(raw)) for u in self.tokens_by_bytes.get(raw[:n], ())),
            )
        return self._covering[raw]

    def in_search_order(self, raw: bytes) -> tuple[tuple[int, ...], npt.NDArray[np.int64]]:
        """Return the tokens of `covering` in the order of the boundary search.

        Tokens of exactly these bytes come first, then shorter ones, then longer ones.

        Args:
            raw: The first bytes of the text.

        Returns:
            The tokens, and the same as an array.
        """
        if raw not in self._in_order:
            (covering, starts), exact = self.covering(raw), self.tokens_by_bytes.get(raw, ())
            tokens = (*exact, *starts, *covering[len(exact) :].tolist())
            self._in_order[raw] = tokens, np.array(tokens, np.int64)
        return self._in_order[raw]

    def num_longer(self, raw: bytes) -> int:
        """Return how many tokens start with some bytes and go on: the last in search order."""
        return len(self.covering(raw)[0]) - len(self.tokens_by_bytes.get(raw, ()))
