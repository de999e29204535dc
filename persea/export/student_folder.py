"""Copy a trained student to a folder that others can load, and push it to the hub."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from persea import storage
from persea.errors import DataError, MissingRequirementError, RefusedError, TeacherError
from persea.export.forms import GgufPrecision
from persea.export.gguf_file import GgufFile, write_gguf
from persea.models.loading import ModelSource, load_renderer

CARD_FILE, NOTICE_FILE = "README.md", "NOTICE"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
REPOSITORY_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What a run keeps beside its student that is of no use elsewhere.
# not in an adapter's folder, besides the weights
MODEL_FILES = ("config.json", "model.safetensors.index.json")
TEMPORARY_SUFFIXES = (".tmp", ".lock")


@dataclass(frozen=True)
class StudentRecord:
    """What an export needs to know of a finished run.

    Attributes:
        folder: Folder of the student's weights.
        adapter: Folder of the student's adapters; None if all weights were trained.
        name: The student's name: the one that its licences ask for, or the recipe's.
        licence: Licence of the student; "" = any, or unknown.
        card: The model card.
        notice: The NOTICE of its parents; "" if there is none.
    """

    folder: Path
    adapter: Path | None
    name: str
    licence: str
    card: str
    notice: str


def read_student(run: Path) -> StudentRecord:
    """Read a finished run: its student, name, licence and card.

    Raises:
        DataError: The run has no student, lineage or report yet, or the student has no tokenizer.
    """
    folder = run / "train" / "student"
    if not any(folder.glob("*.safetensors")):
        raise DataError(
            "no trained student in it",
            where=str(run),
            remedy="give the folder of a finished run, such as runs/quickstart",
        )
    lineage = storage.read_json(run / "lineage" / "lineage.json")
    card = run / "report" / CARD_FILE
    if not card.is_file():
        raise DataError(
            "no model card yet", where=str(card), remedy="run `persea report RECIPE` first"
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise DataError(
            "the student has no tokenizer",
            where=str(folder),
            remedy="train again with --resume never: this version saves it",
        )
    notice, adapter = run / "lineage" / NOTICE_FILE, run / "train" / "adapter"
    student = lineage["student"]
    return StudentRecord(
        folder,
        adapter if adapter.is_dir() else None,
        str(student.get("name") or run.name),
        str(student.get("licence") or ""),
        card.read_text(encoding="utf-8"),
        notice.read_text(encoding="utf-8") if notice.is_file() else "",
    )


def write_model_folder(student: StudentRecord, target: Path, *, only_adapter: bool = False) -> None:
    """Copy the student, or its adapters with the tokenizer, with card and NOTICE.

    The copy is complete or absent. Its tokenizer and template are opened once more from the copy.

    Args:
        student: The student.
        target: A new or empty folder.
        only_adapter: Copy the adapters instead of the whole weights.

    Raises:
        RefusedError: The target holds files, or the student was not trained with adapters.
        DataError: The copy cannot be opened.
        StorageError: The target cannot be written.
    """
    refuse_full_folder(target)
    if only_adapter and student.adapter is None:
        raise RefusedError(
            "the student was trained whole, so it has no adapters",
            where=str(student.folder),
            remedy="export it with --to hf, or train it with `student: {adapt: lora}`",
        )
    with storage.open_atomic_folder(target) as folder:
        for path in sorted(student.folder.iterdir()):
            is_model = path.suffix == ".safetensors" or path.name in MODEL_FILES
            is_wanted = path.is_file() and not path.name.endswith(TEMPORARY_SUFFIXES)
            if is_wanted and not (only_adapter and is_model):
                shutil.copyfile(path, folder / path.name)
        if only_adapter and student.adapter is not None:
            for path in sorted(student.adapter.iterdir()):
                shutil.copyfile(path, folder / path.name)
        _write_card(student, folder)
        if not only_adapter:
            _verify_copy(student.folder, folder)


def refuse_full_folder(target: Path) -> None:
    """Raise if a folder to export to holds files.

    Raises:
        RefusedError: It does, or it is no folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RefusedError(
            "the folder to export to is not empty",
            where=str(target),
            remedy="give a new folder with --out",
        )


