"""Small randomly initialised models of each family's real architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from persea.chat.families import FAMILIES
from persea.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_POSITIONS = 1024


def random_init(family: str, vocab_size: int, sizes: dict[str, int]) -> PreTrainedModel:
    """Return a randomly initialised float32 model of a family's architecture.

    Args:
        family: Name of a family with a `random_config`.
        vocab_size: Rows of the embedding and of the logits.
        sizes: hidden (default 128), layers (3), heads (4), seed (0); a family may read more, such
            as gpt-oss experts (4).

    Raises:
        DataError: The family has no `random_config`.
    """
    import torch
    import transformers

    make_config = next((f.random_config for f in FAMILIES if f.name == family), None)
    if make_config is None:
        raise DataError(
            f"no small architecture known for family {family!r}", remedy="give a model folder"
        )
    hidden, heads = sizes.get("hidden", 128), sizes.get("heads", 4)
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": sizes.get("layers", 3),
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": hidden // heads,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config = make_config(common, sizes)
    auto_model: Any = transformers.AutoModelForCausalLM
    torch.manual_seed(sizes.get("seed", 0))
    model: PreTrainedModel = auto_model.from_config(config, dtype=torch.float32)
    return model
