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
from persea.config.schema import Balance, Schedule
from persea.errors import Refused, Stopped
from persea.training import checkpoint as checkpoints
from persea.training import loss_balancing as balance
from persea.training.checkpoint import AUTO, State, whole
from persea.training.distributed.world import World
from persea.training.loss_balancing import Group, Taught
from persea.training.lr_schedule import rate

ALONE = World()


@dataclass(frozen=True)
class Settings:
    """How to train; units: steps, and nats per learned position for losses.

    accumulate      times a process adds up gradients before a step
    evaluate_every  steps between measurements of what was held out; 0 = never
    skips           steps in all that may be left out because loss or gradient is not finite
    balance         whether a position counts by the scale of its group's losses
    """

    steps: int
    learning_rate: float
    warmup: int
    weight_decay: float
    clip: float
    checkpoint_every: int
    log_every: int
    seed: int
    schedule: Schedule = Schedule.COSINE
    cooldown: float = 0.2
    accumulate: int = 1
    evaluate_every: int = 0
    skips: int = 3
    balance: Balance = Balance.NONE

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return rate(step, steps=self.steps, highest=self.learning_rate, warmup=self.warmup, schedule=self.schedule, cooldown=self.cooldown)


class Step(Protocol):
    """What the loop needs to know of a loss: its weighted mean over the learned positions, its terms, and how many positions there are."""

    @property
    def loss(self) -> torch.Tensor: ...
    @property
    def terms(self) -> Mapping[str, float]: ...
    @property
    def positions(self) -> int: ...


LossOf = Callable[[int, int, int, Mapping[Group, float]], tuple[Step, Mapping[Group, Taught]]]


class Source(Protocol):
    """A source of batches that carries something from step to step (rollouts in flight), which a checkpoint must hold.

    state    asked after a step; what this process would lose by a kill
    restore  told before the first step what every process of the saving world gave, in the order of ranks: with as many processes each
             takes its own, with more or fewer it divides or drops them, and says which
    """

    def state(self) -> bytes: ...
    def restore(self, states: tuple[bytes, ...]) -> None: ...


@dataclass
class _Sum:
    """Parts of a step, added up: over what one process accumulates, then over processes, in the order of ranks. nats: weights included."""

    nats: float = 0.0
    positions: int = 0
    terms: dict[str, float] = field(default_factory=dict)
    taught: dict[Group, Taught] = field(default_factory=dict)
    asked: int = 0

    def add(self, nats: float, positions: int, terms: Mapping[str, float], taught: Mapping[Group, Taught], asked: int = 0) -> None:
        self.nats, self.positions, self.asked = self.nats + nats, self.positions + positions, self.asked or asked
        for name, value in terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + value
        self.taught = balance.added((self.taught, taught))


def train(parameters: Sequence[torch.nn.Parameter], loss_of: LossOf, settings: Settings, folder: Path, inputs: Mapping[str, Any],
          progress: Callable[[int, Mapping[str, Any]], None] = lambda step, line: None, *, world: World = ALONE, source: Source | None = None,
          resume: str = AUTO, evaluate: Callable[[], Mapping[str, float]] | None = None) -> None:
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
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay)
    checkpoints.seed_all(settings.seed, world.rank)
    state = _resume(folder, inputs, parameters, optimizer, world, source, resume)
    begun, clock = (state.step, time.monotonic()), time.monotonic() - state.seconds
    with _signals() as asked:
        for step in range(state.step, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(step)
            weights = balance.weights(state.scales)
            total = _gradients(parameters, loss_of, step, weights, settings.accumulate, world, asked)
            norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, settings.clip)))
            loss, last = total.nats / total.positions, step + 1 == settings.steps
            if applied := math.isfinite(loss) and math.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scales = balance.heard(state.scales, total.taught) if applied and settings.balance is Balance.DEVIATION else state.scales
            now = replace(state, step=step + 1, seconds=round(time.monotonic() - clock, 3),
                          positions=state.positions + total.positions * applied, scales=scales)
            line = _line(now, settings, total, norm, weights)
            line["left"] = round((time.monotonic() - begun[1]) / (step + 1 - begun[0]) * (settings.steps - step - 1))
            if evaluate and settings.evaluate_every and ((step + 1) % settings.evaluate_every == 0 or last):
                line["held_out"] = _finite(evaluate(), step)
            logged = (step + 1) % settings.log_every == 0 or last or "held_out" in line
            state = _recorded(now, line, logged) if applied else _skipped(now, line, settings, folder, world)
            progress(step + 1, line)
            if (step + 1) % settings.checkpoint_every == 0 or last or total.asked:
                checkpoints.save(folder, inputs, state, parameters, optimizer, world, source.state() if source else b"")
            if total.asked:
                raise Stopped(total.asked, f"step {step + 1} is saved")


