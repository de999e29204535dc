"""The one loop: batch, loss, step, checkpoint, in one process or several. It imports no loss and no source of batches; they are handed in."""

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

from persea import storage as store
from persea.config.schema import LossBalancing, LRSchedule
from persea.errors import RefusedError, RunInterrupted
from persea.training import checkpoint as checkpoints
from persea.training import loss_balancing as balance
from persea.training.checkpoint import RESUME_AUTO, TrainerState, gather_full_tensor
from persea.training.distributed.world import World
from persea.training.loss_balancing import Group, GroupStats
from persea.training.lr_schedule import learning_rate_at_step

SINGLE_PROCESS = World()


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; units: steps, and nats per learned position for losses.

    accumulate      times a process adds up gradients before a step
    evaluate_every  steps between measurements of what was held out; 0 = never
    skips           steps in all that may be left out because loss or gradient is not finite
    balance         whether a position counts by the scale of its group's losses
    """

    steps: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    checkpoint_every: int
    log_every: int
    seed: int
    schedule: LRSchedule = LRSchedule.COSINE
    cooldown_share: float = 0.2
    micro_batches: int = 1
    evaluate_every: int = 0
    max_skipped_steps: int = 3
    loss_balancing: LossBalancing = LossBalancing.NONE

    def learning_rate_at_step(self, step: int) -> float:
        """Learning rate of a step."""
        return learning_rate_at_step(
            step,
            total_steps=self.steps,
            peak_learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            schedule=self.schedule,
            cooldown_share=self.cooldown_share,
        )


class StepLoss(Protocol):
    """What the loop needs to know of a loss: its weighted mean over the learned positions, its terms, and how many positions there are."""

    @property
    def loss(self) -> torch.Tensor: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def num_tokens(self) -> int: ...


StepLossFn = Callable[
    [int, int, int, Mapping[Group, float]], tuple[StepLoss, Mapping[Group, GroupStats]]
]


class BatchSource(Protocol):
    """A source of batches that carries something from step to step (rollouts in flight), which a checkpoint must hold.

    state    asked after a step; what this process would lose by a kill
    restore  told before the first step what every process of the saving world gave, in the order of ranks: with as many processes each
             takes its own, with more or fewer it divides or drops them, and says which
    """

    def state(self) -> bytes: ...
    def restore(self, states: tuple[bytes, ...]) -> None: ...


@dataclass
class _StepTotals:
    """Parts of a step, added up: over what one process accumulates, then over processes, in the order of ranks. nats: weights included."""

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
) -> None:
    """Minimise the loss for settings.steps steps, from a checkpoint if one stands for `inputs`.

    parameters  what may change; in several processes, of a student that `Student.spread` has made theirs (its backward averages gradients)
    loss_of     (step, part, parts, weights) -> loss of that part of the step's batch, and what each group taught of it. A step is divided
                into parts = processes x settings.accumulate; together they are the same batch however many there are, and the loss that is
                minimised is the mean over ALL its learned positions, each times its group's weight (1 where none is given)
    inputs      what recipe and data are, as JSON: a checkpoint of other inputs is refused, with what differs
    progress    told every step's line of metrics
    source      what carries something from step to step; resume  auto, never, or a checkpoint's path
    evaluate    held-out losses by name, every settings.evaluate_every steps; all processes call it
    Writes metrics.jsonl and checkpoints/ (the first process alone). A step whose loss or gradient is not finite is not applied and recorded;
    Refused after settings.skips of them. Stopped after a signal to any process, with the state saved.
    """
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    checkpoints.seed_all(settings.seed, world.rank)
    state = _resume(folder, inputs, parameters, optimizer, world, batch_source, resume)
    begun, clock = (state.step, time.monotonic()), time.monotonic() - state.seconds
    with _collect_signals() as asked:
        for step in range(state.step, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate_at_step(step)
            weights = balance.group_weights(state.group_scales)
            total = _accumulate_gradients(
                parameters, loss_fn, step, weights, settings.micro_batches, world, asked
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
            scales = (
                balance.update_scales(state.group_scales, total.group_stats)
                if applied and settings.loss_balancing is LossBalancing.DEVIATION
                else state.group_scales
            )
            now = replace(
                state,
                step=step + 1,
                seconds=round(time.monotonic() - clock, 3),
                num_tokens=state.num_tokens + total.num_tokens * applied,
                group_scales=scales,
            )
            line = _metrics_line(now, settings, total, norm, weights)
            line["left"] = round(
                (time.monotonic() - begun[1]) / (step + 1 - begun[0]) * (settings.steps - step - 1)
            )
            if (
                evaluate
                and settings.evaluate_every
                and ((step + 1) % settings.evaluate_every == 0 or last)
            ):
                line["held_out"] = _refuse_nonfinite(evaluate(), step)
            logged = (step + 1) % settings.log_every == 0 or last or "held_out" in line
            state = (
                _append_log(now, line, logged)
                if applied
                else _record_skipped_step(now, line, settings, folder, world)
            )
            progress(step + 1, line)
            if (step + 1) % settings.checkpoint_every == 0 or last or total.stop_signal:
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


def _accumulate_gradients(
    parameters: Sequence[torch.nn.Parameter],
    loss_fn: StepLossFn,
    step: int,
    weights: Mapping[Group, float],
    micro_batches: int,
    world: World,
    received_signals: Sequence[int],
) -> _StepTotals:
    """Put into .grad the gradient of the mean loss over all learned positions of a step, and add up what all processes say of it.

    Each backward is of a sum, not of a mean: how many positions there are is known when the last part of the last process is done. A
    student spread over processes averages their gradients; so, times their number.
    """
    mine, parts = _StepTotals(), world.size * micro_batches
    for k in range(micro_batches):
        out, taught = loss_fn(step, world.rank * micro_batches + k, parts, weights)
        (out.loss * out.num_tokens).backward()  # type: ignore[no-untyped-call]
        mine.add(
            float(out.loss.detach()) * out.num_tokens,
            out.num_tokens,
            {t: v * out.num_tokens for t, v in out.metrics.items()},
            taught,
        )
    total = _StepTotals()
    for heard in world.all_gather(
        (
            mine.loss_sum,
            mine.num_tokens,
            mine.metric_sums,
            mine.group_stats,
            received_signals[0] if received_signals else 0,
        )
    ):
        total.add(*heard)
    if not total.num_tokens:
        raise RefusedError(
            "nothing of this step can be learned from",
            where=f"train, step {step}",
            remedy="with training.on_policy no teacher's token begins where one of the student's answers does: raise `start_step`, or `batch_size`",
        )
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(world.size / total.num_tokens)
    return total


def _refuse_nonfinite(held_out: Mapping[str, float], step: int) -> dict[str, float]:
    """Held-out losses; Refused where one is not finite: the step before it was, and the last checkpoint stands."""
    if wrong := [
        f"{name} {value:g}" for name, value in held_out.items() if not math.isfinite(value)
    ]:
        raise RefusedError(
            f"held-out loss is not finite after step {step + 1}: {', '.join(wrong)}",
            where="train",
            remedy="lower training.learning_rate; the last checkpoint goes on",
        )
    return dict(held_out)


def _metrics_line(
    state: TrainerState,
    settings: TrainingSettings,
    total: _StepTotals,
    norm: float,
    weights: Mapping[Group, float],
) -> dict[str, Any]:
    """What metrics.jsonl says of a step. The loss is without weights, so that it can be compared: with them it is what shares are of."""
    n, groups = (
        total.num_tokens,
        {group: t for group, t in total.group_stats.items() if t.num_tokens},
    )
    spoken = sum(t.num_tokens for t in groups.values())
    by_teacher = balance.sum_group_stats(
        {Group(group.teacher, ""): t} for group, t in groups.items()
    )
    told = sum(t.loss_sum for t in groups.values())
    return {
        "step": state.step,
        "loss": told / n if math.isfinite(told) else total.loss_sum / n,
        "terms": {name: value / n for name, value in total.metric_sums.items()},
        "learning_rate": settings.learning_rate_at_step(state.step - 1),
        "gradient_norm": norm,
        "positions": state.num_tokens,
        "seconds": state.seconds,
        "share": {group.teacher: t.num_tokens / spoken for group, t in by_teacher.items()},
        "teachers": {
            group.teacher: t.loss_sum / t.num_tokens
            for group, t in by_teacher.items()
            if math.isfinite(t.loss_sum)
        },
        "groups": balance.group_shares(groups, weights),
    }


def _append_log(state: TrainerState, line: Mapping[str, Any], logged: bool) -> TrainerState:
    """The state with a line of the log, which tells of steps that were left out since the line before."""
    if not logged:
        return state
    since = state.log_history[-1]["step"] if state.log_history else 0
    skipped = [one for one in state.skipped_steps if one["step"] > since]
    kept = {k: v for k, v in line.items() if k != "left"} | (
        {"skipped": skipped} if skipped else {}
    )
    return replace(state, log_history=(*state.log_history, kept))


def _record_skipped_step(
    state: TrainerState,
    line: Mapping[str, Any],
    settings: TrainingSettings,
    folder: Path,
    world: World,
) -> TrainerState:
    """The state with a step that was not applied. Raises Refused where there were too many, told in metrics.jsonl too."""
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
            return state  # told by the next line
        return replace(
            state,
            log_history=(
                *state.log_history[:-1],
                {**state.log_history[-1], "skipped": list(state.skipped_steps)},
            ),
        )
    if not world.rank:
        store.write_json_lines(
            folder / "metrics.jsonl",
            (*state.log_history, {"step": state.step, "skipped": list(state.skipped_steps)}),
        )
    raise RefusedError(
        f"loss {loss}, gradient norm {norm} at step {state.step}, taught by {', '.join(names)}: not applied"
        + (
            f", as {settings.max_skipped_steps} steps before it"
            if settings.max_skipped_steps
            else ""
        ),
        where="train",
        remedy="lower training.learning_rate, or look at the batch: the last checkpoint is finite (training.max_skipped_steps: left out at most)",
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
    """Where the training stands, its state put into parameters, optimiser, chance and source. The first process chooses for all."""
    chosen = world.broadcast(
        checkpoints.find_checkpoint(folder, resume) if not world.rank else None
    )
    if chosen is None:
        return TrainerState()
    state, carried = checkpoints.load_checkpoint(chosen, inputs, parameters, optimizer, world)
    if batch_source:
        batch_source.restore(carried)
    if not world.rank:
        checkpoints.delete_later_checkpoints(folder, state.step)
        checkpoints.delete_old_checkpoints(folder)
    return state


@contextmanager
def _collect_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT while a step runs, so that the state is saved between steps and never inside one."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: a notebook's worker; signals are its owner's
        before = {}
    try:
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
