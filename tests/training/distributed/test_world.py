"""A launch is a world or is refused, by one process in one line; what a world says to itself it
hears.
"""

from __future__ import annotations

import pytest

from persea.errors import RecipeError
from persea.training.distributed.world import (
    ParallelStrategy,
    World,
    detect_world,
    refuse_on_policy_processes,
    refuse_too_many_processes,
)

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
FIRST = TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}


def test_a_process_alone_is_a_world_of_one() -> None:
    assert (
        detect_world(1, {})
        == detect_world(4, {"PATH": "/bin", "SLURM_STEP_NUM_TASKS": "1"})
        == World(0, 1)
    )
    assert World().all_gather("x") == ["x"]
    assert World().broadcast("x") == "x"


def test_what_torchrun_sets_is_a_world() -> None:
    assert detect_world(1, TORCHRUN) == World(1, 2)
    assert detect_world(1, FIRST | {"WORLD_SIZE": "1"}) == World(0, 1)


def test_accelerate_launch_is_a_launcher_as_any() -> None:
    settings = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}
    assert detect_world(1, TORCHRUN | settings) == World(1, 2)


WRONG: dict[str, tuple[int, dict[str, str], bool, str]] = {
    "half of torchrun's": (
        1,
        {"WORLD_SIZE": "2"},
        True,
        r"WORLD_SIZE=2 without RANK, MASTER_ADDR, MASTER_PORT",
    ),
    "no address": (
        1,
        {"WORLD_SIZE": "2", "RANK": "0"},
        True,
        r"WORLD_SIZE=2 and RANK=0 without MASTER_ADDR, MASTER_PORT",
    ),
    "no number": (
        1,
        FIRST | {"WORLD_SIZE": "two"},
        True,
        "RANK=0 of WORLD_SIZE=two is not a valid rank",
    ),
    "accelerate": (
        1,
        FIRST | {"ACCELERATE_MIXED_PRECISION": "bf16"},
        True,
        "MIXED_PRECISION=bf16, which persea does not read: it reads `training.precision`",
    ),
    "accelerate's FSDP": (
        1,
        FIRST | {"ACCELERATE_USE_FSDP": "true"},
        True,
        "it reads `--shard fsdp`",
    ),
    "accelerate alone": (
        1,
        {"ACCELERATE_MIXED_PRECISION": "no"},
        True,
        "accelerate started a single process",
    ),
    "mpirun": (
        1,
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
        True,
        "OMPI_COMM_WORLD_SIZE=4 without WORLD_SIZE and RANK",
    ),
    "srun": (
        1,
        {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0"},
        True,
        "each of these processes would train a student of its own",
    ),
    "procs inside": (2, FIRST, True, "--procs 2 inside a launch of 2"),
    "every stage": (1, FIRST, False, "every stage would run 2 times"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_launch_that_is_half_done_is_refused_with_what_to_say_instead(what: str) -> None:
    procs, environment, training, words = WRONG[what]
    with pytest.raises(RecipeError) as caught:
        detect_world(procs, environment, is_training_only=training)
    assert words in str(caught.value)
    assert "persea train RECIPE --procs N, or torchrun" in caught.value.remedy
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "environment",
    [
        TORCHRUN | {"ACCELERATE_USE_DEEPSPEED": "true"},
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"},
        {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "7"},
        FIRST | {"RANK": "2"},
        {"WORLD_SIZE": "2", "LOCAL_RANK": "1"},
    ],
)
def test_one_process_says_it_and_the_others_end_alike(environment: dict[str, str]) -> None:
    with pytest.raises(SystemExit) as ended:
        detect_world(1, environment)
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("world", "batch", "accumulate", "fits"),
    [
        (2, 2, 1, True),
        (3, 2, 1, False),
        (1, 4, 4, True),
        (2, 7, 4, False),
        (2, 8, 4, True),
        (5, 4, 1, False),
    ],
)
def test_a_batch_has_a_conversation_for_each_process_each_time(
    world: int, batch: int, accumulate: int, fits: bool
) -> None:
    if fits:
        refuse_too_many_processes(world, batch, accumulate)
        return
    with pytest.raises(
        RecipeError,
        match=rf"training\.batch_size: a batch of {batch} conversations cannot be split over",
    ):
        refuse_too_many_processes(world, batch, accumulate)


@pytest.mark.parametrize(
    ("world", "shard", "budgets", "words"),
    [
        (1, ParallelStrategy.FSDP, ("far",), ""),
        (2, ParallelStrategy.DDP, (), ""),
        (2, ParallelStrategy.DDP, ("far",), "each of 2 processes would spend the budget of far"),
        (
            2,
            ParallelStrategy.FSDP,
            (),
            "a student that is sharded over processes cannot generate answers",
        ),
    ],
)
def test_own_answers_are_heard_where_each_process_holds_the_student_and_nothing_is_spent_twice(
    world: int, shard: ParallelStrategy, budgets: tuple[str, ...], words: str
) -> None:
    if not words:
        refuse_on_policy_processes(world, shard, budgets)
        return
    with pytest.raises(RecipeError, match=rf"training\.on_policy: {words} -> "):
        refuse_on_policy_processes(world, shard, budgets)
