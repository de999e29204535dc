"""Inline SVG charts of the report page.

The page's style sheet colours each marker by its classes ("student", "base", "t0" ... "t5"). Every
marker also has a shape of its own, so that no information depends on colour alone. Every chart has
a title and a description for screen readers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

from persea.report.text import NBSP, format_count, format_percent, format_points

# Width of every chart's view box: on a phone its 13 px texts are still about 11 px.
CHART_WIDTH = 440
NUM_COLOURS, NUM_SHAPES = 6, 5
MAX_CURVE_POINTS, MAX_BARS = 160, 20


@dataclass(frozen=True)
class Dot:
    """One model's score and its interval, in 0..1; `mark` is the marker's classes."""

    label: str
    mark: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ShareBin:
    """The mean shares of the teachers over an interval of steps, each in 0..1, together at most
    1.
    """

    first_step: int
    last_step: int
    shares: tuple[float, ...]


def teacher_mark(index: int) -> str:
    """Return the marker of the index-th teacher. 6 colours and 5 shapes make thirty different
    markers.
    """
    return f"t{index % NUM_COLOURS} s{index % NUM_SHAPES}"


def glyph(mark: str, x: float, y: float, r: float = 5) -> str:
    """Draw a marker, centred at (x, y), of radius r."""
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
    """Draw a marker for a legend; the model's name follows it in the text."""
    return (
        '<svg class="swatch" viewBox="0 0 16 16" width="16" height="16" aria-hidden="true">'
        f"{glyph(mark, 8, 8)}</svg>"
    )


def dot_plot(element_id: str, title: str, rows: Sequence[Dot], band: tuple[float, float]) -> str:
    """Draw the score and interval of every model on one skill, from 0 to 100.

    Args:
        element_id: Unique id in the page.
        title: Title for screen readers.
        rows: One dot for each model.
        band: The best teacher's interval, shaded behind all rows.

    Returns:
        SVG.
    """
    left, right, pitch = 118, CHART_WIDTH - 52, 25
    bottom = 8 + pitch * len(rows)

    def x(share: float) -> float:
        return left + (right - left) * share

    body = [_rect("band", x(band[0]), 8, x(band[1]) - x(band[0]), bottom - 8)]
    body += _score_axis(x, bottom)
    for k, row in enumerate(rows):
        y = 8 + pitch * (k + 0.5)
        value = _text(format_points(row.value), CHART_WIDTH, y + 4.5, f"end value {row.mark}")
        body.append(
            f'<g class="{row.mark}">'
            f"{_text(_truncate(row.label), 0, y + 4.5, f'name {row.mark}')}"
            f"{_line(f'whisker {row.mark}', x(row.low), y, x(row.high), y)}"
            f"{glyph(row.mark, x(row.value), y)}{value}</g>"
        )
    description = "; ".join(
        f"{r.label} {format_points(r.value)}, "
        f"95 % interval {format_points(r.low)} to {format_points(r.high)}"
        for r in rows
    )
    return _svg(element_id, title, f"Score out of 100. {description}.", bottom + 24, body)


def heatmap(
    element_id: str,
    title: str,
    columns: Sequence[tuple[str, str]],
    rows: Sequence[tuple[str, Sequence[float | None]]],
) -> str:
    """Draw scores as a matrix of tinted cells with their numbers: pale is 0, deep is 100.

    Args:
        element_id: Unique id in the page.
        title: Title for screen readers.
        columns: (model, marker).
        rows: (row name, one score in 0..1 for each column; None = not measured).

    Returns:
        SVG.
    """
    left, pitch, top = 96, 27, 44
    wide = (CHART_WIDTH - left) / len(columns)
    body = []
    for k, (name, mark) in enumerate(columns):
        at = left + wide * (k + 0.5)
        label = _truncate(name, max(3, int(wide / 7.6)))
        body.append(f"{glyph(mark, at, 12)}{_text(label, at, 35, 'mid tick')}")
    for j, (name, values) in enumerate(rows):
        y = top + pitch * j
        body.append(_text(_truncate(name, 14), 0, y + 17.5, "name"))
        for k, value in enumerate(values):
            x, tint = left + wide * k, 0.05 + 0.5 * (value or 0)
            number = "–" if value is None else f"{100 * value:.0f}"
            body.append(
                _rect("heat", x + 1, y + 1, wide - 2, pitch - 2, f' fill-opacity="{tint:.3f}"')
                + _text(number, x + wide / 2, y + 17.5, "mid")
            )
    descriptions = [
        f"{name}: "
        + ", ".join(
            f"{model} {'not measured' if v is None else format_points(v)}"
            for (model, _), v in zip(columns, values, strict=True)
        )
        for name, values in rows
    ]
    return _svg(
        element_id,
        title,
        f"Score out of 100. {'; '.join(descriptions)}.",
        top + pitch * len(rows) + 2,
        body,
    )


