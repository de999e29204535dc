"""A prompt that is continued from a shared prefix gets the answer that it gets alone."""

from __future__ import annotations

import functools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from persea.errors import TeacherError
from persea.teachers.engines import Sampling
from persea.teachers.engines.batched_answers import generate_batched
from persea.teachers.engines.shared_prefix import compute_shared_prefix, count_shared_tokens
from persea.teachers.engines.transformers import TransformersEngine
from tests.teachers.engines.test_transformers import NAMES, Whole, engine, opened

NEW, SHARED = 8, 30


def prompts_of(lengths: tuple[int, ...], shared: int = SHARED) -> list[np.ndarray]:
    """Prompts with one beginning; `lengths` has how many tokens each has behind it."""
    draw = random.Random(0)
    first = [draw.randrange(5, 500) for _ in range(shared)]
    return [
        np.array([*first, 5 + k, *(draw.randrange(5, 500) for _ in range(n - 1))], np.int32)
        for k, n in enumerate(lengths)
    ]


def test_the_shared_tokens_are_counted_and_one_is_left_to_each_prompt() -> None:
    assert count_shared_tokens([[1, 2, 3, 4], [1, 2, 4], [1, 2, 3]]) == 2
    assert count_shared_tokens([[1, 2, 3], [1, 2, 3]]) == 2
    assert count_shared_tokens([[1, 2], [1, 2, 3]]) == 1
    assert count_shared_tokens([[3, 1], [1, 3]]) == 0
    assert count_shared_tokens([[1, 2, 3]]) == count_shared_tokens([]) == 0
    assert count_shared_tokens([[1], [1, 2]]) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_each_prompt_alone(name: str, temperature: float) -> None:
    prompts = prompts_of((20, 19, 18, 5, 4, 1, 9))
    sampling = Sampling(temperature, seed=2)
    model = replace(engine(name, batch=5), sampling=sampling)
    assert compute_shared_prefix(model, [p.tolist() for p in prompts]) is not None
    widths: list[int] = []
    forward = model.model.forward

    @functools.wraps(forward)
    def noting(*given: object, **named: object) -> object:
        widths.append(named["input_ids"].shape[1])  # type: ignore[attr-defined]
        return forward(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.model, "forward", noting)
        found = generate_batched(model, prompts, (), NEW, Whole())
    assert found is not None
    assert widths[0] == SHARED and max(widths[1:]) == 20  # computed once
    alone = [list(model.stream(p, (), NEW, sampling)) for p in prompts]
    assert [one.ids_T.tolist() for one in found] == alone
    sequences = [np.concatenate([p, one.ids_T]) for p, one in zip(prompts, found, strict=True)]
    masks = [np.arange(len(s)) >= len(p) for s, p in zip(sequences, prompts, strict=True)]
    for one, rows in zip(found, model.compute_logprobs(sequences, masks), strict=True):
        assert one.distributions is not None
        probs = one.distributions.probs_M.reshape(rows.shape)
        assert np.allclose(probs, rows.exp().numpy(), atol=2e-4)


@pytest.mark.parametrize("behind", [(90, 88, 86, 60, 3), (120, 119, 118, 60, 3)])
def test_a_window_that_would_slide_computes_prompts_whole(behind: tuple[int, ...]) -> None:
    """The Gemma sapling's window is 128 tokens: the answers of the first case slide later."""
    model = engine("gemma-sapling", batch=5)
    prompts = prompts_of(behind, 36)
    found = generate_batched(model, prompts, (), NEW)
    assert found is not None
    alone = [list(model.stream(p, (), NEW, Sampling())) for p in prompts]
    assert [one.ids_T.tolist() for one in found] == alone


def test_what_does_not_pay_or_cannot_be_continued_has_no_prefix() -> None:
    model = engine("llama-sapling")
    few, short = prompts_of((3, 4)), prompts_of((3,) * 40, 15)
    for prompts in (few, short):
        assert compute_shared_prefix(model, [p.tolist() for p in prompts]) is None
    enough = [p.tolist() for p in prompts_of((3,) * 9)]
    assert compute_shared_prefix(model, enough) is not None
    config = AutoConfig.for_model(
        "mamba", vocab_size=600, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    states = AutoModelForCausalLM.from_config(config).eval()
    assert compute_shared_prefix(TransformersEngine(states, 600), enough) is None
    config = AutoConfig.for_model(
        "llama",
        vocab_size=600,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )
    stretched = AutoModelForCausalLM.from_config(config).eval()
    assert compute_shared_prefix(TransformersEngine(stretched, 600), enough) is None


def test_a_model_that_fails_on_the_prefix_is_one_line() -> None:
    _, model = opened("llama-sapling")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(model), "forward", lambda *a, **k: (_ for _ in ()).throw(MemoryError("full"))
        )
        with pytest.raises(TeacherError, match="MemoryError: full -> lower the batch size"):
            engine("llama-sapling").generate(prompts_of((3,) * 9), (), NEW)
    assert torch.is_grad_enabled()
