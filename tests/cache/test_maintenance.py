"""A folder of units as a whole: counted, verified to the last bit, and the same captures as
Parquet.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from persea import storage as store
from persea.cache import unit as cache
from persea.cache.maintenance import (
    committed_units,
    export_parquet,
    find_cache_folder,
    merge_caches,
    summarize_cache,
    verify_cache,
)
from persea.cache.unit import CachedAnswer
from persea.chat.messages import Conversation
from persea.distributions import DistributionKind, SparseDistributions
from persea.errors import DataError, RefusedError
from persea.tokenization.tokens import RenderedTokens
from tests.cache.test_unit import TAU, assert_same, captures
from tests.cli.test_cli import flowed_copy, persea


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished stage of three units, one of them of nobody's answers."""
    place = tmp_path / "run" / "capture"
    for k, count in enumerate((4, 0, 7)):
        cache.write_unit(
            place,
            f"unit{k}",
            captures(k, count),
            {"length": 1},
            tau=TAU,
            unit_metadata={"teacher": "ab"[k > 0]},
        )
    store.write_json(place / "summary.json", {"kept": 11})
    store.write_json_with_checksum(
        place / "done.json",
        {
            "key": "k",
            "seconds": 1.0,
            "outputs": {
                str(p.relative_to(place)): store.digest_file(p)
                for p in (*(place / "commits").iterdir(), place / "summary.json")
            },
        },
    )
    return place


def told(folder: Path) -> list[str]:
    return [f"{f.path.relative_to(folder)}: {f.message}" for f in verify_cache(folder)]


def test_a_run_folder_or_its_capture_folder_is_a_shelf_and_nothing_else(folder: Path) -> None:
    assert find_cache_folder(folder) == find_cache_folder(folder.parent) == folder
    with pytest.raises(DataError, match="no cache in this folder -> give the folder of a run"):
        find_cache_folder(folder.parent.parent)


def test_info_counts_what_was_committed(folder: Path) -> None:
    said = summarize_cache(folder)
    assert committed_units(folder) == ("unit0", "unit1", "unit2")
    assert (said["units"], said["answers"], said["distributions"]) == (
        3,
        11,
        [{"kind": "sampled", "tau": TAU}],
    )
    assert {k: v["answers"] for k, v in said["teachers"].items()} == {"a": 4, "b": 7}
    assert said["positions"] == sum(
        len(c.distributions) for k in range(3) for c in cache.read_unit(folder, f"unit{k}")
    )
    assert said["bytes_per_position"] == round(said["bytes"] / said["positions"], 2)


def test_info_says_how_far_each_kind_of_rows_goes(folder: Path) -> None:
    kinds: list[tuple[DistributionKind, dict[str, str]]] = [
        (DistributionKind.TEXT_ONLY, {}),
        (DistributionKind.TOPK, {"kl": "0.02"}),
        (DistributionKind.TOPK, {}),
    ]
    for k, (kind, about) in enumerate(kinds):
        cache.write_unit(folder, f"other{k}", [], {}, tau=0.0, kind=kind, unit_metadata=about)
    assert summarize_cache(folder)["distributions"] == [
        {"kind": "sampled", "tau": TAU},
        {"kind": "topk"},
        {"kind": "topk", "kl": 0.02},
        {"kind": "words"},
    ]


def test_a_sound_cache_has_no_findings(folder: Path) -> None:
    assert told(folder) == []


def test_every_flipped_bit_is_found(folder: Path) -> None:
    """Units, commit records, the summary and the stage's own record."""
    rng, files = random.Random(0), sorted(p for p in folder.rglob("*") if p.is_file())
    assert {p.suffix for p in files} == {".json", ".safetensors"}
    assert len(files) == 8
    for k in range(120):
        path = files[k % len(files)]
        data = path.read_bytes()
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        found = [f for f in verify_cache(folder) if not f.is_harmless]
        assert path in [f.path for f in found], (path, flipped)
        assert all(f.remedy for f in found)
        path.write_bytes(data)
    assert told(folder) == []


def test_what_is_missing_cut_double_or_never_committed_is_named(folder: Path) -> None:
    units, commits = folder / "units", folder / "commits"
    (units / "unit1.safetensors").unlink()
    assert told(folder) == ["units/unit1.safetensors: committed, but No such file or directory"]
    (commits / "unit1.json").unlink()
    assert told(folder) == ["commits/unit1.json: changed since the stage wrote it"]
    (folder / "done.json").unlink()
    assert told(folder) == []
    data = (units / "unit2.safetensors").read_bytes()
    (units / "unit2.safetensors").write_bytes(data[:-9])
    assert told(folder) == [
        f"units/unit2.safetensors: {len(data) - 9:,} bytes, where {len(data):,} were committed"
    ]
    (units / "unit2.safetensors").write_bytes(data)
    shutil.copy(units / "unit2.safetensors", units / "unit3.safetensors")
    (units / ".unit4.safetensors.7.tmp").write_bytes(b"half")
    assert told(folder) == [
        f"units/{name}: not committed: left by a killed run"
        for name in (".unit4.safetensors.7.tmp", "unit3.safetensors")
    ]
    assert all(f.is_harmless for f in verify_cache(folder))
    again = cache.read_unit(folder, "unit2")
    cache.write_unit(folder, "unit3", again[3:5], {}, tau=TAU)
    assert (
        "commits/unit3.json: it holds an answer of teacher 2 id/3 that unit unit2 holds too"
        in told(folder)
    )


