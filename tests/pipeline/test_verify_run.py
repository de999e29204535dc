"""A finished run verifies, and one changed byte in any of its files is found."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from persea.errors import DataError
from persea.pipeline.verify_run import verify_run
from persea.report.lineage import read_lineage
from tests.cli.test_cli import flowed, persea

NUM_CHANGES = 50
# Files that a live run writes; and folders of intermediate files, which have digests of their own.
LIVE = {"status.json", "lock", "ledger.jsonl"}
INTERMEDIATE = {"checkpoints", "examples"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the tiny run that a test may damage."""
    folder, ended = flowed()
    assert ended.code == 0, ended.err
    return Path(shutil.copytree(folder / "run", tmp_path / "run"))


def covered_files(run: Path) -> list[Path]:
    return [
        path
        for path in sorted(run.rglob("*"))
        if path.is_file()
        and path.stat().st_size
        and path.name not in LIVE
        and not INTERMEDIATE & set(path.parts)
    ]


def test_a_finished_run_verifies(run: Path) -> None:
    result = verify_run(run)
    assert result.problems == ()
    assert result.not_checked == ()
    assert result.num_checked > len(covered_files(run))
    record = read_lineage(run / "lineage" / "lineage.json")
    assert (run / "train" / "student" / "lineage.json").read_bytes() == (
        run / "lineage" / "lineage.json"
    ).read_bytes()
    assert set(record["stages"]) == {"check", "audition", "capture", "train", "evaluate"}
    assert record["shared_bases"] == dict.fromkeys(
        ("qwen-sapling", "gemma-sapling", "gpt-oss-sapling"), "not known"
    )
    assert record["data"]["captured"]["qwen-sapling"]["kept"] > 0
    assert {s["model_name"] for s in record["scores"]} == {"student"}


def test_every_single_changed_byte_is_found(run: Path) -> None:
    files, draw = covered_files(run), random.Random(0)
    assert len(files) > 30
    missed = []
    for k in range(NUM_CHANGES):
        path = files[k % len(files)]
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        if not verify_run(run).problems:
            missed.append(str(path))
        path.write_bytes(whole)
    assert not missed


def test_missing_and_foreign_files_are_found(run: Path) -> None:
    (run / "train" / "student" / "extra.json").write_text("{}")
    (run / "evaluate" / "sets.json").unlink()
    messages = {Path(p.where).name: p.message for p in verify_run(run).problems}
    assert messages == {"extra.json": "not in the record", "sets.json": "not there"}


def test_a_run_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="this run has no lineage record"):
        verify_run(tmp_path)


def test_the_verb_lists_what_differs_and_ends_with_code_3(run: Path, tmp_path: Path) -> None:
    ended = persea("lineage", "verify", "run", folder=tmp_path)
    assert ended.code == 0, ended.err
    assert "files checked, 0 problems" in ended.out
    weights = run / "train" / "student" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    ended = persea("lineage", "verify", "run", "--json", folder=tmp_path)
    assert ended.code == 3
    assert [p["where"] for p in json.loads(ended.out)["problems"]] == [
        "run/train/student/model.safetensors"
    ]
    assert "the run differs from its lineage record: changed since the record" in ended.err
    for verb in (("chat", "run"), ("serve", "run/train/student")):
        ended = persea(*verb, folder=tmp_path)
        assert ended.code == 3
        assert "is not the file that the training wrote" in ended.err
