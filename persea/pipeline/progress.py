"""Progress display: a bar a stage on a terminal, a line a stage elsewhere, and result tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column, Table

from persea.report.text_section import TEXT_TABLE_NOTE, text_columns, text_rows, text_verdict

if TYPE_CHECKING:
    from persea.evaluation.text_report import TextReport
    from persea.vocab_extension.resize_model import ProgressCallback

# column title -> key of a pair in check.json: these four shares add up to 100 % of the tokens
TOKEN_SHARES = {
    "events": "boundary_share",
    "partial": "partial_token_share",
    "span": "span_share",
    "text\nonly": "cross_entropy_only_share",
}


WARNING_PREFIX = "warning: "  # of a message of progress that stays on the screen


@contextmanager
def progress_bars(quiet: bool = False) -> Iterator[ProgressCallback]:
    """Yield a progress callback that draws on stderr: stdout is for the result.

    Args:
        quiet: Draw nothing.
    """
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        yield _line_progress(console)
        return
    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[message]}"),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def draw(stage: str, fraction: float, message: str) -> None:
            if message.startswith(WARNING_PREFIX):  # stays on the screen, above the bars
                bars.console.print(f"{stage:>9} {message}", highlight=False, soft_wrap=True)
                return
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=1.0, message="")
            bars.update(tasks[stage], completed=fraction, message=message)

        yield draw


LINE_INTERVAL_S = 10.0  # between two lines of a stage whose tenth does not change


def _line_progress(
    console: Console, clock: Callable[[], float] = time.monotonic
) -> ProgressCallback:
    """Return a callback that prints a line a tenth of each stage, or every LINE_INTERVAL_S."""
    printed: dict[str, tuple[int, bool, float]] = {}  # stage -> (tenth, with words, clock)

    def print_line(stage: str, fraction: float, message: str) -> None:
        if message.startswith(WARNING_PREFIX):
            console.print(f"{stage:>9} {message}", highlight=False, soft_wrap=True)
            return
        tenth, now = int(fraction * 10), clock()
        before = printed.get(stage)
        if (
            before is None
            or before[0] != tenth
            or fraction == 1.0
            or (not before[1] and message)
            or now - before[2] >= LINE_INTERVAL_S
        ):
            console.print(f"{stage:>9} {fraction:4.0%} {message}", highlight=False)
            printed[stage] = tenth, bool(message), now

    return print_line


MAX_WORD_WIDTH = 24  # characters; a longer name is folded


def _wrapping_columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Column]:
    """Return columns that wrap between words and never cut one, unless it is very long."""
    words = [[word for row in rows for word in row[k].split()] for k in range(len(titles))]
    widest = [max(map(len, some), default=1) for some in words]
    return [
        Column(title, min_width=min(width, MAX_WORD_WIDTH), overflow="fold")
        for title, width in zip(titles, widest, strict=True)
    ]


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a plain table on stdout. A narrow terminal wraps cells between words, never inside."""
    table = Table(
        *_wrapping_columns(columns, rows), box=None, header_style="bold", padding=(0, 1, 0, 0)
    )
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_check(check_result: dict[str, Any]) -> None:
    """Print check.json: a table a teacher with a row a skill and language, and template bits."""
    from persea.evaluation.check_sampling import describe_measured

    console = Console()
    for teacher in dict.fromkeys(p["teacher"] for p in check_result["pairs"]):
        console.print(
            _check_table(teacher, [p for p in check_result["pairs"] if p["teacher"] == teacher])
        )
    console.print(
        "of the student's tokens: events (at a common boundary) + partial (inside a teacher token) "
        "+ span + text only = 100 %; 1:1 = same token on both sides\n"
        "of the common boundaries: differ (the two tokens are different events), spaces\n"
        "bytes of an event / bytes of a student token"
        + (
            "; retained = teacher's probability on student tokens: mean/5th percentile"
            if any(p["retained_mass_mean"] is not None for p in check_result["pairs"])
            else ""
        ),
        style="dim",
    )
    for line in _unwritable_lines(check_result):
        console.print(line, highlight=False, soft_wrap=True)
    for one in check_result.get("named_mass", []):
        console.print(
            f"{one['teacher']}, {one['language']}: the {one['top_logprobs']} listed tokens have "
            f"{one['listed_mass']:.1%} of the probability, {one['event_mass']:.1%} in whole events "
            f"({one['positions']:,} positions)",
            highlight=False,
            soft_wrap=True,
        )
    for measured in check_result.get("measured", []):
        console.print(describe_measured(measured), style="dim", highlight=False, soft_wrap=True)
    for likelihood in check_result["likelihoods"]:
        if not likelihood["language"]:
            console.print(
                f"{likelihood['teacher']}: {likelihood['template_bits_per_byte']:.2f} bits per "
                f"byte with its own template, {likelihood['bare_bits_per_byte']:.2f} without one",
                highlight=False,
                soft_wrap=True,
            )


