"""Recipe section of what a plan assumes. No key of it changes a run."""

from __future__ import annotations

from pydantic import Field

from persea.config.section import RecipeSection

MAX_TOKENS = 1 << 50


class ExpectedSkillSection(RecipeSection):
    """How much there is to capture of one skill, where the prompts are not on this machine."""

    prompts: int | None = Field(
        default=None,
        ge=1,
        le=MAX_TOKENS,
        description="prompts or texts; empty = they are counted",
    )
    prompt_tokens: float | None = Field(
        default=None,
        ge=0,
        le=MAX_TOKENS,
        description="mean tokens of a prompt; empty = from a sample, four bytes a token where no "
        "tokenizer is on this machine",
    )
    answer_tokens: float | None = Field(
        default=None,
        gt=0,
        le=MAX_TOKENS,
        description="mean tokens of an answer or text; empty = the most that is allowed, or what "
        "`persea plan --calibrate` has measured",
    )


class PlanSection(RecipeSection):
    """What `persea plan` assumes."""

    hardware: str = Field(
        default="",
        pattern=r"^([0-9]+x[A-Za-z0-9._-]+)?$",
        description="accelerators that the plan is for, such as 8xH200; empty = this machine",
    )
    price_per_hour: float | None = Field(
        default=None,
        ge=0,
        le=1e6,
        description="price of one accelerator, or of this machine, for an hour, in any currency; "
        "empty = no money in the plan",
    )
    expect: dict[str, ExpectedSkillSection] = Field(
        default={}, description="skill -> how much there is of it"
    )
