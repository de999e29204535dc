"""Checkpoints of a training: complete or absent, with checksums, and never of weights not finite.

A checkpoint is three files in checkpoints/: `step-N.pt` (weights, optimiser, random generators,
state of the batch source), `step-N.jsonl` (metrics up to the step) and, written last,
`step-N.json`, the record with checksums that makes the others valid. With FSDP the weights and
optimiser moments are in `step-N.shards/`, each process' own part (persea.training.sharded_state).
One process can resume a checkpoint of two, and the reverse.
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

from persea import storage
from persea.errors import DataError, RefusedError
from persea.training.distributed.world import World
from persea.training.loss_balancing import Group, GroupScale
from persea.training.metrics_log import encode_log_line
from persea.training.sharded_state import (
    SHARDS_SUFFIX,
    digests_differ,
    is_shard,
    read_shards,
    remove_checkpoint_path,
    write_shards,
)

MAX_CHECKPOINTS = 2  # checkpoints to keep: the newest, and one more in case the disk damages it
RESUME_AUTO, RESUME_NEVER = "auto", "never"  # values of --resume besides a path
# Keys of the recipe's section `training` that change how often a training is observed and saved,
# not its result: a checkpoint may be resumed with other values.
IGNORED_ON_RESUME_KEYS = frozenset({"checkpoint_every", "log_every", "report_to"})


@dataclass(frozen=True)
class TrainerState:
    """Progress of a training.

    Attributes:
        step: steps done; the schedule and the order of examples follow from it and the recipe.
        num_tokens: supervised positions so far, over all processes.
        seconds: time so far.
        skipped_steps: steps that were not applied, with the values that were not finite.
        log_history: lines of metrics.jsonl.
        group_scales: scale of each group's losses, for loss balancing.
        open_line: line of metrics of a step that is done and not yet in the log: its held-out
            losses are still to be measured. None between two steps.
    """

    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    skipped_steps: tuple[Mapping[str, Any], ...] = ()
    log_history: tuple[Mapping[str, Any], ...] = ()
    group_scales: Mapping[Group, GroupScale] = field(default_factory=dict)
    open_line: Mapping[str, Any] | None = None


# --- random generators ---


def seed_all(seed: int, rank: int) -> None:
    """Seed every random generator of this process; each rank draws its own numbers."""
    torch.manual_seed((seed << 31) + rank)  # CUDA's too
    np.random.seed([seed, rank])
    random.seed(f"{seed} {rank}")


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def rng_state() -> dict[str, Any]:
    """Return the state of every random generator of this process."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    words = torch.from_numpy(np.asarray(keys).astype(np.int64))
    state = {
        "torch": torch.get_rng_state(),
        "numpy": (str(kind), words, *rest),
        "python": random.getstate(),
    }
    device = _accelerator()
    if device is None:
        return state
    return state | {device.type: torch.get_device_module(device).get_rng_state()}


def restore_rng_state(state: Mapping[str, Any]) -> None:
    """Restore the state that `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    device = _accelerator()
    if device is not None and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type])


# --- whole and sharded ---


def gather_full_tensor(value: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor, also if every process holds a shard.

    Collective: all processes call it in the same order.
    """
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return value
    from torch.distributed.tensor import DTensor  # heavy, and not needed by one process

    return value.full_tensor() if isinstance(value, DTensor) else value


def _shard_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return this process' shard of a whole tensor, with the layout of `like`."""
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
    """A file that computes a checksum while it is written: gigabytes are never held as bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write data; remember the error of a full disk."""
        self.sha.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error  # torch.save raises an error of its own instead
            raise

    def flush(self) -> None:
        """Flush the file."""
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
    """Write a checkpoint and delete all but the newest MAX_CHECKPOINTS.

    Collective: every process calls it, the first writes.

    Args:
        folder: the run folder's `train`.
        inputs: recipe and data as JSON, compared on resuming.
        state: progress of the training.
        parameters: the trainable parameters.
        optimizer: their optimiser.
        world: this process among all processes.
        source_state: state of this process' batch source.

    Raises:
        RefusedError: if a weight is not finite. Such a state is never written, so it cannot replace
            the last finite checkpoint.
        StorageError: if the disk is full or cannot be written.
    """
    finite = all(bool(torch.isfinite(p.detach()).all()) for p in parameters)
    if not all(world.all_gather(finite)):
        raise RefusedError(
            f"weights are not finite after step {state.step}: not saved",
            where=str(folder),
            remedy="lower training.learning_rate; the last checkpoint is finite",
        )
    name = folder / "checkpoints" / f"step-{state.step:08d}"
    if not world.rank and name.with_suffix(".json").exists():
        # of this step before its held-out loss was measured
        storage.DISK.remove(name.with_suffix(".json"))
    moments = optimizer.state_dict()
    named = {f"parameter.{k}": p.detach() for k, p in enumerate(parameters)} | {
        f"moment.{k}.{key}": value
        for k, values in moments["state"].items()
        for key, value in values.items()
    }
    shards = {key: value for key, value in named.items() if is_shard(value)}
    # a shard is None in the file of the other values
    tensors = [named[f"parameter.{k}"] for k in range(len(parameters))]
    tensors = [None if is_shard(t) else t for t in tensors]
    moments["state"] = {
        k: {key: None if is_shard(v) else v for key, v in values.items()}
        for k, values in moments["state"].items()
    }
    digests = write_shards(name.with_suffix(SHARDS_SUFFIX), shards, world) if shards else {}
    states = world.all_gather(
        (rng_state(), torch.from_numpy(np.frombuffer(source_state, np.uint8).copy()))
    )
    if world.rank:
        return
    with storage.open_atomic(name.with_suffix(".pt")) as file:
        writer: Any = _HashingWriter(file)
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
                    "chance": [rng for rng, _ in states],
                    "carried": [source for _, source in states],
                    "open_line": json.dumps(state.open_line),
                },
                writer,
            )
        except RuntimeError as error:
            raise writer.error or error from error
    metrics = b"".join(map(encode_log_line, state.log_history))
    storage.write_atomic(name.with_suffix(".jsonl"), metrics)
    storage.write_json_with_checksum(
        name.with_suffix(".json"),
        {
            "inputs": inputs,
            "step": state.step,
            "world": world.size,
            "state": writer.sha.hexdigest(),
            "metrics": storage.digest_bytes(metrics),
            **({"shards": digests} if digests else {}),
        },
    )
    delete_old_checkpoints(folder)