def gap_chart(
    element_id: str, title: str, rows: Sequence[tuple[str, Dot, Dot, Dot, float | None]]
) -> str:
    """Draw how much of the gap between base and best teacher the student closed.

    Args:
        element_id: Unique id in the page.
        title: Title for screen readers.
        rows: (skill, base, student, best teacher, closed share of the gap; None = the best teacher
            is not ahead).

    Returns:
        SVG.
    """
    left, right, pitch = 96, CHART_WIDTH - 62, 30
    bottom = 8 + pitch * len(rows)

    def x(share: float) -> float:
        return left + (right - left) * share

    body = _score_axis(x, bottom)
    descriptions = []
    for k, (skill, base, student, best, closed) in enumerate(rows):
        y = 8 + pitch * (k + 0.5)
        line_class = "went" if student.value >= base.value else "fell"
        label = "–" if closed is None else format_percent(closed)
        body += [
            _text(_truncate(skill, 14), 0, y + 4.5, "name"),
            _line("way", x(base.value), y, x(best.value), y),
            _line(line_class, x(base.value), y, x(student.value), y),
            *(glyph(dot.mark, x(dot.value), y) for dot in (best, base, student)),
            _text(label, CHART_WIDTH, y + 4.5, "end value"),
        ]
        gap = (
            "the best teacher is not ahead of the base"
            if closed is None
            else f"{label} of the gap closed"
        )
        descriptions.append(
            f"{skill}: base {format_points(base.value)}, student {format_points(student.value)}, "
            f"best teacher {best.label} {format_points(best.value)}, {gap}"
        )
    return _svg(element_id, title, f"{'; '.join(descriptions)}.", bottom + 24, body)


def bits_chart(element_id: str, title: str, rows: Sequence[tuple[str, Sequence[Dot], str]]) -> str:
    """Draw bits per byte of a few models in each language, on a common axis.

    Args:
        element_id: Unique id in the page.
        title: Title for screen readers.
        rows: (row name, one dot for each model: base, student and best teacher, text at the end).

    Returns:
        SVG.
    """
    left, right, pitch = 96, CHART_WIDTH - 62, 30
    bottom = 8 + pitch * len(rows)
    ends = [v for _, dots, _ in rows for d in dots for v in (d.low, d.high)]
    ticks = nice_ticks(max(0.0, min(ends)), max(ends))

    def x(bits: float) -> float:
        return left + (right - left) * (bits - ticks[0]) / (ticks[-1] - ticks[0])

    body = []
    for tick in ticks:
        body.append(_line("grid", x(tick), 8, x(tick), bottom))
        body.append(_text(f"{tick:.4g}", x(tick), bottom + 17, "mid tick"))
    descriptions = []
    for k, (name, dots, end) in enumerate(rows):
        y = 8 + pitch * (k + 0.5)
        base, student, *others = dots
        line_class = "went" if student.value <= base.value else "fell"
        body += [
            _text(_truncate(name, 14), 0, y + 4.5, "name"),
            *(_line("way", x(base.value), y, x(o.value), y) for o in others),
            _line(line_class, x(base.value), y, x(student.value), y),
            *(_line(f"whisker {d.mark}", x(d.low), y, x(d.high), y) for d in dots),
            *(glyph(d.mark, x(d.value), y) for d in (*others, base, student)),
            _text(end, CHART_WIDTH, y + 4.5, "end value"),
        ]
        models = ", ".join(f"{d.label} {d.value:.3f}" for d in dots)
        descriptions.append(f"{name}: {models}, gap closed {end}")
    return _svg(element_id, title, f"{'; '.join(descriptions)}.", bottom + 24, body)


