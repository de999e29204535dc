"""Tiny tokenizers with the traits of real families, trained in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
    trainers,
)

CORPUS = [
    "the cat sat on the mat, the dog did not",
    "hello, hello world! hello there",
    "def f(x):\n    return x\n\n\n",
    "xin chào thế giới",
    "你好世界 你好 世界",
    "สวัสดีชาวโลก สวัสดี",
    "こんにちは、世界。こんにちは",
    "user assistant system INST 1234 12",
] * 3
CONTROL = ("<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
BYTES = [f"<0x{b:02X}>" for b in range(256)]
SPM_DECODERS = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]

# Prefix-space forms of SentencePiece BPE: (normaliser, pre-tokeniser) as their files have them.
PREFIX_FORMS: dict[str, tuple[Any, Any]] = {
    # Llama 2, Mistral v0.1, Mixtral, TinyLlama, Phi-3, Zephyr: "legacy"
    "prepend": (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
    ),
    # Mistral v0.3, Llama 2 not legacy
    "metaspace first": (
        None,
        pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False),
    ),
    "metaspace always": (
        None,
        pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=False),
    ),
    "metaspace words": (
        None,
        pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=True),
    ),
    # what transformers 5 makes of a legacy tokenizer.model
    "converted": (
        normalizers.Sequence(
            [normalizers.Replace(" ", "▁"), normalizers.Replace(Regex(r"\A▁"), "▁▁")]
        ),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=False)]
        ),
    ),
    # LLM-jp: no space behind a line break
    "beginning": (
        normalizers.Sequence(
            [
                normalizers.Replace(Regex(r"(?<!\n)^"), "▁"),
                normalizers.Replace(Regex(" "), "▁"),
            ]
        ),
        None,
    ),
    "none": (normalizers.Replace(" ", "▁"), None),
}


def add_control(
    tokenizer: Tokenizer, rstrip: Sequence[str] = (), lstrip: Sequence[str] = ()
) -> Tokenizer:
    """Add CONTROL, some with flags."""
    tokenizer.add_special_tokens(
        [
            AddedToken(c, special=True, normalized=False, rstrip=c in rstrip, lstrip=c in lstrip)
            for c in CONTROL
        ]
    )
    return tokenizer


def sentencepiece_bpe(
    form: str = "none",
    *,
    rstrip: Sequence[str] = (),
    lstrip: Sequence[str] = (),
    size: int = 520,
    corpus: Sequence[str] = tuple(CORPUS),
) -> Tokenizer:
    """A SentencePiece BPE with byte fallback in one of PREFIX_FORMS."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[*CONTROL, *BYTES],
            show_progress=False,
            limit_alphabet=80,
        ),
    )
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.normalizer, tokenizer.pre_tokenizer = PREFIX_FORMS[form]
    tokenizer.decoder = decoders.Sequence(SPM_DECODERS)
    return add_control(tokenizer, rstrip, lstrip)


def byte_level_bpe(
    *,
    prefix: bool = False,
    rstrip: Sequence[str] = (),
    lstrip: Sequence[str] = (),
    ignore_merges: bool = False,
) -> Tokenizer:
    """A byte-level BPE, with `add_prefix_space` as OLMo's or GPT-J's relatives have it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return add_control(tokenizer, rstrip, lstrip)


def unigram(
    form: str = "none",
    *,
    fallback: bool = True,
    size: int = 400,
    corpus: Sequence[str] = tuple(CORPUS),
    rstrip: Sequence[str] = (),
) -> Tokenizer:
    """A SentencePiece Unigram in one of PREFIX_FORMS, as Japanese families have it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(
        corpus,
        trainers.UnigramTrainer(
            vocab_size=size,
            special_tokens=[*CONTROL, *(BYTES if fallback else [])],
            unk_token="<unk>",
            show_progress=False,
            max_piece_length=8,
        ),
    )
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = []
    spec["model"]["byte_fallback"] = fallback
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.normalizer, tokenizer.pre_tokenizer = PREFIX_FORMS[form]
    tokenizer.decoder = decoders.Sequence(SPM_DECODERS)
    return add_control(tokenizer, rstrip)


TEMPLATES = {
    "llama2": (
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "phi3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "plain": (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}"
        "{{ '</s>' if m.role == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    "separated": (
        "{% for m in messages %}{{ '<|' + m.role + '|>SEP' + m.content + '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>SEP' }}{% endif %}"
    ),
    "bare": (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
}


def save_model_folder(tokenizer: Tokenizer, template: str, folder: Path) -> Path:
    """Save a tokenizer with a chat template as transformers does."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATES[template],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    return folder