def delete_old_checkpoints(folder: Path, keep: int = MAX_CHECKPOINTS) -> None:
    """Delete all but the newest checkpoints, and older files that a killed run left behind."""
    records = sorted((folder / "checkpoints").glob("step-*.json"))[-keep:] if keep else []
    # sorted: the record (.json) is deleted before .jsonl, .pt and .shards
    for path in sorted((folder / "checkpoints").glob("step-*")):
        if not keep or (records and path.stem < records[0].stem):
            remove_checkpoint_path(path)


def delete_partial_files(folder: Path) -> None:
    """Delete the incomplete files of a training that was killed while it wrote a checkpoint.

    Only the first process writes checkpoints, so that process calls it before its first write.
    """
    for path in (folder / "checkpoints").glob(".step-*.tmp"):
        storage.DISK.remove(path)
    for path in (folder / "checkpoints").glob(f"step-*{SHARDS_SUFFIX}"):
        if not path.with_suffix(".json").is_file():
            remove_checkpoint_path(path)


def delete_later_checkpoints(folder: Path, step: int) -> None:
    """Delete the checkpoints after a step that the training has gone back to.

    They no longer belong to this training, and one of them would be resumed as the newest.
    """
    for path in sorted((folder / "checkpoints").glob("step-*")):
        if path.stem > f"step-{step:08d}":
            remove_checkpoint_path(path)


# --- reading ---


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """Return the record of the checkpoint to resume, or None.

    Args:
        folder: the run folder's `train`.
        resume: auto = the newest; never = none, and all checkpoints are deleted; otherwise the path
            of a record, of a checkpoint without its suffix, or of a folder (its newest checkpoint).

    Raises:
        DataError: if the path holds no checkpoint.
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
            "no checkpoint found",
            where=resume,
            remedy="name a checkpoints/step-N.json, or use --resume auto",
        )
    return chosen


def collapse_error(problem: str, step: int, folder: Path) -> RefusedError:
    """Return the refusal of a student whose own answers collapsed; it names what is still good."""
    newest = find_checkpoint(folder, RESUME_AUTO)
    kept = f"{newest} is the last good checkpoint" if newest else "no checkpoint was due before"
    return RefusedError(
        problem,
        where=f"train, step {step + 1}",
        remedy=f"{kept}; lower training.learning_rate or training.on_policy.share, or change the "
        "limits (training.on_policy.tripwire_steps) and run again: it goes on from there",
    )


def describe_changes(before: Any, now: Any, key: str = "") -> list[str]:
    """Return the differing keys, such as "training.steps: 8 -> 9"."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [
            line
            for k in dict.fromkeys((*now, *before))
            for line in describe_changes(before.get(k), now.get(k), f"{key}.{k}" if key else str(k))
        ]
    return [] if before == now else [f"{key}: {_shorten(before)} -> {_shorten(now)}"]


def _comparable(inputs: Any) -> Any:
    """Return inputs as read from a file (tuples are lists), without IGNORED_ON_RESUME_KEYS."""
    again = json.loads(json.dumps(inputs))
    training = again.get("training")
    if isinstance(training, dict):
        again["training"] = {k: v for k, v in training.items() if k not in IGNORED_ON_RESUME_KEYS}
    return again


def _shorten(value: Any) -> str:
    """Return a value for a message: digests and long values are cut."""
    text = value[:12] if isinstance(value, str) and len(value) == 64 else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def describe_input_changes(folder: Path, inputs: Mapping[str, Any]) -> str:
    """Return how inputs differ from those of the newest checkpoint; "" if nothing differs."""
    newest = find_checkpoint(folder, RESUME_AUTO)
    if not newest:
        return ""
    before = _comparable(_read_record(newest)["inputs"])
    return "; ".join(describe_changes(before, _comparable(inputs)))


