"""Old names of recipe keys are read, reported once, and never win over the new name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from persea.config.foreign_keys import FOREIGN_KEYS, FOREIGN_REMEDIES
from persea.config.recipe import SECTION_CLASSES, Recipe, load_recipe
from persea.config.renamed_keys import (
    RENAMED_KEYS,
    RENAMED_VALUES,
    rename_in_plain_data,
)
from persea.errors import RecipeError

OLD = """\
student: {model: a/b}
teachers:
  - model: words
    name: w
    endpoint: {url: "http://x", protocol: chat, dial: true, stall: 5}
  - {model: a/c, yardstick: true, endpoint: {url: "http://y", top: 7, served: m}}
corpus:
  - {skill: code, generate: 10, modes: {none: 1}}
  - {skill: code, file: p.jsonl, near: 0.5, broken: quarantine}
today: 2025-02-03
capture: {rows: topk, kl: 0.02, unit: 8, batch: 3, tokens: 9, hours: 2}
training:
  batch: 4
  warmup: 1
  clip: 2
  on_policy: {after: 2, rollouts: 8, refresh: 9, objective: chunk}
evaluation: {batch: 2, sets: [{set: gsm8k, file: g.jsonl}], allow_regression: true}
check: {floor: 0.1, disagreement: 0.2, lines: 3, likelihood: false}
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def to(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return to


def test_names_of_other_trainers_are_read(write: Any) -> None:
    text = """\
student: {model: a/b, adapt: lora, license: MIT, lora: {r: 4, lora_alpha: 8, target_modules: [x]}}
teachers: [{model: a/c}]
corpus: [{skill: code, generate: 10}]
training:
  max_steps: 7
  lr: 1.0e-4
  bf16: true
  lr_scheduler_type: warmup_stable_decay
  logging_steps: 2
  save_steps: 3
  max_seq_length: 64
  warmup_ratio: 0.1
  gradient_accumulation_steps: 2
"""
    recipe = load_recipe(write(text))
    training, student = recipe.training, recipe.student
    assert (training.steps, training.learning_rate, training.precision) == (7, 1e-4, "bfloat16")
    assert (training.lr_scheduler_type, training.log_every) == ("wsd", 2)
    assert (training.checkpoint_every, training.max_length) == (3, 64)
    assert student.licence == "MIT"
    assert student.lora is not None
    assert (student.lora.rank, student.lora.alpha, student.lora.targets) == (4, 8, ("x",))
    assert len(recipe.notices) == 10
    assert all(notice.endswith(", its name here") for notice in recipe.notices)
    changed = load_recipe(write(text), ["training.max_steps=8"])
    assert changed.training.steps == 8


def test_every_foreign_name_is_of_a_key_that_exists() -> None:
    for path, names in FOREIGN_KEYS.items():
        section = next((SECTION_CLASSES[k] for k in reversed(path) if k != "*"), Recipe)
        assert set(names.values()) <= set(section.model_fields)
        assert not set(names) & set(section.model_fields)
    for name, remedies in FOREIGN_REMEDIES.items():
        assert not set(remedies) & set(SECTION_CLASSES[name].model_fields)


def test_an_old_recipe_is_the_new_one(write: Any) -> None:
    old = load_recipe(write(OLD))
    written = old.to_yaml()
    new = load_recipe(write(written))
    assert (new.hash, new.notices) == (old.hash, ())
    assert old.teachers[0].model == "text_only"
    assert old.training.on_policy is not None
    assert old.training.on_policy.objective == "span_likelihood"
    assert (old.training.max_grad_norm, old.check.min_common_share) == (2, 0.1)
    assert old.evaluation.benchmarks[0].benchmark == "gsm8k"
    assert str(old.template_date) == "2025-02-03"


def test_each_use_is_reported_once_with_its_place(write: Any) -> None:
    path = write(OLD)
    notices = [n.removeprefix(f"{path.parent}/") for n in load_recipe(path).notices]
    assert len(notices) == len(set(notices)) == 30
    assert (
        "mine.yaml:15:3: training.clip is now training.max_grad_norm; the old name still works"
        in notices
    )
    assert (
        "mine.yaml:3:5: teachers.0.model: words is now teachers.0.model: text_only; "
        "the old name still works" in notices
    )
    assert (
        "mine.yaml:17:32: evaluation.benchmarks.0.set is now evaluation.benchmarks.0.benchmark; "
        "the old name still works" in notices
    )


def test_an_override_may_use_the_old_name_and_wins_over_the_file(write: Any) -> None:
    path = write(OLD)
    for override in ("training.clip=3", "training.max_grad_norm=3"):
        assert load_recipe(path, [override]).training.max_grad_norm == 3
    recipe = load_recipe(
        path, ["training.clip=3", "evaluation.sets.0.set=mgsm", "check={floor: 0}"]
    )
    assert recipe.evaluation.benchmarks[0].benchmark == "mgsm"
    assert recipe.check.min_common_share == 0
    assert [n for n in recipe.notices if n.startswith("--set ")] == [
        "--set training.clip=3: training.clip is now training.max_grad_norm; "
        "the old name still works",
        "--set evaluation.sets.0.set=mgsm: evaluation.sets is now evaluation.benchmarks; "
        "the old name still works",
        "--set evaluation.sets.0.set=mgsm: evaluation.benchmarks.0.set is now "
        "evaluation.benchmarks.0.benchmark; the old name still works",
        "--set check={floor: 0}: check.floor is now check.min_common_share; "
        "the old name still works",
    ]


def test_both_names_at_once_are_refused_at_the_old_one(write: Any) -> None:
    text = OLD.replace("  clip: 2\n", "  max_grad_norm: 1\n  clip: 2\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text))
    assert caught.value.where.endswith("mine.yaml:16:3")
    assert caught.value.message == (
        "training.clip: is the old name of `max_grad_norm`, which is given too"
    )


def test_a_wrong_value_under_an_old_name_keeps_its_place(write: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(OLD.replace("clip: 2", "clip: -2")))
    assert caught.value.where.endswith("mine.yaml:15:3")
    assert caught.value.message == "training.max_grad_norm: should be more than 0 (got -2)"


def test_every_new_name_is_a_field_and_no_old_one_is() -> None:
    for path, keys in RENAMED_KEYS.items():
        names = [str(k) for k in path if k != "*"]
        fields = (SECTION_CLASSES[names[-1]] if names else Recipe).model_fields
        assert set(keys.values()) <= fields.keys() and keys.keys() & fields.keys() <= {"lm_eval"}
    assert all(len(path) > 1 for path in RENAMED_VALUES)


def test_data_of_a_run_folder_gets_new_names() -> None:
    data = yaml.safe_load(OLD)
    renamed = rename_in_plain_data(copy.deepcopy(data))
    assert renamed["capture"]["max_kl"] == 0.02 and "kl" not in renamed["capture"]
    assert rename_in_plain_data(copy.deepcopy(renamed)) == renamed
    assert rename_in_plain_data(None) is None
    assert rename_in_plain_data({"teachers": 3, "training": [1]}) == {
        "teachers": 3,
        "training": [1],
    }


def test_from_yaml_warns_of_old_names(write: Any) -> None:
    with pytest.warns(FutureWarning, match=r"training\.clip is now training\.max_grad_norm"):
        Recipe.from_yaml(write(OLD))
