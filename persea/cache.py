"""Captures on disk: what a teacher said and the distribution behind each token, sparse but unbiased, digested.

A unit is the smallest committed piece: one safetensors file of some hundred answers, and a commit record that names its
sha256. What has no commit record does not exist; what does not match it is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from persea import store
from persea.chat import Tokens
from persea.errors import DataError
from persea.rows import RowKind, Rows
from persea.teacher import Answer

FORMAT = 2


@dataclass(frozen=True)
class Capture:
    """An answer, its tokens in the teacher's voice, and a row for every learned token."""

    answer: Answer
    tokens: Tokens
    rows: Rows


def unit_id(*parts: object) -> str:
    """The name of a unit: digest of all that determines its bytes."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True, default=str).encode()).hexdigest()[:32]


def write_unit(folder: Path, name: str, captures: Sequence[Capture], dropped: dict[str, int]) -> None:
    """Publish a unit, then commit it. `dropped` counts the answers that were not whole, by finish."""
    answers = json.dumps([c.answer.to_json() for c in captures], ensure_ascii=False).encode()
    tensors: dict[str, npt.NDArray[Any]] = {"answers": np.frombuffer(answers, np.uint8)}
    columns: dict[str, list[npt.NDArray[Any]]] = {
        "lengths": [np.array([len(c.tokens)], np.int64) for c in captures],
        "ids": [c.tokens.ids_T for c in captures], "starts": [c.tokens.starts_T for c in captures],
        "ends": [c.tokens.ends_T for c in captures], "learn": [c.tokens.learn_T for c in captures],
        "row_sizes": [np.diff(c.rows.offsets_N1) for c in captures],
        "row_ids": [c.rows.ids_M for c in captures], "row_probs": [c.rows.probs_M for c in captures],
        "realised": [c.rows.realised_N for c in captures],
    }
    for key, arrays in columns.items():
        tensors[key] = np.concatenate(arrays) if arrays else np.empty(0, np.int64)
    data = save_tensors(tensors)
    sha = store.publish(folder / "units" / f"{name}.safetensors", data)
    record = {
        "format": FORMAT, "sha256": sha, "bytes": len(data), "answers": len(captures), "dropped": dropped,
        "tokens": int(sum(len(c.tokens) for c in captures)), "positions": int(sum(len(c.rows) for c in captures)),
        "entries": int(sum(len(c.rows.ids_M) for c in captures))}
    store.commit(folder / "commits" / f"{name}.json", record | {"seal": _seal(record)})


def is_committed(folder: Path, name: str) -> bool:
    return (folder / "commits" / f"{name}.json").is_file()


def read_record(folder: Path, name: str) -> dict[str, Any]:
    """What was committed of a unit: its sha256 and counts. DataError where the record is missing or is not what was written."""
    path = folder / "commits" / f"{name}.json"
    try:
        record: dict[str, Any] = dict(store.read_json(path))
    except (TypeError, ValueError):
        record = {}
    if record.get("format") != FORMAT:
        raise DataError(f"cache format {record.get('format')}, this persea reads {FORMAT}", where=str(path), remedy=_again(folder, name))
    if record.pop("seal", "") != _seal(record):
        raise DataError("the record does not match its own seal", where=str(path), remedy=_again(folder, name))
    return record


def read_unit(folder: Path, name: str) -> tuple[Capture, ...]:
    """A committed unit, its digest checked. DataError names the file that is missing or does not match."""
    record = read_record(folder, name)
    path, remedy = folder / "units" / f"{name}.safetensors", _again(folder, name)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"committed, but {error.strerror}", where=str(path), remedy=remedy) from error
    if store.digest(data) != record["sha256"]:
        raise DataError("its bytes do not match the committed sha256", where=str(path), remedy=remedy)
    return tuple(_unpack(load_tensors(data)))


def _again(folder: Path, name: str) -> str:
    return f"delete {folder / 'commits' / name}.json and capture again: only this unit is asked again"


def _seal(record: Mapping[str, Any]) -> str:
    return store.digest(json.dumps(record, sort_keys=True).encode())


def _unpack(tensors: dict[str, npt.NDArray[Any]]) -> Iterator[Capture]:
    answers = [Answer.from_json(a) for a in json.loads(tensors["answers"].tobytes())]
    ends_T = np.cumsum(tensors["lengths"])
    learned = np.concatenate([[0], np.cumsum(tensors["learn"].astype(np.int64))])
    offsets = np.concatenate([[0], np.cumsum(tensors["row_sizes"])])
    for answer, end, length in zip(answers, ends_T, tensors["lengths"], strict=True):
        span = slice(int(end - length), int(end))
        first, last = learned[span.start], learned[span.stop]
        entries = slice(int(offsets[first]), int(offsets[last]))
        rows = Rows(offsets[first:last + 1] - offsets[first], tensors["row_ids"][entries], tensors["row_probs"][entries],
                    tensors["realised"][first:last], RowKind.SAMPLED)
        yield Capture(answer, Tokens(tensors["ids"][span], tensors["starts"][span], tensors["ends"][span], tensors["learn"][span].astype(bool)), rows)