def _corrupt_checkpoint(record: Path) -> DataError:
    """Return the error for a checkpoint whose checksum does not match."""
    path = record.with_suffix("")
    return DataError(
        "the checkpoint is damaged: a checksum does not match",
        where=str(path),
        remedy=f"delete {path}.*; the training resumes from the checkpoint before it",
    )


def _read_record(path: Path) -> dict[str, Any]:
    """Read and check the record of a checkpoint."""
    try:
        record = storage.read_json_with_checksum(path, "")
    except DataError as error:
        raise _corrupt_checkpoint(path) from error
    if (
        record.keys() - {"shards"} != {"inputs", "step", "world", "state", "metrics"}
        or path.stem != f"step-{record['step']:08d}"
    ):
        raise _corrupt_checkpoint(path)
    return record


def _verified_metrics(path: Path, inputs: Mapping[str, Any], world: World) -> tuple[int, bytes]:
    """Check the record and all files of a checkpoint; return its step and its metrics."""
    record = _read_record(path)
    if different := describe_changes(_comparable(record["inputs"]), _comparable(inputs)):
        raise RefusedError(
            f"the checkpoint belongs to another recipe, model or capture ({'; '.join(different)})",
            where=str(path),
            remedy="use another --out, restore the old inputs, or start again with "
            f"--resume never, which deletes {path.parent}",
        )
    try:
        metrics = path.with_suffix(".jsonl").read_bytes()
        digests = storage.digest_file(path.with_suffix(".pt")), storage.digest_bytes(metrics)
    except FileNotFoundError as error:
        raise _corrupt_checkpoint(path) from error
    except OSError as error:
        raise storage.unreadable_file_error(path, error) from error
    if digests != (record["state"], record["metrics"]) or (
        "shards" in record
        and digests_differ(path.with_suffix(SHARDS_SUFFIX), record["shards"], world)
    ):
        raise _corrupt_checkpoint(path)
    return int(record["step"]), metrics


def load_checkpoint(
    path: Path,
    inputs: Mapping[str, Any],
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    world: World,
) -> tuple[TrainerState, tuple[bytes, ...]]:
    """Load a checkpoint into parameters, optimiser and random generators.

    Args:
        path: record of the checkpoint.
        inputs: recipe and data as JSON; keys of IGNORED_ON_RESUME_KEYS may differ.
        parameters: the trainable parameters.
        optimizer: their optimiser; None = load only the weights.
        world: this process among all processes.

    Returns:
        The progress of the training, and the state of the batch source of every saving process.

    Raises:
        RefusedError: if the checkpoint belongs to other inputs; the message lists the differences.
        DataError: if a checksum does not match or a weight is not finite.
    """
    step, metrics = _verified_metrics(path, inputs, world)
    state = torch.load(path.with_suffix(".pt"), weights_only=True, mmap=True, map_location="cpu")
    if step != state["step"]:
        raise _corrupt_checkpoint(path)
    if not all(bool(torch.isfinite(v).all()) for v in state["parameters"] if v is not None):
        raise DataError(
            "a weight of this checkpoint is not finite",
            where=str(path),
            remedy=f"delete {path.with_suffix('')}.*",
        )
    read: dict[str, torch.Tensor] = {}  # what is in shards
    with torch.no_grad():
        for k, (parameter, value) in enumerate(zip(parameters, state["parameters"], strict=True)):
            if value is None:
                read[f"parameter.{k}"] = parameter.detach()
            else:
                parameter.copy_(_shard_like(value, parameter))
    if optimizer is not None:
        moments = state["optimizer"]
        # numbered by the order of the groups, which need not be that of the parameters
        ordered = [p for group in optimizer.param_groups for p in group["params"]]
        read |= {
            f"moment.{k}.{name}": torch.zeros_like(ordered[k].detach())
            for k, values in moments["state"].items()
            for name, v in values.items()
            if v is None
        }
        moments["state"] = {
            k: {
                name: read[f"moment.{k}.{name}"]
                if v is None
                else _shard_like(v, ordered[k]).clone()
                for name, v in values.items()
            }
            for k, values in moments["state"].items()
        }  # copies: the memory-mapped file may be deleted before the optimiser is
    if read:
        read_shards(path.with_suffix(SHARDS_SUFFIX), read, world)
    if optimizer is not None:
        optimizer.load_state_dict(moments)
        if world.rank < len(state["chance"]):
            restore_rng_state(state["chance"][world.rank])
    log = tuple(json.loads(line) for line in metrics.splitlines())
    progress = TrainerState(
        int(state["step"]),
        int(state["positions"]),
        float(state["seconds"]),
        tuple(state["skipped"]),
        log,
        {Group(*group): GroupScale(*scale) for group, scale in state["scales"]},
        json.loads(state.get("open_line", "null")),
    )
    return progress, tuple(source.numpy().tobytes() for source in state["carried"])
