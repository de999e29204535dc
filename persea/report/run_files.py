"""What a run's files say, read and checked for the page and the card: rows, and who stands where."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from persea import storage as store
from persea.chat.messages import ThinkingEffort
from persea.errors import DataError
from persea.evaluation.audition import Cast
from persea.report import svg as charts
from persea.tasks.task import PairedComparison, Score, Verdict

PAIRING_KEYS = [
    "teacher",
    "skill",
    "conversations",
    "boundary_share",
    "one_to_one_share",
    "cross_entropy_only_share",
]
SHARE_KINDS = ("positions", "loss", "gradient")  # what a teacher's skill has shares of
REPORTED_STAGES = ("check", "audition", "capture", "train", "evaluate")
UnitInterval: TypeAlias = Annotated[float, Field(ge=0, le=1 + 1e-9)]
ParsedT = TypeVar("ParsedT")


# --- what is read; keys that the page does not need are ignored ---


@dataclass(frozen=True)
class EvaluationRecord:
    student: str
    base: str
    teachers: tuple[str, ...]
    effort: ThinkingEffort
    scores: tuple[Score, ...]
    bits_per_byte: dict[str, dict[str, float]]
    compared: tuple[PairedComparison, ...]
    regressions: tuple[PairedComparison, ...]
    reference_models: tuple[str, ...] = ()

    @property
    def model_names(self) -> tuple[str, ...]:
        return (self.student, self.base, *self.teachers, *self.reference_models)

    @property
    def student_efforts(self) -> tuple[ThinkingEffort, ...]:
        """The student's, its own first."""
        mine = {s.effort for s in self.scores if s.model_name == self.student}
        return tuple(
            sorted(mine, key=lambda e: (e is not self.effort, list(ThinkingEffort).index(e)))
        )

    def mark(self, model: str) -> str:
        """What a speaker looks like in every chart and table."""
        others = (*self.teachers, *self.reference_models)
        return {self.student: "student", self.base: "base"}.get(model) or charts.teacher_mark(
            others.index(model)
        )

    def find_pair(
        self, other: str, skill: str, language: str, effort: ThinkingEffort
    ) -> PairedComparison | None:
        """The student beside another on the same items."""
        wanted = (other, skill, language, effort)
        return next(
            (
                p
                for p in self.compared
                if (p.other_model_name, p.skill, p.language, p.effort) == wanted
            ),
            None,
        )


@dataclass(frozen=True)
class GradedExample:
    model_name: str
    skill: str
    language: str
    question: str
    reference: str
    answer: str
    finish: str
    verdict: Verdict


@dataclass(frozen=True)
class GradedAnswer:
    """One answer as it was graded: what two runs are compared by."""

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
    pairs: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class CaptureRecord:
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
    """What one teacher's skill was of a step: shares of positions, loss and gradient, and what one of its positions counted for."""

    positions: UnitInterval
    weight: Annotated[float, Field(ge=0)]
    loss: UnitInterval | None = None
    gradient: UnitInterval | None = None


@dataclass(frozen=True)
class LoggedStep:
    step: int
    loss: float
    terms: dict[str, float]
    share: dict[str, UnitInterval]
    groups: dict[str, dict[str, GroupShare]] = field(default_factory=dict)

    def teacher_shares(self, kind: str) -> dict[str, float]:
        """Teacher -> its share of a kind; empty where the step does not tell it."""
        found = {
            t: [getattr(part, kind) for part in parts.values()] for t, parts in self.groups.items()
        }
        return (
            {t: sum(told) for t, told in found.items()}
            if all(None not in told for told in found.values())
            else {}
        )


@dataclass(frozen=True)
class LineageRecord:
    student: dict[str, Any]
    base: dict[str, Any]
    teachers: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class StageRecord:
    seconds: Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class RunFiles:
    """Everything the page tells of. None where a run has no folder of that stage."""

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


