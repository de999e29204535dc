"""The scripts of examples/ run from top to bottom, and their losses fall."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_api import tiny_run

ROOT = Path(__file__).resolve().parent.parent


def run_example(name: str, *arguments: str, folder: Path = ROOT) -> str:
    """Run an example as a user does; return its stdout."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_one_file_runs_and_its_loss_falls() -> None:
    out = run_example("one_file.py", "51", "48")
    losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)", out)]
    assert len(losses) == 2 and losses[1] < 0.9 * losses[0]
    assert "events in common" in out and "languages:" in out


@pytest.mark.parametrize("name", ["transformers_trainer", "trl_sft_trainer"])
def test_trainers_of_other_libraries_train_on_a_captured_cache(name: str, tmp_path: Path) -> None:
    if name.startswith("trl"):
        pytest.importorskip("trl")
    out = run_example(f"{name}.py", str(tiny_run().folder), "20", folder=tmp_path)
    losses = [float(x) for x in re.findall(r"'loss': '?(\d+\.\d+)", out)]
    assert len(losses) == 2 and losses[1] < 0.9 * losses[0]
    assert (tmp_path / "runs" / name / "student" / "model.safetensors").is_file()


def test_each_example_is_in_the_readme() -> None:
    readme = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    scripts = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
    assert re.findall(r"\| \[(\w+\.py)\]", readme) == sorted(scripts)
