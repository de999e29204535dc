"""The size of a model, from its files' headers or its configuration: no weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from persea.errors import DataError
from persea.models.gguf_header import find_gguf
from persea.models.gguf_model import gguf_header
from persea.models.loading import ModelSource, local_folder
from persea.models.weight_shapes import read_text_config, read_weight_shapes

# name of a matrix in a GGUF file -> its name in transformers, which `lora.targets` uses
GGUF_MATRICES = {
    **{f"attn_{x}": f"{x}_proj" for x in ("q", "k", "v")},
    "attn_output": "o_proj",
    **{f"ffn_{x}": f"{x}_proj" for x in ("gate", "up", "down")},
}


@dataclass(frozen=True)
class ModelSize:
    """The size of a model.

    Attributes:
        shapes: Name and shape of each weight; tied weights once.
        hidden: Hidden size.
        layers: Number of layers.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    hidden: int
    layers: int

    @property
    def num_parameters(self) -> int:
        """Number of weights."""
        return sum(prod(shape) for _, shape in self.shapes)

    def num_adapter_parameters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Return the weights of LoRA: a matrix [out, in] gets [rank, in] and [out, rank]."""
        adapted = {f"{target}.weight" for target in targets}
        every_layer = "all-linear" in targets
        return sum(
            rank * sum(shape)
            for name, shape in self.shapes
            if ".".join(name.split(".")[-2:]) in adapted
            or (every_layer and len(shape) == 2 and ".layers." in f".{name}")
        )


def read_model_size(source: ModelSource, vocabulary_size: int = 0) -> ModelSize | None:
    """Return the size of a model; None if it cannot be told without its weights.

    Args:
        source: The model. Without weights in a local folder, the size is that of the model that
            transformers makes from the configuration, on torch's device without memory.
        vocabulary_size: Tokens of its tokenizer, for random weights.
    """
    try:
        gguf = None if source.is_random else find_gguf(source.model, "")
        if gguf is not None:
            return _size_of_gguf(gguf)
        folder = None if source.is_random else local_folder(source.model, "")
    except DataError:
        return None
    config = read_text_config(folder) if folder is not None else {}
    if folder is not None and any(folder.glob("*.safetensors")):
        shapes = read_weight_shapes(folder)
        return ModelSize(
            shapes, _int_of(config, "hidden_size"), _int_of(config, "num_hidden_layers")
        )
    return _size_of_config(source, folder, vocabulary_size)


def _size_of_gguf(path: Path) -> ModelSize:
    """Return the size that the header of a GGUF file states, its matrices named as in a folder."""
    shapes, layers, hidden = [], 0, 0
    for tensor in gguf_header(path, "").tensors:
        if tensor.name == "token_embd.weight":
            hidden = min(tensor.shape)
        if tensor.name.startswith("blk."):
            layers = max(layers, int(tensor.name.split(".")[1]) + 1)
        *block, name, kind = ("." + tensor.name).rsplit(".", 2)
        shapes.append((".".join([*block, GGUF_MATRICES.get(name, name), kind]), tensor.shape))
    return ModelSize(tuple(shapes), hidden, layers)


def _size_of_config(
    source: ModelSource, folder: Path | None, vocabulary_size: int
) -> ModelSize | None:
    """Return the size of the model that transformers makes from a configuration."""
    import torch
    import transformers

    auto_model: Any = transformers.AutoModelForCausalLM
    try:
        with torch.device("meta"):
            if source.is_random:
                model = _random_model(source, vocabulary_size)
            else:
                config = transformers.AutoConfig.from_pretrained(
                    folder or source.model,
                    trust_remote_code=False,
                    **({"revision": source.revision} if source.revision and not folder else {}),
                )
                model = auto_model.from_config(config)
    except Exception:  # transformers raises a dozen kinds: no configuration, no network, unknown
        return None
    config = model.config.get_text_config()
    shapes = tuple((name, tuple(p.shape)) for name, p in model.named_parameters())
    return ModelSize(shapes, config.hidden_size, config.num_hidden_layers)


def _random_model(source: ModelSource, vocabulary_size: int) -> Any:
    from persea.models.loading import load_renderer
    from persea.models.random_init import random_init

    renderer = load_renderer(source)
    return random_init(
        renderer.family.name, vocabulary_size or len(renderer.vocabulary), dict(source.sizes)
    )


def _int_of(config: dict[str, Any], key: str) -> int:
    value = config.get(key, 0)
    return value if isinstance(value, int) else 0