def _read_validated(path: Path, target_type: type[ParsedT]) -> ParsedT:
    """A JSON file, or all lines of a .jsonl, in the shape the page needs. NaN and infinity are refused: they are no results."""
    again = f"delete {path.parent} and run its stage again"
    if path.suffix == ".jsonl" and path.is_file():
        try:
            value = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
        except ValueError as error:
            raise DataError(
                f"a line is not JSON: {error}", where=str(path), remedy=again
            ) from error
    else:
        value = store.read_json(path)
    if not _is_finite(value):
        raise DataError("holds NaN or infinity", where=str(path), remedy=again)
    try:
        return TypeAdapter(target_type).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(
            f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}",
            where=str(path),
            remedy=again,
        ) from error


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def read_run_files(run_folder: Path) -> RunFiles:
    """A run folder's files, checked against each other. A stage's file may be missing only where its whole folder is."""
    recipe, lineage = run_folder / "recipe.yaml", run_folder / "lineage" / "lineage.json"
    if not recipe.is_file():
        raise DataError(
            "not there",
            where=str(recipe),
            remedy="give the folder of a run; `persea run` keeps its recipe there",
        )
    stands = [
        stage for stage in REPORTED_STAGES if stage == "evaluate" or (run_folder / stage).exists()
    ]
    files = RunFiles(
        recipe=recipe.read_text(encoding="utf-8", errors="replace"),
        evaluation=_read_validated(run_folder / "evaluate" / "evaluation.json", EvaluationRecord),
        examples=_read_validated(
            run_folder / "evaluate" / "examples.jsonl", tuple[GradedExample, ...]
        ),
        cast=_read_validated(run_folder / "audition" / "cast.json", Cast)
        if "audition" in stands
        else None,
        pairs=_read_validated(run_folder / "check" / "check.json", CheckRecord).pairs
        if "check" in stands
        else None,
        capture=_read_validated(run_folder / "capture" / "summary.json", CaptureRecord)
        if "capture" in stands
        else None,
        logged_steps=_read_validated(run_folder / "train" / "metrics.jsonl", tuple[LoggedStep, ...])
        if "train" in stands
        else None,
        lineage=_read_validated(lineage, LineageRecord),
        lineage_json=_read_validated(lineage, dict[str, Any]),
        seconds={
            stage: _read_validated(run_folder / stage / "done.json", StageRecord).seconds
            for stage in stands
        },
    )
    for name, what in _contradictions(files):
        stage = name.partition("/")[0]
        raise DataError(
            what,
            where=str(run_folder / name),
            remedy=f"delete {run_folder / stage} and run it and the stages after it again",
        )
    return files


def read_graded_answers(run_folder: Path) -> tuple[EvaluationRecord, tuple[GradedAnswer, ...]]:
    """A run's evaluation and its graded answers. Raises DataError where they are missing, broken, or nothing was answered."""
    where = run_folder / "evaluate" / "examples.jsonl"
    evaluated, said = (
        _read_validated(run_folder / "evaluate" / "evaluation.json", EvaluationRecord),
        _read_validated(where, tuple[GradedAnswer, ...]),
    )
    if not said:
        raise DataError("holds no answer", where=str(where), remedy="evaluate again")
    return evaluated, said


