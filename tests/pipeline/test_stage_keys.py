"""What a stage's output depends on: what is named there makes it anew, what is only looked at does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from persea.config.schema import Capture, Evaluation, Training
from persea.pipeline import stage_keys as inputs
from persea.pipeline.run_context import digest_of
from persea.pipeline.stages import STAGES as TOLD
from persea.pipeline.status import STAGES


def river(training: dict[str, Any] = {}, evaluation: dict[str, Any] = {}, verify: bool = False, wrong: str = "w") -> Any:  # noqa: B006
    recipe = SimpleNamespace(training=Training(**training), evaluation=Evaluation(**evaluation), capture=Capture(verify=verify), seed=1, threads=1)
    done = {"train": {"outputs": {"student": "s"}}, "capture": {"outputs": {"wrong.json": wrong}}}
    return SimpleNamespace(recipe=recipe, student_identity="me", units=[SimpleNamespace(name="u")], corpus=SimpleNamespace(broken=()), done=done.get,
                           identities={"a": "b"}, asked="q")


def test_every_stage_has_inputs_of_its_own_name() -> None:
    assert tuple(s.name for s in TOLD) == STAGES
    assert [s.inputs for s in TOLD] == [getattr(inputs, name) for name in STAGES]


@pytest.mark.parametrize(("changed", "same"), [
    (river({"report_to": "wandb"}), True), (river({"steps": 7}), False), (river({"evaluate_every": 5}), False), (river(verify=True), False)])
def test_a_student_is_trained_anew_where_what_it_learned_changes(changed: Any, same: bool) -> None:
    assert (digest_of(inputs.train(changed)) == digest_of(inputs.train(river()))) is same


def test_what_verifying_left_out_is_part_of_what_was_learned() -> None:
    assert inputs.train(river(verify=True, wrong="v")) != inputs.train(river(verify=True)) == inputs.train(river(verify=True))
    assert inputs.capture(river(verify=True)) != inputs.capture(river())


def test_what_is_said_of_an_evaluation_afterwards_does_not_make_it_anew() -> None:
    assert inputs.evaluate(river(evaluation={"allow_regression": True})) == inputs.evaluate(river())
    assert inputs.evaluate(river(evaluation={"items": 3})) != inputs.evaluate(river())
