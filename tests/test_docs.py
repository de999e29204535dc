"""Everything that README, docs, recipes and Makefile name exists: pages, files, verbs, keys ..."""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
import yaml

import persea
from persea.cli import app
from persea.config.foreign_keys import FOREIGN_KEYS
from persea.config.recipe import recipe_json_schema
from persea.config.renamed_keys import RENAMED_KEYS
from tests.test_layers import LAYERS

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted(ROOT.glob("docs/**/*.md"))
GENERATED_ERRORS = ROOT / "docs" / "reference" / "errors.md"  # its text is the source's
PAGES = [
    *(
        ROOT / name
        for name in (
            "README.md",
            "CHANGELOG.md",
            "CONTRIBUTING.md",
            "Makefile",
            "mkdocs.yml",
            "saplings/README.md",
        )
    ),
    *(p for p in DOCS if p != GENERATED_ERRORS),
    *sorted(ROOT.glob("recipes/*.yaml")),
]
COMMANDS: Any = typer.main.get_command(app)
WRITTEN = {
    "bench/results/chaos-train.json",
    "bench/results/gpu.json",
}  # by a command that docs name; no run of it is kept
# persea's private words of before; docs/diary.md and CHANGELOG.md are logs and keep them.
PRIVATE_WORDS = re.compile(
    r"\b(voices?|bridges?|yardsticks?|tongues?|river|shelf|keepers?|astray|clothing"
    r"|hears?|heard|says of|is told|lays? .{1,40} over|what stands)\b"
)


