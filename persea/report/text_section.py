"""Held-out texts in words, as table rows, and as a section of the page: bits per byte of all models
and the share of the gap that the student closed.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from pydantic import TypeAdapter, ValidationError

from persea.errors import DataError
from persea.evaluation.text_report import TextGroup, TextReport
from persea.report import svg
from persea.report.run_files import EvaluationRecord, rerun_remedy, validation_error
from persea.report.text import NBSP, format_percent, join_list, spell_count
from persea.tasks.cluster_intervals import Interval

TEXTS_FILE = "texts.json"
ALL_LANGUAGES = "all languages"  # label of a mean over languages
ROUNDING = 1e-9


def read_text_report(run_folder: Path) -> TextReport | None:
    """Read the result on held-out texts.

    Args:
        run_folder: The folder of the run.

    Returns:
        The result; None if the recipe names no held-out texts.

    Raises:
        DataError: If the file is broken, of another version, or contradicts itself.
    """
    path = run_folder / "evaluate" / TEXTS_FILE
    if not path.is_file():
        return None
    try:
        found = TypeAdapter(TextReport).validate_json(path.read_bytes())
    except ValidationError as error:
        raise validation_error(error, path) from error
    for group in found.groups:
        intervals = [*group.bits_per_byte.values(), *group.student_minus.values()]
        intervals += [group.gap_closed] if group.gap_closed else []
        if not set(found.model_names) <= group.bits_per_byte.keys() or not all(
            _is_ordered(i) for i in intervals
        ):
            raise DataError(
                f"{_label(group)}: a model is missing, or a value is not inside its interval",
                where=str(path),
                remedy=rerun_remedy(path),
            )
    return found


def _is_ordered(i: Interval) -> bool:
    low, high = i.low, i.high
    return (low is None or low <= i.value + ROUNDING) and (
        high is None or i.value <= high + ROUNDING
    )


# --- numbers and sentences ---


def _label(group: TextGroup) -> str:
    return f"{group.skill}, {group.language or ALL_LANGUAGES}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\u2212")


def _range(i: Interval) -> str:
    """Return the interval of a difference in bits per byte; "" for a single document."""
    if i.low is None or i.high is None:
        return ""
    return f"{_signed(i.low)},{NBSP}{_signed(i.high)}"


def _gap_range(i: Interval) -> str:
    if i.low is None or i.high is None:
        return "interval not bounded"
    return f"{format_percent(i.low)} to {format_percent(i.high)}"


def _is_below(i: Interval) -> bool:
    return i.high is not None and i.high < 0


def _is_above(i: Interval) -> bool:
    return i.low is not None and i.low > 0


def text_verdict(report: TextReport) -> str:
    """Return one line: how many languages gained, how much of the gap is closed, what was lost.

    A language gained if the 95 % interval of student minus base lies below 0, and was lost if it
    lies above.
    """
    parts = []
    several_skills = len(report.overall) > 1
    for overall in report.overall:
        groups = [g for g in report.languages if g.skill == overall.skill]
        versus_base = {g.language: g.student_minus[report.base] for g in groups}
        gained = [name for name, i in versus_base.items() if _is_below(i)]
        lost = [name for name, i in versus_base.items() if _is_above(i)]
        same = [name for name in versus_base if name not in (*gained, *lost)]
        if len(groups) > 1:
            words = f"{len(gained)} of {len(groups)} languages gained"
        else:
            (name,) = versus_base
            state = "gained" if gained else "lost" if lost else "did not change significantly"
            words = f"{name or overall.skill} {state} ({_signed(versus_base[name].value)})"
        words += f", {_gap_words(overall)}"
        if len(groups) > 1:
            for state, names in (("lost", lost), ("no significant change", same)):
                if names:
                    named = ", ".join(f"{n} {_signed(versus_base[n].value)}" for n in names)
                    words += f"; {state}: {named}"
        parts.append(f"{overall.skill}: {words}" if several_skills else words)
    return "; ".join(parts)


def _gap_words(group: TextGroup) -> str:
    if group.gap_closed is None:
        return f"no gap to close: {group.no_gap_reason}"
    share = format_percent(group.gap_closed.value)
    teachers = join_list(group.best_teachers)
    return f"{share} of the gap to {teachers} closed ({_gap_range(group.gap_closed)})"


def text_headline(report: TextReport) -> str:
    """Return the verdict as the heading of a page."""
    return f"Bits per byte on held-out texts: {text_verdict(report)}."


def text_sentences(report: TextReport) -> list[str]:
    """Return a sentence for each skill and language, and one for what was not measured."""
    sentences = [_language_sentence(report, group) for group in report.groups]
    for name, reason in report.unmeasured.items():
        sentences.append(f"{name} was not measured on texts: {reason}.")
    if report.left_out:
        first, reason = next(iter(report.left_out.items()))
        sentences.append(
            f"{len(report.left_out)} document{'s' * (len(report.left_out) > 1)} left out for all "
            f"models, such as {first}: {reason}."
        )
    return sentences


def _language_sentence(report: TextReport, group: TextGroup) -> str:
    versus_base = group.student_minus[report.base]
    if _is_below(versus_base):
        change = f"{abs(versus_base.value):.3f} fewer than its base"
    elif _is_above(versus_base):
        change = f"{abs(versus_base.value):.3f} MORE than its base"
    else:
        change = f"not significantly different from its base ({_signed(versus_base.value)})"
    interval = _range(versus_base)
    sentence = (
        f"{_label(group)}: the student needs {group.bits_per_byte[report.student].value:.3f} bits "
        f"a byte, {change}{f' [{interval}]' if interval else ''}"
    )
    if versus_best := group.minus_best:
        more = f"{abs(versus_best.value):.3f} {'more' if versus_best.value > 0 else 'fewer'}"
        sentence += f" and {more} than {join_list(group.best_teachers)}"
    return f"{sentence}; {_gap_words(group)}."


def text_columns(report: TextReport, best_only: bool = False) -> tuple[str, ...]:
    """Return the column titles of `text_rows`."""
    others = (*report.teachers, *report.reference_models)
    return (
        *(["skill"] if _has_several_skills(report) else []),
        "language",
        "base",
        "student",
        *(["best teacher"] if best_only else others),
        "student - base",
        "gap closed",
        "texts",
    )


def text_rows(report: TextReport, best_only: bool = False) -> list[tuple[str, ...]]:
    """Return a row of bits per byte for each skill and language, cells of one or two lines.

    Args:
        report: The result.
        best_only: Show the best teacher alone, by name, so that the table fits a terminal. If
            False there is a column for every other model, and * marks the best teacher.
    """
    rows = []
    for g in report.groups:
        best = g.best_teachers
        cells = [g.skill] if _has_several_skills(report) else []
        cells += [g.language or ALL_LANGUAGES]
        cells += [f"{g.bits_per_byte[name].value:.3f}" for name in (report.base, report.student)]
        if best_only:
            cells.append(_best_teacher_cell(report, g))
        else:
            cells += [
                f"{g.bits_per_byte[name].value:.3f}{'*' * (name in best)}"
                for name in (*report.teachers, *report.reference_models)
            ]
        difference, gap = g.student_minus[report.base], g.gap_closed
        cells.append("\n".join(filter(None, (_signed(difference.value), _range(difference)))))
        cells.append(f"{format_percent(gap.value)}\n{_gap_range(gap)}" if gap else "\u2013")
        cells.append(str(g.documents))
        rows.append(tuple(cells))
    return rows


def _best_teacher_cell(report: TextReport, group: TextGroup) -> str:
    if group.minus_best is None:
        return "\u2013"
    # student - (student - best teacher): also right for a mean over languages
    student = group.bits_per_byte[report.student].value
    return f"{student - group.minus_best.value:.3f}\n{join_list(group.best_teachers)}"


def _has_several_skills(report: TextReport) -> bool:
    return len({g.skill for g in report.groups}) > 1


TEXT_TABLE_NOTE = (
    "bits per byte of held-out texts, lower is better; 95 % intervals over documents, paired"
)


def end_bits_sentence(report: TextReport) -> str:
    """Return a sentence on the bits of the token that ends a document, which is reported apart."""
    values = []
    for name in report.model_names:
        groups = [g for g in report.languages if name in g.end_bits]
        if count := sum(g.documents for g in groups):
            mean = sum(g.end_bits[name] * g.documents for g in groups) / count
            values.append(f"{name} {mean:.1f}{NBSP}bits")
    return f"The token that ends a document is not counted above; it costs {join_list(values)}."


# --- the page ---


@cache
def _load_section_template() -> Template:
    environment = Environment(
        undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(
        resources.files("persea.report")
        .joinpath("text_section.html.jinja")
        .read_text(encoding="utf-8")
    )


def text_chart(report: TextReport, evaluation: EvaluationRecord) -> str:
    """Return the chart of base, student and best teacher on every language."""
    rows = []
    for g in report.groups:
        dots = [
            svg.Dot(name, evaluation.mark(name), i.value, _end(i.low, i), _end(i.high, i))
            for name in (report.base, report.student, *g.best_teachers)
            for i in [g.bits_per_byte[name]]
        ]
        if len(g.best_teachers) > 1 and g.minus_best:  # one dot: the best teacher of each language
            best = g.bits_per_byte[report.student].value - g.minus_best.value
            name = join_list(g.best_teachers)
            dots[2:] = [svg.Dot(name, evaluation.mark(g.best_teachers[0]), best, best, best)]
        label = g.language or "all"
        gap = format_percent(g.gap_closed.value) if g.gap_closed else "\u2013"
        rows.append((f"{g.skill} {label}" if _has_several_skills(report) else label, dots, gap))
    return svg.bits_chart("held-out-texts", "bits per byte of held-out texts", rows)


def _end(end: float | None, i: Interval) -> float:
    return i.value if end is None else end


def render_text_section(report: TextReport | None, evaluation: EvaluationRecord) -> Markup:
    """Return the HTML of the section; empty if there are no held-out texts."""
    if report is None:
        return Markup()
    return Markup(
        _load_section_template().render(
            columns=text_columns(report),
            rows=[[cell.split("\n") for cell in row] for row in text_rows(report)],
            sentences=text_sentences(report),
            chart=Markup(text_chart(report, evaluation)),
            end_bits=end_bits_sentence(report),
            num_documents=spell_count(sum(g.documents for g in report.languages)),
            windows=report.windows,
        )
    )
