"""Recipe section of what becomes of the student, for the licence check."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from persea.config.section import RecipeSection


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
