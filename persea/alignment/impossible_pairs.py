"""Which tokens never follow in a state of one tokenizer, asked about few tokens or many."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from persea.tokenization.bpe import BpeDerivations
from persea.tokenization.unigram import UnigramLattice

MAX_CACHED_BITS = 4096  # states; 33 kB each with 262,144 tokens
# A state of which fewer tokens were asked has no bits: making them takes as long as asking about
# some hundred tokens one by one.
MIN_ASKED_TOKENS = 150


class ImpossiblePairs:
    """Tells which tokens never follow in a state within one word.

    Few tokens are asked one by one. A state that is asked often keeps a bit for each token of the
    vocabulary.
    """

    def __init__(self, derivations: BpeDerivations | UnigramLattice, vocab_size: int) -> None:
        self.derivations, self.vocab_size = derivations, vocab_size
        self.bits: dict[int, npt.NDArray[np.uint8]] = {}
        self._times_asked: dict[int, int] = {}

    def are_impossible(self, state: int, tokens: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """Return which tokens never follow.

        Args:
            state: The state, as `derivations` number it.
            tokens: Token ids, of any shape.
        """
        packed = self.bits.get(state)
        if packed is None:
            asked = self._times_asked[state] = self._times_asked.get(state, 0) + tokens.size
            if asked < MIN_ASKED_TOKENS:
                is_impossible = self.derivations.is_impossible_pair
                alone = [is_impossible(state, u) for u in tokens.ravel().tolist()]
                return np.array(alone, np.bool_).reshape(tokens.shape)
            if len(self.bits) >= MAX_CACHED_BITS:
                self.bits.clear()
            impossible_V = np.zeros(self.vocab_size, np.bool_)
            impossible_V[self.derivations.impossible_next_tokens(state)] = True
            packed = self.bits[state] = np.packbits(impossible_V)
        found: npt.NDArray[np.bool_] = ((packed[tokens >> 3] << (tokens & 7)) & 0x80) != 0
        return found
