"""Recipe sections of measurements: evaluation, published benchmarks, tokenizer check."""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import Field, model_validator

from persea.chat.messages import ThinkingEffort
from persea.config.section import (
    BY_SIZE,
    LANGUAGE_PATTERN,
    MAX_COUNT,
    SLUG_PATTERN,
    RecipeSection,
    check_contradictions,
)


class BenchmarkSection(RecipeSection):
    """One file of a published benchmark (docs/sets.md)."""

    benchmark: str = Field(
        pattern=SLUG_PATTERN,
        description="name of the benchmark: gsm8k, mgsm, xcopa, ifeval ... (docs/sets.md)",
    )
    file: str | None = Field(
        default=None, min_length=1, description="its file, in the published form"
    )
    answers: str | None = Field(
        default=None,
        min_length=1,
        description="the file of its answers, if they are published in a file of their own",
    )
    hub: str | None = Field(
        default=None,
        min_length=1,
        description="a hub data set such as openai/gsm8k, instead of a file",
    )
    config: str = Field(default="", description="configuration of a hub data set")
    split: str = Field(default="test", min_length=1, description="split of a hub data set")
    language: str = Field(
        default="",
        pattern=LANGUAGE_PATTERN,
        description="language of its answers, a code such as vi; empty = the benchmark's own",
    )
    skill: str = Field(
        default="",
        description="the skill it measures, if that is not the benchmark's name; benchmarks of "
        "one skill are scored together",
    )

    @model_validator(mode="after")
    def _check_benchmark_source(self) -> Self:
        return check_contradictions(
            self,
            (
                self.file is None and self.hub is None,
                (),
                "neither `file` nor `hub`",
                "add `file: path/to/the/set.jsonl`",
            ),
            (
                self.file is not None and self.hub is not None,
                (),
                "both `file` and `hub`",
                "keep one",
            ),
            (
                self.config != "" and self.hub is None,
                ("config",),
                "given, but no `hub`",
                "delete `config:`",
            ),
            (
                not re.fullmatch(SLUG_PATTERN, self.skill or "a"),
                ("skill",),
                f"{self.skill!r} is not a plain name",
                "a-z, 0-9 and ._-",
            ),
        )


class GradingSection(RecipeSection):
    """Limits that can decide a grade of a published benchmark (persea.tasks.benchmarks)."""

    max_answer_chars: int = Field(
        default=200_000,
        ge=1,
        le=MAX_COUNT,
        description="a longer answer is malformed: the model could not stop",
    )
    min_correct_chrf: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="chrF from which a translation is labelled right; scores use the chrF itself",
    )
    math_timeout_s: float = Field(
        default=5.0, gt=0, le=3600, description="seconds for one comparison by math-verify"
    )
    code_cpu_s: int = Field(
        default=5, ge=1, le=3600, description="seconds of CPU time of a program in the sandbox"
    )
    code_wall_s: float = Field(
        default=10.0, gt=0, le=3600, description="seconds of wall time of a program in the sandbox"
    )
    code_memory_bytes: int = Field(
        default=512 << 20,
        ge=1 << 26,
        le=1 << 40,
        description="memory of one process of a program in the sandbox",
    )


class HeldOutTextsSection(RecipeSection):
    """A file of documents that no model trains on: all models are measured in bits per byte."""

    texts: str = Field(
        min_length=1,
        description="a file of documents: .jsonl, one a line; .txt, one in all",
    )
    column: str = Field(
        default="text",
        min_length=1,
        description="key of the text in the lines of a .jsonl file",
    )
    language: str = Field(
        default="",
        pattern=LANGUAGE_PATTERN,
        description="language of the documents, a code such as id",
    )
    skill: str = Field(
        default="texts",
        pattern=SLUG_PATTERN,
        description="skill under which the documents are reported",
    )


