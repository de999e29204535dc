"""Stopped, killed or left alone, a training ends with the same bits; nothing broken is resumed from
and nothing infinite applied.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from persea import storage as store
from persea.config.schema import LossBalancing, TrainingSection
from persea.errors import DataError, RefusedError, RunInterrupted
from persea.training.loop import run_training_loop
from persea.training.loss_balancing import Group, GroupStats
from persea.training.settings import TrainingSettings
from tests.cli.test_cli import flowed, flowed_copy, persea, start, warm

SETTINGS = TrainingSettings(
    steps=12,
    learning_rate=0.05,
    warmup_steps=3,
    weight_decay=0.01,
    max_grad_norm=1.0,
    checkpoint_every=3,
    log_every=2,
    seed=5,
    max_skipped_steps=0,
)
QWEN, GEMMA = Group("qwen", "languages"), Group("gemma", "code")
INPUTS = {"training": {"steps": 12}, "capture": "a" * 64}


@dataclass(frozen=True)
class Out:
    loss: torch.Tensor
    num_tokens: int = 7
    metrics: Mapping[str, torch.Tensor] = field(
        default_factory=lambda: {"event_kl": torch.tensor(1.0)}
    )


class Toy:
    """A quadratic valley, another one each step, seen through dropout."""

    def __init__(self) -> None:
        self.parameters = [
            torch.nn.Parameter(torch.linspace(-1, 1, 24).reshape(4, 6)),
            torch.nn.Parameter(torch.ones(5)),
        ]
        self.steps: list[int] = []

    def loss_of(self, step: int) -> tuple[Out, Mapping[Group, GroupStats]]:
        self.steps.append(step)
        target = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        seen = torch.nn.functional.dropout(self.parameters[0], 0.3)
        return Out(((seen - target) ** 2).mean() + (self.parameters[1] ** 2).sum()), {
            QWEN: GroupStats(3, 6.0),
            GEMMA: GroupStats(1 + step),
        }


Change = Callable[[int, Out], Out | None]


def run(
    folder: Path,
    settings: TrainingSettings = SETTINGS,
    inputs: Mapping[str, Any] = INPUTS,
    change: Change = lambda step, out: None,
    toy: Toy | None = None,
    **more: Any,
) -> Toy:
    """Train a toy; `change` may do something at a step, or put another loss in the place of its
    loss.
    """
    toy = toy or Toy()

    def loss_of(
        step: int, part: int, parts: int, weights: Mapping[Group, float]
    ) -> tuple[Out, Mapping[Group, GroupStats]]:
        out, taught = toy.loss_of(step)
        return change(step, out) or out, taught

    run_training_loop(toy.parameters, loss_of, settings, folder, inputs, **more)
    return toy


def ended(folder: Path) -> dict[str, Any]:
    """Everything a training left, without its clock: weights, optimiser, metrics, names of
    checkpoints.
    """
    last = sorted((folder / "checkpoints").glob("*.pt"))[-1]
    state = torch.load(last, weights_only=True)
    state.pop("seconds")
    assert state["skipped"] == []
    flat = {
        f"optimizer {k} {name}": v
        for k, moments in state["optimizer"]["state"].items()
        for name, v in moments.items()
    }
    flat |= {f"parameter {k}": p for k, p in enumerate(state["parameters"])}
    return {
        "step": state["step"],
        "positions": state["positions"],
        "metrics": metrics(folder),
        "files": sorted(p.name for p in (folder / "checkpoints").iterdir()),
    } | {k: v.numpy().tobytes() for k, v in flat.items()}


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "left")} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(folder)
    return ended(folder)


# --- what one training leaves ---


def test_it_learns_and_writes_its_metrics(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    toy = run(tmp_path)
    assert toy.steps == list(range(12))
    assert ended(tmp_path) == uninterrupted
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert [line["positions"] for line in lines] == [14, 28, 42, 56, 70, 84]
    assert [line["learning_rate"] for line in lines] == [
        SETTINGS.learning_rate_at_step(k - 1) for k in (2, 4, 6, 8, 10, 12)
    ]
    assert all(line["terms"] == {"event_kl": 1.0} for line in lines)
    assert lines[1]["share"] == {"qwen": 3 / 7, "gemma": 4 / 7}
    assert all(line["teachers"] == {"qwen": 2.0} for line in lines)  # gemma's loss nobody told
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert toy.parameters[1].detach().square().sum() < 5


def test_it_is_adam_with_the_clipped_gradient_and_the_rate_of_the_step(tmp_path: Path) -> None:
    plain = replace(SETTINGS, max_grad_norm=0.5)
    one, other = run(tmp_path, plain), Toy()
    matrices = [p for p in other.parameters if p.ndim > 1]
    others = [p for p in other.parameters if p.ndim < 2]
    assert matrices
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, *([{"params": others, "weight_decay": 0.0}] if others else [])],
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )
    torch.manual_seed(5 << 31)
    for step in range(12):
        for group in optimizer.param_groups:
            group["lr"] = plain.learning_rate_at_step(step)
        optimizer.zero_grad()
        other.loss_of(step)[0].loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in other.parameters))
        assert norm > 0.5 or step > 0  # it is clipped at all
        for p in other.parameters:
            p.grad *= min(1.0, 0.5 / (float(norm) + 1e-6))
        optimizer.step()
    for a, b in zip(one.parameters, other.parameters, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_what_a_source_carries_from_step_to_step_is_in_the_checkpoint(tmp_path: Path) -> None:
    class Carrying(Toy):
        """Each step depends on what the one before left."""

        told: tuple[bytes, ...] = ()

        def __init__(self) -> None:
            super().__init__()
            self.left = b""

        def loss_of(self, step: int) -> tuple[Out, Mapping[Group, GroupStats]]:
            out, share = super().loss_of(step)
            self.left = bytes([*self.left, step])
            return replace(out, loss=out.loss * len(self.left)), share

        def state(self) -> bytes:
            return self.left

        def restore(self, states: tuple[bytes, ...]) -> None:
            self.told, self.left = states, states[0]

    def go(folder: Path, settings: TrainingSettings) -> Carrying:
        toy = Carrying()
        run(folder, settings, toy=toy, batch_source=toy)
        return toy

    whole = go(tmp_path / "whole", SETTINGS)
    assert (whole.told, whole.left) == ((), bytes(range(12)))
    go(tmp_path / "cut", replace(SETTINGS, steps=5))
    toy = go(tmp_path / "cut", SETTINGS)
    assert toy.told == (bytes(range(5)),)
    assert toy.left == bytes(range(12))


class Weighed(Toy):
    """Two groups' losses of very different size, each times its weight; both shrink as the toy
    learns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Mapping[Group, float]] = []

    def weighed(
        self, step: int, part: int, parts: int, weights: Mapping[Group, float]
    ) -> tuple[Out, Mapping[Group, GroupStats]]:
        self.given.append(dict(weights))
        out, _ = self.loss_of(step)
        sides = {QWEN: out.loss, GEMMA: (self.parameters[1] ** 2).mean() / 10}
        total = (
            torch.stack(
                [weights.get(group, 1.0) * 300 * loss for group, loss in sides.items()]
            ).sum()
            / 600
        )
        told = {
            group: GroupStats(300, 300 * float(loss.detach()), 300 * float(loss.detach()) ** 2, 1.0)
            for group, loss in sides.items()
        }
        return Out(total, 600), told


