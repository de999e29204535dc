"""Read and check the files of a run folder that the report is made of.

Keys that the report does not need are ignored. A file that is broken, holds NaN, contradicts
another file, or was written by another version of persea is refused with the stage to run again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from persea import storage
from persea.chat.messages import ThinkingEffort
from persea.errors import DataError
from persea.evaluation.audition import Cast
from persea.report import svg as charts
from persea.tasks.task import PairedComparison, Score, Verdict

# Shares of a pair in check.json that every pair must have, each in 0..1.
PAIR_SHARE_KEYS = ("boundary_share", "one_to_one_share", "cross_entropy_only_share")
PAIRING_KEYS = ["teacher", "skill", "conversations", *PAIR_SHARE_KEYS]
SHARE_KINDS = ("positions", "loss", "gradient")  # quantities that teachers have shares of
REPORTED_STAGES = ("check", "audition", "capture", "train", "evaluate")
ROUNDING = 1e-9  # slack for values that were rounded when they were written
SHARE_SUM_ROUNDING = 1e-6  # slack for sums of shares
UnitInterval: TypeAlias = Annotated[float, Field(ge=0, le=1 + ROUNDING)]
ParsedT = TypeVar("ParsedT")


# --- records ---


@dataclass(frozen=True)
class EvaluationRecord:
    """evaluate/evaluation.json. Teachers and reference models are in the recipe's order."""

    student: str
    base: str
    teachers: tuple[str, ...]
    reference_models: tuple[str, ...]
    effort: ThinkingEffort
    scores: tuple[Score, ...]
    bits_per_byte: dict[str, dict[str, float]]
    compared: tuple[PairedComparison, ...]
    regressions: tuple[PairedComparison, ...]
    not_asked: tuple[str, ...] = ()

    @property
    def asked_models(self) -> tuple[str, ...]:
        """The models that answered questions: all but those without a chat template."""
        return tuple(name for name in self.model_names if name not in self.not_asked)

    @property
    def model_names(self) -> tuple[str, ...]:
        """Student, base, teachers, reference models."""
        return (self.student, self.base, *self.teachers, *self.reference_models)

    @property
    def student_efforts(self) -> tuple[ThinkingEffort, ...]:
        """Efforts at which the student was measured, its own first."""
        efforts = {s.effort for s in self.scores if s.model_name == self.student}
        return tuple(
            sorted(efforts, key=lambda e: (e is not self.effort, list(ThinkingEffort).index(e)))
        )

    def mark(self, model: str) -> str:
        """Return the marker of a model, the same in every chart and table."""
        others = (*self.teachers, *self.reference_models)
        return {self.student: "student", self.base: "base"}.get(model) or charts.teacher_mark(
            others.index(model)
        )

    def find_pair(
        self, other: str, skill: str, language: str, effort: ThinkingEffort
    ) -> PairedComparison | None:
        """Return the comparison of the student with another model on the same items."""
        key = (other, skill, language, effort)
        return next(
            (
                p
                for p in self.compared
                if (p.other_model_name, p.skill, p.language, p.effort) == key
            ),
            None,
        )


@dataclass(frozen=True)
class GradedExample:
    """A line of evaluate/examples.jsonl, for the page."""

    id: str
    model_name: str
    skill: str
    language: str
    question: str
    reference: str
    answer: str
    finish: str
    verdict: Verdict
    calls: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class GradedAnswer:
    """A line of evaluate/examples.jsonl, for the comparison of two runs."""

    id: str
    model_name: str
    skill: str
    language: str
    effort: ThinkingEffort
    question: str
    reference: str
    value: UnitInterval


@dataclass(frozen=True)
class CheckRecord:
    """check/check.json: one dictionary for each pair of teacher and skill."""

    pairs: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class CaptureRecord:
    """capture/summary.json: counts of prompts, answers, tokens, positions and stored
    log-probabilities.
    """

    prompts: int
    kept: int
    tokens: int
    positions: int
    entries: int
    bytes: int
    teachers: dict[str, dict[str, float]]
    left_out: dict[str, int] = field(default_factory=dict)
    removed: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupShare:
    """Shares of one teacher's skill in a step; `weight` is the factor of one of its positions."""

    positions: UnitInterval
    weight: Annotated[float, Field(ge=0)]
    loss: UnitInterval | None = None
    gradient: UnitInterval | None = None


@dataclass(frozen=True)
class LoggedStep:
    """A line of train/metrics.jsonl. `share` is each teacher's share of the positions."""

    step: int
    loss: float
    terms: dict[str, float]
    share: dict[str, UnitInterval]
    groups: dict[str, dict[str, GroupShare]] = field(default_factory=dict)

    def teacher_shares(self, kind: str) -> dict[str, float]:
        """Return teacher -> share of a kind; empty if the step does not log that kind."""
        shares = {
            t: [getattr(part, kind) for part in parts.values()] for t, parts in self.groups.items()
        }
        is_logged = all(None not in values for values in shares.values())
        return {t: sum(values) for t, values in shares.items()} if is_logged else {}


