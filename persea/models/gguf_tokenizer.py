r"""Rebuild the tokenizer that a GGUF file describes, as a `tokenizers` tokenizer.

A GGUF file holds tokens and merges, and names its split patterns instead of containing them
(`tokenizer.ggml.pre`). transformers 5.24 replaces several of these names by GPT-2's pattern without
a warning, so persea keeps its own table: what llama.cpp does for each name
(https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp), with the pattern of the
model's own tokenizer.json where llama.cpp quotes it. A name outside the table is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from persea.errors import DataError
from persea.models.gguf_header import GgufHeader

# `tokenizer.ggml.token_type`
UNKNOWN_TYPE, CONTROL_TYPE, USER_DEFINED_TYPE, UNUSED_TYPE, BYTE_TYPE = 2, 3, 4, 5, 6
SPECIAL_TOKENS = {  # transformers' name -> metadata key
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
STOP_TOKEN_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
TEMPLATE_KEY = "tokenizer.chat_template"
OWN_TOKENIZER_REMEDY = (
    "put the model's tokenizer.json and tokenizer_config.json beside the file and name the folder, "
    "or write `tokenizer: FOLDER` in the recipe"
)
GEMMA_ARCHITECTURES = ("gemma", "gemma2", "gemma3")

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
SEED_CODER = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}"
    rf"| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
)
_CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_PUNCTUATION_AND_SLASH = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
TEKKEN = _CASED_WORDS % ("", "") + r"|\p{N}" + _PUNCTUATION_AND_SLASH
GPT4O = (
    _CASED_WORDS % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?")
    + r"|\p{N}{1,3}"
    + _PUNCTUATION_AND_SLASH
)
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    rf"|{_SPACES}",
)
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGIT)


@dataclass(frozen=True)
class SplitRule:
    """How a byte-level tokenizer splits a text into words before it merges.

    Attributes:
        patterns: Each one splits the pieces that the one before it left.
        ignore_merges: A word that is a token stays whole, also if no merges lead to it.
        adds_bos: Whether BOS stands before a text if the file does not say so.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False


_GPT2_RULE, _DIGITS_RULE = SplitRule((GPT2,)), SplitRule((DIGIT, GPT2))
_LLAMA3_RULE = SplitRule((LLAMA3,), ignore_merges=True, adds_bos=True)
_QWEN2_RULE, _GPT4O_RULE = SplitRule((QWEN2,)), SplitRule((GPT4O,))
SPLIT_RULES: Mapping[str, SplitRule] = {
    **dict.fromkeys(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4",
         "gigachat", "a.x-4.0", "mellum"),
        _GPT2_RULE,
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
         "mellum2"),
        _DIGITS_RULE,
    ),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        _LLAMA3_RULE,
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), SplitRule((LLAMA3,))),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan",
         "solar-open", "grok-2"),
        _QWEN2_RULE,
    ),
    "qwen35": SplitRule((QWEN35,)),
    "tekken": SplitRule((TEKKEN,), ignore_merges=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), _GPT4O_RULE),
    "seed-coder": SplitRule((SEED_CODER,)),
    "deepseek-coder": SplitRule(DEEPSEEK_CODER),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), SplitRule(DEEPSEEK3)),
}  # fmt: skip


def stop_token_ids(header: GgufHeader) -> tuple[int, ...]:
    """Return the ids that end a text or a turn, as the file's metadata names them."""
    num_tokens = len(header.metadata.get("tokenizer.ggml.tokens") or ())
    ids = (int(header.metadata.get(key, -1)) for key in STOP_TOKEN_KEYS)
    return tuple(dict.fromkeys(i for i in ids if 0 <= i < num_tokens))


def tokenizer_notes(header: GgufHeader) -> list[str]:
    """Return what a GGUF file lacks beside a tokenizer's folder, for people."""
    notes = []
    if not header.metadata.get(TEMPLATE_KEY):
        notes.append("the file holds no chat template")
    others = [
        key.removeprefix(f"{TEMPLATE_KEY}.")
        for key in header.metadata
        if key.startswith(f"{TEMPLATE_KEY}.")
    ]
    if others:
        notes.append(f"its other chat templates are left out: {', '.join(sorted(others))}")
    if not stop_token_ids(header):
        notes.append("the file names no token that ends a text")
    return notes


