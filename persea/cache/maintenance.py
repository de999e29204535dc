"""Shelf: a folder of units as a whole: what is in it, whether it is sound, several as one, and the same as Parquet.

A unit is sound when its record is as it was written, its file is the one that the record names, and every block of it unpacks to
the counts that were committed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persea import storage as store
from persea.cache.unit import CachedAnswer, CacheUnit, open_unit, read_record, read_unit
from persea.distributions import DistributionKind
from persea.errors import DataError, RefusedError

if TYPE_CHECKING:
    import pyarrow as pa

RECORD_COUNT_KEYS = ("answers", "tokens", "positions", "entries", "bytes")


def find_cache_folder(folder: Path) -> Path:
    """The folder with commits/ and units/: this one, or capture/ of a run folder. DataError where it is neither."""
    for place in (folder, folder / "capture"):
        if (place / "commits").is_dir():
            return place
    raise DataError(
        "no cache is here",
        where=str(folder),
        remedy="name a run folder that was captured, or its capture/",
    )


def committed_units(folder: Path) -> tuple[str, ...]:
    """Names of all units with a commit record, in order of name."""
    return tuple(
        sorted(p.stem for p in (folder / "commits").glob("*.json") if not p.name.startswith("."))
    )


def summarize_cache(folder: Path) -> dict[str, Any]:
    """What is in a cache: units and counts, in all and by teacher; bytes a learned position. Reads commit records only."""
    teachers: dict[str, Counter[str]] = {}
    formats: set[tuple[str, tuple[tuple[str, float], ...]]] = (
        set()
    )  # kind, and how far it goes: tau of a sample, kl of a rest
    for name in committed_units(folder):
        record = read_record(folder, name)
        sampled, kl = record["kind"] == DistributionKind.SAMPLED, record["about"].get("kl")
        formats.add(
            (
                record["kind"],
                (("tau", record["tau"]),) if sampled else (("kl", float(kl)),) if kl else (),
            )
        )
        teachers.setdefault(record["about"].get("teacher", ""), Counter()).update(
            {"units": 1} | {k: record[k] for k in RECORD_COUNT_KEYS}
        )
    total: Counter[str] = sum(teachers.values(), Counter())
    each = (
        {"bytes_per_position": round(total["bytes"] / total["positions"], 2)}
        if total["positions"]
        else {}
    )
    rows = [{"kind": kind, **dict(how)} for kind, how in sorted(formats)]
    return {**total, **each, "rows": rows, "teachers": {k: dict(v) for k, v in teachers.items()}}


@dataclass(frozen=True)
class CacheProblem:
    """Something that is not as it was written. harmless: it costs nothing but disk, as what a killed run left."""

    path: Path
    message: str
    remedy: str
    is_harmless: bool = False


def verify_cache(folder: Path) -> list[CacheProblem]:
    """Everything that is wrong in a cache: every byte of every unit is read and unpacked.

    Units that are missing, cut, changed, of another name, or say what another unit says; files that nobody committed.
    """
    found: list[CacheProblem] = []
    said: dict[str, str] = {}
    names = committed_units(folder)
    for name in names:
        try:
            captures = read_unit(folder, name)
            _check_counts(open_unit(folder, name), captures)
        except DataError as error:
            found.append(CacheProblem(Path(error.where), error.message, error.remedy))
            continue
        for capture in captures:
            key = f"{capture.answer.teacher} {capture.answer.prompt_id}"
            if said.setdefault(key, name) != name:
                path = folder / "commits" / f"{name}.json"
                found.append(
                    CacheProblem(
                        path,
                        f"answers of {key} that unit {said[key]} holds too",
                        f"delete the older of the two, and {path}",
                    )
                )
                break
    for path in sorted((folder / "units").glob("*")):
        if path.name.startswith(".") or path.stem not in names or path.suffix != ".safetensors":
            found.append(
                CacheProblem(
                    path,
                    "not committed: what a killed run left",
                    "it is written again or may be deleted",
                    is_harmless=True,
                )
            )
    return found + _check_stage_record(folder)


def _check_counts(unit: CacheUnit, cached_answers: Sequence[CachedAnswer]) -> None:
    told = {
        "answers": len(cached_answers),
        "tokens": sum(len(c.tokens) for c in cached_answers),
        "positions": sum(len(c.distributions) for c in cached_answers),
        "entries": sum(len(c.distributions.ids_M) for c in cached_answers),
    }
    for what, count in told.items():
        if unit.record[what] != count:
            raise DataError(
                f"{count:,} {what}, where {unit.record[what]:,} were committed",
                where=str(unit.path),
                remedy=unit.remedy,
            )


def _check_stage_record(folder: Path) -> list[CacheProblem]:
    """Is what the stage wrote beside the units, where it finished, what its record says?"""
    path = folder / "done.json"
    remedy = f"delete {path} and capture again: units that stand are kept"
    if not path.is_file():
        return []
    try:
        done = store.read_json_with_checksum(path, remedy)
    except DataError as error:
        return [CacheProblem(path, error.message, error.remedy)]
    outputs = {folder / name: sha for name, sha in done["outputs"].items()}
    return [
        CacheProblem(at, "not as the stage wrote it", remedy)
        for at, sha in outputs.items()
        if not at.is_file() or store.digest_file(at) != sha
    ]


def merge_caches(into: Path, folders: Sequence[Path]) -> int:
    """Copy every unit of some caches into one, each byte checked on the way; how many were new.

    A unit that stands there already is left as it is. Raises DataError for a unit that is not as it was written, or whose name stands
    for other bytes; Refused where two caches mean different weights by one teacher's name.
    """
    identities: dict[str, tuple[str, Path]] = {}
    for folder in (into, *folders):
        for name in committed_units(folder):
            about = read_record(folder, name)["about"]
            identity, where = identities.setdefault(
                about.get("teacher", ""), (about.get("identity", ""), folder)
            )
            if identity != about.get("identity", ""):
                raise RefusedError(
                    f"{about['teacher']} is not the same teacher in {where}",
                    where=str(folder),
                    remedy="keep the two caches apart",
                )
    new = 0
    with store.lock_run_folder(into):
        for folder in folders:
            for name in committed_units(folder):
                record = read_record(folder, name)
                if name in committed_units(into):
                    if read_record(into, name)["sha256"] != record["sha256"]:
                        raise DataError(
                            f"unit {name} is not the same in {folder}",
                            where=str(into / "units" / f"{name}.safetensors"),
                            remedy="verify both caches; the same name is the same bytes",
                        )
                    continue
                read_unit(folder, name)
                store.write_atomic(
                    into / "units" / f"{name}.safetensors",
                    (folder / "units" / f"{name}.safetensors").read_bytes(),
                )
                store.create_json_once(
                    into / "commits" / f"{name}.json", store.with_checksum(record)
                )
                new += 1
    return new


def export_parquet(folder: Path, path: Path) -> int:
    """The whole cache as one Parquet file, a row an answer, a row group a unit; the number of answers.

    Columns: unit, teacher, prompt_id, skill, language, conversation (JSON), ids, starts, ends, learn (a value a token), and of
    the learned tokens row_sizes, row_ids, row_probs, realised. Written whole or not at all.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    answers = 0
    schema = pa.schema(
        [
            *(
                (n, pa.string())
                for n in ("unit", "teacher", "prompt_id", "skill", "language", "conversation")
            ),
            *((n, pa.list_(pa.int32())) for n in ("ids", "starts", "ends", "row_sizes", "row_ids")),
            ("learn", pa.list_(pa.bool_())),
            ("row_probs", pa.list_(pa.float32())),
            ("realised", pa.list_(pa.float32())),
        ]
    )
    with (
        store.open_atomic(path) as file,
        pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for name in committed_units(folder):
            captures = read_unit(folder, name)
            writer.write_table(_unit_to_arrow(name, captures, schema))
            answers += len(captures)
    return answers


def _unit_to_arrow(
    unit: str, cached_answers: Sequence[CachedAnswer], schema: pa.Schema
) -> pa.Table:
    import numpy as np
    import pyarrow as pa

    rows = [
        {
            "unit": unit,
            "teacher": c.answer.teacher,
            "prompt_id": c.answer.prompt_id,
            "skill": c.answer.skill,
            "language": c.answer.language,
            "conversation": json.dumps(c.answer.conversation.to_json(), ensure_ascii=False),
            "ids": c.tokens.ids_T,
            "starts": c.tokens.starts_T,
            "ends": c.tokens.ends_T,
            "learn": c.tokens.loss_mask_T,
            "row_sizes": np.diff(c.distributions.offsets_N1).astype(np.int32),
            "row_ids": c.distributions.ids_M,
            "row_probs": c.distributions.probs_M,
            "realised": c.distributions.target_logprob_N,
        }
        for c in cached_answers
    ]
    return pa.Table.from_pylist(rows, schema)
