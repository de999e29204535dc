"""The stage `train`: lessons, student and objective handed to the loop, in this process, in several of its own, or as one of torchrun's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persea import storage as store
from persea.cache.answer_filter import without_rejected
from persea.cache.capture import assign_prompts, open_teacher_caches
from persea.cache.reader import AnswerSource
from persea.config.schema import TrainingSection
from persea.losses import LossOutput, event_kl_loss_from_hidden
from persea.pipeline.run_context import (
    ProgressCallback,
    RunContext,
    set_threads,
    silence_transformers,
)
from persea.training import checkpoint as checkpoints
from persea.training.dataset import Batch, DistillDataset, build_dataset
from persea.training.distributed.launcher import launch_processes, send_to_launcher
from persea.training.distributed.world import World
from persea.training.loop import TrainingSettings, run_training_loop
from persea.training.loss_balancing import Group, GroupStats
from persea.training.on_policy.rollouts import Rollouts, build_rollouts
from persea.training.trackers import open_tracker

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

    from persea.training.student import StudentModel

StepCallback = Callable[[int, Mapping[str, Any]], None]


def train_in_processes(
    context: RunContext, folder: Path, inputs: Mapping[str, Any], report_progress: ProgressCallback
) -> None:
    """Train, and save the student. In several processes it is opened once more for that, whole, from the last checkpoint."""
    how, world = context.launch_options, context.world

    def progress(step: int, line: Mapping[str, Any]) -> None:
        report_progress("train", step / context.recipe.training.steps, format_step(line))

    if how.num_processes > 1:
        launch_processes(
            _train_spawned_rank,
            (replace(context), inputs),
            how.num_processes,
            lambda line: progress(line["step"], line),
        )
    else:
        world.broadcast("teach")
        student = train_rank(context, folder, inputs, progress)
    if how.num_processes > 1 or world.size > 1:
        student = context.load_student()
        newest = checkpoints.find_checkpoint(folder, checkpoints.RESUME_AUTO)
        assert newest is not None  # the last step is always saved
        checkpoints.load_checkpoint(newest, inputs, student.trainable_parameters, None, World())
    student.save(folder / "student")


def follow_first_rank(
    context: RunContext, folder: Path, inputs: Callable[[RunContext], Mapping[str, Any]]
) -> None:
    """What the other processes of torchrun do: train where the first one does, and nothing else."""
    while context.world.broadcast("") == "teach":
        train_rank(context, folder, inputs(context), lambda step, line: None)


def format_step(metrics: Mapping[str, Any]) -> str:
    """A step in a few words."""
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"])):
        return f"step {metrics['step']} left out: loss {metrics['loss']:g}, gradient norm {metrics['gradient_norm']:g}"
    hours, seconds = divmod(metrics["left"], 3600)
    pace = metrics["positions"] / max(metrics["seconds"], 1e-9)
    return f"loss {metrics['loss']:.3f}, {pace:.0f} tokens/s, {hours}:{seconds // 60:02}:{seconds % 60:02} left"


def _train_spawned_rank(
    world: World, launcher: Store, context: RunContext, inputs: Mapping[str, Any]
) -> None:
    """One of several processes that `teach` starts."""
    silence_transformers()
    set_threads(context.recipe.threads)
    last = [0.0]

    def progress(step: int, line: Mapping[str, Any]) -> None:
        if not world.rank and (
            time.monotonic() - last[0] > 0.2 or step == context.recipe.training.steps
        ):
            last[0] = time.monotonic()
            send_to_launcher(launcher, line)

    train_rank(replace(context, world=world), context.folder / "train", inputs, progress)


def train_rank(
    context: RunContext, folder: Path, inputs: Mapping[str, Any], on_step: StepCallback
) -> StudentModel:
    """This process' share of the training; the student it holds."""
    t, world = context.recipe.training, context.world
    student = context.load_student().distribute(world, context.launch_options.parallel)
    feed = build_dataset(
        _teacher_caches(context),
        student.renderer,
        context.event_maps,
        batch_size=t.batch_size,
        seed=context.recipe.seed,
        max_tokens=t.max_length,
        partial_tokens=t.partial_tokens,
    )
    learned, held = (
        feed.train_test_split(t.validation_share) if t.validation_share else (feed, None)
    )
    rollouts = _load_rollouts(context, student, held)

    def loss_of(
        step: int, part: int, parts: int, weights: Mapping[Group, float]
    ) -> tuple[LossOutput, Mapping[Group, GroupStats]]:
        if rollouts is not None and rollouts.is_due(step):
            return rollouts.loss(step, part, parts, weights)
        batch = learned.batch(step, part, parts)
        out = _batch_loss(student, batch, t, weights)
        return out, group_stats(batch, out)

    settings = TrainingSettings(
        t.steps,
        t.learning_rate,
        t.warmup_steps,
        t.weight_decay,
        t.max_grad_norm,
        t.checkpoint_every,
        t.log_every,
        context.recipe.seed,
        t.schedule,
        t.cooldown or 0.0,
        t.micro_batches,
        t.evaluate_every,
        t.max_skipped_steps,
        t.loss_balancing,
    )
    student.model.train()
    run_training_loop(
        student.trainable_parameters,
        loss_of,
        settings,
        folder,
        inputs,
        _with_tracker(context, folder, on_step),
        world=world,
        batch_source=rollouts,
        resume=context.launch_options.resume,
        evaluate=partial(held_out_loss, student, held, world, t) if held else None,
    )
    if not world.rank:
        store.write_json(
            folder / "feed.json", feed.stats.to_json() | {"held_out": len(held) if held else 0}
        )
    return student


