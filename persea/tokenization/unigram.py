"""Which token can follow which under a Unigram tokenizer, by its own lattice.

Unigram segments a text so that the sum of its tokens' scores is highest. A sequence of tokens is
the tokenizer's own exactly if no other segmentation of the same characters scores higher. Another
segmentation that joins ours again at the end of a token can be judged at once, whatever follows.
So each state holds the pieces that begun inside the sequence and are not complete yet, with the
score of the best segmentation up to their beginning, relative to the sequence's own: the columns
of the Viterbi search. A token is impossible if a path through the lattice that ends where the token
ends beats it. Ties count as possible, and so do byte tokens, which only spell characters without a
piece: in doubt nothing is excluded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from persea.tokenization.prefix_space import SPACE_MARK
from persea.tokenization.vocabulary import Vocabulary

UNKNOWN_PENALTY = 10.0  # tokenizers scores a character without a piece so much below the worst
# Sums of scores differ in their last bits with the order of addition; a tie excludes nothing.
TIE = 1e-6
ROOT = 0
MAX_CACHED_STEPS = 1_000_000  # about 200 bytes each; when full, all are dropped


@dataclass(frozen=True)
class UnigramState:
    """The last token of a sequence, and the pieces that begin in it and are not complete.

    Attributes:
        token: The last token.
        open_pieces: (trie node of the characters so far, score of the best segmentation up to the
            piece's first character less the sequence's own score), sorted by node.
    """

    token: int
    open_pieces: tuple[tuple[int, float], ...]


@dataclass(frozen=True, eq=False)
class UnigramLattice:
    """The pieces of a Unigram model as a trie. V = vocabulary, N = nodes, node 0 the root.

    States are numbered; `state_of` and `extend` return numbers.

    Attributes:
        pieces: Characters of each token that segmentations consist of; None for byte tokens,
            control tokens, added tokens, and pieces that the pre-tokenizer always cuts.
        scores: Score of each of them.
        unknown_score: Score of a character without a piece.
        children: Node -> character -> node.
        node_scores: Score of the piece that ends at a node; None where none ends.
    """

    pieces: Sequence[str | None]
    scores: Sequence[float]
    unknown_score: float
    children: list[dict[str, int]] = field(repr=False)
    node_scores: list[float | None] = field(repr=False)
    # best score of the rest of a piece after k characters, for k = 0 .. length
    tails: Sequence[tuple[float, ...]] = field(repr=False)
    derivable_V: npt.NDArray[np.bool_] = field(repr=False)
    prefix_node_M: npt.NDArray[np.int64] = field(repr=False)
    prefix_token_M: npt.NDArray[np.int64] = field(repr=False)
    prefix_gap_M: npt.NDArray[np.float64] = field(repr=False)
    _numbers: dict[UnigramState, int] = field(default_factory=dict, repr=False)
    _states: list[UnigramState] = field(default_factory=list, repr=False)
    _steps: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)
    _completions: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]] = field(
        default_factory=dict, repr=False
    )

    def state_of(self, token: int) -> int:
        """Return the state after a token at the start of a text, or after unknown text."""
        return self._number(self._advance((), token)[1])

    def extend(self, state: int, token: int) -> int:
        """Return the state after one more token; after an impossible one nothing before counts."""
        after = self._step(state, token)
        return self.state_of(token) if after < 0 else after

    def last_token(self, state: int) -> int:
        """Return the last token of a state."""
        return self._states[state].token

    def is_impossible_pair(self, state: int, next_token: int) -> bool:
        """Return whether `next_token` is in `impossible_next_tokens(state)`."""
        return self._step(state, next_token) < 0

    def impossible_next_tokens(self, state: int) -> npt.NDArray[np.int64]:
        """Return the sorted int64 ids of tokens that never follow in a state within one word."""
        if not self.derivable_V[self._states[state].token]:
            return np.arange(len(self.derivable_V))
        best_N = np.full(len(self.children), -np.inf)
        for node, score in self._states[state].open_pieces:
            nodes, scores = self._completions_of(node)
            np.maximum.at(best_N, nodes, scores + score)
        beaten_M = best_N[self.prefix_node_M] > self.prefix_gap_M + TIE
        impossible_V = ~self.derivable_V
        impossible_V[self.prefix_token_M[beaten_M]] = True
        return np.flatnonzero(impossible_V)

    def _completions_of(self, node: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return the ways to complete an open piece: (node of the characters added, score)."""
        if node not in self._completions:
            nodes, scores = list[int](), list[float]()
            stack = [(node, ROOT)]
            while stack:
                inside, added = stack.pop()
                of_added = self.children[added]
                for c, child in self.children[inside].items():
                    if c in of_added:
                        stack.append((child, of_added[c]))
                        if (score := self.node_scores[child]) is not None:
                            nodes.append(of_added[c])
                            scores.append(score)
            self._completions[node] = np.array(nodes, np.int64), np.array(scores, np.float64)
        return self._completions[node]

    def _step(self, state: int, token: int) -> int:
        """Return the state after a token; -1 if it is impossible."""
        key = state, token
        if key not in self._steps:
            if len(self._steps) >= MAX_CACHED_STEPS:
                self._steps.clear()
            before = self._states[state]
            possible, after = self._advance(before.open_pieces, token)
            possible = possible and bool(self.derivable_V[token] and self.derivable_V[before.token])
            self._steps[key] = self._number(after) if possible else -1
        return self._steps[key]

    def _number(self, state: UnigramState) -> int:
        if state not in self._numbers:
            self._numbers[state] = len(self._states)
            self._states.append(state)
        return self._numbers[state]

    def _advance(
        self, open_pieces: tuple[tuple[int, float], ...], token: int
    ) -> tuple[bool, UnigramState]:
        """Run the Viterbi search over the characters of one more token.

        Returns:
            (whether no other path to the token's end beats it, the state after it)
        """
        text = self.pieces[token]
        if text is None:  # nothing is known about the lattice after it
            return True, UnigramState(token, ())
        best = [0.0, *[-np.inf] * len(text)]  # of other paths, by characters of the token
        live = [*open_pieces, (ROOT, 0.0)]
        for k, c in enumerate(text, start=1):
            through = []
            for node, score in live:
                child = self.children[node].get(c)
                if child is None:
                    continue
                through.append((child, score))
                end = self.node_scores[child]
                if end is not None:
                    best[k] = max(best[k], score + end)
            single = self.children[ROOT].get(c)
            if single is None or self.node_scores[single] is None:
                best[k] = max(best[k], best[k - 1] + self.unknown_score)
            live = through
            if best[k] > -np.inf and k < len(text):
                live.append((ROOT, best[k]))
        own = self.scores[token]
        open_after = tuple(
            sorted((node, round(score - own, 9)) for node, score in live if self.children[node])
        )
        return best[-1] <= own + TIE, UnigramState(token, open_after)


