"""Base class of the recipe's sections, and the patterns and checks that they share."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue
from pydantic_core import PydanticCustomError

from persea.config.yaml_source import KeyPath

SLUG_PATTERN, NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]*$", r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
LANGUAGE_PATTERN = r"^([A-Za-z]{2,3}([-_][A-Za-z0-9]{1,8})*)?$"  # id, eng, zho-CN; empty = unknown
MAX_COUNT = 1 << 30  # upper bound of every count in a recipe
# marks a key whose default depends on the student's size (persea.config.size_defaults); its static
# default is that of students of less than ten million weights
BY_SIZE: dict[str, JsonValue] = {"x-default": "by size"}
SectionT = TypeVar("SectionT", bound="RecipeSection")


class RecipeSection(BaseModel):
    """A part of the recipe: immutable, strictly typed, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def check_contradictions(
    section: SectionT, *contradictions: tuple[bool, KeyPath, str, str]
) -> SectionT:
    """Return the section if no contradiction holds.

    Args:
        section: The validated section.
        *contradictions: (whether it holds, key inside the section, problem, remedy).

    Raises:
        PydanticCustomError: Lists every contradiction that holds; `load_recipe` turns each into
            one line of a RecipeError.
    """
    found = [claim[1:] for claim in contradictions if claim[0]]
    if found:
        raise PydanticCustomError("contradiction", "contradiction", {"found": found})
    return section
