"""The matrices of a model that have a row for each token: their names and numbers of rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from persea.errors import DataError, RefusedError
from persea.models.loading import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_meta_model(source: ModelSource, where: str) -> PreTrainedModel:
    """Load the architecture of a model without weights, on torch's meta device.

    Raises:
        DataError: The folder holds no causal model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source.model, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False
            )
            return model
    except Exception as error:  # transformers raises a dozen types for a folder without a model
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"cannot read its configuration: {reason}",
            where=where,
            remedy="the folder needs config.json of a causal model",
        ) from error


def count_embedding_rows(model: PreTrainedModel, vocab_size: int, where: str) -> int:
    """Return the number of rows of a model's embedding and head.

    Raises:
        RefusedError: The weights are quantized, embedding and head are no plain matrices of equal
            rows, or another part has one row a token too.
        DataError: There are fewer rows than tokens.
    """
    import torch

    embedding, head, remedy = (
        model.get_input_embeddings(),
        model.get_output_embeddings(),  # type: ignore[no-untyped-call]
        "extend a model with one embedding and one linear head",
    )
    if getattr(model.config, "quantization_config", None) is not None:
        raise RefusedError(
            "its weights are quantized: means of rows cannot be written back",
            where=where,
            remedy="extend the model that it was quantized from",
        )
    if type(head) is not torch.nn.Linear or not isinstance(embedding, torch.nn.Embedding):
        raise RefusedError(
            f"its embedding is a {type(embedding).__name__} and its head a {type(head).__name__}",
            where=where,
            remedy=remedy,
        )
    rows = len(embedding.weight)
    if len(head.weight) != rows:
        raise RefusedError(
            f"its embedding has {rows:,} rows and its head {len(head.weight):,}",
            where=where,
            remedy=remedy,
        )
    if rows < vocab_size:
        raise DataError(
            f"{rows:,} rows for a vocabulary of {vocab_size:,} tokens",
            where=where,
            remedy="tokenizer and model do not belong together",
        )
    more = [
        name
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Embedding) and m is not embedding and m.num_embeddings == rows
    ]
    if more or getattr(model.config.get_text_config(), "vocab_size_per_layer_input", None):
        raise RefusedError(
            f"another part has one row a token too: "
            f"{more[0] if more else 'the embeddings of each layer'}",
            where=where,
            remedy=remedy,
        )
    return rows


def token_ids_in_config(config: Mapping[str, Any]) -> set[int]:
    """Return all token ids in a model's configuration, at any depth.

    Some belong to tokens that the tokenizer does not know.
    """
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= token_ids_in_config(value)
        elif re.search(r"_token_(?:ids?|index)$", str(key)):
            found |= {
                i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)
            }
    return found
