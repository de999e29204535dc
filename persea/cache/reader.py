"""Reader: captures by number, from memory-mapped units, in an order that a seed and an epoch decide and nothing else.

A block of answers is decoded when one of them is wanted and kept for a while. An epoch shuffles the blocks, and then the answers
within windows of so many blocks as are kept: a small cache is simply shuffled, a large one is read once an epoch and not once an
answer, and no worker, no order of completion and no restart changes what comes when.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from persea.cache.unit import CachedAnswer, CacheUnit, open_unit
from persea.data.prompts import GOLDEN_RATIO_STEP
from persea.errors import DataError

SHUFFLE_WINDOW_BLOCKS = 64  # blocks shuffled together: some 260,000 tokens
MAX_DECODED_BLOCKS = (
    2 * SHUFFLE_WINDOW_BLOCKS
)  # decoded blocks in memory, about 40 bytes a token: 20 MB
MAX_OPEN_UNITS = (
    128  # units open at once; each holds a file descriptor, and 256 is the least limit in use
)


class AnswerSource(Protocol):
    """Captures by number, and every number once in an order that seed and epoch decide."""

    def __len__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __getitem__(self, number: int, /) -> CachedAnswer: ...
    def epoch_order(self, seed: int, epoch: int) -> npt.NDArray[np.int64]: ...


@dataclass(frozen=True, eq=False)
class CacheReader(Sequence[CachedAnswer]):
    """Answers of some units, numbered in the order in which the units were named.

    Each unit's head is checked when it is opened, each block whenever it is decoded: DataError names the file and the remedy.
    """

    folder: Path
    unit_names: tuple[str, ...]
    answer_offsets_B1: npt.NDArray[
        np.int64
    ]  # number of the first answer of each block, and of all answers
    block_locations_B: tuple[tuple[int, int], ...]  # (unit, block within it) of each block
    _open: Callable[[int], CacheUnit] = field(init=False, repr=False)
    _decoded: Callable[[int], tuple[CachedAnswer, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(
            self,
            "_open",
            lru_cache(MAX_OPEN_UNITS)(lambda unit: open_unit(self.folder, self.unit_names[unit])),
        )
        object.__setattr__(self, "_decoded", lru_cache(MAX_DECODED_BLOCKS)(self._decode_block))

    def _decode_block(self, b: int) -> tuple[CachedAnswer, ...]:
        unit, block = self.block_locations_B[b]
        return self._open(unit).read_block(block)

    def __len__(self) -> int:
        return int(self.answer_offsets_B1[-1])

    def __getitem__(self, number: int) -> CachedAnswer:  # type: ignore[override]  # one answer at a time; a slice would hide what it costs
        if not -len(self) <= number < len(self):
            raise IndexError(f"answer {number} of {len(self)}")
        b = bisect_right(self.answer_offsets_B1, number % len(self)) - 1
        return self._decoded(b)[number % len(self) - int(self.answer_offsets_B1[b])]

    def __iter__(self) -> Iterator[CachedAnswer]:
        for b in range(len(self.block_locations_B)):
            yield from self._decoded(b)

    def epoch_order(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """Every answer's number once, shuffled: the same for the same seed and epoch, whoever asks and when."""
        rng = np.random.default_rng([seed, epoch])
        blocks = rng.permutation(len(self.block_locations_B))
        windows = [
            np.concatenate(
                [
                    np.arange(self.answer_offsets_B1[b], self.answer_offsets_B1[b + 1])
                    for b in blocks[begin : begin + SHUFFLE_WINDOW_BLOCKS]
                ]
            )
            for begin in range(0, len(blocks), SHUFFLE_WINDOW_BLOCKS)
        ]
        return np.concatenate([rng.permutation(w) for w in windows] or [np.empty(0, np.int64)])