def go(folder: Path, settings: TrainingSettings, **more: Any) -> Weighed:
    toy = Weighed()
    run_training_loop(toy.parameters, toy.weighed, settings, folder, INPUTS, **more)
    return toy


def test_weights_come_from_the_steps_before_and_go_on_after_a_resume(tmp_path: Path) -> None:
    settings = replace(SETTINGS, loss_balancing=LossBalancing.DEVIATION, log_every=1)
    whole = go(tmp_path / "whole", settings)
    assert whole.given[0] == {}  # nothing was heard yet
    assert all(given[QWEN] < 0.9 and given[GEMMA] > 1.1 for given in whole.given[1:])
    assert all((given[QWEN] + given[GEMMA]) / 2 == pytest.approx(1) for given in whole.given[1:])
    lines = metrics(tmp_path / "whole")
    for given, line in zip(whole.given, lines, strict=True):
        told = {name: skills for name, parts in line["groups"].items() for skills in parts.values()}
        assert {name: part["weight"] for name, part in told.items()} == {
            g.teacher: given.get(g, 1.0) for g in (QWEN, GEMMA)
        }
        assert sum(line["teachers"][t] * line["share"][t] for t in line["share"]) == pytest.approx(
            line["loss"]
        )  # without weights
        assert sum(part["loss"] for part in told.values()) == pytest.approx(1)
    again = go(
        tmp_path / "whole",
        settings,
        resume=str(tmp_path / "whole" / "checkpoints" / "step-00000009.json"),
    )
    assert again.given == whole.given[9:] and len(again.given) == 3
    assert metrics(tmp_path / "whole") == lines
    off = go(tmp_path / "off", replace(settings, loss_balancing=LossBalancing.NONE))
    assert off.given == [{}] * 12
    assert metrics(tmp_path / "off")[-1]["loss"] != lines[-1]["loss"]


