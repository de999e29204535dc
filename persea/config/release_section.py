"""Recipe section of what becomes of the student, for the licence check."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from persea.config.data_sections import CorpusSection
from persea.config.model_sections import TeacherSection
from persea.config.section import RecipeSection
from persea.config.yaml_source import KeyPath, suggest_choice

LicenceDecisions: TypeAlias = Annotated[
    dict[str, str],
    Field(
        description="student, a teacher's name or corpus.0 -> who decided what, when (a date such "
        "as 2026-01-31), where the licence check asks"
    ),
]


class ReleaseSection(RecipeSection):
    """What becomes of the student: the licences of its parents depend on it."""

    use: Literal["research", "internal", "commercial", "publish"] = Field(
        default="commercial",
        description="intended use: research and internal = the student stays with you, internal "
        "serves a business; commercial = others receive it or its service; publish = its weights "
        "are given away. Commercial, the strictest, holds if nothing is written",
    )
    name: str = Field(
        default="",
        max_length=96,
        pattern=r"^([A-Za-z0-9][A-Za-z0-9 ._-]*)?$",
        description="name that the student is released under; empty = the recipe's, with the "
        "beginning that a licence asks for",
    )
    licence: str = Field(
        default="",
        max_length=200,
        description="licence that the student is released under, an SPDX expression; empty = the "
        "licences that go with it",
    )


def decision_contradictions(
    decisions: Mapping[str, str],
    teachers: Sequence[TeacherSection],
    corpus: Sequence[CorpusSection],
) -> list[tuple[bool, KeyPath, str, str]]:
    """Return the contradictions of names that the licence check uses.

    These are a teacher with the name of the student, and decisions for something that does not
    exist or without a day.
    """
    names = ["student", *(t.name for t in teachers)]
    names += [f"corpus.{k}" for k, part in enumerate(corpus) if part.generate is None]
    found: list[tuple[bool, KeyPath, str, str]] = [
        (
            teacher.name == "student",
            ("teachers", k, "name"),
            "student is the name of the student itself",
            "give it another `name:`",
        )
        for k, teacher in enumerate(teachers)
    ]
    for name, decision in decisions.items():
        where = ("licence_decisions", name)
        found += [
            (name not in names, where, "no such model or data", suggest_choice(name, names)),
            (
                not re.search(r"\d{4}-\d{2}-\d{2}", decision),
                where,
                "does not name the day of the decision",
                "write who decided what, when: a date such as 2026-01-31",
            ),
        ]
    return found
