"""Cache units on disk: answers and token distributions, compressed, checksummed, memory-mapped.

A unit is the smallest piece that is committed: one safetensors file, and a commit record that names
its sha256. A file without a record does not exist for readers; a file that does not match its
record is refused. Answers are stored in blocks of some thousand tokens. Each block has a digest
that is checked whenever the block is read, and reading one does not need the others.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save as save_tensors

from persea import storage
from persea.cache.codec import UnitLayout, decode_block, encode_unit
from persea.cache.entropy_coding import tables_from_bytes, tables_to_bytes
from persea.distributions import LOGPROB_STEP_NATS, DistributionKind, SparseDistributions
from persea.errors import DataError
from persea.teachers.teacher import Answer
from persea.tokenization.tokens import RenderedTokens

CACHE_FORMAT = 3
# A block is decoded at once: 4096 tokens take 2 ms. Its index and digest have 64 bytes, less than
# .02 bytes a token. Part of the format: blocks are shuffled, so their size decides the order.
MIN_BLOCK_TOKENS = 4096


@dataclass(frozen=True)
class CachedAnswer:
    """A teacher's answer, its tokens, and the teacher's distribution at every learned token.

    Attributes:
        answer: The answer and the conversation that it belongs to.
        tokens: The conversation, rendered and tokenized by the teacher.
        distributions: One sparse distribution for each token with a true loss mask, in order.
    """

    answer: Answer
    tokens: RenderedTokens
    distributions: SparseDistributions

    @property
    def teacher(self) -> str:
        """Name of the teacher that answered."""
        return self.answer.teacher

    @property
    def prompt_id(self) -> str:
        """Id of the prompt."""
        return self.answer.prompt_id


def unit_id(*parts: object) -> str:
    """Return the name of a unit: a digest of everything that determines its bytes."""
    return hashlib.sha256(
        json.dumps([CACHE_FORMAT, *parts], sort_keys=True, default=str).encode()
    ).hexdigest()[:32]


# --- writing ---


def write_unit(
    folder: Path,
    name: str,
    cached_answers: Sequence[CachedAnswer],
    dropped: Mapping[str, int],
    *,
    tau: float,
    kind: DistributionKind = DistributionKind.SAMPLED,
    unit_metadata: Mapping[str, str] | None = None,
    quarantine: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the file of a unit, then commit it.

    Args:
        folder: The cache folder.
        name: Name of the unit, from `unit_id`.
        cached_answers: The answers.
        dropped: Reason -> number of answers that are left out.
        tau: For kind SAMPLED: entries of exactly this probability are the sampled tail.
        kind: Kind of all distributions.
        unit_metadata: Further entries of the record: teacher, identity.
        quarantine: (prompt id, reason) of the prompts among `dropped` that were not asked.

    Raises:
        DataError: The distributions are of another kind or no distributions.
        StorageError: The disk cannot take the files.
    """
    blocks = list(_split_into_blocks(cached_answers))
    layout, streams = encode_unit(
        [[(c.tokens, c.distributions) for c in block] for block in blocks],
        kind,
        tau,
        f"unit {name}",
    )
    texts = [
        zlib.compress(
            json.dumps(
                [c.answer.to_json() for c in b], ensure_ascii=False, separators=(",", ":")
            ).encode(),
            9,
        )
        for b in blocks
    ]
    stream_bytes = [s.astype("<u4").tobytes() for s in streams]
    index = [
        (len(b), sum(len(c.tokens) for c in b), len(w), len(t))
        for b, w, t in zip(blocks, stream_bytes, texts, strict=True)
    ]
    metadata = {
        "format": CACHE_FORMAT,
        "unit": name,
        "kind": kind.value,
        "tau": tau,
        "step": LOGPROB_STEP_NATS,
        "about": dict(unit_metadata or {}),
        "quarantine": [list(q) for q in quarantine],
    }
    data = save_tensors(
        {
            "about": _byte_array(json.dumps(metadata, sort_keys=True).encode()),
            "tables": _byte_array(tables_to_bytes(layout.tables, layout.byte_lengths_U)),
            "index": np.array(index, np.int64).reshape(-1, 4),
            "words": _byte_array(b"".join(stream_bytes)),
            "texts": _byte_array(b"".join(texts)),
            "digests": _byte_array(
                b"".join(
                    hashlib.sha256(w + t).digest() for w, t in zip(stream_bytes, texts, strict=True)
                )
            ),
        }
    )
    sha256 = storage.write_atomic(folder / "units" / f"{name}.safetensors", data)
    slices = _tensor_slices(data)
    storage.create_json_once(
        folder / "commits" / f"{name}.json",
        storage.with_checksum(
            metadata
            | {
                "sha256": sha256,
                "head": _header_digest(data, slices),
                "bytes": len(data),
                "answers": len(cached_answers),
                "dropped": dict(dropped),
                "tokens": sum(len(c.tokens) for c in cached_answers),
                "positions": sum(len(c.distributions) for c in cached_answers),
                "entries": sum(len(c.distributions.ids_M) for c in cached_answers),
            }
        ),
    )


