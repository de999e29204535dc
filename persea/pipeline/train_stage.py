"""The stage `train`: run the training loop in this process, in several, or under torchrun."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persea import storage
from persea.cache.answer_filter import without_rejected
from persea.cache.capture import assign_prompts, open_teacher_caches
from persea.cache.reader import AnswerSource, CacheReader
from persea.config.optimization import SavedDtype
from persea.errors import PerseaError
from persea.losses import HiddenStates, Loss, LossOutput, build_loss
from persea.models.loading import set_threads
from persea.pipeline.model_refs import silence_transformers
from persea.pipeline.progress import WARNING_PREFIX
from persea.pipeline.rollout_dispatch import RolloutDispatch, has_rollout_workers
from persea.pipeline.run_context import RunContext
from persea.training import checkpoint as checkpoints
from persea.training.dataset import Batch, DistillDataset, build_dataset
from persea.training.distributed.launcher import launch_processes, send_to_launcher
from persea.training.distributed.world import World
from persea.training.divergence import DivergenceWatch
from persea.training.example import ExampleMaker
from persea.training.example_store import ExampleStore, selected_answers
from persea.training.loop import run_training_loop
from persea.training.loss_balancing import Group, GroupStats
from persea.training.on_policy.rollouts import Rollouts, build_rollouts
from persea.training.on_policy.sampling import OwnSampler, RolloutSampler
from persea.training.optimizers import build_optimizer
from persea.training.settings import TrainingSettings
from persea.training.trackers import open_tracker

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store  # type: ignore[attr-defined]

    from persea.alignment.event_map import EventMap
    from persea.training.student import StudentModel
    from persea.vocab_extension.resize_model import ProgressCallback

StepCallback = Callable[[int, Mapping[str, Any]], None]  # (step, line of metrics)
StageProgress = Callable[[float, str], None]  # (fraction done, what is being done)
TRAIN_COMMAND = "train"  # message of the first rank of torchrun to the others
MIN_MESSAGE_INTERVAL_S = 0.2  # between progress messages to the launcher


def train_in_processes(
    context: RunContext, folder: Path, inputs: Mapping[str, Any], report_progress: ProgressCallback
) -> None:
    """Train and save the student.

    After a training in several processes the student is loaded once more, whole, from the last
    checkpoint.

    Args:
        context: the run.
        folder: the run folder's `train`.
        inputs: recipe and data as JSON, compared with those of a checkpoint.
        report_progress: progress callback.
    """
    options, world = context.launch_options, context.world

    progress = partial(report_progress, "train")
    if options.num_processes > 1:
        launch_processes(
            _train_spawned_rank,
            (replace(context), inputs),
            options.num_processes,
            lambda message: progress(*message),
        )
    else:
        world.broadcast(TRAIN_COMMAND)
        student = train_rank(context, folder, inputs, progress)
    if options.num_processes > 1 or world.size > 1:
        student = context.models.load_student()
        newest = checkpoints.find_checkpoint(folder, checkpoints.RESUME_AUTO)
        assert newest is not None  # the last step is always saved
        checkpoints.load_checkpoint(newest, inputs, student.trainable_parameters, None, World())
    student.save(folder / "student", _saved_dtype(context, student))


def _saved_dtype(context: RunContext, student: StudentModel) -> torch.dtype | None:
    import torch

    wanted = context.training.save_dtype
    if wanted is SavedDtype.AUTO:
        return student.stored_dtype
    dtype: torch.dtype = getattr(torch, wanted.value)
    return dtype


def follow_first_rank(
    context: RunContext, folder: Path, inputs: Callable[[RunContext], Mapping[str, Any]]
) -> None:
    """Train whenever the first rank of torchrun does; other stages run in the first rank only."""
    while context.world.broadcast("") == TRAIN_COMMAND:
        train_rank(context, folder, inputs(context), lambda fraction, words: None)


def format_step(metrics: Mapping[str, Any]) -> str:
    """Describe a step in a progress message."""
    loss, norm = metrics["loss"], metrics["gradient_norm"]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return f"step {metrics['step']} skipped: loss {loss:g}, gradient norm {norm:g}"
    hours, seconds = divmod(metrics["left"], 3600)
    pace = metrics["positions"] / max(metrics["seconds"], 1e-9)
    remaining = f"{hours}:{seconds // 60:02}:{seconds % 60:02}"
    return f"loss {loss:.3f}, {pace:.0f} tokens/s, {remaining} left"


def _train_spawned_rank(
    world: World, launcher: Store, context: RunContext, inputs: Mapping[str, Any]
) -> None:
    """Train as one of the processes that `train_in_processes` starts."""
    silence_transformers()
    set_threads(context.recipe.threads)
    last_message = 0.0

    def progress(fraction: float, words: str) -> None:
        nonlocal last_message
        now = time.monotonic()
        is_due = now - last_message > MIN_MESSAGE_INTERVAL_S or fraction == 1
        if not world.rank and (is_due or words.startswith(WARNING_PREFIX)):
            last_message = now
            send_to_launcher(launcher, (fraction, words))

    train_rank(replace(context, world=world), context.folder / "train", inputs, progress)


def train_rank(
    context: RunContext, folder: Path, inputs: Mapping[str, Any], progress: StageProgress
) -> StudentModel:
    """Run this process' share of the training and return the student that it holds.

    Args:
        context: the run.
        folder: the run folder's `train`; the first process writes metrics, checkpoints and
            dataset.json.
        inputs: recipe and data as JSON, compared with those of a checkpoint.
        progress: called before everything that may take seconds, after every step, and inside a
            step that takes longer than a second.
    """
    if not has_rollout_workers(context):
        return _train_rank(context, folder, inputs, progress, OwnSampler())

    def on_committed(step: int, words: str) -> None:
        progress(step / context.training.steps, words)

    with RolloutDispatch(context, inputs, on_committed) as sampler:
        return _train_rank(context, folder, inputs, progress, sampler)


def _train_rank(
    context: RunContext,
    folder: Path,
    inputs: Mapping[str, Any],
    progress: StageProgress,
    sampler: RolloutSampler,
) -> StudentModel:
    """Train as `train_rank` does, with the student's own answers from a sampler."""
    t, world = context.training, context.world
    done = _steps_of_checkpoint(context, folder) / t.steps
    progress(done, "")
    progress(done, "loading the student")
    student = context.models.load_student().distribute(world, context.launch_options.parallel)
    progress(done, "opening the event maps")
    event_maps = context.models.event_maps
    progress(done, "reading the captured answers")
    caches = _teacher_caches(context)
    if t.store_examples:
        _store_examples(context, caches, student, event_maps)
    dataset = build_dataset(
        caches,
        student.renderer,
        event_maps,
        batch_size=t.batch_size,
        seed=context.recipe.seed,
        max_length=t.max_length,
        partial_tokens=t.partial_tokens,
        teach_end=context.recipe.capture.teach_end,
        example_folder=_example_folder(context) if t.store_examples else None,
        on_answer=lambda read, answers: progress(
            done, f"reading the captured answers, {read:,} of {answers:,}"
        ),
    )
    trained, held_out = (
        dataset.train_test_split(t.validation_share) if t.validation_share else (dataset, None)
    )
    rollouts = _load_rollouts(context, student, held_out, sampler)
    loss_fn = build_loss(t.loss_terms)

    def step_loss(
        step: int, part: int, parts: int, weights: Mapping[Group, float]
    ) -> tuple[LossOutput, Mapping[Group, GroupStats]]:
        if rollouts is not None and rollouts.is_due(step):
            return rollouts.loss(step, part, parts, weights)
        batch = trained.batch(step, part, parts)
        out = _batch_loss(student, batch, loss_fn, weights)
        return out, group_stats(batch, out)

    settings = TrainingSettings.from_section(t, context.recipe.seed, context.models.learning_rate)
    watch = DivergenceWatch()

    def report_step(step: int, line: Mapping[str, Any]) -> None:
        if warning := watch.observe(line):
            progress(step / t.steps, f"{WARNING_PREFIX}{warning}")
        progress(step / t.steps, format_step(line))

    student.model.train()
    progress(done, f"step {round(done * t.steps) + 1:,} of {t.steps:,}")
    run_training_loop(
        student.trainable_parameters,
        step_loss,
        settings,
        folder,
        inputs,
        _with_tracker(context, folder, report_step),
        world=world,
        batch_source=rollouts,
        resume=context.launch_options.resume,
        evaluate=partial(held_out_loss, student, held_out, world, loss_fn) if held_out else None,
        watch=rollouts.observe if rollouts else None,
        on_part=lambda steps_done, words: progress(steps_done / t.steps, words),
        optimizer=build_optimizer(student.trainable_parameters, settings, student.embedding_ids),
    )
    if not world.rank:
        counts = dataset.stats.to_json() | {"held_out": len(held_out) if held_out else 0}
        if context.training.precision == "auto":  # this machine decided it
            counts["precision"] = "bfloat16" if student.options.bf16 else "float32"
        storage.write_json(folder / "dataset.json", counts)
    return student


