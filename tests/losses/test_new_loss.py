"""The diff of docs/new_loss.md applies to persea as it is, and the test it adds passes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "new_loss.md"


def test_the_diff_on_the_page_is_a_whole_new_loss(tmp_path: Path) -> None:
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    files = re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE)
    assert files == [
        "persea/losses/__init__.py",
        "persea/losses/top_event.py",
        "tests/losses/test_top_event.py",
    ]
    changed = [
        line for line in diff.split("diff --git")[1].splitlines() if re.match(r"[+-](?![+-])", line)
    ]
    # its import, and its name in the tuple
    assert len([line for line in changed if line.startswith("+")]) == len(changed) == 2
    shutil.copytree(
        ROOT / "persea", tmp_path / "persea", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "tests" / "losses").mkdir(parents=True)
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / "new.diff").write_text(diff)
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    env |= {
        "PYTHONPATH": str(tmp_path),
        "GIT_CEILING_DIRECTORIES": str(tmp_path.parent),
        "OMP_NUM_THREADS": "1",
    }

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, (
            f"{' '.join(command)}\n{done.stdout}{done.stderr}\n(update the diff in {PAGE.name})"
        )
        return done.stdout

    run("git", "apply", "--whitespace=error", "new.diff")
    test = ("-p", "no:cacheprovider", "-p", "no:xdist", "tests/losses/test_top_event.py")
    out = run(sys.executable, "-m", "pytest", "-q", *test)
    assert re.search(r"^3 passed", out, re.MULTILINE), out
    changed_files = [str(tmp_path / name) for name in files]
    run(sys.executable, "-m", "ruff", "check", "--no-cache", *changed_files)
    run(sys.executable, "-m", "ruff", "format", "--check", "--no-cache", *changed_files)
    assert not (ROOT / "persea" / "losses" / "top_event.py").exists()
