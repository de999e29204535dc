"""The training loop: batch, loss, optimiser step, checkpoint, in one process or several.

The loop imports no loss and no dataset; the caller passes both as one function.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from persea.errors import RefusedError
from persea.training import checkpoint as checkpoints
from persea.training import loss_balancing as balance
from persea.training.checkpoint import RESUME_AUTO, TrainerState, gather_full_tensor
from persea.training.checkpoint_writer import (
    CheckpointWriter,
    append_log,
    record_skipped_step,
)
from persea.training.distributed.world import World
from persea.training.loss_balancing import Group, GroupStats
from persea.training.metrics_log import MetricsLog
from persea.training.optimizers import build_optimizer
from persea.training.settings import TrainingSettings
from persea.training.step_watch import PartCallback, StepWatch
from persea.training.stop_signals import StepAbandoned, StopSignals, collect_stop_signals

SINGLE_PROCESS = World()


class StepLoss(Protocol):
    """A loss as the loop needs it; `persea.losses.LossOutput` is one."""

    @property
    def loss(self) -> torch.Tensor:
        """Weighted mean over the supervised positions."""

    @property
    def metrics(self) -> Mapping[str, torch.Tensor]:
        """Means over the supervised positions by name."""

    @property
    def num_tokens(self) -> int:
        """Number of supervised positions."""


# (step, part, parts, weights of groups) -> loss of the part, statistics of its groups
StepLossFn = Callable[
    [int, int, int, Mapping[Group, float]], tuple[StepLoss, Mapping[Group, GroupStats]]
]


class StepVerdict(Protocol):
    """What a watcher of the training says after a step; `TripwireVerdict` is one."""

    @property
    def is_suspect(self) -> bool:
        """Whether the weights after this step are no good checkpoint."""

    @property
    def problem(self) -> str:
        """Why the training must end; "" if it may go on."""


class BatchSource(Protocol):
    """A source of batches with state between steps (rollouts in flight) for the checkpoint."""

    def state(self) -> bytes:
        """Return the state of this process after a step."""

    def restore(self, states: tuple[bytes, ...]) -> None:
        """Restore the state before the first step.

        Args:
            states: the state of every process that saved, in the order of ranks. With another
                number of processes the source divides or drops states itself.
        """


@dataclass
class _StepTotals:
    """Sums over the parts of a step: over micro-batches, then over processes in rank order.

    `loss_sum` includes the weights of groups.
    """

    loss_sum: float = 0.0
    num_tokens: int = 0
    metric_sums: dict[str, float] = field(default_factory=dict)
    group_stats: dict[Group, GroupStats] = field(default_factory=dict)
    stop_signal: int = 0

    def add(
        self,
        loss_sum: float,
        num_tokens: int,
        metric_sums: Mapping[str, float],
        group_stats: Mapping[Group, GroupStats],
        stop_signal: int = 0,
    ) -> None:
        """Add the sums of one part."""
        self.loss_sum, self.num_tokens, self.stop_signal = (
            self.loss_sum + loss_sum,
            self.num_tokens + num_tokens,
            self.stop_signal or stop_signal,
        )
        for name, value in metric_sums.items():
            self.metric_sums[name] = self.metric_sums.get(name, 0.0) + value
        self.group_stats = balance.sum_group_stats((self.group_stats, group_stats))


def run_training_loop(
    parameters: Sequence[torch.nn.Parameter],
    loss_fn: StepLossFn,
    settings: TrainingSettings,
    folder: Path,
    inputs: Mapping[str, Any],
    progress: Callable[[int, Mapping[str, Any]], None] = lambda step, line: None,
    *,
    world: World = SINGLE_PROCESS,
    batch_source: BatchSource | None = None,
    resume: str = RESUME_AUTO,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    watch: Callable[[Mapping[str, float]], StepVerdict] | None = None,
    on_part: PartCallback = lambda steps_done, words: None,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Minimise the loss for `settings.steps` steps, from the newest checkpoint of the same inputs.

    A step whose loss or gradient is not finite is skipped and recorded. A logged step is a line of
    metrics.jsonl as soon as it is done. A signal ends the training after the step; a step, or a
    measurement of held-out losses, that takes more than `stop_signals.GRACE_S` longer is abandoned
    and repeated after a resume, from the state of the last whole step.

    Args:
        parameters: the trainable parameters. With several processes they belong to a model from
            `StudentModel.distribute`, whose backward pass averages gradients.
        loss_fn: (step, part, parts, weights) -> loss of that part of the step's batch, and the
            statistics of its groups. A step has processes x micro_batches parts, which are the same
            batch however many there are. The minimised loss is the mean over ALL supervised
            positions of the step, each times the weight of its group (default 1).
        settings: settings of the loop.
        folder: run folder's `train`; the first process writes metrics.jsonl and checkpoints/.
        inputs: recipe and data as JSON; a checkpoint of other inputs is refused.
        progress: called with the step and its line of metrics after every step.
        world: this process among all processes.
        batch_source: source whose state is part of the checkpoint.
        resume: auto, never, or the path of a checkpoint.
        evaluate: returns held-out losses by name, called every `settings.evaluate_every` steps by
            all processes.
        watch: called with the metrics of every applied step, the same in all processes. Weights
            after a suspect step are not saved, unless they are the last.
        on_part: called with the progress inside a step that takes longer than a second.
        optimizer: steps the parameters; None = the one that the settings name.

    Raises:
        RefusedError: if the checkpoint belongs to other inputs, if a step has no supervised
            position, if more than `settings.max_skipped_steps` steps were skipped, if a held-out
            loss is not finite, or if `watch` has a problem.
        RunInterrupted: after SIGTERM or SIGINT to any process, with the state saved.
    """
    optimizer = optimizer or build_optimizer(parameters, settings)
    checkpoints.seed_all(settings.seed, world.rank)
    state = _resume(folder, inputs, parameters, optimizer, world, batch_source, resume)
    log = MetricsLog(folder / "metrics.jsonl")
    if not world.rank:
        log.restore(state.log_history)
    writer = CheckpointWriter(folder, inputs, parameters, optimizer, world, log, state.step)
    first_step = state.step - (state.open_line is not None)
    begun = (first_step, time.monotonic(), state.seconds)
    with collect_stop_signals() as signals, StepWatch(parameters, on_part) as step_watch:
        for step in range(first_step, settings.steps):
            last = step + 1 == settings.steps
            source_state = batch_source.state() if batch_source else b""
            rng, number = checkpoints.rng_state(), 0
            try:
                if state.open_line is None:
                    state, number = _run_step(
                        state,
                        optimizer,
                        parameters,
                        loss_fn,
                        settings,
                        world,
                        signals,
                        step_watch,
                        begun,
                    )
                    source_state = batch_source.state() if batch_source else b""
                if evaluate and _is_due(step, settings.evaluate_every, last):
                    rng = checkpoints.rng_state()
                    step_watch.say(step + 1, "measuring the held-out loss")
                    with signals.may_abandon(world.size == 1):
                        held_out = _refuse_nonfinite(evaluate(), step)
                    state = replace(
                        state, open_line={**(state.open_line or {}), "held_out": held_out}
                    )
            except StepAbandoned as abandoned:
                optimizer.zero_grad(set_to_none=True)
                checkpoints.restore_rng_state(rng)
                number = abandoned.signal_number
                raise writer.save_interrupted(state, source_state, number) from None
            state, line, applied = _close_step(state, settings, log, world)
            progress(step + 1, line)
            verdict = watch(line["terms"]) if watch and applied else None
            if verdict and verdict.problem:
                if not world.rank:
                    log.update([*(x for x in state.log_history if x["step"] != state.step), line])
                raise checkpoints.collapse_error(verdict.problem, step, folder)
            is_good = last or not (verdict and verdict.is_suspect)
            if is_good and _is_due(step, settings.checkpoint_every, last):
                writer.save(state, source_state)
                number = next(filter(None, world.all_gather(signals.first)), 0)
            if number := number or (signals.first if world.size == 1 else 0):
                raise writer.save_interrupted(state, source_state, number)


