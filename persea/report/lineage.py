"""Record the origin of a student's weights: parents, licences, data, recipe and software.

The record is written to the run folder and shown in its model card.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from persea import storage
from persea.errors import DataError
from persea.evaluation.audition import Cast
from persea.licences.verdict import LicenceVerdict

RECORDED_PACKAGES = ("persea", "torch", "transformers", "tokenizers")


@dataclass(frozen=True)
class ParentModel:
    """A model that the student descends from.

    Attributes:
        name: Its name in the recipe.
        model: Hub name, or the last name of a local folder.
        revision: Revision on the hub.
        family: Its family.
        licence: The licence in the recipe, or else the one that the model's own files state (of a
            GGUF file, its metadata), or "unknown".
        fingerprint: Digest of its files.
        gguf: Of a GGUF file: its name, sha256, quantisation, model name and licence.
    """

    name: str
    model: str
    revision: str
    family: str
    licence: str
    fingerprint: str
    gguf: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the parent as JSON; `gguf` only for a GGUF file."""
        record = asdict(self)
        return record if self.gguf else {k: v for k, v in record.items() if k != "gguf"}


def lineage_record(
    student_folder: Path,
    base: ParentModel,
    teachers: Sequence[ParentModel],
    recipe_hash: str,
    data: Mapping[str, Any],
    cast: Cast,
    licences: LicenceVerdict | None = None,
) -> dict[str, Any]:
    """Return the lineage of a student as JSON.

    Args:
        student_folder: Folder of the student's weights.
        base: The model that the training began with.
        teachers: The models that taught.
        recipe_hash: Digest of the recipe.
        data: Summary of the captured answers, with the digest of their units.
        cast: Which teacher taught which skill, and which skills the recipe assigned.
        licences: Verdict on the licences of base, teachers and data.

    Returns:
        The record: student, base, teachers, licences, recipe_hash, data, cast, software.

    Raises:
        DataError: If the folder holds no weights.
    """
    weights = {p.name: storage.digest_file(p) for p in sorted(student_folder.glob("*.safetensors"))}
    if not weights:
        raise DataError(
            "the folder holds no weights of a student",
            where=str(student_folder),
            remedy="run train first",
        )
    student: dict[str, Any] = {"sha256": weights}
    if licences is not None:
        student["name"] = licences.student_name
        if licences.student_licence:
            student["licence"] = licences.student_licence
    return {
        "student": student,
        "base": base.to_json(),
        "teachers": [t.to_json() for t in teachers],
        **({"licences": licences.to_json()} if licences is not None else {}),
        "recipe_hash": recipe_hash,
        "data": dict(data),
        "cast": {
            "parts": {part: dict(shares) for part, shares in cast.parts.items()},
            "pinned": list(cast.pinned),
        },
        "software": {name: metadata.version(name) for name in RECORDED_PACKAGES}
        | {"python": platform.python_version()},
    }
