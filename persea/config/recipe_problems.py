"""Explain what pydantic finds wrong in a recipe: key, problem and remedy, in plain words."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic_core import ErrorDetails

from persea.config.foreign_keys import FOREIGN_KEYS, foreign_remedy
from persea.config.renamed_keys import RENAMED_KEYS
from persea.config.secrets import is_secret
from persea.config.section import RecipeSection
from persea.config.yaml_source import KeyPath, suggest_choice


@cache
def sections_by_key(root: type[RecipeSection]) -> dict[str, type[RecipeSection]]:
    """Map each key below `root` that holds a section, or a list of sections, to its class."""
    found: dict[str, type[RecipeSection]] = {}
    queue: list[type[RecipeSection]] = [root]
    for section in queue:
        for key, field in section.model_fields.items():
            for kind in _section_classes(field.annotation):
                if key not in found:
                    found[key] = kind
                    queue.append(kind)
    return found


def _section_classes(annotation: Any) -> Iterator[type[RecipeSection]]:
    if isinstance(annotation, type) and issubclass(annotation, RecipeSection):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _section_classes(inner)


EXPECTED_VALUE_TEXTS = (  # start of pydantic's error type, and the expected value in words
    ("int_", "a whole number"),
    ("bool_", "true or false"),
    ("float_", "a number"),
    ("finite", "a finite number"),
    ("string_type", "text"),
    ("string_too", "some text"),
    ("string_pattern", "a plain name"),
    ("date_", "a date such as 2025-01-01"),
    ("tuple_", "a list, each entry after `- `"),
    *((kind, "a section, its keys indented below it") for kind in ("model_", "dict_")),
)
WRITTEN_VALUES = (  # start of pydantic's error type, and what a text may hold in its place
    ("int_", r"-?\d+"),
    ("float_", r"-?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?"),
    ("bool_", r"true|false"),
)
BOUND_TEXTS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than_equal": ("le", "at most"),
}


def explain_error(
    error: ErrorDetails, root: type[RecipeSection]
) -> Iterator[tuple[KeyPath, str, str]]:
    """Translate one of pydantic's findings to (key, problem, remedy) triples.

    Args:
        error: The finding.
        root: The section that was validated: the recipe.
    """
    path = tuple(k for k in error["loc"] if k != "[key]")
    kind, context = error["type"], error.get("ctx", {})
    if kind == "default_factory_not_called" or (kind == "too_short" and error["input"]):
        return  # pydantic also reports the wrong value that this default or list depends on
    given = f"(got {_abbreviate_value(error['input'])})"
    if kind == "contradiction":
        yield from (((*path, *key), message, remedy) for key, message, remedy in context["found"])
    elif kind == "extra_forbidden":
        yield path, "unknown key", _did_you_mean(path, root)
    elif kind == "missing":
        yield path, "missing", f"add `{path[-1]}:`, {_key_description(path, root)}"
    elif kind in ("enum", "literal_error"):
        choices = [c for c in re.findall(r"'([^']*)'", context["expected"]) if c]
        yield (
            path,
            f"should be {', '.join(choices[:-1])} or {choices[-1]} {given}",
            suggest_choice(str(error["input"]), choices),
        )
    else:
        yield path, *_explain_value_error(error, path, given, root)


def _explain_value_error(
    error: ErrorDetails, path: KeyPath, given: str, root: type[RecipeSection]
) -> tuple[str, str]:
    kind, context = error["type"], error.get("ctx", {})
    if kind in BOUND_TEXTS:
        bound, comparison = BOUND_TEXTS[kind]
        limit = str(context[bound]).removesuffix(".0")
        return f"should be {comparison} {limit} {given}", _key_description(path, root)
    if kind == "string_type" and not isinstance(error["input"], dict | list):
        return f"should be text {given}", "put it in quotes"
    if kind == "too_short":
        return "needs at least one entry", _key_description(path, root)
    expected = next(
        (w for start, w in EXPECTED_VALUE_TEXTS if kind.startswith(start)), error["msg"]
    )
    if kind == "string_pattern_mismatch" and path[-1] == "language":
        expected = "a language code"
    remedy = _plain_value(kind, path, error["input"]) or _key_description(path, root)
    return f"should be {expected} {given}", remedy


def _plain_value(kind: str, path: KeyPath, value: Any) -> str:
    """Return how to write a number or a truth value that was given as text; "" = it is none."""
    pattern = next((p for start, p in WRITTEN_VALUES if kind.startswith(start)), None)
    if not isinstance(value, str) or pattern is None:
        return ""
    plain = value.strip().replace(",", "").replace("_", "").lower()
    plain = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(plain, plain)
    return f"write `{path[-1]}: {plain}`" if re.fullmatch(pattern, plain) else ""


def _owning_section(path: KeyPath, root: type[RecipeSection]) -> type[RecipeSection] | None:
    """Return the section that a key is a field of."""
    keys = [k for k in path[:-1] if isinstance(k, str)]
    return sections_by_key(root).get(keys[-1]) if keys else root


def _key_description(path: KeyPath, root: type[RecipeSection]) -> str:
    """Return the description of a field, or of the field whose list or mapping has the key."""
    owner = _owning_section(path, root)
    found = owner.model_fields.get(str(path[-1])) if owner else None
    return str(found.description) if found else _key_description(path[:-1], root)


def _did_you_mean(path: KeyPath, root: type[RecipeSection]) -> str:
    """Return a remedy for an unknown key: where it belongs, or the most similar key."""
    key, owner = str(path[-1]), _owning_section(path, root)
    section_name = next((str(k) for k in reversed(path[:-1]) if isinstance(k, str)), "")
    if remedy := foreign_remedy(section_name, key):
        return remedy
    homes = [
        f"under `{name}:`"
        for name, section in sections_by_key(root).items()
        if key in section.model_fields
    ]
    homes += ["at the top of the file"] if key in root.model_fields else []
    for section_path, renamed in (*RENAMED_KEYS.items(), *FOREIGN_KEYS.items()):
        if key in renamed:
            names = [str(k) for k in section_path if k != "*"]
            where = f"under `{names[-1]}:`" if names else "at the top of the file"
            homes.append(f"{where} as `{renamed[key]}`")
    if homes:
        return f"it belongs {' or '.join(homes)}"
    return suggest_choice(key, list(owner.model_fields) if owner else [])


def _abbreviate_value(value: Any) -> str:
    """Return a value in at most 60 characters, secrets hidden."""
    if isinstance(value, dict | list):
        return "a section" if isinstance(value, dict) else "a list"
    text = (
        "a secret"
        if is_secret(value)
        else repr(value)
        if isinstance(value, str)
        else json.dumps(value)
    )
    return text if len(text) <= 60 else f"{text[:57]}..."