def _run_step(
    state: TrainerState,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    loss_fn: StepLossFn,
    settings: TrainingSettings,
    world: World,
    signals: StopSignals,
    watch: StepWatch,
    begun: tuple[int, float, float],
) -> tuple[TrainerState, int]:
    """Compute the gradient of a step and apply it.

    Args:
        state: the state before the step.
        optimizer: the optimiser.
        parameters: the trainable parameters.
        loss_fn: see `run_training_loop`.
        settings: settings of the loop.
        world: this process among all processes.
        signals: signals to this process.
        watch: reports the progress inside the step.
        begun: this process' first step, the clock then, and the seconds trained before.

    Returns:
        The state after the step, with its line of metrics open, and the signal to any process; 0 =
        none.

    Raises:
        StepAbandoned: after a signal. Nothing is applied.
    """
    step = state.step
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate_at_step(step)
    weights = balance.group_weights(
        state.group_scales, settings.balance_max_ratio, settings.balance_prior_tokens
    )
    with signals.may_abandon(world.size == 1):
        total = _accumulate_gradients(
            parameters, loss_fn, step, weights, settings.micro_batches, world, signals, watch
        )
    norm = float(
        gather_full_tensor(torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm))
    )
    loss = total.loss_sum / total.num_tokens
    if applied := math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds = time.monotonic() - begun[1]
    now = replace(
        state,
        step=step + 1,
        seconds=round(begun[2] + seconds, 3),
        num_tokens=state.num_tokens + total.num_tokens * applied,
        group_scales=settings.update_scales(state.group_scales, total.group_stats)
        if applied
        else state.group_scales,
    )
    line = _metrics_line(now, settings, total, norm, weights) | {"applied": applied}
    line["left"] = round(seconds / (step + 1 - begun[0]) * (settings.steps - step - 1))
    return replace(now, open_line=line), total.stop_signal


