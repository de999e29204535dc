"""Save the checkpoints of one training, together with its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from persea.errors import RunInterrupted
from persea.training.checkpoint import TrainerState, save_checkpoint
from persea.training.distributed.world import World
from persea.training.metrics_log import MetricsLog


@dataclass
class CheckpointWriter:
    """Saves the state of one training.

    Attributes:
        folder: The run folder's `train`.
        inputs: Recipe and data as JSON.
        parameters: The trainable parameters.
        optimizer: Their optimiser.
        world: This process among all processes; the first writes.
        log: Lines of metrics, synced with each checkpoint.
        saved_step: Step of the newest checkpoint.
    """

    folder: Path
    inputs: Mapping[str, Any]
    parameters: Sequence[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    world: World
    log: MetricsLog
    saved_step: int

    def save(self, state: TrainerState, source_state: bytes) -> None:
        """Save a state. See `save_checkpoint`."""
        if not self.world.rank:
            self.log.sync()
        save_checkpoint(
            self.folder,
            self.inputs,
            state,
            self.parameters,
            self.optimizer,
            self.world,
            source_state,
        )
        self.saved_step = state.step

    def save_interrupted(
        self, state: TrainerState, source_state: bytes, signal_number: int
    ) -> RunInterrupted:
        """Save the last whole step unless it is saved, and return the error to raise."""
        if state.step == 0:
            return RunInterrupted(signal_number, "no step was finished")
        if self.saved_step != state.step or state.open_line is not None:
            self.save(state, source_state)
        return RunInterrupted(signal_number, f"step {state.step} is saved")