def _teacher_caches(context: RunContext) -> Sequence[tuple[AnswerSource, float]]:
    """Open the cached answers with their shares, without answers that verification rejected."""
    caches: Sequence[tuple[AnswerSource, float]] = open_teacher_caches(
        context.capture_units,
        context.folder / "capture",
        context.training.shuffle_window_blocks,
    )
    return (
        without_rejected(caches, storage.read_json(context.folder / "capture" / "rejected.json"))
        if context.recipe.capture.drop_wrong_answers
        else caches
    )


def _example_folder(context: RunContext) -> Path:
    return context.folder / "examples"


def _store_examples(
    context: RunContext,
    caches: Sequence[tuple[AnswerSource, float]],
    student: StudentModel,
    event_maps: Mapping[str, EventMap],
) -> None:
    """Let each process make its part of the examples that are not on disk yet.

    Raises:
        PerseaError: One of the processes could not make its part.
    """
    world, t = context.world, context.training
    roots = (selected_answers(cache)[0] for cache, _ in caches)
    readers = [one for one in roots if isinstance(one, CacheReader)]
    maker = ExampleMaker.create(
        student.renderer, event_maps, t.partial_tokens, context.recipe.capture.teach_end
    )
    store, failure = ExampleStore(_example_folder(context), maker), None
    try:
        if world.size > 1:  # a single process makes them as it reads, with progress
            store.build_missing(readers, world.rank, world.size)
    except PerseaError as error:
        failure = error
    for one in world.all_gather(failure):  # nobody waits for a process that gave up
        if one is not None:
            raise one
    if not world.rank:
        store.delete_others(readers)


