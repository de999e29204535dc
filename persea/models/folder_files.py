"""Check the files of a model folder before any library reads them.

Only regular files inside the folder are read: no link that leads outside, no FIFO and no device,
which would hang a reader or copy somebody's file into a student. A snapshot in the hub's cache
consists of links into the cache's own `blobs`, which are allowed.
"""

from __future__ import annotations

import os
import stat
from functools import lru_cache
from pathlib import Path

from persea.errors import DataError
from persea.models.config_files import read_json_config

TEMPLATES_FOLDER = "additional_chat_templates"
# Files that hold one JSON object each.
CONFIG_NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
# Names of files that persea or transformers opens.
READ_SUFFIXES = (".json", ".jinja", ".safetensors", ".model", ".tiktoken", ".txt", ".md", ".gguf")
MAX_CONFIG_BYTES = 32 << 20
# The largest text file of a model is its tokenizer.json: 33 MB for 262,144 tokens.
MAX_TEXT_BYTES = 256 << 20
MAX_TEMPLATE_BYTES = 1 << 20
UNLIMITED_SUFFIXES = (".safetensors", ".gguf")
FETCH_AGAIN = "fetch the model again"


def refuse_unsafe_files(folder: Path, where: str) -> None:
    """Refuse a model folder whose files cannot be read safely.

    Args:
        folder: The folder. Its own path may contain links.
        where: The place for error messages.

    Raises:
        DataError: An entry is a link out of the folder or to nothing, or is neither a file nor a
            folder; a file that is read is a folder or too large; or a configuration is no JSON
            object.

    Example:
        >>> refuse_unsafe_files(Path("saplings/qwen-sapling"), "teachers.0")
    """
    paths = sorted(folder.iterdir())
    templates = folder / TEMPLATES_FOLDER
    if templates.is_dir():
        if not _is_inside(templates.resolve(), folder.resolve()):
            raise _leads_outside(templates, where)
        paths += sorted(templates.iterdir())
    _refuse_unsafe(folder, where, tuple((path, _stats(path)) for path in paths))


def _stats(path: Path) -> tuple[int, ...]:
    """Return what changes when an entry is replaced or written."""
    found = path.lstat()
    return (found.st_mode, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@lru_cache(maxsize=256)
def _refuse_unsafe(
    folder: Path, where: str, entries: tuple[tuple[Path, tuple[int, ...]], ...]
) -> None:
    """Check the entries of a folder; once a process for the same state of the folder."""
    root = folder.resolve()
    for path, _ in entries:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            mode = _target_mode(path, root, where)
        is_read = path.suffix.lower() in READ_SUFFIXES
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise DataError(
                f"{path} is no regular file", where=where, remedy="delete it from the folder"
            )
        if stat.S_ISDIR(mode):
            if is_read:
                raise DataError(
                    f"{path} is a folder and not a file", where=where, remedy=FETCH_AGAIN
                )
            continue
        if is_read:
            _refuse_large_file(path, where)
        if path.name in CONFIG_NAMES:
            read_json_config(path, where)


def _target_mode(path: Path, root: Path, where: str) -> int:
    """Return the mode of a link's target, which must be inside the folder."""
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop, before Python 3.13
        raise DataError(
            f"{path} is a link to nothing", where=where, remedy="delete it or fetch the model again"
        ) from error
    if stat.S_ISDIR(mode) and path.suffix.lower() not in READ_SUFFIXES:
        return mode  # nothing in it is read
    # A snapshot of the hub's cache: models--A--B/snapshots/COMMIT beside models--A--B/blobs
    blobs = root.parent.parent / "blobs"
    is_blob = root.parent.name == "snapshots" and _is_inside(target, blobs)
    if not _is_inside(target, root) and not is_blob:
        raise _leads_outside(path, where)
    return mode


def _leads_outside(path: Path, where: str) -> DataError:
    return DataError(
        f"{path} is a link that leads out of the model's folder",
        where=where,
        remedy=f"put the file itself there: cp --remove-destination {os.readlink(path)!r} {path}",
    )


def _is_inside(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents


def _refuse_large_file(path: Path, where: str) -> None:
    suffix, size = path.suffix.lower(), path.stat().st_size
    if suffix in UNLIMITED_SUFFIXES:
        return
    limit = MAX_TEMPLATE_BYTES if suffix == ".jinja" else MAX_TEXT_BYTES
    if path.name in CONFIG_NAMES:
        limit = MAX_CONFIG_BYTES
    if size > limit:
        raise DataError(
            f"{path} has {size:,} bytes; at most {limit:,} are read",
            where=where,
            remedy=FETCH_AGAIN,
        )
