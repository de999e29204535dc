"""Random models have the architecture of their family and depend on the seed alone."""

from __future__ import annotations

import pytest
import torch

from persea.chat.families import FAMILIES as ALL_FAMILIES
from persea.chat.messages import Conversation, Text
from persea.errors import DataError
from persea.models.loading import ModelSource, load_model
from persea.models.random_init import random_init
from tests.conftest import FAMILIES
from tests.models.conftest import RANDOM, SIZES


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_model_of_each_family_runs(family: str, tiny_of):
    renderer = tiny_of(family).renderer
    tokens = renderer.render(Conversation.from_question("Hello").with_answer(Text("Hi")))
    source = ModelSource("random", tokenizer=str(tiny_of(family).folder), sizes=RANDOM)
    model = load_model(source, renderer, "w")
    assert not model.training
    assert (
        model.config.model_type
        == {"llama": "llama", "qwen": "qwen3", "gemma": "gemma3_text", "gpt-oss": "gpt_oss"}[family]
    )
    with torch.inference_mode():
        logits = model(torch.from_numpy(tokens.ids_T)[None].long()).logits
    assert logits.shape == (1, len(tokens), len(renderer.vocabulary))
    assert torch.isfinite(logits).all()
    again, other = (
        random_init(family, len(renderer.vocabulary), SIZES | {"seed": s}) for s in (1, 2)
    )
    first = model.get_input_embeddings().weight
    assert torch.equal(first, again.get_input_embeddings().weight)
    assert not torch.equal(first, other.get_input_embeddings().weight)


def test_a_random_model_of_an_unknown_family_is_refused():
    with pytest.raises(DataError, match="no small architecture known for family 'falcon'"):
        random_init("falcon", 100, SIZES)


def test_families_without_a_configuration_are_refused() -> None:
    assert {f.name for f in ALL_FAMILIES if f.random_config} == set(FAMILIES)
    for family in ALL_FAMILIES:
        if family.random_config is None:
            with pytest.raises(DataError, match="no small architecture known"):
                random_init(family.name, 100, SIZES)