def _load_rollouts(
    context: RunContext,
    student: StudentModel,
    held_out_dataset: DistillDataset | None,
    sampler: RolloutSampler,
) -> Rollouts | None:
    """Build the on-policy steps of a recipe that has them; held-out prompts are never used."""
    t = context.training
    if t.on_policy is None:
        return None
    held_out = frozenset(held_out_dataset.prompt_ids()) if held_out_dataset else frozenset()
    assignments = (
        (prompt, name)
        for prompt, name in assign_prompts(context.captured_corpus.prompts, context.cast)
        if prompt.id not in held_out and not prompt.conversation.is_document
    )
    return build_rollouts(
        assignments,
        student,
        lambda name: context.models.load_teacher(name, t.batch_size),
        context.models.event_maps,
        t.on_policy,
        t.batch_size,
        context.recipe.seed,
        t.max_length,
        sampler,
    )


def _batch_loss(
    student: StudentModel, batch: Batch, loss_fn: Loss, weights: Mapping[Group, float]
) -> LossOutput:
    """Run the student on a batch and compute the loss, weighted by group."""
    import torch

    hidden = HiddenStates(
        *student.hidden_and_head(batch.ids_BS, batch.mask_BS, batch.row_N, batch.position_N)
    )
    weight_N = (
        torch.tensor([weights.get(group, 1.0) for group in batch.group_B])[batch.row_N]
        if weights
        else None
    )
    return loss_fn(hidden, batch.labels_N, batch.targets, weight_N)


