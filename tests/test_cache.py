"""A unit comes back exactly as it was written, or is refused: no flipped bit and no cut passes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from persea import cache
from persea.cache import Capture
from persea.chat import Conversation, Finish, Text, Thinking, Tokens
from persea.errors import DataError
from persea.rows import Rows
from persea.teacher import Answer


def captures(seed: int, count: int) -> list[Capture]:
    """Answers of several shapes: other scripts, thoughts, no text at all, rows without entries."""
    rng, out = np.random.default_rng(seed), []
    for k in range(count):
        length = int(rng.integers(2, 30))
        learn = rng.random(length) < 0.6
        learn[-1] = True
        sizes = rng.integers(0, 9, int(learn.sum()))
        rows = Rows(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), rng.integers(0, 262_145, sizes.sum()).astype(np.int32),
                    rng.random(sizes.sum()).astype(np.float32), rng.normal(size=len(sizes)).astype(np.float32))
        starts = np.sort(rng.integers(-1, 40, length)).astype(np.int32)
        tokens = Tokens(rng.integers(0, 262_145, length).astype(np.int32), starts, starts + 1, learn)
        said = [(Text("ありがとう \x00 \ue000"),), (Thinking("hm\n"), Text("42")), (Text(""),)][k % 3]
        asked = Conversation.ask(f"question {k}", system="be brief" if k % 2 else "")
        out.append(Capture(Answer(f"id/{k}", "teacher", "code", "th", asked.answered(*said), Finish.STOP), tokens, rows))
    return out


def assert_same(one: Capture, other: Capture) -> None:
    assert one.answer == other.answer
    for part, fields in ((lambda c: c.tokens, ("ids_T", "starts_T", "ends_T", "learn_T")),
                         (lambda c: c.rows, ("offsets_N1", "ids_M", "probs_M", "realised_N"))):
        for field in fields:
            a, b = getattr(part(one), field), getattr(part(other), field)
            assert np.array_equal(a, b), field
            assert a.dtype == b.dtype, field


@given(st.integers(0, 10**6), st.integers(0, 7))
@example(0, 0)
@example(0, 1)
def test_a_unit_comes_back_exactly(tmp_path_factory: pytest.TempPathFactory, seed: int, count: int) -> None:
    folder, written = tmp_path_factory.mktemp("cache"), captures(seed, count)
    assert not cache.is_committed(folder, "u")
    cache.write_unit(folder, "u", written, {"length": 2})
    assert cache.is_committed(folder, "u")
    read = cache.read_unit(folder, "u")
    assert len(read) == len(written)
    for one, other in zip(written, read, strict=True):
        assert_same(one, other)
    record = cache.read_record(folder, "u")
    assert (record["answers"], record["dropped"]) == (count, {"length": 2})
    assert record["tokens"] == sum(len(c.tokens) for c in written)
    assert record["positions"] == sum(int(c.tokens.learn_T.sum()) for c in written)
    assert record["entries"] == sum(len(c.rows.ids_M) for c in written)
    assert record["bytes"] == (folder / "units" / "u.safetensors").stat().st_size
    shutil.rmtree(folder)


def test_the_same_captures_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        cache.write_unit(tmp_path, name, captures(1, 5), {})
    assert (tmp_path / "units" / "a.safetensors").read_bytes() == (tmp_path / "units" / "b.safetensors").read_bytes()


def test_the_name_of_a_unit_changes_with_everything_that_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.unit_id(["a", 1], {"tau": 0.1}) == cache.unit_id(["a", 1], {"tau": 0.1})
    one = cache.unit_id(["a", 1], {"tau": 0.1})
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    names = {one, cache.unit_id(["a", 1], {"tau": 0.1})}
    monkeypatch.undo()
    names |= {cache.unit_id(["a", 2], {"tau": 0.1}), cache.unit_id(["a", 1], {"tau": 0.2}), cache.unit_id(["a"], 1, {"tau": 0.1})}
    assert len(names) == 5


# --- damage ---


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """A folder with one unit, "u"."""
    cache.write_unit(tmp_path, "u", captures(2, 4), {"length": 1, "malformed": 3})
    return tmp_path


def test_no_flipped_bit_passes(unit: Path) -> None:
    before, record = cache.read_unit(unit, "u"), cache.read_record(unit, "u")
    rng, refused, harmless = random.Random(0), 0, 0
    for k in range(400):
        path = unit / ("units/u.safetensors" if k % 2 else "commits/u.json")
        data = path.read_bytes()
        bit = rng.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            read, counts = cache.read_unit(unit, "u"), cache.read_record(unit, "u")
        except DataError as error:
            assert "u.safetensors" in str(error) or "u.json" in str(error)
            assert error.remedy
            refused += 1
        else:  # white space between JSON values
            assert not k % 2
            assert counts == record
            for one, other in zip(before, read, strict=True):
                assert_same(one, other)
            harmless += 1
        path.write_bytes(data)
    assert refused + harmless == 400
    assert refused >= 380


@pytest.mark.parametrize("kind", ["units/u.safetensors", "commits/u.json"])
def test_no_cut_passes(unit: Path, kind: str) -> None:
    data = (unit / kind).read_bytes()
    brief = len(data) - 1 if kind.endswith("safetensors") else len(data) - 2  # JSON ends with a newline, which nobody needs
    for size in sorted({*np.linspace(0, brief, 31).astype(int).tolist(), brief}):
        (unit / kind).write_bytes(data[:size])
        with pytest.raises(DataError, match=rf"{Path(kind).name}: .* -> delete"):
            cache.read_unit(unit, "u")
    (unit / kind).write_bytes(data)
    assert len(cache.read_unit(unit, "u")) == 4


def test_a_count_that_was_edited_is_refused(unit: Path) -> None:
    path = unit / "commits" / "u.json"
    record = json.loads(path.read_text())
    assert record["dropped"] == {"length": 1, "malformed": 3}
    path.write_text(json.dumps(record | {"dropped": {}}))
    with pytest.raises(DataError, match="seal"):
        cache.read_record(unit, "u")


@pytest.mark.parametrize("value", ["[]", "3", "null", '"text"', "[[1, 2]]", "{}"])
def test_a_record_that_is_no_record_is_refused(unit: Path, value: str) -> None:
    (unit / "commits" / "u.json").write_text(value)
    with pytest.raises(DataError, match=r"u\.json: cache format None, this persea reads 2 -> delete"):
        cache.read_unit(unit, "u")


def test_a_missing_file_is_named(unit: Path) -> None:
    (unit / "units" / "u.safetensors").unlink()
    with pytest.raises(DataError, match=r"units/u\.safetensors: committed, but No such file or directory -> delete .*commits/u\.json"):
        cache.read_unit(unit, "u")
    with pytest.raises(DataError, match=r"commits/other\.json: not there"):
        cache.read_unit(unit, "other")


def test_a_unit_without_a_commit_does_not_exist(unit: Path) -> None:
    (unit / "commits" / "u.json").unlink()
    assert (unit / "units" / "u.safetensors").is_file()
    assert not cache.is_committed(unit, "u")
    with pytest.raises(DataError, match="not there"):
        cache.read_unit(unit, "u")


def test_another_format_is_refused_by_its_number(unit: Path) -> None:
    path = unit / "commits" / "u.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(DataError, match="cache format 1, this persea reads 2") as caught:
        cache.read_unit(unit, "u")
    assert caught.value.exit_code == 3


def test_two_units_under_each_others_names_are_refused(unit: Path) -> None:
    cache.write_unit(unit, "v", captures(9, 4), {})
    u, v = unit / "units" / "u.safetensors", unit / "units" / "v.safetensors"
    one, other = u.read_bytes(), v.read_bytes()
    u.write_bytes(other)
    v.write_bytes(one)
    for name in ("u", "v"):
        with pytest.raises(DataError, match="do not match"):
            cache.read_unit(unit, name)
