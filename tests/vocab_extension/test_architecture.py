"""The matrices with a row a token: their names, their rows, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import Gemma3nTextConfig

from persea.errors import DataError, RefusedError
from persea.models.loading import ModelSource
from persea.vocab_extension.architecture import (
    count_embedding_rows,
    load_meta_model,
    token_ids_in_config,
)
from tests.conftest import ROOT


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A model folder that a test may break."""
    return Path(shutil.copytree(ROOT / "saplings" / "llama-sapling", tmp_path / "copy"))


def test_models_with_more_than_two_matrices_of_rows_are_refused(copy: Path):
    model = load_meta_model(ModelSource(str(copy)), "here")
    assert (
        all(p.is_meta for p in model.parameters())
        and count_embedding_rows(model, 2000, "here") == 2000
    )
    with pytest.raises(DataError, match="2,000 rows for a vocabulary of 2,001"):
        count_embedding_rows(model, 2001, "here")
    model.memory_bytes = torch.nn.Embedding(2000, 4, device="meta")
    with pytest.raises(RefusedError, match="here: another part has one row a token too: memory"):
        count_embedding_rows(model, 2000, "here")
    del model.memory_bytes
    model.lm_head = torch.nn.Linear(128, 2048, device="meta")
    with pytest.raises(RefusedError, match="its embedding has 2,000 rows and its head 2,048"):
        count_embedding_rows(model, 2000, "here")
    model.lm_head = torch.nn.Identity()
    with pytest.raises(RefusedError, match="its head a Identity"):
        count_embedding_rows(model, 2000, "here")


def test_an_embedding_of_each_layer_is_refused(copy: Path):
    """Gemma 3n."""
    Gemma3nTextConfig(
        vocab_size=2000,
        vocab_size_per_layer_input=1900,
        hidden_size=16,
        num_hidden_layers=2,
        hidden_size_per_layer_input=4,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_kv_shared_layers=0,
        layer_types=["full_attention", "full_attention"],
    ).save_pretrained(copy)
    with pytest.raises(RefusedError, match="the embeddings of each layer"):
        count_embedding_rows(load_meta_model(ModelSource(str(copy)), "here"), 2000, "here")


def test_ids_in_a_configuration_at_any_depth():
    inner = {"video_token_index": 9, "vocab_size": 50}
    assert token_ids_in_config(
        {"eos_token_id": [4, 1], "text_config": inner, "bos_token_id": None, "id2label": {0: "a"}}
    ) == {4, 1, 9}
