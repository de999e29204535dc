"""examples/one_file.py runs from top to bottom, and its loss falls."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

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
