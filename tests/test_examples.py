"""The examples run from top to bottom, and their losses fall."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_one_file_runs_and_its_loss_falls() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "one_file.py"), "51"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert len(losses) == 2 and losses[1] < 0.9 * losses[0]
    assert "events in common" in done.stdout and "languages:" in done.stdout


@pytest.mark.parametrize("name", ["transformers_trainer", "trl_sft_trainer"])
def test_a_foreign_trainer_learns_with_perseas_dataset_and_loss(name: str) -> None:
    if name.startswith("trl"):
        pytest.importorskip("trl")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), "20"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"^loss (\d+\.\d+) -> (\d+\.\d+)$", done.stdout, re.MULTILINE)
    assert found and float(found[2]) < 0.8 * float(found[1]), done.stdout
