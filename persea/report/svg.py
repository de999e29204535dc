"""Results as short texts and as inline SVG: pure functions for the page and the card of `report`.

Colours come from the page's style sheet by mark ("student", "base", "t0" ... "t5"); every mark has its own shape too, so
that nothing is told by colour alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from pathlib import Path

NBSP, NARROW_NBSP = "\u00a0", "\u202f"  # a number and its unit stay on one line
CHART_WIDTH = 440  # of every chart's view box: at phone width its 13 px texts are still about 11 px
NUM_COLOURS, NUM_SHAPES, MAX_CURVE_POINTS = 6, 5, 160


@dataclass(frozen=True)
class Dot:
    """One speaker's score, all three in 0..1."""

    label: str
    mark: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ShareBin:
    """One stretch of training: the share of each teacher, in 0..1; together at most 1."""

    first_step: int
    last_step: int
    shares: tuple[float, ...]


def format_percent(share: float) -> str:
    """Whole percents; never rounds a loss away: "100 %" is said of 1 and above only, "0 %" of 0 only."""
    if 0 < share < 0.005:
        return f"<1{NBSP}%"
    if 0.995 <= share < 1:
        return f">99{NBSP}%"
    return f"{100 * share:.0f}{NBSP}%"


def format_points(share: float) -> str:
    """A score out of 100, one decimal."""
    return f"{100 * share:.1f}"


def format_signed(difference: float) -> str:
    """A difference of scores out of 100, one decimal, with its sign (a true minus)."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def format_count(n: float) -> str:
    return f"{n:,.0f}".replace(",", NARROW_NBSP)


def format_bytes(num_bytes: float) -> str:
    """Bytes, in powers of 1000."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f}{NBSP}B"
    power = next(
        k for k in (1, 2, 3, 4) if num_bytes < 999.95 * 1000**k or k == 4
    )  # 999.95 kB is 1.0 MB
    return f"{num_bytes / 1000**power:.1f}{NBSP}{('kB', 'MB', 'GB', 'TB')[power - 1]}"


def format_duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f}{NBSP}s"
    if seconds < 3599.5:
        return "{} min {:02d} s".format(*divmod(round(seconds), 60)).replace(" ", NBSP)
    return "{} h {:02d} min".format(*divmod(round(seconds / 60), 60)).replace(" ", NBSP)


def spell_count(n: int) -> str:
    """A small count inside a sentence."""
    words = (
        "no",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
    )
    return words[n] if n < len(words) else format_count(n)


def join_list(parts: Sequence[str], conjunction: str = "and") -> str:
    """a, b and c; empty for nothing."""
    return (
        f" {conjunction} ".join([", ".join(parts[:-1]), parts[-1]])
        if len(parts) > 1
        else "".join(parts)
    )


def markdown_cell(text: object) -> str:
    """A text inside a Markdown table: one line, no markup of its own."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(str(text).split()))


def model_label(model: object) -> str:
    """A model's name for the card. Of a folder on somebody's disk its last name only: cards are published."""
    return markdown_cell(Path(str(model)).name if str(model).startswith((".", "/", "~")) else model)


def teacher_mark(index: int) -> str:
    """Mark of the index-th teacher. 6 colours x 5 shapes: thirty teachers before one looks like another."""
    return f"t{index % NUM_COLOURS} s{index % NUM_SHAPES}"


def glyph(mark: str, x: float, y: float, r: float = 5) -> str:
    """The shape of a mark, centred at (x, y)."""
    if mark in ("student", "base"):
        return f'<circle class="{mark}" cx="{x:.1f}" cy="{y:.1f}" r="{r + (mark == "student"):g}"/>'
    outline = {
        "s0": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "s1": ((0, -1.15), (1.1, 0.85), (-1.1, 0.85)),
        "s2": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
        "s3": ((0, 1.15), (1.1, -0.85), (-1.1, -0.85)),
        "s4": ((-0.35, -1.1), (0.35, -1.1), (0.35, 1.1), (-0.35, 1.1)),
    }[mark.split()[1]]
    corners = " ".join(f"{x + r * a:.1f},{y + r * b:.1f}" for a, b in outline)
    return f'<polygon class="{mark}" points="{corners}"/>'


def swatch(mark: str) -> str:
    """A mark for a legend; its name stands beside it."""
    return f'<svg class="swatch" viewBox="0 0 16 16" width="16" height="16" aria-hidden="true">{glyph(mark, 8, 8)}</svg>'


def dot_plot(element_id: str, title: str, rows: Sequence[Dot], band: tuple[float, float]) -> str:
    """Dot and interval of every speaker on one skill, 0 to 100. `band` = the best teacher's interval, shaded behind all rows."""
    left, right, pitch = 118, CHART_WIDTH - 52, 25
    bottom = 8 + pitch * len(rows)

    def x(share: float) -> float:
        return left + (right - left) * share

    body = [
        f'<rect class="band" x="{x(band[0]):.1f}" y="8" width="{x(band[1]) - x(band[0]):.1f}" height="{bottom - 8}"/>'
    ]
    for tick in (0, 25, 50, 75, 100):
        at = x(tick / 100)
        body.append(
            f'<line class="grid" x1="{at:.1f}" y1="8" x2="{at:.1f}" y2="{bottom}"/>{_text(tick, at, bottom + 17, "mid tick")}'
        )
    for k, row in enumerate(rows):
        y = 8 + pitch * (k + 0.5)
        body.append(
            f'<g class="{row.mark}">{_text(_truncate(row.label), 0, y + 4.5, "name " + row.mark)}'
            f'<line class="whisker {row.mark}" x1="{x(row.low):.1f}" y1="{y:.1f}" x2="{x(row.high):.1f}" y2="{y:.1f}"/>'
            f"{glyph(row.mark, x(row.value), y)}{_text(format_points(row.value), CHART_WIDTH, y + 4.5, 'end value ' + row.mark)}</g>"
        )
    told = "; ".join(
        f"{r.label} {format_points(r.value)}, 95 % interval {format_points(r.low)} to {format_points(r.high)}"
        for r in rows
    )
    return _svg(element_id, title, f"Score out of 100. {told}.", bottom + 24, body)


