"""Sizes from headers and configurations agree with the models that are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from persea.models.loading import ModelSource, load_model, load_renderer
from persea.models.sizes import read_model_size
from persea.models.weight_shapes import read_text_config, read_weight_shapes
from tests.conftest import ROOT

NAMES = ("llama-sapling", "qwen-sapling", "gemma-sapling", "gpt-oss-sapling")


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_weights_is_that_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    folder = ROOT / "saplings" / name
    source = ModelSource(str(folder))
    model = load_model(source, load_renderer(source), name)
    want = sum(p.numel() for p in model.parameters())
    shutil.copy(folder / "config.json", tmp_path)
    for size in (read_model_size(source), read_model_size(ModelSource(str(tmp_path)))):
        assert size is not None
        assert size.num_parameters == want
        assert (size.hidden, size.layers) == (
            model.config.hidden_size,
            model.config.num_hidden_layers,
        )


def test_random_weights_have_the_size_of_their_section() -> None:
    tokenizer = str(ROOT / "saplings" / "qwen-sapling")
    sizes = (("heads", 2), ("hidden", 32), ("layers", 2))
    source = ModelSource("random", tokenizer=tokenizer, sizes=sizes)
    model = load_model(source, load_renderer(source), "random")
    size = read_model_size(source)
    assert size is not None
    assert size.num_parameters == sum(p.numel() for p in model.parameters())
    assert (size.hidden, size.layers) == (32, 2)


def test_what_cannot_be_told_is_none(tmp_path: Path) -> None:
    assert read_model_size(ModelSource(str(tmp_path))) is None  # no configuration
    assert read_model_size(ModelSource(str(tmp_path / "gone"))) is None
    (tmp_path / "config.json").write_text("[1]")
    assert read_text_config(tmp_path) == {}


def test_a_tied_head_counts_once(tmp_path: Path) -> None:
    save_file(
        {"model.embed_tokens.weight": torch.zeros(7, 3), "lm_head.weight": torch.zeros(7, 3)},
        tmp_path / "model.safetensors",
    )
    assert len(read_weight_shapes(tmp_path)) == 2
    config = {"text_config": {"tie_word_embeddings": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_weight_shapes(tmp_path) == (("model.embed_tokens.weight", (7, 3)),)
