"""The recipe: the one YAML file that describes a run, validated before anything is loaded, hashed.

All mistakes in the file are reported at once, each with line, column and remedy. No value is
converted to another type, unknown keys are refused, and no environment variables are read except
`ALLOWED_ENV_VARS`.
"""

from __future__ import annotations

import hashlib
import json
import re
import typing
import warnings
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Self, TypeAlias

import yaml
from pydantic import Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import ErrorDetails

from persea.chat.messages import PINNED_DATE
from persea.config.release_section import LicenceDecisions, decision_contradictions
from persea.config.renamed_keys import RENAMED_KEYS, rename_old_keys, rename_override
from persea.config.schema import (
    MAX_COUNT,
    SLUG_PATTERN,
    TEXT_ONLY_MODEL,
    AuditionSection,
    CaptureSection,
    CheckSection,
    CorpusSection,
    DedupSection,
    EvaluationSection,
    RecipeSection,
    ReleaseSection,
    StudentSection,
    TeacherSection,
    TrainingSection,
    check_contradictions,
)
from persea.config.secrets import is_secret
from persea.config.yaml_source import (
    KeyPath,
    Yaml12Dumper,
    YamlSource,
    apply_override,
    read_yaml,
    resolve_values,
    suggest_choice,
)
from persea.errors import RecipeError

Contradictions: TypeAlias = list[tuple[bool, KeyPath, str, str]]


