"""Optimisers by name: groups, Muon beside AdamW, and checkpoints that continue each exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from persea.config.optimization import OptimizerName, WeightDecayOn
from persea.errors import MissingRequirementError, RefusedError
from persea.training.checkpoint import TrainerState, load_checkpoint, save_checkpoint
from persea.training.distributed.world import World
from persea.training.optimizers import build_optimizer
from persea.training.settings import TrainingSettings

SETTINGS = TrainingSettings(
    steps=4,
    learning_rate=0.01,
    warmup_steps=0,
    weight_decay=0.1,
    max_grad_norm=1.0,
    checkpoint_every=2,
    log_every=1,
    seed=0,
    max_skipped_steps=0,
)
HERE = ("adamw_torch", "adamw_torch_fused", "muon")


def weights() -> list[torch.nn.Parameter]:
    """An embedding, a norm, a matrix and a bias, the vectors between the matrices."""
    dice = torch.Generator().manual_seed(3)
    shapes = ((6, 4), (4,), (5, 4), (5,))
    return [torch.nn.Parameter(torch.randn(shape, generator=dice)) for shape in shapes]


def built(name: str, parameters: list[torch.nn.Parameter], **changes: Any) -> torch.optim.Optimizer:
    settings = replace(SETTINGS, optim=OptimizerName(name), **changes)
    return build_optimizer(parameters, settings, frozenset({id(parameters[0])}))


def step(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], k: int) -> None:
    for n, p in enumerate(parameters):
        p.grad = torch.full_like(p, 0.1 * (n + 1)) * torch.linspace(-1, 1, p.numel()).view_as(p) + k
    for group in optimizer.param_groups:
        group["lr"] = 0.01 / (k + 1)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def test_norms_and_biases_do_not_decay_unless_every_weight_does() -> None:
    parameters = weights()
    groups = built("adamw_torch", parameters).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(2, 0.1), (2, 0.0)]
    (group,) = built("adamw_torch", parameters, weight_decay_on=WeightDecayOn.ALL).param_groups
    assert group["weight_decay"] == 0.1 and len(group["params"]) == 4


def test_fused_is_the_same_but_for_rounding() -> None:
    results = []
    for name in ("adamw_torch", "adamw_torch_fused"):
        parameters = weights()
        optimizer = built(name, parameters)
        for k in range(3):
            step(optimizer, parameters, k)
        results.append(parameters)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


def test_muon_steps_matrices_and_adamw_the_rest() -> None:
    parameters, others = weights(), weights()
    muon, adamw = built("muon", parameters), built("adamw_torch", others)
    step(muon, parameters, 0)
    step(adamw, others, 0)
    same = [torch.equal(a, b) for a, b in zip(parameters, others, strict=True)]
    assert same == [True, True, False, True]


@pytest.mark.parametrize("name", HERE)
def test_a_checkpoint_continues_exactly(tmp_path: Path, name: str) -> None:
    whole, halved = weights(), weights()
    optimizer = built(name, whole)
    for k in range(4):
        step(optimizer, whole, k)
    optimizer = built(name, halved)
    for k in range(2):
        step(optimizer, halved, k)
    state = TrainerState(2, 0, 0.0, (), (), {}, None)
    save_checkpoint(tmp_path, {}, state, halved, optimizer, World())
    again = [torch.nn.Parameter(torch.zeros_like(p)) for p in halved]
    optimizer = built(name, again)
    (record,) = (tmp_path / "checkpoints").glob("*.json")
    load_checkpoint(record, {}, again, optimizer, World())
    for k in range(2, 4):
        step(optimizer, again, k)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_what_a_machine_or_a_model_lacks_is_refused() -> None:
    with pytest.raises(MissingRequirementError, match="adamw_8bit needs"):
        built("adamw_8bit", weights())
    with pytest.raises(RefusedError, match="no matrix is trained besides embeddings"):
        built("muon", weights()[:2])
