"""Work is bytes of text times weights of the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from persea.pipeline.model_refs import STUDENT
from persea.pipeline.work import EvaluationWork, capture_work, model_work
from tests.pipeline.test_plan import flowed_copy, river


def test_a_unit_weighs_its_text_and_its_teacher(tmp_path: Path) -> None:
    context = river(flowed_copy(tmp_path, "check", "audition"), "capture.answers=given")
    work = capture_work(context)
    assert work.keys() == {u.name for u in context.capture_units}
    for unit in context.capture_units:
        num_bytes = sum(
            len(part.text.encode()) for p in unit.prompts for part in p.conversation.parts()
        ) + sum(len(p.answer.encode()) for p in unit.prompts)
        size = context.models.teacher_sizes[unit.teacher]
        assert size is not None
        assert work[unit.name] == pytest.approx(num_bytes * size.num_parameters)
    size = context.models.student_size
    assert size is not None and model_work(context, STUDENT) == size.num_parameters


def test_an_evaluation_goes_from_0_to_1_by_the_size_of_the_models() -> None:
    told: list[tuple[float, str]] = []
    work = EvaluationWork([1.0, 3.0], 2, lambda *one: told.append(one))
    work.report_model(0, 1.0, "a code 0.50")
    work.report_answers("b", 0.25)
    work.report_model(1, 0.5, "b code 0.50")
    work.report_words("loading c")
    work.report_texts(1.0, "texts")
    assert [fraction for fraction, _ in told] == pytest.approx([0.125, 0.125, 0.3125, 0.3125, 1.0])
    assert told[1][1] == "b: 25% of a batch of answers; a code 0.50"