class Recipe(RecipeSection):
    """Everything a run depends on.

    Change a recipe with overrides: `model_copy` keeps the old hash.
    """

    name: str = Field(
        pattern=SLUG_PATTERN,
        description="name of the run's folder: a-z, 0-9 and ._- (default: the file's name)",
    )
    seed: int = Field(default=0, ge=0, le=MAX_COUNT, description="seed of all random numbers")
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="threads of one operation on a CPU; 0 = torch's default. Small models are "
        "fastest with 1",
    )
    template_date: date = Field(
        default=PINNED_DATE, description="date for chat templates that contain one"
    )
    student: StudentSection = Field(description="the model that learns")
    teachers: tuple[TeacherSection, ...] = Field(
        min_length=1, description="the models it learns from"
    )
    corpus: tuple[CorpusSection, ...] = Field(
        min_length=1, description="the prompts that teachers answer"
    )
    dedup: DedupSection = Field(
        default=DedupSection(),
        description="when a prompt is left out as contaminated or repeated",
    )
    audition: AuditionSection = Field(
        default=AuditionSection(),
        description="how teachers are measured, to assign each skill to a teacher",
    )
    capture: CaptureSection = Field(
        default=CaptureSection(), description="how the teachers' answers are stored"
    )
    training: TrainingSection = Field(
        default=TrainingSection(), description="how the student learns"
    )
    evaluation: EvaluationSection = Field(
        default=EvaluationSection(), description="how the student is compared with its teachers"
    )
    check: CheckSection = Field(
        default=CheckSection(), description="when a pair of tokenizers is refused"
    )
    release: ReleaseSection = Field(
        default=ReleaseSection(), description="what becomes of the student, for its licences"
    )
    licence_decisions: LicenceDecisions = Field(default={})
    _source_path: Path = PrivateAttr(default=Path())
    _as_written: dict[str, Any] = PrivateAttr(default_factory=dict)
    _notices: tuple[str, ...] = PrivateAttr(default=())

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read and validate a recipe.

        Args:
            path: A YAML file.
            overrides: Changes such as "training.steps=20" or "teachers.0.effort=low", in order.

        Returns:
            The recipe. Old key names are read with a FutureWarning each.

        Raises:
            RecipeError: Lists every problem, one a line, with its location and a remedy.

        Example:
            >>> from persea.config.recipe import Recipe
            >>> recipe = Recipe.from_yaml("recipes/quickstart.yaml", ["training.steps=200"])
            >>> recipe.name, recipe.training.steps, recipe.skills[:2]
            ('quickstart', 200, ('languages', 'code'))
        """
        recipe = load_recipe(Path(path), overrides)
        for notice in recipe.notices:
            warnings.warn(notice, FutureWarning, stacklevel=2)
        return recipe

    @model_validator(mode="after")
    def _check_sections_agree(self) -> Self:
        return check_contradictions(
            self,
            *self._name_contradictions(),
            *self._judge_contradictions(),
            *decision_contradictions(self.licence_decisions, self.teachers, self.corpus),
            *self._distribution_contradictions(),
        )

    def _name_contradictions(self) -> Contradictions:
        """Repeated teacher names; pinned skills and teachers that do not exist or do not teach."""
        names, skills = [t.name for t in self.teachers], sorted(set(self.skills))
        teaching = [t.name for t in self.teachers if not t.reference]
        found: Contradictions = [
            (
                name in names[:k],
                ("teachers", k, "name"),
                f"two teachers have the name {name!r}",
                "give each its own `name:`",
            )
            for k, name in enumerate(names)
        ]
        for skill, teacher in self.audition.pinned.items():
            where = ("audition", "pinned", skill)
            found += [
                (
                    skill not in skills,
                    where,
                    f"no part of the corpus teaches {skill!r}",
                    suggest_choice(skill, skills),
                ),
                (
                    teacher not in names,
                    where,
                    f"no teacher has the name {teacher!r}",
                    suggest_choice(teacher, names),
                ),
                (
                    teacher in names and teacher not in teaching,
                    where,
                    f"{teacher} is a reference model, which never teaches",
                    suggest_choice(teacher, teaching or names),
                ),
            ]
        found.append(
            (
                not teaching,
                ("teachers", 0, "reference"),
                "true of every teacher, so that no teacher is left",
                "delete it in one of them",
            )
        )
        return found

    def _judge_contradictions(self) -> Contradictions:
        name, where = self.evaluation.judge, ("evaluation", "judge")
        judge = next((t for t in self.teachers if t.name == name), None)
        return [
            (
                name != "" and (judge is None or not judge.reference),
                where,
                f"{name!r} is not a reference model",
                "name a teacher with `reference: true`",
            ),
            (
                judge is not None and judge.model == TEXT_ONLY_MODEL and not judge.family,
                where,
                f"the family of {name} is unknown",
                "write its `family:`; generic if it is none of the teachers' families",
            ),
        ]

    def _distribution_contradictions(self) -> Contradictions:
        """Settings that need distributions or answers which a teacher does not return."""
        given, partial = self.capture.answers == "given", self.training.partial_tokens
        found: Contradictions = [
            (
                partial and self.capture.distributions == "topk",
                ("training", "partial_tokens"),
                "true, but the rest of a topk distribution has no tokens to look inside",
                "write `partial_tokens: false`, or `capture: {distributions: sampled}`",
            )
        ]
        for t in self.teachers:
            if t.reference or (t.endpoint is None and t.engine == "local"):
                continue
            found += [
                (
                    partial,
                    ("training", "partial_tokens"),
                    f"true, but {t.name} does not return the full distributions that it needs",
                    "write `partial_tokens: false`",
                ),
                (
                    given and t.endpoint is not None and t.endpoint.protocol == "chat",
                    ("capture", "answers"),
                    f"given, but {t.name} cannot score a text that it did not generate",
                    "write `answers: ask`",
                ),
            ]
        found += self._text_contradictions()
        found += [
            (
                given and bool(part.effort_shares),
                ("corpus", k, "effort_shares"),
                "given, but no teacher answers: the answers of the prompt files have no thoughts",
                "delete `effort_shares:`, or write `capture: {answers: ask}`",
            )
            for k, part in enumerate(self.corpus)
        ]
        return found

    def _text_contradictions(self) -> Contradictions:
        """Texts that a teacher behind a chat server would have to score."""
        names = {
            t.name
            for t in self.teachers
            if not t.reference and t.endpoint is not None and t.endpoint.protocol == "chat"
        }
        return [
            (
                part.texts is not None and name in names,
                ("corpus", k, "texts"),
                f"given, but {name} cannot score a text that it did not generate",
                f"pin another teacher under audition.pinned.{part.skill}",
            )
            for k, part in enumerate(self.corpus)
            for name in (
                [self.audition.pinned[part.skill]]
                if part.skill in self.audition.pinned
                else [t.name for t in self.teachers]
            )
        ]

    @property
    def skills(self) -> tuple[str, ...]:
        """Names of the corpus' skills, in its order."""
        return tuple(dict.fromkeys(p.skill for p in self.corpus))

    @property
    def source_path(self) -> Path:
        """The file that the recipe was read from."""
        return self._source_path

    @property
    def notices(self) -> tuple[str, ...]:
        """One line for each old key name in the file or in an override."""
        return self._notices

    @property
    def as_written(self) -> dict[str, Any]:
        """All fields with defaults, but paths and variables unresolved: equal on every machine."""
        return self._as_written or self.model_dump(mode="json", exclude_none=True)

    @property
    def hash(self) -> str:
        """SHA-256 of `as_written`, which key order, comments and written defaults do not change."""
        return hashlib.sha256(
            json.dumps(self.as_written, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

    def to_yaml(self) -> str:
        """Return `as_written` as a recipe with the same hash.

        Relative paths in it still start at the folder of `source_path`.
        """
        return yaml.dump(
            self.as_written, Dumper=Yaml12Dumper, sort_keys=False, allow_unicode=True, width=120
        )


def _sections_by_key() -> dict[str, type[RecipeSection]]:
    """Map each key that holds a section, or a list of sections, to the section's class."""
    found: dict[str, type[RecipeSection]] = {}
    queue: list[type[RecipeSection]] = [Recipe]
    for section in queue:
        for key, field in section.model_fields.items():
            for kind in _section_classes(field.annotation):
                if key not in found:
                    found[key] = kind
                    queue.append(kind)
    return found


def _section_classes(annotation: Any) -> Iterator[type[RecipeSection]]:
    if isinstance(annotation, type) and issubclass(annotation, RecipeSection):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _section_classes(inner)


SECTION_CLASSES = _sections_by_key()


MAX_LISTED_PROBLEMS = 20


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: A YAML file.
        overrides: Changes such as "training.steps=20" or "teachers.0.effort=low", in order.

    Returns:
        The recipe; `Recipe.notices` lists the old key names that it uses.

    Raises:
        RecipeError: Lists every problem, one a line, with its location and a remedy.
    """
    source = read_yaml(path)
    rename_old_keys(source)
    for change in overrides:
        apply_override(source, change, rename_override)
        rename_old_keys(source)  # an override may set a whole section
    source.data.setdefault("name", path.stem)
    recipe = _validate(resolve_values(source.data, (), source), source)
    written = _validate(source.data, source)
    if recipe is None or written is None or source.problems:
        order = {key: k for k, key in enumerate(source.locations)}
        found = sorted(source.problems.items(), key=lambda item: order[source.nearest_key(item[0])])
        problems = [problem for _, problem in found]
        lines = [str(p) for p in problems[:MAX_LISTED_PROBLEMS]]
        if more := len(problems) - len(lines):
            lines.append(f"{path}: {more:,} more mistakes -> mend these first, then validate again")
        raise problems[0] if len(problems) == 1 else RecipeError("\n".join(lines))
    recipe._source_path = path.absolute()
    recipe._as_written = written.model_dump(mode="json", exclude_none=True)
    recipe._notices = tuple(source.notices)
    return recipe


def recipe_json_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe file, for editors.

    `name` is optional there: its default is the file's name.
    """
    return Recipe.model_json_schema() | {"required": ["student", "teachers", "corpus"]}


# --- pydantic's findings as error messages ---


def _validate(data: Any, source: YamlSource) -> Recipe | None:
    try:
        # through JSON, where pydantic's strict types still accept a list for a tuple and text for
        # a date or an effort
        return Recipe.model_validate_json(json.dumps(data))
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            for path, message, remedy in _explain_error(problem):
                source.add_problem(path, message, remedy)
    return None


EXPECTED_VALUE_TEXTS = (  # start of pydantic's error type, and the expected value in words
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
    """Translate one of pydantic's findings to (key, problem, remedy) triples."""
    path = tuple(k for k in error["loc"] if k != "[key]")
    kind, context = error["type"], error.get("ctx", {})
    if kind == "default_factory_not_called" or (kind == "too_short" and error["input"]):
        return  # pydantic also reports the wrong value that this default or list depends on
    given = f"(got {_abbreviate_value(error['input'])})"
    if kind == "contradiction":
        yield from (((*path, *key), message, remedy) for key, message, remedy in context["found"])
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
    else:
        yield path, *_explain_value_error(error, path, given)


def _explain_value_error(error: ErrorDetails, path: KeyPath, given: str) -> tuple[str, str]:
    kind, context = error["type"], error.get("ctx", {})
    if kind in BOUND_TEXTS:
        bound, comparison = BOUND_TEXTS[kind]
        limit = str(context[bound]).removesuffix(".0")
        return f"should be {comparison} {limit} {given}", _key_description(path)
    if kind == "string_type" and not isinstance(error["input"], dict | list):
        return f"should be text {given}", "put it in quotes"
    if kind == "too_short":
        return "needs at least one entry", _key_description(path)
    expected = next(
        (w for start, w in EXPECTED_VALUE_TEXTS if kind.startswith(start)), error["msg"]
    )
    return f"should be {expected} {given}", _key_description(path)


def _owning_section(path: KeyPath) -> type[RecipeSection] | None:
    """Return the section that a key is a field of."""
    keys = [k for k in path[:-1] if isinstance(k, str)]
    return SECTION_CLASSES.get(keys[-1]) if keys else Recipe


def _key_description(path: KeyPath) -> str:
    """Return the description of a field, or of the field whose list or mapping has the key."""
    owner = _owning_section(path)
    found = owner.model_fields.get(str(path[-1])) if owner else None
    return str(found.description) if found else _key_description(path[:-1])


def _did_you_mean(path: KeyPath) -> str:
    """Return a remedy for an unknown key: where it belongs, or the most similar key."""
    key, owner = str(path[-1]), _owning_section(path)
    homes = [
        f"under `{name}:`"
        for name, section in SECTION_CLASSES.items()
        if key in section.model_fields
    ]
    homes += ["at the top of the file"] if key in Recipe.model_fields else []
    for section_path, renamed in RENAMED_KEYS.items():
        if key in renamed:
            names = [str(k) for k in section_path if k != "*"]
            where = f"under `{names[-1]}:`" if names else "at the top of the file"
            homes.append(f"{where} as `{renamed[key]}`")
    if homes:
        return f"it belongs {' or '.join(homes)}"
    return suggest_choice(key, list(owner.model_fields) if owner else [])


def _abbreviate_value(value: Any) -> str:
    """Return a value in at most 60 characters, secrets hidden."""
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
