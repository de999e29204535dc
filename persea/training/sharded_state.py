"""The part of a checkpoint that is spread over processes: torch.distributed.checkpoint (DCP).

With FSDP each process holds a shard of every weight and moment. It writes and reads its own shards
alone, so that no process needs memory for the whole student. DCP splits what it reads as the reader
needs it: another number of processes, or one, can resume.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from persea import storage
from persea.errors import StorageError
from persea.training.distributed.world import World

SHARDS_SUFFIX = ".shards"  # of a checkpoint's folder of shards


def is_shard(value: Any) -> bool:
    """Return whether a tensor is spread over processes."""
    if not isinstance(value, torch.Tensor) or type(value) in (torch.Tensor, torch.nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor  # heavy, and not needed by one process

    return isinstance(value, DTensor)


def _dcp() -> Any:
    """Import torch's distributed checkpoints: heavy, and not needed by one process."""
    return import_module("torch.distributed.checkpoint")


def write_shards(folder: Path, tensors: Mapping[str, torch.Tensor], world: World) -> dict[str, str]:
    """Write this process' shards of some tensors.

    Collective: every process calls it with the same names.

    Args:
        folder: The folder of shards, which every process must see.
        tensors: Name -> tensor.
        world: This process among all processes.

    Returns:
        File -> sha256, of the files of all processes.

    Raises:
        StorageError: The disk is full or cannot be written.
    """
    dcp = _dcp()
    try:
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder))
    except dcp.api.CheckpointException as error:
        causes = [e for e, _ in error.failures.values() if isinstance(e, OSError)]
        if not causes:
            raise
        raise StorageError(
            f"cannot write: {causes[0].strerror}",
            where=str(folder),
            remedy="free space, then run again: the checkpoint before it stays",
        ) from error
    return _digests(folder, world)


def digests_differ(folder: Path, expected: Mapping[str, str], world: World) -> bool:
    """Return whether a file of shards is missing or is not what was written. Collective."""
    return _digests(folder, world) != dict(expected)


def read_shards(folder: Path, tensors: Mapping[str, torch.Tensor], world: World) -> None:
    """Read tensors in place, each process what it holds of them. Collective."""
    dcp = _dcp()
    with warnings.catch_warnings():  # that one process is alone, which is meant
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(
            dict(tensors), storage_reader=dcp.FileSystemReader(folder), no_dist=world.size == 1
        )


def read_whole(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder of shards, whole: for one process."""
    dcp = _dcp()
    metadata: Any = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        for name, entry in metadata.items()
    }
    read_shards(folder, tensors, World())
    return tensors


def remove_checkpoint_path(path: Path) -> None:
    """Delete a file of a checkpoint, or its folder of shards."""
    if not path.is_dir():
        storage.DISK.remove(path)
        return
    for inside in path.iterdir():
        storage.DISK.remove(inside)
    path.rmdir()


def _digests(folder: Path, world: World) -> dict[str, str]:
    """Return file -> sha256; the processes share the reading."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    own = {p.name: storage.digest_file(p) for p in files[world.rank :: world.size]}
    return {name: sha for part in world.all_gather(own) for name, sha in sorted(part.items())}
