"""Read a model's licence from its own folder or card, never from what its template looks like.

Licences differ between the checkpoints of one family: Qwen2.5-7B is Apache-2.0, Qwen2.5-3B is for
research only.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from persea.models.loading import ModelSource, download_hub_file, local_folder

UNKNOWN_LICENCE = "unknown"
CARD_NAMES = ("README.md",)
LICENCE_FILE_NAMES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENSE-MODEL")
# (regular expression of the beginning of a licence text, its name); the first match counts.
KNOWN_TEXTS = (
    (r"apache license\s+version 2\.0", "Apache-2.0"),
    (r"\bmit license\b|permission is hereby granted, free of charge", "MIT"),
    (r"llama ([\d.]+) community license", r"Llama \1 Community License"),
    (r"gemma terms of use", "Gemma Terms of Use"),
    (r"qwen research license", "Qwen Research License"),
    (r"tongyi qianwen license", "Tongyi Qianwen License"),
    (r"qwen license agreement", "Qwen License"),
    (r"redistribution and use in source and binary forms", "BSD-3-Clause"),
)
BEGINNING_CHARS = 2000  # where a licence text names itself
MAX_NAME_CHARS = 80


def read_licence(source: ModelSource, where: str) -> str:
    """Return the licence that a model's own files state; UNKNOWN_LICENCE if they state none.

    Read are, in this order: the front matter of the card (`license_name` where `license` is
    "other", else `license`), `license` in config.json, and a licence file. Nothing is inferred.

    Args:
        source: The model.
        where: The place for error messages.

    Raises:
        DataError: The folder does not exist.
    """
    if source.is_random:
        return UNKNOWN_LICENCE
    folder = local_folder(source.model, where)

    def find(name: str) -> str:
        path = download_hub_file(source, name) if folder is None else folder / name
        if path is None or not path.is_file():
            return ""
        return path.read_text(encoding="utf-8", errors="replace")

    for name in CARD_NAMES:
        stated = licence_of_card(find(name))
        if stated:
            return stated
    config = _read_yaml(find("config.json"))
    if isinstance(config.get("license"), str) and config["license"].strip():
        return _one_line(config["license"])
    for name in LICENCE_FILE_NAMES if folder is not None else LICENCE_FILE_NAMES[:1]:
        stated = licence_of_text(find(name))
        if stated:
            return stated
    return UNKNOWN_LICENCE


def licence_of_card(card: str) -> str:
    r"""Return the licence in the front matter of a model card; "" if there is none.

    Example:
        >>> licence_of_card("---\nlicense: other\nlicense_name: qwen-research\n---\n# Model")
        'qwen-research'
    """
    found = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(?:\n|$)", card, re.DOTALL)
    if found is None:
        return ""
    front = _read_yaml(found[1])
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


def _one_line(text: str) -> str:
    return " ".join(text.split())[:MAX_NAME_CHARS]


def _read_yaml(text: str) -> dict[str, Any]:
    """Return a mapping from YAML or JSON text; empty if it is broken."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
