"""Record the origin of a student's weights: parents, licences, data, recipe and software.

The record holds digests of every file that it speaks of, so that `persea lineage verify` can
compute all of it again. It names no path of this machine, and goes with the weights.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import persea
from persea import storage
from persea.errors import DataError
from persea.evaluation.audition import Cast
from persea.licences.verdict import LicenceVerdict

RECORDED_PACKAGES = ("persea", "torch", "transformers", "tokenizers")
LINEAGE_FORMAT = "persea-lineage/1"
RECORD_FILE = "lineage.json"
# Where each file of the record is on this machine; it is not published.
SOURCES_FILE = "sources.json"
RECORD_REMEDY = "run `persea lineage RECIPE` again"
# Files that are written to the student's folder after the training.
LATER_FILES = frozenset({"README.md", "NOTICE", RECORD_FILE, "model.sig"})


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
        files: Name -> sha256 of each file of a local folder that the fingerprint covers.
        tokenizer: Digest of its tokenizer; "" for a teacher whose tokenizer is unknown.
        template: sha256 of its chat template; "" without one.
        ancestors: Models that it was made from, as its own card and configuration name them.
    """

    name: str
    model: str
    revision: str
    family: str
    licence: str
    fingerprint: str
    gguf: Mapping[str, Any] | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    tokenizer: str = ""
    template: str = ""
    ancestors: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the parent as JSON, without what is not known of it."""
        stated = ("name", "model", "revision", "family", "licence", "fingerprint")
        return {k: v for k, v in asdict(self).items() if k in stated or v}


def shared_base(base: ParentModel, teacher: ParentModel) -> str:
    """Return whether a teacher and the student's base come from one model.

    A student can take over traits of a teacher that shares its base even through text that does
    not speak of them.

    Returns:
        "yes", "no", or "not known" where no ancestor of one of them is stated.
    """
    of_base, of_teacher = ({m.model, *m.ancestors} for m in (base, teacher))
    if of_base & of_teacher or base.fingerprint == teacher.fingerprint:
        return "yes"
    return "no" if base.ancestors and teacher.ancestors else "not known"


def digest_folder(folder: Path) -> dict[str, str]:
    """Return name -> sha256 of the files of a student's folder, as the training left it."""
    return {
        str(path.relative_to(folder)): storage.digest_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in LATER_FILES
    }


def code_digest() -> str:
    """Return the sha256 of persea's own source files."""
    package = Path(persea.__file__).parent
    files = {
        str(path.relative_to(package)): storage.digest_file(path)
        for path in sorted(package.rglob("*.py"))
        if "bundled" not in path.parts
    }
    return storage.digest_json(files)


def lineage_record(
    student_folder: Path,
    base: ParentModel,
    teachers: Sequence[ParentModel],
    recipe_hash: str,
    data: Mapping[str, Any],
    cast: Cast,
    licences: LicenceVerdict | None = None,
    run: Mapping[str, Any] | None = None,
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
        run: Further entries of the record: recipe, stages, scores, training.

    Returns:
        The record: format, student, base, teachers, shared_bases, licences, recipe_hash, data,
        cast, software, persea_source, and the entries of `run`.

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
    student: dict[str, Any] = {"sha256": weights, "files": digest_folder(student_folder)}
    if licences is not None:
        student["name"] = licences.student_name
        if licences.student_licence:
            student["licence"] = licences.student_licence
    return {
        "format": LINEAGE_FORMAT,
        "student": student,
        "base": base.to_json(),
        "teachers": [t.to_json() for t in teachers],
        "shared_bases": {t.name: shared_base(base, t) for t in teachers},
        **({"licences": licences.to_json()} if licences is not None else {}),
        "recipe_hash": recipe_hash,
        "data": dict(data),
        "cast": {
            "parts": {part: dict(shares) for part, shares in cast.parts.items()},
            "pinned": list(cast.pinned),
        },
        "software": {name: metadata.version(name) for name in RECORDED_PACKAGES}
        | {"python": platform.python_version(), "machine": platform.machine()},
        "persea_source": code_digest(),
        **(run or {}),
    }


def read_lineage(path: Path) -> dict[str, Any]:
    """Read a lineage record, and check it against its own checksum.

    Raises:
        DataError: There is none, or it was changed after it was written.
    """
    return storage.read_json_with_checksum(path, RECORD_REMEDY)