def _contradictions(files: RunFiles) -> Iterator[tuple[str, str]]:
    """(file, what) that cannot be true together: the page would compare what does not belong together."""
    evaluated, known, listed = (
        files.evaluation,
        set(files.evaluation.teachers),
        {t.get("name") for t in files.lineage.teachers},
    )
    if not known or len(set(evaluated.model_names)) < len(evaluated.model_names):
        yield "evaluate/evaluation.json", "student, base and teachers need a name each"
    for s in evaluated.scores:
        if not -1e-9 <= s.low <= s.value + 1e-9 <= s.high + 2e-9 <= 1 + 3e-9:
            yield (
                "evaluate/evaluation.json",
                f"{s.model_name} on {s.skill}: {s.value} is not inside its interval {s.low} to {s.high}",
            )
    for p in (*evaluated.compared, *evaluated.regressions):
        if p.model_name != evaluated.student or p.other_model_name not in evaluated.model_names:
            yield (
                "evaluate/evaluation.json",
                f"{p.model_name} is compared with {p.other_model_name}, which is not the student and another speaker",
            )
        if not -1 - 1e-9 <= p.low <= p.difference + 1e-9 <= p.high + 2e-9 <= 1 + 3e-9:
            yield (
                "evaluate/evaluation.json",
                f"{p.other_model_name} on {p.skill}: a difference of {p.difference} is not inside {p.low} to {p.high}",
            )
    if len({(s.model_name, s.skill, s.language, s.effort) for s in evaluated.scores}) < len(
        evaluated.scores
    ):
        yield "evaluate/evaluation.json", "a speaker has two scores on one skill"
    if files.logged_steps is not None and not files.logged_steps:
        yield "train/metrics.jsonl", "no step is logged"
    for line in files.logged_steps or ():
        for kind, shares in (
            ("positions", line.share),
            *((kind, line.teacher_shares(kind)) for kind in SHARE_KINDS),
        ):
            if sum(shares.values()) > 1 + 1e-6:
                yield (
                    "train/metrics.jsonl",
                    f"the shares of {kind} of step {line.step} are more than one together",
                )
    if files.pairs is not None and not files.pairs:
        yield "check/check.json", "no pair was checked"
    for pair in files.pairs or ():
        if any(k not in pair for k in PAIRING_KEYS) or not all(
            isinstance(pair[k], int | float) and 0 <= pair[k] <= 1 + 1e-9 for k in PAIRING_KEYS[3:]
        ):
            yield (
                "check/check.json",
                f"{pair.get('teacher')} on {pair.get('skill')}: needs {', '.join(PAIRING_KEYS[3:])}, shares from 0 to 1",
            )
    named = {
        "audition/cast.json": {t for part in files.cast.parts.values() for t, _ in part}
        if files.cast
        else set(),
        "capture/summary.json": set(files.capture.teachers) if files.capture else set(),
        "train/metrics.jsonl": {
            t for line in files.logged_steps or () for t in (*line.share, *line.groups)
        },
    }
    for name, teachers in named.items():
        if teachers - known:
            yield name, f"{', '.join(sorted(teachers - known))} teaches, and was not evaluated"
    if known - listed:
        yield (
            "lineage/lineage.json",
            f"{', '.join(sorted(known - listed))} was evaluated as a teacher, and has no line here",
        )


# --- what is found ---


class IntervalOrder(StrEnum):
    """Two speakers beside each other, with 95 % confidence. OVERLAPS: these measurements do not tell the two apart."""

    ABOVE = "above"
    OVERLAPS = "overlaps"
    BELOW = "below"


def score_order(one: Score, other: Score) -> IntervalOrder:
    """Of two intervals: teachers among themselves."""
    return (
        IntervalOrder.ABOVE
        if one.low > other.high
        else IntervalOrder.BELOW
        if one.high < other.low
        else IntervalOrder.OVERLAPS
    )


def difference_order(pair: PairedComparison) -> IntervalOrder:
    """Of the interval of the difference on the same items: the student beside another."""
    return (
        IntervalOrder.ABOVE
        if pair.low > 0
        else IntervalOrder.BELOW
        if pair.high < 0
        else IntervalOrder.OVERLAPS
    )


