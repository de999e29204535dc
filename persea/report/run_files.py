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
from persea.chat.messages import Effort
from persea.errors import DataError
from persea.evaluation.audition import Cast
from persea.report import svg as charts
from persea.tasks.task import Paired, Score, Verdict

PAIR = ["teacher", "skill", "conversations", "boundary", "one_to_one", "cross_entropy_only"]
PARTS = ("positions", "loss", "gradient")  # what a teacher's skill has shares of
STAGES = ("check", "audition", "capture", "train", "evaluate")
Share: TypeAlias = Annotated[float, Field(ge=0, le=1 + 1e-9)]
Shape = TypeVar("Shape")


# --- what is read; keys that the page does not need are ignored ---


@dataclass(frozen=True)
class Evaluated:
    student: str
    base: str
    teachers: tuple[str, ...]
    effort: Effort
    scores: tuple[Score, ...]
    bits_per_byte: dict[str, dict[str, float]]
    compared: tuple[Paired, ...]
    regressions: tuple[Paired, ...]
    yardsticks: tuple[str, ...] = ()

    @property
    def speakers(self) -> tuple[str, ...]:
        return (self.student, self.base, *self.teachers, *self.yardsticks)

    @property
    def efforts(self) -> tuple[Effort, ...]:
        """The student's, its own first."""
        mine = {s.effort for s in self.scores if s.speaker == self.student}
        return tuple(sorted(mine, key=lambda e: (e is not self.effort, list(Effort).index(e))))

    def mark(self, speaker: str) -> str:
        """What a speaker looks like in every chart and table."""
        others = (*self.teachers, *self.yardsticks)
        return {self.student: "student", self.base: "base"}.get(speaker) or charts.teacher_mark(others.index(speaker))

    def pair(self, other: str, skill: str, language: str, effort: Effort) -> Paired | None:
        """The student beside another on the same items."""
        wanted = (other, skill, language, effort)
        return next((p for p in self.compared if (p.other, p.skill, p.language, p.effort) == wanted), None)


@dataclass(frozen=True)
class Example:
    speaker: str
    skill: str
    language: str
    question: str
    reference: str
    answer: str
    finish: str
    verdict: Verdict


@dataclass(frozen=True)
class Said:
    """One answer as it was graded: what two runs are compared by."""

    id: str
    speaker: str
    skill: str
    language: str
    effort: Effort
    question: str
    reference: str
    value: Share


@dataclass(frozen=True)
class Checked:
    pairs: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Captured:
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
class Part:
    """What one teacher's skill was of a step: shares of positions, loss and gradient, and what one of its positions counted for."""

    positions: Share
    weight: Annotated[float, Field(ge=0)]
    loss: Share | None = None
    gradient: Share | None = None


@dataclass(frozen=True)
class Logged:
    step: int
    loss: float
    terms: dict[str, float]
    share: dict[str, Share]
    groups: dict[str, dict[str, Part]] = field(default_factory=dict)

    def shares(self, kind: str) -> dict[str, float]:
        """teacher -> its share of a kind; empty where the step does not tell it."""
        found = {t: [getattr(part, kind) for part in parts.values()] for t, parts in self.groups.items()}
        return {t: sum(told) for t, told in found.items()} if all(None not in told for told in found.values()) else {}


@dataclass(frozen=True)
class Lineage:
    student: dict[str, Any]
    base: dict[str, Any]
    teachers: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Done:
    seconds: Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Files:
    """Everything the page tells of. None where a run has no folder of that stage."""

    recipe: str
    evaluated: Evaluated
    examples: tuple[Example, ...]
    cast: Cast | None
    pairs: tuple[dict[str, Any], ...] | None
    captured: Captured | None
    logged: tuple[Logged, ...] | None
    lineage: Lineage
    record: dict[str, Any]  # the lineage as it was written
    seconds: dict[str, float]


def _read(path: Path, shape: type[Shape]) -> Shape:
    """A JSON file, or all lines of a .jsonl, in the shape the page needs. NaN and infinity are refused: they are no results."""
    again = f"delete {path.parent} and run its stage again"
    if path.suffix == ".jsonl" and path.is_file():
        try:
            value = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
        except ValueError as error:
            raise DataError(f"a line is not JSON: {error}", where=str(path), remedy=again) from error
    else:
        value = store.read_json(path)
    if not _finite(value):
        raise DataError("holds NaN or infinity", where=str(path), remedy=again)
    try:
        return TypeAdapter(shape).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}", where=str(path), remedy=again) from error