def _split_into_blocks(cached_answers: Sequence[CachedAnswer]) -> Iterator[list[CachedAnswer]]:
    block: list[CachedAnswer] = []
    tokens = 0
    for capture in cached_answers:
        block.append(capture)
        tokens += len(capture.tokens)
        if tokens >= MIN_BLOCK_TOKENS:
            yield block
            block, tokens = [], 0
    if block:
        yield block


def _byte_array(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


def _tensor_slices(data: bytes | npt.NDArray[np.uint8]) -> dict[str, slice]:
    """Return the byte range of each tensor, read from the file's header."""
    size = 8 + int.from_bytes(bytes(data[:8]), "little")
    return {
        name: slice(size + t["data_offsets"][0], size + t["data_offsets"][1])
        for name, t in json.loads(bytes(data[8:size])).items()
    }


def _header_digest(data: bytes | npt.NDArray[np.uint8], slices: Mapping[str, slice]) -> str:
    """Return the sha256 of everything but the blocks, which have digests of their own."""
    sha, begin = hashlib.sha256(), 0
    for span in sorted((slices["words"], slices["texts"]), key=lambda s: int(s.start)):
        sha.update(bytes(data[begin : span.start]))
        begin = span.stop
    sha.update(bytes(data[begin:]))
    return sha.hexdigest()


# --- reading ---


def is_committed(folder: Path, name: str) -> bool:
    """Return whether a unit has a commit record."""
    return (folder / "commits" / f"{name}.json").is_file()


def read_record(folder: Path, name: str) -> dict[str, Any]:
    """Read the commit record of a unit: its sha256 and its counts.

    Raises:
        DataError: The record is missing, damaged, of another format, or of another unit.
    """
    path = folder / "commits" / f"{name}.json"
    found = storage.read_json(path)
    version = found.get("format") if isinstance(found, dict) else None
    if version != CACHE_FORMAT:
        raise DataError(
            f"cache format {version}, this persea reads {CACHE_FORMAT}",
            where=str(path),
            remedy=f"delete {folder} and capture again, or read it with the persea that wrote it",
        )
    record = storage.read_json_with_checksum(path, _recapture_remedy(folder, name))
    if record["unit"] != name:
        raise DataError(
            f"the record of unit {record['unit']}",
            where=str(path),
            remedy=_recapture_remedy(folder, name),
        )
    return record


@dataclass(frozen=True, eq=False)
class CacheUnit:
    """A committed unit, memory-mapped. Iterating yields its answers.

    The header is checked when the unit is opened, a block whenever it is read.

    Attributes:
        path: The unit's file.
        record: The commit record.
        data: The bytes of the file.
        slices: Tensor name -> byte range.
        layout: Decodes the blocks.
        index_B4: int64, answers, tokens, stream bytes and text bytes of each block.
        remedy: How to replace the unit if it is damaged, for messages.
    """

    path: Path
    record: Mapping[str, Any]
    data: npt.NDArray[np.uint8]
    slices: Mapping[str, slice]
    layout: UnitLayout
    index_B4: npt.NDArray[np.int64]
    remedy: str

    @cached_property
    def _block_ends_B4(self) -> npt.NDArray[np.int64]:
        return np.cumsum(self.index_B4, axis=0)

    @property
    def answer_offsets_B1(self) -> npt.NDArray[np.int64]:
        """Number of the first answer of each block, and the number of all answers."""
        firsts: npt.NDArray[np.int64] = np.concatenate([[0], self._block_ends_B4[:, 0]])
        return firsts

    def __len__(self) -> int:
        return int(self.record["answers"])

    def read_block(self, k: int) -> tuple[CachedAnswer, ...]:
        """Decode the answers of a block.

        Raises:
            DataError: The bytes do not match their digest.
        """
        count, _, size_words, size_texts = self.index_B4[k].tolist()
        _, _, end_words, end_texts = self._block_ends_B4[k].tolist()
        stream = self.data[self.slices["words"]][end_words - size_words : end_words].tobytes()
        texts = self.data[self.slices["texts"]][end_texts - size_texts : end_texts].tobytes()
        if (
            hashlib.sha256(stream + texts).digest()
            != self.data[self.slices["digests"]][32 * k : 32 * k + 32].tobytes()
        ):
            raise DataError(
                f"the bytes of block {k} do not match their digest",
                where=str(self.path),
                remedy=self.remedy,
            )
        decoded = decode_block(np.frombuffer(stream, "<u4").astype(np.uint32), self.layout, count)
        answers = json.loads(zlib.decompress(texts))
        return tuple(
            CachedAnswer(Answer.from_json(a), tokens, distributions)
            for a, (tokens, distributions) in zip(answers, decoded, strict=True)
        )

    def __iter__(self) -> Iterator[CachedAnswer]:
        for k in range(len(self.index_B4)):
            yield from self.read_block(k)


def open_unit(folder: Path, name: str) -> CacheUnit:
    """Open a committed unit.

    Raises:
        DataError: The file is missing or does not match its record. The message names it.
        StorageError: The file cannot be opened.
    """
    record = read_record(folder, name)
    path, remedy = folder / "units" / f"{name}.safetensors", _recapture_remedy(folder, name)
    try:
        size = path.stat().st_size
        data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
    except FileNotFoundError as error:
        raise DataError(
            f"committed, but {error.strerror}", where=str(path), remedy=remedy
        ) from error
    except OSError as error:
        raise storage.unreadable_file_error(path, error) from error
    if size != record["bytes"]:
        raise DataError(
            f"{size:,} bytes, where {record['bytes']:,} were committed",
            where=str(path),
            remedy=remedy,
        )
    try:
        slices = _tensor_slices(data)
        is_intact = _header_digest(data, slices) == record["head"]
    except (ValueError, KeyError, TypeError, OverflowError):
        is_intact = False
    if not is_intact:
        raise DataError(
            "its bytes do not match the committed sha256", where=str(path), remedy=remedy
        )
    tables, byte_lengths_U = tables_from_bytes(data[slices["tables"]].tobytes())
    index_B4 = np.frombuffer(data[slices["index"]].tobytes(), "<i8").reshape(-1, 4)
    return CacheUnit(
        path,
        record,
        data,
        slices,
        UnitLayout(DistributionKind(record["kind"]), record["tau"], tables, byte_lengths_U),
        index_B4,
        remedy,
    )


def read_unit(folder: Path, name: str) -> tuple[CachedAnswer, ...]:
    """Read a whole unit and check every byte of it.

    Raises:
        DataError: The file is missing or does not match its record. The message names it.
    """
    unit = open_unit(folder, name)
    if storage.digest_file(unit.path) != unit.record["sha256"]:
        raise DataError(
            "its bytes do not match the committed sha256", where=str(unit.path), remedy=unit.remedy
        )
    return tuple(unit)


def _recapture_remedy(folder: Path, name: str) -> str:
    record = folder / "commits" / f"{name}.json"
    return f"delete {record} and capture again: the other units stay"
