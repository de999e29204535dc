"""The lineage names every parent, the digests of the student and the software."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path

import pytest

import persea
from persea import storage as store
from persea.errors import DataError
from persea.evaluation.audition import Cast
from persea.report.lineage import ParentModel, lineage_record
from tests.cli.test_cli import TINY, flowed

BASE = ParentModel("base", "llama-sapling", "", "llama", "Llama Community License", "f0")
QWEN = ParentModel("qwen", "Qwen/Qwen3-8B", "main", "qwen", "Apache-2.0", "f1")


def test_a_record_names_the_origin_of_the_weights(tmp_path: Path) -> None:
    for name in ("model-00002-of-2.safetensors", "model-00001-of-2.safetensors", "config.json"):
        (tmp_path / name).write_text(name)
    cast = Cast(
        {"code": (("qwen", 0.5), ("gemma", 0.5)), "code/th": (("qwen", 1.0),)}, (), ("code",)
    )
    record = lineage_record(tmp_path, BASE, [QWEN], "hash", {"units": "digest"}, cast)
    assert json.loads(json.dumps(record)) == record
    assert record["student"]["sha256"] == {
        n: store.digest_bytes(n.encode())
        for n in ("model-00001-of-2.safetensors", "model-00002-of-2.safetensors")
    }
    assert record["teachers"] == [
        {
            "name": "qwen",
            "model": "Qwen/Qwen3-8B",
            "revision": "main",
            "family": "qwen",
            "licence": "Apache-2.0",
            "fingerprint": "f1",
        }
    ]
    assert record["base"]["name"] == "base"
    assert record["cast"] == {
        "parts": {"code": {"qwen": 0.5, "gemma": 0.5}, "code/th": {"qwen": 1.0}},
        "pinned": ["code"],
    }
    assert (record["recipe_hash"], record["data"]) == ("hash", {"units": "digest"})
    assert record["software"]["persea"] == persea.__version__
    assert record["software"]["python"] == platform.python_version()
    assert {"torch", "transformers", "tokenizers"} <= record["software"].keys()


@pytest.mark.parametrize("made", [False, True])
def test_a_record_without_a_student_is_refused(tmp_path: Path, made: bool) -> None:
    if made:
        (tmp_path / "student").mkdir()
    with pytest.raises(
        DataError, match="the folder holds no weights of a student -> run train first"
    ):
        lineage_record(tmp_path / "student", BASE, [], "hash", {}, Cast({}, ()))


def test_the_record_of_a_run_is_that_of_its_files() -> None:
    folder, ended = flowed()
    assert ended.code == 0, ended.err
    record = json.loads((folder / "run" / "lineage" / "lineage.json").read_text())
    assert record["student"]["sha256"] == {
        "model.safetensors": store.digest_file(
            folder / "run" / "train" / "student" / "model.safetensors"
        )
    }
    assert [t["name"] for t in record["teachers"]] == [
        Path(t["model"]).name for t in TINY["teachers"]
    ]
    assert [t["family"] for t in record["teachers"]] == ["qwen", "gemma", "gpt-oss"]
    assert record["base"]["family"] == "llama"
    chosen = json.loads((folder / "run" / "audition" / "cast.json").read_text())
    assert record["cast"] == {
        "parts": {part: dict(shares) for part, shares in chosen["parts"].items()},
        "pinned": chosen["pinned"],
    }
    assert all(
        p["licence"] and len(p["fingerprint"]) == 64 for p in (record["base"], *record["teachers"])
    )
    assert len({p["fingerprint"] for p in (record["base"], *record["teachers"])}) == 4
    assert [t["model"] for t in record["teachers"]] == [
        Path(t["model"]).name for t in TINY["teachers"]
    ]
    verdict = record["licences"]
    assert (verdict["outcome"], verdict["student_name"], verdict["duties"]) == ("ok", "tiny", [])
    assert verdict["licences"] == {
        name: ["Apache-2.0"] for name in ("student", *(t["name"] for t in record["teachers"]))
    }
    notice = (folder / "run" / "lineage" / "NOTICE").read_text()
    assert notice.startswith("tiny\n") and "base: llama-sapling (Apache-2.0)" in notice
    student = folder / "run" / "train" / "student"
    assert (student / "NOTICE").read_text() == notice
    card = (folder / "run" / "report" / "README.md").read_text()
    assert (student / "README.md").read_text() == card and "## Licences" in card
    assert not re.search(
        r"\"/|\./", json.dumps(record)
    )  # it travels with the student: no path of this machine
