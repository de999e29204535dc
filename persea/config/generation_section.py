"""Recipe section of how one teacher generates."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from persea.config.section import MAX_COUNT, RecipeSection, check_contradictions


class GenerationSection(RecipeSection):
    """How one teacher generates, if not as the others do."""

    max_new_tokens: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        description="longest answer, in the teacher's own tokens, in every stage",
    )
    temperature: float = Field(default=0, ge=0, le=10, description="0 = greedy decoding")
    top_p: float = Field(
        default=1, gt=0, le=1, description="nucleus sampling: the likeliest tokens of this mass"
    )
    seed: int = Field(default=0, ge=0, le=MAX_COUNT, description="seed of the sampling")

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        unused = not self.temperature and (self.top_p < 1 or self.seed > 0)
        return check_contradictions(
            self,
            (
                unused,
                ("temperature",),
                "0, so nothing is sampled",
                "give a temperature, or delete `top_p:` and `seed:`",
            ),
        )
