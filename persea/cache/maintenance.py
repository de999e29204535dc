"""Inspect, verify, merge and export a cache folder.

A unit is intact when its record is unchanged, its file has the sha256 of the record, and every
block decodes to the committed counts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persea import storage
from persea.cache.unit import CachedAnswer, CacheUnit, open_unit, read_record, read_unit
from persea.distributions import DistributionKind
from persea.errors import DataError, RefusedError

if TYPE_CHECKING:
    import pyarrow as pa

RECORD_COUNT_KEYS = ("answers", "tokens", "positions", "entries", "bytes")


def find_cache_folder(folder: Path) -> Path:
    """Return the folder with commits/ and units/: this one, or capture/ of a run folder.

    Raises:
        DataError: Neither has them.
    """
    for candidate in (folder, folder / "capture"):
        if (candidate / "commits").is_dir():
            return candidate
    raise DataError(
        "no cache in this folder",
        where=str(folder),
        remedy="give the folder of a run whose capture has started, or its capture/",
    )


def committed_units(folder: Path) -> tuple[str, ...]:
    """Return the names of all units with a commit record, sorted."""
    return tuple(
        sorted(p.stem for p in (folder / "commits").glob("*.json") if not p.name.startswith("."))
    )


def summarize_cache(folder: Path) -> dict[str, Any]:
    """Return units and counts, in total and by teacher, and bytes a learned position.

    Reads commit records only.
    """
    teachers: dict[str, Counter[str]] = {}
    formats: set[tuple[str, tuple[tuple[str, float], ...]]] = set()  # kind, and its tau or kl
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
    distributions = [{"kind": kind, **dict(limit)} for kind, limit in sorted(formats)]
    return {
        **total,
        **each,
        "distributions": distributions,
        "teachers": {k: dict(v) for k, v in teachers.items()},
    }


@dataclass(frozen=True)
class CacheProblem:
    """A file that is not as it was written.

    Attributes:
        path: The file.
        message: The fault.
        remedy: How to repair the cache.
        is_harmless: Whether it only takes disk space, such as the files of a killed run.
    """

    path: Path
    message: str
    remedy: str
    is_harmless: bool = False


def verify_cache(folder: Path) -> list[CacheProblem]:
    """Read and decode every byte of a cache; return everything that is wrong.

    Finds units that are missing, cut, changed, of another name, or with answers that another unit
    holds too, and files that were never committed.
    """
    problems: list[CacheProblem] = []
    unit_of: dict[str, str] = {}  # teacher and prompt -> unit
    names = committed_units(folder)
    for name in names:
        try:
            answers = read_unit(folder, name)
            _check_counts(open_unit(folder, name), answers)
        except DataError as error:
            problems.append(CacheProblem(Path(error.where), error.message, error.remedy))
            continue
        for cached in answers:
            key = f"{cached.answer.teacher} {cached.answer.prompt_id}"
            if unit_of.setdefault(key, name) != name:
                path = folder / "commits" / f"{name}.json"
                problems.append(
                    CacheProblem(
                        path,
                        f"it holds an answer of {key} that unit {unit_of[key]} holds too",
                        f"delete the older of the two, and {path}",
                    )
                )
                break
    for path in sorted((folder / "units").glob("*")):
        if path.name.startswith(".") or path.stem not in names or path.suffix != ".safetensors":
            problems.append(
                CacheProblem(
                    path,
                    "not committed: left by a killed run",
                    "it may be deleted; the next capture writes it again",
                    is_harmless=True,
                )
            )
    return problems + _check_stage_record(folder)


def _check_counts(unit: CacheUnit, cached_answers: Sequence[CachedAnswer]) -> None:
    counts = {
        "answers": len(cached_answers),
        "tokens": sum(len(c.tokens) for c in cached_answers),
        "positions": sum(len(c.distributions) for c in cached_answers),
        "entries": sum(len(c.distributions.ids_M) for c in cached_answers),
    }
    for key, count in counts.items():
        if unit.record[key] != count:
            raise DataError(
                f"{count:,} {key}, where {unit.record[key]:,} were committed",
                where=str(unit.path),
                remedy=unit.remedy,
            )


def _check_stage_record(folder: Path) -> list[CacheProblem]:
    """Compare the stage's other files with its record, if it has one."""
    path = folder / "done.json"
    remedy = f"delete {path} and capture again: committed units stay"
    if not path.is_file():
        return []
    try:
        done = storage.read_json_with_checksum(path, remedy)
    except DataError as error:
        return [CacheProblem(path, error.message, error.remedy)]
    outputs = {folder / name: sha for name, sha in done["outputs"].items()}
    return [
        CacheProblem(at, "changed since the stage wrote it", remedy)
        for at, sha in outputs.items()
        if not at.is_file() or storage.digest_file(at) != sha
    ]


def merge_caches(into: Path, folders: Sequence[Path]) -> int:
    """Copy every unit of some caches into one, and check each byte. Units that it has stay.

    Args:
        into: The folder to copy into. It is created if it does not exist.
        folders: Cache folders.

    Returns:
        How many units were copied.

    Raises:
        DataError: A unit is damaged, or two units of one name have different bytes.
        RefusedError: Two caches mean different models by one teacher's name.
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
                    f"{about['teacher']} is another model in {where}",
                    where=str(folder),
                    remedy="do not merge the two caches",
                )
    num_new = 0
    with storage.lock_run_folder(into):
        present = set(committed_units(into))
        for folder in folders:
            for name in committed_units(folder):
                record = read_record(folder, name)
                if name in present:
                    if read_record(into, name)["sha256"] != record["sha256"]:
                        raise DataError(
                            f"unit {name} has other bytes in {folder}",
                            where=str(into / "units" / f"{name}.safetensors"),
                            remedy="verify both caches: equal names mean equal bytes",
                        )
                    continue
                read_unit(folder, name)
                storage.write_atomic(
                    into / "units" / f"{name}.safetensors",
                    (folder / "units" / f"{name}.safetensors").read_bytes(),
                )
                storage.create_json_once(
                    into / "commits" / f"{name}.json", storage.with_checksum(record)
                )
                present.add(name)
                num_new += 1
    return num_new


def export_parquet(folder: Path, path: Path) -> int:
    """Write a cache as one Parquet file: a row an answer, a row group a unit.

    Columns: unit, teacher, prompt_id, skill, language, conversation (JSON); ids, starts, ends,
    learn (lists with a value a token); row_sizes, row_ids, row_probs, realised (of the learned
    tokens).
    The file is written whole or not at all.

    Returns:
        The number of answers.

    Raises:
        DataError: A unit is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    num_answers = 0
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
        storage.open_atomic(path) as file,
        pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for name in committed_units(folder):
            cached_answers = read_unit(folder, name)
            writer.write_table(_unit_to_arrow(name, cached_answers, schema))
            num_answers += len(cached_answers)
    return num_answers


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
