"""Recipe: the one YAML file a person writes -> frozen sections, checked before anything is loaded, hashed.

Every mistake in the file is told at once, each with line, column and what to write instead. Nothing is bent into another
type, no unknown key is ignored, and no variable of the environment is read but the two named here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from persea.chat import PINNED_DATE, Effort
from persea.errors import RecipeError
from persea.families import FAMILIES
from persea.families.generic import NAME as GENERIC
from persea.places import Dumper, KeyPath, Reading, is_secret, override, read_page, resolved

SLUG, NAME = r"^[a-z0-9][a-z0-9._-]*$", r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
MANY = 1 << 30  # no count in a recipe is larger
S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A part of the recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _agreed(section: S, *claims: tuple[bool, KeyPath, str, str]) -> S:
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
        return _agreed(self, (odd, ("hidden",), f"{self.hidden} is not {self.heads} heads of even width", f"a multiple of {step}"))


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
        return _agreed(
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
        return _agreed(self, (idle, ("lora",), "given, but `adapt` is full", "write `adapt: lora`, or delete `lora:`"))


class Teacher(ModelRef):
    name: str = Field(default_factory=lambda seen: "" if seen["model"] == "random" else seen["model"].rstrip("/").rpartition("/")[2],
                      pattern=NAME, description="what reports call it: letters, digits and ._- (default: the last part of `model`)")
    effort: Effort = Field(default=Effort.NONE, description="how long it thinks before it answers")
    licence: str = Field(default="", description="its licence, where you know better than the family's usual one")

    @model_validator(mode="after")
    def _has_a_name(self) -> Self:
        nameless = not re.fullmatch(NAME, self.name)  # pydantic checks a written name, not the one that `model` gives
        return _agreed(self, (nameless, ("name",), f"missing; `model: {self.model}` gives none", "add `name:`, letters, digits and ._-"))


class CorpusPart(Section):
    skill: str = Field(pattern=SLUG, description="the skill these prompts teach: languages, code or reasoning")
    generate: int | None = Field(default=None, ge=1, le=MANY, description="number of prompts drawn from the skill's own generator")
    file: str | None = Field(default=None, min_length=1, description="a .jsonl file, one prompt a line")
    language: str = Field(default="", description="language of the file's prompts, such as vi; empty = not said")
    broken: Literal["refuse", "quarantine"] = Field(default="refuse", description="a line that is no prompt ends the run, or is counted and left out")

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        made, kept = self.generate is not None, self.file is not None
        return _agreed(
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
        return _agreed(self, (idle is not None, (key,), f"given, but `rows` is {self.rows}", f"write `rows: {kind}`, or delete `{key}:`"))


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


class Recipe(Section):
    """Everything a run depends on. To change one use overrides: `model_copy` keeps the old hash."""

    name: str = Field(pattern=SLUG, description="name of the run's folder: a-z, 0-9 and ._- (default: the file's name)")
    seed: int = Field(default=0, ge=0, le=MANY, description="seed of everything that is drawn by chance")
    threads: int = Field(0, ge=0, le=1024, description="threads of one operation on a CPU; 0 = as many as torch takes. Small models want 1")
    today: date = Field(default=PINNED_DATE, description="date for chat templates that tell the date")
    student: Student = Field(description="the model that learns")
    teachers: tuple[Teacher, ...] = Field(min_length=1, description="the models it learns from")
    corpus: tuple[CorpusPart, ...] = Field(min_length=1, description="what the teachers are asked")
    audition: Audition = Field(default=Audition(), description="how teachers are measured, to decide who teaches what")
    capture: Capture = Field(default=Capture(), description="how the teachers' answers are kept")
    training: Training = Field(default=Training(), description="how the student learns")
    evaluation: Evaluation = Field(default=Evaluation(), description="how the student is measured beside its teachers")
    check: Check = Field(default=Check(), description="when a pairing of tokenizers is refused")
    _source: Path = PrivateAttr(default=Path())
    _written: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names, skills = [t.name for t in self.teachers], sorted({c.skill for c in self.corpus})
        claims: list[tuple[bool, KeyPath, str, str]] = [(n in names[:k], ("teachers", k, "name"), f"two teachers are called {n!r}",
                                                         "give each its own `name:`") for k, n in enumerate(names)]
        for skill, teacher in self.audition.pinned.items():
            where = ("audition", "pinned", skill)
            claims.append((skill not in skills, where, f"no part of the corpus teaches {skill!r}", _choose(skill, skills)))
            claims.append((teacher not in names, where, f"no teacher is called {teacher!r}", _choose(teacher, names)))
        claims.append((self.training.completion and self.capture.rows == "topk", ("training", "completion"),
                       "true, but nobody can say what a rest holds inside a token", "write `completion: false`, or `capture: {rows: sampled}`"))
        return _agreed(self, *claims)

    @property
    def source(self) -> Path:
        """The file it came from."""
        return self._source

    @property
    def written(self) -> dict[str, Any]:
        """Every field, defaults filled in, paths and variables as the person wrote them: the same on every machine."""
        return self._written or self.model_dump(mode="json", exclude_none=True)

    @property
    def hash(self) -> str:
        """sha256 of `written`: order, comments and spelt-out defaults do not change it."""
        return hashlib.sha256(json.dumps(self.written, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_yaml(self) -> str:
        """`written` as a recipe of the same hash. Its relative paths still start at the folder of `source`."""
        return yaml.dump(self.written, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


SECTIONS: dict[str, type[Section]] = {  # by the key they stand under
    "student": Student, "teachers": Teacher, "corpus": CorpusPart, "audition": Audition, "capture": Capture, "training": Training,
    "evaluation": Evaluation, "check": Check, "sizes": Sizes, "lora": Lora}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, with overrides such as "training.steps=20" or "teachers.0.effort=low" laid over it.

    Raises one RecipeError that names every problem, a line each.
    """
    reading = read_page(path)
    for change in overrides:
        override(reading, change)
    reading.data.setdefault("name", path.stem)
    recipe, written = _validated(resolved(reading.data, (), reading), reading), _validated(reading.data, reading)
    if recipe is None or written is None or reading.problems:
        order = list(reading.places)
        problems = [p for _, p in sorted(reading.problems.items(), key=lambda item: order.index(reading.near(item[0])))]
        raise problems[0] if len(problems) == 1 else RecipeError("\n".join(str(p) for p in problems))
    recipe._source, recipe._written = path.absolute(), written.model_dump(mode="json", exclude_none=True)
    return recipe


