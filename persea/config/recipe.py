"""Recipe: the one YAML file a person writes -> frozen sections, checked before anything is loaded, hashed.

Every mistake in the file is told at once, each with line, column and what to write instead. Nothing is bent into another
type, no unknown key is ignored, and no variable of the environment is read but the two named here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import ErrorDetails

from persea.chat.messages import PINNED_DATE
from persea.config.schema import (
    MAX_COUNT,
    SLUG_PATTERN,
    AuditionSection,
    BenchmarkSection,
    CaptureSection,
    CheckSection,
    CorpusSection,
    EndpointSection,
    EvaluationSection,
    GenerationSection,
    GradingSection,
    LoraSection,
    OnPolicySection,
    RandomModelSection,
    RecipeSection,
    StudentSection,
    TeacherSection,
    TrainingSection,
    check_contradictions,
)
from persea.config.schema import TEXT_ONLY_MODEL as SAYS_WORDS
from persea.config.yaml_source import (
    KeyPath,
    Yaml12Dumper,
    YamlSource,
    apply_override,
    is_secret,
    read_yaml,
    resolve_values,
    suggest_choice,
)
from persea.errors import RecipeError


class Recipe(RecipeSection):
    """Everything a run depends on. To change one use overrides: `model_copy` keeps the old hash."""

    name: str = Field(
        pattern=SLUG_PATTERN,
        description="name of the run's folder: a-z, 0-9 and ._- (default: the file's name)",
    )
    seed: int = Field(
        default=0, ge=0, le=MAX_COUNT, description="seed of everything that is drawn by chance"
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="threads of one operation on a CPU; 0 = as many as torch takes. Small models want 1",
    )
    today: date = Field(
        default=PINNED_DATE, description="date for chat templates that tell the date"
    )
    student: StudentSection = Field(description="the model that learns")
    teachers: tuple[TeacherSection, ...] = Field(
        min_length=1, description="the models it learns from"
    )
    corpus: tuple[CorpusSection, ...] = Field(
        min_length=1, description="what the teachers are asked"
    )
    audition: AuditionSection = Field(
        default=AuditionSection(),
        description="how teachers are measured, to decide who teaches what",
    )
    capture: CaptureSection = Field(
        default=CaptureSection(), description="how the teachers' answers are kept"
    )
    training: TrainingSection = Field(
        default=TrainingSection(), description="how the student learns"
    )
    evaluation: EvaluationSection = Field(
        default=EvaluationSection(), description="how the student is measured beside its teachers"
    )
    check: CheckSection = Field(
        default=CheckSection(), description="when a pairing of tokenizers is refused"
    )
    _source_path: Path = PrivateAttr(default=Path())
    _as_written: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _check_sections_agree(self) -> Self:
        names, skills = [t.name for t in self.teachers], sorted({c.skill for c in self.corpus})
        claims: list[tuple[bool, KeyPath, str, str]] = [
            (
                n in names[:k],
                ("teachers", k, "name"),
                f"two teachers are called {n!r}",
                "give each its own `name:`",
            )
            for k, n in enumerate(names)
        ]
        for skill, teacher in self.audition.pinned.items():
            where = ("audition", "pinned", skill)
            claims.append(
                (
                    skill not in skills,
                    where,
                    f"no part of the corpus teaches {skill!r}",
                    suggest_choice(skill, skills),
                )
            )
            claims.append(
                (
                    teacher not in names,
                    where,
                    f"no teacher is called {teacher!r}",
                    suggest_choice(teacher, names),
                )
            )
        claims.append(
            (
                self.training.completion and self.capture.rows == "topk",
                ("training", "completion"),
                "true, but nobody can say what a rest holds inside a token",
                "write `completion: false`, or `capture: {rows: sampled}`",
            )
        )
        teach = [t.name for t in self.teachers if not t.yardstick]
        claims += [
            (
                t in names and t not in teach,
                ("audition", "pinned", s),
                f"{t} is a yardstick, which never teaches",
                suggest_choice(t, teach or names),
            )
            for s, t in self.audition.pinned.items()
        ]
        judge = next((t for t in self.teachers if t.name == self.evaluation.judge), None)
        claims.append(
            (
                self.evaluation.judge != "" and (judge is None or not judge.yardstick),
                ("evaluation", "judge"),
                f"{self.evaluation.judge!r} is no yardstick",
                "name a teacher with `yardstick: true`",
            )
        )
        claims.append(
            (
                judge is not None and judge.model == SAYS_WORDS and not judge.family,
                ("evaluation", "judge"),
                f"nobody knows the family of {self.evaluation.judge}",
                "write its `family:`; generic for one that is no teacher's",
            )
        )
        claims.append(
            (
                not teach,
                ("teachers", 0, "yardstick"),
                "true of every teacher, so that nobody teaches",
                "delete it in one of them",
            )
        )
        far = [
            t
            for t in self.teachers
            if not t.yardstick and (t.endpoint is not None or t.engine != "local")
        ]
        claims += [
            (
                self.training.completion,
                ("training", "completion"),
                f"true, but {t.name} does not give the whole rows that it needs",
                "write `completion: false`",
            )
            for t in far
        ]
        claims += [
            (
                t.endpoint is not None
                and t.endpoint.protocol == "chat"
                and self.capture.answers == "given",
                ("capture", "answers"),
                f"given, but {t.name} tells nothing of words that are not its own",
                "write `answers: ask`",
            )
            for t in far
        ]
        claims += [
            (
                bool(part.modes) and self.capture.answers == "given",
                ("corpus", k, "modes"),
                "given, but nobody is asked: answers that came with the prompts have no thought",
                "delete `modes:`, or write `capture: {answers: ask}`",
            )
            for k, part in enumerate(self.corpus)
        ]
        return check_contradictions(self, *claims)

    @property
    def skills(self) -> tuple[str, ...]:
        """Names of the corpus' skills, in its order."""
        return tuple(dict.fromkeys(p.skill for p in self.corpus))

    @property
    def source_path(self) -> Path:
        """The file it came from."""
        return self._source_path

    @property
    def as_written(self) -> dict[str, Any]:
        """Every field, defaults filled in, paths and variables as the person wrote them: the same on every machine."""
        return self._as_written or self.model_dump(mode="json", exclude_none=True)

    @property
    def hash(self) -> str:
        """sha256 of `written`: order, comments and spelt-out defaults do not change it."""
        return hashlib.sha256(
            json.dumps(self.as_written, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

    def to_yaml(self) -> str:
        """`written` as a recipe of the same hash. Its relative paths still start at the folder of `source`."""
        return yaml.dump(
            self.as_written, Dumper=Yaml12Dumper, sort_keys=False, allow_unicode=True, width=120
        )


SECTION_CLASSES: dict[str, type[RecipeSection]] = {  # by the key they stand under
    "student": StudentSection,
    "teachers": TeacherSection,
    "corpus": CorpusSection,
    "audition": AuditionSection,
    "capture": CaptureSection,
    "training": TrainingSection,
    "evaluation": EvaluationSection,
    "check": CheckSection,
    "sets": BenchmarkSection,
    "grading": GradingSection,
    "sizes": RandomModelSection,
    "lora": LoraSection,
    "endpoint": EndpointSection,
    "generation": GenerationSection,
    "on_policy": OnPolicySection,
}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, with overrides such as "training.steps=20" or "teachers.0.effort=low" laid over it.

    Raises one RecipeError that names every problem, a line each.
    """
    reading = read_yaml(path)
    for change in overrides:
        apply_override(reading, change)
    reading.data.setdefault("name", path.stem)
    recipe, written = (
        _validate(resolve_values(reading.data, (), reading), reading),
        _validate(reading.data, reading),
    )
    if recipe is None or written is None or reading.problems:
        order = list(reading.locations)
        problems = [
            p
            for _, p in sorted(
                reading.problems.items(), key=lambda item: order.index(reading.nearest_key(item[0]))
            )
        ]
        raise (
            problems[0] if len(problems) == 1 else RecipeError("\n".join(str(p) for p in problems))
        )
    recipe._source_path, recipe._as_written = (
        path.absolute(),
        written.model_dump(mode="json", exclude_none=True),
    )
    return recipe


def recipe_json_schema() -> dict[str, Any]:
    """The recipe as JSON schema, for editors; `name` is optional in a file, which has one itself."""
    return Recipe.model_json_schema() | {"required": ["student", "teachers", "corpus"]}


# --- what the sections say of a page ---


def _validate(data: Any, reading: YamlSource) -> Recipe | None:
    try:  # by way of JSON, where pydantic's strict types still take a list for a tuple and a text for a date or an effort
        return Recipe.model_validate_json(json.dumps(data))
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            for path, what, remedy in _explain_error(problem):
                reading.add_problem(path, what, remedy)
    return None


EXPECTED_VALUE_TEXTS = (  # what pydantic's finding begins with, and what the value should be
    ("int_", "a whole number"),
    ("bool_", "true or false"),
    ("float_", "a number"),
    ("finite", "a finite number"),
    ("string_type", "text"),
    ("string_too", "some text"),
    ("string_pattern", "a plain name"),
    ("date_", "a date such as 2025-01-01"),
    ("tuple_", "a list, each entry after `- `"),
    *((kind, "a section, its keys indented below it") for kind in ("model_", "dict_")),
)
BOUND_TEXTS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than_equal": ("le", "at most"),
}


def _explain_error(error: ErrorDetails) -> Iterator[tuple[KeyPath, str, str]]:
    """One of pydantic's findings in words: (key, what, remedy)."""
    path, kind, context = (
        tuple(k for k in error["loc"] if k != "[key]"),
        error["type"],
        error.get("ctx", {}),
    )
    if (
        kind == "default_factory_not_called"
    ):  # a default that hangs on a wrong value, told beside it
        return
    given = f"(got {_abbreviate_value(error['input'])})"
    if kind == "contradiction":
        yield from (((*path, *key), what, remedy) for key, what, remedy in context["found"])
    elif kind == "extra_forbidden":
        yield path, "unknown key", _did_you_mean(path)
    elif kind == "missing":
        yield path, "missing", f"add `{path[-1]}:`, {_key_description(path)}"
    elif kind in ("enum", "literal_error"):
        choices = [c for c in re.findall(r"'([^']*)'", context["expected"]) if c]
        yield (
            path,
            f"should be {', '.join(choices[:-1])} or {choices[-1]} {given}",
            suggest_choice(str(error["input"]), choices),
        )
    elif kind in BOUND_TEXTS:
        bound, words = BOUND_TEXTS[kind]
        yield (
            path,
            f"should be {words} {str(context[bound]).removesuffix('.0')} {given}",
            _key_description(path),
        )
    elif kind == "string_type" and not isinstance(error["input"], dict | list):
        yield path, f"should be text {given}", "put it in quotes"
    elif kind == "too_short":
        if not error["input"]:  # else its entries are wrong, which pydantic tells beside it
            yield path, "needs at least one entry", _key_description(path)
    else:
        yield (
            path,
            f"should be {next((w for start, w in EXPECTED_VALUE_TEXTS if kind.startswith(start)), error['msg'])} {given}",
            _key_description(path),
        )


def _owning_section(path: KeyPath) -> type[RecipeSection] | None:
    """The section that a key is a field of."""
    keys = [k for k in path[:-1] if isinstance(k, str)]
    return SECTION_CLASSES.get(keys[-1]) if keys else Recipe


def _key_description(path: KeyPath) -> str:
    """The description of a field, or of the field whose list or mapping the key is in."""
    owner = _owning_section(path)
    found = owner.model_fields.get(str(path[-1])) if owner else None
    return str(found.description) if found else _key_description(path[:-1])


def _did_you_mean(path: KeyPath) -> str:
    key, owner = str(path[-1]), _owning_section(path)
    homes = [
        f"under `{name}:`"
        for name, section in SECTION_CLASSES.items()
        if key in section.model_fields
    ]
    homes += ["at the top of the file"] if key in Recipe.model_fields else []
    return (
        f"it belongs {' or '.join(homes)}"
        if homes
        else suggest_choice(key, list(owner.model_fields) if owner else [])
    )


def _abbreviate_value(value: Any) -> str:
    """A value in a few characters, and never a secret."""
    if isinstance(value, dict | list):
        return "a section" if isinstance(value, dict) else "a list"
    text = (
        "a secret"
        if is_secret(value)
        else repr(value)
        if isinstance(value, str)
        else json.dumps(value)
    )
    return text if len(text) <= 60 else f"{text[:57]}..."
