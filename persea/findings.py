"""What a run's files say, read and checked for the page and the card: rows, who stands where, and sentences that are computed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from persea import charts, store
from persea.audition import Cast
from persea.chat import Effort
from persea.errors import DataError
from persea.measure import Score, Verdict

PAIR = ["teacher", "skill", "conversations", "boundary", "one_to_one", "cross_entropy_only"]
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

    @property
    def speakers(self) -> tuple[str, ...]:
        return (self.student, self.base, *self.teachers)

    def mark(self, speaker: str) -> str:
        """What a speaker looks like in every chart and table."""
        return {self.student: "student", self.base: "base"}.get(speaker) or charts.teacher_mark(self.teachers.index(speaker))


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
class Logged:
    step: int
    loss: float
    terms: dict[str, float]
    share: dict[str, Share]


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


def _contradictions(files: Files) -> Iterator[tuple[str, str]]:
    """(file, what) that cannot be true together: the page would compare what does not belong together."""
    evaluated, known, listed = files.evaluated, set(files.evaluated.teachers), {t.get("name") for t in files.lineage.teachers}
    if not known or len(set(evaluated.speakers)) < len(evaluated.speakers):
        yield "evaluate/evaluation.json", "student, base and teachers need a name each"
    for s in evaluated.scores:
        if not -1e-9 <= s.low <= s.value + 1e-9 <= s.high + 2e-9 <= 1 + 3e-9:
            yield "evaluate/evaluation.json", f"{s.speaker} on {s.skill}: {s.value} is not inside its interval {s.low} to {s.high}"
    if len({(s.speaker, s.skill, s.language, s.effort) for s in evaluated.scores}) < len(evaluated.scores):
        yield "evaluate/evaluation.json", "a speaker has two scores on one skill"
    if files.logged is not None and not files.logged:
        yield "train/metrics.jsonl", "no step is logged"
    for line in files.logged or ():
        if sum(line.share.values()) > 1 + 1e-6:
            yield "train/metrics.jsonl", f"the shares of positions of step {line.step} are more than one together"
    if files.pairs is not None and not files.pairs:
        yield "check/check.json", "no pair was checked"
    for pair in files.pairs or ():
        if any(k not in pair for k in PAIR) or not all(isinstance(pair[k], int | float) and 0 <= pair[k] <= 1 + 1e-9 for k in PAIR[3:]):
            yield "check/check.json", f"{pair.get('teacher')} on {pair.get('skill')}: needs {', '.join(PAIR[3:])}, shares from 0 to 1"
    named = {"audition/cast.json": {t for part in files.cast.parts.values() for t, _ in part} if files.cast else set(),
             "capture/summary.json": set(files.captured.teachers) if files.captured else set(),
             "train/metrics.jsonl": {t for line in files.logged or () for t in line.share}}
    for name, teachers in named.items():
        if teachers - known:
            yield name, f"{', '.join(sorted(teachers - known))} teaches, and was not evaluated"
    if known - listed:
        yield "lineage/lineage.json", f"{', '.join(sorted(known - listed))} was evaluated as a teacher, and has no line here"


# --- what is found ---


class Standing(StrEnum):
    """Two 95 % intervals beside each other. OVERLAPS: these measurements do not tell the two apart."""

    ABOVE = "above"
    OVERLAPS = "overlaps"
    BELOW = "below"


def standing(one: Score, other: Score) -> Standing:
    return Standing.ABOVE if one.low > other.high else Standing.BELOW if one.high < other.low else Standing.OVERLAPS


@dataclass(frozen=True)
class Row:
    """One skill: every speaker's score, and who teaches it best (the first of equals)."""

    skill: str
    student: Score
    base: Score
    teachers: tuple[Score, ...]

    @property
    def best(self) -> Score:
        return max(self.teachers, key=lambda s: s.value)

    @property
    def retained(self) -> float | None:
        return self.student.value / self.best.value if self.best.value else None

    @property
    def scores(self) -> tuple[Score, ...]:
        return (self.student, self.base, *self.teachers)


def rows(evaluated: Evaluated, where: str) -> tuple[Row, ...]:
    """One row a skill, in the order measured. Raises DataError where a speaker was not measured, or asked nothing."""
    found = []
    for skill in dict.fromkeys(s.skill for s in evaluated.scores):
        scores = [_pick(evaluated, name, skill, "") for name in evaluated.speakers]
        lacking = [name for name, s in zip(evaluated.speakers, scores, strict=True) if s is None or s.n == 0]
        if lacking:
            raise DataError(f"{', '.join(lacking)} has no score on {skill}", where=where, remedy="evaluate every speaker on every skill")
        student, base, *teachers = (s for s in scores if s is not None)
        found.append(Row(skill, student, base, tuple(teachers)))
    if not found:
        raise DataError("no skill was measured", where=where, remedy="name skills under evaluation: in the recipe and run evaluate again")
    return tuple(found)


