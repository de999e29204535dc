"""Atomic, checksummed file writes, and one run per folder.

Data goes to a temporary file in the same folder, which is synced and renamed; then the folder is
synced. So after a crash or a power loss a file is complete or absent.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from persea.errors import DataError, StorageError

MAX_INPUT_BYTES = 8 << 30  # of a file that a user named
LOCK_ATTEMPTS = 5  # `lock_holder` holds the lock for some microseconds while it looks
LOCK_RETRY_DELAY_S = 0.05


def persea_home() -> Path:
    """Return the folder for files that persea would otherwise compute again, such as event maps.

    It is the environment variable PERSEA_HOME, by default ~/.cache/persea.
    """
    return Path(os.environ.get("PERSEA_HOME", "~/.cache/persea")).expanduser()


def digest_bytes(data: bytes) -> str:
    """Return the sha256 of bytes as hexadecimal text."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal text."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def digest_path(path: Path) -> str:
    """Return the sha256 of a file, or of the names and digests of all files in a folder."""
    if not path.is_dir():
        return digest_file(path)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return digest_json([[str(p.relative_to(path)), digest_file(p)] for p in files])


def read_input_bytes(path: Path, max_bytes: int = MAX_INPUT_BYTES) -> bytes:
    """Read a file that a user named: a regular file of a bounded size.

    A FIFO would wait for a writer, a device would never end.

    Raises:
        OSError: The file cannot be read, is no regular file, or is too large.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError as error:  # NUL in the name
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    with open(descriptor, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"Larger than {max_bytes:,} bytes", str(path))
    return data


@contextmanager
def _raise_storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write: {error.strerror}",
            where=str(path),
            remedy="free space or choose another run folder, then run again: "
            "committed work is kept",
        ) from error


class Disk:
    """All calls that change the disk.

    Tests replace `DISK` to record calls, fail them, or stop between them (tests/disks.py).
    """

    def make(self, folder: Path) -> None:
        """Create a folder."""
        folder.mkdir()

    def create(self, path: Path) -> BinaryIO:
        """Open a new file for writing."""
        return path.open("wb")

    def open_at(self, path: Path, offset: int) -> BinaryIO:
        """Open a file, new or not, cut it to `offset` bytes, and go to its end."""
        file = path.open("r+b" if path.exists() else "wb")
        file.truncate(offset)
        file.seek(offset)
        return file

    def sync(self, file: BinaryIO) -> None:
        """Flush a file to the disk."""
        file.flush()
        os.fsync(file.fileno())

    def replace(self, path: Path, source: Path) -> None:
        """Rename `source` to `path`; an existing file is replaced."""
        source.replace(path)

    def link(self, path: Path, source: Path) -> None:
        """Create `path` as a hard link to `source`. Raises FileExistsError if `path` exists."""
        os.link(source, path)

    def remove(self, path: Path) -> None:
        """Delete a file if it exists."""
        path.unlink(missing_ok=True)

    def sync_folder(self, folder: Path) -> None:
        """Flush the entries of a folder to the disk."""
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


DISK = Disk()


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents, each synced in its parent to survive a power loss."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        with suppress(FileExistsError):  # another process created it first
            DISK.make(folder)
        DISK.sync_folder(folder.parent)


@contextmanager
def _temporary_file(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a temporary file in the folder of `path`; delete it at the end, also on a full disk."""
    _make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with DISK.create(temporary) as file:
            yield file, temporary
    finally:
        DISK.remove(temporary)  # still there, and incomplete, if the disk is full


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that is complete or absent, also after a power loss.

    Raises:
        StorageError: The file cannot be written.
    """
    with _raise_storage_errors(path):
        with _temporary_file(path) as (file, temporary):
            yield file
            DISK.sync(file)
            DISK.replace(path, temporary)
        DISK.sync_folder(path.parent)


@contextmanager
def open_atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill that is complete or absent at the end, also after a power loss.

    At `path` there must be nothing, or an empty folder.

    Raises:
        StorageError: The folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _raise_storage_errors(path):
        _make_folder(path.parent)
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process of the same id
        DISK.make(temporary)
        try:
            yield temporary
            for entry in sorted(temporary.rglob("*"), reverse=True):  # deepest first
                if entry.is_dir():
                    DISK.sync_folder(entry)
                else:
                    with entry.open("rb") as file:
                        DISK.sync(file)
            DISK.sync_folder(temporary)
            DISK.replace(path, temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        DISK.sync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> str:
    """Write bytes to a file, complete or not at all, and return their sha256."""
    with open_atomic(path) as file:
        file.write(data)
    return digest_bytes(data)


def append_bytes(path: Path, offset: int, data: bytes) -> None:
    """Cut a file to `offset` bytes and append data.

    Neither atomic nor synced: for a log whose tail can be written again.

    Raises:
        StorageError: The file cannot be written.
    """
    with _raise_storage_errors(path):
        _make_folder(path.parent)
        with DISK.open_at(path, offset) as file:
            file.write(data)


def sync_file(path: Path) -> None:
    """Flush a file and its entry in its folder to the disk.

    Raises:
        StorageError: The file cannot be synced.
    """
    with _raise_storage_errors(path):
        with path.open("r+b") as file:
            DISK.sync(file)
        DISK.sync_folder(path.parent)


def create_json_once(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON record unless the file exists: the first record wins, later ones are dropped."""
    with _raise_storage_errors(path):
        with _temporary_file(path) as (file, temporary):
            file.write(_record_to_json(record).encode())
            DISK.sync(file)
            with suppress(FileExistsError):
                DISK.link(path, temporary)
        DISK.sync_folder(path.parent)