@dataclass(frozen=True)
class SkillComparison:
    """One skill: every speaker's score, who teaches it best (the first of equals), and the student beside best and base on the same items."""

    skill: str
    student: Score
    base: Score
    teachers: tuple[Score, ...]
    reference_models: tuple[Score, ...]
    versus_best: PairedComparison
    versus_base: PairedComparison

    @property
    def best_teacher(self) -> Score:
        return _best_score(self.teachers)

    @property
    def retained(self) -> float | None:
        return self.student.value / self.best_teacher.value if self.best_teacher.value else None

    @property
    def gap_closed(self) -> float | None:
        """How much of the way from base to best teacher the student went; None where the best teacher is not ahead of the base."""
        way = self.best_teacher.value - self.base.value
        return (self.student.value - self.base.value) / way if way > 0 else None

    @property
    def scores(self) -> tuple[Score, ...]:
        return (self.student, self.base, *self.teachers, *self.reference_models)


def _best_score(teachers: Sequence[Score]) -> Score:
    return max(teachers, key=lambda s: s.value)


def compare_skills(evaluation: EvaluationRecord, where: str) -> tuple[SkillComparison, ...]:
    """One row a skill, in the order measured. Raises DataError where a speaker was not measured or compared, or asked nothing."""
    found = []
    for skill in dict.fromkeys(s.skill for s in evaluation.scores):
        scores = [_pick_score(evaluation, name, skill, "") for name in evaluation.model_names]
        lacking = [
            name
            for name, s in zip(evaluation.model_names, scores, strict=True)
            if s is None or s.n == 0
        ]
        if lacking:
            raise DataError(
                f"{', '.join(lacking)} has no score on {skill}",
                where=where,
                remedy="evaluate every speaker on every skill",
            )
        student, base, *others = (s for s in scores if s is not None)
        teachers, yardsticks = (
            tuple(others[: len(evaluation.teachers)]),
            tuple(others[len(evaluation.teachers) :]),
        )
        pairs = [
            evaluation.find_pair(other, skill, "", evaluation.effort)
            for other in (_best_score(teachers).model_name, evaluation.base)
        ]
        if None in pairs:
            raise DataError(
                f"the student is not compared on {skill} with its base and its best teacher",
                where=where,
                remedy="run evaluate again",
            )
        found.append(
            SkillComparison(skill, student, base, teachers, yardsticks, *(p for p in pairs if p))
        )
    if not found:
        raise DataError(
            "no skill was measured",
            where=where,
            remedy="name skills under evaluation: in the recipe and run evaluate again",
        )
    return tuple(found)


def _pick_score(
    evaluation: EvaluationRecord, model: str, skill: str, language: str
) -> Score | None:
    """The score at the evaluation's effort; a speaker that was not measured at it (a teacher's own dial) counts with the first measured, its own."""
    mine = [
        s
        for s in evaluation.scores
        if (s.model_name, s.skill, s.language) == (model, skill, language)
    ]
    return next((s for s in mine if s.effort is evaluation.effort), mine[0] if mine else None)


def scores_by_language(evaluation: EvaluationRecord) -> dict[str, dict[str, dict[str, Score]]]:
    """Skill -> language -> speaker -> score, of skills asked in more than one language."""
    table: dict[str, dict[str, dict[str, Score]]] = {}
    for skill, language in sorted({(s.skill, s.language) for s in evaluation.scores if s.language}):
        scores = {
            name: _pick_score(evaluation, name, skill, language) for name in evaluation.model_names
        }
        table.setdefault(skill, {})[language] = {
            name: s for name, s in scores.items() if s is not None
        }
    return {skill: languages for skill, languages in table.items() if len(languages) > 1}


def scores_by_effort(
    evaluation: EvaluationRecord,
) -> dict[str, dict[str, dict[ThinkingEffort, Score]]]:
    """Skill -> speaker -> effort -> score, where anybody was measured at more than one."""
    found: dict[str, dict[str, dict[ThinkingEffort, Score]]] = {}
    for s in evaluation.scores:
        if not s.language:
            found.setdefault(s.skill, {}).setdefault(s.model_name, {})[s.effort] = s
    return (
        found if any(len(mine) > 1 for table in found.values() for mine in table.values()) else {}
    )