def _unwritable_lines(check_result: dict[str, Any]) -> list[str]:
    """Describe what vocabularies that lack single bytes cannot write."""
    return [
        f"{one['model']}: its vocabulary lacks the bytes {one['missing_bytes']}; {one['left_out']} "
        f"of {one['texts']} texts need one and are left out"
        for one in check_result.get("unwritable_texts", [])
    ] + [
        f"{one['teacher']}: {one['tokens']:,} of {one['vocab_size']:,} tokens of the {one['side']} "
        "cannot be written by the other side; they have no event, and their probability goes to "
        "the cross-entropy"
        for one in check_result.get("unwritable_tokens", [])
    ]


def _check_table(teacher: str, pairs: Sequence[dict[str, Any]]) -> Table:
    has_mass = any(p["retained_mass_mean"] is not None for p in pairs)
    titles = ["text", "tokens", *TOKEN_SHARES, "1:1", "differ", "spaces", "bytes"]
    titles += ["retained"] * has_mass
    rows = []
    for p in pairs:
        cells = [" ".join(filter(None, (p["skill"], p["language"]))), f"{p['tokens']:,}"]
        cells += [f"{p[key]:.0%}" for key in (*TOKEN_SHARES.values(), "one_to_one_share")]
        cells += [f"{p['event_disagreement']:.1%}", f"{p['space_event_share']:.0%}"]
        cells += [f"{p['mean_event_bytes']:.1f}/{p['mean_token_bytes']:.1f}"]
        if has_mass:
            mean, p5 = p["retained_mass_mean"], p["retained_mass_p5"]
            cells += ["" if mean is None else f"{mean:.1%}/{p5:.0%}"]
        rows.append(cells)
    columns = _wrapping_columns(titles, rows)
    for column in columns[1:]:
        column.justify = "right"
    table = Table(
        *columns,
        box=None,
        header_style="bold",
        title=f"{teacher} -> student",
        title_justify="left",
        padding=(0, 1, 0, 0),
    )
    for cells in rows:
        table.add_row(*cells)
    return table


def print_report(report: dict[str, Any]) -> None:
    """Print report.json: student, base and teachers on every skill, with 95 % intervals."""
    if not report["skills"]:  # held-out texts alone were measured
        return
    first = next(iter(report["skills"].values()))
    teachers = list(first["teachers"])
    table = Table(
        # a long name is folded, never cut
        *(Column(n, overflow="fold") for n in ("skill", "student", "base", *teachers, "retained")),
        box=None,
        header_style="bold",
        padding=(0, 1, 0, 0),
    )
    for name, skill in report["skills"].items():
        cells = [_score_cell(skill["student"]), _score_cell(skill["base"])]
        cells += [
            _score_cell(score, t == skill["best_teacher"] and score["value"] > 0)
            for t, score in skill["teachers"].items()
        ]
        retained = skill["retained"]
        table.add_row(name, *cells, "-" if retained is None else f"{retained:.0%}")
    bits = report["bits_per_byte"]
    table.add_row(
        "bits/byte",
        *(
            f"{bits[name]['all']:.2f}" if "all" in bits[name] else "-"
            for name in ("student", "base", *teachers)
        ),
        "",
    )
    console = Console()
    console.print(table)
    console.print(
        f"share of n = {first['student']['n']} held-out answers right, 95 % interval; "
        "* best teacher; retained = student / best teacher",
        style="dim",
    )


def print_texts(report: TextReport) -> None:
    """Print bits per byte on held-out texts: a row a language, and the verdict in one line."""
    print_table(text_columns(report, best_only=True), text_rows(report, best_only=True))
    console = Console()
    console.print(TEXT_TABLE_NOTE, style="dim")
    console.print(text_verdict(report), highlight=False, soft_wrap=True)


def _score_cell(score: dict[str, float], is_best: bool = False) -> str:
    """Format a score over its interval: two short lines, so five models fit into 80 columns."""
    return (
        f"{score['value']:.2f}{'*' if is_best else ''}\n"
        f"[dim]{score['low']:.2f}-{score['high']:.2f}[/]"
    )
