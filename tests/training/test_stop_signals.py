"""A signal ends a training in seconds, also inside a step of minutes, and the end is the same."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from persea.errors import RunInterrupted
from persea.training import stop_signals
from persea.training.loop import run_training_loop
from persea.training.loss_balancing import Group, GroupStats
from persea.training.stop_signals import StepAbandoned, collect_stop_signals
from tests.training.test_loop import INPUTS, SETTINGS, Out, Toy, ended, metrics, run


@pytest.fixture(autouse=True)
def grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_signals, "GRACE_S", 0.05)


class SlowBackward(torch.autograd.Function):
    """A backward pass that takes minutes: many gradients, one after another."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        torch.ones(400, 400) @ torch.ones(400, 400)
        time.sleep(0.01)
        return gradient


def slow_in(phase: str, step: int, out: Out) -> Out:
    """The same loss after a long forward or backward pass, a signal at its begin."""
    os.kill(os.getpid(), signal.SIGTERM)
    if phase == "forward":
        for _ in range(1000):
            time.sleep(0.01)
        return out
    loss = out.loss
    for _ in range(1000):
        loss = SlowBackward.apply(loss)
    return Out(loss, out.num_tokens, out.metrics)


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_slow_step_is_abandoned_and_repeated_from_the_step_before(
    tmp_path: Path, phase: str
) -> None:
    run(tmp_path / "whole")
    first, begin = Toy(), time.monotonic()
    with pytest.raises(RunInterrupted, match=r"stopped by SIGTERM; step 4 is saved -> run"):
        run(
            tmp_path / "cut",
            change=lambda step, out: slow_in(phase, step, out) if step == 4 else None,
            toy=first,
        )
    assert time.monotonic() - begin < 5  # ten seconds of a step are not waited for
    assert first.steps == [0, 1, 2, 3, 4]
    assert [line["step"] for line in metrics(tmp_path / "cut")] == [2, 4]
    assert run(tmp_path / "cut").steps == list(range(4, 12))
    one, other = ended(tmp_path / "cut"), ended(tmp_path / "whole")
    assert {k: v for k, v in one.items() if k != "files"} == {
        k: v for k, v in other.items() if k != "files"
    }


def test_before_the_first_step_is_done_nothing_is_saved(tmp_path: Path) -> None:
    with pytest.raises(RunInterrupted, match="no step was finished"):
        run(tmp_path, change=lambda step, out: slow_in("forward", step, out))
    assert not list(tmp_path.rglob("step-*"))


def test_a_step_that_is_saved_already_is_not_saved_again(tmp_path: Path) -> None:
    """Step 3 has a checkpoint; step 4 is abandoned."""
    with pytest.raises(RunInterrupted, match="step 3 is saved"):
        run(
            tmp_path,
            change=lambda step, out: slow_in("forward", step, out) if step == 3 else None,
        )
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-00000003.{kind}" for kind in ("json", "jsonl", "pt")]


def test_a_held_out_loss_is_measured_after_the_resume(tmp_path: Path) -> None:
    """The step is done, its held-out loss is not: the line is written after the resume, once."""
    settings = replace(SETTINGS, evaluate_every=4)
    held_out = iter([1.0, 2.0, 3.0])
    run(tmp_path / "whole", settings, evaluate=lambda: {"all": next(held_out)})
    calls: list[int] = []

    def slow() -> Mapping[str, float]:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        return {"all": float(len(calls))}

    with pytest.raises(RunInterrupted, match="step 8 is saved"):
        run(tmp_path / "cut", settings, evaluate=slow)
    assert [line["step"] for line in metrics(tmp_path / "cut")] == [2, 4, 6]
    assert run(tmp_path / "cut", settings, evaluate=slow).steps == [8, 9, 10, 11]
    lines = metrics(tmp_path / "cut")
    assert [line.get("held_out") for line in lines] == [
        None,
        {"all": 1.0},
        None,
        {"all": 3.0},
        None,
        {"all": 4.0},
    ]
    clean = [{k: v for k, v in line.items() if k != "held_out"} for line in lines]
    whole = [
        {k: v for k, v in line.items() if k != "held_out"} for line in metrics(tmp_path / "whole")
    ]
    assert clean == whole


def test_what_is_not_marked_is_never_abandoned() -> None:
    with collect_stop_signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.15)
        assert signals.first == signal.SIGINT
        with signals.may_abandon(enabled=False):
            time.sleep(0.15)
        with pytest.raises(StepAbandoned) as caught, signals.may_abandon():
            time.sleep(5)
        assert caught.value.signal_number == signal.SIGINT
        time.sleep(0.1)  # the timer is off


def test_a_line_is_there_at_every_logged_step(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    def loss_of(
        step: int, part: int, parts: int, weights: Mapping[Group, float]
    ) -> tuple[Out, Mapping[Group, GroupStats]]:
        lines = metrics(tmp_path) if (tmp_path / "metrics.jsonl").exists() else []
        seen.append([line["step"] for line in lines])
        return toy.loss_of(step)

    toy = Toy()
    settings = replace(SETTINGS, checkpoint_every=100)
    run_training_loop(toy.parameters, loss_of, settings, tmp_path, INPUTS)
    assert seen[:7] == [[], [], [2], [2], [2, 4], [2, 4], [2, 4, 6]]


def test_progress_is_told_inside_a_slow_step(tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    run(
        tmp_path,
        replace(SETTINGS, steps=2, micro_batches=2),
        change=lambda step, out: time.sleep(1.1) if step == 1 else None,
        on_part=lambda done, words: told.append((done, words)),
    )
    assert told and all(1 < done <= 2 for done, _ in told)
    assert [words for _, words in told] == [
        f"step 2, part {part} of 2: backward pass" for part in (1, 2)
    ]
