"""The student's tokenizer with extra merges, learned on scripts that it spells by bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from bench.objectives.vocabularies import FAMILIES, STARTS, TOKENIZERS, Speaker, speaker
from persea.vocab_extension import learn_merges as extension
from persea.vocab_extension.learn_merges import (
    Merge,
    count_words,
    extend_tokenizer_spec,
    old_ids_of_new_tokens,
    refuse_changed_tokens,
)
from persea.vocab_extension.resize_model import initialize_new_embeddings


def learn_merges(backend: Tokenizer, texts: Sequence[str], count: int) -> list[Merge]:
    """Return the first `count` merges of one text, however many tokens they make."""
    return extension.learn_merges(backend, count_words(backend, [texts]), count)[:count]


def open_extended(folder: Path, count: int, texts: Sequence[str]) -> Speaker:
    """Load the student of `folder` with `count` learned merges, or build it once."""
    path = folder / f"student+{count}.tokenizer.json"
    if not path.is_file():
        spec = json.loads((folder / "student.tokenizer.json").read_text())
        path.write_text(
            json.dumps(
                extend_tokenizer_spec(
                    spec, learn_merges(Tokenizer.from_str(json.dumps(spec)), texts, count)
                )
            )
        )
    return speaker(
        json.loads(path.read_text()),
        f"{TOKENIZERS['student']}, cut, +{count}",
        FAMILIES["student"],
        STARTS["student"],
    )


def carried(model: LlamaForCausalLM, plain: Speaker, longer: Speaker) -> LlamaForCausalLM:
    """Return the model with `longer`'s vocabulary.

    Old tokens keep their rows; a new token gets the mean of the rows of its old tokens.
    """
    refuse_changed_tokens(
        plain.vocabulary, longer.vocabulary, longer.vocabulary.name
    )  # tokenizers cached before 2026-11-29 have their control tokens last
    pieces = old_ids_of_new_tokens(plain.vocabulary.backend, longer.vocabulary.backend)
    if pieces:
        initialize_new_embeddings(model, pieces)
    return model