@dataclass(frozen=True)
class LineageRecord:
    """lineage/lineage.json: the student and its parents."""

    student: dict[str, Any]
    base: dict[str, Any]
    teachers: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class StageRecord:
    """done.json of a stage."""

    seconds: Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class RunFiles:
    """Everything that the page shows. None if the run has no folder of that stage."""

    recipe: str
    evaluation: EvaluationRecord
    examples: tuple[GradedExample, ...]
    cast: Cast | None
    pairs: tuple[dict[str, Any], ...] | None
    capture: CaptureRecord | None
    logged_steps: tuple[LoggedStep, ...] | None
    lineage: LineageRecord
    lineage_json: dict[str, Any]  # the lineage as it was written
    seconds: dict[str, float]


# --- reading ---


def validation_error(error: ValidationError, path: Path) -> DataError:
    """Return the refusal of a file whose content has not the form that this version of persea
    writes.

    Args:
        error: The error of pydantic.
        path: The file.

    Returns:
        An error of one line that names the field, the file and the stage to run again.
    """
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"])) or "the file"
    problem = first["msg"]
    if first["type"] in ("missing", "missing_argument"):
        problem = "missing: another version of persea wrote this file"
    return DataError(f"{key}: {problem}", where=str(path), remedy=rerun_remedy(path))


def rerun_remedy(path: Path) -> str:
    """Return the remedy for a broken file of a stage; it keeps what was paid for.

    A stage with a missing file is not up to date, and resumes from its units and checkpoints.
    """
    return f"delete {path} and run the recipe again into this folder: units and checkpoints stay"


def _read_validated(path: Path, target_type: type[ParsedT]) -> ParsedT:
    """Read a JSON file, or all lines of a .jsonl, as a type. NaN and infinity are refused."""
    remedy = rerun_remedy(path)
    if path.suffix == ".jsonl" and path.is_file():
        try:
            value = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
        except ValueError as error:
            raise DataError(
                f"a line is not JSON: {error}", where=str(path), remedy=remedy
            ) from error
    else:
        value = storage.read_json(path)
    if not _is_finite(value):
        raise DataError("holds NaN or infinity", where=str(path), remedy=remedy)
    try:
        return TypeAdapter(target_type).validate_python(value)
    except ValidationError as error:
        raise validation_error(error, path) from error


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def read_run_files(run_folder: Path) -> RunFiles:
    """Read the files of a run and check them against each other.

    A file of a stage may be missing only if the whole folder of the stage is.

    Args:
        run_folder: The folder of the run.

    Returns:
        The content of the files.

    Raises:
        DataError: If a file is missing, broken, of another version, or contradicts another.
    """
    recipe, lineage = run_folder / "recipe.yaml", run_folder / "lineage" / "lineage.json"
    if not recipe.is_file():
        raise DataError(
            "not there",
            where=str(recipe),
            remedy="give the folder of a run; `persea run` writes its recipe there",
        )
    stages = [
        stage for stage in REPORTED_STAGES if stage == "evaluate" or (run_folder / stage).exists()
    ]

    def read(stage: str, name: str, target_type: type[ParsedT]) -> ParsedT | None:
        path = run_folder / stage / name
        return _read_validated(path, target_type) if stage in stages else None

    check = read("check", "check.json", CheckRecord)
    evaluate = run_folder / "evaluate"
    files = RunFiles(
        recipe=recipe.read_text(encoding="utf-8", errors="replace"),
        evaluation=_read_validated(evaluate / "evaluation.json", EvaluationRecord),
        examples=_read_validated(evaluate / "examples.jsonl", tuple[GradedExample, ...]),
        cast=read("audition", "cast.json", Cast),
        pairs=check.pairs if check else None,
        capture=read("capture", "summary.json", CaptureRecord),
        logged_steps=read("train", "metrics.jsonl", tuple[LoggedStep, ...]),
        lineage=_read_validated(lineage, LineageRecord),
        lineage_json=_read_validated(lineage, dict[str, Any]),
        seconds={
            stage: _read_validated(run_folder / stage / "done.json", StageRecord).seconds
            for stage in stages
        },
    )
    for name, message in _contradictions(files):
        path = run_folder / name
        raise DataError(message, where=str(path), remedy=rerun_remedy(path))
    return files


