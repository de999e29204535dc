"""Describe a student's tokenizer as a GGUF file does: tokens, types, merges or scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persea.errors import RefusedError
from persea.models.gguf_tokenizer import (
    BYTE_TYPE,
    CONTROL_TYPE,
    DIGIT,
    GPT2,
    SPLIT_RULES,
    UNKNOWN_TYPE,
    UNUSED_TYPE,
    USER_DEFINED_TYPE,
)

NORMAL_TYPE = 1
# The names that llama.cpp's own converter writes, before others with the same pattern.
USUAL_NAMES = ("llama-bpe", "smaug-bpe", "qwen2", "smollm", "gpt-2", "gpt-4o")
NO_MERGE_SCORE = -1e9  # of a token that no merge makes
HF_REMEDY = "export with --to hf and serve it with vLLM or transformers"


@dataclass(frozen=True)
class GgufVocabulary:
    """A tokenizer in the terms of a GGUF file.

    Attributes:
        model: "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE).
        pre: Name of the split patterns; "default" for SentencePiece.
        tokens: Token texts by id.
        types: GGUF token type by id.
        merges: Merges in order, two tokens with a space between; empty for SentencePiece.
        scores: Score by id; empty for byte-level BPE.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]


def gguf_vocabulary(folder: Path, num_logits: int) -> GgufVocabulary:
    """Read the tokenizer of a student's folder.

    Args:
        folder: The student's folder, with tokenizer.json.
        num_logits: Rows of the embedding. Tokens behind it are left out; missing ones are marked
            unused.

    Raises:
        RefusedError: GGUF has no form for the tokenizer.
    """
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise _refusal(f"a tokenizer of the kind {model.get('type')}", folder)
    vocab: dict[str, int] = dict(model["vocab"])
    added = {a["id"]: a for a in tokenizer.get("added_tokens", ())}
    texts = {i: token for token, i in vocab.items()} | {i: a["content"] for i, a in added.items()}
    is_sentencepiece = bool(model.get("byte_fallback"))
    unknown = model.get("unk_token") if is_sentencepiece else None
    tokens, types = [], []
    for i in range(num_logits):
        token = texts.get(i)
        tokens.append(f"[PAD{i}]" if token is None else token)
        types.append(_token_type(token, added.get(i), unknown, byte_fallback=is_sentencepiece))
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if is_sentencepiece:
        _refuse_other_sentencepiece(tokenizer, folder)
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            ranks.setdefault("".join(merge), rank)
        scores = tuple(-1.0 - ranks[t] if t in ranks else NO_MERGE_SCORE for t in tokens)
        return GgufVocabulary("llama", "default", tuple(tokens), tuple(types), (), scores)
    pre = _split_name(tokenizer, folder)
    return GgufVocabulary(
        "gpt2", pre, tuple(tokens), tuple(types), tuple(" ".join(m) for m in merges), ()
    )


def _token_type(
    token: str | None, added: Mapping[str, Any] | None, unknown: str | None, *, byte_fallback: bool
) -> int:
    if token is None:
        return UNUSED_TYPE
    if token == unknown:
        return UNKNOWN_TYPE
    if added is not None:
        return CONTROL_TYPE if added.get("special") else USER_DEFINED_TYPE
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return BYTE_TYPE if byte_fallback and is_byte else NORMAL_TYPE


def _split_name(tokenizer: Mapping[str, Any], folder: Path) -> str:
    """Return the name under which llama.cpp knows the split patterns of a byte-level BPE."""
    patterns = _split_patterns(tokenizer.get("pre_tokenizer"))
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    ignores = bool(tokenizer["model"].get("ignore_merges"))
    for name in (*USUAL_NAMES, *SPLIT_RULES):
        rule = SPLIT_RULES[name]
        if patterns is not None and rule.patterns == patterns and rule.ignore_merges == ignores:
            if normalizer not in (None, "NFC"):
                raise _refusal(f"the normaliser {normalizer}", folder)
            return name
    raise _refusal("split patterns that llama.cpp has no name for", folder)


def _split_patterns(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """Return the patterns that words are split by, in order; None if they are of another form."""
    steps = [pre_tokenizer or {}]
    if steps[0].get("type") == "Sequence":
        steps = list(steps[0]["pretokenizers"])
    patterns = []
    for step in steps:
        kind = step.get("type")
        if kind == "Split" and "Regex" in step["pattern"] and step["behavior"] == "Isolated":
            patterns.append(step["pattern"]["Regex"])
        elif kind == "Digits" and step.get("individual_digits"):
            patterns.append(DIGIT)
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            patterns += [GPT2] if step.get("use_regex", True) else []
        else:
            return None
    return tuple(patterns)


def _refuse_other_sentencepiece(tokenizer: Mapping[str, Any], folder: Path) -> None:
    normalizer = tokenizer.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    known = all(
        (s.get("type") == "Replace" and s["pattern"] == {"String": " "} and s["content"] == "▁")
        or (s.get("type") == "Prepend" and s["prepend"] == "▁")
        for s in steps
    )
    if not known:
        raise _refusal("a normaliser that llama.cpp's SentencePiece does not have", folder)


def has_space_prefix(folder: Path) -> bool:
    """Return whether a SentencePiece tokenizer puts a space before a text."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return '"Prepend"' in json.dumps(tokenizer.get("normalizer"))


def _refusal(what: str, folder: Path) -> RefusedError:
    return RefusedError(f"a GGUF file cannot hold {what}", where=str(folder), remedy=HF_REMEDY)
