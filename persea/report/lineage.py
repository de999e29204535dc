"""What made these weights: parents, licences, data, recipe, software. Written beside the student, shown in its card."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from persea import storage as store
from persea.errors import DataError
from persea.evaluation.audition import Cast


@dataclass(frozen=True)
class ParentModel:
    """One model the student descends from; licence as its family usually has it unless the recipe names another."""

    name: str
    model: str
    revision: str
    family: str
    licence: str
    fingerprint: str


def lineage_record(
    student_folder: Path,
    base: ParentModel,
    teachers: Sequence[ParentModel],
    recipe_hash: str,
    data: Mapping[str, Any],
    cast: Cast,
) -> dict[str, Any]:
    """The record. data: what was captured (summary), by digest of its units. Of the cast: who taught what with which share, and what a person pinned.

    Raises DataError where the student is not there.
    """
    weights = {p.name: store.digest_file(p) for p in sorted(student_folder.glob("*.safetensors"))}
    if not weights:
        raise DataError("no weights of a student", where=str(student_folder), remedy="train first")
    return {
        "student": {"sha256": weights},
        "base": asdict(base),
        "teachers": [asdict(t) for t in teachers],
        "recipe_hash": recipe_hash,
        "data": dict(data),
        "cast": {
            "parts": {part: dict(shares) for part, shares in cast.parts.items()},
            "pinned": list(cast.pinned),
        },
        "software": {
            name: metadata.version(name)
            for name in ("persea", "torch", "transformers", "tokenizers")
        }
        | {"python": platform.python_version()},
    }