def heatmap(
    element_id: str,
    title: str,
    columns: Sequence[tuple[str, str]],
    rows: Sequence[tuple[str, Sequence[float | None]]],
) -> str:
    """Scores as a matrix of tinted cells, 0 pale to 100 deep; the number stands in each. columns = (speaker, mark); None = not measured."""
    left, pitch, top = 96, 27, 44
    wide = (CHART_WIDTH - left) / len(columns)
    body = []
    for k, (name, mark) in enumerate(columns):
        at = left + wide * (k + 0.5)
        body.append(
            f"{glyph(mark, at, 12)}{_text(_truncate(name, max(3, int(wide / 7.6))), at, 35, 'mid tick')}"
        )
    for j, (name, values) in enumerate(rows):
        y = top + pitch * j
        body.append(_text(_truncate(name, 14), 0, y + 17.5, "name"))
        for k, value in enumerate(values):
            x, tint = left + wide * k, 0.05 + 0.5 * (value or 0)
            body.append(
                f'<rect class="heat" x="{x + 1:.1f}" y="{y + 1}" width="{wide - 2:.1f}" height="{pitch - 2}" fill-opacity="{tint:.3f}"/>'
                f"{_text('–' if value is None else f'{100 * value:.0f}', x + wide / 2, y + 17.5, 'mid')}"
            )
    told = [
        f"{name}: "
        + ", ".join(
            f"{who} {'not measured' if v is None else format_points(v)}"
            for (who, _), v in zip(columns, values, strict=True)
        )
        for name, values in rows
    ]
    return _svg(
        element_id,
        title,
        f"Score out of 100. {'; '.join(told)}.",
        top + pitch * len(rows) + 2,
        body,
    )


def gap_chart(
    element_id: str, title: str, rows: Sequence[tuple[str, Dot, Dot, Dot, float | None]]
) -> str:
    """How far the student went from its base to the best teacher: (skill, base, student, best teacher, share of the way) a row."""
    left, right, pitch = 96, CHART_WIDTH - 62, 30
    bottom = 8 + pitch * len(rows)

    def x(share: float) -> float:
        return left + (right - left) * share

    body = [
        f'<line class="grid" x1="{x(t / 100):.1f}" y1="8" x2="{x(t / 100):.1f}" y2="{bottom}"/>{_text(t, x(t / 100), bottom + 17, "mid tick")}'
        for t in (0, 25, 50, 75, 100)
    ]
    told = []
    for k, (skill, base, student, best, closed) in enumerate(rows):
        y = 8 + pitch * (k + 0.5)
        went = "went" if student.value >= base.value else "fell"
        said = (
            "–"
            if closed is None
            else f"−{format_percent(-closed)}"
            if closed < 0
            else format_percent(closed)
        )
        body.append(
            f"{_text(_truncate(skill, 14), 0, y + 4.5, 'name')}"
            f'<line class="way" x1="{x(base.value):.1f}" y1="{y:.1f}" x2="{x(best.value):.1f}" y2="{y:.1f}"/>'
            f'<line class="{went}" x1="{x(base.value):.1f}" y1="{y:.1f}" x2="{x(student.value):.1f}" y2="{y:.1f}"/>'
            f"{glyph(best.mark, x(best.value), y)}{glyph(base.mark, x(base.value), y)}{glyph(student.mark, x(student.value), y)}"
            f"{_text(said, CHART_WIDTH, y + 4.5, 'end value')}"
        )
        way = (
            "the best teacher is not ahead of the base" if closed is None else f"{said} of the way"
        )
        told.append(
            f"{skill}: from {format_points(base.value)} to {format_points(student.value)}, best teacher {best.label} {format_points(best.value)}, {way}"
        )
    return _svg(element_id, title, f"{'; '.join(told)}.", bottom + 24, body)


