"""Measure tokens per byte with 512, 2,048 and 8,192 extra tokens in the vocabulary. Trains nothing.

    PERSEA_DATA=... python bench/extension.py          (less than two minutes)
    PERSEA_DATA=... python bench/extension.py SMOLLM2   a folder with its GGUF file; only its part

The tokenizers of Llama 3, Qwen 3 and gpt-oss learn more merges from nine tenths of the Khmer,
Burmese, Lao and Thai lines of the parallel text. Figures are from the last tenth of these and of
every other language there. `balance`: Llama 3 with 512 extra tokens, learned from Khmer and a tenth
or a fiftieth as much Lao, with files weighted equally and as one text. `smollm2`: SmolLM2 as
published, with merges as they come, with marks in words, and with tokens of Gemma 3 alone. Writes
bench/results/extension.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from persea.chat.families import CONTROL_MARKERS
from persea.models.loading import ModelSource, load_tokenizer
from persea.tokenization.vocabulary import Vocabulary, load_vocabulary
from persea.vocab_extension.learn_merges import (
    Merge,
    MergeTrainingText,
    count_words,
    extend_tokenizer_spec,
    learn_merges,
    measure_tokenization_cost,
    read_merge_training_texts,
    refuse_changed_tokens,
)
from persea.vocab_extension.teacher_tokens import join_marks, make_wanted

DATA = Path(os.environ.get("PERSEA_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
TOKENIZERS = ("llama3", "qwen3", "gpt-oss")
LEARNED_ON = ("khm", "mya", "lao", "tha")
SIZES = (512, 2048, 8192)
FEW = (10, 50)
OF_SMOLLM2, BESIDE = ("tha", "khm", "mya"), ("eng", "ind")
OUT = Path(__file__).parent / "results" / "extension.json"


def texts() -> dict[str, MergeTrainingText]:
    files = sorted((DATA / "parallel").glob("ntrex.*.txt"))
    return {
        file.stem.removeprefix("ntrex."): one
        for file, one in zip(files, read_merge_training_texts([str(f) for f in files]), strict=True)
    }


def shorter(spec: Mapping[str, Any], merges: Sequence[Merge], tokens: int) -> list[Merge]:
    """Return the first merges that make this many new tokens.

    The merges learned for fewer tokens are the beginning of those learned for more.
    """
    known, fresh = set(spec["model"]["vocab"]), 0
    for k, (one, other) in enumerate(merges):
        fresh += one + other not in known
        known.add(one + other)
        if fresh == tokens:
            return list(merges[: k + 1])
    raise AssertionError(f"only {fresh} of {tokens} tokens were learned")


def longer(
    backend: Tokenizer, spec: Mapping[str, Any], merges: Sequence[Merge], old: Vocabulary
) -> Vocabulary:
    new = load_vocabulary(
        Tokenizer.from_str(json.dumps(extend_tokenizer_spec(spec, merges))),
        old.name,
        CONTROL_MARKERS,
    )
    refuse_changed_tokens(old, new, old.name)
    return new


def tokens_a_byte(
    files: Mapping[str, MergeTrainingText], old: Vocabulary, new: Vocabulary
) -> dict[str, float]:
    return {
        name: round(outcome.tokens_after / outcome.bytes, 4)
        for name, outcome in (
            (name, measure_tokenization_cost(one, old, new)) for name, one in files.items()
        )
    }


def measured(name: str, files: Mapping[str, MergeTrainingText]) -> dict[str, Any]:
    backend = Tokenizer.from_file(str(DATA / "tokenizers" / name / "tokenizer.json"))
    old, spec = load_vocabulary(backend, name, CONTROL_MARKERS), json.loads(backend.to_str())
    clock = time.process_time()
    merges = learn_merges(
        backend,
        count_words(backend, [files[language].training_lines for language in LEARNED_ON]),
        max(SIZES),
    )
    seconds, outcome = round(time.process_time() - clock, 1), {"0": tokens_a_byte(files, old, old)}
    for size in SIZES:
        outcome[str(size)] = tokens_a_byte(
            files, old, longer(backend, spec, shorter(spec, merges, size), old)
        )
    return {"known": len(old), "cpu_seconds": seconds, "tokens_a_byte": outcome}


def balance(files: Mapping[str, MergeTrainingText]) -> Iterator[dict[str, Any]]:
    backend = Tokenizer.from_file(str(DATA / "tokenizers" / "llama3" / "tokenizer.json"))
    old, spec = load_vocabulary(backend, "llama3", CONTROL_MARKERS), json.loads(backend.to_str())
    two = {name: files[name] for name in ("khm", "lao")}
    for few in FEW:
        khmer, lao = (
            files["khm"].training_lines,
            files["lao"].training_lines[: len(files["lao"].training_lines) // few],
        )
        for way, learn in (("by file", [khmer, lao]), ("as one", [[*khmer, *lao]])):
            new = longer(
                backend, spec, learn_merges(backend, count_words(backend, learn), 512), old
            )
            yield {"lao": f"1/{few}", "counted": way, "tokens_a_byte": tokens_a_byte(two, old, new)}


def smollm2(folder: str, files: Mapping[str, MergeTrainingText]) -> dict[str, Any]:
    """Extend SmolLM2 three ways, on Thai, Khmer and Burmese."""
    tokenizer = load_tokenizer(ModelSource(folder), folder)
    old = load_vocabulary(tokenizer, "smollm2", CONTROL_MARKERS)
    plain = json.loads(tokenizer.backend_tokenizer.to_str())
    gemma = Tokenizer.from_file(str(DATA / "tokenizers" / "gemma3" / "tokenizer.json"))
    wanted = make_wanted(load_vocabulary(gemma, "gemma3", CONTROL_MARKERS))
    some = {name: files[name] for name in (*OF_SMOLLM2, *BESIDE)}
    result: dict[str, Any] = {"learned_on": OF_SMOLLM2, "0": tokens_a_byte(some, old, old)}
    for way, spec, options in (
        ("merges", plain, {}),
        ("merges, marks in words", join_marks(plain), {}),
        ("Gemma 3's tokens, marks in words", join_marks(plain), {"is_wanted": wanted}),
    ):
        backend = Tokenizer.from_str(json.dumps(spec))
        counts = count_words(backend, [files[name].training_lines for name in OF_SMOLLM2])
        merges = learn_merges(backend, counts, max(SIZES), **options)
        num_learned = len({a + b for a, b in merges} - spec["model"]["vocab"].keys())
        result[way] = {
            str(size): tokens_a_byte(
                some, old, longer(backend, spec, shorter(spec, merges, size), old)
            )
            for size in sorted({min(size, num_learned) for size in SIZES})
        }
        print(way, result[way], flush=True)
    return result


def write(result: Mapping[str, Any]) -> None:
    OUT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    files = texts()
    if sys.argv[1:]:
        write(json.loads(OUT.read_text()) | {"smollm2": smollm2(sys.argv[1], files)})
        return
    result: dict[str, Any] = {
        "learned_on": LEARNED_ON,
        "held_out_bytes": {
            n: sum(len(t.encode()) for t in one.held_out_lines) for n, one in files.items()
        },
        "tokenizers": {},
    }
    for name in TOKENIZERS:
        outcome = result["tokenizers"][name] = measured(name, files)
        print(
            f"{name}: tokens per byte with {', '.join(outcome['tokens_a_byte'])} extra tokens "
            f"({outcome['cpu_seconds']} s to learn)"
        )
        for language in (*LEARNED_ON, *(n for n in files if n not in LEARNED_ON)):
            print(
                f"  {language:7}",
                *(f"{row[language]:.3f}" for row in outcome["tokens_a_byte"].values()),
                flush=True,
            )
    result["balance"] = list(balance(files))
    for row in result["balance"]:
        print(row)
    write((json.loads(OUT.read_text()) if OUT.is_file() else {}) | result)


if __name__ == "__main__":
    main()
