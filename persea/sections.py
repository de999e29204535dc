"""The sections of a recipe: what each key is called, what it may be, what it means, and which contradict each other."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, Self, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from persea.chat import Effort
from persea.families import FAMILIES
from persea.families.generic import NAME as GENERIC
from persea.places import KeyPath
from persea.schedule import Schedule

SLUG, NAME = r"^[a-z0-9][a-z0-9._-]*$", r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
MANY = 1 << 30  # no count in a recipe is larger
S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A part of the recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def agreed(section: S, *claims: tuple[bool, KeyPath, str, str]) -> S:
    """The section, or all its contradictions at once; a claim is (does it hold, key, what, remedy)."""
    found = [claim[1:] for claim in claims if claim[0]]
    if found:
        raise PydanticCustomError("contradiction", "contradiction", {"found": found})
    return section


class Sizes(Section):
    hidden: int = Field(default=128, ge=8, le=8192, description="width of the model, a multiple of twice the heads")
    layers: int = Field(default=3, ge=1, le=128, description="number of layers")
    heads: int = Field(default=4, ge=1, le=128, description="attention heads of a layer")
    experts: int = Field(default=4, ge=2, le=256, description="experts of a layer (gpt-oss only)")
    seed: int = Field(default=0, ge=0, le=MANY, description="seed of the random weights")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        step = 2 * self.heads  # rotary positions turn pairs of numbers
        odd = self.hidden % step > 0
        return agreed(self, (odd, ("hidden",), f"{self.hidden} is not {self.heads} heads of even width", f"a multiple of {step}"))


if TYPE_CHECKING:
    FamilyName: TypeAlias = str
else:
    FamilyName = Literal[("", *(f.name for f in FAMILIES), GENERIC)]  # a new family is one line there, none here


class ModelRef(Section):
    """Where a model comes from: what student and teachers share."""

    model: str = Field(min_length=1, description="a folder in Hugging Face form, a hub id such as Qwen/Qwen3-8B, or random")
    revision: str = Field(default="", description="revision of a hub model: branch, tag or commit")
    tokenizer: str = Field(default="", description="folder or hub id of the tokenizer where it is not the model's own")
    family: FamilyName = Field(default="", description="chat family; empty = recognised")
    sizes: Sizes | None = Field(default=None, description="size of the weights of `model: random`")

    @model_validator(mode="after")
    def _comes_from_one_place(self) -> Self:
        made, local = self.model == "random", self.model.startswith((".", "/", "~"))
        return agreed(
            self,
            (made and not self.tokenizer, ("tokenizer",), "missing; random weights bring none", "add `tokenizer:`, a folder or hub id"),
            (made and not self.sizes, ("sizes",), "missing; random weights need a size", "add `sizes: {hidden: 32, layers: 1, heads: 2}`"),
            (not made and bool(self.sizes), ("sizes",), "given, but this model has its own", "delete `sizes:`, or write `model: random`"),
            (bool(self.revision) and (made or local), ("revision",), "given, but only a hub model has one", "delete `revision:`"))


class Lora(Section):
    rank: int = Field(default=16, ge=1, le=1024, description="rank of the added matrices")
    alpha: float = Field(default=32, gt=0, le=4096, description="strength of the added matrices: they are scaled by alpha / rank")
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj"), min_length=1, description="names of the adapted matrices")


class Student(ModelRef):
    adapt: Literal["full", "lora"] = Field(default="full", description="full = every weight learns; lora = small added matrices do")
    lora: Lora | None = Field(default_factory=lambda seen: Lora() if seen["adapt"] == "lora" else None,
                              description="shape of the added matrices; only with `adapt: lora`")

    @model_validator(mode="after")
    def _adapts_one_way(self) -> Self:
        idle = self.adapt == "full" and self.lora is not None
        return agreed(self, (idle, ("lora",), "given, but `adapt` is full", "write `adapt: lora`, or delete `lora:`"))


class Teacher(ModelRef):
    name: str = Field(default_factory=lambda seen: "" if seen["model"] == "random" else seen["model"].rstrip("/").rpartition("/")[2],
                      pattern=NAME, description="what reports call it: letters, digits and ._- (default: the last part of `model`)")
    effort: Effort = Field(default=Effort.NONE, description="how long it thinks before it answers")
    licence: str = Field(default="", description="its licence, where you know better than the family's usual one")

    @model_validator(mode="after")
    def _has_a_name(self) -> Self:
        nameless = not re.fullmatch(NAME, self.name)  # pydantic checks a written name, not the one that `model` gives
        return agreed(self, (nameless, ("name",), f"missing; `model: {self.model}` gives none", "add `name:`, letters, digits and ._-"))


class CorpusPart(Section):
    skill: str = Field(pattern=SLUG, description="the skill these prompts teach: languages, code or reasoning")
    generate: int | None = Field(default=None, ge=1, le=MANY, description="number of prompts drawn from the skill's own generator")
    file: str | None = Field(default=None, min_length=1, description="a .jsonl file, one prompt a line")
    language: str = Field(default="", description="language of the file's prompts, such as vi; empty = not said")
    broken: Literal["refuse", "quarantine"] = Field(default="refuse", description="a line that is no prompt ends the run, or is counted and left out")

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        made, kept = self.generate is not None, self.file is not None
        return agreed(
            self,
            (not made and not kept, (), "neither `generate` nor `file`", "add `generate: 1000` or `file: prompts.jsonl`"),
            (made and kept, (), "both `generate` and `file`", "keep one; two parts may teach the same skill"),
            (self.broken == "quarantine" and not kept, ("broken",), "given, but no `file` that could be broken", "delete `broken:`"),
            (not (self.file or ".jsonl").endswith(".jsonl"), ("file",), f"{self.file!r} is not .jsonl", "one JSON object a line"))


class Audition(Section):
    items: int = Field(default=100, ge=1, le=MANY, description="questions of each skill")
    batch: int = Field(default=64, ge=1, le=MANY, description="questions asked at once")
    pinned: dict[str, str] = Field(default={}, description="skill -> teacher that you choose yourself, instead of by measurement")


class Capture(Section):
    answers: Literal["ask", "given"] = Field(
        default="ask", description="ask = the teachers answer; given = they score the answers that come with the prompts")
    rows: Literal["sampled", "topk"] = Field(
        default="sampled", description="sampled = an unbiased sample of each distribution; topk = its likeliest tokens up to `kl`, and a rest")
    tau: float | None = Field(default_factory=lambda seen: 0.01 if seen["rows"] == "sampled" else None, gt=0, le=0.5, validate_default=True,
                              description="probability below which a token is kept by chance, so that rows stay small; only with `rows: sampled`")
    kl: float | None = Field(default_factory=lambda seen: 0.01 if seen["rows"] == "topk" else None, ge=0.003, le=10, validate_default=True,
                             description="nats a row may lose, its rest spread by how often tokens stand in the unit; only with `rows: topk`")
    max_new_tokens: int = Field(default=64, ge=1, le=MANY, description="longest answer, in the teacher's tokens")
    batch: int = Field(default=64, ge=1, le=MANY, description="prompts asked at once")
    unit: int = Field(default=256, ge=1, le=MANY,
                      description="prompts saved together, fewer where they could exceed 2^20 tokens: the most that a crash can cost")
    tokens: int | None = Field(default=None, ge=1, description="stop, and say so, once this many tokens are kept; more goes on from there")
    hours: float | None = Field(default=None, gt=0, le=1e6, description="stop, and say so, once a run has asked for this long")

    @model_validator(mode="after")
    def _keeps_one_kind(self) -> Self:
        kind, key, idle = ("topk", "kl", self.kl) if self.rows == "sampled" else ("sampled", "tau", self.tau)
        return agreed(self, (idle is not None, (key,), f"given, but `rows` is {self.rows}", f"write `rows: {kind}`, or delete `{key}:`"))


class Training(Section):
    """event_share and completion as docs/results.md decided them (points 5 and 7)."""
    steps: int = Field(default=1500, ge=1, le=MANY, description="optimiser steps")
    batch: int = Field(default=16, ge=1, le=MANY, description="conversations a step")
    learning_rate: float = Field(default=3e-3, gt=0, le=1, description="highest learning rate")
    warmup: int = Field(default=50, ge=0, le=MANY, description="steps until the highest learning rate")
    event_share: float = Field(default=0.7, ge=0, le=1, description="weight of events at common boundaries; the rest is cross-entropy")
    completion: bool = Field(default=False, description="let a teacher's row speak in the middle of its token too; else the text alone does")
    weight_decay: float = Field(default=0.01, ge=0, le=1, description="AdamW's weight decay")
    clip: float = Field(default=1.0, gt=0, le=MANY, description="largest norm of the gradient")
    max_tokens: int = Field(default=512, ge=8, le=MANY, description="longest conversation, in student tokens; longer ones are left out")
    checkpoint_every: int = Field(default=200, ge=1, le=MANY, description="steps between checkpoints")
    log_every: int = Field(default=10, ge=1, le=MANY, description="steps between lines of the log")
    schedule: Schedule = Field(default=Schedule.COSINE, description="how the learning rate falls: cosine, or wsd (stays, then falls in a line)")
    cooldown: float | None = Field(default_factory=lambda seen: 0.2 if seen["schedule"] == "wsd" else None, gt=0, le=1, validate_default=True,
                                   description="share of the steps in which it falls; only with `schedule: wsd`")
    accumulate: int = Field(default=1, ge=1, le=MANY, description="parts a batch is worked through in, one after another, to need less memory")
    evaluate_every: int = Field(default=0, ge=0, le=MANY, description="steps between losses of lessons that are held out; 0 = none is")
    held_out: float | None = Field(default_factory=lambda seen: 0.05 if seen["evaluate_every"] else None, gt=0, le=0.5, validate_default=True,
                                   description="share of the lessons held out, in whole batches; only with `evaluate_every`")
    skips: int = Field(default=3, ge=0, le=MANY, description="steps that may be left out because loss or gradient is not finite, before it ends")
    report_to: Literal["tensorboard", "trackio", "wandb"] | None = Field(default=None, description="show the metrics there too, as they come")

    @model_validator(mode="after")
    def _asks_for_what_it_names(self) -> Self:
        return agreed(
            self,
            (self.schedule is Schedule.COSINE and self.cooldown is not None, ("cooldown",), "given, but `schedule` is cosine",
             "write `schedule: wsd`, or delete `cooldown:`"),
            (not self.evaluate_every and self.held_out is not None, ("held_out",), "given, but `evaluate_every` is 0",
             "write `evaluate_every: 100`, or delete `held_out:`"),
            (self.accumulate > self.batch, ("accumulate",), f"{self.accumulate} parts of a batch of {self.batch}", "at most one a conversation"))


class Evaluation(Section):
    items: int = Field(default=200, ge=1, le=MANY, description="questions of each skill")
    batch: int = Field(default=64, ge=1, le=MANY, description="questions asked at once")
    max_new_tokens: int = Field(default=64, ge=1, le=MANY, description="longest answer, in the speaker's tokens")


class Check(Section):
    floor: float = Field(default=0.3, ge=0, le=1, description="least share of learned tokens on a common boundary, else refused")
    disagreement: float = Field(default=0.1, ge=0, le=1, description="most common boundaries whose two tokens are different events, else refused")
    texts: dict[str, str] = Field(
        default={}, description="language -> a file to measure besides the skills' answers, one text a line; FILE#key = that key of JSON lines")
    lines: int = Field(default=200, ge=1, le=MANY, description="lines of each text, at most")
    likelihood: bool | None = Field(
        default=None, description="open weights, to see whether a teacher's template suits it (default: those in a folder of at most 4 GB)")
