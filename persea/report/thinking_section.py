"""What is told of a hybrid student: a row a mode, sentences that are computed, and the section of the page."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from pydantic import TypeAdapter, ValidationError

from persea.chat.messages import Effort
from persea.errors import DataError
from persea.evaluation.thinking_modes import UNDETERMINED, Count, Mode, Modes
from persea.report import svg as charts

COLUMNS = ("skill", "effort", "right", "astray", "tokens of thought", "bytes", "language")
SHOWN = 3  # languages of a row, the most frequent ones


def read(run: Path) -> Modes | None:
    """The modes of a run; None where its corpus has none. DataError for a file that is broken or contradicts itself."""
    path = run / "evaluate" / "modes.json"
    if not path.is_file():
        return None
    remedy = f"delete {path.parent} and run its stage again"
    try:
        found = TypeAdapter(Modes).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}", where=str(path), remedy=remedy) from error
    counts = [found.thinks_unasked, found.answers_unthinking, *(m.leak for m in found.modes), *(m.as_asked for m in found.modes)]
    if not all(0 <= c.found <= c.n and 0 <= c.low <= c.high <= 1 for c in counts):
        raise DataError("counts more than were asked", where=str(path), remedy=remedy)
    return found


def rows(modes: Modes) -> list[tuple[str, ...]]:
    """One a mode, in the words of COLUMNS."""
    return [(m.skill, m.effort.value, f"{m.score.value:.2f} ({m.score.low:.2f}-{m.score.high:.2f})", f"{m.leak.found} of {m.leak.n}", *_length(m),
             _languages(m)) for m in modes.modes]


def _length(m: Mode) -> tuple[str, str]:
    if not m.length.thoughts:
        return f"- ({m.length.cut} cut)" if m.length.cut else "-", "-"
    cut = f" ({m.length.cut} cut)" if m.length.cut else ""
    return f"{m.length.tokens:.1f}{cut}", f"{m.length.bytes:.1f}"


def _languages(m: Mode) -> str:
    named = [f"{n} {language}" for language, n in sorted(m.languages.items(), key=lambda x: (x[0] == UNDETERMINED, -x[1]))]
    return ", ".join(named[:SHOWN]) + (f", {len(named) - SHOWN} more" if len(named) > SHOWN else "") or "-"


def sentences(modes: Modes) -> list[str]:
    """What the numbers say, nothing that they do not."""
    told = [f"Told to answer at once, the student thought in {_of(modes.thinks_unasked)}."] if modes.thinks_unasked.n else []
    if modes.answers_unthinking.n:
        told.append(f"Told to think, it answered without a thought in {_of(modes.answers_unthinking)}.")
    for skill, rises in modes.rises.items():
        dials = [m for m in modes.modes if m.skill == skill and m.effort is not Effort.NONE]
        lengths = ", ".join(f"{m.effort} {m.length.tokens:.1f}" if m.length.thoughts else f"{m.effort} none that ended" for m in dials)
        told.append(f"{skill}: thoughts {'get' if rises else 'do not get'} longer from effort to effort ({lengths} tokens on average).")
    return told


def _of(count: Count) -> str:
    return f"{count.found} of {count.n} answers (95 % interval {charts.points(count.low)} to {charts.points(count.high)} per cent)"


@cache
def _template() -> Template:
    environment = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(resources.files("persea.report").joinpath("thinking_section.html.jinja").read_text(encoding="utf-8"))


def section(modes: Modes | None) -> Markup:
    """HTML of the page's section; nothing where there are no modes."""
    if modes is None:
        return Markup()
    return Markup(_template().render(columns=COLUMNS, rows=rows(modes), sentences=sentences(modes)))
