"""The processes that train one student together, and their collective operations.

A process finds the others through the variables that torchrun sets; `persea train --procs N` sets
the same. An incomplete launch is refused: it would train several students, each in a process that
takes itself for the only one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from persea.errors import RecipeError

T = TypeVar("T")
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# (size, rank) as mpirun and srun set them
FOREIGN_LAUNCH_VARIABLES = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


class ParallelStrategy(StrEnum):
    """How processes share the student.

    DDP: each process holds the whole student. FSDP: each holds a shard of every matrix and of the
    optimiser's moments.
    """

    DDP = "ddp"
    FSDP = "fsdp"


@dataclass(frozen=True)
class LaunchOptions:
    """How a training is launched.

    The options change results by rounding only, so they are no part of the recipe and of its hash.

    Attributes:
        num_processes: processes to start on this machine; 1 = only this one (or torchrun's).
        parallel: DDP or FSDP.
        resume: auto (the newest checkpoint), never, or a path.
    """

    num_processes: int = 1
    parallel: ParallelStrategy = ParallelStrategy.DDP
    resume: str = "auto"


@dataclass(frozen=True)
class World:
    """This process among the processes of a training.

    Attributes:
        rank: 0 to size - 1.
        size: number of processes; with one, collective operations return the value unchanged.
    """

    rank: int = 0
    size: int = 1

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes in rank order; a sum over them is equal everywhere."""
        if self.size == 1:
            return [value]
        from torch import distributed as dist

        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Return the value of the first process."""
        if self.size == 1:
            return value
        from torch import distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


# --- how a process was launched ---


def detect_world(
    num_processes: int,
    environment: Mapping[str, str] = os.environ,
    *,
    is_training_only: bool = True,
) -> World:
    """Return the world in which this process was launched; World() for a single process.

    Args:
        num_processes: value of --procs.
        environment: environment variables.
        is_training_only: whether only the stage `train` runs; no other stage runs in several
            processes.

    Raises:
        RecipeError: if the launch is incomplete or contradictory. Only the first process raises;
            the others exit with the same code.
    """
    given = [name for name in LAUNCH_VARIABLES if environment.get(name)]
    size, rank = environment.get("WORLD_SIZE", ""), environment.get("RANK", "")
    try:
        world = World(int(rank), int(size)) if given == list(LAUNCH_VARIABLES) else World()
    except ValueError:
        world = World()
    foreign = next(
        ((n, r) for n, r in FOREIGN_LAUNCH_VARIABLES if environment.get(n, "1") not in ("", "1")),
        None,
    )
    fault = _foreign_launch(environment) or _incomplete_launch(environment, given, world)
    if not fault and foreign and "WORLD_SIZE" not in given:
        rank = environment.get(foreign[1], "0")
        fault = (
            f"{foreign[0]}={environment[foreign[0]]} without WORLD_SIZE and RANK: "
            "each of these processes would train a student of its own"
        )
    elif not fault and num_processes > 1 and world.size > 1:
        fault = (
            f"--procs {num_processes} inside a launch of {world.size}: "
            f"every process would start {num_processes} more"
        )
    elif not fault and world.size > 1 and not is_training_only:
        fault = (
            f"a launch of {world.size} processes, and not for `persea train` alone: "
            f"every stage would run {world.size} times"
        )
    if not fault:
        return world
    if rank not in ("", "0") or environment.get("LOCAL_RANK", "0") not in ("", "-1", "0"):
        sys.exit(RecipeError.exit_code)  # the first process prints the reason
    raise RecipeError(
        fault,
        where="launch",
        remedy="persea train RECIPE --procs N, "
        "or torchrun --nproc-per-node N -m persea.cli train RECIPE",
    )


# What accelerate launch can be told about a training, and where persea takes it from instead.
ACCELERATE_SETTINGS = (
    ("ACCELERATE_MIXED_PRECISION", "`training.precision`"),
    ("ACCELERATE_USE_FSDP", "`--shard fsdp`"),
    ("ACCELERATE_USE_DEEPSPEED", "`--shard fsdp`"),
    ("ACCELERATE_USE_MEGATRON_LM", "`--shard fsdp`"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "`training.gradient_accumulation_steps`"),
)
UNSET_VALUES = ("", "no", "false", "False", "0", "1")


def _foreign_launch(environment: Mapping[str, str]) -> str:
    """Return the fault of a launch by accelerate, or "".

    With torchrun's variables and no settings of its own, accelerate launch is a launcher as any.
    """
    if not any(name.startswith("ACCELERATE_") for name in environment):
        return ""
    for name, instead in ACCELERATE_SETTINGS:
        value = environment.get(name, "")
        if value not in UNSET_VALUES:
            return f"accelerate sets {name}={value}, which persea does not read: it reads {instead}"
    if not environment.get("WORLD_SIZE"):
        return (
            "accelerate started a single process: without GPUs it starts one, whatever "
            "--num_processes says"
        )
    return ""


def _incomplete_launch(environment: Mapping[str, str], given: list[str], world: World) -> str:
    """Return the fault of incomplete or invalid variables of torchrun, or ""."""
    size, rank = environment.get("WORLD_SIZE", ""), environment.get("RANK", "")
    if "WORLD_SIZE" not in given and "RANK" not in given:
        return ""
    if missing := ", ".join(name for name in LAUNCH_VARIABLES if name not in given):
        known = [f"{name}={environment[name]}" for name in ("WORLD_SIZE", "RANK") if name in given]
        return f"{' and '.join(known)} without {missing}"
    if not 0 <= world.rank < world.size or str(world.size) != size:
        return f"RANK={rank} of WORLD_SIZE={size} is not a valid rank"
    return ""


def refuse_too_many_processes(world_size: int, batch_size: int, micro_batches: int) -> None:
    """Check that every process gets a conversation in each of its micro-batches.

    Raises:
        RecipeError: if the batch is too small.
    """
    if world_size * micro_batches > batch_size:
        raise RecipeError(
            f"a batch of {batch_size} conversations cannot be split over {world_size} processes"
            + (f" with {micro_batches} micro-batches each" if micro_batches > 1 else ""),
            where="training.batch_size",
            remedy=f"at most {batch_size // micro_batches or 1} processes, "
            "or a larger training.batch_size",
        )


def refuse_on_policy_processes(
    world_size: int, parallel: ParallelStrategy, budgeted_teachers: Sequence[str]
) -> None:
    """Check that on-policy steps can run in several processes.

    Args:
        world_size: number of processes.
        parallel: DDP or FSDP.
        budgeted_teachers: teachers on servers with a token budget, which each process would spend.

    Raises:
        RecipeError: with FSDP, and with a budgeted teacher, if there are several processes.
    """
    if world_size > 1 and parallel is ParallelStrategy.FSDP:
        raise RecipeError(
            "a student that is sharded over processes cannot generate answers",
            where="training.on_policy",
            remedy="--shard ddp, or one process",
        )
    if world_size > 1 and budgeted_teachers:
        raise RecipeError(
            f"each of {world_size} processes would spend the budget of "
            f"{', '.join(budgeted_teachers)}",
            where="training.on_policy",
            remedy="one process, or delete `max_total_tokens:` of the endpoint",
        )
