"""What README, docs, recipes and Makefile name is there: pages, files, verbs, options, targets, keys of a recipe, extras."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

from persea.cli import app
from persea.config.recipe import recipe_json_schema

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Makefile",
        "saplings/README.md",
        *(
            str(p.relative_to(ROOT))
            for kind in ("docs/*.md", "recipes/*.yaml")
            for p in sorted(ROOT.glob(kind))
        ),
    )
]
COMMANDS: Any = typer.main.get_command(app)
INVENTED = {
    "persea/chat/families/maple.py",
    "tests/chat/families/test_maple.py",
    "persea/tasks/generated/spelling.py",
    "tests/tasks/generated/test_spelling.py",
    "persea/tasks/benchmarks/boolq.py",
    "tests/tasks/benchmarks/test_boolq.py",
}  # the family that docs/new_family.md adds
WRITTEN = {"bench/results/chaos-train.json"}  # by a command that docs name; no run of it is kept


def missing_links(text: str, beside: Path) -> list[str]:
    return [
        to
        for to in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
        if "://" not in to and not (beside / to).exists()
    ]


def missing_files(text: str) -> set[str]:
    named = set(
        re.findall(
            r"\b((?:docs|bench|tests|recipes|examples|saplings|persea)/[\w./-]+\.(?:py|md|jsonl?|yaml|svg))\b",
            text,
        )
    )
    return {name for name in named - INVENTED - WRITTEN if not (ROOT / name).is_file()}


def unknown_verbs(text: str) -> list[str]:
    """After `persea`, at the start of code or of a line of a block: a verb, and of a group one of its own."""
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


def unknown_keys(text: str) -> set[str]:
    """`training.steps`, `teachers[].quantize`: keys told in code. audition.pinned and check.texts have keys of a person's own."""
    described = recipe_json_schema()
    known = keys(described, described["$defs"])
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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    assert not missing_links(text, page.parent)
    assert not missing_files(text)
    assert not unknown_verbs(text)
    assert not unknown_options(text)
    assert not unknown_targets(text)
    assert not unknown_keys(text)


def test_what_is_not_there_is_found() -> None:
    assert missing_links("[a](nothing.md) [b](README.md#x) [c](https://x.y/z)", ROOT) == [
        "nothing.md"
    ]
    assert missing_files("see `bench/nothing.py` and docs/design.md") == {"bench/nothing.py"}
    assert unknown_verbs(
        "`persea frob X`, `persea cache frob D`\n    persea frobs x\n.venv/bin/persea frobz\nX=1 persea frobx y\n#   persea froby"
        "\n`persea cache info D`\n  persea says so"
    ) == ["frob", "cache frob", "frobs", "frobz", "frobx", "froby"]
    assert unknown_options("`persea run R --frob`, `persea run R --procs 2`") == {"--frob"}
    assert unknown_targets("`make frob`, `make test`") == {"frob"}
    assert unknown_keys(
        "`training.frob`, `teachers[].quantize`, `evaluation.benchmarks`, `check.json`"
    ) == {"training.frob"}


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