def _teacher_caches(context: RunContext) -> Sequence[tuple[AnswerSource, float]]:
    """What the teachers said, without the answers that verifying found wrong."""
    heard: Sequence[tuple[AnswerSource, float]] = open_teacher_caches(
        context.capture_units, context.folder / "capture"
    )
    return (
        without_rejected(heard, store.read_json(context.folder / "capture" / "wrong.json"))
        if context.recipe.capture.drop_wrong_answers
        else heard
    )


def _load_rollouts(
    context: RunContext, student: StudentModel, held_out_dataset: DistillDataset | None
) -> Rollouts | None:
    """The student's own answers, where the recipe wants them taught; never to a question whose lesson is held out."""
    t = context.recipe.training
    if t.on_policy is None:
        return None
    unseen = frozenset(held_out_dataset.prompt_ids()) if held_out_dataset else frozenset()
    asked = (
        (prompt, name)
        for prompt, name in assign_prompts(context.corpus.prompts, context.cast)
        if prompt.id not in unseen
    )
    return build_rollouts(
        asked,
        student,
        lambda name: context.load_teacher(name, t.batch_size),
        context.event_maps,
        t.on_policy,
        t.batch_size,
        context.recipe.seed,
        t.max_length,
    )


def _batch_loss(
    student: StudentModel, batch: Batch, training: TrainingSection, weights: Mapping[Group, float]
) -> LossOutput:
    import torch

    states = student.hidden_and_head(batch.ids_BS, batch.mask_BS, batch.row_N, batch.position_N)
    weight_N = (
        torch.tensor([weights.get(group, 1.0) for group in batch.group_B])[batch.row_N]
        if weights
        else None
    )
    return event_kl_loss_from_hidden(
        *states,
        batch.labels_N,
        batch.targets if training.objective == "events" else (),
        training.event_weight,
        weight_N,
    )


def group_stats(batch: Batch, loss_output: LossOutput) -> dict[Group, GroupStats]:
    """What each group taught of a batch: its positions, their losses, and how they pull where a gradient is wanted."""
    import torch

    assert loss_output.token_loss_N is not None  # the objectives of captures come from a head
    groups = list(batch.tokens_by_group)
    which_N = torch.tensor([groups.index(group) for group in batch.group_B])[batch.row_N]
    pull_N = (
        torch.full_like(loss_output.token_loss_N, math.nan)
        if loss_output.grad_norm_N is None
        else loss_output.grad_norm_N
    )
    each_N3 = (
        torch.stack([loss_output.token_loss_N, loss_output.token_loss_N.square(), pull_N], 1)
        .cpu()
        .double()
    )
    sums_G3 = torch.zeros((len(groups), 3), dtype=torch.float64).index_add_(0, which_N, each_N3)
    return {
        group: GroupStats(batch.tokens_by_group[group], *sums)
        for group, sums in zip(groups, sums_G3.tolist(), strict=True)
    }


def held_out_loss(
    student: StudentModel, dataset: DistillDataset, world: World, training: TrainingSection
) -> dict[str, float]:
    """The objective on lessons that are never learned from, nats per learned position: over all ("all") and by teacher."""
    import torch

    nats, positions = dict[str, float](), dict[str, int]()
    student.model.eval()
    with torch.no_grad():
        mine = []
        for step in range(len(dataset) // dataset.batch_size):
            batch = dataset.batch(step, world.rank, world.size)
            mine.append(group_stats(batch, _batch_loss(student, batch, training, {})))
    student.model.train()
    for taught in (one for some in world.all_gather(mine) for one in some):
        for group, said in taught.items():
            for key in ("all", group.teacher):
                nats[key], positions[key] = (
                    nats.get(key, 0.0) + said.loss_sum,
                    positions.get(key, 0) + said.num_tokens,
                )
    return {key: nats[key] / positions[key] for key in nats}


def _with_tracker(context: RunContext, folder: Path, on_step: StepCallback) -> StepCallback:
    """Progress, and the board that the recipe asks for, at the lines that are logged."""
    t = context.recipe.training
    if t.report_to is None or context.world.rank:
        return on_step
    newest = checkpoints.find_checkpoint(folder, context.launch_options.resume)
    done = int(newest.stem.partition("-")[2]) if newest else 0
    board = open_tracker(
        t.report_to,
        context.recipe.name,
        folder / "tensorboard",
        done,
        t.model_dump(mode="json"),
        t.steps,
    )

    def both(step: int, line: Mapping[str, Any]) -> None:
        on_step(step, line)
        if step % t.log_every == 0 or step == t.steps or "held_out" in line:
            board(step, line)

    return both
