"""Open a GGUF file as a model folder in Hugging Face form, converted once and kept.

The tokenizer and the weights are two folders below PERSEA_HOME/gguf, so that a command which needs
no weights converts none. Their name contains the digest of the file and the versions of what
converts it. A folder is complete or absent, holds the digest of each of its files, and is made anew
where one of them differs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from persea.errors import DataError, StorageError
from persea.models.gguf_header import (
    GgufHeader,
    describe_types,
    has_only_types,
    read_header,
    write_without_tokens,
)
from persea.models.gguf_progress import conversion_progress
from persea.models.gguf_tokenizer import (
    build_tokenizer,
    save_stop_tokens,
    save_tokenizer,
    tokenizer_notes,
)
from persea.models.gguf_weights import Step, convert_weights, weight_notes
from persea.storage import (
    digest_file,
    digest_json,
    hold_lock,
    open_atomic_folder,
    persea_home,
    read_json_with_checksum,
    write_json_with_checksum,
)

FORMAT = 1  # rises where the same file would be converted to another tokenizer or other weights
RECORD_FILE = "gguf.json"
CONVERTING_PACKAGES = ("transformers", "gguf", "tokenizers")
MAX_FLOAT32_WEIGHTS = 2_000_000_000  # 8 GB; larger models are kept in bfloat16
# Architectures whose number of tokens transformers reads from the metadata `vocab_size`.
NAMED_VOCAB_SIZE = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
MAX_COPIED_BYTES = 1_000_000_000
MAX_KEPT_HEADERS = 16
SPARE_BYTES = 200_000_000  # the tokenizer of 262,144 tokens, and some room


@lru_cache(maxsize=64)
def _digest_of(path: Path, size: int, modified_ns: int, inode: int) -> str:
    return digest_file(path)


def gguf_digest(path: Path) -> str:
    """Return the sha256 of a GGUF file; it is computed once a process."""
    stat = path.stat()
    return _digest_of(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


_HEADERS: dict[tuple[Path, str], GgufHeader] = {}


def gguf_header(path: Path, where: str) -> GgufHeader:
    """Return the header of a GGUF file; it is read once a process, see `read_header`."""
    key = (path, gguf_digest(path))
    if key not in _HEADERS:
        if len(_HEADERS) >= MAX_KEPT_HEADERS:
            _HEADERS.pop(next(iter(_HEADERS)))
        _HEADERS[key] = read_header(path, where)
    return _HEADERS[key]


def stored_dtype(header: GgufHeader) -> str:
    """Return the type in which the weights are kept: "float32" or "bfloat16".

    float32 holds every dequantised weight exactly. bfloat16 is enough for a file whose matrices are
    bfloat16, and is taken for more than MAX_FLOAT32_WEIGHTS weights, which it rounds by at most
    0.4 %.
    """
    exact = has_only_types(header.tensors, "BF16")
    return "bfloat16" if exact or header.num_weights > MAX_FLOAT32_WEIGHTS else "float32"


def converted_bytes(header: GgufHeader) -> int:
    """Return the size of the converted weights in bytes."""
    return header.num_weights * (4 if stored_dtype(header) == "float32" else 2)


def gguf_fingerprint(path: Path, options: Sequence[str]) -> str:
    """Return a sha256 that changes when the file, its conversion or its loading changes.

    Args:
        path: The file.
        options: The recipe's `quantize` and `precision` for the dequantised weights, where set.
    """
    return digest_json(["gguf", FORMAT, gguf_digest(path), *(options or ["none"])])


def describe_gguf(path: Path, where: str) -> dict[str, Any]:
    """Return what the lineage records of a GGUF file: digest, quantisation, name and licence."""
    header = gguf_header(path, where)
    return {
        "file": path.name,
        "sha256": gguf_digest(path),
        "quantization": header.type_counts,
        "name": header.model_name,
        "licence": header.licence,
    }


def gguf_note(path: Path, where: str) -> str:
    """Return, in one sentence for people, what was converted and what the conversion lost."""
    header = gguf_header(path, where)
    source = f"converted from {path.name}, {describe_types(header.type_counts)}, to "
    notes = [*tokenizer_notes(header), *weight_notes(header)]
    return "; ".join([source + stored_dtype(header), *notes]) + "."


def tokenizer_folder(path: Path, where: str) -> Path:
    """Return a folder with the tokenizer of a GGUF file; it is rebuilt at the first call.

    Args:
        path: The file.
        where: The place for error messages.

    Raises:
        DataError: The file is damaged, or persea cannot rebuild its tokenizer.
        StorageError: PERSEA_HOME cannot be written.
    """
    header = gguf_header(path, where)

    def make(folder: Path, step: Step) -> None:
        step("tokenizer", 0.0)
        save_tokenizer(header, build_tokenizer(header, where), folder)

    return _kept(header, "tokenizer", make)


def model_folder(path: Path, where: str) -> Path:
    """Return a model folder of a GGUF file: weights, configuration, and tokenizer if it has one.

    The weights are dequantised at the first call, to `stored_dtype`.

    Args:
        path: The file.
        where: The place for error messages.

    Raises:
        DataError: The file is damaged, or transformers cannot load it completely.
        StorageError: PERSEA_HOME cannot be written, or has too little room.
    """
    header = gguf_header(path, where)
    try:
        tokenizer = tokenizer_folder(path, where)
    except DataError:  # then the recipe names another one
        tokenizer = None

    def make(folder: Path, step: Step) -> None:
        _refuse_full_disk(header)
        with _alone(header, folder.with_name(".model.source.tmp")) as alone:
            convert_weights(header, alone, folder, stored_dtype(header), step, where)
        save_stop_tokens(header, folder)
        for file in tokenizer.iterdir() if tokenizer else ():
            if file.name != RECORD_FILE:
                shutil.copyfile(file, folder / file.name)

    return _kept(header, "model", make)


@contextmanager
def _alone(header: GgufHeader, folder: Path) -> Iterator[Path]:
    """Yield the file in a folder of its own: libraries read what lies beside a model.

    A small file is copied without its lists of tokens, a large one is linked.
    """
    folder.mkdir()
    try:
        alone = folder / "model.gguf"
        if (
            header.architecture in NAMED_VOCAB_SIZE
            and header.path.stat().st_size <= MAX_COPIED_BYTES
        ):
            write_without_tokens(header, alone)
        else:
            alone.symlink_to(header.path.resolve())
        yield alone
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _kept(header: GgufHeader, kind: str, make: Callable[[Path, Step], None]) -> Path:
    """Return the kept folder of a kind, made by `make` where it is absent or damaged."""
    path = header.path
    versions = digest_json([FORMAT, *(metadata.version(p) for p in CONVERTING_PACKAGES)])
    home = persea_home() / "gguf" / f"{gguf_digest(path)[:32]}-{versions[:8]}"
    folder = home / kind
    if _is_whole(folder):
        return folder
    try:
        with hold_lock(home / f"{kind}.lock"):
            if _is_whole(folder):  # another process made it meanwhile
                return folder
            for left in (folder, *home.glob(f".{kind}.*.tmp")):  # damaged, or of a killed process
                shutil.rmtree(left, ignore_errors=True)
            title = f"{path.name}: {describe_types(header.type_counts)}, converted once"
            with conversion_progress(title) as step, open_atomic_folder(folder) as new:
                make(new, step)
                step("verify", 0.9)
                files = {p.name: digest_file(p) for p in sorted(new.iterdir())}
                write_json_with_checksum(new / RECORD_FILE, {"files": files, "file": path.name})
    except StorageError as error:
        raise StorageError(
            error.message,
            where=str(home),
            remedy="free space there, or set PERSEA_HOME to a folder with room",
        ) from error
    return folder


def _is_whole(folder: Path) -> bool:
    """Return whether a kept folder has all its files, and each with its digest."""
    if not (folder / RECORD_FILE).is_file():
        return False
    stats = tuple(
        (p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.iterdir())
    )
    return _has_digests(folder, stats)


@lru_cache(maxsize=64)
def _has_digests(folder: Path, stats: tuple[tuple[str, int, int], ...]) -> bool:
    try:
        files = read_json_with_checksum(folder / RECORD_FILE, "")["files"]
    except (DataError, KeyError):
        return False
    present = {name for name, _, _ in stats} - {RECORD_FILE}
    return present == set(files) and all(
        digest_file(folder / name) == digest for name, digest in files.items()
    )


def _refuse_full_disk(header: GgufHeader) -> None:
    home = persea_home()
    existing = next(p for p in (home, *home.absolute().parents) if p.exists())
    needed = converted_bytes(header) + header.path.stat().st_size + SPARE_BYTES
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise StorageError(
            f"the weights of {header.path.name} need {needed / 1e9:.1f} GB when dequantised, "
            f"{free / 1e9:.1f} GB are free"
        )
