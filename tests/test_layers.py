"""The packages import each other in one direction, and each module has its test in the mirrored
folder.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import persea

PACKAGE = Path(persea.__file__).parent
ROOT = PACKAGE.parent

# Who may import whom: a package imports packages of the lines above it, and itself.
LAYERS = (
    ("errors",),
    ("storage", "distributions", "tokenization", "licences"),
    ("chat", "executors"),
    ("config", "models", "data", "alignment"),
    ("teachers", "tasks", "losses"),
    ("serve", "evaluation"),
    ("cache", "report", "vocab_extension"),
    ("training", "export"),
    ("pipeline",),
    ("cli",),
)
RANK = {package: rank for rank, packages in enumerate(LAYERS) for package in packages}
MAX_LINES = 500
FORBIDDEN_NAMES = {"utils", "common", "base", "helpers", "manager"}


def modules() -> dict[str, Path]:
    """Every module of the package: dotted name below persea -> file."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "__init__.py" and "bundled" not in path.parts
    }


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below a node, without the bodies of `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from statements(other)
            continue
        yield child
        yield from statements(child)


def imports(path: Path, known: frozenset[str]) -> set[str]:
    """Modules of persea that a file imports when it runs, lazily or not."""
    found: set[str] = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "persea":
            below = ".".join((node.module or "").split(".")[1:])
            for alias in node.names:
                submodule = f"{below}.{alias.name}".strip(".")
                found.add(submodule if submodule in known else below)
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("persea.")
                for alias in node.names
                if alias.name.startswith("persea.")
            }
    return found - {"", "__version__"}


def graph() -> dict[str, set[str]]:
    """Module -> the modules of persea it imports."""
    known = frozenset(modules())
    return {name: imports(path, known) for name, path in modules().items()}


def test_packages_are_the_ones_of_the_layers() -> None:
    assert {name.split(".")[0] for name in modules()} == set(RANK)


def test_imports_point_from_later_packages_to_earlier_ones() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if (a := name.split(".")[0]) != (b := other.split(".")[0]) and RANK[a] <= RANK[b]
    ]
    assert not wrong


def test_an_import_against_the_order_is_found(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from persea.cli import app\n"
        "def f():\n    from persea.pipeline import stages\n    import persea.training.loop\n"
    )
    assert imports(file, frozenset({"pipeline.stages"})) == {"pipeline.stages", "training.loop"}


def test_no_cycle_of_imports() -> None:
    arrows = graph()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name in done:
            return
        for other in sorted(arrows.get(name, ())):
            if not name.startswith(
                f"{other}."
            ):  # a package's __init__ is loaded before its modules
                visit(other, (*path, name))
        done.add(name)

    for name in arrows:
        visit(name, ())
    assert len(done) > 100


def test_losses_import_nothing_above_alignment() -> None:
    allowed = {"errors", "distributions", "alignment", "tokenization", "losses"}
    assert not [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if name.split(".")[0] == "losses" and other.split(".")[0] not in allowed
    ]


def test_names_and_sizes() -> None:
    for name, path in modules().items():
        text = path.read_text(encoding="utf-8")
        assert not FORBIDDEN_NAMES & set(name.split(".")), name
        assert len(text.splitlines()) <= MAX_LINES, f"{name} has more than {MAX_LINES} lines"
        assert ast.get_docstring(ast.parse(text)), f"{name} has no docstring"


def mirror(path: Path) -> Path:
    """The test file that mirrors a module."""
    return ROOT / "tests" / path.relative_to(PACKAGE).with_name(f"test_{path.name}")


def test_each_module_is_imported_by_a_test_of_its_folder() -> None:
    """tests/ mirrors the packages: persea/a/b.py is imported by a file of tests/a/ (persea/a.py
    by one of tests/).
    """
    known, arrows = frozenset(modules()), graph()
    tested: dict[str, set[str]] = {}
    for path in (ROOT / "tests").rglob("*.py"):
        folder = ".".join(path.relative_to(ROOT / "tests").parts[:-1])
        tested.setdefault(folder, set()).update(imports(path, known))
    missing = []
    for package in RANK:
        seen = {
            m
            for folder, some in tested.items()
            if folder.split(".")[0] in (package, "")
            for m in some
        }
        reached: set[str] = set()
        while seen:  # a detail of a package is tested through the module that uses it
            reached |= seen
            seen = {
                m for name in seen for m in arrows.get(name, ()) if m.split(".")[0] == package
            } - reached
        missing += [
            name
            for name, path in modules().items()
            if name.split(".")[0] == package
            and name not in reached
            and not mirror(path).is_file()
            and path.stem[0] != "_"
        ]
    assert not missing


def test_nothing_of_a_workplace_is_in_the_project() -> None:
    """No absolute path of somebody's machine in code, recipes or docs."""
    kinds = ("persea", "recipes", "saplings", "docs", "examples", "bench")
    suffixes = {".py", ".md", ".yaml", ".jinja", ".json", ".jsonl"}
    files = [p for kind in kinds for p in (ROOT / kind).rglob("*") if p.suffix in suffixes]
    names = (
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Makefile",
        "pyproject.toml",
        ".ci/run",
    )
    files += [ROOT / name for name in names]
    assert len(files) > 200
    assert not [
        str(p)
        for p in files
        if re.search(r"/(?:work|home|root|opt)/", p.read_text(encoding="utf-8", errors="replace"))
    ]