class EvaluationSection(RecipeSection):
    """How the student is compared with its base, its teachers and reference models."""

    items: int = Field(default=200, ge=1, le=MAX_COUNT, description="questions of each skill")
    texts: tuple[HeldOutTextsSection, ...] = Field(
        default=(),
        description="held-out documents of your own: bits per byte of every model, and kept out "
        "of the training",
    )
    max_window_tokens: int = Field(
        default=2048,
        ge=16,
        le=MAX_COUNT,
        description="longest part of a held-out document that models read at once, in the tokens "
        "of any model; shorter if a model has fewer positions, and the same bytes for all",
    )
    generated_tasks: bool | None = Field(
        default=None,
        description="ask the questions of persea's own generators (default: of the skills whose "
        "corpus has prompts, not of those that are taught from texts alone)",
    )
    batch_size: int = Field(
        default=64, ge=1, le=MAX_COUNT, description="questions that a model answers at once"
    )
    max_new_tokens: int = Field(
        default=64,
        ge=1,
        le=MAX_COUNT,
        description="longest answer, in the model's own tokens",
        json_schema_extra=BY_SIZE,
    )
    efforts: tuple[ThinkingEffort, ...] = Field(
        default=(),
        description="further thinking efforts to measure every model at, where it has them",
    )
    allow_safety_regression: bool = Field(
        default=False,
        description="true = the run succeeds although the student is less safe than its base; "
        "false = exit code 4",
    )
    lm_eval_results: dict[str, str] = Field(
        default={}, description="model -> a results file of lm-eval to show on the page"
    )
    lm_eval: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        description="tasks of lm-evaluation-harness to run on the student, its base and the "
        "teachers on this machine, such as [gsm8k, mmlu]; needs the extra `lm-eval`",
    )
    lm_eval_include: str = Field(
        default="", description="a folder with task files (.yaml) of your own for lm-eval"
    )
    lm_eval_limit: int | None = Field(
        default=None, ge=1, le=MAX_COUNT, description="questions of each lm-eval task; all if unset"
    )
    judge_max_new_tokens: int = Field(
        default=16, ge=1, le=MAX_COUNT, description="longest verdict of the judge, in its tokens"
    )
    judge: str = Field(
        default="",
        description="a reference model that grades safety benchmarks instead of rules; of no "
        "teacher's family",
    )
    benchmarks: tuple[BenchmarkSection, ...] = Field(
        default=(),
        description="published benchmarks; they decide the cast and compare every model",
    )
    grading: GradingSection = Field(
        default=GradingSection(), description="limits of graders of published benchmarks"
    )

    @model_validator(mode="after")
    def _check_something_is_measured(self) -> Self:
        return check_contradictions(
            self,
            (
                self.generated_tasks is False and not self.texts and not self.benchmarks,
                ("generated_tasks",),
                "false, but there is nothing else to measure",
                "name `texts:` or `benchmarks:`, or delete `generated_tasks:`",
            ),
        )


# About 20 s on two CPU cores for a model of 270 M parameters and 262,144 tokens.
MAX_MEASURED_LOGITS = 400_000_000


class CheckSection(RecipeSection):
    """When a pair of tokenizers is refused, and on which texts it is measured."""

    min_common_share: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="least share of supervised tokens on a common boundary, else refused",
    )
    max_disagreement: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="largest share of common boundaries whose two tokens are different events, "
        "else refused",
    )
    max_unwritable_share: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="largest share of the compared texts that may be left out because a vocabulary "
        "lacks a byte of them, else refused",
    )
    min_named_mass: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="least share of the probability that the events of a server's listed tokens "
        "keep, for each language, else refused; 0 = not measured",
    )
    texts: dict[str, str] = Field(
        default={},
        description="language -> a file to measure besides the skills' answers, one text a line; "
        "FILE#key = that key of JSON lines",
    )
    max_lines_per_text: int = Field(
        default=200, ge=1, le=MAX_COUNT, description="lines that are read of each text file"
    )
    measure_likelihood: bool | None = Field(
        default=None,
        description="load the weights, to measure whether a teacher's chat template suits it "
        "(default: weights in a folder of at most `max_likelihood_bytes`)",
    )
    max_answers_per_language: int = Field(
        default=64,
        ge=1,
        le=MAX_COUNT,
        description="reference answers of one skill and language to compare, at most",
    )
    max_likelihood_bytes: int = Field(
        default=4_000_000_000,
        ge=0,
        description="size of a model's folder up to which its weights are loaded, if "
        "`measure_likelihood` is not given",
    )
    max_measured_logits: int = Field(
        default=MAX_MEASURED_LOGITS,
        ge=1,
        le=1 << 60,
        description="logits (tokens x vocabulary) that the measurements with the weights of a "
        "teacher compute, on a sample of the reference answers; all answers if they need fewer",
    )
    max_template_excess: float = Field(
        default=0.25,
        ge=0,
        description="bits per byte by which answers may be less likely in the chat template than "
        "without it, else refused",
    )
    min_counted_probability: float = Field(
        default=1e-3,
        gt=0,
        le=1,
        description="least probability of an impossible token that is subtracted from the "
        "retained mass",
    )
    max_mask_search_tokens: int = Field(
        default=20_000,
        ge=1,
        le=MAX_COUNT,
        description="tokens tried to prove that a candidate is impossible at a boundary; a "
        "candidate that is undecided by then is kept",
    )
