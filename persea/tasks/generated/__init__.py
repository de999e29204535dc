"""What to be good at: a generator of held-out questions and a grader each. A new skill = one file, one line, one test."""

from __future__ import annotations

from persea.errors import DataError
from persea.tasks.generated.code import CODE
from persea.tasks.generated.languages import LANGUAGES
from persea.tasks.generated.reasoning import REASONING
from persea.tasks.generated.safety import SAFETY
from persea.tasks.generated.tools import TOOLS
from persea.tasks.task import Skill

SKILLS = (LANGUAGES, CODE, SAFETY, REASONING, TOOLS)


def named(name: str) -> Skill:
    """The skill of that name, or an error that lists the known ones."""
    for skill in SKILLS:
        if skill.name == name:
            return skill
    raise DataError(f"unknown skill {name!r}", remedy=f"known skills: {', '.join(s.name for s in SKILLS)}")