def build_tokenizer(header: GgufHeader, where: str) -> Tokenizer:
    """Rebuild the tokenizer of a GGUF file.

    Args:
        header: The file's header.
        where: The place for error messages.

    Raises:
        DataError: persea does not know its kind or its split patterns, or the file contradicts
            itself.
    """
    kind = str(header.metadata.get("tokenizer.ggml.model", ""))
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
        raise DataError(
            f"{header.path.name} holds no tokens", where=where, remedy=OWN_TOKENIZER_REMEDY
        )
    if kind == "gpt2":
        backend = _build_byte_level(header, tokens, where)
    elif kind == "llama":
        backend = _build_sentencepiece(header, tokens, where)
    else:
        raise DataError(
            f"{header.path.name} has a tokenizer of the kind {kind!r}; persea rebuilds byte-level "
            "BPE (gpt2) and SentencePiece BPE (llama)",
            where=where,
            remedy=OWN_TOKENIZER_REMEDY,
        )
    refuse_other_tokens(header, backend, where)
    _set_bos(header, backend, _special_tokens(header).get("bos_token"))
    return backend


def _special_tokens(header: GgufHeader) -> dict[str, str]:
    """Return transformers' name of a special token, such as "eos_token" -> token."""
    tokens = header.metadata["tokenizer.ggml.tokens"]
    return {
        name: tokens[int(header.metadata[key])]
        for name, key in SPECIAL_TOKENS.items()
        if 0 <= int(header.metadata.get(key, -1)) < len(tokens)
    }


def _token_types(header: GgufHeader, num_tokens: int) -> list[int]:
    types = header.metadata.get("tokenizer.ggml.token_type")
    return list(types) if isinstance(types, list) and len(types) == num_tokens else [1] * num_tokens


def _build_byte_level(header: GgufHeader, tokens: Sequence[str], where: str) -> Tokenizer:
    name = str(header.metadata.get("tokenizer.ggml.pre", ""))
    rule = SPLIT_RULES.get(name)
    if rule is None:
        named = (
            f"names the pre-tokenizer {name!r}, whose" if name else "names no pre-tokenizer; its"
        )
        raise DataError(
            f"{header.path.name} {named} split patterns persea cannot rebuild for certain",
            where=where,
            remedy=OWN_TOKENIZER_REMEDY,
        )
    types = _token_types(header, len(tokens))
    # An unused entry only pads the list; no text may become one.
    vocab = {t: i for i, t in enumerate(tokens) if types[i] != UNUSED_TYPE}
    if len(vocab) < sum(kind != UNUSED_TYPE for kind in types):
        raise DataError(
            f"{header.path.name} lists a token twice", where=where, remedy=OWN_TOKENIZER_REMEDY
        )
    merges = [tuple(m.split(" ")) for m in header.metadata.get("tokenizer.ggml.merges", ())]
    bad = next((m for m in merges if len(m) != 2 or not vocab.keys() >= {*m, "".join(m)}), None)
    if bad or not merges:
        detail = f"an impossible merge: {' '.join(bad)!r}" if bad else "no merges"
        raise DataError(
            f"{header.path.name} holds {detail}", where=where, remedy=OWN_TOKENIZER_REMEDY
        )
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule.ignore_merges))
    splits: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == DIGIT
        else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        for pattern in rule.patterns
        if pattern != GPT2
    ]
    has_gpt2 = GPT2 in rule.patterns
    splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=has_gpt2))
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, tokens, types)
    return backend


def _build_sentencepiece(header: GgufHeader, tokens: Sequence[str], where: str) -> Tokenizer:
    """Build BPE with byte fallback, with llama.cpp's rule for the space before a text."""
    types = _token_types(header, len(tokens))
    is_gemma = header.architecture in GEMMA_ARCHITECTURES
    if is_gemma:  # the file spells a run of spaces with spaces, the merges with ▁
        tokens = ["▁" * len(t) if t and not t.strip(" ") else t for t in tokens]
    vocab = {t: i for i, t in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise DataError(
            f"{header.path.name} lists a token twice", where=where, remedy=OWN_TOKENIZER_REMEDY
        )
    scores = header.metadata.get("tokenizer.ggml.scores")
    if (
        is_gemma
    ):  # its scores do not follow its merges: runs of white space come first, then the ids
        scores = [0 if kind == USER_DEFINED_TYPE else -1 - i for i, kind in enumerate(types)]
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise DataError(
            f"{header.path.name} holds no scores of its tokens",
            where=where,
            remedy=OWN_TOKENIZER_REMEDY,
        )
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == UNKNOWN_TYPE), None)
    unknown = unknown or _special_tokens(header).get("unk_token")
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges_from_scores(vocab, types, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(header.metadata.get("tokenizer.ggml.add_space_prefix", not is_gemma))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*steps, decoders.Strip(content=" ", left=1)] if prefix else steps
    )
    _add_tokens(backend, tokens, types)
    return backend