def _close_step(
    state: TrainerState, settings: TrainingSettings, log: MetricsLog, world: World
) -> tuple[TrainerState, Mapping[str, Any], bool]:
    """Log a step that is done.

    Returns:
        The state without its open line, that line, and whether the step was applied.
    """
    line = dict(state.open_line or {})
    applied = line.pop("applied")
    state = replace(state, open_line=None)
    if applied:
        last = state.step == settings.steps
        logged = _is_due(state.step - 1, settings.log_every, last) or "held_out" in line
        state = append_log(state, line, logged)
    else:
        state = record_skipped_step(state, line, settings, log, world)
    if not world.rank:
        log.update(state.log_history)
    return state, line, applied


def _is_due(step: int, every: int, last: bool) -> bool:
    """Return whether an action is due after a step: every N steps and at the end; 0 = never."""
    return every > 0 and ((step + 1) % every == 0 or last)


def _accumulate_gradients(
    parameters: Sequence[torch.nn.Parameter],
    loss_fn: StepLossFn,
    step: int,
    weights: Mapping[Group, float],
    micro_batches: int,
    world: World,
    signals: StopSignals,
    watch: StepWatch,
) -> _StepTotals:
    """Write the gradient of the mean loss over all supervised positions of a step to .grad.

    Each backward pass is of a sum, not of a mean: the number of positions is known only after the
    last part of the last process. A distributed student averages gradients over processes, so they
    are multiplied by the number of processes.

    Returns:
        Sums over all processes.

    Raises:
        StepAbandoned: after a signal to one of several processes, before the last micro-batch.
    """
    own, parts = _StepTotals(), world.size * micro_batches
    for k in range(micro_batches):
        if k and world.size > 1:
            for number in filter(None, world.all_gather(signals.first)):
                raise StepAbandoned(number)
        watch.begin_part(step, k, micro_batches)
        out, group_stats = loss_fn(step, world.rank * micro_batches + k, parts, weights)
        (out.loss * out.num_tokens).backward()  # type: ignore[no-untyped-call]
        loss, metrics = _to_floats(out)
        own.add(
            loss * out.num_tokens,
            out.num_tokens,
            {name: value * out.num_tokens for name, value in metrics.items()},
            group_stats,
        )
    total = _StepTotals()
    for sums in world.all_gather(
        (
            own.loss_sum,
            own.num_tokens,
            own.metric_sums,
            own.group_stats,
            signals.first,
        )
    ):
        total.add(*sums)
    if not total.num_tokens:
        raise RefusedError(
            "no supervised position in this step",
            where=f"train, step {step}",
            remedy="with training.on_policy no token of a teacher begins where a token of the "
            "student's answers does: raise `start_step`, or `batch_size`",
        )
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(world.size / total.num_tokens)
    return total


