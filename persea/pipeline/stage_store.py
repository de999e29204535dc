"""The stages in a run folder: run one, publish its output, and find out whether it is up to date.

A stage writes into a fresh folder, which replaces the stage's old folder when it is complete:
after a crash either the old output or the new one is there, and no file of an older recipe
remains. Parts that an interrupted stage resumes from (captured units, checkpoints) are kept, and
their stage writes in place: its record is removed first, then every file that is not resumable.
The record `done.json` is written last. It holds the stage's key, its version, and the sha256 of
each output.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persea import storage
from persea.errors import RefusedError, StorageError
from persea.pipeline.stage_keys import STAGE_NAMES, STAGE_VERSIONS, stage_key

if TYPE_CHECKING:
    from persea.vocab_extension.resize_model import ProgressCallback

RECORD_FILE = "done.json"
UNRECORDED_FOLDERS = {"checkpoints", "units"}  # units have commit records, checkpoints a digest


@dataclass(frozen=True)
class StageStore:
    """The stages of one run folder. Every method that writes needs the folder's lock.

    Attributes:
        folder: The run folder. A stage's output is in the subfolder of the stage's name.
    """

    folder: Path

    def read_record(self, stage: str) -> dict[str, Any]:
        """Read the record of a finished stage.

        Raises:
            DataError: The stage has not finished, or its record is damaged.
            RefusedError: Another version of persea wrote it.
        """
        record = self._read_any_version(stage)
        version, current = record.get("version", 0), STAGE_VERSIONS[stage]
        if version != current:
            raise RefusedError(
                f"written by version {version} of the stage {stage}; this persea has {current}",
                where=str(self.folder / stage),
                remedy="run the recipe again with another --out"
                if stage == "train"
                else f"run the stage again: persea {stage} RECIPE --out {self.folder}",
            )
        return record

    def _read_any_version(self, stage: str) -> dict[str, Any]:
        return storage.read_json_with_checksum(
            self.folder / stage / RECORD_FILE, "delete it and run the stage again"
        )

    def has_record(self, stage: str) -> bool:
        """Return whether a stage has finished, in any version."""
        return (self.folder / stage / RECORD_FILE).is_file()

    def refuse_other_versions(self, stages: Sequence[str] = STAGE_NAMES) -> None:
        """Raise if a finished stage was written by another version of persea.

        Raises:
            DataError: A record is damaged.
            RefusedError: A stage has another version. The message names it and the remedy.
        """
        for stage in stages:
            if self.has_record(stage):
                self.read_record(stage)

    def is_up_to_date(self, stage: str, key: str) -> bool:
        """Return whether a stage finished with this key and all its output files are unchanged.

        Raises:
            DataError: The record is damaged.
        """
        if not self.has_record(stage):
            return False
        record = self._read_any_version(stage)
        files = {self.folder / stage / name: sha for name, sha in record["outputs"].items()}
        return record["key"] == key and all(
            path.is_file() and storage.digest_file(path) == sha for path, sha in files.items()
        )

    def run(
        self,
        stage: str,
        inputs: object,
        work: Callable[[Path, ProgressCallback], None],
        progress: ProgressCallback,
        *,
        recipe_yaml: str,
        resumable: Sequence[str] = (),
        force: bool = False,
    ) -> None:
        """Run a stage unless it is up to date.

        A stage that refuses its own result (`check` below a floor) publishes its files without a
        record: they can be looked at, and the stage is not up to date.

        Args:
            stage: Name of the stage and of its folder.
            inputs: Everything that the output depends on, as JSON.
            work: Writes the output into the folder that it is given.
            progress: Called with the stage, the fraction done and a message.
            recipe_yaml: The recipe, written to the run folder when the stage starts.
            resumable: Files and folders that an interrupted run of the stage resumes from.
            force: Run it even if it is up to date, and over another recipe's student.

        Raises:
            RefusedError: A finished student of another recipe, base or capture would be
                overwritten.
        """
        key = stage_key(stage, inputs)
        if not force and self.is_up_to_date(stage, key):
            progress(stage, 1.0, "up to date")
            return
        if stage == "train" and not force:
            self.refuse_other_student(key, inputs)
        storage.write_atomic(self.folder / "recipe.yaml", recipe_yaml.encode())
        start = time.monotonic(), _cpu_seconds()
        progress(stage, 0.0, "")
        if resumable:
            folder = self._clear_in_place(stage, resumable)
            work(folder, progress)
            self._write_record(stage, folder, key, start)
        else:
            folder = self._make_fresh_folder(stage)
            try:
                work(folder, progress)
                self._write_record(stage, folder, key, start)
            except RefusedError:
                self._publish(stage)
                raise
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._publish(stage)
        progress(stage, 1.0, f"{time.monotonic() - start[0]:.0f} s")

    def recover(self) -> None:
        """Finish or undo the publication that a killed run left behind. Deletes its other files."""
        for stage in STAGE_NAMES:
            final, fresh, old = self._paths(stage)
            if (fresh / RECORD_FILE).is_file():  # complete: the run died before it was published
                if final.exists():
                    shutil.rmtree(old, ignore_errors=True)
                self._publish(stage)
            elif old.exists() and not final.exists():
                with _storage_errors(final):
                    storage.DISK.replace(final, old)
            for folder in (fresh, old):
                shutil.rmtree(folder, ignore_errors=True)

    # --- private ---

    def _paths(self, stage: str) -> tuple[Path, Path, Path]:
        """Return a stage's folder, the folder that it is written to, and the one it replaces."""
        return (
            self.folder / stage,
            self.folder / f".{stage}.new",
            self.folder / f".{stage}.old",
        )

    def _make_fresh_folder(self, stage: str) -> Path:
        _, fresh, _ = self._paths(stage)
        shutil.rmtree(fresh, ignore_errors=True)
        with _storage_errors(fresh):
            storage.DISK.make(fresh)
        return fresh

    def _publish(self, stage: str) -> None:
        """Replace a stage's folder by its fresh one. `recover` completes it after a crash."""
        final, fresh, old = self._paths(stage)
        with _storage_errors(final):
            storage.DISK.sync_folder(fresh)
            if final.exists():
                storage.DISK.replace(old, final)
            storage.DISK.replace(final, fresh)
            storage.DISK.sync_folder(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def _clear_in_place(self, stage: str, resumable: Sequence[str]) -> Path:
        """Delete a stage's record, then everything in its folder that is not resumable."""
        folder = self.folder / stage
        with _storage_errors(folder):
            storage.DISK.remove(folder / RECORD_FILE)
            for path in sorted(folder.glob("*")):
                if path.name in resumable:
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            for partial in folder.rglob(".*.tmp"):  # of a killed run: the lock excludes a live one
                partial.unlink()
        return folder

    def _write_record(self, stage: str, folder: Path, key: str, start: tuple[float, float]) -> None:
        outputs = {
            str(p.relative_to(folder)): storage.digest_file(p)
            for p in sorted(folder.rglob("*"))
            if p.is_file() and not UNRECORDED_FOLDERS & set(p.relative_to(folder).parts)
        }
        record = {
            "key": key,
            "version": STAGE_VERSIONS[stage],
            "seconds": round(time.monotonic() - start[0], 2),
            "cpu_seconds": round(_cpu_seconds() - start[1], 2),
            "outputs": outputs,
        }
        storage.write_json_with_checksum(folder / RECORD_FILE, record)

    def refuse_other_student(self, key: str, inputs: object) -> None:
        """Raise if a finished student of another key would be overwritten.

        Raises:
            RefusedError: It would. The message names what differs.
        """
        if not self.has_record("train"):
            return
        record = self._read_any_version("train")
        if record["key"] == key:
            return
        from persea.training.checkpoint import describe_input_changes

        folder = self.folder / "train"
        different = describe_input_changes(folder, inputs) if isinstance(inputs, Mapping) else ""
        raise RefusedError(
            "the folder holds a finished student of another recipe, base or capture "
            f"({different or 'no checkpoint records the difference'})",
            where=str(folder / "student"),
            remedy=f"give this run another --out, or delete {folder}",
        )


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write: {error.strerror}",
            where=str(path),
            remedy="free space or choose another run folder, then run again: committed units and "
            "checkpoints stay",
        ) from error


def _cpu_seconds() -> float:
    """Return the seconds that this process and its ended children have computed."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system
