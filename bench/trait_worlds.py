"""Exact worlds whose tokenizers have other traits than byte-level BPE: Unigram, prefix spaces.

    python bench/trait_worlds.py        (seconds)

Both models of a world define the same distribution over strings, see bench/worlds.py. Measured is
the mean total variation between them over common boundaries: raw, with persea's masks, with the
best masks (every token removed that no string of the world has there: no mask that keeps all
observed tokens can do better), and with exact conditioning, which is the least that the event map
allows. `room`: only boundaries at least three characters before the longest string, because a mask
must assume that text goes on. Writes bench/results/trait_worlds.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from bias import floors
from tabular import exact_mask, exact_weights, no_mask, persea_mask
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from worlds import WORDS, Law, Merges, World, markov, of_renderers, toy

from persea.chat.families.llama import LLAMA
from persea.chat.renderer import ChatRenderer
from persea.tokenization.vocabulary import load_vocabulary

BYTES = [f"<0x{b:02X}>" for b in range(256)]
LIMIT = 0.01  # total variation that persea's masks may leave
Pieces = dict[str, float]


@cache
def sampled_strings() -> tuple[str, ...]:
    """Return strings of the Markov distribution, on which the tokenizers are trained."""
    law = markov()
    texts, p = list(law), np.array(list(law.values()))
    chosen = np.random.default_rng(0).choice(len(texts), 20_000, p=p / p.sum())
    return tuple(texts[i] for i in chosen)


def unigram_pieces(size: int, words: bool) -> Pieces:
    """Train a Unigram of some pieces on the distribution's own strings."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    if words:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=True)
    tokenizer.train_from_iterator(
        sampled_strings(),
        trainers.UnigramTrainer(
            vocab_size=size,
            special_tokens=["<unk>"],
            unk_token="<unk>",
            show_progress=False,
            max_piece_length=4,
        ),
    )
    entries = json.loads(tokenizer.to_str())["model"]["vocab"]
    return {text.replace("▁", " "): score for text, score in entries if text != "<unk>"}


def bpe_merges(size: int, words: bool, prefix: bool = False) -> Merges:
    """Train some merges on the distribution's own strings, with or without a space in front."""
    tokenizer = Tokenizer(models.BPE())
    if prefix:
        tokenizer.normalizer = normalizers.Prepend(" ")
    if words:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.train_from_iterator(
        sampled_strings(), trainers.BpeTrainer(vocab_size=4 + size, show_progress=False)
    )
    return tuple((a, b) for a, b in json.loads(tokenizer.to_str())["model"]["merges"])


def unigram_renderer(pieces: Pieces, name: str, words: bool = False) -> ChatRenderer:
    """Return a Unigram tokenizer with byte fallback and one stop token."""
    entries = [("<unk>", 0.0), *((t.replace(" ", "▁"), s) for t, s in pieces.items())]
    tokenizer = Tokenizer(models.Unigram([*entries, *((b, -20.0) for b in BYTES)], 0, True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    if words:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=True)
    return _renderer(tokenizer, name)


def prefix_renderer(merges: Merges, name: str) -> ChatRenderer:
    """Return a SentencePiece BPE that puts a space before a text, as Llama 2 and Mistral do."""
    pairs = [tuple(piece.replace(" ", "▁") for piece in pair) for pair in merges]
    pieces = ["<unk>", *BYTES, *"abc▁", *(a + b for a, b in pairs)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)},
            merges=pairs,
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return _renderer(tokenizer, name)


def _renderer(tokenizer: Tokenizer, name: str) -> ChatRenderer:
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<|end|>"])
    return ChatRenderer(
        replace(LLAMA, stop_tokens=("<|end|>",)),
        load_vocabulary(tokenizer, name),
        lambda messages, **_: "",
        "",
    )


def unigram_of(size: int, words: bool = False) -> Callable[[str], ChatRenderer]:
    return lambda name: unigram_renderer(unigram_pieces(size, words), name, words)


def bpe_of(size: int, words: bool = False) -> Callable[[str], ChatRenderer]:
    return lambda name: toy(bpe_merges(size, words), words, name)


def prefix_of(size: int) -> Callable[[str], ChatRenderer]:
    return lambda name: prefix_renderer(bpe_merges(size, False, prefix=True), name)


# name -> (teacher, student); sizes are pieces of Unigram and merges of BPE
TRAIT_WORLDS: dict[str, tuple[Callable[[str], ChatRenderer], Callable[[str], ChatRenderer]]] = {
    "two Unigrams": (unigram_of(12), unigram_of(9)),
    "Unigram teaches BPE": (unigram_of(12), bpe_of(5)),
    "BPE teaches Unigram": (bpe_of(5), unigram_of(12)),
    "Unigram teaches BPE, words": (unigram_of(12, words=True), bpe_of(5, words=True)),
    "prefix space teaches BPE": (prefix_of(6), bpe_of(5)),
    "BPE teaches prefix space": (bpe_of(5), prefix_of(6)),
    "prefix space teaches BPE, words": (prefix_of(6), bpe_of(5, words=True)),
    "prefix space teaches Unigram": (prefix_of(6), unigram_of(12)),
}


def trait_world(name: str, law: Law | None = None) -> World:
    """Return one of TRAIT_WORLDS, with the Markov distribution or another."""
    teacher, student = TRAIT_WORLDS[name]
    law = markov() if law is None else law
    return of_renderers(name, law, teacher("teacher"), student("student"))


def main() -> None:
    masks = {
        "raw": no_mask,
        "masks": persea_mask,
        "best masks": exact_mask,
        "exact": exact_weights,
    }
    rows = [f"events {name}{room}" for room in ("", ", room for 3") for name in masks]
    result = {}
    print(f"{'world':<32}" + "".join(f"{r.removeprefix('events ')[:15]:>16}" for r in rows))
    for name in TRAIT_WORLDS:
        found = floors(trait_world(name), masks)
        result[name] = {r.removeprefix("events "): round(found[r], 5) for r in rows}
        print(f"{name:<32}" + "".join(f"{found[r]:>16.5f}" for r in rows), flush=True)
    out = Path(__file__).parent / "results" / "trait_worlds.json"
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