@cache
def generator() -> ModuleType:
    """docs/generate_reference.py as a module."""
    path = ROOT / "docs" / "generate_reference.py"
    spec = importlib.util.spec_from_file_location("generate_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def invented_files(text: str) -> set[str]:
    """Files that a page's own patch adds: the examples of docs/new_*.md."""
    return set(re.findall(r"^\+\+\+ b/(\S+)$", text, re.MULTILINE)) | {
        path.replace("persea/chat/", "persea/")
        for path in re.findall(r"^\+\+\+ b/(\S+)$", text, re.MULTILINE)
    }


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def missing_links(text: str, beside: Path) -> list[str]:
    wrong = []
    for to, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
        if "://" in to or not to:
            continue
        target = beside / to
        if not target.exists():
            wrong.append(to)
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            wrong.append(f"{to}#{anchor}")
    return wrong


def missing_files(text: str) -> set[str]:
    named = set(
        re.findall(
            r"\b((?:docs|bench|tests|recipes|examples|saplings|persea)/[\w./-]+\.(?:py|md|jsonl?|yaml|svg))\b",
            text,
        )
    )
    return {name for name in named - invented_files(text) - WRITTEN if not (ROOT / name).is_file()}


def unknown_verbs(text: str) -> list[str]:
    """After `persea`, at the start of code or of a line of a block: a verb of the command line."""
    wrong = []
    for verb, below in re.findall(
        r"(?:`|^(?:#| {4}|\S+/) *|[A-Z]=\S+ )persea ([a-z]+)(?: ([a-z]+)\b)?", text, re.MULTILINE
    ):
        found = COMMANDS.commands.get(verb)
        if found is None or (below and hasattr(found, "commands") and below not in found.commands):
            wrong.append(f"{verb} {below}" if found is not None else verb)
    return wrong


def unknown_options(text: str) -> set[str]:
    known = {
        o
        for c in COMMANDS.commands.values()
        for one in (c, *getattr(c, "commands", {}).values())
        for p in one.params
        for o in p.opts
    }
    lines = re.findall(r"`persea [^`]*`", text)
    return (
        {option for line in lines for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", line)}
        - known
        - {"--help"}
    )


def unknown_targets(text: str) -> set[str]:
    return set(re.findall(r"`make ([a-z-]+)", text)) - set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    )


def keys(node: dict[str, Any], defs: dict[str, Any], before: str = "") -> set[str]:
    """Every key of the schema as a path, a list's items under the list's own name."""
    if "$ref" in node:
        node = defs[node["$ref"].split("/")[-1]]
    found: set[str] = set()
    for part in (
        *node.get("anyOf", ()),
        *node.get("allOf", ()),
        *([node["items"]] if "items" in node else ()),
    ):
        found |= keys(part, defs, before)
    for name, below in node.get("properties", {}).items():
        found |= {f"{before}{name}"} | keys(below, defs, f"{before}{name}.")
    return found


@cache
def known_keys() -> frozenset[str]:
    """Every key of a recipe; pydantic takes .2 s to make the schema."""
    described = recipe_json_schema()
    return frozenset(keys(described, described["$defs"]))


RENAMED = {
    f"{'.'.join(part for part in path if part != '*')}.{old}".lstrip(".")
    for path, names in (*RENAMED_KEYS.items(), *FOREIGN_KEYS.items())
    for old in names
}


def unknown_keys(text: str) -> set[str]:
    """Keys in code, such as `training.steps`; audition.pinned and check.texts have free keys."""
    known = known_keys()
    sections = "|".join(sorted(key for key in known if "." not in key))
    named = {
        key.replace("[]", "")
        for key in re.findall(rf"`((?:{sections})(?:\[\])?\.[a-z_.]+[a-z])\b", text)
    }
    return {
        key
        for key in named - known
        if not key.startswith(("audition.pinned.", "check.texts."))
        and not key.endswith((".py", ".json", ".md"))
    }


FREE_KEYS = {
    "audition.pinned",
    "check.texts",
    "corpus.columns",
    "corpus.effort_shares",
    "evaluation.lm_eval_results",
    "licence_decisions",
    "plan.expect",
    "tasks.columns",
    "teachers.engine_options",
}


def written_keys(node: Any, before: str = "") -> set[str]:
    """Every key of a piece of a recipe as a path, a list's items under the list's own name."""
    if isinstance(node, list):
        return {key for part in node for key in written_keys(part, before)}
    if not isinstance(node, dict) or before.rstrip(".") in FREE_KEYS:
        return set()
    return {f"{before}{name}" for name in node} | {
        key for name, below in node.items() for key in written_keys(below, f"{before}{name}.")
    }


def unknown_yaml_keys(text: str) -> set[str]:
    """Keys in ```yaml blocks that no recipe has."""
    known = known_keys()
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return {key for block in blocks for key in written_keys(yaml.safe_load(block)) - known}


def unknown_public_names(text: str) -> set[str]:
    """Names of persea and persea.losses in ```python blocks that are not public."""
    blocks = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    names = set(re.findall(r"\bpersea\.(\w+)", blocks)) - set(persea.__all__)
    losses = set(re.findall(r"\bpersea\.losses\.(\w+)", blocks)) - set(persea.losses.__all__)
    return names | losses


def plain(text: str) -> str:
    """A text without code blocks, patches and inline code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_everything_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not missing_links(text, page.parent)
    assert not missing_files(text)
    assert not unknown_verbs(text)
    assert not unknown_options(text)
    assert not unknown_targets(text)
    # two pages tell the old names of keys: the log of changes, and the table of renamed keys
    names_old_keys = page.name in ("CHANGELOG.md", "recipe.md")
    assert not unknown_keys(text) - (RENAMED if names_old_keys else set())
    assert not unknown_yaml_keys(text)
    assert not unknown_public_names(text)


def test_a_wrong_name_is_found() -> None:
    assert missing_links(
        "[a](nothing.md) [b](README.md#x) [c](https://x.y/z) [d](README.md#install-and-try-it)",
        ROOT,
    ) == ["nothing.md", "README.md#x"]
    assert missing_files("see `bench/nothing.py` and docs/design.md") == {"bench/nothing.py"}
    assert unknown_verbs(
        "`persea frob X`, `persea cache frob D`\n    persea frobs x\n.venv/bin/persea frobz\n"
        "X=1 persea frobx y\n#   persea froby\n`persea cache info D`\n  persea says so"
    ) == ["frob", "cache frob", "frobs", "frobz", "frobx", "froby"]
    assert unknown_options("`persea run R --frob`, `persea run R --procs 2`") == {"--frob"}
    assert unknown_targets("`make frob`, `make test`") == {"frob"}
    assert unknown_keys(
        "`training.frob`, `teachers[].quantize`, `evaluation.items`, `check.json`"
    ) == {"training.frob"}
    assert unknown_yaml_keys(
        "```yaml\nteachers:\n  - {name: a, frob: 1}\ncheck: {texts: {vi: b}}\n```\n"
    ) == {"teachers.frob"}
    assert unknown_public_names("```python\npersea.frob()\npersea.losses.EventKL()\n```\n") == {
        "frob"
    }
    assert PRIVATE_WORDS.search("the teacher's voice") and not PRIVATE_WORDS.search("invoice")


def test_readme_names_every_verb_and_every_extra() -> None:
    text = (ROOT / "README.md").read_text()
    assert [verb for verb in COMMANDS.commands if f"`persea {verb}" not in text] == []
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert [extra for extra in extras if f"`{extra}`" not in text] == []


def test_every_bench_is_named_in_the_makefile() -> None:
    """But for what another of them imports."""
    scripts = [p for p in sorted((ROOT / "bench").glob("*.py")) if "__main__" in p.read_text()]
    assert len(scripts) > 10
    assert [p.name for p in scripts if p.name not in (ROOT / "Makefile").read_text()] == []


def test_every_stage_has_its_page_and_every_recipe_says_what_it_is_in_one_line() -> None:
    assert not [
        name
        for name in COMMANDS.commands
        if name not in ("quickstart", "validate", "schema", "recipes")
        and not (ROOT / "docs" / f"{name}.md").is_file()
    ]
    firsts = [p.read_text().splitlines()[0] for p in (ROOT / "recipes").glob("*.yaml")]
    assert firsts and all(line.startswith("# ") and line.endswith(".") for line in firsts)


@pytest.mark.parametrize("name", ["recipe.md", "cli.md", "errors.md", "licences.md", "models.md"])
def test_generated_pages_are_in_step_with_the_code(name: str) -> None:
    """Otherwise: python docs/generate_reference.py."""
    page = ROOT / "docs" / "reference" / name
    assert page.read_text(encoding="utf-8") == generator().PAGES[name]()


def test_recipe_reference_has_every_key_of_the_schema() -> None:
    text = (ROOT / "docs" / "reference" / "recipe.md").read_text(encoding="utf-8")
    for key in known_keys():
        assert f"| `{key.rpartition('.')[2]}` |" in text, key


def test_every_page_is_in_the_navigation_once() -> None:
    def pages(node: Any) -> list[str]:
        if isinstance(node, str):
            return [node]
        below = node.values() if isinstance(node, dict) else node
        return [page for part in below for page in pages(part)]

    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(named) == [str(p.relative_to(ROOT / "docs")) for p in DOCS]


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(p for p in DOCS if p.name != "diary.md")],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_no_page_uses_private_words(page: Path) -> None:
    """Pages use the field's words, and the few of docs/glossary.md."""
    assert PRIVATE_WORDS.findall(plain(page.read_text(encoding="utf-8"))) == []


def test_architecture_shows_every_package_in_its_row() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [(int(row), name) for row, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", text, re.M)]
    assert sorted(rows) == sorted(
        (row, name) for row, names in enumerate(LAYERS, start=1) for name in names
    )
    picture = (ROOT / "docs" / "img" / "packages.svg").read_text(encoding="utf-8")
    assert all(f">{name}</text>" in picture for _, name in rows)


@cache
def source_texts() -> str:
    """All string literals of persea, one a line, with … for what is known only at run time."""
    found = set()
    for path in sorted((ROOT / "persea").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
                found.add(generator()._pattern(node, {}))
    return "\n".join(found)


def test_troubleshooting_explains_messages_that_exist() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert len(text.split("\n## Exit code ")) == 7  # 2 to 7
    quoted = [
        (fragment, cell)
        for cell in re.findall(r"^\| (`.+?) \|", text.partition("\n## Exit code 2")[2], re.M)
        for fragment in re.findall(r"`([^`]+)`", cell)
    ]
    assert len(quoted) > 50
    missing = [
        fragment
        for fragment, _ in quoted
        if not re.search(".*".join(map(re.escape, fragment.split(" ... "))), source_texts())
    ]
    assert missing == []
