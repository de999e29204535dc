"""docs/new_engine.md is true: its diff applies to persea, and the test in it passes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from persea.teachers.engines import ENGINES

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "new_engine.md"


def test_every_engine_of_the_list_has_its_module() -> None:
    folder = ROOT / "persea" / "teachers" / "engines"
    for spec in ENGINES:
        assert "def open_engine(" in (folder / f"{spec.module}.py").read_text()


def test_the_diff_on_the_page_is_a_whole_new_engine(tmp_path: Path) -> None:
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    files = re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE)
    assert files == [
        "persea/teachers/engines/__init__.py",
        "persea/teachers/engines/uniform.py",
        "tests/test_uniform.py",
    ]
    first = diff.split("diff --git")[1].splitlines()
    changed = [line for line in first if re.match(r"[+-](?![+-])", line)]
    assert changed == ['+    EngineSpec("uniform", "uniform"),']  # one line
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("persea", "saplings"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    (tmp_path / "tests").mkdir()
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
        ended = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )
        assert ended.returncode == 0, (
            f"{' '.join(command)}\n{ended.stdout}{ended.stderr}\n(update the diff in {PAGE.name})"
        )
        return ended.stdout

    run("git", "apply", "--whitespace=error", "new.diff")
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    assert re.search(r"^2 passed", run(*pytest, "tests/test_uniform.py"), re.MULTILINE)
    run(sys.executable, "-m", "ruff", "check", "--no-cache", *files)
    assert not (ROOT / files[1]).exists()
