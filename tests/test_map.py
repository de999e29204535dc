"""The map in persea/__init__.py is true: it names every module, in an order that the imports follow."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import persea

PACKAGE = Path(persea.__file__).parent
ROOT = PACKAGE.parent
MAP = re.findall(r"^    ([a-z_]+) {2,}\S", persea.__doc__ or "", re.MULTILINE)
ALONE = {"losses": {"errors", "rows", "masks", "bridge", "losses"}}  # beside torch
WHOLE_RECIPE = {"river", "run", "plan", "recipe"}


def modules() -> dict[str, Path]:
    """Every module by its name below persea."""
    return {str(p.relative_to(PACKAGE).with_suffix("")).replace("/", ".").removesuffix(".__init__"): p
            for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py" and "bundled" not in p.parts}


def imported(path: Path) -> set[str]:
    """Names below persea that a module imports anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "persea":
            below = (node.module or "").split(".")[1:]
            found |= {".".join(below)} if below else {alias.name for alias in node.names}
    return found - {"__version__", ""}


def test_the_map_names_every_module_and_no_other() -> None:
    assert MAP == list(dict.fromkeys(MAP))
    assert set(MAP) == {name.split(".")[0] for name in modules()}


def test_a_module_imports_only_what_stands_above_it() -> None:
    wrong = [f"{name} imports {other}" for name, path in modules().items() for other in imported(path)
             if name.split(".")[0] not in ("cli", other.split(".")[0]) and MAP.index(other.split(".")[0]) > MAP.index(name.split(".")[0])]
    assert not wrong


def test_losses_know_nothing_of_the_rest_and_train_knows_no_loss() -> None:
    for name, path in modules().items():
        top = name.split(".")[0]
        if top in ALONE:
            assert {o.split(".")[0] for o in imported(path)} <= ALONE[top], name
    assert not {"losses", "feed"} & {o.split(".")[0] for o in imported(modules()["train"])}


def test_only_the_composers_see_the_whole_recipe() -> None:
    for name, path in modules().items():
        if name.split(".")[0] not in {*WHOLE_RECIPE, "cli"}:
            assert "recipe" not in {o.split(".")[0] for o in imported(path)}, name


def test_names_and_sizes() -> None:
    for name, path in modules().items():
        assert not {"utils", "common", "base", "helpers", "manager"} & set(name.split(".")), name
        assert len(path.read_text().splitlines()) <= 350, f"{name} is too long to read"
        assert ast.get_docstring(ast.parse(path.read_text())), f"{name} does not say what it is"


def test_every_function_says_what_it_returns() -> None:
    bare = [f"{name}.{node.name}" for name, path in modules().items() for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is None]
    assert not bare


def test_every_module_has_its_test() -> None:
    tests = {p.stem.removeprefix("test_") for p in (ROOT / "tests").glob("test_*.py")}
    assert {name.split(".")[0] for name in modules()} - tests == set()


def test_nothing_of_a_workplace_is_in_the_project() -> None:
    """No absolute paths of somebody's machine in code, recipes or docs."""
    files = [p for kind in ("persea", "recipes", "saplings", "docs", "examples", "bench") for p in (ROOT / kind).rglob("*")
             if p.suffix in {".py", ".md", ".yaml", ".jinja", ".json", ".jsonl"}]
    files += [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", ".ci/run")]
    assert len(files) > 200
    assert not [str(p) for p in files if re.search(r"/(?:work|home|root|opt)/", p.read_text(errors="replace"))]