def test_a_step_that_is_not_applied_leaves_the_scales_as_they_were(tmp_path: Path) -> None:
    toy = Weighed()

    def loss_of(
        step: int, part: int, parts: int, weights: Mapping[Group, float]
    ) -> tuple[Out, Mapping[Group, GroupStats]]:
        out, told = toy.weighed(step, part, parts, weights)
        return (
            (
                replace(out, loss=out.loss * math.nan),
                dict.fromkeys(told, GroupStats(300, 1e9, 1e9, 1.0)),
            )
            if step == 4
            else (out, told)
        )

    run_training_loop(
        toy.parameters,
        loss_of,
        replace(SETTINGS, loss_balancing=LossBalancing.DEVIATION, max_skipped_steps=1),
        tmp_path,
        INPUTS,
    )
    assert toy.given[4] == toy.given[5] != toy.given[6]


def test_only_the_newest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000001.pt").write_bytes(
        b"of a killed run: its record was never written"
    )
    run(tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        f"step-{step:08d}.{kind}" for step in (9, 12) for kind in ("json", "jsonl", "pt")
    ]


def test_a_training_that_is_done_does_nothing(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    first = run(tmp_path)
    again = run(tmp_path)
    assert again.steps == []
    assert ended(tmp_path) == uninterrupted
    assert all(torch.equal(a, b) for a, b in zip(first.parameters, again.parameters, strict=True))


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [0, 4, 5, 10])
def test_a_signal_saves_the_step_and_the_rest_goes_on_from_it(
    tmp_path: Path, uninterrupted: dict[str, Any], number: signal.Signals, at: int
) -> None:
    before = signal.getsignal(number)
    first = Toy()
    with pytest.raises(
        RunInterrupted,
        match=rf"stopped by {number.name}; step {at + 1} is saved -> run the same command",
    ) as caught:
        run(
            tmp_path,
            change=lambda step, out: os.kill(os.getpid(), number) if step == at else None,
            toy=first,
        )
    assert caught.value.exit_code == 128 + number
    assert first.steps == list(range(at + 1))
    assert signal.getsignal(number) is before
    assert run(tmp_path).steps == list(range(at + 1, 12))
    out = ended(tmp_path)
    assert {k: v for k, v in out.items() if k != "files"} == {
        k: v for k, v in uninterrupted.items() if k != "files"
    }
    assert [line["step"] for line in out["metrics"]] == [
        2,
        4,
        6,
        8,
        10,
        12,
    ]  # none twice, none missing


