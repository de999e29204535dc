"""The page and the card: what got better, what got worse, what it cost. Every sentence is computed from the run's files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import yaml
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from pydantic import Field, TypeAdapter, ValidationError

from persea import charts, store
from persea.audition import Cast
from persea.chat import Effort
from persea.errors import DataError
from persea.measure import Score, Verdict

STAGES = ("check", "audition", "capture", "train", "evaluate")
EXAMPLES, LONGEST = 4, 1200  # questions shown per skill; characters shown of a text
TERMS = ("events", "cross_entropy")  # first among the curves
PAIR = ["teacher", "skill", "conversations", "boundary", "one_to_one", "cross_entropy_only"]
MODEL = ["name", "licence", "model", "family", "revision", "fingerprint"]
LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0", "openrail", "gemma",
            "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4")  # names the hub knows; all else is "other" there
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
        pairs=_read(run / "check" / "check.json", dict[str, tuple[dict[str, Any], ...]]).get("pairs", ()) if "check" in stands else None,
        captured=_read(run / "capture" / "summary.json", Captured) if "capture" in stands else None,
        logged=_read(run / "train" / "metrics.jsonl", tuple[Logged, ...]) if "train" in stands else None,
        lineage=_read(lineage, Lineage), record=_read(lineage, dict[str, Any]),
        seconds={stage: float(_read(run / stage / "done.json", dict[str, Any]).get("seconds", -1)) for stage in stands})
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
    for stage, seconds in files.seconds.items():
        if seconds < 0:
            yield f"{stage}/done.json", "does not say its seconds"
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
        lacks = "; ".join(f"{name} is below the best on {charts.listed(below)}" for name, below in short.items())
        said.append(f"No single teacher covers {skills}: {lacks}.")
    elif len(short) > 1:
        said.append(f"One teacher covers {skills}, as far as the intervals tell: {charts.listed(alone, 'or')}.")
    return tuple(said)


def _beside(stands: Sequence[tuple[str, Standing]], whom: str) -> str:
    words = {Standing.ABOVE: "above", Standing.OVERLAPS: "not distinguishable (95 % intervals overlap)", Standing.BELOW: "below"}
    groups = {which: [skill for skill, s in stands if s is which] for which in words}
    parts = [f"{words[which]} on {charts.listed(skills)}" for which, skills in groups.items() if skills]
    return f"Against {whom}, the student is {charts.listed(parts)}."


# --- what is shown ---


def _named(score: Score) -> dict[str, float]:
    return {k: getattr(score, k) for k in ("value", "low", "high", "n")}


def summary(files: Files, found: Sequence[Row]) -> dict[str, Any]:
    """What report.json holds."""
    e = files.evaluated
    skills = {r.skill: {"student": _named(r.student), "base": _named(r.base), "teachers": {s.speaker: _named(s) for s in r.teachers},
                        "best_teacher": r.best.speaker, "retained": r.retained} for r in found}
    languages = {skill: {language: {name: _named(s) for name, s in scores.items()} for language, scores in table.items()}
                 for skill, table in by_language(e).items()}
    cast = {"parts": files.cast.parts, "pinned": files.cast.pinned} if files.cast else None
    return {"student": e.student, "base": e.base, "skills": skills, "languages": languages, "cast": cast, "bits_per_byte": e.bits_per_byte,
            "seconds": files.seconds}


def why(cast: Cast) -> tuple[dict[str, Any], ...]:
    """Each part of the cast with the measurement behind it, best first; who came close to the choice, and who stands above it."""
    told = []
    for part, shares in cast.parts.items():
        skill, _, language = part.partition("/")
        scores = sorted((s for s in cast.scores if (s.skill, s.language) == (skill, language)), key=lambda s: -s.value)
        chosen = next((s for s in scores if s.speaker in dict(shares)), None)
        others = [(s.speaker, standing(s, chosen)) for s in scores if chosen and s.speaker not in dict(shares)]
        near = {which: charts.listed([name for name, stands in others if stands is which]) for which in Standing}
        told.append({"part": part, "shares": shares, "scores": scores, "near": near, "pinned": part in cast.pinned})
    return tuple(told)


def shown(files: Files, found: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """skill -> its first questions, in file order and never chosen, each with the answers of student, best teacher and base."""
    said = {(x.skill, x.language, x.question, x.speaker): x for x in files.examples}
    table: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        asked = [x for x in files.examples if x.speaker == row.student.speaker and x.skill == row.skill][:EXAMPLES]
        names = (row.student.speaker, row.best.speaker, row.base.speaker)
        table[row.skill] = [
            {"asked": x, "answers": {name: said.get((x.skill, x.language, x.question, name)) for name in names}} for x in asked]
    return table


def plots(e: Evaluated, found: Sequence[Row]) -> list[tuple[str, Markup]]:
    """A dot-and-interval plot a skill: its name and inline SVG."""
    drawn = []
    for k, r in enumerate(found):
        speakers = [charts.Dot(s.speaker, e.mark(s.speaker), s.value, s.low, s.high) for s in r.scores]
        drawn.append((r.skill, Markup(charts.dots(f"skill-{k}", r.skill, speakers, (r.best.low, r.best.high)))))
    return drawn


def curves(files: Files) -> tuple[list[tuple[str, Markup]], dict[str, float]]:
    """A curve a loss term, the whole loss, whose positions were learned: title and inline SVG; and each teacher's mean share."""
    e = files.evaluated
    lines = sorted({line.step: line for line in files.logged or ()}.values(), key=lambda line: line.step)  # a redone step counts once
    terms = sorted({t for line in lines for t in line.terms}, key=lambda t: (TERMS.index(t) if t in TERMS else len(TERMS), t))
    series = {t.replace("_", " "): [(line.step, line.terms[t]) for line in lines if t in line.terms] for t in terms}
    if not lines:
        return [], {}
    series["loss, all terms"] = [(line.step, line.loss) for line in lines]
    drawn = [(title, charts.curve(f"curve-{k}", title, points)) for k, (title, points) in enumerate(series.items())]
    shares, title = [(line.step, line.share) for line in lines], "share of positions"
    drawn.append((title, charts.stacked("share", title, charts.bins(shares, e.teachers), [(t, e.mark(t)) for t in e.teachers])))
    (whole,) = charts.bins(shares, e.teachers, most=1)
    return [(title, Markup(svg)) for title, svg in drawn], dict(zip(e.teachers, whole.shares, strict=True))


