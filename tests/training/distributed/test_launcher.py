"""Real processes, DDP and FSDP, learn what one process learns from the same batches; signals,
failures and resumes are everybody's.
"""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from persea.errors import DataError, RunInterrupted
from persea.training.distributed.launcher import launch_processes
from persea.training.distributed.world import ParallelStrategy, World
from tests.cli.test_cli import warm
from tests.worlds_of_two import SETTINGS, Trouble, final, last_weights, student_run

# of a loss near 10: what sums of 32-bit floats in another order may differ by; measured 5e-6 over
# six steps
CLOSE = 2e-5


@pytest.fixture(autouse=True, scope="module")
def server() -> None:
    """Children come from the server that the other tests use, where torch is imported already."""
    warm().Process(target=print).start()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder)]


NO_TROUBLE = Trouble()


def two(
    folder: Path,
    shard: ParallelStrategy = ParallelStrategy.DDP,
    trouble: Trouble = NO_TROUBLE,
    **changes: Any,
) -> None:
    launch_processes(
        student_run, (folder, shard, replace(SETTINGS, **changes), trouble), 2, lambda told: None
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training in one process."""
    folder = tmp_path_factory.mktemp("one")
    student_run(World(), None, folder, ParallelStrategy.DDP, SETTINGS, Trouble())
    return folder


@pytest.mark.parametrize("shard", list(ParallelStrategy))
def test_two_processes_learn_what_one_learns_from_the_same_batches(
    tmp_path: Path, one: Path, shard: ParallelStrategy
) -> None:
    heard: list[Any] = []
    launch_processes(student_run, (tmp_path, shard, SETTINGS, Trouble()), 2, heard.append)
    assert heard[-1] == SETTINGS.steps
    assert losses(tmp_path) == pytest.approx(losses(one), rel=CLOSE)
    assert losses(one)[0] - losses(one)[-1] > 1  # it learns at all
    for mine, theirs in zip(lines(tmp_path), lines(one), strict=True):
        assert mine["positions"] == theirs["positions"]
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)
    for a, b in zip(last_weights(tmp_path), last_weights(one), strict=True):
        assert torch.allclose(
            a, b, atol=3e-3
        )  # one step of Adam: where a gradient is almost nothing, its sign is rounding's
        assert (a - b).abs().mean() < 3e-5


def test_from_two_to_one_to_two_processes_and_a_signal_stops_both_with_the_same_bytes(
    tmp_path: Path, one: Path
) -> None:
    with pytest.raises(RunInterrupted, match=r"stopped by SIGTERM; step 2 is saved") as caught:
        two(tmp_path / "mixed", trouble=Trouble(1, 1, signal.SIGTERM))
    assert caught.value.exit_code == 143
    short = Trouble(0, 3, signal.SIGINT)
    with pytest.raises(RunInterrupted, match=r"stopped by SIGINT; step 4 is saved") as caught:
        student_run(World(), None, tmp_path / "mixed", ParallelStrategy.DDP, SETTINGS, short)
    assert caught.value.exit_code == 130
    two(tmp_path / "mixed")
    assert [line["step"] for line in lines(tmp_path / "mixed")] == [1, 2, 3, 4, 5, 6]
    assert [line["positions"] for line in lines(tmp_path / "mixed")] == [
        line["positions"] for line in lines(one)
    ]
    assert losses(tmp_path / "mixed") == pytest.approx(losses(one), rel=CLOSE)


def test_interrupted_or_not_two_processes_end_with_the_same_bytes(tmp_path: Path) -> None:
    """Three steps, then three more: as six at once. In the middle a loss is not a number on one
    rank, and both leave that step out.
    """
    two(tmp_path / "whole", trouble=Trouble(1, 4, nan=True))
    with pytest.raises(RunInterrupted):
        two(tmp_path / "parts", trouble=Trouble(0, 2, signal.SIGTERM))
    two(tmp_path / "parts", trouble=Trouble(1, 4, nan=True))
    assert final(tmp_path / "whole") == final(tmp_path / "parts")
    (told,) = [line["skipped"] for line in lines(tmp_path / "whole") if "skipped" in line]
    assert told == [{"step": 5, "loss": "nan", "gradient_norm": "nan", "teachers": ["t0"]}]
    assert [line["step"] for line in lines(tmp_path / "whole")] == [1, 2, 3, 4, 6]


def test_a_sharded_checkpoint_resumes_to_the_same_bytes_and_in_one_process(
    tmp_path: Path, one: Path
) -> None:
    """FSDP: each process writes its own shards; a damaged shard is no checkpoint."""
    fsdp = ParallelStrategy.FSDP
    with pytest.raises(RunInterrupted, match="step 3 is saved"):
        two(tmp_path / "parts", fsdp, Trouble(0, 2, signal.SIGTERM))
    shutil.copytree(tmp_path / "parts", tmp_path / "damaged")
    shutil.copytree(tmp_path / "parts", tmp_path / "single")
    shards = tmp_path / "parts" / "checkpoints" / "step-00000003.shards"
    names = {p.name for p in shards.iterdir()}
    assert names == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    two(tmp_path / "whole", fsdp)
    two(tmp_path / "parts", fsdp)
    assert final(tmp_path / "whole") == final(tmp_path / "parts")
    student_run(World(), None, tmp_path / "single", ParallelStrategy.DDP, SETTINGS, Trouble())
    assert losses(tmp_path / "single") == pytest.approx(losses(one), rel=CLOSE)
    path = tmp_path / "damaged" / "checkpoints" / "step-00000003.shards" / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="the checkpoint is damaged"):
        student_run(World(), None, tmp_path / "damaged", ParallelStrategy.DDP, SETTINGS, Trouble())
