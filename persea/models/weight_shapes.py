"""Shapes of the weights in a local folder, read without torch and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_weight_shapes(folder: Path) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return name and shape of each tensor, from the headers of the safetensors files.

    An output head that is tied to the embedding counts once, also if the file holds it.
    """
    is_tied = bool(read_text_config(folder).get("tie_word_embeddings", False))
    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__" and not (is_tied and name == "lm_head.weight"):
                shapes[name] = tuple(tensor["shape"])
    return tuple(shapes.items())


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
