"""A pilot ranks teachers by what the student learns from them, resumes, and trains on no text that
it measures on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persea.config.recipe import load_recipe
from persea.errors import RecipeError, RefusedError, RunInterrupted
from persea.pipeline import pilot as module
from persea.pipeline.pilot import (
    Candidate,
    gain_interval,
    held_out_conversations,
    is_held_out,
    pilot_recipe,
    run_pilot,
)
from persea.pipeline.run_context import RunContext
from tests.cli.test_cli import SAPLINGS, persea, recipe

# a strong teacher of languages, and one that never learned them
TEACHERS = [{"model": str(SAPLINGS / f"{name}-sapling")} for name in ("qwen", "gpt-oss")]
SECTIONS: dict[str, Any] = {
    "teachers": TEACHERS,
    "corpus": [{"skill": "languages", "generate": 400}],
    "audition": {"items": 8},
    "capture": {"max_new_tokens": 16, "answers": "given"},
    "training": {"steps": 400, "batch_size": 4, "warmup_steps": 20},
}


def context(folder: Path, *overrides: str) -> RunContext:
    recipe(folder, **SECTIONS)
    return RunContext(load_recipe(folder / "tiny.yaml", overrides), folder / "run")


@pytest.fixture(scope="module")
def piloted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any, list[Any]]]:
    folder, heard = tmp_path_factory.mktemp("pilot"), list[Any]()
    result = run_pilot(context(folder), lambda *told: heard.append(told), share=0.05)
    yield folder, result, heard


def test_candidates_are_ranked_by_the_held_out_gain(piloted: tuple[Path, Any, list[Any]]) -> None:
    folder, result, heard = piloted
    assert {c.name for c in result.candidates} == {"qwen-sapling", "gpt-oss-sapling"}
    first, second = result.candidates
    assert first.gain >= second.gain and first.behind_low is None
    assert second.behind_low < first.gain - second.gain < second.behind_high
    assert first.low < first.gain < first.high
    assert (result.steps, result.of_steps) == (20, 400)
    assert result.base_bits_per_byte - first.bits_per_byte == pytest.approx(first.gain)
    assert first.tokens == second.tokens > 0  # the same texts, so the same positions
    assert json.loads((folder / "run" / "pilot" / "pilot.json").read_text()) == json.loads(
        json.dumps(result.to_json())
    )
    assert len(result.table_rows()) == 2 and first.name in result.sentence
    fractions = [fraction for _, fraction, _ in heard]
    assert fractions == sorted(fractions) and fractions[-1] == 1
    assert {stage for stage, _, _ in heard} == {"pilot"}


def test_no_text_is_trained_on_and_measured(piloted: tuple[Path, Any, list[Any]]) -> None:
    folder, result, _ = piloted
    run = context(folder)
    held = {p.id for p in run.corpus.prompts if is_held_out(p)}
    trained = module.PilotContext(
        pilot_recipe(run.recipe, Candidate("qwen-sapling"), 0.05), folder / "x", num_prompts=80
    )
    ids = {p.id for p in trained.corpus.prompts}
    assert len(ids) == 80 and not ids & held
    assert 0.05 < len(held) / len(run.corpus.prompts) < 0.15
    assert result.num_held_out == len(held_out_conversations(run.corpus.prompts))


def test_a_second_pilot_does_nothing_again(piloted: tuple[Path, Any, list[Any]]) -> None:
    folder, result, _ = piloted
    students = sorted((folder / "run" / "pilot").rglob("model.safetensors"))
    times = [p.stat().st_mtime_ns for p in students]
    assert run_pilot(context(folder), lambda *told: None, share=0.05) == result
    assert len(students) == 2 and [p.stat().st_mtime_ns for p in students] == times


def test_an_interrupted_pilot_goes_on_and_methods_share_a_capture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = context(tmp_path, "teachers.1.reference=true")

    def stop(stage: str, fraction: float, message: str) -> None:
        if "sft: train" in message:
            raise RunInterrupted(15)

    with pytest.raises(RunInterrupted):
        run_pilot(run, stop, 0.03, ("events", "sft"))
    folder = tmp_path / "run" / "pilot"
    commits = [
        sorted(p.name for p in (folder / f"qwen-sapling-{m}" / "capture" / "commits").iterdir())
        for m in ("events", "sft")
    ]
    assert commits[0] == commits[1]
    units = (folder / "qwen-sapling-sft" / "capture" / "units").iterdir()
    assert all(p.stat().st_nlink == 3 for p in units)  # captured once: both runs and the store
    result = run_pilot(
        context(tmp_path, "teachers.1.reference=true"), lambda *t: None, 0.03, ("events", "sft")
    )
    assert {(c.teacher, c.method) for c in result.candidates} == {
        ("qwen-sapling", "events"),
        ("qwen-sapling", "sft"),
    }


def test_nothing_to_compare_or_to_measure_is_refused(tmp_path: Path) -> None:
    alone = context(tmp_path, "teachers.1.reference=true")
    with pytest.raises(RecipeError, match="one teacher and one method leave nothing to compare"):
        run_pilot(alone, lambda *told: None)
    with pytest.raises(RecipeError, match="no method 'dpo' -> one of events, sft"):
        run_pilot(alone, lambda *told: None, methods=("dpo", "sft"))
    with pytest.raises(RefusedError, match=r"only 0 prompts .* can be held out of 0"):
        held_out_conversations([])


def test_the_interval_is_that_of_a_ratio_of_sums() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(300):
        num_bytes = rng.integers(10, 200, 40).astype(float)
        gains = 0.1 * num_bytes + rng.normal(0, 1, 40) * np.sqrt(num_bytes)
        _, low, high = gain_interval(gains, num_bytes)
        inside += low <= 0.1 <= high
    assert 0.9 < inside / 300 < 0.99


def test_where_nothing_is_learned_the_exit_code_is_4(tmp_path: Path) -> None:
    recipe(tmp_path, **SECTIONS)
    ended = persea(
        "pilot",
        "tiny.yaml",
        "--out",
        "run",
        "--set",
        "training.learning_rate=1e-9",
        "--set",
        "training.steps=10",
        "--json",
        folder=tmp_path,
    )
    assert ended.code == 4
    assert "no candidate improved the student with confidence after 10 of 10 steps" in ended.err
    assert json.loads(ended.out)["steps"] == 10
