"""A bundled recipe runs from any folder once it is printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from persea.config.bundled import bundled_folder, bundled_path, portable_recipe
from persea.config.recipe import load_recipe
from persea.errors import RecipeError


def test_bundled_paths_exist() -> None:
    assert Path(bundled_path("bundled:saplings/qwen-sapling")).is_dir()
    assert (bundled_folder("recipes") / "quickstart.yaml").is_file()


def test_an_unknown_bundled_model_is_a_mistake_of_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("student: {model: bundled:llama-sapling}\n")
    with pytest.raises(RecipeError, match="names no bundled model") as no:
        load_recipe(recipe)
    assert "bundled:saplings/llama-sapling" in str(no.value)


def test_a_portable_recipe_has_no_name_and_no_relative_model() -> None:
    text = portable_recipe("# one\nname: quick\nstudent:\n  model: ../saplings/llama-sapling\n")
    assert text == "# one\nstudent:\n  model: bundled:saplings/llama-sapling\n"
