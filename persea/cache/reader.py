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

from persea.cache.unit import Capture, OpenUnit, open_unit
from persea.data.prompts import GOLDEN
from persea.errors import DataError

WINDOW = 64       # blocks shuffled together: some 260,000 tokens
KEPT = 2 * WINDOW  # decoded blocks in memory, about 40 bytes a token: 20 MB
UNITS = 128       # units open at once; each holds a file descriptor, and 256 is the least limit in use


class Ordered(Protocol):
    """Captures by number, and every number once in an order that seed and epoch decide."""

    def __len__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Capture: ...
    def order(self, seed: int, epoch: int) -> npt.NDArray[np.int64]: ...


@dataclass(frozen=True, eq=False)
class Reader(Sequence[Capture]):
    """Answers of some units, numbered in the order in which the units were named.

    Each unit's head is checked when it is opened, each block whenever it is decoded: DataError names the file and the remedy.
    """

    folder: Path
    names: tuple[str, ...]
    firsts_B1: npt.NDArray[np.int64]  # number of the first answer of each block, and of all answers
    places_B: tuple[tuple[int, int], ...]  # (unit, block within it) of each block
    _open: Callable[[int], OpenUnit] = field(init=False, repr=False)
    _decoded: Callable[[int], tuple[Capture, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_open", lru_cache(UNITS)(lambda unit: open_unit(self.folder, self.names[unit])))
        object.__setattr__(self, "_decoded", lru_cache(KEPT)(self._block))

    def _block(self, b: int) -> tuple[Capture, ...]:
        unit, block = self.places_B[b]
        return self._open(unit).block(block)

    def __len__(self) -> int:
        return int(self.firsts_B1[-1])

    def __getitem__(self, number: int) -> Capture:  # type: ignore[override]  # one answer at a time; a slice would hide what it costs
        if not -len(self) <= number < len(self):
            raise IndexError(f"answer {number} of {len(self)}")
        b = bisect_right(self.firsts_B1, number % len(self)) - 1
        return self._decoded(b)[number % len(self) - int(self.firsts_B1[b])]

    def __iter__(self) -> Iterator[Capture]:
        for b in range(len(self.places_B)):
            yield from self._decoded(b)

    def order(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """Every answer's number once, shuffled: the same for the same seed and epoch, whoever asks and when."""
        rng = np.random.default_rng([seed, epoch])
        blocks = rng.permutation(len(self.places_B))
        windows = [np.concatenate([np.arange(self.firsts_B1[b], self.firsts_B1[b + 1]) for b in blocks[begin:begin + WINDOW]])
                   for begin in range(0, len(blocks), WINDOW)]
        return np.concatenate([rng.permutation(w) for w in windows] or [np.empty(0, np.int64)])


def open_reader(folder: Path, names: Sequence[str]) -> Reader:
    """The answers of committed units. Opens every unit once, so that none is missing; DataError names the first that is."""
    sizes, places = [], []
    for unit, name in enumerate(names):
        answers_B = open_unit(folder, name).index_B4[:, 0]
        sizes.append(answers_B)
        places += [(unit, block) for block in range(len(answers_B))]
    return Reader(folder, tuple(names), np.concatenate([[0], np.cumsum(np.concatenate(sizes or [np.empty(0, np.int64)]))]), tuple(places))


@dataclass(frozen=True, eq=False)
class Chosen:
    """Some answers of a cache (`numbers`, rising), in the order in which the whole of it is read."""

    whole: Ordered
    numbers: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Capture:
        return self.whole[int(self.numbers[number])]

    def order(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """Every number of these once."""
        order = self.whole.order(seed, epoch)
        return np.searchsorted(self.numbers, order[np.isin(order, self.numbers)])


@dataclass(frozen=True, eq=False)
class Mixture:
    """Several caches drawn from by share, without end: draw(n) depends on n, the shares and the seed alone.

    Shares hold in every stretch of draws, without chance, as the cast's do; each cache is read epoch after epoch in its own order.
    """

    readers: tuple[Ordered, ...]
    shares: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        if len(self.readers) != len(self.shares) or not all(s > 0 for s in self.shares) or not all(len(r) for r in self.readers):
            raise DataError(f"{len(self.readers)} caches of {[len(r) for r in self.readers]} answers with shares {self.shares}", where="mixture",
                            remedy="give each cache that holds an answer one share above 0")

    def draw(self, number: int) -> Capture:
        """The number-th capture to learn from."""
        k, at = self.answer(number)
        return self.readers[k][at]

    def answer(self, number: int) -> tuple[int, int]:
        """The number-th draw: which cache, and the answer's number in it."""
        k, at = self.place(number)
        epoch, at = divmod(at, len(self.readers[k]))
        return k, int(_order(self.readers[k], self.seed, epoch)[at])

    def place(self, number: int) -> tuple[int, int]:
        """Which cache the number-th draw is from, and how many draws before it were from the same."""
        piece, at = divmod(number, PIECE)
        source_D, before_D = _drawn(self.shares, piece)
        k = int(source_D[at])
        return k, int(before_D[at]) + sum(_counts(self.shares, p)[k] for p in range(piece))


PIECE = 1 << 20  # draws counted at once: 60 ms, and 5 MB each


@lru_cache(maxsize=8)
def _drawn(shares: tuple[float, ...], piece: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Of each draw of a piece (D) its cache, and how many of the piece's draws before it were from the same."""
    ends = np.cumsum(shares) / np.sum(shares)
    turns = np.arange(piece * PIECE + 1, (piece + 1) * PIECE + 1) * GOLDEN % 1
    source_D = np.minimum(np.searchsorted(ends, turns, side="right"), len(shares) - 1).astype(np.uint8)
    before_D = np.empty(PIECE, np.int32)
    for k in range(len(shares)):
        before_D[source_D == k] = np.arange(np.count_nonzero(source_D == k))
    return source_D, before_D


@lru_cache(maxsize=4096)
def _counts(shares: tuple[float, ...], piece: int) -> tuple[int, ...]:
    return tuple(np.bincount(_drawn(shares, piece)[0], minlength=len(shares)).tolist())


@lru_cache(maxsize=16)
def _order(reader: Ordered, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return reader.order(seed, epoch)