def schema() -> dict[str, Any]:
    """The recipe as JSON schema, for editors; `name` is optional in a file, which has one itself."""
    return Recipe.model_json_schema() | {"required": ["student", "teachers", "corpus"]}


# --- what the sections say of a page ---


def _validated(data: Any, reading: Reading) -> Recipe | None:
    try:  # by way of JSON, where pydantic's strict types still take a list for a tuple and a text for a date or an effort
        return Recipe.model_validate_json(json.dumps(data))
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            for path, what, remedy in _explained(problem):
                reading.refuse(path, what, remedy)
    return None


WORDS = (  # what pydantic's finding begins with, and what the value should be
    ("int_", "a whole number"), ("bool_", "true or false"), ("float_", "a number"), ("finite", "a finite number"), ("string_type", "text"),
    ("string_too", "some text"), ("string_pattern", "a plain name"), ("date_", "a date such as 2025-01-01"),
    ("tuple_", "a list, each entry after `- `"), *((kind, "a section, its keys indented below it") for kind in ("model_", "dict_")))
BOUNDS = {"greater_than": ("gt", "more than"), "greater_than_equal": ("ge", "at least"), "less_than_equal": ("le", "at most")}


def _explained(error: ErrorDetails) -> Iterator[tuple[KeyPath, str, str]]:
    """One of pydantic's findings in words: (key, what, remedy)."""
    path, kind, context = error["loc"], error["type"], error.get("ctx", {})
    if kind == "default_factory_not_called":  # a default that hangs on a wrong value, told beside it
        return
    given = f"(got {_shown(error['input'])})"
    if kind == "contradiction":
        yield from (((*path, *key), what, remedy) for key, what, remedy in context["found"])
    elif kind == "extra_forbidden":
        yield path, "unknown key", _did_you_mean(path)
    elif kind == "missing":
        yield path, "missing", f"add `{path[-1]}:`, {_meaning(path)}"
    elif kind in ("enum", "literal_error"):
        choices = [c for c in re.findall(r"'([^']*)'", context["expected"]) if c]
        yield path, f"should be {', '.join(choices[:-1])} or {choices[-1]} {given}", _choose(str(error["input"]), choices)
    elif kind in BOUNDS:
        bound, words = BOUNDS[kind]
        yield path, f"should be {words} {str(context[bound]).removesuffix('.0')} {given}", _meaning(path)
    elif kind == "string_type" and not isinstance(error["input"], dict | list):
        yield path, f"should be text {given}", "put it in quotes"
    elif kind == "too_short":
        if not error["input"]:  # else its entries are wrong, which pydantic tells beside it
            yield path, "needs at least one entry", _meaning(path)
    else:
        yield path, f"should be {next((w for start, w in WORDS if kind.startswith(start)), error['msg'])} {given}", _meaning(path)


def _owner(path: KeyPath) -> type[Section] | None:
    """The section that a key is a field of."""
    keys = [k for k in path[:-1] if isinstance(k, str)]
    return SECTIONS.get(keys[-1]) if keys else Recipe


def _meaning(path: KeyPath) -> str:
    """The description of a field, or of the field whose list or mapping the key is in."""
    owner = _owner(path)
    found = owner.model_fields.get(str(path[-1])) if owner else None
    return str(found.description) if found else _meaning(path[:-1])


def _did_you_mean(path: KeyPath) -> str:
    key, owner = str(path[-1]), _owner(path)
    homes = [f"under `{name}:`" for name, section in SECTIONS.items() if key in section.model_fields]
    homes += ["at the top of the file"] if key in Recipe.model_fields else []
    return f"it belongs {' or '.join(homes)}" if homes else _choose(key, list(owner.model_fields) if owner else [])


def _choose(word: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(word.lower(), choices, n=1)
    return f"did you mean {near[0]!r}?" if near else f"one of {', '.join(choices)}"


def _shown(value: Any) -> str:
    """A value in a few characters, and never a secret."""
    if isinstance(value, dict | list):
        return "a section" if isinstance(value, dict) else "a list"
    text = "a secret" if is_secret(value) else repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
