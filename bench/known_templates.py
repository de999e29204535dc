"""Compare the chat templates of published models with those that are recorded.

    python bench/known_templates.py [--record] [FOLDER ...]     (make templates)

Templates: those of PERSEA_DATA/templates, of the installed packages trl and transformers, of the
saplings, and every *.jinja below each FOLDER. The digests of those that are known, each with its
source and date, are in persea/chat/known_templates.json; `--record` adds the new ones. No template
itself is part of persea. A name whose text changed is a template that moved on: run
bench/templates.py, and look at the family's tests.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import astuple
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from persea.chat.known_templates import (
    KNOWN_TEMPLATES_FILE,
    KnownTemplate,
    known_templates,
    template_digest,
)

ROOT = Path(__file__).resolve().parent.parent


def sources(folders: list[Path]) -> Iterator[tuple[str, Path]]:
    """Yield (source with its version, folder)."""
    yield "persea", ROOT / "saplings"
    yield "persea", ROOT / "persea" / "chat"
    if os.environ.get("PERSEA_DATA"):
        yield "PERSEA_DATA", Path(os.environ["PERSEA_DATA"]) / "templates"
    for package in ("trl", "transformers"):
        spec = find_spec(package)
        if spec is not None and spec.origin:
            yield f"{package} {version(package)}", Path(spec.origin).parent
    yield from ((folder.name, folder) for folder in folders)


def current_templates(folders: list[Path]) -> dict[str, KnownTemplate]:
    """Return digest -> template as the sources carry it today; the first source counts."""
    today, found = date.today().isoformat(), dict[str, KnownTemplate]()
    for source, root in sources(folders):
        for path in sorted(root.rglob("*.jinja")):
            name = path.parent.name if path.stem == "chat_template" else path.stem
            digest = template_digest(path.read_text(encoding="utf-8"))
            found.setdefault(digest, KnownTemplate(name, source, today))
    return found


def describe_changes(
    known: dict[str, KnownTemplate], current: dict[str, KnownTemplate]
) -> Iterator[str]:
    """Yield one line for each template that is new, changed or gone."""

    def package(template: KnownTemplate) -> str:
        return template.source.split(" ")[0]

    old = {(package(t), t.name): (d, t) for d, t in known.items()}
    new = {(package(t), t.name): (d, t) for d, t in current.items()}
    visible = {p for p, _ in new}
    for key in sorted(old.keys() | new.keys()):
        if key in new and new[key][0] not in known:
            template = new[key][1]
            was = f"changed since {old[key][1].source}, {old[key][1].date}" if key in old else "new"
            yield f"{template.source}: {template.name} is {was}"
        elif key not in new and key[0] in visible and old[key][0] not in current:
            yield f"{old[key][1].source}: {old[key][1].name} is gone"


def main() -> None:
    """Print what changed; with --record, write the file."""
    arguments = sys.argv[1:]
    folders = [Path(a) for a in arguments if a != "--record"]
    known = known_templates() if KNOWN_TEMPLATES_FILE.is_file() else {}
    current = current_templates(folders)
    changes = list(describe_changes(known, current))
    print("\n".join(changes) or f"{len(current)} templates are as recorded")
    if "--record" in arguments:
        recorded = {d: astuple(t) for d, t in sorted({**current, **known}.items())}
        KNOWN_TEMPLATES_FILE.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
