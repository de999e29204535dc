"""Captured units that several runs share: a second run of the same prompts asks no teacher.

A unit's name is a digest of everything that determines its bytes: the prompts, the teacher's
weights, tokenizer and template, and the capture's settings. So equal names mean equal units,
whichever run wrote them. Units are hard links where the file system allows it, and take no room
twice; elsewhere they are copies.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from persea import storage
from persea.cache.canaries import PAIRS_FOLDER
from persea.cache.maintenance import committed_units
from persea.cache.unit import is_committed, read_record
from persea.errors import DataError, StorageError

# what a file system answers that has no hard links, or none between these two folders
NO_LINK_ERRORS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES)


def default_store_folder() -> Path:
    """Return the store of all runs of this user: PERSEA_HOME/captures."""
    return storage.persea_home() / "captures"


@dataclass(frozen=True)
class SharedStore:
    """A folder of captured units that runs take units from and add units to.

    Attributes:
        folder: The store. It holds one cache folder for local teachers, and one for each model
            that a server was seen to run: a unit's name does not hold what runs behind an address.

    Example:
        >>> from pathlib import Path
        >>> SharedStore(Path("no-such-store")).size()
        (0, 0, 0)
    """

    folder: Path

    def fetch(self, name: str, into: Path, served_model: str = "") -> bool:
        """Take a unit into a run's cache folder, if the store has it.

        Every byte is checked first. A damaged unit leaves the store, and is captured again.

        Args:
            name: Name of the unit.
            into: The run's cache folder.
            served_model: Digest of the model that the teacher's server runs; "" = a local teacher.

        Returns:
            Whether the run has the unit now.

        Raises:
            StorageError: The run's folder cannot be written.
        """
        source = self._cache_folder(served_model)
        if not is_committed(source, name):
            return False
        try:
            record = read_record(source, name)
            path = _unit_file(source, name)
            is_intact = path.is_file() and storage.digest_file(path) == record["sha256"]
        except (DataError, OSError):
            is_intact = False
        if not is_intact:
            _delete_unit(source, name)
            return False
        place_unit(name, source, into)
        return True

    def publish(self, name: str, source: Path, served_model: str = "") -> None:
        """Add a unit that a run captured.

        Without a unit of a server with failed requests: the next run may have more luck.

        Raises:
            StorageError: The store cannot be written.
        """
        folder = self._cache_folder(served_model)
        has_failures = served_model and read_record(source, name)["quarantine"]
        if not has_failures and not is_committed(folder, name):
            place_unit(name, source, folder)

    def size(self) -> tuple[int, int, int]:
        """Return the number of units, their bytes, and the bytes that no run folder shares."""
        sizes = [_unit_file(folder, name).stat() for folder, name in self._units()]
        alone = sum(at.st_size for at in sizes if at.st_nlink == 1)
        return len(sizes), sum(at.st_size for at in sizes), alone

    def prune(self) -> tuple[int, int]:
        """Delete the units that no run folder shares by a hard link.

        Returns:
            How many units were deleted, and their bytes.

        Raises:
            StorageError: The store cannot be written.
        """
        num_units = num_bytes = 0
        for folder, name in list(self._units()):
            at = _unit_file(folder, name).stat()
            if at.st_nlink == 1:
                _delete_unit(folder, name)
                num_units, num_bytes = num_units + 1, num_bytes + at.st_size
        return num_units, num_bytes

    def _cache_folder(self, served_model: str) -> Path:
        return self.folder / (served_model[:32] or "local")

    def _units(self) -> Iterator[tuple[Path, str]]:
        for commits in sorted(self.folder.glob("*/commits")):
            for name in committed_units(commits.parent):
                if _unit_file(commits.parent, name).is_file():
                    yield commits.parent, name


def _unit_file(folder: Path, name: str) -> Path:
    return folder / "units" / f"{name}.safetensors"


def place_unit(name: str, source: Path, into: Path) -> None:
    """Link or copy a unit's file and its canary pairs, then create its commit record."""
    path, unit_file = _unit_file(into, name), _unit_file(source, name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.DISK.remove(path)  # without a record: of a run that was killed, or damaged
        with suppress(FileExistsError):  # another run placed it just now
            storage.DISK.link(path, unit_file)
        storage.DISK.sync_folder(path.parent)
    except OSError as error:
        if error.errno not in NO_LINK_ERRORS:
            raise StorageError(
                f"cannot write: {error.strerror}",
                where=str(path),
                remedy="free space, then run again: committed units stay",
            ) from error
        with unit_file.open("rb") as whole, storage.open_atomic(path) as copy:
            shutil.copyfileobj(whole, copy, 1 << 20)
    pairs = source / PAIRS_FOLDER / f"{name}.json"
    if pairs.is_file():
        storage.write_atomic(into / PAIRS_FOLDER / pairs.name, pairs.read_bytes())
    record = storage.with_checksum(read_record(source, name))
    storage.create_json_once(into / "commits" / f"{name}.json", record)


def _delete_unit(folder: Path, name: str) -> None:
    """Delete a unit's record, then its file."""
    storage.DISK.remove(folder / "commits" / f"{name}.json")
    storage.DISK.remove(_unit_file(folder, name))
