"""The student's vocabulary extended: merges learned on top of its own, on text of scripts that it breaks into bytes.

The tokenizer's own merges stay first, and its own cuts between words stay: no text is cut as before by other tokens than before, except
where new merges join what the old ones leave. A student that stands takes the mean of the pieces' rows for each new token.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from bench.objectives.vocabularies import FAMILIES, STARTS, TOKENIZERS, Speaker, speaker

Merge = tuple[str, str]


def learned(backend: Tokenizer, texts: Sequence[str], count: int) -> list[Merge]:
    """Byte pair encoding gone on with, from where the tokenizer's own merges stop: up to `count` pairs, the most frequent each time."""
    words = Counter(word for text in texts for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    parts = [[t.value for t in backend.model.tokenize(word)] for word in words]
    times, pairs, where = list(words.values()), Counter[Merge](), defaultdict[Merge, set[int]](set)

    def counted(k: int, sign: int) -> None:
        for pair in itertools.pairwise(parts[k]):
            pairs[pair] += sign * times[k]
            where[pair].add(k)

    for k in range(len(parts)):
        counted(k, 1)
    out: list[Merge] = []
    while len(out) < count and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < 2:
            break
        out.append(best)
        for k in where.pop(best):
            counted(k, -1)
            parts[k] = joined(parts[k], best)
            counted(k, 1)
        del pairs[best]
    return out


def joined(parts: Sequence[str], pair: Merge) -> list[str]:
    """The pair's every occurrence made one, from the left."""
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def extended(spec: dict[str, Any], merges: Sequence[Merge]) -> dict[str, Any]:
    """A tokenizer.json's content with these merges behind its own; the controls stay last."""
    vocab = dict(spec["model"]["vocab"])
    for one, other in merges:
        vocab.setdefault(one + other, len(vocab))
    model = spec["model"] | {"vocab": vocab, "merges": [*spec["model"]["merges"], *(list(m) for m in merges)]}
    return spec | {"model": model, "added_tokens": [t | {"id": len(vocab) + k} for k, t in enumerate(spec["added_tokens"])]}


def open_extended(folder: Path, count: int, texts: Sequence[str]) -> Speaker:
    """The student of `folder` with `count` learned merges, made once and kept."""
    path = folder / f"student+{count}.tokenizer.json"
    if not path.is_file():
        spec = json.loads((folder / "student.tokenizer.json").read_text())
        path.write_text(json.dumps(extended(spec, learned(Tokenizer.from_str(json.dumps(spec)), texts, count))))
    return speaker(json.loads(path.read_text()), f"{TOKENIZERS['student']}, cut, +{count}", FAMILIES["student"], STARTS["student"])


def carried(model: LlamaForCausalLM, plain: Speaker, longer: Speaker) -> LlamaForCausalLM:
    """The model with `longer`'s vocabulary: old tokens keep their rows, a new one gets the mean of those that its bytes were before."""
    old, new = plain.vocabulary, longer.vocabulary
    if len(old) == len(new):
        return model
    ids = old.backend.get_vocab(with_added_tokens=True)
    rows_VD = model.get_input_embeddings().weight.detach().clone()
    made_VD = torch.empty(len(new), rows_VD.shape[1])
    for token, i in new.backend.get_vocab(with_added_tokens=True).items():
        pieces = [ids[token]] if token in ids else [old.backend.token_to_id(t.value) for t in old.backend.model.tokenize(token)]
        made_VD[i] = rows_VD[pieces].mean(0)
    model.resize_token_embeddings(len(new), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(made_VD)
    return model
