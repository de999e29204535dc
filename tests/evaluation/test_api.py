"""check, audition and evaluate from Python: models by name, without a recipe."""

from __future__ import annotations

import doctest
from dataclasses import replace
from pathlib import Path

import pytest

from persea.errors import DataError
from persea.evaluation import api
from persea.tasks.generated import CODE_TASK, LANGUAGES_TASK
from tests.teachers.engines.test_transformers import SAPLINGS, opened
from tests.teachers.test_teacher import teacher

GEMMA, LLAMA, QWEN = (str(SAPLINGS / f"{name}-sapling") for name in ("gemma", "llama", "qwen"))


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PERSEA_HOME", str(tmp_path))
    monkeypatch.chdir(SAPLINGS.parent)


def test_the_examples_of_the_docstrings_run() -> None:
    assert doctest.testmod(api).attempted >= 9
    assert doctest.testmod(api).failed == 0


def test_renderers_and_folders_are_checked_alike(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Hello, world.\nTwo words\n")
    options = {"tasks": [CODE_TASK, "languages"], "texts": {"en": str(tmp_path / "text")}}
    by_folder = api.check(GEMMA, LLAMA, items=4, **options)  # type: ignore[arg-type]
    by_renderer = api.check(
        opened("gemma-sapling")[0],
        opened("llama-sapling")[0],
        items=4,
        **options,  # type: ignore[arg-type]
    )
    assert [replace(p, teacher="") for p in by_folder.pairs] == [
        replace(p, teacher="") for p in by_renderer.pairs
    ]
    assert {p.skill for p in by_folder.pairs} == {"code", "languages", "texts"}
    assert not by_folder.likelihoods and not by_folder.problem


def test_limits_are_reported_and_weights_loaded_on_request() -> None:
    found = api.check(
        QWEN, LLAMA, tasks=["code"], items=4, load_weights=True, min_common_share=1.01
    )
    assert "begin at a common boundary" in found.problem
    assert found.likelihoods[0].conversations == 4
    assert found.pairs[0].retained_mass_mean is not None
    with pytest.raises(DataError, match="no weights to load"):
        api.check(opened("qwen-sapling")[0], LLAMA, tasks=["code"], load_weights=True)


def test_a_teacher_of_ones_own_is_measured_and_answers_of_folders_are_kept() -> None:
    told: list[tuple[float, str]] = []
    mine = replace(teacher("qwen-sapling"), name="mine")
    for _ in range(2):
        found = api.evaluate(
            [mine, GEMMA], [LANGUAGES_TASK], items=4, progress=lambda *step: told.append(step)
        )
    assert [t for _, t in told if "mine" in t and "from disk" in t] == []
    assert "from disk" in told[-1][1] and told[-1][0] == 1
    assert {s.model_name for s in found.scores} == {"mine", "gemma-sapling"}
    assert set(found.bits_per_byte) == {"mine", "gemma-sapling"}


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(DataError, match="two models have the same name"):
        api.audition([QWEN, QWEN], ["code"])
