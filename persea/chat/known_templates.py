"""Digests of the chat templates of published models, with their source and date.

`python bench/known_templates.py --record` writes known_templates.json; without the option it says
what changed in the installed packages since then.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from persea.chat.families.hybrid import HYBRID_PRELUDE

KNOWN_TEMPLATES_FILE = Path(__file__).with_name("known_templates.json")


@dataclass(frozen=True)
class KnownTemplate:
    """One template of a published model.

    Attributes:
        name: Its file name in its source.
        source: The package, with its version.
        date: The day on which it was recorded, as YYYY-MM-DD.
    """

    name: str
    source: str
    date: str


def template_digest(text: str) -> str:
    """Return the sha256 of a template's text."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


@cache
def known_templates() -> dict[str, KnownTemplate]:
    """Return digest -> template."""
    recorded = json.loads(KNOWN_TEMPLATES_FILE.read_text(encoding="utf-8"))
    return {digest: KnownTemplate(*fields) for digest, fields in recorded.items()}


def is_known_template(text: str) -> bool:
    """Return whether this is a published template, also behind persea's own prelude."""
    return template_digest(text.removeprefix(HYBRID_PRELUDE)) in known_templates()
