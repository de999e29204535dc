"""Record the steps of one training: lines of metrics, skipped steps, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from persea.errors import RefusedError, RunInterrupted
from persea.training.checkpoint import TrainerState, save_checkpoint
from persea.training.distributed.world import World
from persea.training.metrics_log import MetricsLog
from persea.training.settings import TrainingSettings


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


def append_log(state: TrainerState, line: Mapping[str, Any], logged: bool) -> TrainerState:
    """Return the state with a log line, which lists the steps skipped since the line before."""
    if not logged:
        return state
    since = state.log_history[-1]["step"] if state.log_history else 0
    skipped = [one for one in state.skipped_steps if one["step"] > since]
    entry = {k: v for k, v in line.items() if k != "left"} | (
        {"skipped": skipped} if skipped else {}
    )
    return replace(state, log_history=(*state.log_history, entry))


def record_skipped_step(
    state: TrainerState,
    line: Mapping[str, Any],
    settings: TrainingSettings,
    log: MetricsLog,
    world: World,
) -> TrainerState:
    """Return the state with a skipped step; raise RefusedError if there were too many.

    metrics.jsonl lists the skipped steps in both cases.
    """
    loss, norm, names = f"{line['loss']:g}", f"{line['gradient_norm']:g}", sorted(line["share"])
    state = replace(
        state,
        skipped_steps=(
            *state.skipped_steps,
            {"step": state.step, "loss": loss, "gradient_norm": norm, "teachers": names},
        ),
    )
    if len(state.skipped_steps) <= settings.max_skipped_steps:
        if state.step < settings.steps or not state.log_history:
            return state  # the next log line lists the step
        return replace(
            state,
            log_history=(
                *state.log_history[:-1],
                {**state.log_history[-1], "skipped": list(state.skipped_steps)},
            ),
        )
    if not world.rank:
        log.update((*state.log_history, {"step": state.step, "skipped": list(state.skipped_steps)}))
    raise RefusedError(
        f"loss {loss}, gradient norm {norm} at step {state.step} "
        f"(teachers: {', '.join(names)}): not applied"
        + (
            f", like {settings.max_skipped_steps} steps before it"
            if settings.max_skipped_steps
            else ""
        ),
        where="train",
        remedy="lower training.learning_rate, or inspect the batch; the last checkpoint is finite "
        "(training.max_skipped_steps: most steps to skip)",
    )
