"""Which models lm-eval measures, and where a run's results are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from persea.errors import MissingRequirementError
from persea.pipeline.lm_eval_stage import (
    measured_models,
    refuse_impossible_lm_eval,
    results_files,
)
from tests.cli.test_cli import SAPLINGS
from tests.pipeline.test_preflight_data import SHORT, context_of


def test_teachers_behind_servers_are_not_measured(tmp_path: Path) -> None:
    far: dict[str, Any] = {"model": str(SAPLINGS / "gemma-sapling")}
    far |= {"endpoint": {"url": "http://127.0.0.1:9"}}
    near = {"model": str(SAPLINGS / "qwen-sapling")}
    context = context_of(
        tmp_path, SHORT, teachers=[near, far], audition={"pinned": {"languages": "qwen-sapling"}}
    )
    assert measured_models(context) == {
        "student": str(tmp_path / "run" / "train" / "student"),
        "base": str(SAPLINGS / "llama-sapling"),
        "qwen-sapling": near["model"],
    }


def test_results_are_found_by_model(tmp_path: Path) -> None:
    assert results_files(tmp_path) == {}
    folder = tmp_path / "evaluate" / "lm_eval"
    folder.mkdir(parents=True)
    (folder / "student.json").write_text("{}")
    assert results_files(tmp_path) == {"student": folder / "student.json"}


def test_lm_eval_is_needed_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_of(tmp_path, SHORT, evaluation={"lm_eval": ["gsm8k"]})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingRequirementError, match="needs lm_eval"):
        refuse_impossible_lm_eval(context)