def _record_to_json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1, sort_keys=True) + "\n"


def with_checksum(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with a checksum of its other entries, under the key "seal"."""
    return {**record, "seal": digest_bytes(_record_to_json(record).encode())}


def write_json_with_checksum(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON record with its checksum."""
    write_atomic(path, _record_to_json(with_checksum(record)).encode())


def read_json_with_checksum(path: Path, remedy: str) -> dict[str, Any]:
    """Read a record that `write_json_with_checksum` wrote, without its checksum.

    Raises:
        DataError: The file is missing, is not JSON, or differs from the written record in one byte.
        StorageError: The file cannot be read.
    """
    stored = read_json(path)
    record = {k: v for k, v in stored.items() if k != "seal"} if isinstance(stored, dict) else {}
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable_file_error(path, error) from error
    if content != _record_to_json(with_checksum(record)).encode():
        raise DataError(
            "the record does not match its own checksum: the file was changed after it was written",
            where=str(path),
            remedy=remedy,
        )
    return record


def parse_strict_json(text: str | bytes) -> Any:
    """Parse JSON as the standard defines it.

    Raises:
        ValueError: `text` is not JSON, or contains NaN or Infinity, which `json.loads` accepts.
        RecursionError: The values are nested too deeply.
    """
    return json.loads(text, parse_constant=_refuse_json_constant)


def _refuse_json_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def write_json(path: Path, value: Any) -> str:
    """Write a value as indented JSON and return the sha256.

    Raises:
        ValueError: The value contains NaN or Infinity.
        StorageError: The file cannot be written.
    """
    return write_atomic(
        path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    )


def write_json_lines(path: Path, values: Iterable[Any]) -> str:
    """Write values as JSON lines and return the sha256.

    Raises:
        ValueError: A value contains NaN or Infinity.
        StorageError: The file cannot be written.
    """
    return write_atomic(
        path,
        "".join(json.dumps(v, ensure_ascii=False, allow_nan=False) + "\n" for v in values).encode(),
    )


def unreadable_file_error(path: Path, error: OSError) -> StorageError:
    """Return the error for a file that the system cannot read; the file itself may be intact."""
    return StorageError(
        f"cannot read: {error.strerror}",
        where=str(path),
        remedy="check the disk and `ulimit -n`, then run again",
    )


STAGE_FOLDERS = ("check", "audition", "capture", "train", "evaluate", "lineage", "report")


def _stage_remedy(path: Path) -> str:
    """Return the remedy for a missing file: the command of the stage whose folder it is in."""
    folder = path.parent.name
    stage = next((part for part in reversed(path.parts[:-1]) if part in STAGE_FOLDERS), "")
    command = f": `persea {stage} RECIPE`" if stage else ""
    return f"run the stage that writes {stage or folder}/ first{command}"


def read_json(path: Path) -> Any:
    """Read a JSON file that a stage wrote.

    Raises:
        DataError: The file is missing or not JSON.
        StorageError: The file cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            "not there",
            where=str(path),
            remedy=_stage_remedy(path),
        ) from error
    except OSError as error:
        raise unreadable_file_error(path, error) from error
    except ValueError as error:
        raise DataError(
            f"not JSON: {error}",
            where=str(path),
            remedy=f"delete {path} and run again the stage that writes it",
        ) from error


def read_text_file(path: Path) -> str:
    """Read a text file that a stage wrote.

    Raises:
        DataError: The file is missing.
        StorageError: The file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError("not there", where=str(path), remedy=_stage_remedy(path)) from error
    except OSError as error:
        raise unreadable_file_error(path, error) from error


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder. A second run gets the process id and host of the first.

    Raises:
        StorageError: Another run holds the folder, or the lock file cannot be written.
    """
    path = folder / "lock"
    with _raise_storage_errors(path):
        _make_folder(folder)
        file = _open_lock(path, os.O_RDWR)
    with file:
        if not _try_lock(file, fcntl.LOCK_EX, LOCK_ATTEMPTS):
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


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, after waiting for a process that holds it.

    Raises:
        StorageError: The lock file cannot be written.
    """
    with _raise_storage_errors(path):
        _make_folder(path.parent)
        file = _open_lock(path, os.O_WRONLY)
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open_lock(path: Path, mode: int) -> IO[bytes]:
    """Open a lock file, new or not; a link in its place is refused, and not emptied."""
    flags = mode | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(path, flags, 0o666), "r+b" if mode == os.O_RDWR else "ab", buffering=0)


def digest_json(value: object) -> str:
    """Return the sha256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()


def _try_lock(file: IO[bytes], operation: int, attempts: int) -> bool:
    for attempt in range(attempts):
        if attempt:
            time.sleep(LOCK_RETRY_DELAY_S)
        with suppress(BlockingIOError):
            fcntl.flock(file, operation | fcntl.LOCK_NB)
            return True
    return False


def lock_holder(folder: Path) -> str:
    """Return the holder of a run folder as "pid 1 on host"; "" if no live process holds it.

    Raises:
        StorageError: The lock file cannot be read.
    """
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