def front_matter(files: Files) -> str:
    """The card's YAML. The base alone is `base_model`: to the hub that means "made from these weights", which teachers' are not.

    The licence is the one the lineage gives the student; else the one all its parents share; else "other".
    """
    lineage, e = files.lineage, files.evaluated
    shared = {str(m.get("licence") or "") for m in (lineage.base, *lineage.teachers)}
    licence = str(lineage.student.get("licence") or (shared.pop() if len(shared) == 1 else "")).lower()
    card: dict[str, Any] = {"license": licence}
    if licence not in LICENCES:
        card = {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", licence) or "see-lineage"}
    base = str(lineage.base.get("model", ""))
    card["base_model"] = [base] if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) else []  # a folder is nothing the hub could link to
    card["tags"] = ["persea", "distillation"]
    languages = {s.language for s in e.scores} | {x.language for x in files.examples}
    card["language"] = sorted(name for name in languages if re.fullmatch(r"[a-z]{2,3}", name))
    return yaml.safe_dump(card, sort_keys=False, allow_unicode=True)


@cache
def _template(name: str) -> Template:
    environment = Environment(undefined=StrictUndefined, autoescape=".html." in name, trim_blocks=True, lstrip_blocks=True)
    texts = (charts.percent, charts.points, charts.count, charts.size, charts.duration, charts.cell, charts.place)
    environment.filters |= {f.__name__: f for f in texts}
    return environment.from_string(resources.files("persea").joinpath(name).read_text(encoding="utf-8"))


def _render(template: str, context: dict[str, Any]) -> bytes:
    # Models write control characters and half characters too; neither may stand in a page.
    return re.sub("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\ufffd", _template(template).render(context)).encode()


def report(run: Path) -> Path:
    """Write run/report/: report.json, README.md (the card), index.html (the page, one file); return the page.

    Same inputs, same bytes. Raises DataError, before anything is written, for a file that is missing, broken, holds NaN
    or contradicts another.
    """
    files = read(run)
    found = rows(files.evaluated, str(run / "evaluate" / "evaluation.json"))
    e, (training, shares) = files.evaluated, curves(files)
    context = {
        "files": files, "e": e, "rows": found, "headline": headline(found), "findings": findings(found), "languages": by_language(e),
        "cast": why(files.cast) if files.cast else None, "examples": shown(files, found), "plots": plots(e, found),
        "training": training, "shares": shares, "front_matter": front_matter(files), "record": json.dumps(files.record, indent=1, ensure_ascii=False),
        "standing": standing,
        "swatch": lambda name: Markup(charts.swatch(e.mark(name))), "PAIR": PAIR, "MODEL": MODEL, "LONGEST": LONGEST}
    page, card = _render("report.html.jinja", context), _render("card.md.jinja", context)
    folder = run / "report"
    store.publish_json(folder / "report.json", summary(files, found))
    store.publish(folder / "README.md", card)
    store.publish(folder / "index.html", page)
    return folder / "index.html"
