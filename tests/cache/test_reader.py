"""Any answer by its number, in an order that nothing but seed and epoch decides; resumed anywhere,
mixed by share.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from persea.cache import reader
from persea.cache import unit as cache
from persea.cache.reader import AnswerSubset, CacheMixture, CacheReader, open_cache
from persea.cache.unit import CachedAnswer
from persea.errors import DataError
from tests.cache.test_unit import TAU, assert_same, captures

SIZES = (7, 0, 12, 5)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four units in blocks of a few answers; more blocks than are kept."""
    monkeypatch.setattr(cache, "MIN_BLOCK_TOKENS", 60)
    monkeypatch.setattr(reader, "MAX_OPEN_UNITS", 2)
    for k, size in enumerate(SIZES):
        cache.write_unit(tmp_path, f"u{k}", captures(k, size), {}, tau=TAU)
    return tmp_path


NAMES = [f"u{k}" for k in range(len(SIZES))]


def open_cache_reader(folder: Path, names: list[str]) -> CacheReader:
    """A reader that shuffles two blocks together, and keeps four decoded."""
    return reader.open_cache_reader(folder, names, window_blocks=2)


def written() -> list[CachedAnswer]:
    return [c for k, size in enumerate(SIZES) for c in captures(k, size)]


def test_any_answer_by_its_number(folder: Path) -> None:
    read = open_cache_reader(folder, NAMES)
    assert len(read) == sum(SIZES)
    assert len(read.block_locations_B) > 5
    for number in np.random.default_rng(0).permutation(len(read)).tolist() * 2:
        assert_same(written()[number], read[number])
    assert_same(written()[-1], read[-1])
    for one, other in zip(written(), read, strict=True):
        assert_same(one, other)
    for number in (len(read), -len(read) - 1):
        with pytest.raises(IndexError):
            read[number]


def test_the_order_of_units_is_the_one_asked_for(folder: Path) -> None:
    assert_same(open_cache_reader(folder, ["u2", "u0"])[12], captures(0, 7)[0])
    assert len(open_cache_reader(folder, [])) == 0
    assert len(open_cache_reader(folder, ["u1"]).epoch_order(0, 0)) == 0


