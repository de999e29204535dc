"""A toy student in several processes, for the tests of launcher, heartbeat and checkpoints.

bench/chaos_train.py kills it.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persea.models.loading import ModelSource, load_renderer
from persea.pipeline.model_refs import silence_transformers
from persea.training.distributed import heartbeat as watch
from persea.training.distributed import launcher
from persea.training.distributed.world import ParallelStrategy, World
from persea.training.loop import run_training_loop
from persea.training.loss_balancing import Group, GroupStats
from persea.training.settings import TrainingSettings
from persea.training.sharded_state import read_whole
from persea.training.student import load_student

SAPLING = Path(__file__).resolve().parent.parent / "saplings" / "llama-sapling"
SETTINGS = TrainingSettings(
    steps=6,
    learning_rate=3e-3,
    warmup_steps=2,
    weight_decay=0.01,
    max_grad_norm=1.0,
    checkpoint_every=2,
    log_every=1,
    seed=5,
    max_skipped_steps=1,
)


@dataclass(frozen=True)
class Out:
    """A loss of a number of positions."""

    loss: torch.Tensor
    num_tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Trouble:
    """A fault of one rank at a step (-1: none): a signal to itself, a loss that is NaN, an
    error."""

    rank: int = 0
    at: int = -1
    number: int = 0
    nan: bool = False
    slow: float = 0.0


def student_run(
    world: World,
    store: Any,
    folder: Path,
    shard: ParallelStrategy,
    settings: TrainingSettings,
    trouble: Trouble,
    resume: str = "auto",
) -> None:
    """Train the llama-sapling on random tokens.

    Each step has 6 texts of 9 to 14 tokens, so that the ranks have unequal numbers of positions.
    """
    torch.set_num_threads(1)
    silence_transformers()
    watch.HEARTBEAT_TIMEOUT_S = 2.0  # as a test can wait; bench/chaos_train.py waits the whole 30 s
    source = ModelSource(str(SAPLING))
    student = load_student(source, load_renderer(source, "student"), None).distribute(world, shard)
    size = len(student.renderer.vocabulary)

    def loss_of(
        step: int, part: int, parts: int, weights: Mapping[Group, float]
    ) -> tuple[Out, Mapping[Group, GroupStats]]:
        time.sleep(trouble.slow)
        mine = world.rank == trouble.rank and step == trouble.at
        if mine and trouble.number:
            os.kill(os.getpid(), trouble.number)
        dice = np.random.default_rng([7, step])
        texts = [torch.from_numpy(dice.integers(0, size, dice.integers(9, 15))) for _ in range(6)][
            6 * part // parts : 6 * (part + 1) // parts
        ]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(t) for t in texts], batch_first=True
        )
        row, at = mask[:, 1:].nonzero(as_tuple=True)
        loss = torch.nn.functional.cross_entropy(
            student.logits(ids, mask, row, at), ids[row, at + 1]
        )
        loss = loss * float("nan") if mine and trouble.nan else loss
        return Out(loss, len(row)), {
            Group(f"t{step % 2}", "noise"): GroupStats(len(row), float(loss.detach()) * len(row))
        }

    run_training_loop(
        student.trainable_parameters,
        loss_of,
        settings,
        folder,
        {"seed": settings.seed},
        lambda step, line: launcher.send_to_launcher(store, step),
        world=world,
        resume=resume,
    )


class Dice:
    """A training run that draws from every random generator, each of which must be restored on
    resume."""

    def __init__(self) -> None:
        self.parameters = [torch.nn.Parameter(torch.linspace(-1, 1, 24).reshape(4, 6))]

    def loss_of(self, step: int, part: int, parts: int) -> tuple[Out, Mapping[Group, GroupStats]]:
        noise = float(np.random.standard_normal()) + random.gauss(
            0, 1
        )  # gauss keeps half of a pair for the next call
        seen = torch.nn.functional.dropout(self.parameters[0], 0.3)
        return Out(((seen - noise) ** 2).mean(), 4), {Group("dice", "noise"): GroupStats(4, 1.0)}


def last_weights(folder: Path) -> list[torch.Tensor]:
    """Return the weights of the last checkpoint, whole."""
    path = max((folder / "checkpoints").glob("*.pt"))
    values: list[torch.Tensor | None] = torch.load(path, weights_only=True)["parameters"]
    if not path.with_suffix(".shards").exists():
        return [v for v in values if v is not None]
    whole = read_whole(path.with_suffix(".shards"))
    return [whole[f"parameter.{k}"] if v is None else v for k, v in enumerate(values)]


def final(folder: Path) -> str:
    """Return the sha256 of the last checkpoint's weights (their values, as the file contains
    seconds)."""
    import hashlib

    sha = hashlib.sha256()
    for value in last_weights(folder):
        sha.update(value.numpy().tobytes())
    return sha.hexdigest()
