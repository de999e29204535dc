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
from persea.cache.answer_filter import left
from persea.cache.capture import assigned, caches
from persea.cache.reader import Ordered
from persea.config.schema import Training
from persea.losses import LossOut, composed_head
from persea.pipeline.run_context import River, Tell, quieten, set_threads
from persea.training import checkpoint as checkpoints
from persea.training.dataset import Batch, Feed, offline
from persea.training.distributed.launcher import launch, tell
from persea.training.distributed.world import World
from persea.training.loop import Settings, train
from persea.training.loss_balancing import Group, Taught
from persea.training.on_policy.rollouts import Rollouts, open_rollouts
from persea.training.trackers import open_board

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

    from persea.training.student import Student

Progress = Callable[[int, Mapping[str, Any]], None]


def teach(river: River, folder: Path, inputs: Mapping[str, Any], show: Tell) -> None:
    """Train, and save the student. In several processes it is opened once more for that, whole, from the last checkpoint."""
    how, world = river.how, river.world

    def progress(step: int, line: Mapping[str, Any]) -> None:
        show("train", step / river.recipe.training.steps, words(line))

    if how.procs > 1:
        launch(_one, (replace(river), inputs), how.procs, lambda line: progress(line["step"], line))
    else:
        world.told("teach")
        student = share(river, folder, inputs, progress)
    if how.procs > 1 or world.size > 1:
        student = river.student()
        newest = checkpoints.choose(folder, checkpoints.AUTO)
        assert newest is not None  # the last step is always saved
        checkpoints.load(newest, inputs, student.trained, None, World())
    student.save(folder / "student")


def follow(river: River, folder: Path, inputs: Callable[[River], Mapping[str, Any]]) -> None:
    """What the other processes of torchrun do: train where the first one does, and nothing else."""
    while river.world.told("") == "teach":
        share(river, folder, inputs(river), lambda step, line: None)


def words(line: Mapping[str, Any]) -> str:
    """A step in a few words."""
    if not (math.isfinite(line["loss"]) and math.isfinite(line["gradient_norm"])):
        return f"step {line['step']} left out: loss {line['loss']:g}, gradient norm {line['gradient_norm']:g}"
    hours, seconds = divmod(line["left"], 3600)
    pace = line["positions"] / max(line["seconds"], 1e-9)
    return f"loss {line['loss']:.3f}, {pace:.0f} tokens/s, {hours}:{seconds // 60:02}:{seconds % 60:02} left"


def _one(world: World, launcher: Store, river: River, inputs: Mapping[str, Any]) -> None:
    """One of several processes that `teach` starts."""
    quieten()
    set_threads(river.recipe.threads)
    last = [0.0]

    def progress(step: int, line: Mapping[str, Any]) -> None:
        if not world.rank and (time.monotonic() - last[0] > 0.2 or step == river.recipe.training.steps):
            last[0] = time.monotonic()
            tell(launcher, line)

    share(replace(river, world=world), river.folder / "train", inputs, progress)


def share(river: River, folder: Path, inputs: Mapping[str, Any], progress: Progress) -> Student:
    """This process' share of the training; the student it holds."""
    t, world = river.recipe.training, river.world
    student = river.student().spread(world, river.how.shard)
    feed = offline(_heard(river), student.voice, river.bridges, size=t.batch, seed=river.recipe.seed, max_tokens=t.max_tokens,
                   completion=t.completion)
    learned, held = feed.set_aside(t.held_out) if t.held_out else (feed, None)
    rollouts = _rollouts(river, student, held)

    def loss_of(step: int, part: int, parts: int, weights: Mapping[Group, float]) -> tuple[LossOut, Mapping[Group, Taught]]:
        if rollouts is not None and rollouts.due(step):
            return rollouts.loss(step, part, parts, weights)
        batch = learned.batch(step, part, parts)
        out = _objective(student, batch, t, weights)
        return out, by_group(batch, out)

    settings = Settings(t.steps, t.learning_rate, t.warmup, t.weight_decay, t.clip, t.checkpoint_every, t.log_every, river.recipe.seed, t.schedule,
                        t.cooldown or 0.0, t.accumulate, t.evaluate_every, t.skips, t.balance)
    student.model.train()
    train(student.trained, loss_of, settings, folder, inputs, _shown(river, folder, progress), world=world, source=rollouts,
          resume=river.how.resume, evaluate=partial(held_out, student, held, world, t) if held else None)
    if not world.rank:
        store.publish_json(folder / "feed.json", feed.survey.to_json() | {"held_out": len(held) if held else 0})
    return student