def _verify_copy(own: Path, copy: Path) -> None:
    """Raise if weights are not whole, or the copy's renderer differs from the student's."""
    for path in sorted(own.glob("*.safetensors")):
        if storage.digest_file(path) != storage.digest_file(copy / path.name):
            raise DataError(
                "the copy differs from the student's weights",
                where=str(copy / path.name),
                remedy="check the disk, then export again",
            )
    digests = [load_renderer(ModelSource(str(f)), "export").digest for f in (own, copy)]
    if digests[0] != digests[1]:
        raise DataError(
            "the copy renders conversations otherwise than the student",
            where=str(copy),
            remedy="report this with the student's tokenizer files",
        )


def describe_push(folder: Path, repository: str) -> list[str]:
    """Return what a push would upload: a line for the repository and one for each file."""
    files = _files(folder)
    total = sum(size for _, size in files)
    lines = [f"{repository}: {len(files)} files, {total:,} bytes, as a private model repository"]
    return lines + [f"  {name} ({size:,} bytes)" for name, size in files]


def push_folder(folder: Path, repository: str) -> str:
    """Upload a folder to a private model repository of the hub, and return its address.

    Args:
        folder: The exported folder.
        repository: "organisation/name".

    Raises:
        RefusedError: The name is no repository's.
        TeacherError: The hub refuses, or cannot be reached.
        MissingRequirementError: Nobody is logged in.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    refuse_bad_repository(repository)
    api: Any = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository)
    except LocalTokenNotFoundError as error:
        raise MissingRequirementError(
            "nobody is logged in to the hub", where=repository, remedy="hf auth login"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise TeacherError(
            f"the hub did not take the model: {str(error).splitlines()[0]}",
            where=repository,
            remedy=f"check the network and your rights there; the export stays in {folder}",
        ) from error
    return f"https://huggingface.co/{repository}"


def refuse_bad_repository(repository: str) -> None:
    """Raise if a name is no repository of the hub.

    Raises:
        RefusedError: It is not "organisation/name".
    """
    if not REPOSITORY_NAME.fullmatch(repository):
        raise RefusedError(
            f"{repository!r} is no name of a repository",
            where="--push",
            remedy="write organisation/name",
        )


def _files(folder: Path) -> Sequence[tuple[str, int]]:
    return [
        (str(p.relative_to(folder)), p.stat().st_size)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    ]


def write_gguf_folder(
    student: StudentRecord,
    target: Path,
    precision: GgufPrecision = GgufPrecision.AUTO,
    *,
    for_ollama: bool = False,
) -> GgufFile:
    """Write a folder with the student as a GGUF file, its card and NOTICE.

    Args:
        student: The student.
        target: A new or empty folder.
        precision: How matrices are stored.
        for_ollama: Add a Modelfile.

    Returns:
        The file.

    Raises:
        RefusedError: The target holds files, or llama.cpp or Ollama have no form for the student.
        StorageError: The target cannot be written.
    """
    refuse_full_folder(target)
    with storage.open_atomic_folder(target) as folder:
        path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', student.name)}.gguf"
        file = write_gguf(student.folder, path, student.name, precision, student.licence)
        _write_card(student, folder)
        if for_ollama:
            _write_modelfile(student, path, folder)
    return replace(file, path=target / file.path.name)


def _write_card(student: StudentRecord, folder: Path) -> None:
    (folder / CARD_FILE).write_text(student.card, encoding="utf-8")
    if student.notice:
        (folder / NOTICE_FILE).write_text(student.notice, encoding="utf-8")


def _write_modelfile(student: StudentRecord, gguf_file: Path, target: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    from persea.export.ollama import find_turn_template, modelfile

    renderer = load_renderer(ModelSource(str(student.folder)), "export")
    tokenizer: Any = AutoTokenizer.from_pretrained(student.folder, trust_remote_code=False)
    config: Any = AutoConfig.from_pretrained(student.folder, trust_remote_code=False)
    bos = tokenizer.bos_token or ""
    adds_bos = bool(bos) and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    template = find_turn_template(renderer, bos if adds_bos else "")
    stops = tuple(tokenizer.convert_ids_to_tokens(list(renderer.stop_ids)))
    text = modelfile(
        gguf_file.name,
        template,
        stops,
        int(config.get_text_config().max_position_embeddings),
        student.licence,
    )
    storage.write_atomic(target / "Modelfile", text.encode())