def derive_unigram(vocabulary: Vocabulary, cuts_at_spaces: bool) -> UnigramLattice:
    """Build the lattice of a Unigram tokenizer; about 20 µs a token.

    Args:
        vocabulary: The tokenizer.
        cuts_at_spaces: Whether its pre-tokenizer begins a word at each space: then no text has a
            piece with a space after its first character.
    """
    spec = json.loads(vocabulary.backend.to_str())["model"]
    entries: list[tuple[str, float]] = [(t, float(s)) for t, s in spec["vocab"]]
    size = len(vocabulary)
    # added tokens are cut out of a text before it is segmented
    added = vocabulary.backend.get_added_tokens_decoder().keys()
    pieces: list[str | None] = [None] * size
    scores = [0.0] * size
    for i, (entry, score) in enumerate(entries):
        raw = vocabulary.bytes_W[i]
        usable = (
            i not in added and raw is not None and raw == entry.replace(SPACE_MARK, " ").encode()
        )
        if usable and not (cuts_at_spaces and SPACE_MARK in entry[1:]):
            pieces[i], scores[i] = entry, score
    children: list[dict[str, int]] = [{}]
    node_scores: list[float | None] = [None]
    for text, score in zip(pieces, scores, strict=True):
        node = ROOT
        for c in text or "":
            node = children[node].setdefault(c, len(children))
            if node == len(children):
                children.append({})
                node_scores.append(None)
        if text:
            node_scores[node] = score
    unknown_score = min(score for _, score in entries) - UNKNOWN_PENALTY
    tails = [_tail_scores(t, children, node_scores, unknown_score) for t in pieces]
    # Added tokens are possible anywhere, byte tokens in characters that no piece spells.
    single_characters = {
        vocabulary.bytes_W[i] for i, text in enumerate(pieces) if text and len(text) == 1
    }
    derivable_V = np.array([raw is not None for raw in vocabulary.bytes_W], np.bool_)
    nodes, tokens, gaps = list[int](), list[int](), list[float]()
    for i, text in enumerate(pieces):
        if text is None:
            derivable_V[i] &= i in added or (
                _is_byte_piece(entries[i][0]) and vocabulary.bytes_W[i] not in single_characters
            )
            continue
        derivable_V[i] = scores[i] >= tails[i][0] - TIE
        node = ROOT
        for k, c in enumerate(text, start=1):
            node = children[node][c]
            nodes.append(node)
            tokens.append(i)
            gaps.append(scores[i] - tails[i][k])
    return UnigramLattice(
        pieces,
        scores,
        unknown_score,
        children,
        node_scores,
        tails,
        derivable_V,
        np.array(nodes, np.int64),
        np.array(tokens, np.int64),
        np.array(gaps, np.float64),
    )


def _is_byte_piece(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x")


def _tail_scores(
    text: str | None,
    children: Sequence[Mapping[str, int]],
    node_scores: Sequence[float | None],
    unknown_score: float,
) -> tuple[float, ...]:
    """Return the best score of text[k:] for each k, without the piece that is the whole text."""
    if text is None:
        return ()
    best = [-np.inf] * len(text) + [0.0]
    for begin in range(len(text) - 1, -1, -1):
        node, end = ROOT, begin
        single = children[ROOT].get(text[begin])
        if single is None or node_scores[single] is None:
            best[begin] = unknown_score + best[begin + 1]
        while end < len(text) and (child := children[node].get(text[end])) is not None:
            node, end = child, end + 1
            score = node_scores[node]
            if score is not None and (begin, end) != (0, len(text)):
                best[begin] = max(best[begin], score + best[end])
    return tuple(best)
