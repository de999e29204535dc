"""Answers of a batch are those of each prompt alone, and their distributions those of a second pass
over them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from persea.distributions import SparseDistributions
from persea.distributions.blocks import BlockedLogits
from persea.errors import TeacherError
from persea.teachers.engines import Sampling, batched_answers, batching
from persea.teachers.engines.batched_answers import generate_batched
from persea.teachers.engines.batching import Generation
from tests.teachers.engines.test_transformers import NAMES, Whole, asked, engine, opened

NEW = 12


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_each_prompt_alone(name: str, temperature: float) -> None:
    renderer, _ = opened(name)
    prompts = asked(renderer)
    sampling = Sampling(temperature, seed=3)
    told: list[float] = []
    model = replace(engine(name, batch=5), sampling=sampling, on_progress=told.append)
    found = model.generate_with_distributions(prompts, renderer.stop_ids, NEW, Whole())
    alone = [list(model.stream(p, renderer.stop_ids, NEW, sampling)) for p in prompts]
    assert [one.ids_T.tolist() for one in found] == alone
    assert [a.tolist() for a in model.generate(prompts, renderer.stop_ids, NEW)] == alone
    assert told[-1] == 1.0 and all(0 < share <= 1 for share in told)
    sequences = [np.concatenate([p, one.ids_T]) for p, one in zip(prompts, found, strict=True)]
    masks = [np.arange(len(s)) >= len(p) for s, p in zip(sequences, prompts, strict=True)]
    for one, rows in zip(found, model.compute_logprobs(sequences, masks), strict=True):
        kept = one.distributions
        assert kept is not None and len(kept) == len(rows) == len(one.ids_T)
        assert np.allclose(kept.probs_M.reshape(rows.shape), rows.exp().numpy(), atol=2e-4)
        assert np.allclose(
            kept.target_logprob_N, rows[range(len(rows)), one.ids_T.tolist()], atol=2e-3
        )


class Noting:
    """A reducer that notes which positions it is given, and stores the target alone."""

    def __init__(self) -> None:
        self.given: list[tuple[int, int, int]] = []
        self.sizes: list[int] = []

    def reduce(
        self, blocks: BlockedLogits, index_N: np.ndarray, row_N: np.ndarray, target_N: np.ndarray
    ) -> SparseDistributions:
        self.given += zip(index_N.tolist(), row_N.tolist(), target_N.tolist(), strict=True)
        self.sizes.append(len(blocks))
        return SparseDistributions(
            np.arange(len(blocks) + 1),
            target_N.astype(np.int32),
            np.ones(len(blocks), np.float32),
            blocks.token_logprobs(target_N),
        )


def test_each_token_is_reduced_once_and_places_are_filled_again() -> None:
    renderer, _ = opened("qwen-sapling")
    prompts, noting = asked(renderer), Noting()
    model = engine("qwen-sapling", batch=4)
    found = model.generate_with_distributions(prompts, renderer.stop_ids, NEW, noting)
    assert sorted(noting.given) == [
        (k, n, token) for k, one in enumerate(found) for n, token in enumerate(one.ids_T.tolist())
    ]
    assert max(noting.sizes) == 4  # never more than the batch holds
    assert len({len(one.ids_T) for one in found}) > 1  # answers ended at different times


def test_prompts_of_about_one_length_are_prefilled_together() -> None:
    made = [Generation([7] * n, (), 4, Sampling()) for n in (100, 98, 90, 60, 20, 19, 2)]
    groups = [[len(g.prompt) for g in group] for group in batched_answers._groups(made)]
    assert groups == [[100, 98, 90], [60], [20, 19], [2]]
    assert list(batched_answers._groups([])) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_cache_cannot_be_joined_answers_alike(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer, _ = opened("llama-sapling")
    prompts = asked(renderer)[:4]
    model = replace(engine("llama-sapling"), sampling=Sampling(temperature, seed=1))
    wanted = [a.tolist() for a in model.generate(prompts, renderer.stop_ids, NEW)]
    monkeypatch.setattr(batching, "JOINABLE_LAYERS", frozenset())
    assert generate_batched(model, prompts, renderer.stop_ids, NEW) is None
    found = model.generate_with_distributions(prompts, renderer.stop_ids, NEW, Whole())
    assert [one.ids_T.tolist() for one in found] == wanted
    assert all(one.distributions is None for one in found)  # they are scored afterwards


def test_a_model_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer, model = opened("llama-sapling")
    monkeypatch.setattr(
        type(model), "forward", lambda *given, **named: (_ for _ in ()).throw(MemoryError("full"))
    )
    with pytest.raises(TeacherError, match="MemoryError: full -> lower the batch size"):
        engine("llama-sapling").generate(asked(renderer)[:2], renderer.stop_ids, NEW)
    assert torch.is_grad_enabled()