def test_an_epoch_holds_every_answer_once_in_its_own_order(folder: Path) -> None:
    read = open_cache_reader(folder, NAMES)
    orders = [read.epoch_order(seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert sorted(order.tolist()) == list(range(len(read)))
    assert len({o.tobytes() for o in orders}) == 3
    assert np.array_equal(open_cache_reader(folder, NAMES).epoch_order(0, 1), orders[1])


def test_an_epoch_decodes_every_block_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, decoded = open_cache_reader(folder, NAMES), Counter[int]()
    block = cache.CacheUnit.read_block
    monkeypatch.setattr(
        cache.CacheUnit,
        "read_block",
        lambda self, k: (decoded.update([hash((self.path, k))]), block(self, k))[1],
    )
    for number in read.epoch_order(3, 0).tolist():
        read[number]
    assert len(decoded) == len(read.block_locations_B)
    assert set(decoded.values()) == {1}


def test_a_large_cache_is_well_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours on disk are not neighbours in the order."""
    monkeypatch.setattr(cache, "MIN_BLOCK_TOKENS", 1)
    cache.write_unit(tmp_path, "u", captures(0, 300), {}, tau=TAU)
    order = reader.open_cache_reader(tmp_path, ["u"]).epoch_order(0, 0).tolist()
    assert sum(abs(a - b) == 1 for a, b in pairwise(order)) < 10
    assert abs(np.corrcoef(order, range(300))[0, 1]) < 0.2


def test_a_damaged_or_missing_unit_is_named(folder: Path) -> None:
    read = open_cache_reader(folder, NAMES)
    path = folder / "units" / "u2.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(
        DataError, match=r"units/u2\.safetensors: the bytes of block . do not match"
    ):
        [read[number] for number in range(len(read))]
    path.unlink()
    with pytest.raises(DataError, match=r"units/u2\.safetensors: committed, but No such file"):
        open_cache_reader(folder, NAMES)


# --- several caches ---


def forget() -> None:
    """Drop what was counted with another chunk size."""
    reader._draw_chunk.cache_clear()
    reader._draw_counts.cache_clear()


def test_chosen_answers_come_in_the_order_of_the_whole(folder: Path) -> None:
    read = open_cache_reader(folder, NAMES)
    numbers = np.array([0, 3, 8, 9, 17, 23])
    some = AnswerSubset(read, numbers)
    assert len(some) == 6
    for k, number in enumerate(numbers.tolist()):
        assert_same(some[k], read[number])
    for epoch in range(3):
        assert numbers[some.epoch_order(5, epoch)].tolist() == [
            n for n in read.epoch_order(5, epoch).tolist() if n in numbers
        ]


def test_shares_hold_in_every_stretch_and_a_draw_depends_on_its_number_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "DRAWS_PER_CHUNK", 64)
    forget()
    readers = tuple(open_cache_reader(folder, [name]) for name in ("u0", "u2", "u3"))
    mixed = CacheMixture(readers, (0.5, 0.3, 0.2), seed=4)
    places = [mixed.locate_draw(n) for n in range(500)]
    for k, share in enumerate(mixed.shares):
        mine = [at for source, at in places if source == k]
        assert mine == list(range(len(mine)))
        for width in (10, 50, 100):
            counts = np.convolve([source == k for source, _ in places], np.ones(width), "valid")
            assert np.abs(counts - share * width).max() <= 2.5
    forget()
    said = [mixed.draw(n).answer for n in range(60)]
    again = CacheMixture(
        tuple(open_cache_reader(folder, [name]) for name in ("u0", "u2", "u3")),
        (0.5, 0.3, 0.2),
        seed=4,
    )
    assert [again.draw(n).answer for n in (59, 7, 30)] == [
        said[59],
        said[7],
        said[30],
    ]  # resumed from any step
    first = [a for n, a in enumerate(said) if places[n][0] == 0]
    assert Counter(a.prompt_id for a in first[:7]) == Counter(
        c.answer.prompt_id for c in captures(0, 7)
    )  # an epoch
    forget()


@pytest.mark.parametrize(
    ("names", "shares"),
    [(["u0"], (0.5, 0.5)), (["u0", "u1"], (0.5, 0.5)), (["u0", "u2"], (1.0, 0.0))],
)
def test_a_mixture_that_makes_no_sense_is_refused(
    folder: Path, names: list[str], shares: tuple[float, ...]
) -> None:
    with pytest.raises(DataError, match=r"mixture: \d caches of .* -> give each"):
        CacheMixture(tuple(open_cache_reader(folder, [n]) for n in names), shares, 0)


# --- the public function ---


def test_a_run_folder_or_its_capture_is_opened_by_teacher(tmp_path: Path) -> None:
    for name, teacher, seed in (("u1", "a", 1), ("u0", "b", 2)):
        cache.write_unit(
            tmp_path / "capture",
            name,
            captures(seed, 3),
            {},
            tau=TAU,
            unit_metadata={"teacher": teacher},
        )
    whole = open_cache(tmp_path)
    assert len(whole) == 6
    assert_same(whole[0], captures(2, 3)[0])  # units in order of name
    assert (whole[0].teacher, whole[0].prompt_id) == ("teacher", "2 id/0")
    only = open_cache(str(tmp_path / "capture"), teacher="a")
    assert [c.prompt_id for c in only] == [c.prompt_id for c in captures(1, 3)]
    assert sorted(only.epoch_order(0, 0).tolist()) == [0, 1, 2]
    with pytest.raises(DataError, match="no answers of 'c' -> persea cache info"):
        open_cache(tmp_path, teacher="c")
    with pytest.raises(DataError, match="no cache in this folder"):
        open_cache(tmp_path / "units")
