"""Generated tasks for the saplings: unlimited questions and an exact grader for each skill.

A new task is one file, its line in GENERATED_TASKS and one test: see docs/new_task.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from persea.config.schema import CorpusSection
from persea.errors import DataError
from persea.tasks.generated.code import CODE_TASK
from persea.tasks.generated.languages import LANGUAGES_TASK
from persea.tasks.generated.reasoning import REASONING_TASK
from persea.tasks.generated.safety import SAFETY_TASK
from persea.tasks.generated.tools import TOOLS_TASK
from persea.tasks.task import Task

GENERATED_TASKS: tuple[Task, ...] = (
    LANGUAGES_TASK,
    CODE_TASK,
    SAFETY_TASK,
    REASONING_TASK,
    TOOLS_TASK,
)


def refuse_too_many_questions(corpus: Sequence[CorpusSection], where: str) -> None:
    """Check that the generators have as many training questions as a recipe asks for, at once.

    Raises:
        DataError: A part asks for more; one line for each.
    """
    most = {task.name: task.num_train_items for task in GENERATED_TASKS}
    errors = [
        DataError(
            f"{part.skill} has {limit:,} training questions, not {part.generate:,}",
            where=f"{where}: corpus.{k}.generate",
            remedy=f"ask for at most {limit}",
        )
        for k, part in enumerate(corpus)
        if part.generate and (limit := most.get(part.skill)) and part.generate > limit
    ]
    if errors:
        raise errors[0] if len(errors) == 1 else DataError("\n".join(map(str, errors)))


def find_generated_task(name: str) -> Task:
    """Return the generated task of that name.

    Raises:
        DataError: If there is none; the message lists the known names.
    """
    for task in GENERATED_TASKS:
        if task.name == name:
            return task
    raise DataError(
        f"unknown skill {name!r}",
        remedy=f"known skills: {', '.join(t.name for t in GENERATED_TASKS)}",
    )