def _gradients(parameters: Sequence[torch.nn.Parameter], loss_of: LossOf, step: int, weights: Mapping[Group, float], accumulate: int,
               world: World, asked: Sequence[int]) -> _Sum:
    """Put into .grad the gradient of the mean loss over all learned positions of a step, and add up what all processes say of it.

    Each backward is of a sum, not of a mean: how many positions there are is known when the last part of the last process is done. A
    student spread over processes averages their gradients; so, times their number.
    """
    mine, parts = _Sum(), world.size * accumulate
    for k in range(accumulate):
        out, taught = loss_of(step, world.rank * accumulate + k, parts, weights)
        (out.loss * out.positions).backward()  # type: ignore[no-untyped-call]
        mine.add(float(out.loss.detach()) * out.positions, out.positions, {t: v * out.positions for t, v in out.terms.items()}, taught)
    total = _Sum()
    for heard in world.gather((mine.nats, mine.positions, mine.terms, mine.taught, asked[0] if asked else 0)):
        total.add(*heard)
    if not total.positions:
        raise Refused("nothing of this step can be learned from", where=f"train, step {step}",
                      remedy="with training.on_policy no teacher's token begins where one of the student's answers does: raise `after`, or `batch`")
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(world.size / total.positions)
    return total


def _finite(held_out: Mapping[str, float], step: int) -> dict[str, float]:
    """Held-out losses; Refused where one is not finite: the step before it was, and the last checkpoint stands."""
    if wrong := [f"{name} {value:g}" for name, value in held_out.items() if not math.isfinite(value)]:
        raise Refused(f"held-out loss is not finite after step {step + 1}: {', '.join(wrong)}", where="train",
                      remedy="lower training.learning_rate; the last checkpoint goes on")
    return dict(held_out)


def _line(state: State, settings: Settings, total: _Sum, norm: float, weights: Mapping[Group, float]) -> dict[str, Any]:
    """What metrics.jsonl says of a step. The loss is without weights, so that it can be compared: with them it is what shares are of."""
    n, groups = total.positions, {group: t for group, t in total.taught.items() if t.positions}
    spoken = sum(t.positions for t in groups.values())
    by_teacher = balance.added({Group(group.teacher, ""): t} for group, t in groups.items())
    told = sum(t.nats for t in groups.values())
    return {"step": state.step, "loss": told / n if math.isfinite(told) else total.nats / n,
            "terms": {name: value / n for name, value in total.terms.items()},
            "learning_rate": settings.rate(state.step - 1), "gradient_norm": norm, "positions": state.positions, "seconds": state.seconds,
            "share": {group.teacher: t.positions / spoken for group, t in by_teacher.items()},
            "teachers": {group.teacher: t.nats / t.positions for group, t in by_teacher.items() if math.isfinite(t.nats)},
            "groups": balance.shares(groups, weights)}


def _recorded(state: State, line: Mapping[str, Any], logged: bool) -> State:
    """The state with a line of the log, which tells of steps that were left out since the line before."""
    if not logged:
        return state
    since = state.log[-1]["step"] if state.log else 0
    skipped = [one for one in state.skipped if one["step"] > since]
    kept = {k: v for k, v in line.items() if k != "left"} | ({"skipped": skipped} if skipped else {})
    return replace(state, log=(*state.log, kept))


def _skipped(state: State, line: Mapping[str, Any], settings: Settings, folder: Path, world: World) -> State:
    """The state with a step that was not applied. Raises Refused where there were too many, told in metrics.jsonl too."""
    loss, norm, names = f"{line['loss']:g}", f"{line['gradient_norm']:g}", sorted(line["share"])
    state = replace(state, skipped=(*state.skipped, {"step": state.step, "loss": loss, "gradient_norm": norm, "teachers": names}))
    if len(state.skipped) <= settings.skips:
        if state.step < settings.steps or not state.log:
            return state  # told by the next line
        return replace(state, log=(*state.log[:-1], {**state.log[-1], "skipped": list(state.skipped)}))
    if not world.rank:
        store.publish_lines(folder / "metrics.jsonl", (*state.log, {"step": state.step, "skipped": list(state.skipped)}))
    raise Refused(f"loss {loss}, gradient norm {norm} at step {state.step}, taught by {', '.join(names)}: not applied"
                  + (f", as {settings.skips} steps before it" if settings.skips else ""), where="train",
                  remedy="lower training.learning_rate, or look at the batch: the last checkpoint is finite (training.skips: left out at most)")


def _resume(folder: Path, inputs: Mapping[str, Any], parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer, world: World,
            source: Source | None, resume: str) -> State:
    """Where the training stands, its state put into parameters, optimiser, chance and source. The first process chooses for all."""
    chosen = world.told(checkpoints.choose(folder, resume) if not world.rank else None)
    if chosen is None:
        return State()
    state, carried = checkpoints.load(chosen, inputs, parameters, optimizer, world)
    if source:
        source.restore(carried)
    if not world.rank:
        checkpoints.forget_later(folder, state.step)
        checkpoints.forget_old(folder)
    return state


@contextmanager
def _signals() -> Iterator[list[int]]:
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