def _merges_from_scores(
    vocab: Mapping[str, int], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Return the merges that a SentencePiece vocabulary implies, the best first.

    A token is merged from any two tokens that spell it; its score is the priority of the merge.
    """
    merges = []
    for token, i in vocab.items():
        if types[i] in (CONTROL_TYPE, UNKNOWN_TYPE, BYTE_TYPE):
            continue
        pairs = [
            (token[:k], token[k:])
            for k in range(1, len(token))
            if token[:k] in vocab and token[k:] in vocab
        ]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(scores[i], len(left), len(right), left, right) for left, right in pairs]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in merges]


def _add_tokens(backend: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Declare control tokens, and tokens that are whole wherever a text contains them."""
    backend.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t, kind in zip(tokens, types, strict=True)
            if kind in (CONTROL_TYPE, UNKNOWN_TYPE)
        ]
    )
    backend.add_tokens(
        [
            AddedToken(t, special=False, normalized=False)
            for t, kind in zip(tokens, types, strict=True)
            if kind == USER_DEFINED_TYPE
        ]
    )


def _set_bos(header: GgufHeader, backend: Tokenizer, bos: str | None) -> None:
    """Let the tokenizer put BOS before a text where the file, or else llama.cpp, does so."""
    kind = header.metadata.get("tokenizer.ggml.model")
    rule = SPLIT_RULES.get(str(header.metadata.get("tokenizer.ggml.pre", "")))
    default = kind == "llama" or bool(rule and rule.adds_bos)
    if bos and bool(header.metadata.get("tokenizer.ggml.add_bos_token", default)):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    else:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)


def refuse_other_tokens(header: GgufHeader, backend: Tokenizer, where: str) -> None:
    """Raise if a tokenizer has another token than the GGUF file at one of the file's ids.

    Control tokens behind the file's last id, which have no logit, are no difference, and neither is
    the spelling of a space.

    Args:
        header: The file's header.
        backend: The tokenizer: rebuilt, or from a folder that a recipe names.
        where: The place for error messages.

    Raises:
        DataError: A token differs.
    """
    tokens = header.metadata.get("tokenizer.ggml.tokens") or []
    types = _token_types(header, len(tokens))
    added = backend.get_added_tokens_decoder()
    names = {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        other = names.get(i)
        differs = other is None or other.replace("▁", " ") != token.replace("▁", " ")
        if (differs and kind not in (UNUSED_TYPE, UNKNOWN_TYPE)) or (
            kind == CONTROL_TYPE and i not in added
        ):
            raise DataError(
                f"token {i} of {header.path.name} is {token!r}, in its tokenizer it is "
                f"{'not there' if other is None else repr(other)}"
                f"{'' if differs else ', but no control token'}",
                where=where,
                remedy="give the tokenizer that the file was converted with",
            )
    surplus = sorted(i for i in names if i >= len(tokens) and not (i in added and added[i].special))
    if surplus:
        raise DataError(
            f"the tokenizer has {len(surplus)} tokens beyond the {len(tokens):,} of "
            f"{header.path.name}, such as {names[surplus[0]]!r}",
            where=where,
            remedy="give the tokenizer that the file was converted with",
        )


def save_tokenizer(header: GgufHeader, backend: Tokenizer, folder: Path) -> None:
    """Write a rebuilt tokenizer and the file's chat template in Hugging Face form.

    Args:
        header: The file's header.
        backend: The rebuilt tokenizer.
        folder: An existing folder.
    """
    backend.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **_special_tokens(header),
    }
    _write_json(folder / "tokenizer_config.json", config)
    template = header.metadata.get(TEMPLATE_KEY)
    if isinstance(template, str) and template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    save_stop_tokens(header, folder)


def save_stop_tokens(header: GgufHeader, folder: Path) -> None:
    """Write generation_config.json with the ids that end a text or a turn."""
    stop_ids = stop_token_ids(header)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if stop_ids:
        _write_json(folder / "generation_config.json", {"eos_token_id": list(stop_ids)})


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
