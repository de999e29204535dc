"""A bundled recipe runs from any folder once it is printed."""

from __future__ import annotations

from pathlib import Path

from persea.config.bundled import bundled_folder, bundled_path, portable_recipe


def test_bundled_paths_exist() -> None:
    assert Path(bundled_path("bundled:saplings/qwen-sapling")).is_dir()
    assert (bundled_folder("recipes") / "quickstart.yaml").is_file()


def test_a_portable_recipe_has_no_name_and_no_relative_model() -> None:
    text = portable_recipe("# one\nname: quick\nstudent:\n  model: ../saplings/llama-sapling\n")
    assert text == "# one\nstudent:\n  model: bundled:saplings/llama-sapling\n"
