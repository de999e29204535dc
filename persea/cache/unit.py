"""Captures on disk: what a teacher said and the distribution behind each token, packed, digested, memory-mapped.

A unit is the smallest committed piece: one safetensors file, and a commit record that names its sha256. What has no commit
record does not exist; what does not match it is refused. Inside, answers lie in blocks of some thousand tokens, each with a
digest of its own, so that a block is checked whenever it is read, and reading one does not need the others.
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

from persea import storage as store
from persea.cache import entropy_coding as tables
from persea.cache.codec import UnitLayout, decode_block, encode_unit
from persea.distributions import LOGPROB_STEP_NATS, DistributionKind, SparseDistributions
from persea.errors import DataError
from persea.teachers.teacher import Answer
from persea.tokenization.tokens import RenderedTokens

CACHE_FORMAT = 3
MIN_BLOCK_TOKENS = 4096  # tokens that are decoded at once: 2 ms, and 64 bytes of index and digest a block stay under .02 a token


@dataclass(frozen=True)
class CachedAnswer:
    """An answer, its tokens in the teacher's voice, and a row for every learned token."""

    answer: Answer
    tokens: RenderedTokens
    distributions: SparseDistributions


def unit_id(*parts: object) -> str:
    """The name of a unit: digest of all that determines its bytes."""
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
    """Publish a unit, then commit it.

    dropped  the answers that were not whole, by finish
    tau      of rows of kind SAMPLED: entries of exactly this probability are the sampled tail
    about    what else the unit says of itself: teacher, identity
    quarantine  (prompt, why) of those among them that were not even asked
    Raises DataError for rows that are no distributions, or of another kind.
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
    words = [s.astype("<u4").tobytes() for s in streams]
    index = [
        (len(b), sum(len(c.tokens) for c in b), len(w), len(t))
        for b, w, t in zip(blocks, words, texts, strict=True)
    ]
    says = {
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
            "about": _byte_array(json.dumps(says, sort_keys=True).encode()),
            "tables": _byte_array(tables.tables_to_bytes(layout.tables, layout.byte_lengths_U)),
            "index": np.array(index, np.int64).reshape(-1, 4),
            "words": _byte_array(b"".join(words)),
            "texts": _byte_array(b"".join(texts)),
            "digests": _byte_array(
                b"".join(hashlib.sha256(w + t).digest() for w, t in zip(words, texts, strict=True))
            ),
        }
    )
    sha = store.write_atomic(folder / "units" / f"{name}.safetensors", data)
    where = _tensor_slices(data)
    store.create_json_once(
        folder / "commits" / f"{name}.json",
        store.with_checksum(
            says
            | {
                "sha256": sha,
                "head": _header_digest(data, where),
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
    """Where each tensor's bytes lie, from the file's own header."""
    size = 8 + int.from_bytes(bytes(data[:8]), "little")
    return {
        name: slice(size + t["data_offsets"][0], size + t["data_offsets"][1])
        for name, t in json.loads(bytes(data[8:size])).items()
    }


def _header_digest(data: bytes | npt.NDArray[np.uint8], slices: Mapping[str, slice]) -> str:
    """sha256 of everything but the blocks, which have digests of their own."""
    sha, begin = hashlib.sha256(), 0
    for span in sorted((slices["words"], slices["texts"]), key=lambda s: int(s.start)):
        sha.update(bytes(data[begin : span.start]))
        begin = span.stop
    sha.update(bytes(data[begin:]))
    return sha.hexdigest()


# --- reading ---


def is_committed(folder: Path, name: str) -> bool:
    return (folder / "commits" / f"{name}.json").is_file()


def read_record(folder: Path, name: str) -> dict[str, Any]:
    """What was committed of a unit: its sha256 and counts. DataError where the record is missing or is not what was written."""
    path = folder / "commits" / f"{name}.json"
    found = store.read_json(path)
    version = found.get("format") if isinstance(found, dict) else None
    if version != CACHE_FORMAT:
        raise DataError(
            f"cache format {version}, this persea reads {CACHE_FORMAT}",
            where=str(path),
            remedy=f"delete {folder} and capture again, or read it with the persea that wrote it",
        )
    record = store.read_json_with_checksum(path, _recapture_remedy(folder, name))
    if record["unit"] != name:
        raise DataError(
            f"the record of unit {record['unit']}",
            where=str(path),
            remedy=_recapture_remedy(folder, name),
        )
    return record


@dataclass(frozen=True, eq=False)
class CacheUnit:
    """A committed unit, memory-mapped; its head was checked when it was opened, a block is whenever it is read.

    index_B4  answers, tokens, bytes of words and bytes of texts of each block
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
        """The number of each block's first answer, and of all answers."""
        firsts: npt.NDArray[np.int64] = np.concatenate([[0], self._block_ends_B4[:, 0]])
        return firsts

    def __len__(self) -> int:
        return int(self.record["answers"])

    def read_block(self, k: int) -> tuple[CachedAnswer, ...]:
        """Some consecutive answers, decoded. DataError where their bytes are not what was written."""
        count, _, size_words, size_texts = self.index_B4[k].tolist()
        _, _, end_words, end_texts = self._block_ends_B4[k].tolist()
        words = self.data[self.slices["words"]][end_words - size_words : end_words].tobytes()
        texts = self.data[self.slices["texts"]][end_texts - size_texts : end_texts].tobytes()
        if (
            hashlib.sha256(words + texts).digest()
            != self.data[self.slices["digests"]][32 * k : 32 * k + 32].tobytes()
        ):
            raise DataError(
                f"the bytes of block {k} do not match their digest",
                where=str(self.path),
                remedy=self.remedy,
            )
        some = decode_block(np.frombuffer(words, "<u4").astype(np.uint32), self.layout, count)
        answers = json.loads(zlib.decompress(texts))
        return tuple(
            CachedAnswer(Answer.from_json(a), tokens, rows)
            for a, (tokens, rows) in zip(answers, some, strict=True)
        )

    def __iter__(self) -> Iterator[CachedAnswer]:
        for k in range(len(self.index_B4)):
            yield from self.read_block(k)