def _heard(river: River) -> Sequence[tuple[Ordered, float]]:
    """What the teachers said, without the answers that verifying found wrong."""
    heard: Sequence[tuple[Ordered, float]] = caches(river.units, river.folder / "capture")
    return left(heard, store.read_json(river.folder / "capture" / "wrong.json")) if river.recipe.capture.verify else heard


def _rollouts(river: River, student: Student, held: Feed | None) -> Rollouts | None:
    """The student's own answers, where the recipe wants them taught; never to a question whose lesson is held out."""
    t = river.recipe.training
    if t.on_policy is None:
        return None
    unseen = frozenset(held.prompts()) if held else frozenset()
    asked = ((prompt, name) for prompt, name in assigned(river.corpus.prompts, river.cast) if prompt.id not in unseen)
    return open_rollouts(asked, student, lambda name: river.teacher(name, t.batch), river.bridges, t.on_policy, t.batch,
                         river.recipe.seed, t.max_tokens)


def _objective(student: Student, batch: Batch, t: Training, weights: Mapping[Group, float]) -> LossOut:
    import torch

    states = student.hidden(batch.ids_BS, batch.mask_BS, batch.row_N, batch.at_N)
    weight_N = torch.tensor([weights.get(group, 1.0) for group in batch.by_B])[batch.row_N] if weights else None
    return composed_head(*states, batch.targets_N, batch.teachers if t.objective == "events" else (), t.event_share, weight_N)


def by_group(batch: Batch, out: LossOut) -> dict[Group, Taught]:
    """What each group taught of a batch: its positions, their losses, and how they pull where a gradient is wanted."""
    import torch

    assert out.each_N is not None  # the objectives of captures come from a head
    groups = list(batch.share)
    which_N = torch.tensor([groups.index(group) for group in batch.by_B])[batch.row_N]
    pull_N = torch.full_like(out.each_N, math.nan) if out.pull_N is None else out.pull_N
    each_N3 = torch.stack([out.each_N, out.each_N.square(), pull_N], 1).cpu().double()
    sums_G3 = torch.zeros((len(groups), 3), dtype=torch.float64).index_add_(0, which_N, each_N3)
    return {group: Taught(batch.share[group], *sums) for group, sums in zip(groups, sums_G3.tolist(), strict=True)}


def held_out(student: Student, feed: Feed, world: World, t: Training) -> dict[str, float]:
    """The objective on lessons that are never learned from, nats per learned position: over all ("all") and by teacher."""
    import torch

    nats, positions = dict[str, float](), dict[str, int]()
    student.model.eval()
    with torch.no_grad():
        mine = []
        for step in range(len(feed) // feed.size):
            batch = feed.batch(step, world.rank, world.size)
            mine.append(by_group(batch, _objective(student, batch, t, {})))
    student.model.train()
    for taught in (one for some in world.gather(mine) for one in some):
        for group, said in taught.items():
            for key in ("all", group.teacher):
                nats[key], positions[key] = nats.get(key, 0.0) + said.nats, positions.get(key, 0) + said.positions
    return {key: nats[key] / positions[key] for key in nats}


def _shown(river: River, folder: Path, progress: Progress) -> Progress:
    """Progress, and the board that the recipe asks for, at the lines that are logged."""
    t = river.recipe.training
    if t.report_to is None or river.world.rank:
        return progress
    newest = checkpoints.choose(folder, river.how.resume)
    done = int(newest.stem.partition("-")[2]) if newest else 0
    board = open_board(t.report_to, river.recipe.name, folder / "tensorboard", done, t.model_dump(mode="json"), t.steps)

    def both(step: int, line: Mapping[str, Any]) -> None:
        progress(step, line)
        if step % t.log_every == 0 or step == t.steps or "held_out" in line:
            board(step, line)

    return both
