"""Recipe sections of prompts and answers: corpus, deduplication, audition, capture."""

from __future__ import annotations

from typing import Annotated, Literal, Self

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


class HubDatasetSection(RecipeSection):
    """A data set on the Hugging Face hub."""

    name: str = Field(min_length=1, description="its id, such as HuggingFaceH4/ultrachat_200k")
    split: str = Field(default="train", min_length=1, description="its split, such as train_sft")
    config: str = Field(default="", description="its configuration; empty = the only one")
    revision: str = Field(default="", description="branch, tag or commit; empty = main")
    streaming: bool = Field(
        default=False, description="read row by row, without downloading the split first"
    )


class CorpusSection(RecipeSection):
    """One source of prompts or texts: a skill's generator, a file of prompts, or one of texts."""

    skill: str = Field(
        pattern=SLUG_PATTERN,
        description="the skill these prompts or texts teach, any word such as support; persea has "
        "questions of its own for languages, code, safety, reasoning and tools",
    )
    generate: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        description="number of prompts from the skill's own generator",
    )
    file: str | None = Field(
        default=None,
        min_length=1,
        description="prompts: .jsonl, .json, .csv, .tsv or .parquet (.gz too), a folder of them, "
        "or a saved data set; rows of any known shape (docs/howto/own_data.md)",
    )
    hub: HubDatasetSection | None = Field(
        default=None, description="prompts of a data set on the hub; its rows are read as a file's"
    )
    columns: dict[str, str] = Field(
        default={},
        description="name as persea reads it -> column of the file, such as {prompt: query, "
        'answer: reply}; {label: ""} leaves a column unread; only with `file:` or `hub:`',
    )
    learn_turns: Literal["last", "all"] = Field(
        default="last",
        description="turns of the assistant that are asked or learned: last, or all, each after "
        "what comes before it; only with `file:` or `hub:`",
    )
    texts: str | None = Field(
        default=None,
        min_length=1,
        description="plain texts, which teachers score and the student learns, without prompts and "
        "roles: a table as for `file:`, one text a row; .txt, one text in all",
    )
    column: str | None = Field(
        default_factory=lambda seen: "text" if seen.get("texts") else None,
        min_length=1,
        validate_default=True,
        description="column of the text in a table of `texts:`",
    )
    licence: str = Field(
        default="",
        max_length=200,
        description="licence of `file:`, `hub:` or `texts:`, an SPDX id or expression; empty = a "
        "file is your own, a data set of the hub is under what its card states",
    )
    language: str = Field(
        default="",
        pattern=LANGUAGE_PATTERN,
        description="language of the file, a code such as vi; empty = unknown",
    )
    effort_shares: dict[ThinkingEffort, Annotated[float, Field(gt=0, le=1)]] = Field(
        default={},
        description="thinking effort -> share of these prompts that teachers answer and the "
        "student learns with it, such as {none: 0.5, low: 0.2, high: 0.3}; empty = answered at the "
        "teacher's effort, learned as an answer at once",
    )
    near_duplicate_threshold: float | None = Field(
        default_factory=lambda seen: (
            0.8 if seen.get("file") or seen.get("hub") or seen.get("texts") else None
        ),
        ge=0.3,
        le=1,
        validate_default=True,
        description="Jaccard similarity of word runs from which a file's prompt or text counts as "
        "a repetition of an earlier one and is left out",
    )
    on_malformed: Literal["refuse", "quarantine"] = Field(
        default="refuse",
        description="a line that is no prompt or text: refuse = stop the run, quarantine = count "
        "it and leave it out",
    )
    max_malformed_share: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="largest share of a file's rows that `on_malformed: quarantine` leaves out",
    )
    max_line_bytes: int = Field(
        default=16 << 20,
        ge=1,
        le=MAX_COUNT,
        description="longest line of the file; a longer one is malformed",
    )

    @model_validator(mode="after")
    def _check_prompt_source(self) -> Self:
        names = ("generate", "file", "hub", "texts")
        sources = [k for k in names if getattr(self, k) is not None]
        from_file = bool(sources) and self.generate is None
        total = sum(self.effort_shares.values())
        return check_contradictions(
            self,
            (
                not sources,
                (),
                "neither `generate` nor `file`, `hub` or `texts`",
                "add `generate: 1000`, `file: prompts.jsonl` or `texts: documents.jsonl`",
            ),
            (
                len(sources) > 1,
                (),
                f"both {' and '.join(f'`{k}`' for k in sources)}",
                "keep one; two parts may teach the same skill",
            ),
            (
                bool(self.effort_shares) and self.texts is not None,
                ("effort_shares",),
                "given, but nobody answers: `texts` are scored and learned as they are",
                "delete `effort_shares:`",
            ),
            (
                self.column is not None and self.texts is None,
                ("column",),
                "given, but no `texts`",
                "delete `column:`",
            ),
            (
                bool(self.effort_shares) and abs(total - 1) > 1e-6,
                ("effort_shares",),
                f"shares that sum to {total:g}",
                "make them sum to 1",
            ),
            (
                self.near_duplicate_threshold is not None and not from_file,
                ("near_duplicate_threshold",),
                "given, but no file; the questions of a generator differ by design",
                "delete `near_duplicate_threshold:`",
            ),
            (
                self.on_malformed == "quarantine" and not from_file,
                ("on_malformed",),
                "given, but no file that could have malformed lines",
                "delete `on_malformed:`",
            ),
            (
                (bool(self.columns) or self.learn_turns == "all")
                and not {"file", "hub"} & set(sources),
                ("columns",) if self.columns else ("learn_turns",),
                "given, but no `file` or `hub`",
                "delete it",
            ),
        )


