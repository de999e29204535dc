"""Write the report of a run: the page, the model card and report.json, all computed from the run's
files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from persea import storage
from persea.chat.messages import ThinkingEffort
from persea.evaluation.audition import CAST_TABLE_COLUMNS, cast_table
from persea.evaluation.lm_eval_results import LmEvalResult, read_lm_eval_results
from persea.evaluation.racing import StopReason
from persea.evaluation.text_report import TextReport
from persea.report import svg, text
from persea.report.claims import NOTHING_MEASURED, claims, headline
from persea.report.model_card import (
    answers_are_given,
    card_title,
    model_card_front_matter,
)
from persea.report.result_charts import (
    mean_group_shares,
    overview_charts,
    skill_dot_plots,
    training_charts,
)
from persea.report.run_files import SHARE_KINDS, GradedExample, RunFiles, read_run_files
from persea.report.skill_comparison import (
    SkillComparison,
    compare_skills,
    difference_order,
    scores_by_effort,
    scores_by_language,
)
from persea.report.text_section import (
    TEXT_TABLE_NOTE,
    read_text_report,
    render_text_section,
    text_columns,
    text_headline,
    text_rows,
    text_verdict,
)
from persea.report.thinking_section import read_thinking_modes, render_thinking_section
from persea.tasks.task import PairedComparison, Score

EXAMPLES_PER_SKILL = 4
CONTENTS_MARK = "[[contents]]"
MAX_TEXT_CHARS = 1200  # of a question or an answer on the page
LINEAGE_KEYS = ["name", "licence", "model", "family", "revision", "fingerprint"]
# Keys of a pair in check.json and their column titles; other keys get their own name as title.
CHECK_COLUMNS = {
    "boundary_share": "common boundary",
    "partial_token_share": "inside a teacher token",
    "span_share": "inside a span",
    "cross_entropy_only_share": "cross-entropy only",
    "one_to_one_share": "one to one",
    "event_disagreement": "different events",
    "space_event_share": "space events",
    "retained_mass_mean": "retained mass (mean)",
    "retained_mass_p5": "retained mass (5th percentile)",
}


def _score_to_json(score: Score) -> dict[str, float]:
    return {k: getattr(score, k) for k in ("value", "low", "high", "n")}


def _paired_to_json(pair: PairedComparison) -> dict[str, Any]:
    omitted = ("model_name", "skill", "language", "effort")
    fields = {k: v for k, v in pair.to_json().items() if k not in omitted}
    return fields | {"order": difference_order(pair)}


def report_summary(
    files: RunFiles, comparisons: Sequence[SkillComparison], lm_eval_results: Sequence[LmEvalResult]
) -> dict[str, Any]:
    """Return the content of report.json."""
    evaluation = files.evaluation
    skills = {
        c.skill: {
            "student": _score_to_json(c.student),
            "base": _score_to_json(c.base),
            "teachers": {s.model_name: _score_to_json(s) for s in c.teachers},
            "best_teacher": c.best_teacher.model_name,
            "retained": c.retained,
            "reference_models": {s.model_name: _score_to_json(s) for s in c.reference_models},
            "gap_closed": c.gap_closed,
            "versus_best": _paired_to_json(c.versus_best),
            "versus_base": _paired_to_json(c.versus_base),
        }
        for c in comparisons
    }
    languages = {
        skill: {
            language: {name: _score_to_json(s) for name, s in scores.items()}
            for language, scores in table.items()
        }
        for skill, table in scores_by_language(evaluation).items()
    }
    efforts = {
        skill: {
            name: {effort: _score_to_json(s) for effort, s in scores.items()}
            for name, scores in table.items()
        }
        for skill, table in scores_by_effort(evaluation).items()
    }
    cast = None
    if files.cast:
        cast = {
            "parts": files.cast.parts,
            "pinned": files.cast.pinned,
            "decisions": {part: asdict(d) for part, d in files.cast.decisions.items()},
        }
    return {
        "student": evaluation.student,
        "base": evaluation.base,
        "reference_models": list(evaluation.reference_models),
        "skills": skills,
        "languages": languages,
        "efforts": efforts,
        "regressions": [p.to_json() for p in evaluation.regressions],
        "cast": cast,
        "bits_per_byte": evaluation.bits_per_byte,
        "lm_eval": [asdict(s) for s in lm_eval_results],
        "seconds": files.seconds,
    }


def select_examples(
    files: RunFiles, comparisons: Sequence[SkillComparison]
) -> dict[str, list[dict[str, Any]]]:
    """Select the example answers of the page.

    The first questions of each skill in file order, never chosen, with the answers of student, best
    teacher and base. Of a model that answered at several efforts, the first answer is shown: it is
    at the model's own effort.

    Returns:
        skill -> [{"asked": the student's line, "answers": model -> its line or None}].
    """

    def key(x: GradedExample, model: str) -> tuple[str, ...]:
        return x.skill, x.language, x.id, x.question, model

    first = {key(x, x.model_name): x for x in reversed(files.examples)}
    table: dict[str, list[dict[str, Any]]] = {}
    for c in comparisons:
        student = c.student.model_name
        asked = [
            x
            for x in files.examples
            if x.model_name == student and x.skill == c.skill and first[key(x, student)] is x
        ]
        names = (student, c.best_teacher.model_name, c.base.model_name)
        table[c.skill] = [
            {"asked": x, "answers": {name: first.get(key(x, name)) for name in names}}
            for x in asked[:EXAMPLES_PER_SKILL]
        ]
    return table


def check_columns(pairs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return (key, title) of the columns of the compatibility table, in the order of CHECK_COLUMNS,
    then of the file.
    """
    keys = dict.fromkeys(k for pair in pairs for k in pair)
    known = [k for k in CHECK_COLUMNS if k in keys]
    others = [k for k in keys if k not in CHECK_COLUMNS and k not in ("teacher", "skill")]
    return [(k, CHECK_COLUMNS.get(k, k.replace("_", " "))) for k in (*known, *others)]


@cache
def _load_page_template(name: str) -> Template:
    environment = Environment(
        undefined=StrictUndefined, autoescape=".html." in name, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": text.format_percent,
        "points": text.format_points,
        "signed": text.format_signed,
        "count": text.format_count,
        "size": text.format_bytes,
        "duration": text.format_duration,
        "markdown_cell": text.markdown_cell,
        "model_label": text.model_label,
    }
    return environment.from_string(
        resources.files("persea.report").joinpath(name).read_text(encoding="utf-8")
    )


def _render_template(template: str, context: dict[str, Any]) -> bytes:
    # Models also write control characters and lone surrogates, which are not allowed in a page.
    return re.sub(
        "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]",
        "\ufffd",
        _load_page_template(template).render(context),
    ).encode()


def _with_contents(page: bytes) -> bytes:
    """Replace CONTENTS_MARK by a link to each section that the page has."""
    headings = re.findall(rb'<h2 id="([\w-]+)">(.*?)</h2>', page)
    links = b"".join(
        b'<li><a href="#%b">%b</a></li>' % (name, title.partition(b":")[0])
        for name, title in headings
    )
    return page.replace(CONTENTS_MARK.encode(), links, 1)


def _by_student_score(
    student: str, table: Mapping[str, Mapping[str, Score]]
) -> list[tuple[str, Mapping[str, Score]]]:
    """Return the rows of a table of languages, the student's lowest score first."""
    return sorted(
        table.items(), key=lambda row: row[1][student].value if student in row[1] else 2.0
    )


def write_report(
    run_folder: Path,
    lm_eval_files: Mapping[str, Path] | None = None,
    out_folder: Path | None = None,
) -> Path:
    """Write report/index.html (the page, one file), report/README.md (the model card) and
    report/report.json.

    Equal inputs give equal bytes. Nothing is written if a file is refused.

    Args:
        run_folder: The folder of a run that was evaluated.
        lm_eval_files: Model -> a results file of lm-eval to show.
        out_folder: The folder to write; None = report/ of the run folder.

    Returns:
        The path of the page.

    Raises:
        DataError: If a file is missing, broken, of another version of persea, holds NaN, or
            contradicts another.
    """
    files, modes = read_run_files(run_folder), read_thinking_modes(run_folder)
    order = {name: k for k, name in enumerate(files.evaluation.model_names)}
    lm_eval_results = sorted(
        (s for n, path in (lm_eval_files or {}).items() for s in read_lm_eval_results(n, path)),
        key=lambda s: (s.task, order.get(s.model_name, len(order))),
    )
    where = str(run_folder / "evaluate" / "evaluation.json")
    texts = read_text_report(run_folder)
    comparisons = compare_skills(files.evaluation, where)
    context = _template_context(files, comparisons, lm_eval_results, texts)
    context["thinking_section"] = render_thinking_section(modes)
    page = _with_contents(_render_template("page.html.jinja", context))
    card = _render_template("model_card.md.jinja", context)
    summary = report_summary(files, comparisons, lm_eval_results)
    folder = out_folder or run_folder / "report"
    summary |= {"modes": modes.to_json()} if modes else {}
    if texts:
        summary |= {"texts": texts.to_json() | {"verdict": text_verdict(texts)}}
    storage.write_json(folder / "report.json", summary)
    storage.write_atomic(folder / "README.md", card)
    storage.write_atomic(folder / "index.html", page)
    return folder / "index.html"


def _template_context(
    files: RunFiles,
    comparisons: Sequence[SkillComparison],
    lm_eval_results: Sequence[LmEvalResult],
    texts: TextReport | None,
) -> dict[str, Any]:
    evaluation = files.evaluation
    findings = claims(evaluation, comparisons) if comparisons else ()
    heading = headline(comparisons) if comparisons else "" if texts else NOTHING_MEASURED
    if texts:
        findings, heading = (heading, *findings) if heading else findings, text_headline(texts)
    training_plots, teacher_shares = training_charts(files)
    charts = overview_charts(evaluation, comparisons) if comparisons else ("", "", {})
    score_matrix, gap_chart, language_charts = charts
    measured_efforts = {s.effort for s in evaluation.scores}
    bits = evaluation.bits_per_byte.values()
    return {
        "files": files,
        "evaluation": evaluation,
        "comparisons": comparisons,
        "headline": heading,
        "findings": findings,
        "text_section": render_text_section(texts, evaluation),
        "text_columns": text_columns(texts) if texts else (),
        "text_rows": text_rows(texts) if texts else (),
        "text_note": TEXT_TABLE_NOTE,
        "languages": scores_by_language(evaluation),
        "efforts": scores_by_effort(evaluation),
        "measured_efforts": [x for x in ThinkingEffort if x in measured_efforts],
        "cast": files.cast,
        "answers_given": answers_are_given(files.recipe),
        "cast_rows": cast_table(files.cast) if files.cast else [],
        "CAST_TABLE_COLUMNS": CAST_TABLE_COLUMNS,
        "StopReason": StopReason,
        "score_matrix": score_matrix,
        "gap_chart": gap_chart,
        "language_charts": language_charts,
        "lm_eval_results": lm_eval_results,
        "examples": select_examples(files, comparisons),
        "skill_plots": skill_dot_plots(evaluation, comparisons),
        "training_plots": training_plots,
        "teacher_shares": teacher_shares,
        "group_shares": mean_group_shares(files),
        "SHARE_KINDS": SHARE_KINDS,
        "lowest_bits": {
            skill: min(by_skill[skill] for by_skill in bits if skill in by_skill)
            for skill in dict.fromkeys(skill for by_skill in bits for skill in by_skill)
        },
        "lineage_text": json.dumps(files.lineage_json, indent=1, ensure_ascii=False),
        "front_matter": model_card_front_matter(files, texts),
        "run_name": card_title(files),
        "CONTENTS_MARK": CONTENTS_MARK,
        "by_student_score": partial(_by_student_score, evaluation.student),
        "difference_order": difference_order,
        "swatch": lambda name: Markup(svg.swatch(evaluation.mark(name))),
        "check_columns": check_columns(files.pairs or ()),
        "CHECK_SHARES": tuple(CHECK_COLUMNS),
        "LINEAGE_KEYS": LINEAGE_KEYS,
        "MAX_TEXT_CHARS": MAX_TEXT_CHARS,
    }
