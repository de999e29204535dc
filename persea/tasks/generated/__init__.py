"""What to be good at: a generator of held-out questions and a grader each. A new skill = one file, one line, one test."""

from __future__ import annotations

from persea.errors import DataError
from persea.tasks.generated.code import CODE_TASK
from persea.tasks.generated.languages import LANGUAGES_TASK
from persea.tasks.generated.reasoning import REASONING_TASK
from persea.tasks.generated.safety import SAFETY_TASK
from persea.tasks.generated.tools import TOOLS_TASK
from persea.tasks.task import Task

GENERATED_TASKS = (LANGUAGES_TASK, CODE_TASK, SAFETY_TASK, REASONING_TASK, TOOLS_TASK)


def find_generated_task(name: str) -> Task:
    """The skill of that name, or an error that lists the known ones."""
    for skill in GENERATED_TASKS:
        if skill.name == name:
            return skill
    raise DataError(
        f"unknown skill {name!r}",
        remedy=f"known skills: {', '.join(s.name for s in GENERATED_TASKS)}",
    )