def _finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def read(run: Path) -> Files:
    """A run folder's files, checked against each other. A stage's file may be missing only where its whole folder is."""
    recipe, lineage = run / "recipe.yaml", run / "lineage" / "lineage.json"
    if not recipe.is_file():
        raise DataError("not there", where=str(recipe), remedy="give the folder of a run; `persea run` keeps its recipe there")
    stands = [stage for stage in STAGES if stage == "evaluate" or (run / stage).exists()]
    files = Files(
        recipe=recipe.read_text(encoding="utf-8", errors="replace"),
        evaluated=_read(run / "evaluate" / "evaluation.json", Evaluated),
        examples=_read(run / "evaluate" / "examples.jsonl", tuple[Example, ...]),
        cast=_read(run / "audition" / "cast.json", Cast) if "audition" in stands else None,
        pairs=_read(run / "check" / "check.json", Checked).pairs if "check" in stands else None,
        captured=_read(run / "capture" / "summary.json", Captured) if "capture" in stands else None,
        logged=_read(run / "train" / "metrics.jsonl", tuple[Logged, ...]) if "train" in stands else None,
        lineage=_read(lineage, Lineage), record=_read(lineage, dict[str, Any]),
        seconds={stage: _read(run / stage / "done.json", Done).seconds for stage in stands})
    for name, what in _contradictions(files):
        stage = name.partition("/")[0]
        raise DataError(what, where=str(run / name), remedy=f"delete {run / stage} and run it and the stages after it again")
    return files


def read_answers(run: Path) -> tuple[Evaluated, tuple[Said, ...]]:
    """A run's evaluation and its graded answers. Raises DataError where they are missing, broken, or nothing was answered."""
    where = run / "evaluate" / "examples.jsonl"
    evaluated, said = _read(run / "evaluate" / "evaluation.json", Evaluated), _read(where, tuple[Said, ...])
    if not said:
        raise DataError("holds no answer", where=str(where), remedy="evaluate again")
    return evaluated, said


def _contradictions(files: Files) -> Iterator[tuple[str, str]]:
    """(file, what) that cannot be true together: the page would compare what does not belong together."""
    evaluated, known, listed = files.evaluated, set(files.evaluated.teachers), {t.get("name") for t in files.lineage.teachers}
    if not known or len(set(evaluated.speakers)) < len(evaluated.speakers):
        yield "evaluate/evaluation.json", "student, base and teachers need a name each"
    for s in evaluated.scores:
        if not -1e-9 <= s.low <= s.value + 1e-9 <= s.high + 2e-9 <= 1 + 3e-9:
            yield "evaluate/evaluation.json", f"{s.speaker} on {s.skill}: {s.value} is not inside its interval {s.low} to {s.high}"
    for p in (*evaluated.compared, *evaluated.regressions):
        if p.speaker != evaluated.student or p.other not in evaluated.speakers:
            yield "evaluate/evaluation.json", f"{p.speaker} is compared with {p.other}, which is not the student and another speaker"
        if not -1 - 1e-9 <= p.low <= p.difference + 1e-9 <= p.high + 2e-9 <= 1 + 3e-9:
            yield "evaluate/evaluation.json", f"{p.other} on {p.skill}: a difference of {p.difference} is not inside {p.low} to {p.high}"
    if len({(s.speaker, s.skill, s.language, s.effort) for s in evaluated.scores}) < len(evaluated.scores):
        yield "evaluate/evaluation.json", "a speaker has two scores on one skill"
    if files.logged is not None and not files.logged:
        yield "train/metrics.jsonl", "no step is logged"
    for line in files.logged or ():
        for kind, shares in (("positions", line.share), *((kind, line.shares(kind)) for kind in PARTS)):
            if sum(shares.values()) > 1 + 1e-6:
                yield "train/metrics.jsonl", f"the shares of {kind} of step {line.step} are more than one together"
    if files.pairs is not None and not files.pairs:
        yield "check/check.json", "no pair was checked"
    for pair in files.pairs or ():
        if any(k not in pair for k in PAIR) or not all(isinstance(pair[k], int | float) and 0 <= pair[k] <= 1 + 1e-9 for k in PAIR[3:]):
            yield "check/check.json", f"{pair.get('teacher')} on {pair.get('skill')}: needs {', '.join(PAIR[3:])}, shares from 0 to 1"
    named = {"audition/cast.json": {t for part in files.cast.parts.values() for t, _ in part} if files.cast else set(),
             "capture/summary.json": set(files.captured.teachers) if files.captured else set(),
             "train/metrics.jsonl": {t for line in files.logged or () for t in (*line.share, *line.groups)}}
    for name, teachers in named.items():
        if teachers - known:
            yield name, f"{', '.join(sorted(teachers - known))} teaches, and was not evaluated"
    if known - listed:
        yield "lineage/lineage.json", f"{', '.join(sorted(known - listed))} was evaluated as a teacher, and has no line here"


