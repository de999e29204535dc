"""Measured speeds: from the recipe's own models, kept for later plans of the same models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from persea.config.recipe import load_recipe
from persea.pipeline import calibrate as module
from persea.pipeline.calibrate import calibrate
from persea.pipeline.calibration import (
    AskedSpeed,
    Calibration,
    Seconds,
    calibration_file,
    read_calibration,
    write_calibration,
)
from persea.pipeline.plan import plan_run
from persea.pipeline.run_context import RunContext
from persea.pipeline.workload import context_shares
from tests.cli.test_cli import recipe


def river(folder: Path, *overrides: str) -> RunContext:
    return RunContext(load_recipe(folder / "tiny.yaml", overrides), folder / "run")


def test_models_are_measured_and_a_plan_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BUDGET_S", 0.0)
    monkeypatch.setattr(module, "STEP_BUDGET_S", 0.0)
    monkeypatch.setenv("PERSEA_HOME", str(tmp_path / "home"))
    recipe(tmp_path)
    context = river(tmp_path)
    rough = plan_run(context)
    told: list[str] = []
    found = calibrate(context, context_shares(context), lambda *words: told.append(words[2]))
    assert not (tmp_path / "run").exists()
    pinned = context.recipe.audition.pinned
    assert {key for key in found.asked if not key.startswith("base/")} == {
        f"{teacher}/{skill}" for skill, teacher in pinned.items()
    }
    assert all(
        s.writing.cpu > 0 and s.storing.cpu > 0 for k, s in found.asked.items() if s.stored_bytes
    )
    assert found.trained is not None
    assert found.trained.steps >= module.MIN_STEPS
    assert found.trained.example_bytes > 100
    assert any("training steps" in words for words in told)
    path = write_calibration(context, found)
    assert path.parent == tmp_path / "home" / "calibration"
    assert read_calibration(context) == found
    plan = plan_run(river(tmp_path))  # takes what is kept
    assert {line.stage for line in plan.lines} == {"audition", "capture", "train", "evaluate"}
    assert all(line.cpu_seconds for line in plan.lines)
    written = sum(line.tokens_written for line in plan.lines if line.stage == "capture")
    most = sum(line.tokens_written for line in rough.lines if line.stage == "capture")
    assert 0 < written < most  # measured lengths, and no longer the most that is allowed
    assert plan.notes[0].startswith("seconds: measured with these models on this machine")
    assert read_calibration(river(tmp_path, "capture.batch_size=3")) is None
    path.write_text("{}")
    assert read_calibration(context) is None
    assert calibration_file(river(tmp_path, "training.steps=9")) == path


def test_a_skill_that_was_not_measured_has_the_mean_of_the_others() -> None:
    one = AskedSpeed(8, 10, 1.0, 100, Seconds(1, 2), Seconds(3, 4))
    two = AskedSpeed(8, 30, 0.5, 300, Seconds(3, 4), Seconds(5, 6))
    found = Calibration({"qwen/code": one, "qwen/tools": two})
    assert found.asked_speed("qwen", "code") == one
    mean = found.asked_speed("qwen", "safety")
    assert mean is not None
    assert (mean.answer_tokens, mean.writing, mean.storing) == (20, Seconds(2, 3), Seconds(4, 5))
    assert found.asked_speed("gemma", "code") is None
    assert found.answer_tokens("code", ("qwen", "gemma")) == 10
    assert Calibration.from_json(found.to_json()) == found


def test_a_batch_costs_something_beside_its_prompts() -> None:
    """4 s for 8 prompts and 10 s for 32: a quarter of a second a prompt, 2 s a batch."""
    speed = AskedSpeed(32, 10, 1.0, 100, Seconds(10 / 32, 10 / 32), Seconds(0, 0))
    small = replace(speed, prompts=8, writing=Seconds(0.5, 0.5))
    found = speed.with_opening(small)
    assert found.writing.cpu == pytest.approx(0.25)
    assert found.opening.wall == pytest.approx(2.0)
    assert found.asking(32, 32).cpu == pytest.approx(10.0)
    assert found.asking(256, 64).cpu == pytest.approx(64 + 8)
    assert found.asking(4, 64).cpu == pytest.approx(1 + 2)
    odd = speed.with_opening(replace(speed, prompts=8, writing=Seconds(2.0, 0.1)))  # noise
    assert (odd.writing.wall, odd.opening.wall) == (0.0, 10.0)
    assert (odd.writing.cpu, odd.opening.cpu) == (pytest.approx(10 / 32), pytest.approx(0.0))
