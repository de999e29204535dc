"""What a training is made of at a step, on disk: whole or not at all, digested, and never in the place of the last finite one.

A checkpoint is three files in checkpoints/: `step-N.pt` (weights, optimiser, random states, what the source carries), `step-N.jsonl`
(metrics up to there) and, last, `step-N.json`: the sealed record that makes them count. Weights and moments are gathered whole, so that a
checkpoint of two processes goes on in one, and back.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from persea import storage as store
from persea.errors import DataError, RefusedError
from persea.training.distributed.world import World
from persea.training.loss_balancing import Group, GroupScale

MAX_CHECKPOINTS = (
    2  # checkpoints that stay: the newest, and one more where the newest is lost to the disk
)
RESUME_AUTO, RESUME_NEVER = "auto", "never"  # what --resume may be, beside a path


@dataclass(frozen=True)
class TrainerState:
    """Where a training stands.

    step       steps done; schedule and order of samples follow from it and the recipe
    positions  learned positions so far, over all processes
    seconds    spent so far
    skipped    steps that were not applied: what was not finite there
    log        lines of metrics.jsonl
    scales     how large the losses of each group have been
    """

    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    skipped_steps: tuple[Mapping[str, Any], ...] = ()
    log_history: tuple[Mapping[str, Any], ...] = ()
    group_scales: Mapping[Group, GroupScale] = field(default_factory=dict)


# --- chance ---


def seed_all(seed: int, rank: int) -> None:
    """Begin every source of chance that a loss may draw from; each process draws its own."""
    torch.manual_seed((seed << 31) + rank)  # CUDA's too
    np.random.seed([seed, rank])
    random.seed(f"{seed} {rank}")


def rng_state() -> dict[str, Any]:
    """Where every source of chance of this process stands."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    words = torch.from_numpy(np.asarray(keys).astype(np.int64))
    state = {
        "torch": torch.get_rng_state(),
        "numpy": (str(kind), words, *rest),
        "python": random.getstate(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore_rng_state(state: Mapping[str, Any]) -> None:
    """Put every source of chance back to where it stood."""
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# --- whole and sharded ---


def gather_full_tensor(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor, also where every process holds a part of it (a collective: all processes call it in the same order)."""
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return value
    from torch.distributed.tensor import DTensor  # heavy, and not needed by one process

    return value.full_tensor() if isinstance(value, DTensor) else value


def _shard_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process' part of a whole tensor, laid out as `like` is."""
    if type(like) in (torch.Tensor, torch.nn.Parameter) or value.dim() == 0:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    return (
        distribute_tensor(
            value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
        )
        if isinstance(like, DTensor)
        else value
    )


# --- writing ---


class _HashingWriter:
    """A file that digests what goes through it: a state of gigabytes is never held as bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sha.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error  # torch hides it behind an error of its own archive
            raise

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(
    folder: Path,
    inputs: Mapping[str, Any],
    state: TrainerState,
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    world: World,
    source_state: bytes = b"",
) -> None:
    """Publish state and metrics, then the record that makes them count; the newest two stay. Every process calls it, the first writes.

    carried  what this process' source of batches carries from step to step
    Raises Refused where a weight is not finite: such a state is never written, so that none can push the last finite one out.
    """
    finite = all(bool(torch.isfinite(p.detach()).all()) for p in parameters)
    if not all(world.all_gather(finite)):
        raise RefusedError(
            f"weights are not finite after step {state.step}: not saved",
            where=str(folder),
            remedy="lower training.learning_rate; the last checkpoint is finite",
        )
    moments = optimizer.state_dict()
    tensors = [gather_full_tensor(p.detach()) for p in parameters]
    moments["state"] = {
        k: {name: gather_full_tensor(v) for name, v in values.items()}
        for k, values in moments["state"].items()
    }
    everybodys = world.all_gather(
        (rng_state(), torch.from_numpy(np.frombuffer(source_state, np.uint8).copy()))
    )
    if world.rank:
        return
    name = folder / "checkpoints" / f"step-{state.step:08d}"
    with store.open_atomic(name.with_suffix(".pt")) as file:
        digesting: Any = _HashingWriter(file)
        try:
            torch.save(
                {
                    "parameters": tensors,
                    "optimizer": moments,
                    "step": state.step,
                    "positions": state.num_tokens,
                    "seconds": state.seconds,
                    "skipped": list(state.skipped_steps),
                    "scales": [
                        (tuple(group), astuple(scale))
                        for group, scale in state.group_scales.items()
                    ],
                    "chance": [c for c, _ in everybodys],
                    "carried": [c for _, c in everybodys],
                },
                digesting,
            )
        except RuntimeError as error:
            raise digesting.error or error from error
    metrics = "".join(
        json.dumps(line, allow_nan=False) + "\n" for line in state.log_history
    ).encode()
    store.write_atomic(name.with_suffix(".jsonl"), metrics)
    store.write_atomic(folder / "metrics.jsonl", metrics)
    store.write_json_with_checksum(
        name.with_suffix(".json"),
        {
            "inputs": inputs,
            "step": state.step,
            "world": world.size,
            "state": digesting.sha.hexdigest(),
            "metrics": store.digest_bytes(metrics),
        },
    )
    delete_old_checkpoints(folder)


def delete_old_checkpoints(folder: Path, keep: int = MAX_CHECKPOINTS) -> None:
    """Remove all but the newest checkpoints, and what a killed run left of one: whatever is older than the oldest that stays."""
    records = sorted((folder / "checkpoints").glob("step-*.json"))[-keep:] if keep else []
    for path in sorted(
        (folder / "checkpoints").glob("step-*")
    ):  # the record first, it sorts before .jsonl and .pt
        if not keep or (records and path.stem < records[0].stem):
            store.DISK.remove(path)


def delete_later_checkpoints(folder: Path, step: int) -> None:
    """Remove what was saved after a step, once the training has gone back to it: it is no longer what this training did, and would be taken
    for its newest.
    """
    for path in sorted((folder / "checkpoints").glob("step-*")):
        if path.stem > f"step-{step:08d}":
            store.DISK.remove(path)


# --- reading ---


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The record to go on from: the newest (auto), none (never: all that stand are removed), or the one that a path names.

    A path names a record, its step's name without ending, or a folder of checkpoints (its newest). Raises DataError where nothing is.
    """
    if resume == RESUME_NEVER:
        delete_old_checkpoints(folder, keep=0)
        return None
    if resume == RESUME_AUTO:
        return max((folder / "checkpoints").glob("step-*.json"), default=None)
    path = Path(resume)
    inside = [
        *path.glob("step-*.json"),
        *path.glob("checkpoints/step-*.json"),
        *path.glob("train/checkpoints/step-*.json"),
    ]
    named = (
        path if path.suffix == ".json" else path.parent / f"{path.name.removesuffix('.pt')}.json"
    )
    chosen = max(inside, default=None) if path.is_dir() else named
    if chosen is None or not chosen.is_file():
        raise DataError(
            "no checkpoint is there",
            where=resume,
            remedy="name a checkpoints/step-N.json, or say --resume auto",
        )
    return chosen


def describe_changes(before: Any, now: Any, key: str = "") -> list[str]:
    """Which keys differ, as "training.steps: 8 -> 9"."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [
            line
            for k in dict.fromkeys((*now, *before))
            for line in describe_changes(before.get(k), now.get(k), f"{key}.{k}" if key else str(k))
        ]
    return [] if before == now else [f"{key}: {_shorten(before)} -> {_shorten(now)}"]


def _shorten(value: Any) -> str:
    text = value[:12] if isinstance(value, str) and len(value) == 64 else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def describe_input_changes(folder: Path, inputs: Mapping[str, Any]) -> str:
    """What is not as it was when the newest checkpoint here was written; empty where none tells."""
    newest = find_checkpoint(folder, RESUME_AUTO)
    return (
        "; ".join(describe_changes(_read_record(newest)["inputs"], _json_round_trip(inputs)))
        if newest
        else ""
    )


def _json_round_trip(inputs: Mapping[str, Any]) -> Any:
    """As it comes back from a file: tuples are lists there."""
    return json.loads(json.dumps(inputs))


def _corrupt_checkpoint(record: Path) -> DataError:
    last = record.with_suffix("")
    return DataError(
        "this checkpoint is not what was written",
        where=str(last),
        remedy=f"delete {last}.*; the checkpoint before it goes on",
    )


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = store.read_json_with_checksum(path, "")
    except DataError as error:
        raise _corrupt_checkpoint(path) from error
    if (
        record.keys() != {"inputs", "step", "world", "state", "metrics"}
        or path.stem != f"step-{record['step']:08d}"
    ):
        raise _corrupt_checkpoint(path)
    return record


def load_checkpoint(
    path: Path,
    inputs: Mapping[str, Any],
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    world: World,
) -> tuple[TrainerState, tuple[bytes, ...]]:
    """Where the training of a record stands, its state put into parameters, optimiser and chance; and what sources carried, by process.

    optimizer  None: only the weights are wanted
    Raises Refused with what differs where it belongs to other inputs, DataError where a byte is not as it was written or a weight is not finite.
    """
    record = _read_record(path)
    if different := describe_changes(record["inputs"], _json_round_trip(inputs)):
        raise RefusedError(
            f"the checkpoint belongs to another recipe, model or capture ({'; '.join(different)})",
            where=str(path),
            remedy=f"give the run another --out, put back what it was, or begin anew with --resume never, which deletes {path.parent}",
        )
    try:
        metrics = path.with_suffix(".jsonl").read_bytes()
        digests = store.digest_file(path.with_suffix(".pt")), store.digest_bytes(metrics)
    except FileNotFoundError as error:
        raise _corrupt_checkpoint(path) from error
    except OSError as error:
        raise store.unreadable_file_error(path, error) from error
    if digests != (record["state"], record["metrics"]):
        raise _corrupt_checkpoint(path)
    state = torch.load(path.with_suffix(".pt"), weights_only=True, mmap=True, map_location="cpu")
    if record["step"] != state["step"]:
        raise _corrupt_checkpoint(path)
    if not all(bool(torch.isfinite(value).all()) for value in state["parameters"]):
        raise DataError(
            "a weight of this checkpoint is not finite",
            where=str(path),
            remedy=f"delete {path.with_suffix('')}.*",
        )
    with torch.no_grad():
        for parameter, value in zip(parameters, state["parameters"], strict=True):
            parameter.copy_(_shard_like(value, parameter))
    if optimizer is not None:
        moments = state["optimizer"]
        moments["state"] = {
            k: {name: _shard_like(v, parameters[k]).clone() for name, v in values.items()}
            for k, values in moments["state"].items()
        }  # copies: the file may be gone before they are
        optimizer.load_state_dict(moments)
        if world.rank < len(state["chance"]):
            restore_rng_state(state["chance"][world.rank])
    log = tuple(json.loads(line) for line in metrics.splitlines())
    done = TrainerState(
        int(state["step"]),
        int(state["positions"]),
        float(state["seconds"]),
        tuple(state["skipped"]),
        log,
        {Group(*group): GroupScale(*scale) for group, scale in state["scales"]},
    )
    return done, tuple(c.numpy().tobytes() for c in state["carried"])
