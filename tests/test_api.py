"""The public API: names resolve lazily, signatures are pinned, examples of docstrings run."""

from __future__ import annotations

import ast
import doctest
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import persea

CALLABLES = [name for name in persea.__all__ if name not in ("__version__", "errors", "losses")]
LOSSES = ("CrossEntropy", "EventDivergence", "EventKL", "SpanLikelihood")

# A change of a public signature is a decision: it goes here and into CHANGELOG.md.
SIGNATURES: dict[str, str] = {}


def public_objects() -> dict[str, Any]:
    """Every public callable by its dotted name below persea, the losses included."""
    found = {name: getattr(persea, name) for name in CALLABLES}
    return found | {f"losses.{name}": getattr(persea.losses, name) for name in LOSSES}


def in_new_process(code: str) -> str:
    """Stdout of a fresh interpreter, where nothing is imported yet."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_import_persea_loads_no_heavy_library() -> None:
    out = in_new_process(
        "import sys, time; begin = time.process_time(); import persea; dir(persea)\n"
        "seconds = time.process_time() - begin\n"
        "print(seconds, [m for m in ('torch', 'transformers', 'numpy', 'pydantic')"
        " if m in sys.modules])"
    )
    seconds, loaded = out.split(maxsplit=1)
    assert loaded.strip() == "[]"
    assert float(seconds) < 0.3


def test_dir_lists_the_public_names() -> None:
    assert dir(persea) == sorted(persea.__all__)
    assert persea.__version__.count(".") == 2


def test_every_public_name_resolves() -> None:
    for name in persea.__all__:
        assert getattr(persea, name) is not None, name


def test_submodules_are_reachable_without_an_import_of_their_own() -> None:
    out = in_new_process(
        "import persea; print(persea.errors.PerseaError.__name__, persea.losses.__name__)"
    )
    assert out.split() == ["PerseaError", "persea.losses"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = persea.distil  # type: ignore[attr-defined]


def test_type_checkers_see_what_the_lazy_table_gives() -> None:
    """The imports under TYPE_CHECKING name the same modules as the table of lazy names."""
    tree = ast.parse(Path(persea.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    lazy = persea._MODULE_OF | dict.fromkeys(persea._SUBMODULES, "persea")
    assert seen == lazy
    assert {*seen, "__version__"} == set(persea.__all__)


def test_the_package_is_typed_and_its_docstring_is_short() -> None:
    assert (Path(persea.__file__).parent / "py.typed").is_file()
    assert len((persea.__doc__ or "").strip().splitlines()) <= 25


@pytest.mark.parametrize("name", [*CALLABLES, *(f"losses.{name}" for name in LOSSES)])
def test_public_signatures_are_pinned(name: str) -> None:
    assert str(inspect.signature(public_objects()[name])) == SIGNATURES.get(name)


@pytest.mark.parametrize("name", [*CALLABLES, *(f"losses.{name}" for name in LOSSES)])
def test_public_docstrings_have_an_example_that_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each example runs in an empty folder, on the bundled saplings, in seconds."""
    target = public_objects()[name]
    doc = inspect.getdoc(target) or ""
    assert "Example" in doc and ">>>" in doc, f"persea.{name} shows no example"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERSEA_HOME", os.environ.get("PERSEA_HOME", str(tmp_path / "home")))
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    tests = [
        test
        for test in doctest.DocTestFinder(recurse=False).find(
            target, name, globs={"persea": persea}
        )
        if test.examples
    ]
    assert tests
    for test in tests:
        runner.run(test)
    assert runner.failures == 0