def open_unit(folder: Path, name: str) -> CacheUnit:
    """A committed unit, ready to be read anywhere. DataError names the file that is missing or does not match."""
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
        raise store.unreadable_file_error(path, error) from error
    if size != record["bytes"]:
        raise DataError(
            f"{size:,} bytes, where {record['bytes']:,} were committed",
            where=str(path),
            remedy=remedy,
        )
    try:
        where = _tensor_slices(data)
        whole = _header_digest(data, where) == record["head"]
    except (ValueError, KeyError, TypeError, OverflowError):
        whole = False
    if not whole:
        raise DataError(
            "its bytes do not match the committed sha256", where=str(path), remedy=remedy
        )
    found, extents = tables.tables_from_bytes(data[where["tables"]].tobytes())
    index_B4 = np.frombuffer(data[where["index"]].tobytes(), "<i8").reshape(-1, 4)
    return CacheUnit(
        path,
        record,
        data,
        where,
        UnitLayout(DistributionKind(record["kind"]), record["tau"], found, extents),
        index_B4,
        remedy,
    )


def read_unit(folder: Path, name: str) -> tuple[CachedAnswer, ...]:
    """A whole unit, every byte of it checked. DataError names the file that is missing or does not match."""
    unit = open_unit(folder, name)
    if store.digest_file(unit.path) != unit.record["sha256"]:
        raise DataError(
            "its bytes do not match the committed sha256", where=str(unit.path), remedy=unit.remedy
        )
    return tuple(unit)


def _recapture_remedy(folder: Path, name: str) -> str:
    return (
        f"delete {folder / 'commits' / name}.json and capture again: only this unit is asked again"
    )
