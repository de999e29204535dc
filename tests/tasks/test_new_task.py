"""The diffs in docs/new_task.md apply to persea as it is, and the tests that they add pass."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "new_task.md"
NEW_TASKS = {  # new file -> (file with the tuple, files of tests, tests that pass)
    "persea/tasks/generated/spelling.py": (
        "persea/tasks/generated/__init__.py",
        ["tests/tasks/generated/test_spelling.py"],
        10,
    ),
    "persea/tasks/benchmarks/boolq.py": (
        "persea/tasks/benchmarks/__init__.py",
        ["tests/tasks/benchmarks/test_benchmarks.py", "tests/tasks/benchmarks/test_boolq.py"],
        9,
    ),
}


@pytest.mark.parametrize("new_file", NEW_TASKS)
def test_the_diff_on_the_page_is_a_whole_new_task(tmp_path: Path, new_file: str) -> None:
    registry, tests, num_passed = NEW_TASKS[new_file]
    diffs = re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(diffs) == len(NEW_TASKS)
    (diff,) = (d for d in diffs if f"+++ b/{new_file}\n" in d)
    assert re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE) == [registry, new_file, *tests]
    changed = re.findall(r"^[+-](?![+-])", diff.split("diff --git")[1], re.MULTILINE)
    assert changed == ["+", "+"]  # its import and its line in the tuple
    shutil.copytree(
        ROOT / "persea", tmp_path / "persea", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in (
        "pyproject.toml",
        "tests/__init__.py",
        "tests/conftest.py",
        "tests/data",
        "tests/tasks",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "new.diff").write_text(diff)
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    env |= {
        "PYTHONPATH": str(tmp_path),
        "GIT_CEILING_DIRECTORIES": str(tmp_path.parent),
        "OMP_NUM_THREADS": "1",
    }

    def run(*command: str) -> str:
        result = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, (
            f"{' '.join(command)}\n{result.stdout}{result.stderr}\n(update {PAGE.name})"
        )
        return result.stdout

    run("git", "apply", "--whitespace=error", "new.diff")
    pytest_command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    name = Path(new_file).stem
    out = run(*pytest_command, "-p", "no:xdist", "-k", name, *tests)
    assert re.search(rf"^{num_passed} passed", out, re.MULTILINE), out
    run(sys.executable, "-m", "ruff", "check", "--no-cache", new_file, registry, tests[-1])
    assert not (ROOT / new_file).exists()
