"""The student's base in the audition: a contestant that is measured and cannot be chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from persea import storage
from persea.evaluation.answering import answer_items
from persea.evaluation.gain import GainDecision, compare_with_base
from persea.pipeline.model_refs import BASE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from persea.evaluation.answering import EvaluatedModel
    from persea.evaluation.audition import Cast
    from persea.evaluation.racing import TaskRace
    from persea.pipeline.run_context import RunContext
    from persea.tasks.task import ItemResult, Task, TaskItem
    from persea.vocab_extension.resize_model import ProgressCallback


def measures_base(context: RunContext) -> bool:
    """Return whether the audition measures the student's base: not where it has random weights."""
    return context.recipe.audition.compare_with_base and context.recipe.student.sizes is None


def asks_base(context: RunContext) -> bool:
    """Return whether the base answers questions: it is measured, and has a chat template."""
    return measures_base(context) and not context.models.student_renderer.is_text


def compare_teachers_with_base(
    context: RunContext,
    folder: Path,
    races: Sequence[TaskRace],
    cast: Cast,
    models: Mapping[str, EvaluatedModel],
    progress: ProgressCallback,
) -> list[GainDecision]:
    """Ask the student's base the questions of every part, and compare the part's best teacher.

    More questions are asked where those of the race do not decide. Random weights are not asked:
    they have no right answers.

    Args:
        context: The recipe and its run folder.
        folder: Folder of the stage; receives the answers of the base.
        races: Finished races.
        cast: The cast.
        models: Model -> how it is measured; without BASE nothing is compared.
        progress: Called with the stage, the share done and a message.
    """
    recipe = context.recipe
    if BASE not in models or not asks_base(context):
        return []
    tasks = {task.name: task for task in context.tasks}
    decisions = []
    for race in races:
        parts = [part for part in cast.parts if part.partition("/")[0] == race.skill]
        answers: list[ItemResult] = []

        def answer(
            name: str,
            items: Sequence[TaskItem],
            task: Task = tasks[race.skill],
            answers: list[ItemResult] = answers,
        ) -> Sequence[ItemResult]:
            results = answer_items(
                models[name], models[name].efforts[0], task, items, recipe.capture.max_new_tokens
            )[0]
            answers += results if name == BASE else ()
            return results

        for part in parts:
            decision = compare_with_base(
                race,
                part,
                [name for name, _ in cast.parts[part]],
                answer,
                BASE,
                race.skill in cast.pinned,
            )
            decisions.append(decision)
            progress("audition", 1.0, f"base {part} {decision.base_value:.2f}")
        if answers:
            storage.write_json_lines(
                folder / f"{BASE}.{race.skill}.jsonl", (r.to_json() for r in answers)
            )
    return decisions
