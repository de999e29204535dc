"""Rows are sparse and unbiased; a unit comes back exactly as it was written, or is refused: no flipped bit and no cut passes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from persea import cache
from persea.cache import Capture, Rows
from persea.chat import Conversation, Finish, Text, Thinking, Tokens
from persea.errors import DataError
from persea.teacher import Answer

EPS = 1e-5


def logprobs(seed: int, rows: int, width: int, heat: float) -> torch.Tensor:
    """Distributions from flat (heat 0) to nearly certain (heat 20)."""
    return torch.log_softmax(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * heat, dim=-1)


def dense(rows: Rows, width: int) -> np.ndarray:
    out = np.zeros((len(rows), width))
    for n in range(len(rows)):
        span = slice(rows.offsets_N1[n], rows.offsets_N1[n + 1])
        np.add.at(out[n], rows.ids_M[span], rows.probs_M[span].astype(np.float64))
    return out


# --- rows ---

taus = st.sampled_from((0.001, 0.01, 0.05, 0.2, 0.5))


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 400), st.floats(0, 20), taus)
@example(0, 1, 1, 0.0, 0.5)
@example(0, 3, 2, 0.0, 0.5)  # exactly tau
@example(7, 2, 400, 0.0, 0.5)  # nothing reaches tau
def test_a_row_keeps_the_head_exactly_and_its_mass(seed: int, n: int, width: int, heat: float, tau: float) -> None:
    logs = logprobs(seed, n, width, heat)
    p, rows = logs.double().exp().numpy(), cache.sample_rows(logs, tau, str(seed))
    q = dense(rows, width)
    assert (rows.offsets_N1.dtype, rows.ids_M.dtype, rows.probs_M.dtype) == (np.int64, np.int32, np.float32)
    assert len(rows) == n
    assert rows.offsets_N1[-1] == len(rows.ids_M) == len(rows.probs_M)
    assert np.abs(q.sum(1) - p.sum(1)).max() <= tau + EPS
    assert np.array_equal(q[p >= tau], p[p >= tau].astype(np.float32))
    assert set(np.unique(q[p < tau]).tolist()) <= {0.0, float(np.float32(tau))}
    for k in range(n):  # ids rise, so no token stands twice in a row
        assert (np.diff(rows.ids_M[rows.offsets_N1[k]:rows.offsets_N1[k + 1]]) > 0).all()


@given(st.integers(0, 10**6), st.floats(0, 8), taus)
def test_a_draw_depends_on_its_seed_and_on_nothing_else(seed: int, heat: float, tau: float) -> None:
    logs = logprobs(seed, 8, 200, heat)
    one, again = (cache.sample_rows(logs, tau, str(seed)) for _ in range(2))
    for field in ("offsets_N1", "ids_M", "probs_M"):
        assert np.array_equal(getattr(one, field), getattr(again, field))


def test_another_seed_is_another_draw() -> None:
    flat = logprobs(0, 8, 200, 0.0)
    assert len({cache.sample_rows(flat, 0.05, name).ids_M.tobytes() for name in ("0 qwen a", "0 qwen b", "1 qwen a", "0 gemma a")}) == 4


@pytest.mark.parametrize(("heat", "tau"), [(0.0, 0.5), (1.0, 0.05), (3.0, 0.01), (8.0, 0.2)])
def test_the_mean_over_draws_is_the_distribution(heat: float, tau: float) -> None:
    draws = 20_000  # each row of one call is a draw of its own
    logs = logprobs(3, 1, 60, heat)
    p = logs.double().exp().numpy()[0]
    rows = cache.sample_rows(logs.expand(draws, -1), tau, "mean")
    mean = np.bincount(rows.ids_M, weights=rows.probs_M, minlength=60) / draws
    deviation = np.where(p < tau, np.sqrt(p * (tau - p).clip(0) / draws), 0)
    assert (np.abs(mean - p) <= 5 * deviation + EPS).all()
    assert np.abs(mean - p).max() > 0 or heat == 8.0  # it was sampled at all


def test_a_certain_row_costs_one_entry() -> None:
    logs = torch.full((3, 1000), -float("inf"))
    logs[range(3), [0, 7, 999]] = 0.0
    rows = cache.sample_rows(logs, 0.01, "certain")
    assert rows.ids_M.tolist() == [0, 7, 999]
    assert rows.probs_M.tolist() == [1.0, 1.0, 1.0]
    nearly = torch.full((500, 1000), float(np.log(1e-7 / 999)))
    nearly[:, 5] = np.log1p(-1e-7)
    assert len(cache.sample_rows(nearly, 0.01, "nearly").ids_M) == 500


# --- units ---


def captures(seed: int, count: int) -> list[Capture]:
    """Answers of several shapes: other scripts, thoughts, no text at all, rows without entries."""
    rng, out = np.random.default_rng(seed), []
    for k in range(count):
        length = int(rng.integers(2, 30))
        learn = rng.random(length) < 0.6
        learn[-1] = True
        sizes = rng.integers(0, 9, int(learn.sum()))
        rows = Rows(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), rng.integers(0, 262_145, sizes.sum()).astype(np.int32),
                    rng.random(sizes.sum()).astype(np.float32))
        starts = np.sort(rng.integers(-1, 40, length)).astype(np.int32)
        tokens = Tokens(rng.integers(0, 262_145, length).astype(np.int32), starts, starts + 1, learn)
        said = [(Text("ありがとう \x00 \ue000"),), (Thinking("hm\n"), Text("42")), (Text(""),)][k % 3]
        asked = Conversation.ask(f"question {k}", system="be brief" if k % 2 else "")
        out.append(Capture(Answer(f"id/{k}", "teacher", "code", "th", asked.answered(*said), Finish.STOP), tokens, rows))
    return out


def assert_same(one: Capture, other: Capture) -> None:
    assert one.answer == other.answer
    for part, fields in ((lambda c: c.tokens, ("ids_T", "starts_T", "ends_T", "learn_T")), (lambda c: c.rows, ("offsets_N1", "ids_M", "probs_M"))):
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
    with pytest.raises(DataError, match=r"u\.json: cache format None, this persea reads 1 -> delete"):
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
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(DataError, match="cache format 2, this persea reads 1") as caught:
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