def _to_floats(out: StepLoss) -> tuple[float, dict[str, float]]:
    """Return loss and metrics as numbers, with one transfer from the device."""
    values = [out.loss.detach(), *out.metrics.values()]
    loss, *metrics = torch.stack([value.double() for value in values]).tolist()
    return loss, dict(zip(out.metrics, metrics, strict=True))


def _refuse_nonfinite(held_out: Mapping[str, float], step: int) -> dict[str, float]:
    """Return held-out losses; raise RefusedError if one is not finite.

    The last checkpoint is from an earlier step and finite.
    """
    if wrong := [
        f"{name} {value:g}" for name, value in held_out.items() if not math.isfinite(value)
    ]:
        raise RefusedError(
            f"held-out loss is not finite after step {step + 1}: {', '.join(wrong)}",
            where="train",
            remedy="lower training.learning_rate; the last checkpoint is finite",
        )
    return dict(held_out)


def _metrics_line(
    state: TrainerState,
    settings: TrainingSettings,
    total: _StepTotals,
    norm: float,
    weights: Mapping[Group, float],
) -> dict[str, Any]:
    """Return the line of metrics.jsonl of a step.

    `loss` is without group weights, so that it can be compared between runs. The shares of loss
    under `groups` are weighted.
    """
    n, groups = (
        total.num_tokens,
        {group: t for group, t in total.group_stats.items() if t.num_tokens},
    )
    num_grouped = sum(t.num_tokens for t in groups.values())
    by_teacher = balance.sum_group_stats(
        {Group(group.teacher, ""): t} for group, t in groups.items()
    )
    unweighted = sum(t.loss_sum for t in groups.values())
    return {
        "step": state.step,
        "loss": unweighted / n if math.isfinite(unweighted) else total.loss_sum / n,
        "terms": {name: value / n for name, value in total.metric_sums.items()},
        "learning_rate": settings.learning_rate_at_step(state.step - 1),
        "gradient_norm": norm,
        "positions": state.num_tokens,
        "seconds": state.seconds,
        "share": {group.teacher: t.num_tokens / num_grouped for group, t in by_teacher.items()},
        "teachers": {
            group.teacher: t.loss_sum / t.num_tokens
            for group, t in by_teacher.items()
            if math.isfinite(t.loss_sum)
        },
        "groups": balance.group_shares(groups, weights),
    }


def _resume(
    folder: Path,
    inputs: Mapping[str, Any],
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    world: World,
    batch_source: BatchSource | None,
    resume: str,
) -> TrainerState:
    """Restore the checkpoint that the first process chooses for all; without one, a new state."""
    if not world.rank:
        checkpoints.delete_partial_files(folder)
    chosen = world.broadcast(
        checkpoints.find_checkpoint(folder, resume) if not world.rank else None
    )
    if chosen is None:
        return TrainerState()
    state, source_states = checkpoints.load_checkpoint(chosen, inputs, parameters, optimizer, world)
    if batch_source:
        batch_source.restore(source_states)
    if not world.rank:
        checkpoints.delete_later_checkpoints(folder, state.step)
        checkpoints.delete_old_checkpoints(folder)
    return state
