"""Defaults by the student's size: a table, applied once, never to a key that the recipe sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from persea.chat.messages import ThinkingEffort
from persea.config.recipe import Recipe, load_recipe
from persea.config.schema import TrainingSection
from persea.config.size_defaults import (
    apply_size_defaults,
    default_answer_tokens,
    describe_size_defaults,
    has_size_defaults,
    resolve_steps,
    unusual_settings,
)

CORPUS = [{"skill": "code", "generate": 10}]


def recipe(folder: Path, **sections: Any) -> Recipe:
    data = {
        "student": {"model": "a/b"},
        "teachers": [{"model": "a/c"}],
        "corpus": CORPUS,
        **sections,
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(data))
    return load_recipe(folder / "mine.yaml")


def test_a_tiny_student_keeps_the_static_defaults(tmp_path: Path) -> None:
    one = recipe(tmp_path)
    assert apply_size_defaults(one, 424_000) == (one, {})


def test_three_billion_weights_make_a_sensible_run(tmp_path: Path) -> None:
    found, set_here = apply_size_defaults(recipe(tmp_path), 3_200_000_000, 131_072)
    assert found.student.adapt == "lora"
    assert found.student.lora is not None
    training = found.training
    assert (training.batch_size, training.gradient_accumulation_steps) == (64, 16)
    assert (training.precision, training.gradient_checkpointing) == ("bfloat16", True)
    assert training.optim == "adamw_torch_fused"
    assert (training.num_train_epochs, training.warmup_ratio) == (3, 0.05)
    assert found.capture.max_new_tokens == found.evaluation.max_new_tokens == 1024
    assert training.max_length == 2048
    assert unusual_settings(found, 3_200_000_000) == []
    line = describe_size_defaults(set_here, 3_200_000_000)
    assert line.startswith("defaults for a student of 3.2 B weights: capture.max_new_tokens 1024")


@pytest.mark.parametrize("size", [134_000_000, 1_500_000_000, 8_000_000_000, 0])
def test_given_keys_always_win(tmp_path: Path, size: int) -> None:
    given = recipe(
        tmp_path,
        student={"model": "a/b", "adapt": "full"},
        capture={"max_new_tokens": 64},
        evaluation={"max_new_tokens": 32},
        training={
            "steps": 1500,
            "warmup_steps": 50,
            "batch_size": 16,
            "gradient_accumulation_steps": 1,
            "precision": "float32",
            "optim": "adamw_torch",
            "gradient_checkpointing": False,
            "max_length": 512,
        },
    )
    assert not has_size_defaults(given)
    assert apply_size_defaults(given, size)[1] == {}


def test_defaults_are_applied_once(tmp_path: Path) -> None:
    once, _ = apply_size_defaults(recipe(tmp_path), 134_000_000)
    assert apply_size_defaults(once, 8_000_000_000) == (once, {})


def test_the_written_recipe_leaves_the_size_open(tmp_path: Path) -> None:
    one = recipe(tmp_path, training={"batch_size": 8})
    (tmp_path / "again.yaml").write_text(one.to_yaml())
    again = load_recipe(tmp_path / "again.yaml")
    assert again.hash == one.hash
    assert "steps" not in again.as_written["training"]
    assert apply_size_defaults(again, 134_000_000)[1] == apply_size_defaults(one, 134_000_000)[1]


def test_thoughts_need_room() -> None:
    assert default_answer_tokens(["languages"], [ThinkingEffort.NONE]) == 256
    assert default_answer_tokens(["mine", "languages"], [ThinkingEffort.LOW]) == 512 + 1024


def test_the_students_positions_bound_its_length(tmp_path: Path) -> None:
    found, _ = apply_size_defaults(recipe(tmp_path), 134_000_000, 1024)
    assert found.training.max_length == 1024


@pytest.mark.parametrize(
    ("epochs", "batch", "examples", "steps"), [(3, 32, 100, 10), (1, 64, 10, 1), (0.5, 4, 16, 2)]
)
def test_epochs_become_steps(epochs: float, batch: int, examples: int, steps: int) -> None:
    section = TrainingSection(num_train_epochs=epochs, batch_size=batch, warmup_ratio=0.1)
    found = resolve_steps(section, examples)
    assert found.steps == steps
    assert found.num_train_epochs is found.warmup_ratio is None
    assert 0 <= found.warmup_steps <= steps
    assert resolve_steps(found, 0) is found


def test_absurd_values_are_named(tmp_path: Path) -> None:
    odd = recipe(
        tmp_path,
        student={"model": "a/b", "adapt": "full"},
        capture={"max_new_tokens": 64},
        training={"precision": "float32", "max_length": 32},
    )
    found, _ = apply_size_defaults(odd, 3_000_000_000)
    words = " ".join(unusual_settings(found, 3_000_000_000))
    for key in ("capture.max_new_tokens 64", "max_length 32", "adapt full", "precision float32"):
        assert key in words
    assert unusual_settings(odd, 400_000) == []
