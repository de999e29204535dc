"""The diff in docs/new_family.md applies to persea, and its test passes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "new_family.md"


def test_the_diff_on_the_page_is_a_complete_family(tmp_path: Path):
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    files = re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE)
    assert files == [
        "persea/chat/families/__init__.py",
        "persea/chat/families/maple.py",
        "tests/chat/families/test_maple.py",
    ]
    changed = [
        line for line in diff.split("diff --git")[1].splitlines() if re.match(r"[+-](?![+-])", line)
    ]
    assert (
        len([line for line in changed if line.startswith("+")]) == 2
    )  # its import, and the tuple with its name
    shutil.copytree(
        ROOT / "persea", tmp_path / "persea", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "tests" / "chat" / "families").mkdir(parents=True)
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / "new.diff").write_text(diff)
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    env |= {
        "PYTHONPATH": str(tmp_path),
        "GIT_CEILING_DIRECTORIES": str(tmp_path.parent),
        "OMP_NUM_THREADS": "1",
    }

    def do(*command: str) -> str:
        ended = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )
        assert ended.returncode == 0, (
            f"{' '.join(command)}\n{ended.stdout}{ended.stderr}\n(update the diff in {PAGE.name})"
        )
        return ended.stdout

    do("git", "apply", "--whitespace=error", "new.diff")
    assert "MAPLE" in (tmp_path / "persea" / "chat" / "families" / "__init__.py").read_text()
    out = do(
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "tests/chat/families/test_maple.py",
    )
    assert re.search(r"^31 passed", out, re.MULTILINE), out
    do(
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        "persea/chat/families/maple.py",
        "persea/chat/families/__init__.py",
        "tests/chat/families/test_maple.py",
    )
    assert not (ROOT / "persea" / "chat" / "families" / "maple.py").exists()
