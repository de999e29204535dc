"""Captured units in an object store: any path of fsspec, such as s3://bucket/persea.

An object store has no rename and no lock, and its lists may lag behind. Therefore the file of a
unit is an object named by its own sha256, and the commit record, written after it, names that
sha256: whichever record is found, its object is there and whole. A record is created only if there
is none, where the store can do that in one step; nothing is ever looked up in a list.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from persea import storage
from persea.cache.unit import CACHE_FORMAT, read_record
from persea.errors import DataError, MissingRequirementError, RecipeError, StorageError

# Protocols whose fsspec file system sends the condition to the store. Elsewhere fsspec looks and
# then writes, so that two writers may both succeed.
CONDITIONAL_PROTOCOLS = ("s3", "s3a")
COPY_BYTES = 8 << 20  # read at once
SHA_CHARS = 16  # of the sha256 in an object's name


def is_object_store(store: str) -> bool:
    """Return whether a recipe's `capture.store` is a URL of fsspec and no folder.

    Example:
        >>> is_object_store("s3://bucket/persea"), is_object_store("/mnt/captures")
        (True, False)
    """
    return "://" in store


@dataclass(frozen=True)
class ObjectStore:
    """Captured units in an object store, shared by runs as those of `SharedStore`.

    Attributes:
        url: Root of the store, as fsspec understands it.
    """

    url: str

    @cached_property
    def _file_system(self) -> tuple[Any, str]:
        """The file system and the root's path in it."""
        try:
            import fsspec

            protocol = self.url.partition("://")[0]
            options = {"auto_mkdir": True} if protocol in ("file", "local") else {}
            file_system, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **options)
        except ImportError as error:
            raise MissingRequirementError(
                f"no file system for {self.url.partition('://')[0]}: {error}",
                where="capture.store",
                remedy="pip install 'persea[s3]' for s3://; "
                "fsspec names the package of each other protocol",
            ) from error
        except ValueError as error:
            raise RecipeError(
                f"not a path of fsspec: {error}",
                where="capture.store",
                remedy="write a folder, or such as s3://bucket/folder",
            ) from error
        if "hf" in _protocols(file_system) and not root.startswith("buckets/"):
            raise RecipeError(
                "a repository of the hub makes a commit of every file",
                where=f"capture.store: {self.url}",
                remedy="write a bucket: hf://buckets/NAMESPACE/BUCKET/FOLDER",
            )
        return file_system, root.rstrip("/")

    @cached_property
    def creates_once(self) -> bool:
        """Whether the store refuses, in one step, to create an object that exists.

        A probe shows it: some servers ignore the condition and answer that all is well. Where it is
        False, two runs that capture the same unit at the same time may both write a record, and the
        later one counts; either is whole.

        Raises:
            StorageError: The store cannot be written.
        """
        file_system, root = self._file_system
        if not set(_protocols(file_system)) & set(CONDITIONAL_PROTOCOLS):
            return False
        path = f"{root}/probe-{secrets.token_hex(8)}"
        with self._storage_errors(path):
            file_system.pipe_file(path, b"1", mode="create")
            try:
                file_system.pipe_file(path, b"2", mode="create")
            except FileExistsError:
                return True
            finally:
                file_system.rm_file(path)
        return False

    def fetch(self, name: str, into: Path, served_model: str = "") -> bool:
        """Take a unit into a run's cache folder, if the store has it; every byte is checked.

        A damaged unit leaves the store, and is captured again.

        Args:
            name: Name of the unit.
            into: The run's cache folder.
            served_model: Digest of the model that the teacher's server runs; "" = a local teacher.

        Returns:
            Whether the run has the unit now.

        Raises:
            StorageError: The store cannot be read, or the run's folder cannot be written.
        """
        file_system, _ = self._file_system
        record_path = self._record_path(name, served_model)
        with self._storage_errors(record_path):
            try:
                record = _parse_record(file_system.cat_file(record_path), name)
            except FileNotFoundError:
                return False
        unit_path = self._unit_path(name, str(record.get("sha256", "")), served_model)
        is_intact = bool(record) and self._copy_checked(unit_path, record, into, name)
        if not is_intact:
            self._remove(record_path)
            self._remove(unit_path)
            return False
        storage.create_json_once(into / "commits" / f"{name}.json", storage.with_checksum(record))
        return True

    def publish(self, name: str, source: Path, served_model: str = "") -> bool:
        """Add a unit that a run captured; the first record of a unit stays.

        Without a unit of a server with failed requests: the next run may have more luck.

        Returns:
            Whether this unit's record is the store's.

        Raises:
            StorageError: The store cannot be written.
        """
        file_system, _ = self._file_system
        record = read_record(source, name)
        if served_model and record["quarantine"]:
            return False
        unit_path = self._unit_path(name, record["sha256"], served_model)
        record_path = self._record_path(name, served_model)
        data = (json.dumps(storage.with_checksum(record), indent=1, sort_keys=True) + "\n").encode()
        with self._storage_errors(record_path):
            if not self.creates_once and file_system.exists(record_path):
                return False
            file_system.put_file(str(source / "units" / f"{name}.safetensors"), unit_path)
            if not self.creates_once:
                file_system.pipe_file(record_path, data)
                return True
            try:
                file_system.pipe_file(record_path, data, mode="create")
            except FileExistsError:
                winner = _parse_record(file_system.cat_file(record_path), name)
                if winner.get("sha256") != record["sha256"]:
                    self._remove(unit_path)
                return False
        return True

    def write_file(self, path: str, data: bytes) -> None:
        """Write a small object below the root, over an earlier one.

        Raises:
            StorageError: The store cannot be written.
        """
        file_system, root = self._file_system
        with self._storage_errors(path):
            file_system.pipe_file(f"{root}/{path}", data)

    def read_file(self, path: str) -> bytes | None:
        """Return an object below the root; None if it is not there.

        Raises:
            StorageError: The store cannot be read.
        """
        file_system, root = self._file_system
        with self._storage_errors(path):
            try:
                return bytes(file_system.cat_file(f"{root}/{path}"))
            except (FileNotFoundError, IsADirectoryError):
                return None

    def list_folders(self, path: str) -> list[str]:
        """Return the names of the folders in a folder, sorted; for people alone, as lists lag.

        Raises:
            StorageError: The store cannot be read.
        """
        file_system, root = self._file_system
        with self._storage_errors(path):
            try:
                found = file_system.ls(f"{root}/{path}", detail=True)
            except FileNotFoundError:
                return []
        return sorted(
            str(one["name"]).rstrip("/").rpartition("/")[2]
            for one in found
            if one["type"] == "directory"
        )

    def _record_path(self, name: str, served_model: str) -> str:
        return f"{self._file_system[1]}/{served_model[:32] or 'local'}/commits/{name}.json"

    def _unit_path(self, name: str, sha256: str, served_model: str) -> str:
        folder = f"{self._file_system[1]}/{served_model[:32] or 'local'}/units"
        return f"{folder}/{name}-{sha256[:SHA_CHARS]}.safetensors"

    def _copy_checked(self, path: str, record: dict[str, Any], into: Path, name: str) -> bool:
        """Copy a unit's object into a cache folder; False if it is not what its record says."""
        file_system, _ = self._file_system
        sha = hashlib.sha256()
        try:
            with (
                self._storage_errors(path),
                file_system.open(path, "rb", block_size=COPY_BYTES) as source,
                storage.open_atomic(into / "units" / f"{name}.safetensors") as copy,
            ):
                while block := source.read(COPY_BYTES):
                    sha.update(block)
                    copy.write(block)
                if sha.hexdigest() != record["sha256"]:
                    raise _DamagedError
        except (FileNotFoundError, _DamagedError):
            return False
        return True

    def _remove(self, path: str) -> None:
        file_system, _ = self._file_system
        with self._storage_errors(path), contextlib.suppress(FileNotFoundError):
            file_system.rm_file(path)

    @contextlib.contextmanager
    def _storage_errors(self, path: str) -> Iterator[None]:
        """Turn what a store's library raises into one line; a missing object passes unchanged."""
        try:
            yield
        except (FileNotFoundError, FileExistsError, StorageError, DataError, _DamagedError):
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:300] or repr(error)
            raise StorageError(
                f"the store fails: {type(error).__name__}: {text}",
                where=f"{self.url}: {path}",
                remedy="check its address, key, free space and permissions, then run again: "
                "committed units stay",
            ) from error


def _protocols(file_system: Any) -> tuple[str, ...]:
    """Return the protocols of a file system of fsspec."""
    found = file_system.protocol
    return (found,) if isinstance(found, str) else tuple(found)


class _DamagedError(Exception):
    """The bytes of an object are not those that its record names."""


def _parse_record(data: bytes, name: str) -> dict[str, Any]:
    """Return a commit record without its checksum; {} if it is damaged or of another unit."""
    try:
        stored = json.loads(data)
        record = {k: v for k, v in stored.items() if k != "seal"}
        is_whole = stored == storage.with_checksum(record)
    except (ValueError, AttributeError):
        return {}
    is_own = record.get("unit") == name and record.get("format") == CACHE_FORMAT
    return record if is_whole and is_own else {}