def read_graded_answers(run_folder: Path) -> tuple[EvaluationRecord, tuple[GradedAnswer, ...]]:
    """Read the evaluation of a run and its graded answers.

    Raises:
        DataError: If a file is missing, broken or of another version, or holds no answer.
    """
    where = run_folder / "evaluate" / "examples.jsonl"
    evaluation = _read_validated(run_folder / "evaluate" / "evaluation.json", EvaluationRecord)
    answers = _read_validated(where, tuple[GradedAnswer, ...])
    if not answers:
        if (run_folder / "evaluate" / "texts.json").is_file():
            raise DataError(
                "the run was measured on held-out texts alone, and answers are compared",
                where=str(where),
                remedy="compare evaluate/texts.json of both runs, or set "
                "evaluation.generated_tasks: true",
            )
        raise DataError("holds no answer", where=str(where), remedy="run evaluate again")
    return evaluation, answers


# --- contradictions: each check yields (file, message) ---


def _contradictions(files: RunFiles) -> Iterator[tuple[str, str]]:
    for message in _evaluation_contradictions(files.evaluation):
        yield "evaluate/evaluation.json", message
    for message in _training_contradictions(files.logged_steps):
        yield "train/metrics.jsonl", message
    for message in _check_contradictions(files.pairs):
        yield "check/check.json", message
    yield from _unknown_teachers(files)


def _evaluation_contradictions(evaluation: EvaluationRecord) -> Iterator[str]:
    names = evaluation.model_names
    if not evaluation.teachers or len(set(names)) < len(names):
        yield "student, base and teachers need different names"
    for s in evaluation.scores:
        if not _is_inside(s.value, s.low, s.high, 0):
            yield (
                f"{s.model_name} on {s.skill}: "
                f"{s.value} is not inside its interval {s.low} to {s.high}"
            )
    for p in (*evaluation.compared, *evaluation.regressions):
        if p.model_name != evaluation.student or p.other_model_name not in names:
            yield (
                f"{p.model_name} is compared with {p.other_model_name}, "
                "but every comparison must be of the student with another model"
            )
        if not _is_inside(p.difference, p.low, p.high, -1):
            yield (
                f"{p.other_model_name} on {p.skill}: "
                f"a difference of {p.difference} is not inside {p.low} to {p.high}"
            )
    keys = [(s.model_name, s.skill, s.language, s.effort) for s in evaluation.scores]
    if len(set(keys)) < len(keys):
        yield "a model has two scores on one skill"


def _is_inside(value: float, low: float, high: float, lowest: float) -> bool:
    """Whether lowest <= low <= value <= high <= 1, but for rounding."""
    return lowest - ROUNDING <= low <= value + ROUNDING <= high + 2 * ROUNDING <= 1 + 3 * ROUNDING


def _training_contradictions(steps: tuple[LoggedStep, ...] | None) -> Iterator[str]:
    if steps is not None and not steps:
        yield "no step is logged"
    for line in steps or ():
        for kind, shares in (
            ("positions", line.share),
            *((kind, line.teacher_shares(kind)) for kind in SHARE_KINDS),
        ):
            if sum(shares.values()) > 1 + SHARE_SUM_ROUNDING:
                yield f"the shares of {kind} of step {line.step} add up to more than 1"


def _check_contradictions(pairs: tuple[dict[str, Any], ...] | None) -> Iterator[str]:
    if pairs is not None and not pairs:
        yield "no pair was checked"
    for pair in pairs or ():
        shares = [pair.get(k) for k in PAIR_SHARE_KEYS]
        if any(k not in pair for k in PAIRING_KEYS) or not all(
            isinstance(x, int | float) and 0 <= x <= 1 + ROUNDING for x in shares
        ):
            yield (
                f"{pair.get('teacher')} on {pair.get('skill')}: "
                f"needs {', '.join(PAIR_SHARE_KEYS)}, shares from 0 to 1"
            )


def _unknown_teachers(files: RunFiles) -> Iterator[tuple[str, str]]:
    """Yield teachers of other stages without an evaluation, and evaluated teachers without a
    lineage.
    """
    evaluated = set(files.evaluation.teachers)
    in_lineage = {t.get("name") for t in files.lineage.teachers}
    cast_teachers = files.cast.parts.values() if files.cast else ()
    by_file = {
        "audition/cast.json": {t for part in cast_teachers for t, _ in part},
        "capture/summary.json": set(files.capture.teachers) if files.capture else set(),
        "train/metrics.jsonl": {
            t for line in files.logged_steps or () for t in (*line.share, *line.groups)
        },
    }
    for name, teachers in by_file.items():
        if teachers - evaluated:
            yield name, f"{', '.join(sorted(teachers - evaluated))} teaches, but was not evaluated"
    if evaluated - in_lineage:
        yield (
            "lineage/lineage.json",
            f"{', '.join(sorted(evaluated - in_lineage))} was evaluated as a teacher, "
            "but has no entry here",
        )