class DedupSection(RecipeSection):
    """When a prompt counts as contaminated by a held-out text, or as a repetition of a prompt."""

    ngram_words: float = Field(
        default=13,
        ge=1,
        le=1000,
        description="words in a row that a prompt may not share with a held-out text",
    )
    min_words: float = Field(
        default=8,
        ge=1,
        le=1000,
        description="a held-out text with fewer words than `ngram_words` and at least so many is "
        "searched for as a whole",
    )
    max_line_repeats: int = Field(
        default=5,
        ge=1,
        le=MAX_COUNT,
        description="a line in more held-out texts than this is a form of the set and not compared",
    )
    shingle_words: float = Field(
        default=3,
        ge=1,
        le=1000,
        description="words of a run by which near-duplicates are compared",
    )

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        return check_contradictions(
            self,
            (
                self.min_words > self.ngram_words,
                ("min_words",),
                f"{self.min_words:g}, but `ngram_words` is {self.ngram_words:g}",
                "at most `ngram_words`",
            ),
        )


class AuditionSection(RecipeSection):
    """How teachers are measured, to assign each skill to a teacher."""

    items: int = Field(
        default=100,
        ge=1,
        le=MAX_COUNT,
        description="most questions of each skill; fewer if the ranking is clear sooner",
    )
    batch_size: int = Field(
        default=64, ge=1, le=MAX_COUNT, description="questions that a teacher answers at once"
    )
    min_score: float = Field(
        default=0.05, ge=0, le=1, description="least score of a teacher that teaches a skill"
    )
    efforts: tuple[ThinkingEffort, ...] = Field(
        default=(),
        description="further thinking efforts to measure teachers at, where they have them",
    )
    pinned: dict[str, str] = Field(
        default={},
        description="skill -> teacher that you choose yourself, instead of by measurement",
    )
    first_round: int = Field(
        default=10, ge=1, le=MAX_COUNT, description="questions of each skill in the first round"
    )
    min_items_per_language: int = Field(
        default=4,
        ge=1,
        le=MAX_COUNT,
        description="questions of each language before the ranking of a skill may be final",
    )
    compare_with_base: bool = Field(
        default=True,
        description="ask the student's base the same questions, to find out whether any teacher "
        "is better than the student already is",
    )
    without_gain: Literal["warn", "skip", "refuse"] = Field(
        default="warn",
        description="a part where no teacher is better than the student's base with confidence: "
        "warn = distil it all the same, skip = leave it out, refuse = end the run with exit code 4",
    )
    round_growth: float = Field(
        default=0.5,
        ge=0,
        le=100,
        description="questions of a later round, as a share of all asked before it",
    )

    @model_validator(mode="after")
    def _check_base_is_measured(self) -> Self:
        return check_contradictions(
            self,
            (
                self.without_gain != "warn" and not self.compare_with_base,
                ("without_gain",),
                f"{self.without_gain}, but `compare_with_base` is false",
                "delete `compare_with_base:`",
            ),
        )


