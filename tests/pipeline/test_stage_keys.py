"""What a stage's output depends on: what is named there makes it anew, what is only looked at does
not.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from persea.config.optimization import OptimizerName
from persea.config.schema import (
    CaptureSection,
    CheckSection,
    EvaluationSection,
    TrainingSection,
)
from persea.pipeline import stage_keys as inputs
from persea.pipeline.stages import STAGES
from persea.pipeline.status import STAGE_NAMES
from persea.storage import digest_json


def river(
    training: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    verify: bool = False,
    wrong: str = "w",
    trained: dict[str, str] | None = None,
    check: dict[str, Any] | None = None,
    size_defaults: tuple[str, ...] = (),
) -> Any:
    recipe = SimpleNamespace(
        training=TrainingSection(**(training or {})),
        evaluation=EvaluationSection(**(evaluation or {})),
        capture=CaptureSection(drop_wrong_answers=verify),
        check=CheckSection(**(check or {})),
        tasks=(),
        seed=1,
        threads=1,
    )
    done = {
        "train": {"outputs": {"student/model.safetensors": "s"} | (trained or {})},
        "capture": {"outputs": {"rejected.json": wrong}},
    }
    return SimpleNamespace(
        recipe=recipe,
        training=recipe.training,
        models=SimpleNamespace(
            student_identity="me", teacher_identities={"a": "b"}, learning_rate=1e-3
        ),
        stages=SimpleNamespace(read_record=done.get),
        capture_units=[SimpleNamespace(name="u")],
        corpus=SimpleNamespace(malformed=()),
        items_digest=lambda split: f"digest of {split}",
        size_defaults=dict.fromkeys(size_defaults),
    )


def test_every_stage_has_inputs_of_its_own_name() -> None:
    assert tuple(s.name for s in STAGES) == STAGE_NAMES
    assert [s.inputs for s in STAGES] == [getattr(inputs, f"{name}_inputs") for name in STAGE_NAMES]


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        (river({"report_to": "wandb", "log_every": 7, "checkpoint_every": 9}), True),
        (river({"store_examples": False}), True),
        (river({"precision": "auto"}), True),  # as another processor rounds otherwise
        (river({"precision": "bfloat16"}), False),
        (river({"optim": OptimizerName.ADAMW_FUSED}, size_defaults=("training.optim",)), True),
        (river({"optim": OptimizerName.ADAMW_FUSED}), False),
        (river({"steps": 7}), False),
        (river({"eval_steps": 5}), False),
        (river(verify=True), False),
        (river(check={"max_lines_per_text": 3}), True),
        (river(check={"max_mask_search_tokens": 10}), False),
    ],
)
def test_a_student_is_trained_anew_where_what_it_learned_changes(changed: Any, same: bool) -> None:
    assert (
        digest_json(inputs.train_inputs(changed)) == digest_json(inputs.train_inputs(river()))
    ) is same


def test_how_often_a_student_is_evaluated_is_no_part_of_what_it_learned() -> None:
    """Only whether answers are held out is: with eval_steps = 0 none are."""
    some, other = (inputs.train_inputs(river({"eval_steps": n})) for n in (5, 7))
    assert some == other != inputs.train_inputs(river())


def test_an_evaluation_is_of_the_students_files_and_not_of_the_time_of_its_training() -> None:
    later = river(trained={"metrics.jsonl": "other seconds"})
    other = river(trained={"student/model.safetensors": "another"})
    assert inputs.evaluate_inputs(later) == inputs.evaluate_inputs(river())
    assert inputs.evaluate_inputs(other) != inputs.evaluate_inputs(river())


def test_what_verifying_left_out_is_part_of_what_was_learned() -> None:
    assert (
        inputs.train_inputs(river(verify=True, wrong="v"))
        != inputs.train_inputs(river(verify=True))
        == inputs.train_inputs(river(verify=True))
    )
    assert inputs.capture_inputs(river(verify=True)) != inputs.capture_inputs(river())


def test_what_is_said_of_an_evaluation_afterwards_does_not_make_it_anew() -> None:
    assert inputs.evaluate_inputs(
        river(evaluation={"allow_safety_regression": True})
    ) == inputs.evaluate_inputs(river())
    assert inputs.evaluate_inputs(river(evaluation={"items": 3})) != inputs.evaluate_inputs(river())
