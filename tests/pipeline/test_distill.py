"""A run from Python is the run of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from persea.config.recipe import load_recipe
from persea.errors import RecipeError
from persea.pipeline.distill import distill
from tests.cli.test_cli import STAGES, flowed_copy, tree


def test_a_finished_run_is_up_to_date_and_its_results_are_read(tmp_path: Path) -> None:
    flowed_copy(tmp_path, *STAGES)
    before = {n: d for n, d in tree(tmp_path).items() if "status.json" not in n}
    messages: dict[str, str] = {}

    def progress(stage: str, fraction: float, message: str) -> None:
        messages[stage] = message

    run = distill(tmp_path / "tiny.yaml", tmp_path / "run", progress=progress)
    assert messages == dict.fromkeys(STAGES, "up to date")
    after = {n: d for n, d in tree(tmp_path).items() if "status.json" not in n}
    assert {n: d for n, d in after.items() if not n.endswith("lock")} == before
    assert run.folder == tmp_path / "run"
    assert (run.student / "model.safetensors").is_file()
    assert run.page.read_text().startswith("<!")
    assert set(run.report["skills"]) == {"languages", "code", "reasoning"}
    assert {s["model_name"] for s in run.evaluation["scores"]} >= {"student", "base"}


def test_a_recipe_object_takes_no_overrides(tmp_path: Path) -> None:
    recipe = load_recipe(flowed_copy(tmp_path) / "tiny.yaml")
    with pytest.raises(RecipeError, match="overrides need the path of a recipe"):
        distill(recipe, tmp_path / "run", overrides=["training.steps=1"])
    assert not (tmp_path / "run" / "recipe.yaml").exists()
