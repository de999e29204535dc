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
from persea.chat.messages import ThinkingEffort
from persea.evaluation.audition import CAST_TABLE_COLUMNS, cast_table
from persea.evaluation.lm_eval_results import LmEvalResult, read_lm_eval_results
from persea.evaluation.racing import StopReason
from persea.report import svg as charts
from persea.report import thinking_section as hybrid_page
from persea.report.claims import claims, headline
from persea.report.run_files import (
    PAIRING_KEYS,
    SHARE_KINDS,
    EvaluationRecord,
    LoggedStep,
    RunFiles,
    SkillComparison,
    compare_skills,
    difference_order,
    read_run_files,
    scores_by_effort,
    scores_by_language,
)
from persea.tasks.task import PairedComparison, Score

EXAMPLES_PER_SKILL, MAX_TEXT_CHARS = (
    4,
    1200,
)  # questions shown per skill; characters shown of a text
LEADING_LOSS_TERMS = ("events", "cross_entropy")  # first among the curves
LINEAGE_KEYS = ["name", "licence", "model", "family", "revision", "fingerprint"]
HUB_LICENCES = (
    "apache-2.0",
    "mit",
    "bsd-3-clause",
    "gpl-3.0",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "cc0-1.0",
    "openrail",
    "gemma",
    "llama2",
    "llama3",
    "llama3.1",
    "llama3.2",
    "llama3.3",
    "llama4",
)  # names the hub knows; all else is "other" there


# --- what is shown ---


def _score_to_json(score: Score) -> dict[str, float]:
    return {k: getattr(score, k) for k in ("value", "low", "high", "n")}


def _paired_to_json(pair: PairedComparison) -> dict[str, Any]:
    return {
        k: getattr(pair, k)
        for k in (
            "other_model_name",
            "n",
            "difference",
            "low",
            "high",
            "retained",
            "retained_low",
            "retained_high",
        )
    } | {"order": difference_order(pair)}


def report_summary(
    files: RunFiles, comparisons: Sequence[SkillComparison], lm_eval_results: Sequence[LmEvalResult]
) -> dict[str, Any]:
    """What report.json holds."""
    e = files.evaluation
    skills = {
        r.skill: {
            "student": _score_to_json(r.student),
            "base": _score_to_json(r.base),
            "teachers": {s.model_name: _score_to_json(s) for s in r.teachers},
            "best_teacher": r.best_teacher.model_name,
            "retained": r.retained,
            "reference_models": {s.model_name: _score_to_json(s) for s in r.reference_models},
            "gap_closed": r.gap_closed,
            "versus_best": _paired_to_json(r.versus_best),
            "versus_base": _paired_to_json(r.versus_base),
        }
        for r in comparisons
    }
    languages = {
        skill: {
            language: {name: _score_to_json(s) for name, s in scores.items()}
            for language, scores in table.items()
        }
        for skill, table in scores_by_language(e).items()
    }
    efforts = {
        skill: {
            name: {effort: _score_to_json(s) for effort, s in scores.items()}
            for name, scores in table.items()
        }
        for skill, table in scores_by_effort(e).items()
    }
    cast = (
        {
            "parts": files.cast.parts,
            "pinned": files.cast.pinned,
            "decisions": {part: asdict(c) for part, c in files.cast.decisions.items()},
        }
        if files.cast
        else None
    )
    return {
        "student": e.student,
        "base": e.base,
        "reference_models": list(e.reference_models),
        "skills": skills,
        "languages": languages,
        "efforts": efforts,
        "regressions": [p.to_json() for p in e.regressions],
        "cast": cast,
        "bits_per_byte": e.bits_per_byte,
        "standard": [asdict(s) for s in lm_eval_results],
        "seconds": files.seconds,
    }


def select_examples(
    files: RunFiles, comparisons: Sequence[SkillComparison]
) -> dict[str, list[dict[str, Any]]]:
    """Skill -> its first questions, in file order and never chosen, each with the answers of student, best teacher and base.

    Where somebody answered at several efforts, the first measured is shown: the speaker's own.
    """
    said = {(x.skill, x.language, x.question, x.model_name): x for x in reversed(files.examples)}
    table: dict[str, list[dict[str, Any]]] = {}
    for row in comparisons:
        mine = [
            x
            for x in files.examples
            if x.model_name == row.student.model_name and x.skill == row.skill
        ]
        asked = [x for x in mine if said[x.skill, x.language, x.question, x.model_name] is x][
            :EXAMPLES_PER_SKILL
        ]
        names = (row.student.model_name, row.best_teacher.model_name, row.base.model_name)
        table[row.skill] = [
            {
                "asked": x,
                "answers": {
                    name: said.get((x.skill, x.language, x.question, name)) for name in names
                },
            }
            for x in asked
        ]
    return table


def _score_dot(evaluation: EvaluationRecord, score: Score) -> charts.Dot:
    return charts.Dot(
        score.model_name, evaluation.mark(score.model_name), score.value, score.low, score.high
    )


