"""The page and the card: what got better, what got worse, what it cost. Every sentence is computed from the run's files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from persea import storage as store
from persea.chat.messages import Effort
from persea.evaluation.audition import COLUMNS, table
from persea.evaluation.lm_eval_results import Standard, read_standard
from persea.evaluation.racing import Ended
from persea.report import svg as charts
from persea.report import thinking_section as hybrid_page
from persea.report.claims import findings, headline
from persea.report.run_files import PAIR, PARTS, Evaluated, Files, Logged, Row, by_effort, by_language, read, rows, stands
from persea.tasks.task import Paired, Score

EXAMPLES, LONGEST = 4, 1200  # questions shown per skill; characters shown of a text
TERMS = ("events", "cross_entropy")  # first among the curves
MODEL = ["name", "licence", "model", "family", "revision", "fingerprint"]
LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0", "openrail", "gemma",
            "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4")  # names the hub knows; all else is "other" there


# --- what is shown ---


def _named(score: Score) -> dict[str, float]:
    return {k: getattr(score, k) for k in ("value", "low", "high", "n")}


def _beside(pair: Paired) -> dict[str, Any]:
    return {k: getattr(pair, k) for k in ("other", "n", "difference", "low", "high", "kept", "least", "most")} | {"standing": stands(pair)}


def summary(files: Files, found: Sequence[Row], standard: Sequence[Standard]) -> dict[str, Any]:
    """What report.json holds."""
    e = files.evaluated
    skills = {r.skill: {"student": _named(r.student), "base": _named(r.base), "teachers": {s.speaker: _named(s) for s in r.teachers},
                        "best_teacher": r.best.speaker, "retained": r.retained, "yardsticks": {s.speaker: _named(s) for s in r.yardsticks},
                        "closed": r.closed, "beside_best": _beside(r.beside_best), "beside_base": _beside(r.beside_base)} for r in found}
    languages = {skill: {language: {name: _named(s) for name, s in scores.items()} for language, scores in table.items()}
                 for skill, table in by_language(e).items()}
    efforts = {skill: {name: {effort: _named(s) for effort, s in scores.items()} for name, scores in table.items()}
               for skill, table in by_effort(e).items()}
    cast = {"parts": files.cast.parts, "pinned": files.cast.pinned,
            "contests": {part: asdict(c) for part, c in files.cast.contests.items()}} if files.cast else None
    return {"student": e.student, "base": e.base, "yardsticks": list(e.yardsticks), "skills": skills, "languages": languages, "efforts": efforts,
            "regressions": [p.to_json() for p in e.regressions], "cast": cast, "bits_per_byte": e.bits_per_byte,
            "standard": [asdict(s) for s in standard], "seconds": files.seconds}


def shown(files: Files, found: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """skill -> its first questions, in file order and never chosen, each with the answers of student, best teacher and base.

    Where somebody answered at several efforts, the first measured is shown: the speaker's own.
    """
    said = {(x.skill, x.language, x.question, x.speaker): x for x in reversed(files.examples)}
    table: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        mine = [x for x in files.examples if x.speaker == row.student.speaker and x.skill == row.skill]
        asked = [x for x in mine if said[x.skill, x.language, x.question, x.speaker] is x][:EXAMPLES]
        names = (row.student.speaker, row.best.speaker, row.base.speaker)
        table[row.skill] = [
            {"asked": x, "answers": {name: said.get((x.skill, x.language, x.question, name)) for name in names}} for x in asked]
    return table


def _dot(e: Evaluated, s: Score) -> charts.Dot:
    return charts.Dot(s.speaker, e.mark(s.speaker), s.value, s.low, s.high)


def plots(e: Evaluated, found: Sequence[Row]) -> list[tuple[str, Markup]]:
    """A dot-and-interval plot a skill: its name and inline SVG."""
    drawn = []
    for k, r in enumerate(found):
        speakers = [_dot(e, s) for s in r.scores]
        drawn.append((r.skill, Markup(charts.dots(f"skill-{k}", r.skill, speakers, (r.best.low, r.best.high)))))
    return drawn


def maps(e: Evaluated, found: Sequence[Row]) -> tuple[Markup, Markup, dict[str, Markup]]:
    """Every skill and speaker as one matrix; the way from base to best teacher; a matrix of languages for each skill that has several."""
    columns = [(name, e.mark(name)) for name in e.speakers]
    whole = charts.heat("all", "every skill and speaker", columns, [(r.skill, [s.value for s in r.scores]) for r in found])
    way = charts.gaps("gaps", "from base to best teacher", [(r.skill, _dot(e, r.base), _dot(e, r.student), _dot(e, r.best), r.closed) for r in found])
    spoken = {skill: charts.heat(f"languages-{k}", f"{skill} by language", columns, [
        (language, [scores[name].value if name in scores and scores[name].n else None for name in e.speakers]) for language, scores in table.items()])
        for k, (skill, table) in enumerate(by_language(e).items())}
    return Markup(whole), Markup(way), {skill: Markup(svg) for skill, svg in spoken.items()}


def once(files: Files) -> list[Logged]:
    """Logged steps in order; a redone one counts once."""
    return sorted({line.step: line for line in files.logged or ()}.values(), key=lambda line: line.step)


def curves(files: Files) -> tuple[list[tuple[str, Markup]], dict[str, dict[str, float]]]:
    """A curve a loss term, the whole loss, whose positions, loss and gradient it was: title and inline SVG; and each teacher's mean shares."""
    e, lines = files.evaluated, once(files)
    terms = sorted({t for line in lines for t in line.terms}, key=lambda t: (TERMS.index(t) if t in TERMS else len(TERMS), t))
    series = {t.replace("_", " "): [(line.step, line.terms[t]) for line in lines if t in line.terms] for t in terms}
    if not lines:
        return [], {}
    series["loss, all terms"] = [(line.step, line.loss) for line in lines]
    drawn = [(title, charts.curve(f"curve-{k}", title, points)) for k, (title, points) in enumerate(series.items())]
    means: dict[str, dict[str, float]] = {name: {} for name in e.teachers}
    for kind in PARTS:
        shares = [(line.step, told) for line in lines if (told := line.shares(kind) or (line.share if kind == "positions" else {}))]
        if shares:
            title = f"share of {kind}"
            drawn.append((title, charts.stacked(f"share-{kind}", title, charts.bins(shares, e.teachers), [(t, e.mark(t)) for t in e.teachers])))
            (whole,) = charts.bins(shares, e.teachers, most=1)
            means = {name: {**means[name], kind: share} for name, share in zip(e.teachers, whole.shares, strict=True)}
    return [(title, Markup(svg)) for title, svg in drawn], means


