"""What is told of a hybrid student: a row a mode, sentences that are computed, and the section of the page."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from pydantic import TypeAdapter, ValidationError

from persea.chat.messages import ThinkingEffort
from persea.errors import DataError
from persea.evaluation.thinking_modes import (
    UNDETERMINED_LANGUAGE,
    EffortResult,
    Proportion,
    ThinkingModesReport,
)
from persea.report import svg as charts

THINKING_COLUMNS = ("skill", "effort", "right", "astray", "tokens of thought", "bytes", "language")
MAX_LANGUAGES_SHOWN = 3  # languages of a row, the most frequent ones


def read_thinking_modes(run_folder: Path) -> ThinkingModesReport | None:
    """The modes of a run; None where its corpus has none. DataError for a file that is broken or contradicts itself."""
    path = run_folder / "evaluate" / "modes.json"
    if not path.is_file():
        return None
    remedy = f"delete {path.parent} and run its stage again"
    try:
        found = TypeAdapter(ThinkingModesReport).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(
            f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}",
            where=str(path),
            remedy=remedy,
        ) from error
    counts = [
        found.unasked_thinking,
        found.missing_thinking,
        *(m.wrong_mode for m in found.modes),
        *(m.in_question_language for m in found.modes),
    ]
    if not all(0 <= c.count <= c.n and 0 <= c.low <= c.high <= 1 for c in counts):
        raise DataError("counts more than were asked", where=str(path), remedy=remedy)
    return found


def thinking_rows(modes: ThinkingModesReport) -> list[tuple[str, ...]]:
    """One a mode, in the words of COLUMNS."""
    return [
        (
            m.skill,
            m.effort.value,
            f"{m.score.value:.2f} ({m.score.low:.2f}-{m.score.high:.2f})",
            f"{m.wrong_mode.count} of {m.wrong_mode.n}",
            *_length_cells(m),
            _language_cell(m),
        )
        for m in modes.modes
    ]


def _length_cells(m: EffortResult) -> tuple[str, str]:
    if not m.length.num_finished:
        return f"- ({m.length.num_truncated} cut)" if m.length.num_truncated else "-", "-"
    cut = f" ({m.length.num_truncated} cut)" if m.length.num_truncated else ""
    return f"{m.length.mean_tokens:.1f}{cut}", f"{m.length.mean_bytes:.1f}"


def _language_cell(m: EffortResult) -> str:
    named = [
        f"{n} {language}"
        for language, n in sorted(
            m.languages.items(), key=lambda x: (x[0] == UNDETERMINED_LANGUAGE, -x[1])
        )
    ]
    return (
        ", ".join(named[:MAX_LANGUAGES_SHOWN])
        + (f", {len(named) - MAX_LANGUAGES_SHOWN} more" if len(named) > MAX_LANGUAGES_SHOWN else "")
        or "-"
    )


def thinking_sentences(modes: ThinkingModesReport) -> list[str]:
    """What the numbers say, nothing that they do not."""
    told = (
        [f"Told to answer at once, the student thought in {_share_phrase(modes.unasked_thinking)}."]
        if modes.unasked_thinking.n
        else []
    )
    if modes.missing_thinking.n:
        told.append(
            f"Told to think, it answered without a thought in {_share_phrase(modes.missing_thinking)}."
        )
    for skill, rises in modes.length_increases.items():
        dials = [m for m in modes.modes if m.skill == skill and m.effort is not ThinkingEffort.NONE]
        lengths = ", ".join(
            f"{m.effort} {m.length.mean_tokens:.1f}"
            if m.length.num_finished
            else f"{m.effort} none that ended"
            for m in dials
        )
        told.append(
            f"{skill}: thoughts {'get' if rises else 'do not get'} longer from effort to effort ({lengths} tokens on average)."
        )
    return told


def _share_phrase(count: Proportion) -> str:
    return f"{count.count} of {count.n} answers (95 % interval {charts.format_points(count.low)} to {charts.format_points(count.high)} per cent)"


@cache
def _load_section_template() -> Template:
    environment = Environment(
        undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(
        resources.files("persea.report")
        .joinpath("thinking_section.html.jinja")
        .read_text(encoding="utf-8")
    )


def render_thinking_section(modes: ThinkingModesReport | None) -> Markup:
    """HTML of the page's section; nothing where there are no modes."""
    if modes is None:
        return Markup()
    return Markup(
        _load_section_template().render(
            columns=THINKING_COLUMNS, rows=thinking_rows(modes), sentences=thinking_sentences(modes)
        )
    )
