"""What to be good at: a generator of held-out questions and a grader each. A new skill = one file, one line, one test."""

from __future__ import annotations

from persea.errors import DataError
from persea.measure import Skill
from persea.skills.code import CODE
from persea.skills.languages import LANGUAGES
from persea.skills.reasoning import REASONING
from persea.skills.safety import SAFETY
from persea.skills.tools import TOOLS

SKILLS = (LANGUAGES, CODE, SAFETY, REASONING, TOOLS)


def named(name: str) -> Skill:
    """The skill of that name, or an error that lists the known ones."""
    for skill in SKILLS:
        if skill.name == name:
            return skill
    raise DataError(f"unknown skill {name!r}", remedy=f"known skills: {', '.join(s.name for s in SKILLS)}")
