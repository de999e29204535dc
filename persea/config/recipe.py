"""The recipe: the one YAML file that describes a run, validated before anything is loaded, hashed.

All mistakes in the file are reported at once, each with line, column and remedy. No value is
converted to another type, unknown keys are refused, and no environment variables are read except
`ALLOWED_ENV_VARS`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, Self, TypeAlias

import yaml
from pydantic import Field, PrivateAttr, ValidationError, model_validator

from persea.chat.messages import PINNED_DATE
from persea.config.plan_section import PlanSection
from persea.config.recipe_problems import explain_error, sections_by_key
from persea.config.release_section import LicenceDecisions, decision_contradictions
from persea.config.renamed_keys import rename_old_keys, rename_override
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
    ExecutorSection,
    RecipeSection,
    ReleaseSection,
    StudentSection,
    TaskSection,
    TeacherSection,
    TrainingSection,
    check_contradictions,
)
from persea.config.size_defaults import unset_size_keys
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

UNHASHED = ("executor", "plan")  # sections that change no result
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
    tasks: tuple[TaskSection, ...] = Field(
        default=(), description="questions of your own that measure a skill"
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
    executor: ExecutorSection = Field(
        default=ExecutorSection(), description="where the teachers run; no part of the hash"
    )
    plan: PlanSection | None = Field(
        default=None, description="what `persea plan` assumes; no part of the hash"
    )
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
            *self._plan_contradictions(),
        )

    def _plan_contradictions(self) -> Contradictions:
        skills = sorted(set(self.skills))
        return [
            (
                skill not in skills,
                ("plan", "expect", skill),
                f"no part of the corpus teaches {skill!r}",
                suggest_choice(skill, skills),
            )
            for skill in (self.plan.expect if self.plan else ())
        ]

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
        judged = [k for k, task in enumerate(self.tasks) if task.metric == "judge" and not name]
        judge = next((t for t in self.teachers if t.name == name), None)
        return [
            *(
                (
                    True,
                    ("tasks", k, "metric"),
                    "judge, but `evaluation.judge` names no model",
                    "write `evaluation: {judge: NAME}`, a teacher with `reference: true`",
                )
                for k in judged
            ),
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
        return self._as_written or _dump_as_written(self)

    @property
    def hash(self) -> str:
        """SHA-256 of `as_written`, which key order, comments and written defaults do not change.

        A written default of a key that follows the student's size does: the size may give another.
        The sections `executor` and `plan` change no result, and are left out.
        """
        hashed = {key: value for key, value in self.as_written.items() if key not in UNHASHED}
        return hashlib.sha256(
            json.dumps(hashed, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

    def to_yaml(self) -> str:
        """Return `as_written` as a recipe with the same hash.

        Relative paths in it still start at the folder of `source_path`.
        """
        return yaml.dump(
            self.as_written, Dumper=Yaml12Dumper, sort_keys=False, allow_unicode=True, width=120
        )


SECTION_CLASSES = sections_by_key(Recipe)


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
    recipe._as_written = _dump_as_written(written)
    recipe._notices = tuple(source.notices)
    return recipe


def _dump_as_written(recipe: Recipe) -> dict[str, Any]:
    """Return all fields, without those that are left to the student's size."""
    training: dict[str, Any] = dict.fromkeys(unset_size_keys(recipe.training), True)
    if "steps" in training and "log_every" not in recipe.training.model_fields_set:
        training["log_every"] = True  # its default follows `steps`
    if recipe.training.on_policy:
        training["on_policy"] = unset_size_keys(recipe.training.on_policy)
    unset: dict[str, Any] = {
        "student": unset_size_keys(recipe.student),
        "capture": unset_size_keys(recipe.capture),
        "training": training,
        "evaluation": unset_size_keys(recipe.evaluation),
    }
    written: dict[str, Any] = recipe.model_dump(mode="json", exclude_none=True, exclude=unset)
    if recipe.executor == ExecutorSection():  # recipes without the section stay as they were
        del written["executor"]
    return written


def recipe_json_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe file, for editors.

    `name` is optional there: its default is the file's name.
    """
    return Recipe.model_json_schema() | {"required": ["student", "teachers", "corpus"]}


def _validate(data: Any, source: YamlSource) -> Recipe | None:
    try:
        # through JSON, where pydantic's strict types still accept a list for a tuple and text for
        # a date or an effort
        return Recipe.model_validate_json(json.dumps(data))
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            for path, message, remedy in explain_error(problem, Recipe):
                source.add_problem(path, message, remedy)
    return None