def skill_dot_plots(
    evaluation: EvaluationRecord, comparisons: Sequence[SkillComparison]
) -> list[tuple[str, Markup]]:
    """A dot-and-interval plot a skill: its name and inline SVG."""
    drawn = []
    for k, r in enumerate(comparisons):
        speakers = [_score_dot(evaluation, s) for s in r.scores]
        drawn.append(
            (
                r.skill,
                Markup(
                    charts.dot_plot(
                        f"skill-{k}", r.skill, speakers, (r.best_teacher.low, r.best_teacher.high)
                    )
                ),
            )
        )
    return drawn


def overview_charts(
    evaluation: EvaluationRecord, comparisons: Sequence[SkillComparison]
) -> tuple[Markup, Markup, dict[str, Markup]]:
    """Every skill and speaker as one matrix; the way from base to best teacher; a matrix of languages for each skill that has several."""
    columns = [(name, evaluation.mark(name)) for name in evaluation.model_names]
    whole = charts.heatmap(
        "all",
        "every skill and speaker",
        columns,
        [(r.skill, [s.value for s in r.scores]) for r in comparisons],
    )
    way = charts.gap_chart(
        "gaps",
        "from base to best teacher",
        [
            (
                r.skill,
                _score_dot(evaluation, r.base),
                _score_dot(evaluation, r.student),
                _score_dot(evaluation, r.best_teacher),
                r.gap_closed,
            )
            for r in comparisons
        ],
    )
    spoken = {
        skill: charts.heatmap(
            f"languages-{k}",
            f"{skill} by language",
            columns,
            [
                (
                    language,
                    [
                        scores[name].value if name in scores and scores[name].n else None
                        for name in evaluation.model_names
                    ],
                )
                for language, scores in table.items()
            ],
        )
        for k, (skill, table) in enumerate(scores_by_language(evaluation).items())
    }
    return Markup(whole), Markup(way), {skill: Markup(svg) for skill, svg in spoken.items()}


def unique_steps(files: RunFiles) -> list[LoggedStep]:
    """Logged steps in order; a redone one counts once."""
    return sorted(
        {line.step: line for line in files.logged_steps or ()}.values(), key=lambda line: line.step
    )


def training_charts(
    files: RunFiles,
) -> tuple[list[tuple[str, Markup]], dict[str, dict[str, float]]]:
    """A curve a loss term, the whole loss, whose positions, loss and gradient it was: title and inline SVG; and each teacher's mean shares."""
    e, lines = files.evaluation, unique_steps(files)
    terms = sorted(
        {t for line in lines for t in line.terms},
        key=lambda t: (
            LEADING_LOSS_TERMS.index(t) if t in LEADING_LOSS_TERMS else len(LEADING_LOSS_TERMS),
            t,
        ),
    )
    series = {
        t.replace("_", " "): [(line.step, line.terms[t]) for line in lines if t in line.terms]
        for t in terms
    }
    if not lines:
        return [], {}
    series["loss, all terms"] = [(line.step, line.loss) for line in lines]
    drawn = [
        (title, charts.line_chart(f"curve-{k}", title, points))
        for k, (title, points) in enumerate(series.items())
    ]
    means: dict[str, dict[str, float]] = {name: {} for name in e.teachers}
    for kind in SHARE_KINDS:
        shares = [
            (line.step, told)
            for line in lines
            if (told := line.teacher_shares(kind) or (line.share if kind == "positions" else {}))
        ]
        if shares:
            title = f"share of {kind}"
            drawn.append(
                (
                    title,
                    charts.stacked_bars(
                        f"share-{kind}",
                        title,
                        charts.bin_shares(shares, e.teachers),
                        [(t, e.mark(t)) for t in e.teachers],
                    ),
                )
            )
            (whole,) = charts.bin_shares(shares, e.teachers, max_bins=1)
            means = {
                name: {**means[name], kind: share}
                for name, share in zip(e.teachers, whole.shares, strict=True)
            }
    return [(title, Markup(svg)) for title, svg in drawn], means


def mean_group_shares(files: RunFiles) -> list[tuple[str, str, dict[str, float]]]:
    """(teacher, skill, its mean shares and its mean weight) over logged steps, the largest share of the gradient first.

    A share is a mean over the steps that tell it, 0 where the group is no part of the batch; a weight is one over the steps it has a part in.
    """
    lines = unique_steps(files)
    groups = dict.fromkeys(
        (teacher, skill)
        for line in lines
        for teacher, parts in line.groups.items()
        for skill in parts
    )
    found = []
    for teacher, skill in groups:
        mine = [
            line.groups[teacher][skill] for line in lines if skill in line.groups.get(teacher, {})
        ]
        row = {"weight": sum(part.weight for part in mine) / len(mine)}
        for kind in SHARE_KINDS:
            if told := sum(bool(line.teacher_shares(kind)) for line in lines):
                row[kind] = sum(getattr(part, kind) or 0.0 for part in mine) / told
        found.append((teacher, skill, row))
    return sorted(found, key=lambda row: -row[2].get("gradient", row[2]["positions"]))