# --- what is found ---


class Standing(StrEnum):
    """Two speakers beside each other, with 95 % confidence. OVERLAPS: these measurements do not tell the two apart."""

    ABOVE = "above"
    OVERLAPS = "overlaps"
    BELOW = "below"


def standing(one: Score, other: Score) -> Standing:
    """Of two intervals: teachers among themselves."""
    return Standing.ABOVE if one.low > other.high else Standing.BELOW if one.high < other.low else Standing.OVERLAPS


def stands(pair: Paired) -> Standing:
    """Of the interval of the difference on the same items: the student beside another."""
    return Standing.ABOVE if pair.low > 0 else Standing.BELOW if pair.high < 0 else Standing.OVERLAPS


@dataclass(frozen=True)
class Row:
    """One skill: every speaker's score, who teaches it best (the first of equals), and the student beside best and base on the same items."""

    skill: str
    student: Score
    base: Score
    teachers: tuple[Score, ...]
    yardsticks: tuple[Score, ...]
    beside_best: Paired
    beside_base: Paired

    @property
    def best(self) -> Score:
        return _best(self.teachers)

    @property
    def retained(self) -> float | None:
        return self.student.value / self.best.value if self.best.value else None

    @property
    def closed(self) -> float | None:
        """How much of the way from base to best teacher the student went; None where the best teacher is not ahead of the base."""
        way = self.best.value - self.base.value
        return (self.student.value - self.base.value) / way if way > 0 else None

    @property
    def scores(self) -> tuple[Score, ...]:
        return (self.student, self.base, *self.teachers, *self.yardsticks)


def _best(teachers: Sequence[Score]) -> Score:
    return max(teachers, key=lambda s: s.value)


def rows(evaluated: Evaluated, where: str) -> tuple[Row, ...]:
    """One row a skill, in the order measured. Raises DataError where a speaker was not measured or compared, or asked nothing."""
    found = []
    for skill in dict.fromkeys(s.skill for s in evaluated.scores):
        scores = [_pick(evaluated, name, skill, "") for name in evaluated.speakers]
        lacking = [name for name, s in zip(evaluated.speakers, scores, strict=True) if s is None or s.n == 0]
        if lacking:
            raise DataError(f"{', '.join(lacking)} has no score on {skill}", where=where, remedy="evaluate every speaker on every skill")
        student, base, *others = (s for s in scores if s is not None)
        teachers, yardsticks = tuple(others[:len(evaluated.teachers)]), tuple(others[len(evaluated.teachers):])
        pairs = [evaluated.pair(other, skill, "", evaluated.effort) for other in (_best(teachers).speaker, evaluated.base)]
        if None in pairs:
            raise DataError(f"the student is not compared on {skill} with its base and its best teacher", where=where, remedy="run evaluate again")
        found.append(Row(skill, student, base, teachers, yardsticks, *(p for p in pairs if p)))
    if not found:
        raise DataError("no skill was measured", where=where, remedy="name skills under evaluation: in the recipe and run evaluate again")
    return tuple(found)


def _pick(evaluated: Evaluated, speaker: str, skill: str, language: str) -> Score | None:
    """The score at the evaluation's effort; a speaker that was not measured at it (a teacher's own dial) counts with the first measured, its own."""
    mine = [s for s in evaluated.scores if (s.speaker, s.skill, s.language) == (speaker, skill, language)]
    return next((s for s in mine if s.effort is evaluated.effort), mine[0] if mine else None)


def by_language(evaluated: Evaluated) -> dict[str, dict[str, dict[str, Score]]]:
    """skill -> language -> speaker -> score, of skills asked in more than one language."""
    table: dict[str, dict[str, dict[str, Score]]] = {}
    for skill, language in sorted({(s.skill, s.language) for s in evaluated.scores if s.language}):
        scores = {name: _pick(evaluated, name, skill, language) for name in evaluated.speakers}
        table.setdefault(skill, {})[language] = {name: s for name, s in scores.items() if s is not None}
    return {skill: languages for skill, languages in table.items() if len(languages) > 1}


def by_effort(evaluated: Evaluated) -> dict[str, dict[str, dict[Effort, Score]]]:
    """skill -> speaker -> effort -> score, where anybody was measured at more than one."""
    found: dict[str, dict[str, dict[Effort, Score]]] = {}
    for s in evaluated.scores:
        if not s.language:
            found.setdefault(s.skill, {}).setdefault(s.speaker, {})[s.effort] = s
    return found if any(len(mine) > 1 for table in found.values() for mine in table.values()) else {}
