"""A recipe of 236 billion tokens is planned from the catalogue, without models, prompts or hub."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from persea.config.recipe import Recipe, load_recipe
from persea.errors import RecipeError, RefusedError
from persea.pipeline.catalogue_plan import is_planned_by_catalogue, plan_by_catalogue
from persea.pipeline.cost_lines import Way
from persea.pipeline.hardware import parse_fleet
from persea.pipeline.plan import RunPlan

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def recipe(*overrides: str) -> Recipe:
    return load_recipe(RECIPES / "avocado-236b.yaml", overrides)


def planned(hardware: str, *overrides: str, price: float | None = None) -> RunPlan:
    return plan_by_catalogue(recipe(*overrides), parse_fleet(hardware), price)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a plan by the catalogue asks nobody")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_units_terabytes_and_hours_on_8_64_and_512() -> None:
    small, middle, large = (planned(f"{n}xH200") for n in (8, 64, 512))
    tokens = sum(line.tokens_written for line in large.lines)
    assert tokens == 236_000_000_000
    stored = sum(line.disk_bytes for line in large.lines if line.stage == "capture")
    assert 2e12 < stored <= 3e12
    assert 225_000 < large.units < 300_000
    assert small.answers == large.answers == 185_000_000
    hours = [sum(line.gpu_hours or 0 for line in p.lines) for p in (small, middle, large)]
    assert hours[0] == pytest.approx(hours[1]) == pytest.approx(hours[2])
    days = [sum(line.seconds or 0 for line in p.lines) / 86_400 for p in (small, middle, large)]
    assert days[0] == pytest.approx(8 * days[1]) == pytest.approx(64 * days[2])
    assert 1 < days[2] < 10
    assert large.failures == pytest.approx(hours[2] / 8090)


def test_money_needs_a_price() -> None:
    assert all(line.money is None for line in planned("8xH200").lines)
    paid = planned("8xH200", price=2.5)
    for line in paid.lines:
        assert line.money == pytest.approx(2.5 * (line.gpu_hours or 0))
    columns, rows = paid.cost_table()
    assert (columns[-1], rows[-1][0]) == ("money", "total")
    assert rows[-1][-1] == f"{sum(line.money or 0 for line in paid.lines):,.2f}"
    assert "money" not in planned("8xH200").cost_table()[0]


def test_dense_and_moe_teachers_and_the_ways_to_use_them_are_compared() -> None:
    ways: dict[str, Way] = {w.teacher: w for w in planned("64xH200").ways}
    assert {n: w.kind for n, w in ways.items()} == {
        "qwen": "MoE",
        "gemma": "dense",
        "gpt-oss": "MoE",
    }
    # an online step of 5 billion active weights costs less than one of 27 billion
    assert 1 < ways["gpt-oss"].step_ratio < ways["gemma"].step_ratio
    for way in ways.values():
        assert way.cached > 0
        assert way.online >= way.cached * 0.9
    # with more passes the cache is read again, and an online teacher computes again
    more = {w.teacher: w for w in planned("64xH200", "training.num_train_epochs=3").ways}
    for name, way in ways.items():
        assert more[name].online - way.online > more[name].cached - way.cached


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"teachers\.qwen: .* --hardware 4xH100"):
        planned("1xH100")


def test_without_hardware_there_are_bytes_and_no_hours() -> None:
    found = plan_by_catalogue(recipe(), None, 2.0)
    assert all(line.seconds is line.money is None for line in found.lines)
    assert sum(line.disk_bytes for line in found.lines) > 2e12
    assert "no hours without accelerators" in found.notes[-1]
    assert found.to_json()["licences"]["outcome"] == "ok with duties"


def test_a_part_that_nobody_can_count_is_named() -> None:
    with pytest.raises(RecipeError, match=r"corpus\.1: its prompts are not on this machine"):
        planned("8xH200", "plan.expect.code={prompt_tokens: 3}")


def test_a_recipe_of_models_on_this_machine_is_not_planned_so() -> None:
    assert is_planned_by_catalogue(recipe())
    assert is_planned_by_catalogue(load_recipe(RECIPES / "avocado.yaml"))
    assert not is_planned_by_catalogue(load_recipe(RECIPES / "quickstart.yaml"))
    unknown = recipe("teachers.0.model=nobody/has-this")
    assert not is_planned_by_catalogue(unknown)  # the hub is asked, as a run does


def test_generated_prompts_are_counted_without_a_tokenizer() -> None:
    found = plan_by_catalogue(load_recipe(RECIPES / "avocado.yaml"), parse_fleet("8xH200"), None)
    assert found.answers == 26_000
    assert any(line.is_upper_bound for line in found.lines)