def line_chart(element_id: str, title: str, values: Sequence[tuple[int, float]]) -> str:
    """One quantity over training steps; many points are drawn as means of equal runs of them, and said so."""
    drawn, each = downsample(values)
    ticks = nice_ticks(min(v for _, v in drawn), max(v for _, v in drawn))
    first, last = values[0][0], values[-1][0]
    left, right, top, bottom = 46, CHART_WIDTH - 10, 10, 170

    def x(step: float) -> float:
        return left + (right - left) * (step - first) / max(1, last - first)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    places = max(0, -floor(log10(ticks[1] - ticks[0]) + 1e-9))
    body = [_grid_line(f"{t:.{places}f}", y(t), left, right) for t in ticks]
    body += _step_axis(first, last, left, right, bottom)
    body.append(
        f'<polyline class="curve" points="{" ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in drawn)}"/>'
    )
    body.append(
        f'<circle class="student" cx="{x(drawn[-1][0]):.1f}" cy="{y(drawn[-1][1]):.1f}" r="3.5"/>'
    )
    told = f"{values[0][1]:.3g} at step {first}, {values[-1][1]:.3g} at step {last}."
    told += f" Each point is the mean of {each} logged steps." if each > 1 else ""
    return _svg(element_id, title, told, bottom + 24, body)


def stacked_bars(
    element_id: str, title: str, share_bins: Sequence[ShareBin], teachers: Sequence[tuple[str, str]]
) -> str:
    """Stacked bars over training: each teacher's share of what the title says. `speakers` = (name, mark), bottom first."""
    left, right, top, bottom = 46, CHART_WIDTH - 10, 10, 170
    tall, pitch = bottom - top, (right - left) / len(share_bins)
    body = [_grid_line(f"{t}{NBSP}%", bottom - tall * t / 100, left, right) for t in (0, 50, 100)]
    for k, column in enumerate(share_bins):
        y = float(bottom)
        for share, (name, mark) in zip(column.shares, teachers, strict=True):
            y -= tall * share
            what = (
                f"{name} {format_percent(share)}, steps {column.first_step} to {column.last_step}"
            )
            body.append(
                f'<rect class="part {mark}" x="{left + pitch * k + 1:.1f}" y="{y:.1f}" width="{pitch - 2:.1f}" '
                f'height="{tall * share:.1f}"><title>{escape(what)}</title></rect>'
            )
    body += _step_axis(share_bins[0].first_step, share_bins[-1].last_step, left, right, bottom)
    ends = [
        f"{name} {format_percent(a)} at first, {format_percent(b)} at last"
        for (name, _), a, b in zip(
            teachers, share_bins[0].shares, share_bins[-1].shares, strict=True
        )
    ]
    return _svg(element_id, title, f"{title.capitalize()}: {'; '.join(ends)}.", bottom + 24, body)


def downsample(
    values: Sequence[tuple[int, float]], max_points: int = MAX_CURVE_POINTS
) -> tuple[list[tuple[int, float]], int]:
    """At most `most` points, each the mean of so many neighbours (the last perhaps of fewer), and how many that is."""
    each = ceil(len(values) / max_points)
    runs = [values[k : k + each] for k in range(0, len(values), each)]
    return [(run[len(run) // 2][0], sum(v for _, v in run) / len(run)) for run in runs], each


def bin_shares(
    steps: Sequence[tuple[int, Mapping[str, float]]], names: Sequence[str], max_bins: int = 20
) -> tuple[ShareBin, ...]:
    """Shares per teacher in at most `most` equal stretches of training: the mean over each stretch's logged steps."""
    each = ceil(len(steps) / max_bins)
    runs = [steps[k : k + each] for k in range(0, len(steps), each)]
    return tuple(
        ShareBin(
            run[0][0],
            run[-1][0],
            tuple(sum(shares.get(n, 0.0) for _, shares in run) / len(run) for n in names),
        )
        for run in runs
    )


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that enclose [low, high]."""
    if high - low <= 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 4
    scale = 10.0 ** floor(log10(rough))
    step = scale * next(m for m in (1, 2, 2.5, 5, 10) if m * scale >= rough * (1 - 1e-9))
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def _grid_line(label: str, y: float, left: float, right: float) -> str:
    return f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>{_text(label, left - 8, y + 4, "end tick")}'


def _step_axis(first: int, last: int, left: float, right: float, bottom: float) -> list[str]:
    return [
        _text(format_count(first), left, bottom + 18, "tick"),
        _text("step", (left + right) / 2, bottom + 18, "mid tick"),
        _text(format_count(last), right, bottom + 18, "end tick"),
    ]


def _truncate(label: str, max_chars: int = 15) -> str:
    return label if len(label) <= max_chars else label[: max_chars - 1] + "…"


def _text(text: object, x: float, y: float, classes: str) -> str:
    return f'<text class="{classes}" x="{x:.1f}" y="{y:.1f}">{escape(str(text))}</text>'


def _svg(element_id: str, title: str, description: str, height: float, body: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {CHART_WIDTH} {height:g}" role="img" aria-labelledby="{element_id}-t {element_id}-d">'
        f'<title id="{element_id}-t">{escape(title)}</title><desc id="{element_id}-d">{escape(description)}</desc>{"".join(body)}</svg>'
    )