def weighed(files: Files) -> list[tuple[str, str, dict[str, float]]]:
    """(teacher, skill, its mean shares and its mean weight) over logged steps, the largest share of the gradient first.

    A share is a mean over the steps that tell it, 0 where the group is no part of the batch; a weight is one over the steps it has a part in.
    """
    lines = once(files)
    groups = dict.fromkeys((teacher, skill) for line in lines for teacher, parts in line.groups.items() for skill in parts)
    found = []
    for teacher, skill in groups:
        mine = [line.groups[teacher][skill] for line in lines if skill in line.groups.get(teacher, {})]
        row = {"weight": sum(part.weight for part in mine) / len(mine)}
        for kind in PARTS:
            if told := sum(bool(line.shares(kind)) for line in lines):
                row[kind] = sum(getattr(part, kind) or 0.0 for part in mine) / told
        found.append((teacher, skill, row))
    return sorted(found, key=lambda row: -row[2].get("gradient", row[2]["positions"]))


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
    texts = (charts.percent, charts.points, charts.signed, charts.count, charts.size, charts.duration, charts.cell, charts.place)
    environment.filters |= {f.__name__: f for f in texts}
    return environment.from_string(resources.files("persea.report").joinpath(name).read_text(encoding="utf-8"))


def _render(template: str, context: dict[str, Any]) -> bytes:
    # Models write control characters and half characters too; neither may stand in a page.
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", _template(template).render(context)).encode()


def report(run: Path, lm_eval: Mapping[str, Path] | None = None) -> Path:
    """Write run/report/: report.json, README.md (the card), index.html (the page, one file); return the page.

    lm_eval  speaker -> results file of lm-eval that joins them

    Same inputs, same bytes. Raises DataError, before anything is written, for a file that is missing, broken, holds NaN
    or contradicts another.
    """
    files, modes = read(run), hybrid_page.read(run)
    standard = [s for name, path in (lm_eval or {}).items() for s in read_standard(name, path)]
    found = rows(files.evaluated, str(run / "evaluate" / "evaluation.json"))
    e, (training, shares) = files.evaluated, curves(files)
    skills = dict.fromkeys(skill for bits in e.bits_per_byte.values() for skill in bits)
    lowest = {skill: min(bits[skill] for bits in e.bits_per_byte.values() if skill in bits) for skill in skills}
    whole, way, spoken = maps(e, found)
    context = {
        "files": files, "e": e, "rows": found, "headline": headline(found), "findings": findings(e, found), "languages": by_language(e),
        "efforts": by_effort(e), "dials": [x for x in Effort if x in {s.effort for s in e.scores}], "cast": files.cast,
        "why": table(files.cast) if files.cast else [], "COLUMNS": COLUMNS, "Ended": Ended,
        "whole": whole, "way": way, "spoken": spoken, "standard": standard, "examples": shown(files, found), "plots": plots(e, found),
        "training": training, "shares": shares, "weighed": weighed(files), "PARTS": PARTS,
        "lowest": lowest, "record": json.dumps(files.record, indent=1, ensure_ascii=False),
        "front_matter": front_matter(files), "stands": stands, "swatch": lambda name: Markup(charts.swatch(e.mark(name))),
        "hybrid": hybrid_page.section(modes), "PAIR": PAIR, "MODEL": MODEL, "LONGEST": LONGEST}
    page, card = _render("page.html.jinja", context), _render("model_card.md.jinja", context)
    folder = run / "report"
    store.publish_json(folder / "report.json", summary(files, found, standard) | ({"modes": modes.to_json()} if modes else {}))
    store.publish(folder / "README.md", card)
    store.publish(folder / "index.html", page)
    return folder / "index.html"