def test_a_record_that_counts_otherwise_than_its_unit_is_found(folder: Path) -> None:
    path = folder / "commits" / "unit0.json"
    record = store.read_json_with_checksum(path, "")
    store.write_json_with_checksum(
        path, record | {"entries": record["entries"] + 1}
    )  # sealed, and wrong
    assert any(
        line.startswith("units/unit0.safetensors: ") and "entries, where" in line
        for line in told(folder)
    )


def test_parquet_holds_the_same(folder: Path, tmp_path: Path) -> None:
    assert export_parquet(folder, tmp_path / "out" / "all.parquet") == 11
    table = pq.read_table(tmp_path / "out" / "all.parquet", page_checksum_verification=True)
    rows = table.to_pylist()
    written = [(name, c) for name in committed_units(folder) for c in cache.read_unit(folder, name)]
    assert len(rows) == 11
    for row, (unit, capture) in zip(rows, written, strict=True):
        assert row["unit"] == unit
        assert (
            Conversation.from_json(json.loads(row["conversation"])) == capture.answer.conversation
        )
        offsets = np.concatenate([[0], np.cumsum(np.array(row["row_sizes"], np.int64))])
        ids_T, starts_T, ends_T, row_ids = (
            np.array(row[n], np.int32) for n in ("ids", "starts", "ends", "row_ids")
        )
        probs, realised = (np.array(row[n], np.float32) for n in ("row_probs", "realised"))
        rebuilt = CachedAnswer(
            capture.answer,
            RenderedTokens(ids_T, starts_T, ends_T, np.array(row["learn"], np.bool_)),
            SparseDistributions(offsets, row_ids, probs, realised),
        )
        assert_same(capture, rebuilt)


def test_an_export_of_a_damaged_cache_writes_nothing(folder: Path, tmp_path: Path) -> None:
    path = folder / "units" / "unit2.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"unit2\.safetensors"):
        export_parquet(folder, tmp_path / "out" / "all.parquet")
    assert list((tmp_path / "out").iterdir()) == []


# --- several as one ---


def test_caches_are_merged_unit_by_unit_and_again_changes_nothing(
    folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    cache.write_unit(
        other, "unit2", captures(2, 7), {"length": 1}, tau=TAU, unit_metadata={"teacher": "b"}
    )  # the same bytes
    cache.write_unit(other, "unit9", captures(9, 2), {}, tau=TAU, unit_metadata={"teacher": "b"})
    into = tmp_path / "all"
    assert merge_caches(into, [folder, other]) == 4
    assert committed_units(into) == ("unit0", "unit1", "unit2", "unit9")
    assert told(into) == []
    for name in committed_units(into):
        source = folder if name != "unit9" else other
        assert (into / "units" / f"{name}.safetensors").read_bytes() == (
            source / "units" / f"{name}.safetensors"
        ).read_bytes()
        assert cache.read_record(into, name) == cache.read_record(source, name)
    assert merge_caches(into, [other, folder]) == 0


def test_what_does_not_fit_together_is_not_merged(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    cache.write_unit(other, "unit2", captures(5, 1), {}, tau=TAU, unit_metadata={"teacher": "b"})
    with pytest.raises(
        DataError, match=r"unit2\.safetensors: unit unit2 has other bytes in .*other"
    ):
        merge_caches(folder, [other])
    cache.write_unit(
        other,
        "unit8",
        captures(8, 1),
        {},
        tau=TAU,
        unit_metadata={"teacher": "a", "identity": "other weights"},
    )
    with pytest.raises(
        RefusedError, match=r"a is another model in .*capture -> do not merge the two caches"
    ):
        merge_caches(folder, [other])
    third = tmp_path / "third"
    cache.write_unit(third, "unit7", captures(7, 1), {}, tau=TAU)
    path = third / "units" / "unit7.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match=r"third/units/unit7\.safetensors"):
        merge_caches(tmp_path / "new", [third])
    assert committed_units(tmp_path / "new") == ()


# --- the verbs ---


def test_the_verbs_on_a_captured_run(tmp_path: Path) -> None:
    flowed_copy(tmp_path, "capture")
    said = json.loads(persea("cache", "info", "run", "--json", folder=tmp_path).out)
    assert said["units"] == len(list((tmp_path / "run/capture/units").iterdir())) > 1
    assert said["bytes"] == sum(
        p.stat().st_size for p in (tmp_path / "run/capture/units").iterdir()
    )
    plain = persea("cache", "info", "run", folder=tmp_path)
    assert plain.code == 0
    assert f"{said['positions']:,}" in plain.out
    sound = persea("cache", "verify", "run", folder=tmp_path)
    assert (sound.code, sound.out) == (0, f"{said['units']} units, 0 problems\n")
    exported = persea("cache", "export", "run/capture", "all.parquet", folder=tmp_path)
    assert exported.out == f"all.parquet: {said['answers']} answers\n"
    assert (
        persea("cache", "merge", "all", "run", folder=tmp_path).out
        == f"all: {said['units']} new units\n"
    )
    lost = next((tmp_path / "run/capture/units").iterdir())
    data = bytearray(lost.read_bytes())
    data[len(data) // 2] ^= 16
    lost.write_bytes(data)
    ended = persea("cache", "verify", "run", folder=tmp_path)
    assert ended.code == 3
    assert f"{lost.relative_to(tmp_path)}: " in ended.out
    assert f"persea: run/capture: 1 of {said['units']} units or records are damaged" in ended.err
    assert (
        json.loads(persea("cache", "verify", "run", "--json", folder=tmp_path).out)[0][
            "is_harmless"
        ]
        is False
    )
    assert persea("cache", "info", ".", folder=tmp_path).code == 3
