"""An answer of a continuous batch is the one that the model gives alone, whoever is beside it."""

from __future__ import annotations

import random
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from persea.errors import TeacherError
from persea.teachers.engines import Sampling, batching
from persea.teachers.engines.batching import ContinuousBatch, Generation
from persea.teachers.engines.transformers import TransformersEngine
from tests.teachers.engines.test_transformers import NAMES, asked, engine, opened

NEW = 10


def jobs(
    prompts: list[np.ndarray], stop_ids: tuple[int, ...], new: int = NEW
) -> list[tuple[Any, ...]]:
    """Half of the answers are drawn, each with a seed of its own."""
    return [
        (p, stop_ids, new, Sampling(temperature=1.0 if k % 2 else 0.0, seed=k))
        for k, p in enumerate(prompts)
    ]


def alone(model: TransformersEngine, asked_for: list[tuple[Any, ...]]) -> list[list[int]]:
    return [list(model.stream(*job)) for job in asked_for]


def together(
    model: TransformersEngine, asked_for: list[tuple[Any, ...]], arrivals: list[int]
) -> list[list[int]]:
    """Answers that begin at different steps: `arrivals` has how many begin at each."""
    made = [Generation(prompt.tolist(), *rest) for prompt, *rest in asked_for]
    batch, waiting, most = ContinuousBatch(model), list(made), 0
    for count in [*arrivals, len(made)]:
        batch.add(waiting[:count])
        waiting = waiting[count:]
        most = max(most, len(batch.members))
        batch.step()
    while batch.members:
        batch.step()
    assert most > 2
    return [g.ids for g in made]


@pytest.mark.parametrize("name", NAMES)
def test_answers_that_join_at_any_step_equal_those_of_single_requests(name: str) -> None:
    renderer, _ = opened(name)
    asked_for = jobs(asked(renderer)[:8], renderer.stop_ids)
    found = together(engine(name), asked_for, [1, 2, 0, 0, 3])
    assert found == alone(engine(name), asked_for)


def test_windows_that_slide_keep_the_same_columns_for_all() -> None:
    """The Gemma sapling's window is 128 tokens; prompts end before it, at it and far behind it."""
    model = engine("gemma-sapling")
    assert model.model.config.sliding_window == 128
    draw = random.Random(0)
    prompts = [
        np.array([draw.randrange(5, 900) for _ in range(n)], np.int32) for n in (120, 126, 150, 7)
    ]
    asked_for = jobs(prompts, ())
    for arrivals in ([1, 1, 1], [2, 0, 0, 1]):
        assert together(model, asked_for, arrivals) == alone(model, asked_for)


def test_states_of_linear_attention_join_too() -> None:
    config = AutoConfig.for_model(
        "qwen3_next",
        vocab_size=200,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        num_experts=0,
        mlp_only_layers=[0, 1, 2, 3],
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    draw = random.Random(0)
    prompts = [
        np.array([draw.randrange(200) for _ in range(n)], np.int32) for n in (3, 12, 7, 1, 9)
    ]
    asked_for = jobs(prompts, (7,))
    found = TransformersEngine(model, 200)
    assert together(found, asked_for, [2, 0, 1]) == alone(found, asked_for)


def test_models_whose_caches_cannot_join_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer, _ = opened("llama-sapling")
    asked_for = jobs(asked(renderer)[:4], renderer.stop_ids, 5)
    expected = alone(engine("llama-sapling"), asked_for)
    monkeypatch.setattr(batching, "JOINABLE_LAYERS", frozenset())
    assert together(engine("llama-sapling"), asked_for, [1, 2]) == expected


def test_an_answer_that_is_cancelled_or_fails_leaves_the_others_alone() -> None:
    renderer, model = opened("llama-sapling")
    asked_for = jobs(asked(renderer)[:4], ())
    expected = alone(engine("llama-sapling"), asked_for)
    made = [Generation(prompt.tolist(), *rest) for prompt, *rest in asked_for]
    batch = ContinuousBatch(engine("llama-sapling"))
    batch.add(made)
    batch.step()
    made[0].is_cancelled = True
    made[1].draw(torch.full((5,), float("nan")))
    while batch.members:
        batch.step()
    assert [g.ids for g in made[2:]] == expected[2:]
    assert len(made[0].ids) == 2
    assert isinstance(made[1].error, TeacherError) and "not finite" in str(made[1].error)
    broken = deepcopy(model)
    broken.lm_head = None
    batch = ContinuousBatch(TransformersEngine(broken, len(renderer.vocabulary)))
    made = [Generation([5], (), 4, Sampling()) for _ in range(2)]
    batch.add(made)
    assert not batch.members
    assert all(isinstance(g.error, TeacherError) and "at once" in str(g.error) for g in made)


def test_a_batch_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = ContinuousBatch(engine("llama-sapling"))
    small, large = Generation([5], (), 9, Sampling()), Generation([5], (), 99, Sampling())
    monkeypatch.setattr(batching, "MAX_BATCH_TOKENS", 60)
    assert batch.has_room(large)  # alone
    assert batch.has_room(small, [small] * 5) and not batch.has_room(small, [small] * 6)
    assert not batch.has_room(large, [small])
    monkeypatch.setattr(batching, "MAX_BATCH_ANSWERS", 2)
    assert not batch.has_room(small, [small] * 2)
