"""The licence check of a run: collect what its models and data are under, and refuse early.

`persea.licences` decides; this module reads the recipe and the models' own files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from persea import storage
from persea.config.recipe import Recipe
from persea.config.schema import TEXT_ONLY_MODEL, ModelRef, TeacherSection
from persea.errors import DataError, RefusedError
from persea.licences.notice import notice_text
from persea.licences.table import Relation, Use, host_licence
from persea.licences.verdict import LicenceVerdict, LicensedInput, Release, resolve_licences
from persea.models.licence_text import (
    CARD_NAMES,
    LICENCE_FILE_NAMES,
    NOTICE_FILE,
    ancestors_of_files,
    licence_of_card,
    licence_of_files,
)
from persea.models.references import model_path
from persea.report.lineage import RECORD_FILE

MAX_FILE_BYTES = 1 << 20  # of a card, a configuration or a licence file
STUDENT_INPUT = "student"  # name of the base in `licence_decisions`


def licensed_inputs(recipe: Recipe, folder: Path | None) -> tuple[LicensedInput, ...]:
    """Return everything that a recipe's student is made of, with the licences that are stated.

    Args:
        recipe: The recipe.
        folder: The run folder, whose handshakes name the models of servers. None: nothing but the
            recipe and small files of local folders are read, no GGUF file and nothing of the hub.

    Raises:
        DataError: A model's folder does not exist; not raised without a run folder.
    """
    inputs = [_model_input(recipe.student, STUDENT_INPUT, Relation.BASE, folder)]
    for teacher in recipe.teachers:
        relation = Relation.REFERENCE if teacher.reference else Relation.TEACHER
        whole = _model_input(teacher, teacher.name, relation, folder)
        hosts = {host_licence(h): h for h in reversed(_hosts(teacher))}  # each operator's terms
        inputs += [replace(whole, host=host) for host in reversed(hosts.values())]
    for k, part in enumerate(recipe.corpus):
        name, own_file = f"corpus.{k}", part.file or part.texts
        if own_file:
            known_as = (Path(own_file).name,)
            inputs.append(
                LicensedInput(name, Relation.DATA, (part.licence,), known_as, is_own=True)
            )
        elif part.hub:
            stated = _stated_by_dataset(part.hub.name, part.hub.revision) if folder else ""
            statements = (part.licence, stated)
            inputs.append(LicensedInput(name, Relation.DATA, statements, (part.hub.name,)))
    return tuple(inputs)


def licence_verdict(recipe: Recipe, folder: Path | None) -> LicenceVerdict:
    """Return the verdict on a recipe's student; see `licensed_inputs` for the arguments."""
    return _verdict(recipe, licensed_inputs(recipe, folder))


def _verdict(recipe: Recipe, inputs: tuple[LicensedInput, ...]) -> LicenceVerdict:
    release = recipe.release
    return resolve_licences(
        inputs,
        Release(Use(release.use), release.name, release.licence, recipe.name),
        recipe.licence_decisions,
    )


def refuse_unlicensed(recipe: Recipe, folder: Path) -> None:
    """Raise if a licence forbids the student, or if whether it does is an open question.

    Raises:
        RefusedError: Lists every problem, one a line, with the remedy.
    """
    problems = [
        RefusedError(
            f"{'licence' if p.outcome == 'refused' else 'licence question'}: {p.text}",
            where=p.name,
            remedy=p.remedy,
        )
        for p in licence_verdict(recipe, folder).problems
    ]
    if problems:
        raise (
            problems[0] if len(problems) == 1 else RefusedError("\n".join(str(p) for p in problems))
        )


def write_notice(recipe: Recipe, run_folder: Path, target: Path) -> LicenceVerdict:
    """Write the NOTICE of a student to a folder.

    Args:
        recipe: The recipe.
        run_folder: Folder of the run.
        target: Folder to write to.

    Returns:
        The verdict that the file states.
    """
    inputs = licensed_inputs(recipe, run_folder)
    verdict = _verdict(recipe, inputs)
    storage.write_atomic(target / NOTICE_FILE, notice_text(verdict, inputs).encode())
    return verdict


def copy_to_student(run_folder: Path) -> None:
    """Copy NOTICE, lineage and model card of a finished run to its student, unless they are there.

    A run that begins with this student then reads its licence.
    """
    student = run_folder / "train" / "student"
    lineage = run_folder / "lineage"
    for source in (
        lineage / NOTICE_FILE,
        lineage / RECORD_FILE,
        run_folder / "report" / CARD_NAMES[0],
    ):
        target = student / source.name
        if not source.is_file() or not student.is_dir():
            continue
        if not target.is_file() or target.read_bytes() != source.read_bytes():
            storage.write_atomic(target, source.read_bytes())