def model_card_front_matter(files: RunFiles) -> str:
    """The card's YAML. The base alone is `base_model`: to the hub that means "made from these weights", which teachers' are not.

    The licence is the one the lineage gives the student; else the one all its parents share; else "other".
    """
    lineage, e = files.lineage, files.evaluation
    shared = {str(m.get("licence") or "") for m in (lineage.base, *lineage.teachers)}
    licence = str(
        lineage.student.get("licence") or (shared.pop() if len(shared) == 1 else "")
    ).lower()
    card: dict[str, Any] = {"license": licence}
    if licence not in HUB_LICENCES:
        card = {
            "license": "other",
            "license_name": re.sub(r"[^a-z0-9.]+", "-", licence) or "see-lineage",
        }
    base = str(lineage.base.get("model", ""))
    card["base_model"] = (
        [base] if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) else []
    )  # a folder is nothing the hub could link to
    card["tags"] = ["persea", "distillation"]
    languages = {s.language for s in e.scores} | {x.language for x in files.examples}
    card["language"] = sorted(name for name in languages if re.fullmatch(r"[a-z]{2,3}", name))
    return yaml.safe_dump(card, sort_keys=False, allow_unicode=True)


@cache
def _load_page_template(name: str) -> Template:
    environment = Environment(
        undefined=StrictUndefined, autoescape=".html." in name, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": charts.format_percent,
        "points": charts.format_points,
        "signed": charts.format_signed,
        "count": charts.format_count,
        "size": charts.format_bytes,
        "duration": charts.format_duration,
        "cell": charts.markdown_cell,
        "place": charts.model_label,
    }
    return environment.from_string(
        resources.files("persea.report").joinpath(name).read_text(encoding="utf-8")
    )


def _render_template(template: str, context: dict[str, Any]) -> bytes:
    # Models write control characters and half characters too; neither may stand in a page.
    return re.sub(
        "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]",
        "\ufffd",
        _load_page_template(template).render(context),
    ).encode()


def write_report(run_folder: Path, lm_eval_files: Mapping[str, Path] | None = None) -> Path:
    """Write run/report/: report.json, README.md (the card), index.html (the page, one file); return the page.

    lm_eval  speaker -> results file of lm-eval that joins them

    Same inputs, same bytes. Raises DataError, before anything is written, for a file that is missing, broken, holds NaN
    or contradicts another.
    """
    files, modes = read_run_files(run_folder), hybrid_page.read_thinking_modes(run_folder)
    standard = [
        s for name, path in (lm_eval_files or {}).items() for s in read_lm_eval_results(name, path)
    ]
    found = compare_skills(files.evaluation, str(run_folder / "evaluate" / "evaluation.json"))
    e, (training, shares) = files.evaluation, training_charts(files)
    skills = dict.fromkeys(skill for bits in e.bits_per_byte.values() for skill in bits)
    lowest = {
        skill: min(bits[skill] for bits in e.bits_per_byte.values() if skill in bits)
        for skill in skills
    }
    whole, way, spoken = overview_charts(e, found)
    context = {
        "files": files,
        "e": e,
        "rows": found,
        "headline": headline(found),
        "findings": claims(e, found),
        "languages": scores_by_language(e),
        "efforts": scores_by_effort(e),
        "dials": [x for x in ThinkingEffort if x in {s.effort for s in e.scores}],
        "cast": files.cast,
        "why": cast_table(files.cast) if files.cast else [],
        "COLUMNS": CAST_TABLE_COLUMNS,
        "Ended": StopReason,
        "whole": whole,
        "way": way,
        "spoken": spoken,
        "standard": standard,
        "examples": select_examples(files, found),
        "plots": skill_dot_plots(e, found),
        "training": training,
        "shares": shares,
        "weighed": mean_group_shares(files),
        "PARTS": SHARE_KINDS,
        "lowest": lowest,
        "record": json.dumps(files.lineage_json, indent=1, ensure_ascii=False),
        "front_matter": model_card_front_matter(files),
        "stands": difference_order,
        "swatch": lambda name: Markup(charts.swatch(e.mark(name))),
        "hybrid": hybrid_page.render_thinking_section(modes),
        "PAIR": PAIRING_KEYS,
        "MODEL": LINEAGE_KEYS,
        "LONGEST": MAX_TEXT_CHARS,
    }
    page, card = (
        _render_template("page.html.jinja", context),
        _render_template("model_card.md.jinja", context),
    )
    folder = run_folder / "report"
    store.write_json(
        folder / "report.json",
        report_summary(files, found, standard) | ({"modes": modes.to_json()} if modes else {}),
    )
    store.write_atomic(folder / "README.md", card)
    store.write_atomic(folder / "index.html", page)
    return folder / "index.html"
