"""Tokens, bytes and units of a capture, and the table of costs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from persea.config.recipe import load_recipe
from persea.pipeline.cost_lines import (
    GIVEN_BYTES,
    WRITTEN_BYTES,
    CostLine,
    Rates,
    bytes_per_position,
    captured_bytes,
    compare_ways,
    count_units,
    teacher_tokens,
)
from persea.pipeline.plan_tables import cost_rows, cost_table, format_time, short_number
from persea.pipeline.progress import print_table
from persea.pipeline.workload import SkillWork

ROOT = Path(__file__).resolve().parents[2]
RECIPE = load_recipe(ROOT / "recipes" / "quickstart.yaml")
WORK = SkillWork("code", 1000, 0, 50, 100, 0, 0, False, {"a": 0.75, "b": 0.25})
TEXTS = SkillWork("news", 0, 10, 0, 64, 700, 2800, False, {"a": 1.0})


def test_a_teacher_reads_a_prompt_twice_and_its_own_answer_once() -> None:
    assert teacher_tokens([WORK], "a") == (75_000, 750 * (2 * 50 + 100))
    assert teacher_tokens([WORK, TEXTS], "a") == (75_000, 750 * 200 + 7000)
    assert teacher_tokens([WORK, TEXTS], "c") == (0, 0)


def test_bytes_are_those_of_the_measured_table() -> None:
    """bench/results/cache.json is what docs/cache.md shows."""
    measured = json.loads((ROOT / "bench" / "results" / "cache.json").read_text())["synthetic"]
    text = json.dumps(measured)
    for table in (WRITTEN_BYTES, GIVEN_BYTES):
        for value in table.values():
            assert f"{value}" in (ROOT / "docs" / "cache.md").read_text()
    assert "sampled 0.02" in text
    assert bytes_per_position(RECIPE, given=False) < bytes_per_position(RECIPE, given=True)
    assert captured_bytes(RECIPE, WORK) == pytest.approx(100_000 * (8.9 + 1.6))
    coarse = RECIPE.model_copy(
        update={"capture": RECIPE.capture.model_copy(update={"sampling_threshold": 0.1})}
    )
    assert captured_bytes(coarse, WORK) < captured_bytes(RECIPE, WORK)


def test_a_unit_ends_at_its_prompts_or_its_tokens() -> None:
    assert RECIPE.capture.prompts_per_unit == 256
    assert count_units(RECIPE, [replace(WORK, prompts=25_600)]) == 100
    long = replace(WORK, prompts=1 << 10, prompt_tokens=0, answer_tokens=1 << 14)
    assert count_units(RECIPE, [long]) == 16


def test_an_online_teacher_costs_its_reading_in_every_step() -> None:
    rates = Rates({"student": 100, "a": 10}, {"student": 1e9, "a": 1000}, 500)
    (way,) = compare_ways(RECIPE, [WORK], {"a": False}, rates)
    seen = RECIPE.training.steps * RECIPE.training.batch_size * 150
    assert way.kind == "dense"
    assert way.step_ratio == pytest.approx(1 + 500 / 1000)
    assert way.online * 3600 == pytest.approx(100_000 / 10 + seen / 1000 + seen / 500)
    assert way.cached * 3600 == pytest.approx(100_000 / 10 + 150_000 / 1000 + seen / 500)
    answers = RECIPE.training.steps * RECIPE.training.batch_size * 100
    assert way.on_policy * 3600 == pytest.approx(answers / 100 + seen / 1000 + seen / 500)


def test_a_sum_with_an_unknown_part_is_unknown() -> None:
    known = CostLine("capture", "a", 5, 7, 60.0, 1 / 60, 10**9, 10**6, 0, 0.5)
    far = replace(known, model="b", seconds=None, gpu_hours=None, money=None, is_upper_bound=True)
    *_, total = cost_rows([known, far])
    assert total[:5] == ("total", "", "≤10", "14", "-")
    assert (total[5], total[-1]) == ("-", "-")
    (single,) = cost_rows([known])
    assert single == ("capture", "a", "5", "7", "60 s", "0.017", "1 GB", "1 MB", "0 B", "0.50")


def test_no_cost_is_hidden_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    line = CostLine(
        "capture", "gpt-oss-sapling", 230_123, 328_456, 1920.0, 0.53, 10**9, 10**7, 0, 5
    )
    print_table(*cost_table([replace(line, is_upper_bound=True), replace(line, model="b")]))
    out = capsys.readouterr().out
    assert "money" in out
    assert "5.00" in out
    assert "≤230 k" in out
    assert "network" not in out  # nothing crosses it


def test_numbers_have_three_digits() -> None:
    assert [short_number(v) for v in (0, 12, 1234, 2.6e12)] == ["0 ", "12 ", "1.23 k", "2.6 T"]
    assert [format_time(s) for s in (None, 12, 7200, 864_000)] == ["-", "12 s", "2.0 h", "10.0 d"]
