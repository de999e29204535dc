"""How a byte-pair tokenizer builds its tokens, and which token can never follow another in a word.

Byte-pair encoding merges the pair of lowest rank until none is left. Two neighbouring tokens stay
apart exactly when no merge ever joins a piece at the right edge of the first with a piece at the
left edge of the second while both pieces exist. The pieces at an edge follow one another in the
token's own derivation, each from the merge that makes it until the merge that consumes it. So a
merge across the boundary is found by comparing ranks, without encoding anything. Where two ranks
are equal within one cascade the pair counts as possible: in doubt nothing is excluded. Equal ranks
are the same pair twice, which merges from the left: aa|a is possible, a|aa is not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from persea.tokenization.prefix_space import SPACE_MARK
from persea.tokenization.vocabulary import Vocabulary

NEVER_MERGED = np.iinfo(np.int64).max  # a complete token is merged no further


@dataclass(frozen=True, eq=False)
class BpeDerivations:
    """How one tokenizer builds its tokens. V = vocabulary, R = merges in order of rank.

    Attributes:
        left_V: int32, left part of the token's last merge; -1 = a single unit, or not made by
            merges.
        right_V: int32, right part of the last merge; -1 likewise.
        rank_V: int32, rank of the last merge; -1 likewise.
        max_rank_V: int64, highest rank in the token's derivation, the time at which the token
            exists; -1 for a single unit.
        derivable_V: bool, whether merges make the token. They do not make an added token, nor a
            token that only a whole word can be.
        pair_R2: int32, left and right part of each merge.
    """

    left_V: npt.NDArray[np.int32]
    right_V: npt.NDArray[np.int32]
    rank_V: npt.NDArray[np.int32]
    max_rank_V: npt.NDArray[np.int64]
    derivable_V: npt.NDArray[np.bool_]
    pair_R2: npt.NDArray[np.int32]

    @cached_property
    def _merges_by_left(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Merges grouped by their left part: (offsets, ranks)."""
        order = np.argsort(self.pair_R2[:, 0], kind="stable")
        return group_offsets(self.pair_R2[:, 0], len(self.left_V)), order

    @cached_property
    def _left_edges(
        self,
    ) -> tuple[
        npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]
    ]:
        """For each piece: tokens with it at their left edge, until when, and the ending rank."""
        token = np.flatnonzero(self.derivable_V)
        piece, until, rank = token, np.full(len(token), NEVER_MERGED), np.full(len(token), -1)
        columns = []
        while len(token):
            columns.append((piece, token, until, rank))
            deeper = self.left_V[piece] >= 0
            piece, token = piece[deeper], token[deeper]
            until, rank = self.max_rank_V[piece], self.rank_V[piece].astype(np.int64)
            piece = self.left_V[piece].astype(np.int64)
        pieces, tokens, untils, ranks = (np.concatenate(c) for c in zip(*columns, strict=True))
        order = np.argsort(pieces, kind="stable")
        return (
            group_offsets(pieces, len(self.left_V)),
            tokens[order].astype(np.int32),
            untils[order].astype(np.int64),
            ranks[order].astype(np.int64),
        )

    def _right_edge(self, token: int) -> Iterator[tuple[int, int]]:
        """Yield the pieces at a token's right edge, last first, and until when each exists."""
        until = NEVER_MERGED
        while token >= 0:
            yield token, until
            until, token = int(self.max_rank_V[token]), int(self.right_V[token])

    @cached_property
    def _pair_ranks(self) -> dict[int, int]:
        return index_pair_ranks(self.pair_R2, len(self.left_V))

    @cached_property
    def _as_lists(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Left part, right part, rank and time as lists, which are faster for a single pair."""
        return (
            self.left_V.tolist(),
            self.right_V.tolist(),
            self.rank_V.tolist(),
            self.max_rank_V.tolist(),
        )

    def state_of(self, token: int) -> int:
        """Return the state after a token: the token itself, whatever was before it."""
        return token

    def extend(self, state: int, token: int) -> int:
        """Return the state after one more token."""
        return token

    def last_token(self, state: int) -> int:
        """Return the last token of a state."""
        return state

    def is_impossible_pair(self, token: int, next_token: int) -> bool:
        """Return whether `next_token` is in `impossible_next_tokens(token)`.

        It takes a few microseconds, `impossible_next_tokens` half a millisecond.
        """
        if not (self.derivable_V[token] and self.derivable_V[next_token]):
            return True
        left, right, ranks, times = self._as_lists
        size, until = len(left), NEVER_MERGED
        while token >= 0:
            piece, right_until, right_rank = next_token, NEVER_MERGED, -1
            while piece >= 0:
                rank = self._pair_ranks.get(token * size + piece)
                if rank is not None:
                    time = max(rank, times[token], times[piece])
                    if time < until and (right_until > time or (right_rank == rank == time)):
                        return True
                right_until, right_rank = times[piece], ranks[piece]
                piece = left[piece]
            until, token = times[token], right[token]
        return False

    def impossible_next_tokens(self, token: int) -> npt.NDArray[np.int64]:
        """Return the sorted int64 ids of tokens that never follow `token` within one word.

        A merge across the two tokens comes before they are complete. A token that no merge makes
        (`ignore_merges`: it is a whole word or nothing) has no neighbours within a word.
        """
        if not self.derivable_V[token]:
            return np.arange(len(self.derivable_V))
        offsets, ranks_R = self._merges_by_left
        edge_offsets, edge_tokens, edge_untils, edge_ranks = self._left_edges
        # Marking in a mask takes a fraction of the time of collecting ids and sorting them.
        impossible_V = ~self.derivable_V
        for piece, until in self._right_edge(token):
            rank = ranks_R[offsets[piece] : offsets[piece + 1]]
            right = self.pair_R2[rank, 1]
            time = np.maximum(np.maximum(rank, self.max_rank_V[piece]), self.max_rank_V[right])
            first = time < until
            at, row = expand_groups(edge_offsets, right[first])
            rank, time = rank[first][row], time[first][row]
            # Equal ranks are the same pair: aa|a merges its left half first, a|aa the crossing one.
            crosses = (edge_untils[at] > time) | ((edge_ranks[at] == rank) & (time == rank))
            impossible_V[edge_tokens[at[crosses]]] = True
        return np.flatnonzero(impossible_V)


def derive_bpe(vocabulary: Vocabulary) -> BpeDerivations:
    """Compute every token's derivation by applying the merges to its units; about 10 µs a token."""
    spec = json.loads(vocabulary.backend.to_str())["model"]
    ids: dict[str, int] = spec["vocab"]
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in spec["merges"]]
    pair_R2 = np.array([(ids[a], ids[b]) for a, b in pairs], np.int32).reshape(-1, 2)
    merged_ids = [ids[a + b] for a, b in pairs]
    size = len(vocabulary)
    pair_ranks = index_pair_ranks(pair_R2, size)
    left, right, rank = (np.full(size, -1, np.int32) for _ in range(3))
    max_rank, derivable = np.full(size, -1, np.int64), np.zeros(size, bool)
    for token, i in ids.items():
        if vocabulary.bytes_W[i] is None:
            continue
        if _is_byte_token(token, vocabulary):
            # A character that has a token is never spelled in bytes.
            raw = vocabulary.bytes_W[i] or b""
            derivable[i] = raw >= b"\x80" or spell_character(raw.decode()) not in ids
            continue
        units = [ids.get(c, -1) for c in token]
        if len(units) == 1:
            derivable[i] = units[0] == i
            continue
        if -1 in units:  # one of its characters is no token, so no merge makes it
            continue
        path = _apply_merges(units, pair_ranks, merged_ids, size)
        if path is not None and merged_ids[path[-1]] == i:
            (left[i], right[i]), rank[i] = pair_R2[path[-1]], path[-1]
            max_rank[i], derivable[i] = max(path), True
    return BpeDerivations(left, right, rank, max_rank, derivable, pair_R2)


