"""Read what a model's card, configuration and licence file state of its licence and its ancestors.

No library that renders or loads models is imported.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

UNKNOWN_LICENCE = "unknown"
CARD_NAMES = ("README.md",)
LICENCE_FILE_NAMES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENSE-MODEL")
# (regular expression of the beginning of a licence text, its name); the first match counts.
KNOWN_TEXTS = (
    (r"apache license\s+version 2\.0", "Apache-2.0"),
    (r"modified mit license", "Modified MIT License"),
    (r"\bmit license\b|permission is hereby granted, free of charge", "MIT"),
    (r"llama ([\d.]+) community license", r"Llama \1 Community License"),
    (r"gemma terms of use", "Gemma Terms of Use"),
    (r"qwen research license", "Qwen Research License"),
    (r"tongyi qianwen license", "Tongyi Qianwen License"),
    (r"qwen license agreement", "Qwen License"),
    (r"redistribution and use in source and binary forms", "BSD-3-Clause"),
)
NOTICE_FILE = "NOTICE"
BEGINNING_CHARS = 2000  # where a licence text names itself
MAX_NAME_CHARS = 80


def copy_licence_files(source_folder: Path, target_folder: Path) -> None:
    """Copy card, licence and NOTICE to another folder of the same weights."""
    for name in (*CARD_NAMES, *LICENCE_FILE_NAMES, NOTICE_FILE):
        if (source_folder / name).is_file():
            shutil.copyfile(source_folder / name, target_folder / name)


def licence_of_files(read: Callable[[str], str], licence_files: tuple[str, ...]) -> str:
    """Return the licence that a model's own files state; UNKNOWN_LICENCE if they state none.

    Read are, in this order: the front matter of the card (`license_name` where `license` is
    "other", else `license`), `license` in config.json, and a licence file. Nothing is inferred.

    Args:
        read: Returns the text of a file of the model; "" if it has none of this name.
        licence_files: Names that the licence file may have.
    """
    for name in CARD_NAMES:
        stated = licence_of_card(read(name))
        if stated:
            return stated
    config = _read_yaml(read("config.json"))
    if isinstance(config.get("license"), str) and config["license"].strip():
        return _one_line(config["license"])
    for name in licence_files:
        stated = licence_of_text(read(name))
        if stated:
            return stated
    return UNKNOWN_LICENCE


def ancestors_of_files(read: Callable[[str], str]) -> tuple[str, ...]:
    """Return the models that a model was made from, as its card and its configuration name them.

    These are `base_model` in the front matter of the card, `_name_or_path` in config.json, and of a
    student of `persea extend` the model that was extended and the teacher that its new rows are
    mapped from, in extension.json.

    Args:
        read: Returns the text of a file of the model; "" if it has none of this name.
    """
    found: list[Any] = []
    for name in CARD_NAMES:
        stated = _front_matter(read(name)).get("base_model")
        found += stated if isinstance(stated, list) else [stated]
    found.append(_read_yaml(read("config.json")).get("_name_or_path"))
    extension = _read_yaml(read("extension.json"))
    teacher_rows = extension.get("teacher_rows")
    found.append(extension.get("model"))
    found.append(teacher_rows.get("model") if isinstance(teacher_rows, dict) else None)
    return tuple(dict.fromkeys(n for n in found if isinstance(n, str) and n.strip()))


def licence_of_card(card: str) -> str:
    r"""Return the licence in the front matter of a model card; "" if there is none.

    Example:
        >>> licence_of_card("---\nlicense: other\nlicense_name: qwen-research\n---\n# Model")
        'qwen-research'
    """
    front = _front_matter(card)
    stated = front.get("license")
    if isinstance(stated, list):
        stated = ", ".join(str(s) for s in stated)
    if not isinstance(stated, str) or not stated.strip():
        return ""
    if stated.strip().lower() in ("other", "unknown"):
        name = front.get("license_name")
        return _one_line(name) if isinstance(name, str) and name.strip() else ""
    return _one_line(stated)


def licence_of_text(text: str) -> str:
    """Return the name of a licence text: a known one, else its title; "" for an empty text."""
    beginning = text[:BEGINNING_CHARS].lower()
    for pattern, name in KNOWN_TEXTS:
        found = re.search(pattern, beginning)
        if found is not None:
            return found.expand(name)
    title = next((line.strip(" #*\t") for line in text.splitlines() if line.strip(" #*\t")), "")
    return _one_line(title)


def _front_matter(card: str) -> dict[str, Any]:
    found = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(?:\n|$)", card, re.DOTALL)
    return {} if found is None else _read_yaml(found[1])


def _one_line(text: str) -> str:
    return " ".join(text.split())[:MAX_NAME_CHARS]


def _read_yaml(text: str) -> dict[str, Any]:
    """Return a mapping from YAML or JSON text; empty if it is broken."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
