"""Read cached answers by number, in an order that seed and epoch alone determine.

A block of answers is decoded when one of them is read, and stays in memory for a while. An epoch
shuffles the blocks, then the answers within windows of blocks: a small cache is fully shuffled, and
each block of a large one is decoded once an epoch. The number of workers, the order in which they
finish and a restart change nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from persea.cache.maintenance import committed_units, find_cache_folder
from persea.cache.unit import CachedAnswer, open_unit, read_record
from persea.data.prompts import GOLDEN_RATIO_STEP
from persea.errors import DataError

SHUFFLE_WINDOW_BLOCKS = 64  # default of training.shuffle_window_blocks: some 260,000 tokens
DECODED_WINDOWS = 2  # windows of decoded blocks in memory, about 40 bytes a token: 20 MB
MAX_OPEN_UNITS = 128  # each holds a file descriptor, and 256 is the smallest limit in use


class AnswerSource(Protocol):
    """Cached answers by number, and an order of all numbers for each seed and epoch."""

    def __len__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __getitem__(self, number: int, /) -> CachedAnswer: ...
    def epoch_order(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """Return every number once, in an order that seed and epoch determine."""
        ...


class CacheReader(Sequence[CachedAnswer]):
    """The answers of some units, numbered in the order in which the units were named.

    The header of a unit is checked when it is opened, a block whenever it is decoded: DataError
    names the file and the remedy. Readers compare and hash by identity.

    Attributes:
        folder: The cache folder.
        unit_names: The units, in order.
        answer_offsets_B1: int64, number of the first answer of each block, and of all answers.
        block_locations_B: (unit index, block within the unit) of each block.
        window_blocks: Blocks that are shuffled together.
    """

    def __init__(
        self,
        folder: Path,
        unit_names: tuple[str, ...],
        answer_offsets_B1: npt.NDArray[np.int64],
        block_locations_B: tuple[tuple[int, int], ...],
        window_blocks: int,
    ) -> None:
        self.folder = folder
        self.unit_names = unit_names
        self.answer_offsets_B1 = answer_offsets_B1
        self.block_locations_B = block_locations_B
        self.window_blocks = window_blocks
        self._open_unit = lru_cache(MAX_OPEN_UNITS)(lambda k: open_unit(folder, unit_names[k]))
        self._read_block = lru_cache(DECODED_WINDOWS * window_blocks)(self._decode_block)

    def _decode_block(self, b: int) -> tuple[CachedAnswer, ...]:
        unit, block = self.block_locations_B[b]
        return self._open_unit(unit).read_block(block)

    def __len__(self) -> int:
        return int(self.answer_offsets_B1[-1])

    # one answer at a time: a slice would hide its cost
    def __getitem__(self, number: int) -> CachedAnswer:  # type: ignore[override]
        if not -len(self) <= number < len(self):
            raise IndexError(f"answer {number} of {len(self)}")
        b = bisect_right(self.answer_offsets_B1, number % len(self)) - 1
        return self._read_block(b)[number % len(self) - int(self.answer_offsets_B1[b])]

    def __iter__(self) -> Iterator[CachedAnswer]:
        for b in range(len(self.block_locations_B)):
            yield from self._read_block(b)

    def epoch_order(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """Return the number of every answer once, shuffled by seed and epoch."""
        rng = np.random.default_rng([seed, epoch])
        blocks = rng.permutation(len(self.block_locations_B))
        windows = [
            np.concatenate(
                [
                    np.arange(self.answer_offsets_B1[b], self.answer_offsets_B1[b + 1])
                    for b in blocks[begin : begin + self.window_blocks]
                ]
            )
            for begin in range(0, len(blocks), self.window_blocks)
        ]
        return np.concatenate([rng.permutation(w) for w in windows] or [np.empty(0, np.int64)])


def open_cache_reader(
    folder: Path, unit_names: Sequence[str], window_blocks: int = SHUFFLE_WINDOW_BLOCKS
) -> CacheReader:
    """Open the answers of committed units. Every unit is opened once, so that none is missing.

    Args:
        folder: The cache folder.
        unit_names: The units, in the order in which their answers are numbered.
        window_blocks: Blocks of about 4,096 tokens that are shuffled together in an epoch.

    Raises:
        DataError: A unit is missing or damaged.
    """
    sizes, locations = [], []
    for k, name in enumerate(unit_names):
        answers_B = open_unit(folder, name).index_B4[:, 0]
        sizes.append(answers_B)
        locations += [(k, block) for block in range(len(answers_B))]
    return CacheReader(
        folder,
        tuple(unit_names),
        np.concatenate([[0], np.cumsum(np.concatenate(sizes or [np.empty(0, np.int64)]))]),
        tuple(locations),
        window_blocks,
    )


def open_cache(folder: str | Path, teacher: str = "") -> CacheReader:
    """Open the answers that a run has captured.

    Args:
        folder: A run folder, or its capture/.
        teacher: Name of the only teacher whose answers to open; "" = all teachers.

    Returns:
        A sequence of `CachedAnswer`, ordered by the names of the units. Each has a teacher, a
        prompt id, the answer, its tokens and the teacher's distributions.

    Raises:
        DataError: The folder holds no cache, the teacher has no answers in it, or a unit is
            damaged.

    Example:
        >>> from pathlib import Path
        >>> import persea
        >>> cache = persea.open_cache("tests/golden/cache")
        >>> len(cache), cache[0].teacher, cache[0].prompt_id
        (5, 'teacher', '1 id/0')
        >>> len(cache[0].distributions) == int(cache[0].tokens.loss_mask_T.sum())
        True
    """
    cache_folder = find_cache_folder(Path(folder))
    names = [
        name
        for name in committed_units(cache_folder)
        if not teacher or read_record(cache_folder, name)["about"].get("teacher") == teacher
    ]
    if teacher and not names:
        raise DataError(
            f"no answers of {teacher!r}",
            where=str(cache_folder),
            remedy=f"persea cache info {folder} lists the teachers",
        )
    return open_cache_reader(cache_folder, names)


@dataclass(frozen=True, eq=False)
class AnswerSubset:
    """Some answers of a cache, in the order in which the whole cache is read.

    Attributes:
        parent: The cache.
        indices: int64, numbers of the answers in the cache, rising.
    """

    parent: AnswerSource
    indices: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> CachedAnswer:
        return self.parent[int(self.indices[number])]

    def epoch_order(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """Return the number of every answer of the subset once."""
        order = self.parent.epoch_order(seed, epoch)
        return np.searchsorted(self.indices, order[np.isin(order, self.indices)])


@dataclass(frozen=True, eq=False)
class CacheMixture:
    """An endless mixture of caches. Draw n depends on n, the shares and the seed alone.

    Every stretch of draws has the given shares, without chance. Each cache is read epoch after
    epoch.

    Attributes:
        readers: The caches.
        shares: Share of each cache in the draws, relative to the sum.
        seed: Seed of the order within each cache.
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
                f"{len(self.readers)} caches of {[len(r) for r in self.readers]} answers with "
                f"shares {self.shares}",
                where="mixture",
                remedy="give each cache at least one answer and one share above 0",
            )

    def draw(self, draw_index: int) -> CachedAnswer:
        """Return the answer of a draw."""
        k, number = self.locate_answer(draw_index)
        return self.readers[k][number]

    def locate_answer(self, draw_index: int) -> tuple[int, int]:
        """Return (cache, number of the answer in it) of a draw."""
        k, number = self.locate_draw(draw_index)
        epoch, number = divmod(number, len(self.readers[k]))
        return k, int(_cached_epoch_order(self.readers[k], self.seed, epoch)[number])

    def locate_draw(self, draw_index: int) -> tuple[int, int]:
        """Return (cache, number of earlier draws from the same cache) of a draw."""
        chunk, number = divmod(draw_index, DRAWS_PER_CHUNK)
        source_D, before_D = _draw_chunk(self.shares, chunk)
        k = int(source_D[number])
        return k, int(before_D[number]) + sum(_draw_counts(self.shares, c)[k] for c in range(chunk))


DRAWS_PER_CHUNK = 1 << 20  # draws that are counted at once: 60 ms and 5 MB


@lru_cache(maxsize=8)
def _draw_chunk(
    shares: tuple[float, ...], chunk: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Return the cache of each draw of a chunk, and the draws before it from the same cache."""
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
    """Return how many draws of a chunk are from each cache."""
    return tuple(np.bincount(_draw_chunk(shares, chunk)[0], minlength=len(shares)).tolist())


@lru_cache(maxsize=16)
def _cached_epoch_order(reader: AnswerSource, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return reader.epoch_order(seed, epoch)