def spell_character(character: str) -> str:
    """Return how SentencePiece writes a character."""
    return SPACE_MARK if character == " " else character


def _is_byte_token(token: str, vocabulary: Vocabulary) -> bool:
    return not vocabulary.byte_level and len(token) == 6 and token.startswith("<0x")


def index_pair_ranks(pair_R2: npt.NDArray[np.int32], size: int) -> dict[int, int]:
    """Return (left part * size of the vocabulary + right part) -> first rank of the pair.

    Such keys are faster to build and smaller than tuples.
    """
    keys = pair_R2[:, 0].astype(np.int64) * size + pair_R2[:, 1]
    return dict(zip(keys[::-1].tolist(), range(len(keys) - 1, -1, -1), strict=True))


def _apply_merges(
    units: list[int], pair_ranks: dict[int, int], merged_ids: list[int], size: int
) -> list[int] | None:
    """Return the ranks of the merges in order; None if more than one piece remains."""
    path: list[int] = []
    none = len(merged_ids)
    ranks = [pair_ranks.get(a * size + b, none) for a, b in pairwise(units)]
    while ranks:
        rank = min(ranks)
        if rank == none:
            return None
        k = ranks.index(rank)
        path.append(rank)
        units[k : k + 2] = [merged_ids[rank]]
        del ranks[k]
        if k > 0:
            ranks[k - 1] = pair_ranks.get(units[k - 1] * size + units[k], none)
        if k < len(ranks):
            ranks[k] = pair_ranks.get(units[k] * size + units[k + 1], none)
    return path


def group_offsets(keys: npt.NDArray[np.integer], size: int) -> npt.NDArray[np.int64]:
    """Return int64 offsets of groups by key: entries of key k are [offsets[k], offsets[k + 1])."""
    return np.concatenate([[0], np.cumsum(np.bincount(keys, minlength=size))]).astype(np.int64)


def expand_groups(
    offsets: npt.NDArray[np.int64], keys: npt.NDArray[np.integer]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the indices of all entries of all keys in turn, and the position of each one's key."""
    sizes = offsets[keys + 1] - offsets[keys]
    row = np.repeat(np.arange(len(keys)), sizes)
    index = np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + offsets[keys][row]
    return index.astype(np.int64), row.astype(np.int64)