def _pick(evaluated: Evaluated, speaker: str, skill: str, language: str) -> Score | None:
    """The score at the evaluation's effort; a speaker measured at one other effort only (a teacher's own dial) counts with that one."""
    mine = [s for s in evaluated.scores if (s.speaker, s.skill, s.language) == (speaker, skill, language)]
    return next((s for s in mine if s.effort is evaluated.effort), mine[0] if len({s.effort for s in mine}) == 1 else None)


def by_language(evaluated: Evaluated) -> dict[str, dict[str, dict[str, Score]]]:
    """skill -> language -> speaker -> score, of skills asked in more than one language."""
    table: dict[str, dict[str, dict[str, Score]]] = {}
    for skill, language in sorted({(s.skill, s.language) for s in evaluated.scores if s.language}):
        scores = {name: _pick(evaluated, name, skill, language) for name in evaluated.speakers}
        table.setdefault(skill, {})[language] = {name: s for name, s in scores.items() if s is not None}
    return {skill: languages for skill, languages in table.items() if len(languages) > 1}


def headline(found: Sequence[Row]) -> str:
    """One sentence: what is kept, best first, the lowest named as such."""
    teachers = len(found[0].teachers)
    kept = sorted(((r.retained, r.skill) for r in found if r.retained is not None), reverse=True)
    told = [f"{charts.percent(share)} on {skill}" for share, skill in kept]
    whose = "the best teacher" if teachers > 1 else "its teacher"
    silent = [r.skill for r in found if r.retained is None]
    nothing = f"on {charts.listed(silent)} no teacher had one right answer" if silent else ""
    start = f"One student, {charts.number(teachers)} teacher{'s' * (teachers > 1)}: "
    if not kept:
        return f"{start}{nothing}, so there was nothing to keep."
    if len(kept) > 4:
        (most, first), (least, last) = kept[0], kept[-1]
        lowest, highest = f"{charts.percent(least)} ({last}, its lowest)", f"{charts.percent(most)} ({first})"
        what = f"between {lowest} and {highest} of {whose} on {charts.number(len(kept))} skills"
    else:
        told[0] = f"{charts.percent(kept[0][0])} of {whose} on {kept[0][1]}"
        if len(kept) > 1:
            told[-1] = f"{charts.percent(kept[-1][0])}, its lowest, on {kept[-1][1]}"
        what = charts.listed(told)
    return f"{start}it keeps {what}{'; ' * bool(nothing)}{nothing}."


def findings(found: Sequence[Row]) -> tuple[str, ...]:
    """What the intervals allow to say: of the student beside the best teacher and its own base, of the teachers among themselves."""
    said = [_beside([(r.skill, standing(r.student, r.best)) for r in found], "the best teacher"),
            _beside([(r.skill, standing(r.student, r.base)) for r in found], "its own base")]
    short = {t.speaker: [r.skill for r in found if standing(r.teachers[k], r.best) is Standing.BELOW]
             for k, t in enumerate(found[0].teachers)}
    skills = f"all {charts.number(len(found))} skills" if len(found) > 1 else found[0].skill
    alone = [name for name, below in short.items() if not below]
    if len(short) > 1 and not alone:
        told = sorted(short, key=lambda name: len(short[name]))[:1] if len(short) > 4 else list(short)
        lacks = "; ".join(f"{name} is below the best on {charts.listed(short[name])}" for name in told)
        said.append(f"No single teacher covers {skills}: {'even ' * (len(short) > 4)}{lacks}.")
    elif len(short) > 1:
        said.append(f"One teacher covers {skills}, as far as the intervals tell: {charts.listed(alone, 'or')}.")
    return tuple(said)


def _beside(stands: Sequence[tuple[str, Standing]], whom: str) -> str:
    words = {Standing.ABOVE: "above", Standing.OVERLAPS: "not distinguishable (95 % intervals overlap)", Standing.BELOW: "below"}
    groups = {which: [skill for skill, s in stands if s is which] for which in words}
    parts = [f"{words[which]} on {charts.listed(skills)}" for which, skills in groups.items() if skills]
    return f"Against {whom}, the student is {'; '.join(parts)}."
