"""Compute everything that a lineage record states again, and list what differs.

Compared are the record with its own checksum, the student's files, the outputs of every finished
stage, every captured unit, the recipe, and the files of base, teachers and corpus where they are
still on this machine. A model that is elsewhere is named as not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persea import storage
from persea.errors import DataError, PerseaError
from persea.models.identity import file_digests
from persea.models.licence_text import CARD_NAMES, NOTICE_FILE
from persea.models.loading import ModelSource
from persea.pipeline.stage_keys import STAGE_NAMES
from persea.pipeline.stage_store import RECORD_FILE as STAGE_RECORD_FILE
from persea.report.lineage import (
    RECORD_FILE,
    RECORD_REMEDY,
    SOURCES_FILE,
    digest_folder,
    read_lineage,
)

CHANGED = "changed since the record was written"
MISSING = "not there"


@dataclass(frozen=True)
class LineageProblem:
    """A difference between a lineage record and the files of its run.

    Attributes:
        where: The file, or the entry of the record.
        message: The difference.
    """

    where: str
    message: str


@dataclass(frozen=True)
class LineageVerification:
    """Result of `verify_run`.

    Attributes:
        num_checked: Number of files whose digest was computed again.
        problems: Every difference.
        not_checked: Models and data that are not on this machine.
    """

    num_checked: int
    problems: tuple[LineageProblem, ...]
    not_checked: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON."""
        return {
            "checked": self.num_checked,
            "problems": [{"where": p.where, "message": p.message} for p in self.problems],
            "not_checked": list(self.not_checked),
        }


def verify_run(folder: Path) -> LineageVerification:
    """Compare a run folder with its lineage record.

    Args:
        folder: A run folder with a finished lineage stage.

    Returns:
        The number of compared files, every difference, and what is not on this machine.

    Raises:
        DataError: There is no lineage record.
        StorageError: A file cannot be read.
    """
    path = folder / "lineage" / RECORD_FILE
    if not path.is_file():
        raise DataError(
            "this run has no lineage record", where=str(path), remedy="persea lineage RECIPE"
        )
    checker = _Checker()
    record = checker.read_record(path, read_lineage)
    if record is None:
        return checker.result()
    checker.check_stages(folder)
    checker.check_student(folder, record)
    checker.check_recipe(folder, record)
    checker.check_units(folder)
    sources = checker.read_record(folder / "lineage" / SOURCES_FILE, _read_sources)
    if sources is not None:
        checker.check_parents(record, sources)
        checker.check_corpus(record, sources)
    return checker.result()


def _read_sources(path: Path) -> dict[str, Any]:
    return storage.read_json_with_checksum(path, RECORD_REMEDY)


class _Checker:
    """Collects differences; every method compares one kind of files."""

    def __init__(self) -> None:
        self._num_checked = 0
        self._problems: list[LineageProblem] = []
        self._not_checked: list[str] = []

    def result(self) -> LineageVerification:
        return LineageVerification(
            self._num_checked,
            tuple(dict.fromkeys(self._problems)),
            tuple(self._not_checked),
        )

    def read_record(
        self, path: Path, read: Callable[[Path], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """Return a record with a checksum; None if it is damaged, which is noted."""
        self._num_checked += 1
        try:
            return read(path)
        except DataError as error:
            self._problems.append(LineageProblem(str(path), error.message))
            return None

    def check_stages(self, folder: Path) -> None:
        """Compare the outputs of each finished stage with the stage's own record."""
        for stage in STAGE_NAMES:
            path = folder / stage / STAGE_RECORD_FILE
            if not path.is_file():
                if (folder / stage).is_dir():
                    self._problems.append(LineageProblem(str(path), MISSING))
                continue
            record = self.read_record(path, _read_sources)
            if record is not None:
                self._compare(folder / stage, record["outputs"])

    def check_student(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Compare the student's folder with the record, and the copies in it with their origins."""
        student = folder / "train" / "student"
        stated: Mapping[str, str] = record["student"]["files"]
        self._compare(student, stated)
        for name in sorted(digest_folder(student).keys() - stated.keys()):
            self._problems.append(LineageProblem(str(student / name), "not in the record"))
        for origin in (
            folder / "lineage" / NOTICE_FILE,
            folder / "lineage" / RECORD_FILE,
            folder / "report" / CARD_NAMES[0],
        ):
            copy = student / origin.name
            if origin.is_file() and copy.is_file():
                self._compare(student, {origin.name: storage.digest_file(origin)})

    def check_recipe(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Compare the recipe's hash with the record."""
        from persea.config.recipe import load_recipe

        path = folder / "recipe.yaml"
        self._num_checked += 1
        try:
            found = load_recipe(path).hash
        except PerseaError as error:
            self._problems.append(LineageProblem(str(path), error.message.splitlines()[0]))
            return
        if found != record["recipe_hash"]:
            self._problems.append(LineageProblem(str(path), CHANGED))

    def check_units(self, folder: Path) -> None:
        """Read and decode every captured unit."""
        from persea.cache.maintenance import committed_units, verify_cache

        capture = folder / "capture"
        if not (capture / "commits").is_dir():
            self._not_checked.append("capture/units: not in this folder")
            return
        self._num_checked += len(committed_units(capture))
        self._problems += [
            LineageProblem(str(p.path), p.message)
            for p in verify_cache(capture)
            if not p.is_harmless
        ]

    def check_parents(self, record: Mapping[str, Any], sources: Mapping[str, Any]) -> None:
        """Compare the files of base and teachers, where they are on this machine."""
        for parent in (record["base"], *record["teachers"]):
            name, stated = parent["name"], parent.get("files")
            place = sources["models"].get(name)
            if not stated or place is None or not Path(place).exists():
                self._not_checked.append(f"{name}: {parent['model']} is not a folder here")
                continue
            try:
                found = file_digests(ModelSource(place), name)
            except DataError as error:
                self._problems.append(LineageProblem(place, error.message))
                continue
            self._num_checked += len(found)
            self._problems += _differences(Path(place), stated, found)

    def check_corpus(self, record: Mapping[str, Any], sources: Mapping[str, Any]) -> None:
        """Compare the prompt and text files of the corpus, where they are on this machine."""
        for k, part in enumerate(record["data"]["corpus"]):
            if "sha256" not in part:
                continue
            path = Path(sources["corpus"].get(str(k), ""))
            if not path.exists():
                self._not_checked.append(f"corpus.{k}: {part['file']} is not here")
                continue
            self._num_checked += 1
            if storage.digest_path(path) != part["sha256"]:
                self._problems.append(LineageProblem(str(path), CHANGED))

    def _compare(self, folder: Path, stated: Mapping[str, str]) -> None:
        """Compare files of a folder with their digests."""
        found = {
            name: storage.digest_file(folder / name) for name in stated if (folder / name).is_file()
        }
        self._num_checked += len(found)
        self._problems += _differences(folder, stated, found)


def _differences(
    folder: Path, stated: Mapping[str, str], found: Mapping[str, str]
) -> Iterator[LineageProblem]:
    for name in sorted(stated.keys() | found.keys()):
        if name not in found:
            yield LineageProblem(str(folder / name), MISSING)
        elif name not in stated:
            yield LineageProblem(str(folder / name), "not in the record")
        elif stated[name] != found[name]:
            yield LineageProblem(str(folder / name), CHANGED)
