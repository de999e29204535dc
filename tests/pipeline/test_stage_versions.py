"""A digest of each stage's tiny output at its version: output that changes needs a new version.

After raising a version: python -m tests.pipeline.test_stage_versions
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from persea.pipeline.stage_keys import STAGE_NAMES, STAGE_VERSIONS
from persea.storage import digest_json
from tests.cli.test_cli import flowed

GOLDEN = Path(__file__).parents[1] / "golden" / "stage_versions.json"
FILES = {
    "check": ("check.json",),
    "audition": ("cast.json", "table.md"),
    "capture": ("summary.json",),
    "train": ("metrics.jsonl",),
    "evaluate": ("evaluation.json", "examples.jsonl"),
    "lineage": ("lineage.json",),
    "report": ("report.json",),
}
# clocks, paths, and digests of files that hold last digits of floating-point numbers
CHANGING = {"seconds", "left", "bytes", "hash", "recipe", "fingerprint", "identity", "sha256"}
CHANGING |= {
    "recipe_hash",
    "software",
    "units",
    "weights",
    "student",
    "persea",
    "positions_per_second",
    "tokens_per_second",
    "files",
    "stages",
    "persea_source",
    "seal",
}


def stable(value: Any, key: str = "") -> Any:
    """A value without clocks and paths, its numbers to two digits: the same on another CPU."""
    if isinstance(value, dict):
        return {k: stable(v, k) for k, v in value.items() if k not in CHANGING}
    if isinstance(value, list):
        return [stable(v, key) for v in value]
    if isinstance(value, float):
        return f"{value:.1e}"
    return value


def stage_digest(run: Path, stage: str) -> str:
    contents = []
    for name in FILES[stage]:
        text = (run / stage / name).read_text()
        if name.endswith(".jsonl"):
            contents.append([stable(json.loads(line)) for line in text.splitlines()])
        else:
            contents.append(stable(json.loads(text)) if name.endswith(".json") else text)
    return digest_json(contents)[:16]


def machine() -> str:
    """What decides a model's last digits, and with them answers and scores: torch and processor."""
    cpus = Path("/proc/cpuinfo")
    text = cpus.read_text().partition("\n\n")[0] if cpus.is_file() else ""
    about = dict(line.split("\t", 1) for line in text.splitlines() if "\t" in line)
    names = ("model name", "cpu family", "model", "stepping")
    cpu = " ".join(about.get(name, "").strip("\t: ") for name in names).strip()
    return f"torch {torch.__version__.partition('+')[0]}, {cpu or platform.machine()}"


def current() -> dict[str, Any]:
    folder, ended = flowed()
    assert ended.code == 0, ended.err
    digests = {
        stage: [STAGE_VERSIONS[stage], stage_digest(folder / "run", stage)] for stage in STAGE_NAMES
    }
    return {"machine": machine(), "stages": digests}


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_output_that_changes_has_a_new_version(stage: str) -> None:
    golden, now = json.loads(GOLDEN.read_text()), current()
    if golden["machine"] != now["machine"]:
        pytest.skip(f"the digests are of {golden['machine']}")
    version, digest = golden["stages"][stage]
    if version == STAGE_VERSIONS[stage]:
        assert now["stages"][stage][1] == digest, (
            f"the output of {stage} changed: raise the version of stage {stage} in "
            "persea/pipeline/stage_keys.py, then run python -m tests.pipeline.test_stage_versions"
        )
    else:
        pytest.fail(f"write the new digest of stage {stage}: see the head of this file")


def test_a_changed_digest_names_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = json.loads(GOLDEN.read_text())
    golden["stages"]["train"][1] = "another"
    golden["machine"] = machine()
    (tmp_path / "golden.json").write_text(json.dumps(golden))
    monkeypatch.setitem(globals(), "GOLDEN", tmp_path / "golden.json")
    with pytest.raises(AssertionError, match="raise the version of stage train"):
        test_output_that_changes_has_a_new_version("train")


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(current(), indent=1) + "\n")
    print(GOLDEN)
