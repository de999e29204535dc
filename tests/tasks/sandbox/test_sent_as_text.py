"""isolate.py and harness.py run as text without persea: they import the standard library only."""

from __future__ import annotations

import ast
import sys

import pytest

from persea.tasks.sandbox.run_tests import HARNESS_SCRIPT
from persea.tasks.sandbox.sandbox import ISOLATE_SCRIPT


@pytest.mark.parametrize("path", [HARNESS_SCRIPT, ISOLATE_SCRIPT], ids=lambda p: p.name)
def test_the_script_imports_the_standard_library_only(path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {a.name.partition(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).partition(".")[0])
    assert imported
    assert imported <= sys.stdlib_module_names