def group_stats(batch: Batch, loss_output: LossOutput) -> dict[Group, GroupStats]:
    """Sum positions, losses and gradient norms of a batch by group."""
    import torch

    loss_N = loss_output.token_loss_N
    assert loss_N is not None  # losses that train on captures have a loss of each position
    groups = list(batch.tokens_by_group)
    which_N = torch.tensor([groups.index(group) for group in batch.group_B])[batch.row_N]
    grad_norm_N = (
        torch.full_like(loss_N, math.nan)
        if loss_output.grad_norm_N is None
        else loss_output.grad_norm_N
    )
    values_N3 = torch.stack([loss_N, loss_N.square(), grad_norm_N], 1).cpu().double()
    sums_G3 = torch.zeros((len(groups), 3), dtype=torch.float64).index_add_(0, which_N, values_N3)
    return {
        group: GroupStats(batch.tokens_by_group[group], *sums)
        for group, sums in zip(groups, sums_G3.tolist(), strict=True)
    }


def held_out_loss(
    student: StudentModel, dataset: DistillDataset, world: World, loss_fn: Loss
) -> dict[str, float]:
    """Return the loss on held-out examples, nats per supervised position.

    Args:
        student: the student.
        dataset: held-out examples.
        world: this process among all processes; each computes its part of every batch.
        loss_fn: the training loss.

    Returns:
        The loss over all examples ("all") and by teacher.
    """
    import torch

    loss_sums, num_tokens = dict[str, float](), dict[str, int]()
    student.model.eval()
    with torch.no_grad():
        own = []
        for step in range(len(dataset) // dataset.batch_size):
            batch = dataset.batch(step, world.rank, world.size)
            own.append(group_stats(batch, _batch_loss(student, batch, loss_fn, {})))
    student.model.train()
    for by_group in (stats for gathered in world.all_gather(own) for stats in gathered):
        for group, stats in by_group.items():
            for key in ("all", group.teacher):
                loss_sums[key] = loss_sums.get(key, 0.0) + stats.loss_sum
                num_tokens[key] = num_tokens.get(key, 0) + stats.num_tokens
    return {key: loss_sums[key] / num_tokens[key] for key in loss_sums}


def _steps_of_checkpoint(context: RunContext, folder: Path) -> int:
    """Return the step of the checkpoint that the training resumes; 0 = none."""
    resume = context.launch_options.resume
    if resume == checkpoints.RESUME_NEVER:
        return 0
    newest = checkpoints.find_checkpoint(folder, resume)
    return int(newest.stem.partition("-")[2]) if newest else 0


def _with_tracker(context: RunContext, folder: Path, on_step: StepCallback) -> StepCallback:
    """Return a callback that also sends logged lines to the recipe's tracker."""
    t = context.training
    if t.report_to is None or context.world.rank:
        return on_step
    tracker = open_tracker(
        t.report_to,
        context.recipe.name,
        folder / "tensorboard" if t.report_to == "tensorboard" else folder,
        _steps_of_checkpoint(context, folder),
        t.model_dump(mode="json"),
        t.steps,
    )

    def both(step: int, line: Mapping[str, Any]) -> None:
        on_step(step, line)
        if step % t.log_every == 0 or step == t.steps or "held_out" in line:
            tracker(step, line)

    return both
