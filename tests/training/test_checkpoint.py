"""A checkpoint holds all of a training, survives disk faults, and is refused for other inputs.

The last tests take away an fsync, a digest, a saved source of chance, and see the others fail.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from persea import storage as store
from persea.errors import DataError, PerseaError, RefusedError, RunInterrupted, StorageError
from persea.training import checkpoint as checkpoints
from persea.training.distributed.world import World
from persea.training.loop import run_training_loop
from persea.training.loss_balancing import Group, GroupStats
from persea.training.settings import TrainingSettings
from tests.cache.test_faults import lay
from tests.disks import Dying, Failing, Recording, Step, after_power_loss
from tests.worlds_of_two import Dice, Out, final

SETTINGS = TrainingSettings(
    steps=6,
    learning_rate=0.05,
    warmup_steps=1,
    weight_decay=0.01,
    max_grad_norm=1.0,
    checkpoint_every=2,
    log_every=1,
    seed=3,
    max_skipped_steps=3,
)
INPUTS: dict[str, Any] = {
    "training": {"steps": 6, "targets": ("q_proj",)},
    "seed": 3,
    "capture": "c" * 64,
}


class Carries:
    """A source that carries a count from step to step, as rollouts in flight are carried."""

    def __init__(self) -> None:
        self.count, self.told = 0, [b""]

    def state(self) -> bytes:
        return str(self.count).encode()

    def restore(self, states: tuple[bytes, ...]) -> None:
        self.told = list(states)
        self.count = int(states[0])


def run(folder: Path, inputs: Mapping[str, Any] = INPUTS, stop: int = -1, **more: Any) -> Dice:
    """Train with dice; a signal comes in step `stop`."""
    dice, source = Dice(), more.get("batch_source")

    def loss_of(
        step: int, part: int, parts: int, weights: Mapping[Group, float]
    ) -> tuple[Out, Mapping[Group, GroupStats]]:
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        if source:
            source.count += 1
        out, taught = dice.loss_of(step, part, parts)
        return (
            (Out(out.loss * (1 + source.count % 3), out.num_tokens), taught)
            if source
            else (out, taught)
        )

    run_training_loop(dice.parameters, loss_of, SETTINGS, folder, inputs, **more)
    return dice


def stopped(folder: Path, at: int, **more: Any) -> None:
    with pytest.raises(RunInterrupted):
        run(folder, stop=at, **more)


def differs_after_a_resume(folder: Path) -> bool:
    """Whether a training that is stopped after its third step ends differently."""
    run(folder / "whole")
    stopped(folder / "parts", 2)
    run(folder / "parts")
    return final(folder / "whole") != final(folder / "parts")


def test_every_source_of_chance_goes_on_where_it_was(tmp_path: Path) -> None:
    assert not differs_after_a_resume(tmp_path)


@pytest.mark.parametrize("lost", ["torch", "numpy", "python"])
def test_without_one_of_them_saved_a_resumed_training_ends_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    real, fired = checkpoints.restore_rng_state, []

    def without(state: Mapping[str, Any]) -> None:
        fired.append(lost)
        real({**checkpoints.rng_state(), **{k: v for k, v in state.items() if k != lost}})

    monkeypatch.setattr(checkpoints, "restore_rng_state", without)
    assert differs_after_a_resume(tmp_path)
    assert fired == [lost]


def test_what_a_source_carries_is_part_of_the_state(tmp_path: Path) -> None:
    whole, first, second = Carries(), Carries(), Carries()
    run(tmp_path / "whole", batch_source=whole)
    stopped(tmp_path / "parts", 2, batch_source=first)
    run(tmp_path / "parts", batch_source=second)
    assert (first.count, second.told, second.count, whole.count) == (3, [b"3"], 6, 6)
    assert final(tmp_path / "whole") == final(tmp_path / "parts")


def test_a_weight_that_is_not_finite_is_never_written_and_never_pushes_out_one_that_is(
    tmp_path: Path,
) -> None:
    run(tmp_path)
    before = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    broken = [torch.nn.Parameter(torch.tensor([1.0, float("inf")]))]
    with pytest.raises(RefusedError, match="weights are not finite after step 9: not saved"):
        checkpoints.save_checkpoint(
            tmp_path,
            INPUTS,
            checkpoints.TrainerState(9),
            broken,
            torch.optim.AdamW(broken),
            World(),
        )
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == before
    assert len(before) == 3 * checkpoints.MAX_CHECKPOINTS


# --- which one goes on ---


def steps(folder: Path) -> list[int]:
    return sorted(int(p.stem[5:]) for p in (folder / "checkpoints").glob("*.json"))


def test_never_begins_anew_and_a_path_goes_on_from_there(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    assert steps(tmp_path / "again") == [4, 6]
    stopped(tmp_path / "again", 0, resume="never")
    assert steps(tmp_path / "again") == [1]
    run(tmp_path / "again")
    assert final(tmp_path / "again") == final(tmp_path / "whole")
    for name in (
        "checkpoints/step-00000004.json",
        "checkpoints/step-00000004",
        "checkpoints/step-00000004.pt",
    ):
        shutil.copytree(tmp_path / "whole", tmp_path / "back", dirs_exist_ok=True)
        stopped(tmp_path / "back", 4, resume=str(tmp_path / "back" / name))
        assert steps(tmp_path / "back") == [4, 5]  # step 6 was taken back
    shutil.rmtree(tmp_path / "back")
    run(tmp_path / "back", resume=str(tmp_path / "whole"))  # another run's: its newest
    assert steps(tmp_path / "back") == []
    with pytest.raises(
        DataError, match=r"nowhere: no checkpoint found -> name a checkpoints/step-N\.json"
    ):
        run(tmp_path / "back", resume="nowhere")


def test_what_came_later_goes_once_the_step_gone_back_to_is_read_and_not_before(
    tmp_path: Path,
) -> None:
    run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    (tmp_path / "broken" / "checkpoints" / "step-00000004.pt").write_bytes(b"broken")
    with pytest.raises(DataError, match="the checkpoint is damaged"):
        run(tmp_path / "broken", resume=str(tmp_path / "broken" / "checkpoints" / "step-00000004"))
    assert steps(tmp_path / "broken") == [4, 6]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    stopped(
        tmp_path / "again", 4, resume=str(tmp_path / "whole" / "checkpoints" / "step-00000004")
    )  # of another folder
    assert steps(tmp_path / "again") == [4, 5]  # and not 6, which is of the training before


def test_what_differs_is_told_key_by_key(tmp_path: Path) -> None:
    run(tmp_path)
    other = {
        "training": {"steps": 7, "targets": ("k_proj",), "max_grad_norm": 1.0},
        "seed": 3,
        "capture": "d" * 64,
    }
    words = (
        'training.steps: 6 -> 7; training.targets: ["q_proj"] -> ["k_proj"]; '
        "training.max_grad_norm: null -> 1.0; "
        "capture: cccccccccccc -> dddddddddddd"
    )
    assert checkpoints.describe_input_changes(tmp_path, other) == words
    with pytest.raises(RefusedError) as caught:
        run(tmp_path, inputs=other)
    assert f"({words})" in str(caught.value)
    assert caught.value.exit_code == 4
    assert (
        checkpoints.describe_input_changes(tmp_path, INPUTS)
        == checkpoints.describe_input_changes(tmp_path / "new", INPUTS)
        == ""
    )


# --- what befalls a disk ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return final(folder)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[store.Disk], None]:
    return lambda disk: monkeypatch.setattr(store, "DISK", disk)


def test_killed_at_every_change_of_the_disk_it_ends_the_same(tmp_path: Path, whole: str) -> None:
    """Every fifth change here, before and after it; all of them in bench/chaos_train.py."""
    fired = 0
    for at in range(1, 1000, 5):
        folder = tmp_path / f"{at}"
        child = os.fork()
        if not child:
            store.DISK = Dying(at, after=bool(at % 2))
            try:
                run(folder)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL)
        if status == 0:
            break
        fired += 1
        run(folder)
        assert final(folder) == whole
    assert fired > 12


def test_a_disk_that_fails_is_told_and_the_checkpoint_before_goes_on(
    tmp_path: Path, whole: str, on: Callable[[store.Disk], None]
) -> None:
    fired = 0
    for at in range(3, 1000, 7):
        folder, disk = tmp_path / f"{at}", Failing(at, errno.ENOSPC)
        on(disk)
        try:
            run(folder)
        except StorageError as told:
            assert told.exit_code == 6
        fired += disk.fired
        on(store.Disk())
        run(folder)
        assert final(folder) == whole
        if not disk.fired:
            break
    assert fired > 8


def recorded(folder: Path, forget: tuple[str, ...] = ()) -> list[Step]:
    """The changes of a training, made in a folder of its own and told as if in this one."""
    disk = Recording(forget)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as real:
        patch.setattr(store, "DISK", disk)
        run(Path(real) / "run")
        return [
            tuple(folder / p.relative_to(real) if isinstance(p, Path) else p for p in step)
            for step in disk.steps
        ]


def sound_after_power_loss(folder: Path, changes: list[Step], every: int) -> Counter[str]:
    """Lay down what may be left after prefixes of the changes. A checkpoint that was promised must
    be there, and load.
    """
    told: Counter[str] = Counter()
    promised = 0
    for length in range(len(changes) + 1):
        if (
            length
            and changes[length - 1][0] == "sync_folder"
            and changes[length - 1][1].name == "checkpoints"
        ):
            published = [s[1].name for s in changes[:length] if s[0] == "replace"]
            promised = max([int(n[5:13]) for n in published if n.endswith(".json")], default=0)
        if length % every:
            continue
        for found in after_power_loss(changes[:length]):
            shutil.rmtree(folder, ignore_errors=True)
            lay(folder, found)
            told["disks"] += 1
            dice = Dice()
            try:
                newest = checkpoints.find_checkpoint(folder / "run", checkpoints.RESUME_AUTO)
                step = (
                    checkpoints.load_checkpoint(newest, INPUTS, dice.parameters, None, World())[
                        0
                    ].step
                    if newest
                    else 0
                )
                told["sound"] += step >= promised
            except PerseaError:
                told["broken"] += 1
    return told


def test_after_a_power_loss_the_last_promised_checkpoint_is_there_and_whole(tmp_path: Path) -> None:
    told = sound_after_power_loss(tmp_path / "disk", recorded(tmp_path / "disk"), every=4)
    assert told["disks"] > 100
    assert told["sound"] == told["disks"]


# --- without what protects it, the tests above fail ---


@pytest.mark.parametrize("forget", ["sync", "sync_folder"])
def test_without_fsync_a_power_loss_takes_a_checkpoint(tmp_path: Path, forget: str) -> None:
    told = sound_after_power_loss(
        tmp_path / "disk", recorded(tmp_path / "disk", (forget,)), every=6
    )
    assert told["sound"] < told["disks"]


def test_without_digests_a_flipped_weight_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tmp_path, 2)
    path = tmp_path / "checkpoints" / "step-00000003.pt"
    data = bytearray(path.read_bytes())
    at = data.find(torch.load(path, weights_only=True)["parameters"][0].numpy().tobytes())
    assert at > 0
    data[at + 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="the checkpoint is damaged"):
        run(tmp_path)
    record = store.read_json_with_checksum(path.with_suffix(".json"), "")
    monkeypatch.setattr(store, "digest_file", lambda path: record["state"])
    run(tmp_path)


@pytest.fixture(autouse=True)
def real_disk() -> Iterator[None]:
    """No test leaves its disk to the next."""
    yield
    assert type(store.DISK) is store.Disk


def test_how_often_a_training_is_logged_and_saved_may_change(tmp_path: Path) -> None:
    """They change no result; a checkpoint was refused as another recipe's, in both directions."""

    def inputs(**observed: Any) -> dict[str, Any]:
        return {**INPUTS, "training": {**INPUTS["training"], **observed}}

    stopped(tmp_path, 2, inputs=inputs(log_every=1, checkpoint_every=2, report_to="wandb"))
    for other in (inputs(log_every=5, checkpoint_every=1), inputs()):
        assert checkpoints.describe_input_changes(tmp_path, other) == ""
    changed = {**inputs(log_every=5), "seed": 4}
    assert checkpoints.describe_input_changes(tmp_path, changed) == "seed: 3 -> 4"
    run(tmp_path, inputs=inputs(log_every=5, checkpoint_every=1))
    run(tmp_path / "whole")
    assert final(tmp_path) == final(tmp_path / "whole")
