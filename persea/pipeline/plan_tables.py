"""The tables of a plan as text."""

from __future__ import annotations

from collections.abc import Sequence

from persea.pipeline.cost import format_duration
from persea.pipeline.cost_lines import CostLine, Way

COST_COLUMNS = (
    "stage",
    "model",
    "writes",
    "reads",
    "time",
    "device h",
    "memory",
    "disk",
    "network",
    "money",
)
WAY_COLUMNS = ("teacher", "weights", "cached", "online", "on-policy", "online step")
UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
DAY_S = 86_400


EMPTY_CELLS = {"-", "0 B"}


def cost_table(lines: Sequence[CostLine]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return columns and rows of the table of costs, without columns that hold nothing.

    Ten columns are wider than a terminal of 80 characters, and one that is cut off hides a cost.
    """
    rows = cost_rows(lines)
    kept = [k for k in range(len(COST_COLUMNS)) if any(row[k] not in EMPTY_CELLS for row in rows)]
    return tuple(COST_COLUMNS[k] for k in kept), [tuple(row[k] for k in kept) for row in rows]


def cost_rows(lines: Sequence[CostLine]) -> list[tuple[str, ...]]:
    """Return the rows of COST_COLUMNS, and the sum of several lines."""
    rows = [_row(line.stage, line.model, [line]) for line in lines]
    return [*rows, _row("total", "", lines)] if len(lines) > 1 else rows


def _row(stage: str, model: str, lines: Sequence[CostLine]) -> tuple[str, ...]:
    at_most = "≤" if any(line.is_upper_bound for line in lines) else ""
    written = sum(line.tokens_written for line in lines)
    seconds = [line.seconds for line in lines]
    hours = [line.gpu_hours for line in lines]
    money = [line.money for line in lines]
    memory = [line.memory_bytes for line in lines if line.memory_bytes]
    return (
        stage,
        model,
        f"{at_most}{short_number(written)}".strip() if written else "-",
        short_number(sum(line.tokens_read for line in lines)).strip(),
        format_time(_sum(seconds)),
        _format_hours(_sum(hours)),
        f"{short_number(max(memory))}B" if memory else "-",
        f"{short_number(sum(line.disk_bytes for line in lines))}B",
        f"{short_number(sum(line.network_bytes for line in lines))}B",
        "-" if (total := _sum(money)) is None else f"{total:,.2f}",
    )


def _sum(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if known and len(known) == len(values) else None


def way_rows(ways: Sequence[Way]) -> list[tuple[str, ...]]:
    """Return the rows of WAY_COLUMNS."""
    return [
        (
            way.teacher,
            way.kind,
            *map(_format_hours, (way.cached, way.online, way.on_policy)),
            f"{way.step_ratio:.2f} x",
        )
        for way in ways
    ]


def short_number(value: float) -> str:
    """Return a number to three digits with a letter for its size.

    Example:
        >>> short_number(236e9), short_number(999), short_number(2.43e12)
        ('236 G', '999 ', '2.43 T')
    """
    for size, letter in UNITS:
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.0f} "


def format_time(seconds: float | None) -> str:
    """Return a duration: seconds to days; "-" = unknown."""
    if seconds is None:
        return "-"
    return f"{seconds / DAY_S:.1f} d" if seconds > 2 * DAY_S else format_duration(seconds)


def _format_hours(hours: float | None) -> str:
    if hours is None:
        return "-"
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"
