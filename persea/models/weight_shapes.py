"""Shapes of the weights in a local folder, read without torch and transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_weight_shapes(folder: Path) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return name and shape of each tensor, from the headers of the safetensors files.

    An output head that is tied to the embedding counts once, also if the file holds it.
    """
    is_tied = bool(read_text_config(folder).get("tie_word_embeddings", False))
    return tuple(
        (name, tuple(tensor["shape"]))
        for name, tensor in _read_headers(folder).items()
        if not (is_tied and name == "lm_head.weight")
    )


def read_stored_dtype(folder: Path) -> str:
    """Return the type of the largest tensor as torch names it; "" if it is no floating point."""
    tensors = _read_headers(folder).values()
    largest = max(tensors, key=lambda t: math.prod(t["shape"]), default={"dtype": ""})
    return TORCH_NAMES.get(largest["dtype"], "")


def _read_headers(folder: Path) -> dict[str, dict[str, Any]]:
    """Return name -> dtype and shape of each tensor of all safetensors files."""
    tensors: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        tensors |= {name: t for name, t in header.items() if name != "__metadata__"}
    return tensors


def read_text_config(folder: Path) -> dict[str, Any]:
    """Return config.json, the values of its text_config on top; {} if there is none."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(config, dict):
        return {}
    text_config = config.get("text_config")
    return config | (text_config if isinstance(text_config, dict) else {})