def line_chart(element_id: str, title: str, values: Sequence[tuple[int, float]]) -> str:
    """Draw a quantity over training steps; the description gives the number of steps per point.

    Args:
        element_id: Unique id in the page.
        title: Title for screen readers.
        values: (step, value), at least one.

    Returns:
        SVG.
    """
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
    points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in drawn)
    end_x, end_y = x(drawn[-1][0]), y(drawn[-1][1])
    body += [
        f'<polyline class="curve" points="{points}"/>',
        f'<circle class="student" cx="{end_x:.1f}" cy="{end_y:.1f}" r="3.5"/>',
    ]
    description = f"{values[0][1]:.3g} at step {first}, {values[-1][1]:.3g} at step {last}."
    description += f" Each point is the mean of {each} logged steps." if each > 1 else ""
    return _svg(element_id, title, description, bottom + 24, body)


def stacked_bars(
    element_id: str, title: str, share_bins: Sequence[ShareBin], teachers: Sequence[tuple[str, str]]
) -> str:
    """Draw the teachers' shares over training as stacked bars.

    Args:
        element_id: Unique id in the page.
        title: The quantity that is shared.
        share_bins: One bar for each interval of steps.
        teachers: (name, marker), from bottom to top.

    Returns:
        SVG.
    """
    left, right, top, bottom = 46, CHART_WIDTH - 10, 10, 170
    tall, pitch = bottom - top, (right - left) / len(share_bins)
    body = [_grid_line(f"{t}{NBSP}%", bottom - tall * t / 100, left, right) for t in (0, 50, 100)]
    for k, column in enumerate(share_bins):
        y = float(bottom)
        for share, (name, mark) in zip(column.shares, teachers, strict=True):
            y -= tall * share
            label = (
                f"{name} {format_percent(share)}, steps {column.first_step} to {column.last_step}"
            )
            box = _rect(
                f"part {mark}", left + pitch * k + 1, y, pitch - 2, tall * share, close=False
            )
            body.append(f"{box}<title>{escape(label)}</title></rect>")
    body += _step_axis(share_bins[0].first_step, share_bins[-1].last_step, left, right, bottom)
    ends = [
        f"{name} {format_percent(a)} in the first bar, {format_percent(b)} in the last"
        for (name, _), a, b in zip(
            teachers, share_bins[0].shares, share_bins[-1].shares, strict=True
        )
    ]
    return _svg(element_id, title, f"{title.capitalize()}: {'; '.join(ends)}.", bottom + 24, body)


def downsample(
    values: Sequence[tuple[int, float]], max_points: int = MAX_CURVE_POINTS
) -> tuple[list[tuple[int, float]], int]:
    """Average neighbours so that at most `max_points` points remain.

    Returns:
        The points, and how many values each averages (the last point may average fewer).
    """
    each = ceil(len(values) / max_points)
    runs = [values[k : k + each] for k in range(0, len(values), each)]
    return [(run[len(run) // 2][0], sum(v for _, v in run) / len(run)) for run in runs], each


def bin_shares(
    steps: Sequence[tuple[int, Mapping[str, float]]], names: Sequence[str], max_bins: int = MAX_BARS
) -> tuple[ShareBin, ...]:
    """Average each teacher's shares over at most `max_bins` equal intervals of the logged steps."""
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
    """Return three to six round numbers that enclose [low, high]."""
    if high - low <= 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 4
    scale = 10.0 ** floor(log10(rough))
    step = scale * next(m for m in (1, 2, 2.5, 5, 10) if m * scale >= rough * (1 - 1e-9))
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def _line(classes: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{classes}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _rect(
    classes: str,
    x: float,
    y: float,
    width: float,
    height: float,
    attributes: str = "",
    close: bool = True,
) -> str:
    end = "/>" if close else ">"
    return (
        f'<rect class="{classes}" x="{x:.1f}" y="{y:.1f}" '
        f'width="{width:.1f}" height="{height:.1f}"{attributes}{end}'
    )


def _score_axis(x: Callable[[float], float], bottom: float) -> list[str]:
    """Draw vertical lines at scores 0, 25, 50, 75 and 100, with their numbers."""
    ticks = [(t, x(t / 100)) for t in (0, 25, 50, 75, 100)]
    return [
        _line("grid", at, 8, at, bottom) + _text(t, at, bottom + 17, "mid tick") for t, at in ticks
    ]


def _grid_line(label: str, y: float, left: float, right: float) -> str:
    return _line("grid", left, y, right, y) + _text(label, left - 8, y + 4, "end tick")


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
        f'<svg class="chart" viewBox="0 0 {CHART_WIDTH} {height:g}" role="img" '
        f'aria-labelledby="{element_id}-t {element_id}-d">'
        f'<title id="{element_id}-t">{escape(title)}</title>'
        f'<desc id="{element_id}-d">{escape(description)}</desc>{"".join(body)}</svg>'
    )
