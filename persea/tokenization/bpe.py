"""Merges: how one byte-pair tokenizer builds its tokens, and which token can never stand right
after another inside one word.

Byte-pair encoding merges the pair of lowest rank until none is left. Two neighbours a, u stay apart
exactly when no merge ever joins a piece at a's right rim with a piece at u's left rim while both
are there. The pieces at a rim follow one another in a's own derivation, each from the time it is
made until the time it is merged on; so a crossing merge is found by comparing times, without
encoding anything. Where two times are equal in one cascade the answer is "can stand": nothing is
deleted on doubt. Equal ranks are the same pair twice, which merges from the left: aa|a stands, a|aa
cannot.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from persea.tokenization.vocabulary import Vocabulary

NEVER_MERGED = np.iinfo(np.int64).max  # a whole token is never merged on


@dataclass(frozen=True, eq=False)
class BpeDerivations:
    """One tokenizer's derivations. V = its vocabulary, R = its merges in the order of their rank.

    left_V, right_V  int32, the two parts the last merge joined; -1 = a single unit, or not made by
    merges rank_V           int32, rank of that merge; -1 likewise
    time_V           int64, when the token is there: the highest rank of its derivation; -1 for a
    single unit made_V           bool, the merges do make it (a token that only a whole word can be,
    or an added token, they do not) pair_R2          int32, left and right part of each merge
    """

    left_V: npt.NDArray[np.int32]
    right_V: npt.NDArray[np.int32]
    rank_V: npt.NDArray[np.int32]
    max_rank_V: npt.NDArray[np.int64]
    derivable_V: npt.NDArray[np.bool_]
    pair_R2: npt.NDArray[np.int32]

    @cached_property
    def _merges_by_left(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Merges by their left part: (offsets, ranks)."""
        order = np.argsort(self.pair_R2[:, 0], kind="stable")
        return group_offsets(self.pair_R2[:, 0], len(self.left_V)), order

    @cached_property
    def _left_edges(
        self,
    ) -> tuple[
        npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]
    ]:
        """By piece y: the tokens whose left rim y is at some time, until when, and the rank of the
        merge that ends it."""
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
        """The pieces at a token's right rim, last first, each with the time at which it is merged
        on."""
        until = NEVER_MERGED
        while token >= 0:
            yield token, until
            until, token = int(self.max_rank_V[token]), int(self.right_V[token])

    @cached_property
    def _pair_ranks(self) -> dict[int, int]:
        return index_pair_ranks(self.pair_R2, len(self.left_V))

    @cached_property
    def _as_lists(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """left, right, rank, time as plain lists: one pair is asked faster that way than through
        arrays."""
        return (
            self.left_V.tolist(),
            self.right_V.tolist(),
            self.rank_V.tolist(),
            self.max_rank_V.tolist(),
        )

    def is_impossible_pair(self, token: int, next_token: int) -> bool:
        """Whether `after` is among cannot_follow(token): a few microseconds, where that one takes
        half a millisecond."""
        if not (self.derivable_V[token] and self.derivable_V[next_token]):
            return True
        left, right, ranks, times = self._as_lists
        size, until = len(left), NEVER_MERGED
        while token >= 0:
            piece, ends, ends_by = next_token, NEVER_MERGED, -1
            while piece >= 0:
                rank = self._pair_ranks.get(token * size + piece)
                if rank is not None:
                    time = max(rank, times[token], times[piece])
                    if time < until and (ends > time or (ends_by == rank == time)):
                        return True
                ends, ends_by = times[piece], ranks[piece]
                piece = left[piece]
            until, token = times[token], right[token]
        return False

    def impossible_next_tokens(self, token: int) -> npt.NDArray[np.int64]:
        """Tokens, sorted, that never stand right after `token` within one word: a merge across the
        two comes first.

        What no merge makes (ignore_merges: it is a whole word, or nothing) stands beside nothing
        within a word.
        """
        if not self.derivable_V[token]:
            return np.arange(len(self.derivable_V))
        offsets, ranks_R = self._merges_by_left
        rim_offsets, rim_tokens, rim_untils, rim_ranks = self._left_edges
        found_V = (
            ~self.derivable_V
        )  # marked and read off, not collected and sorted: numpy's unique was most of the time here
        for piece, until in self._right_edge(token):
            rank = ranks_R[offsets[piece] : offsets[piece + 1]]
            right = self.pair_R2[rank, 1]
            time = np.maximum(np.maximum(rank, self.max_rank_V[piece]), self.max_rank_V[right])
            first = time < until
            at, row = expand_groups(rim_offsets, right[first])
            rank, time = rank[first][row], time[first][row]
            # equal ranks are the same pair: aa|a merges its left half first, a|aa the crossing one
            across = (rim_untils[at] > time) | ((rim_ranks[at] == rank) & (time == rank))
            found_V[rim_tokens[at[across]]] = True
        return np.flatnonzero(found_V)


def derive_bpe(vocabulary: Vocabulary) -> BpeDerivations:
    """Every token's derivation, by running the merges on its own units. Some 10 µs a token."""
    spec = json.loads(vocabulary.backend.to_str())["model"]
    ids: dict[str, int] = spec["vocab"]
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in spec["merges"]]
    pair_R2 = np.array([(ids[a], ids[b]) for a, b in pairs], np.int32).reshape(-1, 2)
    made = [ids[a + b] for a, b in pairs]
    size = len(vocabulary)
    rank_of = index_pair_ranks(pair_R2, size)
    left, right, last = (np.full(size, -1, np.int32) for _ in range(3))
    time, reached = np.full(size, -1, np.int64), np.zeros(size, bool)
    for token, i in ids.items():
        if vocabulary.bytes_W[i] is None:
            continue
        units = [i] if _is_byte_token(token, vocabulary) else [ids.get(c, -1) for c in token]
        if len(units) == 1:
            reached[i] = units[0] == i
            continue
        if -1 in units:  # a character of it is no token: nothing joins that
            continue
        path = _apply_merges(units, rank_of, made, size)
        if path is not None and made[path[-1]] == i:
            (left[i], right[i]), last[i] = pair_R2[path[-1]], path[-1]
            time[i], reached[i] = max(path), True
    return BpeDerivations(left, right, last, time, reached, pair_R2)


def _is_byte_token(token: str, vocabulary: Vocabulary) -> bool:
    return not vocabulary.byte_level and len(token) == 6 and token.startswith("<0x")


def index_pair_ranks(pair_R2: npt.NDArray[np.int32], size: int) -> dict[int, int]:
    """Left part times the size of the vocabulary plus right part -> the pair's first rank: quicker
    to make, and smaller, than pairs as keys."""
    keys = pair_R2[:, 0].astype(np.int64) * size + pair_R2[:, 1]
    return dict(zip(keys[::-1].tolist(), range(len(keys) - 1, -1, -1), strict=True))


def _apply_merges(
    units: list[int], pair_ranks: dict[int, int], merged_ids: list[int], size: int
) -> list[int] | None:
    """The ranks that are merged, in order, until one piece is left; None where more than one
    stays."""
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
    return np.concatenate([[0], np.cumsum(np.bincount(keys, minlength=size))]).astype(np.int64)


def expand_groups(
    offsets: npt.NDArray[np.int64], keys: npt.NDArray[np.integer]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """All places of all keys, laid end to end, and which key each belongs to."""
    sizes = offsets[keys + 1] - offsets[keys]
    row = np.repeat(np.arange(len(keys)), sizes)
    at = np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + offsets[keys][row]
    return at.astype(np.int64), row.astype(np.int64)
