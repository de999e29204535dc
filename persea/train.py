"""The one loop: batch, loss, step, checkpoint. It imports no loss and no source of batches; they are handed in."""

from __future__ import annotations

import io
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

from persea import store
from persea.errors import DataError, Refused, Stopped


@dataclass(frozen=True)
class Settings:
    """How to train; units: steps, and nats per learned position for losses."""

    steps: int
    learning_rate: float
    warmup: int
    weight_decay: float
    clip: float
    checkpoint_every: int
    log_every: int
    seed: int


class Step(Protocol):
    """What the loop needs to know of a loss."""

    @property
    def loss(self) -> torch.Tensor: ...
    @property
    def terms(self) -> Mapping[str, float]: ...
    @property
    def positions(self) -> int: ...


class Source(Protocol):
    """A source of batches that carries something from step to step (rollouts in flight), which a checkpoint must hold.

    state    asked after a step; restore  told before the first step what every process of the saving world gave
    """

    def state(self) -> bytes: ...
    def restore(self, states: tuple[bytes, ...]) -> None: ...


def rate(step: int, settings: Settings) -> float:
    """Learning rate: linear warm-up, then half a cosine down to a tenth."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup))
    done = min(1.0, max(0.0, (step - settings.warmup) / max(1, settings.steps - settings.warmup)))
    return settings.learning_rate * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def train(parameters: list[torch.nn.Parameter], loss_of: Callable[[int], tuple[Step, Mapping[str, float]]], settings: Settings, folder: Path,
          key: str,
          progress: Callable[[int, Mapping[str, Any]], None] = lambda step, line: None, *, source: Source | None = None) -> None:
    """Minimise loss_of(step) for settings.steps steps, from the last checkpoint in `folder` if one stands for `key`.

    parameters  what may change
    loss_of     step -> (loss, learned positions per teacher); the same step gives the same loss for the same weights
    key         digest of recipe and data; a checkpoint of another key is refused
    source      what carries something from step to step
    Writes metrics.jsonl and checkpoints/. Raises Refused before a step whose loss or gradient is not finite is applied,
    Stopped after a signal, with the state saved.
    """
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay)
    begin, seconds, positions, log = _resume(folder, key, parameters, optimizer, source)
    clock = time.monotonic() - seconds
    with _signals() as asked:
        for step in range(begin, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, settings)
            torch.manual_seed((settings.seed << 31) + step)  # dropout of a step is the same whether or not the run was resumed before it
            out, share = loss_of(step)
            out.loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            if not (torch.isfinite(out.loss) and torch.isfinite(norm)):
                raise Refused(f"loss {float(out.loss.detach()):g}, gradient norm {float(norm):g} at step {step}: not applied", where="train",
                              remedy="lower training.learning_rate, or look at the batch: the last checkpoint is finite")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            positions += out.positions
            total = max(1, sum(share.values()))
            line = {"step": step + 1, "loss": float(out.loss.detach()), "terms": dict(out.terms),
                    "learning_rate": rate(step, settings), "gradient_norm": float(norm),
                    "positions": positions, "seconds": round(time.monotonic() - clock, 3), "share": {k: n / total for k, n in share.items()}}
            if (step + 1) % settings.log_every == 0 or step + 1 == settings.steps:
                log.append(line)
            progress(step + 1, line)
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps or asked:
                _checkpoint(folder, key, line, parameters, optimizer, log, source.state() if source else b"")
            if asked:
                raise Stopped(asked[0], f"step {step + 1} is saved")


def _checkpoint(folder: Path, key: str, line: Mapping[str, Any], parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer,
                log: list[dict[str, Any]], carried: bytes) -> None:
    """Publish state and metrics, then the record that makes them count; the newest two are kept. line: this step's metrics; carried: from
    step to step, by the source."""
    buffer, step = io.BytesIO(), line["step"]
    torch.save({"parameters": [p.detach() for p in parameters], "optimizer": optimizer.state_dict(), "step": step, "positions": line["positions"],
                "seconds": line["seconds"], "carried": torch.tensor(list(carried), dtype=torch.uint8)}, buffer)
    name = f"step-{step:08d}"
    metrics = "".join(json.dumps(line) + "\n" for line in log).encode()
    shas = {"state": store.publish(folder / "checkpoints" / f"{name}.pt", buffer.getvalue()),
            "metrics": store.publish(folder / "checkpoints" / f"{name}.jsonl", metrics)}
    store.publish(folder / "metrics.jsonl", metrics)
    store.publish_json(folder / "checkpoints" / f"{name}.json", {"key": key, "step": step, **shas})
    _forget_old(folder)


def _forget_old(folder: Path) -> None:
    kept = sorted((folder / "checkpoints").glob("step-*.json"))[-2:]
    for path in sorted((folder / "checkpoints").glob("step-*")):  # the record first, it sorts before .jsonl and .pt
        if path.stem < kept[0].stem:
            path.unlink(missing_ok=True)


def _resume(folder: Path, key: str, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, source: Source | None
            ) -> tuple[int, float, int, list[dict[str, Any]]]:
    """(steps done, seconds, positions, log) of the last checkpoint, its state put into parameters and optimizer."""
    records = sorted((folder / "checkpoints").glob("step-*.json"))
    if not records:
        return 0, 0.0, 0, []
    record, last = store.read_json(records[-1]), records[-1].with_suffix("")
    broken = DataError("this checkpoint is not what was written", where=str(last), remedy=f"delete {last}.*; the checkpoint before it goes on")
    if not isinstance(record, dict) or record.keys() != {"key", "step", "state", "metrics"}:
        raise broken
    if record["key"] != key:
        raise Refused("the checkpoint belongs to another recipe, model or capture", where=str(records[-1]),
                      remedy=f"give the run another --out, or delete {folder} to train anew")
    try:
        data, metrics = (records[-1].with_suffix(s).read_bytes() for s in (".pt", ".jsonl"))
    except OSError as error:
        raise broken from error
    if (store.digest(data), store.digest(metrics)) != (record["state"], record["metrics"]):
        raise broken
    state = torch.load(io.BytesIO(data), weights_only=True)
    if record["step"] != state["step"] or last.name != f"step-{state['step']:08d}":
        raise broken
    with torch.no_grad():
        for parameter, value in zip(parameters, state["parameters"], strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    if source is not None:
        source.restore((bytes(state["carried"].tolist()),))
    _forget_old(folder)
    return int(state["step"]), float(state["seconds"]), int(state["positions"]), [json.loads(line) for line in metrics.splitlines()]


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
