"""Facts about a model that its cost follows from: weights, widths, vocabulary, context.

They come from the model's own files where these are on this machine, and otherwise from a small
catalogue of published models. Nothing is downloaded and no weights are loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from persea.errors import DataError
from persea.models.gguf_header import find_gguf
from persea.models.loading import ModelSource, local_folder
from persea.models.references import model_path
from persea.models.sizes import ModelSize, read_model_size
from persea.models.weight_shapes import read_text_config

CATALOGUE_FILE = Path(__file__).with_name("catalogue.json")
BYTES_OF_HALF_PRECISION = 2
QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.55, "mxfp4": 0.55}  # a weight, with its scales


@dataclass(frozen=True)
class ModelFacts:
    """What the cost of a model follows from.

    Attributes:
        name: The model, as the recipe names it.
        parameters: Weights.
        active_parameters: Weights that compute one token: fewer with experts.
        layers: Layers.
        hidden: Hidden size.
        kv_heads: Key and value heads of a layer.
        head_dim: Width of a head.
        vocabulary: Rows of logits.
        context: Positions.
        weight_bytes: Bytes of the weights as they are published.
        sliding_window: Positions that a layer with a sliding window keeps; 0 = no such layer.
        sliding_share: Share of the layers with a sliding window.
        source: Where the facts come from.
        date: Day of the source; "" = the files on this machine.
    """

    name: str
    parameters: int
    active_parameters: int
    layers: int
    hidden: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    weight_bytes: int
    sliding_window: int = 0
    sliding_share: float = 0.0
    source: str = ""
    date: str = ""

    @property
    def is_moe(self) -> bool:
        """Whether a token uses a part of the weights only."""
        return self.active_parameters < 0.9 * self.parameters

    @property
    def operations_per_token(self) -> float:
        """Operations of a forward pass for one token: two a weight that computes it."""
        return 2.0 * self.active_parameters

    def kv_bytes(self, context_tokens: float) -> float:
        """Return the bytes of keys and values of one sequence, in half precision.

        Args:
            context_tokens: Tokens of the sequence.
        """
        a_token = 2 * self.kv_heads * self.head_dim * BYTES_OF_HALF_PRECISION
        full = self.layers * (1 - self.sliding_share) * context_tokens
        window = min(context_tokens, self.sliding_window) if self.sliding_window else 0
        return a_token * (full + self.layers * self.sliding_share * window)

    def loaded_bytes(self, quantize: str = "none") -> int:
        """Return the bytes of the weights in memory.

        Args:
            quantize: "none", or the recipe's `quantize`.
        """
        if quantize == "none":
            return self.weight_bytes
        return min(self.weight_bytes, round(self.parameters * QUANTIZED_BYTES[quantize]))


@cache
def read_catalogue() -> dict[str, ModelFacts]:
    """Return hub id -> facts of the models of the catalogue."""
    rows = json.loads(CATALOGUE_FILE.read_text(encoding="utf-8"))["models"]
    return {row["name"]: ModelFacts(**row) for row in rows}


def is_at_hand(model: str) -> bool:
    """Return whether a model's configuration is on this machine: a folder, a file, or cached.

    Args:
        model: What the recipe names under `model:`.
    """
    try:
        if find_gguf(model, "") is not None or local_folder(model, "") is not None:
            return True
    except DataError:
        return True  # a path that does not exist: the reader of the model refuses it
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, "config.json"), str)


def find_facts(source: ModelSource, size: ModelSize | None = None) -> ModelFacts | None:
    """Return the facts of a model; None if neither its files nor the catalogue know it.

    Args:
        source: The model.
        size: Its size, where the caller has read it.
    """
    if not source.is_random and not is_at_hand(source.model):
        return read_catalogue().get(source.model)
    size = size or read_model_size(source)
    if size is None:
        return read_catalogue().get(source.model)
    return _facts_of_size(source, size)


def _facts_of_size(source: ModelSource, size: ModelSize) -> ModelFacts:
    """Return facts from weight shapes, and from the configuration where there is one."""
    folder = None if source.is_random else _config_folder(source.model)
    config: dict[str, Any] = read_text_config(folder) if folder else {}
    total, experts = size.num_parameters, _expert_parameters(size)
    used = _share_of_experts(config)
    heads = int(config.get("num_attention_heads") or 1)
    matrices = [shape for name, shape in size.shapes if "embed" in name or "token_embd" in name]
    rows = max((max(shape) for shape in matrices), default=int(config.get("vocab_size") or 0))
    types = config.get("layer_types") or []
    sliding = sum(kind == "sliding_attention" for kind in types) / len(types) if types else 0.0
    return ModelFacts(
        name=source.model,
        parameters=total,
        active_parameters=round(total - experts * (1 - used)),
        layers=size.layers,
        hidden=size.hidden,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or size.hidden // heads or 1),
        vocabulary=rows,
        context=int(config.get("max_position_embeddings") or 0),
        weight_bytes=BYTES_OF_HALF_PRECISION * total,
        sliding_window=int(config.get("sliding_window") or 0) if sliding else 0,
        sliding_share=sliding,
        source="its files on this machine",
    )


def _config_folder(model: str) -> Path | None:
    if find_gguf(model, "") is not None:
        return None
    folder = model_path(model, "")
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def _expert_parameters(size: ModelSize) -> int:
    """Return the weights of all experts, without the router."""
    return sum(prod(shape) for name, shape in size.shapes if ".experts." in name)


def _share_of_experts(config: dict[str, Any]) -> float:
    """Return the share of a layer's experts that one token uses; 1 without experts."""
    count = config.get("num_local_experts") or config.get("num_experts")
    used = config.get("num_experts_per_tok") or config.get("experts_per_token")
    return min(1.0, int(used) / int(count)) if count and used else 1.0