def test_stopped_after_every_step_it_ends_the_same(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    stops = 0
    for _ in range(12):
        with pytest.raises(RunInterrupted):
            run(tmp_path, change=lambda step, out: os.kill(os.getpid(), signal.SIGTERM))
        stops += 1
    run(tmp_path)
    assert stops == 12
    assert {k: v for k, v in ended(tmp_path).items() if k != "files"} == {
        k: v for k, v in uninterrupted.items() if k != "files"
    }


def test_in_a_thread_signals_stay_their_owners(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    thread = threading.Thread(target=run, args=(tmp_path,))
    thread.start()
    thread.join()
    assert ended(tmp_path) == uninterrupted


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_line_ends_with_the_code_of_its_signal_and_goes_on_to_the_same_student(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    flowed_copy(tmp_path, "check", "audition", "capture")
    running = start("train", "tiny.yaml", "--out", "run", folder=tmp_path)
    running.signal_when("train  12%", number)
    stopped = running.wait()
    assert stopped.code == code
    last = stopped.err.splitlines()[-1]
    step = int(
        last.removeprefix(f"persea: stopped by {number.name}; step ").removesuffix(
            " is saved -> run the same command to continue"
        )
    )
    assert 1 <= step < 8
    assert "Traceback" not in stopped.err
    assert (tmp_path / "run" / "train" / "checkpoints" / f"step-{step:08d}.json").is_file()
    assert not (tmp_path / "run" / "train" / "done.json").exists()
    assert persea("train", "tiny.yaml", "--out", "run", folder=tmp_path).code == 0
    name = "run/train/student/model.safetensors"
    assert store.digest_file(tmp_path / name) == store.digest_file(flowed()[0] / name)
    assert metrics(tmp_path / "run" / "train") == metrics(flowed()[0] / "run" / "train")


# --- SIGKILL ---


def dies(folder: Path, call: int, before: bool) -> None:
    """In a child: a training that kills itself right before or after its call-th write."""
    torch.set_num_threads(1)
    write, calls = store.open_atomic, itertools.count()

    @contextmanager
    def publishing(path: Path) -> Iterator[BinaryIO]:
        mine = next(calls)
        if before and mine == call:
            os.kill(os.getpid(), signal.SIGKILL)
        with write(path) as file:
            yield file
        if mine == call:
            os.kill(os.getpid(), signal.SIGKILL)

    store.open_atomic = publishing
    run(folder)


def crawls(folder: Path) -> None:
    """In a child: a training that takes its time."""
    torch.set_num_threads(1)
    run(folder, change=lambda step, out: time.sleep(0.01))


def test_killed_around_every_write_it_ends_the_same(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    """Four checkpoints of three files each: right after each file, and right before the first file
    of each checkpoint.
    """
    points = [
        (call, before)
        for call in range(12)
        for before in (True, False)
        if not before or call % 3 == 0
    ]
    children = [
        (
            tmp_path / f"{call} {before}",
            warm().Process(target=dies, args=(tmp_path / f"{call} {before}", call, before)),
        )
        for call, before in points
    ]
    for _, child in children:
        child.start()
    for folder, child in children:
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        run(folder)
        assert ended(folder) == uninterrupted, folder.name
    assert len(children) == 16


def dies_writing(folder: Path, call: int) -> None:
    """In a child: a training that kills itself in the middle of its call-th write."""
    torch.set_num_threads(1)
    write, calls = store.open_atomic, itertools.count()

    @contextmanager
    def publishing(path: Path) -> Iterator[BinaryIO]:
        with write(path) as file:
            if next(calls) == call:
                file.write(b"half")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            yield file

    store.open_atomic = publishing
    run(folder)


@pytest.mark.parametrize("call", [0, 1, 3, 9])  # a state, its metrics, a later state, the last
def test_killed_inside_a_write_no_partial_file_stays(
    tmp_path: Path, uninterrupted: dict[str, Any], call: int
) -> None:
    child = warm().Process(target=dies_writing, args=(tmp_path, call))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert list(tmp_path.rglob(".step-*.tmp"))
    run(tmp_path)
    assert ended(tmp_path) == uninterrupted
    assert not list(tmp_path.rglob("*.tmp"))


def test_killed_at_any_time_it_ends_the_same(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    rng, kills = random.Random(2), 0
    for _ in range(6):
        child = warm().Process(target=crawls, args=(tmp_path,))
        child.start()
        time.sleep(rng.uniform(0.02, 0.12))
        child.kill()
        child.join(60)
        kills += child.exitcode == -signal.SIGKILL
    assert kills >= 3
    run(tmp_path)
    assert ended(tmp_path) == uninterrupted


# --- what is refused ---


def infinite_loss(out: Out) -> Out:
    """Its gradient is as finite as ever."""
    return Out(out.loss + float("inf"))


def nan_loss(out: Out) -> Out:
    return Out(out.loss * float("nan"))


def infinite_gradient(out: Out) -> Out:
    """The loss is finite; the slope of a square root at zero is not."""
    return Out(out.loss + torch.sqrt(out.loss - out.loss))


@pytest.mark.parametrize("broken", [nan_loss, infinite_loss, infinite_gradient])
def test_a_step_that_is_not_finite_is_refused_before_it_is_applied(
    tmp_path: Path, broken: Callable[[Out], Out]
) -> None:
    toy, held = Toy(), []

    def change(step: int, out: Out) -> Out | None:
        held.append([p.detach().clone() for p in toy.parameters])
        return broken(out) if step == 4 else None

    words = (
        r"train: loss .*, gradient norm \S+ at step 5 \(teachers: gemma, qwen\): not applied "
        r"-> lower training\.learning_rate"
    )
    with pytest.raises(RefusedError, match=words) as caught:
        run(tmp_path, change=change, toy=toy)
    assert caught.value.exit_code == 4
    assert len(held) == 5
    assert all(
        torch.equal(a, b) and torch.isfinite(a).all()
        for a, b in zip(toy.parameters, held[4], strict=True)
    )
    assert [p.name for p in (tmp_path / "checkpoints").glob("*.pt")] == ["step-00000003.pt"]
    assert all(
        torch.isfinite(p).all()
        for p in torch.load(tmp_path / "checkpoints" / "step-00000003.pt", weights_only=True)[
            "parameters"
        ]
    )


def test_a_step_of_no_positions_is_refused_and_not_taken_for_a_loss_of_nothing(
    tmp_path: Path,
) -> None:
    toy, before = Toy(), [p.detach().clone() for p in Toy().parameters]
    with pytest.raises(RefusedError, match=r"train, step 0: no supervised position in this step"):
        run(tmp_path, change=lambda step, out: replace(out, num_tokens=0), toy=toy)
    assert all(torch.equal(a, b) for a, b in zip(toy.parameters, before, strict=True))


def test_a_held_out_loss_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        RefusedError,
        match=r"train: held-out loss is not finite after step 4: qwen nan "
        r"-> lower training\.learning_rate",
    ):
        run(
            tmp_path,
            replace(SETTINGS, evaluate_every=4),
            evaluate=lambda: {"all": 1.0, "qwen": float("nan")},
        )
    assert [p.name for p in (tmp_path / "checkpoints").glob("*.pt")] == ["step-00000003.pt"]


def test_a_batch_that_was_mended_goes_on_from_the_last_finite_checkpoint(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    with pytest.raises(RefusedError):
        run(tmp_path, change=lambda step, out: nan_loss(out) if step == 10 else None)
    assert run(tmp_path).steps == [9, 10, 11]
    assert ended(tmp_path) == uninterrupted


def stopped_at_nine(folder: Path) -> Path:
    """A training with checkpoints of steps 6 and 9, and no more."""
    with pytest.raises(ZeroDivisionError):
        run(folder, change=lambda step, out: out if step < 9 else 1 // 0)
    return folder / "checkpoints"


def test_a_checkpoint_of_another_key_is_refused(tmp_path: Path) -> None:
    stopped_at_nine(tmp_path)
    toy, before = Toy(), [p.detach().clone() for p in Toy().parameters]
    words = (
        r"step-00000009\.json: the checkpoint belongs to another recipe, model or capture "
        r"\(training\.steps: 12 -> 13; capture: a{12} -> b{12}\) -> .*--out"
    )
    with pytest.raises(RefusedError, match=words) as caught:
        run(tmp_path, inputs={"training": {"steps": 13}, "capture": "b" * 64}, toy=toy)
    assert caught.value.exit_code == 4
    assert toy.steps == []
    assert all(torch.equal(a, b) for a, b in zip(toy.parameters, before, strict=True))


def test_no_flipped_bit_is_resumed_from(tmp_path: Path) -> None:
    files, rng, refused = (
        sorted(stopped_at_nine(tmp_path).glob("step-00000009.*")),
        random.Random(0),
        0,
    )
    assert len(files) == 3
    for k in range(150):
        data = files[k % 3].read_bytes()
        bit = rng.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        files[k % 3].write_bytes(flipped)
        toy = Toy()
        try:
            run(tmp_path, toy=toy, change=lambda step, out: 1 // 0)  # it would resume
        except (DataError, RefusedError) as error:
            assert "step-00000009" in str(error)
            assert toy.steps == []
            refused += 1
        files[k % 3].write_bytes(data)
    assert refused == 150


@pytest.mark.parametrize("kind", ["json", "jsonl", "pt"])
def test_no_cut_checkpoint_is_resumed_from(tmp_path: Path, kind: str) -> None:
    path = stopped_at_nine(tmp_path) / f"step-00000009.{kind}"
    data = path.read_bytes()
    for size in (0, 1, len(data) // 2, len(data) - 2):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match="step-00000009"):
            run(tmp_path)


@pytest.mark.parametrize("lost", ["pt", "jsonl"])
def test_what_the_refusal_says_works_the_checkpoint_before_goes_on(
    tmp_path: Path, uninterrupted: dict[str, Any], lost: str
) -> None:
    folder = stopped_at_nine(tmp_path)
    (folder / f"step-00000009.{lost}").unlink()
    with pytest.raises(
        DataError,
        match=r"the checkpoint is damaged: .* -> delete .*step-00000009\.\*; "
        r"the training resumes from the checkpoint before it",
    ):
        run(tmp_path)
    for path in folder.glob("step-00000009.*"):
        path.unlink()
    assert run(tmp_path).steps == list(range(6, 12))
    assert ended(tmp_path) == uninterrupted


def test_a_record_of_another_step_is_refused(tmp_path: Path) -> None:
    """The state under another step's name would train some steps twice."""
    folder = stopped_at_nine(tmp_path)
    for kind in ("json", "jsonl", "pt"):
        (folder / f"step-00000009.{kind}").rename(folder / f"step-00000011.{kind}")
    with pytest.raises(DataError, match="step-00000011"):
        run(tmp_path)
    record = store.read_json_with_checksum(folder / "step-00000011.json", "")
    store.write_json_with_checksum(folder / "step-00000011.json", record | {"step": 11})
    with pytest.raises(DataError, match="step-00000011"):
        run(tmp_path)


# --- the recipe's numbers ---


def test_a_recipes_defaults_are_those_of_the_functions() -> None:
    """Each default is written once in the recipe's schema and once where a caller without recipe
    needs it.
    """
    section = TrainingSection()
    settings = TrainingSettings.from_section(section, 7, 3e-3)
    bare = TrainingSettings(
        steps=section.steps,
        learning_rate=3e-3,
        warmup_steps=settings.warmup_steps,
        weight_decay=section.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        checkpoint_every=section.checkpoint_every,
        log_every=section.log_every,
        seed=7,
        max_skipped_steps=3,
    )
    assert settings == bare
    assert (settings.adam_betas, settings.adam_epsilon) == ((0.9, 0.98), 1e-8)


@pytest.mark.parametrize(
    "change",
    [{"adam_betas": (0.5, 0.98)}, {"adam_epsilon": 0.1}, {"min_learning_rate_ratio": 0.9}],
    ids=str,
)
def test_each_of_the_optimisers_numbers_arrives(tmp_path: Path, change: dict[str, Any]) -> None:
    one, other = run(tmp_path / "a"), run(tmp_path / "b", replace(SETTINGS, **change))
    assert not torch.equal(one.parameters[0], other.parameters[0])
