"""Recipe section of own tasks: questions that no model trains on, and a metric."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from persea.config.data_sections import HubDatasetSection
from persea.config.section import (
    LANGUAGE_PATTERN,
    SLUG_PATTERN,
    RecipeSection,
    check_contradictions,
)

MetricName = Literal[
    "exact",
    "normalized",
    "contains",
    "regex",
    "choice",
    "numeric",
    "chrf",
    "json",
    "tests",
    "judge",
]


class TaskSection(RecipeSection):
    """Questions of your own that measure a skill: the audition and the evaluation ask them."""

    skill: str = Field(
        pattern=SLUG_PATTERN,
        description="the skill that they measure, any word; prompts of the corpus with this skill "
        "are graded by the same metric",
    )
    file: str | None = Field(
        default=None,
        min_length=1,
        description="rows with a prompt and a reference: .jsonl, .json, .csv, .tsv or .parquet, a "
        "folder of them, or a saved data set; in any known shape (docs/howto/own_tasks.md)",
    )
    hub: HubDatasetSection | None = Field(
        default=None, description="a data set of the hub, instead of a file"
    )
    metric: MetricName = Field(
        description="exact, normalized (case, punctuation and spaces do not count), contains, "
        "regex (the reference is the pattern), choice (the likeliest of `choices`), numeric, chrf, "
        "json (equal values), tests (Python asserts, in the sandbox), or judge (`rubric`)",
    )
    columns: dict[str, str] = Field(
        default={},
        description="name as persea reads it -> column, such as {prompt: query, reference: gold}; "
        "`choices` and `tests` too",
    )
    language: str = Field(
        default="",
        pattern=LANGUAGE_PATTERN,
        description="language of the answers, a code such as vi",
    )
    instruction: str = Field(
        default="", description="text after every question, such as: Answer with one word."
    )
    rubric: str = Field(
        default="",
        description="what makes an answer right, for the model of `evaluation.judge`; only with "
        "`metric: judge`",
    )

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        return check_contradictions(
            self,
            (
                (self.file is None) == (self.hub is None),
                () if self.file is None else ("hub",),
                "neither `file` nor `hub`" if self.file is None else "both `file` and `hub`",
                "add `file: held-out.jsonl`" if self.file is None else "keep one",
            ),
            (
                bool(self.rubric) != (self.metric == "judge"),
                ("rubric",),
                "given, but `metric` is not judge" if self.rubric else "missing",
                "write `metric: judge`, or delete `rubric:`"
                if self.rubric
                else "say what makes an answer right",
            ),
        )
