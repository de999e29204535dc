"""A unit comes back exactly as it was written, or is refused: no flipped bit and no cut passes."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from persea.cache import unit as cache
from persea.cache.codec import CODEC_TOLERANCE_NATS
from persea.cache.unit import CachedAnswer
from persea.chat.messages import Conversation, FinishReason, Text, Thinking
from persea.distributions import sample_distributions
from persea.errors import DataError
from persea.teachers.teacher import Answer
from persea.tokenization.tokens import RenderedTokens

TAU = 0.05


def captures(seed: int, count: int) -> list[CachedAnswer]:
    """Answers of several shapes: other scripts, thoughts, no text at all, rows without entries."""
    rng, out = np.random.default_rng(seed), []
    for k in range(count):
        length = int(rng.integers(2, 30))
        learn = rng.random(length) < 0.6
        learn[-1] = True
        starts = np.sort(rng.integers(-1, 40, length)).astype(np.int32)
        tokens = RenderedTokens(
            rng.integers(0, 40, length).astype(np.int32), starts, starts + 1, learn
        )
        logs = torch.log_softmax(
            torch.from_numpy(rng.normal(size=(int(learn.sum()), 40)) * rng.uniform(0, 9)), -1
        ).float()
        rows = sample_distributions(logs, tokens.ids_T[learn], TAU, str(k))
        said = [(Text("ありがとう \x00 \ue000"),), (Thinking("hm\n"), Text("42")), (Text(""),)][
            k % 3
        ]
        asked = Conversation.from_question(f"question {k}", system="be brief" if k % 2 else "")
        out.append(
            CachedAnswer(
                Answer(
                    f"{seed} id/{k}",
                    "teacher",
                    "code",
                    "th",
                    asked.with_answer(*said),
                    FinishReason.STOP,
                ),
                tokens,
                rows,
            )
        )
    return out


def assert_same(one: CachedAnswer, other: CachedAnswer) -> None:
    assert one.answer == other.answer
    for part, fields in (
        (lambda c: c.tokens, ("ids_T", "starts_T", "ends_T", "loss_mask_T")),
        (lambda c: c.distributions, ("offsets_N1", "ids_M", "probs_M", "target_logprob_N")),
    ):
        for field in fields:
            a, b = getattr(part(one), field), getattr(part(other), field)
            if field in ("probs_M", "target_logprob_N"):
                a, b = (np.log(v) if field == "probs_M" else v for v in (a, b))
                assert np.allclose(a, b, rtol=0, atol=CODEC_TOLERANCE_NATS), field
                assert CODEC_TOLERANCE_NATS < 1e-3
            else:
                assert np.array_equal(a, b), field
            assert a.dtype == b.dtype, field


def test_blocks_are_read_alone_and_each_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MIN_BLOCK_TOKENS", 40)
    written = captures(3, 12)
    cache.write_unit(tmp_path, "u", written, {}, tau=TAU)
    unit = cache.open_unit(tmp_path, "u")
    firsts = unit.answer_offsets_B1.tolist()
    assert len(unit) == firsts[-1] == 12
    assert len(firsts) > 4
    for k in (2, 0, len(firsts) - 2):
        for one, other in zip(written[firsts[k] : firsts[k + 1]], unit.read_block(k), strict=True):
            assert_same(one, other)
    data = bytearray(unit.path.read_bytes())
    data[unit.slices["words"].start + int(unit.index_B4[0, 2]) + 1] ^= 1  # in the second block
    unit.path.write_bytes(data)
    damaged = cache.open_unit(tmp_path, "u")
    assert len(damaged.read_block(0)) == firsts[1]
    with pytest.raises(
        DataError,
        match=r"units/u\.safetensors: the bytes of block 1 do not match their digest -> delete",
    ):
        damaged.read_block(1)


@given(st.integers(0, 10**6), st.integers(0, 7))
@example(0, 0)
@example(0, 1)
def test_a_unit_comes_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int
) -> None:
    folder, written = tmp_path_factory.mktemp("cache"), captures(seed, count)
    assert not cache.is_committed(folder, "u")
    cache.write_unit(folder, "u", written, {"length": 2}, tau=TAU)
    assert cache.is_committed(folder, "u")
    read = cache.read_unit(folder, "u")
    assert len(read) == len(written)
    for one, other in zip(written, read, strict=True):
        assert_same(one, other)
    record = cache.read_record(folder, "u")
    assert (record["answers"], record["dropped"]) == (count, {"length": 2})
    assert record["tokens"] == sum(len(c.tokens) for c in written)
    assert record["positions"] == sum(int(c.tokens.loss_mask_T.sum()) for c in written)
    assert record["entries"] == sum(len(c.distributions.ids_M) for c in written)
    assert record["bytes"] == (folder / "units" / "u.safetensors").stat().st_size
    shutil.rmtree(folder)


def test_the_same_captures_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        cache.write_unit(tmp_path / name, "u", captures(1, 5), {}, tau=TAU)
    assert (tmp_path / "a/units/u.safetensors").read_bytes() == (
        tmp_path / "b/units/u.safetensors"
    ).read_bytes()


def test_the_name_of_a_unit_changes_with_everything_that_makes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert cache.unit_id(["a", 1], {"tau": 0.1}) == cache.unit_id(["a", 1], {"tau": 0.1})
    one = cache.unit_id(["a", 1], {"tau": 0.1})
    monkeypatch.setattr(cache, "CACHE_FORMAT", cache.CACHE_FORMAT + 1)
    names = {one, cache.unit_id(["a", 1], {"tau": 0.1})}
    monkeypatch.undo()
    names |= {
        cache.unit_id(["a", 2], {"tau": 0.1}),
        cache.unit_id(["a", 1], {"tau": 0.2}),
        cache.unit_id(["a"], 1, {"tau": 0.1}),
    }
    assert len(names) == 5


def test_a_unit_of_this_format_that_an_earlier_day_wrote_is_read_to_the_bit() -> None:
    """tests/golden/cache holds one, written by `cache.write_unit(folder, "u", captures(1, 5),
    {"length": 2}, tau=TAU)`; when FORMAT changes it must be refused by its number, and a new one
    takes its place.
    """
    sha = hashlib.sha256()
    for c in cache.read_unit(Path(__file__).parents[1] / "golden" / "cache", "u"):
        sha.update(json.dumps(c.answer.to_json()).encode())
        for array in (
            *vars(c.tokens).values(),
            c.distributions.offsets_N1,
            c.distributions.ids_M,
            c.distributions.probs_M,
            c.distributions.target_logprob_N,
        ):
            sha.update(array.tobytes())
    assert sha.hexdigest() == "1527af8f86d9b20faaf934627561ca7da81022e3d9504903e4cae8fc23534ede"


# --- damage ---


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """A folder with one unit, "u"."""
    cache.write_unit(tmp_path, "u", captures(2, 4), {"length": 1, "malformed": 3}, tau=TAU)
    return tmp_path


def test_no_flipped_bit_passes(unit: Path) -> None:
    rng = random.Random(0)
    for k in range(500):
        path = unit / ("units/u.safetensors" if k % 2 else "commits/u.json")
        data = path.read_bytes()
        bit = rng.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(DataError, match=r"u\.safetensors|u\.json") as caught:
            tuple(cache.open_unit(unit, "u"))
        assert caught.value.remedy
        path.write_bytes(data)
    assert len(cache.read_unit(unit, "u")) == 4


@pytest.mark.parametrize("kind", ["units/u.safetensors", "commits/u.json"])
def test_no_cut_passes(unit: Path, kind: str) -> None:
    data = (unit / kind).read_bytes()
    for size in np.linspace(0, len(data) - 1, 64).astype(int).tolist():
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
    with pytest.raises(DataError, match="does not match its own checksum"):
        cache.read_record(unit, "u")


@pytest.mark.parametrize("value", ["[]", "3", "null", '"text"', "[[1, 2]]", "{}"])
def test_a_record_that_is_no_record_is_refused(unit: Path, value: str) -> None:
    (unit / "commits" / "u.json").write_text(value)
    with pytest.raises(
        DataError, match=r"u\.json: cache format None, this persea reads 3 -> delete"
    ):
        cache.read_unit(unit, "u")


def test_a_missing_file_is_named(unit: Path) -> None:
    (unit / "units" / "u.safetensors").unlink()
    with pytest.raises(
        DataError,
        match=(
            r"units/u\.safetensors: committed, but No such file or directory -> delete "
            r".*commits/u\.json"
        ),
    ):
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
    with pytest.raises(DataError, match="cache format 1, this persea reads 3") as caught:
        cache.read_unit(unit, "u")
    assert caught.value.exit_code == 3


def test_two_units_under_each_others_names_are_refused(unit: Path) -> None:
    cache.write_unit(unit, "v", captures(9, 4), {}, tau=TAU)
    u, v = unit / "units" / "u.safetensors", unit / "units" / "v.safetensors"
    one, other = u.read_bytes(), v.read_bytes()
    u.write_bytes(other)
    v.write_bytes(one)
    for name in ("u", "v"):
        with pytest.raises(DataError, match=rf"units/{name}\.safetensors: "):
            cache.read_unit(unit, name)
    shutil.copy(unit / "commits" / "u.json", unit / "commits" / "w.json")
    with pytest.raises(DataError, match=r"w\.json: the record of unit u -> delete"):
        cache.read_unit(unit, "w")
