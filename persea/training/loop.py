"""The training loop: batch, loss, optimiser step, checkpoint, in one process or several.

The loop imports no loss and no dataset; the caller passes both as one function.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

from persea import storage
from persea.errors import RefusedError, RunInterrupted
from persea.training import checkpoint as checkpoints
from persea.training import loss_balancing as balance
from persea.training.checkpoint import RESUME_AUTO, TrainerState, gather_full_tensor
from persea.training.distributed.world import World
from persea.training.loss_balancing import Group, GroupStats
from persea.training.settings import TrainingSettings

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
) -> None:
    """Minimise the loss for `settings.steps` steps, from the newest checkpoint of the same inputs.

    A step whose loss or gradient is not finite is skipped and recorded.

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

    Raises:
        RefusedError: if the checkpoint belongs to other inputs, if a step has no supervised
            position, if more than `settings.max_skipped_steps` steps were skipped, if a held-out
            loss is not finite, or if `watch` has a problem.
        RunInterrupted: after SIGTERM or SIGINT to any process, with the state saved.
    """
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.adam_betas,
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
    )
    checkpoints.seed_all(settings.seed, world.rank)
    state = _resume(folder, inputs, parameters, optimizer, world, batch_source, resume)
    begun, clock = (state.step, time.monotonic()), time.monotonic() - state.seconds
    with _collect_signals() as signals:
        for step in range(state.step, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate_at_step(step)
            weights = balance.group_weights(
                state.group_scales, settings.balance_max_ratio, settings.balance_prior_tokens
            )
            total = _accumulate_gradients(
                parameters, loss_fn, step, weights, settings.micro_batches, world, signals
            )
            norm = float(
                gather_full_tensor(
                    torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
                )
            )
            loss, last = total.loss_sum / total.num_tokens, step + 1 == settings.steps
            if applied := math.isfinite(loss) and math.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            now = replace(
                state,
                step=step + 1,
                seconds=round(time.monotonic() - clock, 3),
                num_tokens=state.num_tokens + total.num_tokens * applied,
                group_scales=settings.update_scales(state.group_scales, total.group_stats)
                if applied
                else state.group_scales,
            )
            line = _metrics_line(now, settings, total, norm, weights)
            line["left"] = round(
                (time.monotonic() - begun[1]) / (step + 1 - begun[0]) * (settings.steps - step - 1)
            )
            if evaluate and _is_due(step, settings.evaluate_every, last):
                line["held_out"] = _refuse_nonfinite(evaluate(), step)
            logged = _is_due(step, settings.log_every, last) or "held_out" in line
            state = (
                _append_log(now, line, logged)
                if applied
                else _record_skipped_step(now, line, settings, folder, world)
            )
            progress(step + 1, line)
            verdict = watch(line["terms"]) if watch and applied else None
            if verdict and verdict.problem:
                raise _collapse_error(verdict.problem, step, state, line, folder, world)
            is_good = last or not (verdict and verdict.is_suspect)
            is_saved = is_good and _is_due(step, settings.checkpoint_every, last)
            if is_saved or total.stop_signal:
                checkpoints.save_checkpoint(
                    folder,
                    inputs,
                    state,
                    parameters,
                    optimizer,
                    world,
                    batch_source.state() if batch_source else b"",
                )
            if total.stop_signal:
                raise RunInterrupted(total.stop_signal, f"step {step + 1} is saved")


def _collapse_error(
    problem: str,
    step: int,
    state: TrainerState,
    line: Mapping[str, Any],
    folder: Path,
    world: World,
) -> RefusedError:
    """Return the refusal of a student whose answers collapsed; metrics.jsonl has the step."""
    if not world.rank:
        history = [one for one in state.log_history if one["step"] != line["step"]]
        storage.write_json_lines(
            folder / "metrics.jsonl", (*history, {k: v for k, v in line.items() if k != "left"})
        )
    newest = checkpoints.find_checkpoint(folder, RESUME_AUTO)
    kept = f"{newest} is the last good checkpoint" if newest else "no checkpoint was due before"
    return RefusedError(
        problem,
        where=f"train, step {step + 1}",
        remedy=f"{kept}; lower training.learning_rate or training.on_policy.share, or change the "
        "limits (training.on_policy.tripwire_steps) and run again: it goes on from there",
    )


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
    received_signals: Sequence[int],
) -> _StepTotals:
    """Write the gradient of the mean loss over all supervised positions of a step to .grad.

    Each backward pass is of a sum, not of a mean: the number of positions is known only after the
    last part of the last process. A distributed student averages gradients over processes, so they
    are multiplied by the number of processes.

    Returns:
        Sums over all processes.
    """
    own, parts = _StepTotals(), world.size * micro_batches
    for k in range(micro_batches):
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
            received_signals[0] if received_signals else 0,
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


def _append_log(state: TrainerState, line: Mapping[str, Any], logged: bool) -> TrainerState:
    """Return the state with a log line, which lists the steps skipped since the line before."""
    if not logged:
        return state
    since = state.log_history[-1]["step"] if state.log_history else 0
    skipped = [one for one in state.skipped_steps if one["step"] > since]
    entry = {k: v for k, v in line.items() if k != "left"} | (
        {"skipped": skipped} if skipped else {}
    )
    return replace(state, log_history=(*state.log_history, entry))


def _record_skipped_step(
    state: TrainerState,
    line: Mapping[str, Any],
    settings: TrainingSettings,
    folder: Path,
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
        storage.write_json_lines(
            folder / "metrics.jsonl",
            (*state.log_history, {"step": state.step, "skipped": list(state.skipped_steps)}),
        )
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


@contextmanager
def _collect_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT, so that the state is saved between steps, never inside one."""
    received: list[int] = []

    def record_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)

    try:
        before = {s: signal.signal(s, record_signal) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread (a notebook's worker), which may set no handlers
        before = {}
    try:
        yield received
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