class CaptureSection(RecipeSection):
    """How teachers answer the prompts and how their distributions are stored."""

    answers: Literal["ask", "given"] = Field(
        default="ask",
        description="ask = the teachers answer; given = they score the answers of the prompt "
        "files. `texts` of the corpus are always scored",
    )
    distributions: Literal["sampled", "topk"] = Field(
        default="sampled",
        description="sampled = an unbiased sample of each distribution; topk = its likeliest "
        "tokens up to `max_kl`, and a rest",
    )
    sampling_threshold: float | None = Field(
        default_factory=lambda seen: 0.02 if seen["distributions"] == "sampled" else None,
        gt=0,
        le=0.5,
        validate_default=True,
        description="probability below which a token is stored with a chance in proportion to it; "
        "only with `distributions: sampled`",
    )
    max_kl: float | None = Field(
        default_factory=lambda seen: 0.01 if seen["distributions"] == "topk" else None,
        ge=0.003,
        le=10,
        validate_default=True,
        description="nats that a stored distribution may lose, its rest spread by the token "
        "frequencies of the unit; only with `distributions: topk`",
    )
    teach_end: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="whether the student learns from the teacher's distribution where a text ends: "
        "auto = where the teacher itself wrote the answer, not at the end of given answers and "
        "texts; elsewhere the end is learned from the text alone",
    )
    max_new_tokens: int = Field(
        default=64,
        ge=1,
        le=MAX_COUNT,
        description="longest answer, in the teacher's tokens",
        json_schema_extra=BY_SIZE,
    )
    batch_size: int = Field(
        default=64, ge=1, le=MAX_COUNT, description="prompts that a teacher answers at once"
    )
    prompts_per_unit: int = Field(
        default=256,
        ge=1,
        le=MAX_COUNT,
        description="prompts saved together, fewer if they could exceed 2^20 tokens: the most "
        "that a crash can lose",
    )
    drop_wrong_answers: bool = Field(
        default=False,
        description="do not train on answers that the skill's grader marks wrong, where the prompt "
        "has a reference answer",
    )
    canaries: int = Field(
        default=0,
        ge=0,
        le=MAX_COUNT,
        description="prompts that teachers answer twice, one answer chosen by a secret coin, so "
        "that `persea audit` can prove later that a model learned from this capture; 0 = none",
    )
    max_total_tokens: int | None = Field(
        default=None,
        ge=1,
        description="stop, with a message, once so many tokens are stored; a larger limit "
        "continues from there",
    )
    max_hours: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="stop, with a message, once a run has captured for so long",
    )

    store: str = Field(
        default="",
        description="folder of captured units that several runs share, so that a run with another "
        "learning rate asks no teacher again, or a URL of fsspec, such as s3://bucket/persea "
        "(`pip install 'persea[s3]'`); default: `captures` in PERSEA_HOME",
    )

    @model_validator(mode="after")
    def _check_distribution_kind(self) -> Self:
        kind, key, unused = (
            ("topk", "max_kl", self.max_kl)
            if self.distributions == "sampled"
            else ("sampled", "sampling_threshold", self.sampling_threshold)
        )
        return check_contradictions(
            self,
            (
                unused is not None,
                (key,),
                f"given, but `distributions` is {self.distributions}",
                f"write `distributions: {kind}`, or delete `{key}:`",
            ),
            (
                self.drop_wrong_answers and self.answers == "given",
                ("drop_wrong_answers",),
                "true, but `answers` is given",
                "delete `drop_wrong_answers:`",
            ),
            (
                bool(self.canaries) and self.answers == "given",
                ("canaries",),
                f"{self.canaries}, but `answers` is given: no teacher answers anything",
                "delete `canaries:`",
            ),
        )
