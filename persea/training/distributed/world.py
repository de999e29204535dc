"""World: the processes that train one student together, and what each says to the others.

A world is told by the variables that torchrun sets (`persea train --procs N` sets the same for its own), or refused: a launch that is half
set up would train several students, each of which believes that it is the only one.
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
FOREIGN_LAUNCH_VARIABLES = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)  # mpirun, srun


class ParallelStrategy(StrEnum):
    """DDP: each process holds the whole student. FSDP: each holds a part of every matrix, and of the optimiser's moments."""

    DDP = "ddp"
    FSDP = "fsdp"


@dataclass(frozen=True)
class LaunchOptions:
    """How a student is trained, as far as that changes no result but by rounding: not the recipe's, and no part of its hash.

    procs   processes to start on this machine; 1 = none but this one (or torchrun's)
    resume  auto (the newest checkpoint), never, or a path
    """

    num_processes: int = 1
    parallel: ParallelStrategy = ParallelStrategy.DDP
    resume: str = "auto"


@dataclass(frozen=True)
class World:
    """The processes of a training: rank 0..size-1. One alone says everything to itself."""

    rank: int = 0
    size: int = 1

    def all_gather(self, value: T) -> list[T]:
        """What every process says, in the order of ranks, at every process. Any sum over it is the same everywhere."""
        if self.size == 1:
            return [value]
        from torch import distributed as dist

        heard: list[T] = [value] * self.size
        dist.all_gather_object(heard, value)
        return heard

    def broadcast(self, value: T) -> T:
        """What the first process says."""
        if self.size == 1:
            return value
        from torch import distributed as dist

        said = [value]
        dist.broadcast_object_list(said, src=0)
        return said[0]


# --- how a process was launched ---


def detect_world(
    num_processes: int,
    environment: Mapping[str, str] = os.environ,
    *,
    is_training_only: bool = True,
) -> World:
    """The world this process was started in, or World() where it is alone. Raises RecipeError, in one process, where a launch is half done.

    procs     what --procs says
    training  whether training is all that is asked for: no other stage is for several processes
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
    wrong = ""
    if any(
        name == "ACCELERATE_MIXED_PRECISION" or name.startswith("ACCELERATE_USE_")
        for name in environment
    ):
        wrong = "started by accelerate, whose settings persea does not read"
    elif ("WORLD_SIZE" in given or "RANK" in given) and (
        given != list(LAUNCH_VARIABLES)
        or not 0 <= world.rank < world.size
        or str(world.size) != size
    ):
        missing = ", ".join(n for n in LAUNCH_VARIABLES if n not in given)
        wrong = (
            f"{' and '.join(f'{n}={environment[n]}' for n in ('WORLD_SIZE', 'RANK') if n in given)} without {missing}"
            if missing
            else f"RANK={rank} of WORLD_SIZE={size} is no rank of a world"
        )
    elif foreign and "WORLD_SIZE" not in given:
        rank = environment.get(foreign[1], "0")
        wrong = f"{foreign[0]}={environment[foreign[0]]} without WORLD_SIZE and RANK: each of these processes would train a student of its own"
    elif num_processes > 1 and world.size > 1:
        wrong = f"--procs {num_processes} inside a launch of {world.size}: every process would start {num_processes} more"
    elif world.size > 1 and not is_training_only:
        wrong = f"a launch of {world.size} processes, and not for `persea train` alone: every stage would be done {world.size} times"
    if not wrong:
        return world
    if rank not in ("", "0") or environment.get("LOCAL_RANK", "0") not in ("", "-1", "0"):
        sys.exit(RecipeError.exit_code)  # the first process says why
    raise RecipeError(
        wrong,
        where="launch",
        remedy="persea train RECIPE --procs N, or torchrun --nproc-per-node N -m persea.cli train RECIPE",
    )


def refuse_too_many_processes(world_size: int, batch: int, accumulate: int) -> None:
    """Raises RecipeError where a batch has not one conversation for each process, each time it accumulates."""
    if world_size * accumulate > batch:
        raise RecipeError(
            f"a batch of {batch} conversations cannot be split over {world_size} processes"
            + (f" that accumulate {accumulate} times" if accumulate > 1 else ""),
            where="training.batch_size",
            remedy=f"at most {batch // accumulate or 1} processes, or a larger training.batch_size",
        )


def refuse_on_policy_processes(
    world_size: int, parallel: ParallelStrategy, budgeted_teachers: Sequence[str]
) -> None:
    """Raises RecipeError where a student's own answers cannot be heard in so many processes.

    budgets  who teaches from behind a server with a budget: each process would spend it anew
    """
    if world_size > 1 and parallel is ParallelStrategy.FSDP:
        raise RecipeError(
            "a student of which each process holds a part cannot answer for itself",
            where="training.on_policy",
            remedy="--shard ddp, or one process",
        )
    if world_size > 1 and budgeted_teachers:
        raise RecipeError(
            f"each of {world_size} processes would spend the budget of {', '.join(budgeted_teachers)}",
            where="training.on_policy",
            remedy="one process, or delete `max_total_tokens:` of the endpoint",
        )