def open_cache_reader(folder: Path, unit_names: Sequence[str]) -> CacheReader:
    """The answers of committed units. Opens every unit once, so that none is missing; DataError names the first that is."""
    sizes, places = [], []
    for unit, name in enumerate(unit_names):
        answers_B = open_unit(folder, name).index_B4[:, 0]
        sizes.append(answers_B)
        places += [(unit, block) for block in range(len(answers_B))]
    return CacheReader(
        folder,
        tuple(unit_names),
        np.concatenate([[0], np.cumsum(np.concatenate(sizes or [np.empty(0, np.int64)]))]),
        tuple(places),
    )


@dataclass(frozen=True, eq=False)
class AnswerSubset:
    """Some answers of a cache (`numbers`, rising), in the order in which the whole of it is read."""

    parent: AnswerSource
    indices: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> CachedAnswer:
        return self.parent[int(self.indices[number])]

    def epoch_order(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """Every number of these once."""
        order = self.parent.epoch_order(seed, epoch)
        return np.searchsorted(self.indices, order[np.isin(order, self.indices)])


@dataclass(frozen=True, eq=False)
class CacheMixture:
    """Several caches drawn from by share, without end: draw(n) depends on n, the shares and the seed alone.

    Shares hold in every stretch of draws, without chance, as the cast's do; each cache is read epoch after epoch in its own order.
    """

    readers: tuple[AnswerSource, ...]
    shares: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        if (
            len(self.readers) != len(self.shares)
            or not all(s > 0 for s in self.shares)
            or not all(len(r) for r in self.readers)
        ):
            raise DataError(
                f"{len(self.readers)} caches of {[len(r) for r in self.readers]} answers with shares {self.shares}",
                where="mixture",
                remedy="give each cache that holds an answer one share above 0",
            )

    def draw(self, draw_index: int) -> CachedAnswer:
        """The number-th capture to learn from."""
        k, at = self.locate_answer(draw_index)
        return self.readers[k][at]

    def locate_answer(self, draw_index: int) -> tuple[int, int]:
        """The number-th draw: which cache, and the answer's number in it."""
        k, at = self.locate_draw(draw_index)
        epoch, at = divmod(at, len(self.readers[k]))
        return k, int(_cached_epoch_order(self.readers[k], self.seed, epoch)[at])

    def locate_draw(self, draw_index: int) -> tuple[int, int]:
        """Which cache the number-th draw is from, and how many draws before it were from the same."""
        piece, at = divmod(draw_index, DRAWS_PER_CHUNK)
        source_D, before_D = _draw_chunk(self.shares, piece)
        k = int(source_D[at])
        return k, int(before_D[at]) + sum(_draw_counts(self.shares, p)[k] for p in range(piece))


DRAWS_PER_CHUNK = 1 << 20  # draws counted at once: 60 ms, and 5 MB each


@lru_cache(maxsize=8)
def _draw_chunk(
    shares: tuple[float, ...], chunk: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Of each draw of a piece (D) its cache, and how many of the piece's draws before it were from the same."""
    ends = np.cumsum(shares) / np.sum(shares)
    turns = (
        np.arange(chunk * DRAWS_PER_CHUNK + 1, (chunk + 1) * DRAWS_PER_CHUNK + 1)
        * GOLDEN_RATIO_STEP
        % 1
    )
    source_D = np.minimum(np.searchsorted(ends, turns, side="right"), len(shares) - 1).astype(
        np.uint8
    )
    before_D = np.empty(DRAWS_PER_CHUNK, np.int32)
    for k in range(len(shares)):
        before_D[source_D == k] = np.arange(np.count_nonzero(source_D == k))
    return source_D, before_D


@lru_cache(maxsize=4096)
def _draw_counts(shares: tuple[float, ...], chunk: int) -> tuple[int, ...]:
    return tuple(np.bincount(_draw_chunk(shares, chunk)[0], minlength=len(shares)).tolist())


@lru_cache(maxsize=16)
def _cached_epoch_order(reader: AnswerSource, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return reader.epoch_order(seed, epoch)
