"""The section of the page about a hybrid student: a table of its thinking modes and sentences about
them.
"""

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
from persea.report.run_files import rerun_remedy, validation_error
from persea.report.text import format_points

THINKING_COLUMNS = (
    "skill",
    "effort",
    "score",
    "wrong mode",
    "thinking tokens",
    "thinking bytes",
    "thinking language",
)
MAX_LANGUAGES_SHOWN = 3  # in a row, the most frequent ones


def read_thinking_modes(run_folder: Path) -> ThinkingModesReport | None:
    """Read the thinking modes of a run.

    Args:
        run_folder: The folder of the run.

    Returns:
        The modes; None if the corpus of the run has none.

    Raises:
        DataError: If the file is broken, of another version, or contradicts itself.
    """
    path = run_folder / "evaluate" / "modes.json"
    if not path.is_file():
        return None
    try:
        found = TypeAdapter(ThinkingModesReport).validate_json(path.read_bytes())
    except ValidationError as error:
        raise validation_error(error, path) from error
    counts = [
        found.unasked_thinking,
        found.missing_thinking,
        *(m.wrong_mode for m in found.modes),
        *(m.in_question_language for m in found.modes),
    ]
    if not all(0 <= c.count <= c.n and 0 <= c.low <= c.high <= 1 for c in counts):
        raise DataError(
            "a count is larger than the number of answers",
            where=str(path),
            remedy=rerun_remedy(path),
        )
    return found


def thinking_rows(modes: ThinkingModesReport) -> list[tuple[str, ...]]:
    """Return one row for each skill and effort, in the order of THINKING_COLUMNS."""
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
    """Return sentences about unasked, missing and longer thinking."""
    sentences = []
    if modes.unasked_thinking.n:
        sentences.append(
            "Unasked thinking: with thinking off, the student thought in "
            f"{_share_phrase(modes.unasked_thinking)}."
        )
    if modes.missing_thinking.n:
        sentences.append(
            "Missing thinking: with thinking on, the student did not think in "
            f"{_share_phrase(modes.missing_thinking)}."
        )
    for skill, increases in modes.length_increases.items():
        efforts = [
            m for m in modes.modes if m.skill == skill and m.effort is not ThinkingEffort.NONE
        ]
        lengths = ", ".join(
            f"{m.effort} {m.length.mean_tokens:.1f}"
            if m.length.num_finished
            else f"{m.effort}: none finished"
            for m in efforts
        )
        sentences.append(
            f"{skill}: thinking {'gets' if increases else 'does not get'} longer with more effort "
            f"(mean tokens: {lengths})."
        )
    return sentences


def _share_phrase(count: Proportion) -> str:
    return (
        f"{count.count} of {count.n} answers "
        f"(95 % interval {format_points(count.low)} to {format_points(count.high)} %)"
    )


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
    """Return the HTML of the section; empty if there are no modes."""
    if modes is None:
        return Markup()
    return Markup(
        _load_section_template().render(
            columns=THINKING_COLUMNS, rows=thinking_rows(modes), sentences=thinking_sentences(modes)
        )
    )
