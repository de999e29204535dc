"""Count realised next tokens that the boundary masks drop, on all real text there is. Must be zero.

    PERSEA_DATA=... python bench/masks.py      (hours on one core)

For each real teacher with Llama 3: every common boundary of every line of the parallel texts, the
corpus and the evaluation sets. Counts the realised next tokens of both sides that the mask drops,
and those that a simpler mask would drop which re-encodes only [last token + candidate]. `--lines
10` takes seven minutes and made bench/results/masks.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from persea.alignment.boundary_mask import BoundaryMask
from persea.alignment.event_map import load_event_map
from persea.errors import DataError
from persea.models.loading import ModelSource, load_renderer
from persea.tokenization.vocabulary import Vocabulary

DATA = Path(os.environ.get("PERSEA_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
TEACHERS = {"qwen": "qwen3", "gemma": "gemma3", "gpt-oss": "gpt-oss"}


def texts(lines: int) -> Iterator[tuple[str, str]]:
    """Yield (kind, text): parallel lines by language, corpus files, evaluation sets as raw
    files.
    """
    for file in sorted((DATA / "parallel").glob("ntrex.*.txt")):
        for line in file.read_text(encoding="utf-8").split("\n")[:lines]:
            yield file.stem.removeprefix("ntrex."), line
    for folder in ("corpus", "corpus/udhr", "eval", "eval/bbh", "eval/bfcl"):
        for file in sorted((DATA / folder).glob("*.*")):
            if file.suffix in {".jsonl", ".json", ".txt", ".csv", ".tsv"}:
                for line in file.read_text(encoding="utf-8", errors="strict").split("\n")[:lines]:
                    yield folder.split("/")[0], line[:4000]


def alone(vocabulary: Vocabulary, last: int, candidate: bytes) -> bool:
    """Return whether [last token + candidate], encoded alone, keeps the boundary between them."""
    raw = (vocabulary.bytes_W[last] or b"") + candidate
    try:
        first = vocabulary.backend.encode(raw.decode(), add_special_tokens=False).ids[:1]
    except UnicodeDecodeError:
        return True  # not valid text: cannot be encoded
    return first == [last]


def count(
    of_teacher: BoundaryMask, of_student: BoundaryMask, text: str, seen: Counter[str]
) -> None:
    vocabularies = of_teacher.own.vocabulary, of_student.own.vocabulary
    ids = [np.array(v.encode(text), np.int64) for v in vocabularies]
    starts = [
        np.cumsum(v.lengths_W[i]) - v.lengths_W[i] for v, i in zip(vocabularies, ids, strict=True)
    ]
    _, k, j = np.intersect1d(*starts, assume_unique=True, return_indices=True)
    contexts = (
        of_student.other.context_ids(ids[0], k.tolist()),
        of_teacher.other.context_ids(ids[1], j.tolist()),
    )
    for n, (a, b) in enumerate(zip(k.tolist(), j.tolist(), strict=True)):
        for mask, context, token, before in (
            (of_teacher, contexts[1][n], ids[0][a], ids[1][b - 1]),
            (of_student, contexts[0][n], ids[1][b], ids[0][a - 1]),
        ):
            seen["tokens"] += 1
            if context >= 0:
                seen["dropped"] += len(mask.impossible_tokens(int(context), np.array([token])))
                seen["dropped_alone"] += not alone(
                    mask.other.vocabulary, int(before), mask.own.vocabulary.bytes_W[token] or b""
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lines", type=int, default=1 << 30)
    lines = parser.parse_args().lines
    student = load_renderer(ModelSource(str(DATA / "tokenizers" / "llama3")), "llama")
    out: dict[str, dict[str, dict[str, float]]] = {}
    for name, folder in TEACHERS.items():
        event_map = load_event_map(
            load_renderer(ModelSource(str(DATA / "tokenizers" / folder)), name), student
        )
        assert event_map.teacher_mask and event_map.student_mask
        found: dict[str, Counter[str]] = {}
        clock = time.process_time()
        for kind, text in texts(lines):
            try:
                count(
                    event_map.teacher_mask,
                    event_map.student_mask,
                    unicodedata.normalize("NFC", text),
                    found.setdefault(kind, Counter()),
                )
            except DataError:
                found[kind]["unsayable"] += 1  # a literal SentencePiece sign
        seconds, total = time.process_time() - clock, sum(f["tokens"] for f in found.values())
        out[name] = {
            kind: {
                **f,
                "dropped_alone_percent": round(100 * f["dropped_alone"] / max(1, f["tokens"]), 3),
            }
            for kind, f in found.items()
        }
        out[name]["all"] = {
            "tokens": total,
            "dropped": sum(f["dropped"] for f in found.values()),
            "cpu_seconds": round(seconds, 1),
            "dropped_alone": sum(f["dropped_alone"] for f in found.values()),
        }
        print(
            name,
            out[name]["all"],
            {k: v["dropped_alone_percent"] for k, v in out[name].items() if k != "all"},
            flush=True,
        )
        result = {"lines": lines if lines < 1 << 30 else "all", "student": "llama", "teachers": out}
        (Path(__file__).parent / "results" / "masks.json").write_text(
            json.dumps(result, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
