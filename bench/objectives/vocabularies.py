"""The real tokenizers, cut to the tokens this text uses, with the same merges in the same order.

A cut keeps all single bytes, every character that occurs (Gemma; otherwise the character falls back
to bytes as in the full tokenizer), the N most used tokens, and every token that their merging
passes through. The first N merges by rank would be closed too, but at N = 8,192 they are mostly
English and code: the languages that the bench is about would fall back to bytes.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bench.objectives import data
from persea.chat.families import CONTROL_MARKERS
from persea.chat.families.gemma import GEMMA
from persea.chat.families.gpt_oss import GPT_OSS
from persea.chat.families.llama import LLAMA
from persea.chat.families.qwen import QWEN
from persea.chat.family import Family
from persea.chat.renderer import ChatRenderer
from persea.tokenization.vocabulary import BYTE_TO_CHAR, Vocabulary, load_vocabulary

TOKENIZERS = {"A": "qwen3", "B": "gemma3", "C": "gpt-oss", "student": "llama3"}
FAMILIES = {"A": QWEN, "B": GEMMA, "C": GPT_OSS, "student": LLAMA}
STARTS = {"A": "<|im_start|>", "B": "<bos>", "C": "<|startoftext|>", "student": "<|begin_of_text|>"}


@dataclass(frozen=True)
class Speaker:
    """A cut tokenizer as a chat renderer; `start` precedes every window."""

    renderer: ChatRenderer
    start: int

    @property
    def vocabulary(self) -> Vocabulary:
        return self.renderer.vocabulary


def merging(token: str, rank: Mapping[tuple[str, str], int], pieces: Sequence[str]) -> list[str]:
    """Return every token that merging passes through from single bytes to `token`, itself last.

    AssertionError where merging never produces it.
    """
    parts, made = list(pieces), list(pieces)
    while len(parts) > 1:
        ranks = [rank.get(pair, len(rank)) for pair in itertools.pairwise(parts)]
        best = min(range(len(ranks)), key=ranks.__getitem__)
        if ranks[best] == len(rank):
            raise AssertionError(f"{token!r} cannot be merged beyond {parts}")
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
        made.append(parts[best])
    return made


def cut(
    spec: dict[str, Any], counts: Mapping[str, int], size: int, controls: Sequence[str]
) -> dict[str, Any]:
    """Cut a tokenizer.json to about `size` tokens and these controls.

    `counts`: the frequency of each token in the text.
    """
    merges = [
        tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in spec["model"]["merges"]
    ]
    rank = {pair: k for k, pair in enumerate(merges)}
    vocab = spec["model"]["vocab"]
    fallback = spec["model"].get("byte_fallback", False)
    kept = (
        {f"<0x{b:02X}>" for b in range(256)} | {"<unk>"} if fallback else set(BYTE_TO_CHAR.values())
    )
    for token, _ in sorted(counts.items(), key=lambda kv: (-kv[1], vocab[kv[0]])):
        if len(kept) >= size:
            break
        try:
            kept.update(merging(token, rank, [token] if token in kept else list(token)))
        except (
            AssertionError
        ):  # Llama 3 and gpt-oss have 678 whole words that no merge produces (ignore_merges)
            if not spec["model"].get("ignore_merges"):
                raise
            kept.add(token)
    order = sorted(kept, key=vocab.__getitem__)
    model = spec["model"] | {
        "vocab": {t: k for k, t in enumerate(order)},
        "merges": [list(m) for m in merges if {*m, m[0] + m[1]} <= kept],
    }
    added = {t["content"]: t for t in spec["added_tokens"]}
    return spec | {
        "model": model,
        "added_tokens": [added[c] | {"id": len(order) + k} for k, c in enumerate(controls)],
        "post_processor": None,
    }


def usage(backend: Tokenizer, texts: Sequence[str]) -> Counter[str]:
    """Count the tokens of the text."""
    found: Counter[int] = Counter()
    for at in range(0, len(texts), 1000):
        for encoding in backend.encode_batch_fast(
            list(texts[at : at + 1000]), add_special_tokens=False
        ):
            found.update(encoding.ids)
    return Counter({backend.id_to_token(i): n for i, n in found.items()})


def speaker(spec: dict[str, Any], name: str, family: Family, start: str) -> Speaker:
    vocabulary = load_vocabulary(Tokenizer.from_str(json.dumps(spec)), name, CONTROL_MARKERS)
    return Speaker(
        ChatRenderer(family, vocabulary, no_template, ""), vocabulary.control_token_ids[start]
    )


def no_template(*_: object, **__: object) -> str:
    raise AssertionError("plain text has no template")


def open_speakers(
    folder: Path,
    size: int,
    texts_of: Callable[[str], Sequence[str]],
    names: Iterable[str] = TOKENIZERS,
) -> dict[str, Speaker]:
    """Load the cut tokenizers of teachers and student from `folder`, or build them once.

    texts_of(who) = the text that decides the cut.
    """
    out = {}
    for who in names:
        source = TOKENIZERS[who]
        path = folder / f"{who}.tokenizer.json"
        if not path.is_file():
            spec = json.loads(
                (data.data_folder() / "tokenizers" / source / "tokenizer.json").read_text()
            )
            spec["added_tokens"] = [t for t in spec["added_tokens"] if t["special"]]
            counts = usage(Tokenizer.from_str(json.dumps(spec)), texts_of(who))
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(
                json.dumps(cut(spec, counts, size, (STARTS[who], FAMILIES[who].stop_tokens[0])))
            )
        out[who] = speaker(
            json.loads(path.read_text()), f"{source}, cut", FAMILIES[who], STARTS[who]
        )
    return out