# --- one model ---


def _model_input(
    ref: ModelRef, name: str, relation: Relation, folder: Path | None
) -> LicensedInput:
    if ref.model == "random":
        return LicensedInput(name, relation, is_random=True)
    served = _served_names(ref, name, folder) if isinstance(ref, TeacherSection) else ()
    if ref.model == TEXT_ONLY_MODEL:
        return LicensedInput(name, relation, (ref.licence,), served or (name,))
    path = model_path(ref.model, name)
    own_name = path.name if path.exists() else ref.model
    stated, ancestors = "", tuple[str, ...]()
    if relation is not Relation.REFERENCE:  # a model that is only measured needs no licence
        stated, ancestors = _stated_by_files(ref, name, folder)
    return LicensedInput(name, relation, (ref.licence, stated), (own_name, *ancestors, *served))


def _hosts(ref: TeacherSection) -> tuple[str, ...]:
    """Return the host names of a teacher's servers; ("",) if it has none."""
    addresses = ref.endpoint.addresses if ref.endpoint else ("",)
    return tuple(urlsplit(url).hostname or "" for url in addresses)


def _served_names(ref: TeacherSection, name: str, folder: Path | None) -> tuple[str, ...]:
    """Return the names of the model behind a teacher's server: the recipe's, the server's own."""
    if ref.endpoint is None:
        return ()
    names = [ref.endpoint.served_model_name]
    handshake = folder / "endpoints" / f"{name}.json" if folder else None
    if handshake is not None and handshake.is_file():
        names.append(str(storage.read_json(handshake).get("model", "")))
    return tuple(dict.fromkeys(n for n in names if n))


def _stated_by_files(ref: ModelRef, where: str, folder: Path | None) -> tuple[str, tuple[str, ...]]:
    """Return the licence that a model's own files state, and the models that it was made from."""
    path = model_path(ref.model, where)
    is_gguf = path.suffix.lower() == ".gguf" or (
        path.is_dir() and not any(path.glob("*.safetensors")) and any(path.glob("*.gguf"))
    )
    if is_gguf and path.exists():
        return _stated_by_gguf(ref.model, where) if folder else ("", ())
    if path.is_dir():

        def read_local(name: str) -> str:
            return _read_small(path / name)

        return licence_of_files(read_local, LICENCE_FILE_NAMES), ancestors_of_files(read_local)
    if folder is None:
        return "", ()
    from persea.models.loading import local_folder

    local_folder(ref.model, where)  # refuses a path that does not exist
    return _stated_on_hub(ref.model, ref.revision)


@lru_cache(maxsize=64)
def _stated_on_hub(model: str, revision: str) -> tuple[str, tuple[str, ...]]:
    """Return what a hub model's files state; asked once a process."""
    from persea.models.loading import ModelSource, download_hub_file

    source = ModelSource(model, revision)

    def read_hub(name: str) -> str:
        found = download_hub_file(source, name)
        return "" if found is None else _read_small(found)

    return licence_of_files(read_hub, LICENCE_FILE_NAMES[:1]), ancestors_of_files(read_hub)


@lru_cache(maxsize=64)
def _stated_by_dataset(name: str, revision: str) -> str:
    """Return the licence on the card of a hub data set; "" if none is stated or reached."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        card = hf_hub_download(name, CARD_NAMES[0], repo_type="dataset", revision=revision or None)
    except (HfHubHTTPError, LocalEntryNotFoundError):
        return ""
    return licence_of_card(_read_small(Path(card)))


def _stated_by_gguf(model: str, where: str) -> tuple[str, tuple[str, ...]]:
    from persea.models.gguf_header import find_gguf
    from persea.models.gguf_model import gguf_header

    path = find_gguf(model, where)
    if path is None:
        return "", ()
    header = gguf_header(path, where)
    return header.licence, tuple(_gguf_names(header.metadata, header.model_name))


def _gguf_names(metadata: Mapping[str, Any], model_name: str) -> list[str]:
    keys = ("general.basename", "general.base_model.0.name", "general.base_model.0.repo_url")
    return [n for n in (model_name, *(str(metadata.get(k) or "") for k in keys)) if n]


def _read_small(path: Path) -> str:
    """Return the beginning of a text file; "" if there is none."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES).decode("utf-8", errors="replace")
    except OSError as error:
        raise DataError(str(error), where=str(path), remedy="make the file readable") from error
