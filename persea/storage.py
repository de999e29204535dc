"""Where bytes lie: publish whole files or none, digest them, create records only where none is, one run per folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from persea.errors import DataError, StorageError


def persea_home() -> Path:
    """Where persea keeps what it would otherwise make again: PERSEA_HOME, default ~/.cache/persea."""
    return Path(os.environ.get("PERSEA_HOME", "~/.cache/persea")).expanduser()


def digest_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


@contextmanager
def _raise_storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write: {error.strerror}",
            where=str(path),
            remedy="free space or choose another run folder, then run again: "
            "what is committed stays",
        ) from error


class Disk:
    """The calls that change what lies on a disk, and no other: what records them, fails them or dies between them sees everything.

    tests/disks.py has such disks.
    """

    def make(self, folder: Path) -> None:
        folder.mkdir()

    def create(self, path: Path) -> BinaryIO:
        return path.open("wb")

    def sync(self, file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())

    def replace(self, path: Path, source: Path) -> None:
        source.replace(path)

    def link(self, path: Path, source: Path) -> None:
        os.link(source, path)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


DISK = Disk()


def _make_folder(folder: Path) -> None:
    """Make a folder that is still there after a power loss: each new one is in a parent that was told to the disk."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        with suppress(FileExistsError):  # another process was quicker
            DISK.make(folder)
        DISK.sync_folder(folder.parent)


@contextmanager
def _temporary_file(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A file beside `path` to write to; synced when all is written, gone in the end."""
    _make_folder(path.parent)
    neighbour = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with DISK.create(neighbour) as file:
            yield file, neighbour
    finally:
        DISK.remove(neighbour)  # half of it, where the disk is full


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that is there whole or not at all, also after a power loss.

    write to a neighbour, fsync, rename, fsync the folder.
    """
    with _raise_storage_errors(path):
        with _temporary_file(path) as (file, neighbour):
            yield file
            DISK.sync(file)
            DISK.replace(path, neighbour)
        DISK.sync_folder(path.parent)


@contextmanager
def open_atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to write to that is there whole or not at all, also after a power loss. At `path` stands nothing yet, or an empty folder."""
    neighbour = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _raise_storage_errors(path):
        _make_folder(path.parent)
        shutil.rmtree(neighbour, ignore_errors=True)  # of a process of this number that was killed
        DISK.make(neighbour)
        try:
            yield neighbour
            for part in sorted(part for part in neighbour.rglob("*") if part.is_file()):
                with part.open("rb") as file:
                    DISK.sync(file)
            DISK.sync_folder(neighbour)
            DISK.replace(path, neighbour)
        finally:
            shutil.rmtree(neighbour, ignore_errors=True)
        DISK.sync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> str:
    """Publish bytes, whole or not at all; returns their sha256."""
    with open_atomic(path) as file:
        file.write(data)
    return digest_bytes(data)


def create_json_once(path: Path, record: Mapping[str, Any]) -> None:
    """Create a JSON record if there is none; the first one wins and a second is dropped."""
    with _raise_storage_errors(path):
        with _temporary_file(path) as (file, neighbour):
            file.write(_record_to_json(record).encode())
            DISK.sync(file)
            with suppress(FileExistsError):
                DISK.link(path, neighbour)
        DISK.sync_folder(path.parent)


def _record_to_json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1, sort_keys=True) + "\n"


def with_checksum(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the digest of everything it says."""
    return {**record, "seal": digest_bytes(_record_to_json(record).encode())}


def write_json_with_checksum(path: Path, record: Mapping[str, Any]) -> None:
    """Publish a record with its seal."""
    write_atomic(path, _record_to_json(with_checksum(record)).encode())


def read_json_with_checksum(path: Path, remedy: str) -> dict[str, Any]:
    """A record that was committed with its seal, without it. DataError where one byte is not as it was written."""
    found = read_json(path)
    record = {k: v for k, v in found.items() if k != "seal"} if isinstance(found, dict) else {}
    if path.read_bytes() != _record_to_json(with_checksum(record)).encode():
        raise DataError(
            "not as it was written: the record does not match its own seal",
            where=str(path),
            remedy=remedy,
        )
    return record


def write_json(path: Path, value: Any) -> str:
    """Publish as readable JSON; NaN is refused, it has no place in JSON."""
    return write_atomic(
        path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    )


def write_json_lines(path: Path, values: Iterable[Any]) -> str:
    """Publish as JSON lines."""
    return write_atomic(
        path,
        "".join(json.dumps(v, ensure_ascii=False, allow_nan=False) + "\n" for v in values).encode(),
    )


def unreadable_file_error(path: Path, error: OSError) -> StorageError:
    """What a disk, or a limit of this machine, says instead of the bytes: they may be as good as they were."""
    return StorageError(
        f"cannot read: {error.strerror}",
        where=str(path),
        remedy="look at the disk and at `ulimit -n`, then run again",
    )


def read_json(path: Path) -> Any:
    """A JSON file a stage wrote. DataError where it is missing or broken."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            "not there",
            where=str(path),
            remedy=f"run the stage that writes {path.parent.name}/ first",
        ) from error
    except OSError as error:
        raise unreadable_file_error(path, error) from error
    except ValueError as error:
        raise DataError(
            f"not JSON: {error}",
            where=str(path),
            remedy=f"delete {path.parent} and run its stage again",
        ) from error


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Hold a run folder; a second run on it is refused with the holder's pid and host."""
    path = folder / "lock"
    with _raise_storage_errors(path):
        _make_folder(folder)
        file = path.open("a+b", buffering=0)
    with file:
        if not _try_lock(
            file, fcntl.LOCK_EX, 5
        ):  # `holder` looks by holding it for some microseconds
            file.seek(0)
            raise StorageError(
                f"another run holds this folder ({file.read().decode().strip() or 'unknown'})",
                where=str(folder),
                remedy="wait for it, or give this run another --out",
            )
        with _raise_storage_errors(path):
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def digest_json(value: object) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()


def _try_lock(file: IO[bytes], operation: int, attempts: int) -> bool:
    for k in range(attempts):
        if k:
            time.sleep(0.05)
        with suppress(BlockingIOError):
            fcntl.flock(file, operation | fcntl.LOCK_NB)
            return True
    return False


def lock_holder(folder: Path) -> str:
    """Who holds a run folder, "pid 1 on host"; empty where nobody does, whatever the file says: a dead process holds nothing."""
    try:
        with (folder / "lock").open("rb") as file:
            return (
                ""
                if _try_lock(file, fcntl.LOCK_SH, 1)
                else file.read().decode().strip() or "unknown"
            )
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise unreadable_file_error(folder / "lock", error) from error
