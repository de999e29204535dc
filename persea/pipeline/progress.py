"""What a person sees while it runs: a bar a stage on a terminal, a line a stage elsewhere, and the table at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

if TYPE_CHECKING:
    from persea.pipeline.run_context import ProgressCallback


@contextmanager
def progress_bars(quiet: bool = False) -> Iterator[ProgressCallback]:
    """A function (stage, share done, words) that draws; bars go to stderr, so that stdout is the result."""
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        yield _line_progress(console)
        return
    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[words]}"),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def tell(stage: str, share: float, words: str) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=1.0, words="")
            progress.update(tasks[stage], completed=share, words=words)

        yield tell


def _line_progress(console: Console) -> ProgressCallback:
    told: dict[str, int] = {}

    def tell(stage: str, share: float, words: str) -> None:
        tenth = int(share * 10)
        if told.get(stage) != tenth or share in (0.0, 1.0):
            console.print(f"{stage:>9} {share:4.0%} {words}", highlight=False)
        told[stage] = tenth

    return tell


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table on stdout."""
    drawn = Table(*columns, box=None, header_style="bold")
    for row in rows:
        drawn.add_row(*row)
    Console().print(drawn)


def print_check(check_result: dict[str, Any]) -> None:
    """What check found: a table a teacher, a row a skill and language; and how well each teacher's template suits it."""
    console = Console()
    for teacher in dict.fromkeys(p["teacher"] for p in check_result["pairs"]):
        rows = [p for p in check_result["pairs"] if p["teacher"] == teacher]
        kept = any(p["kept_mean"] is not None for p in rows)
        names = (
            "text",
            "tokens",
            "events",
            "inside",
            "chunk",
            "alone",
            "1:1",
            "differ",
            "spaces",
            "bytes",
            *(("kept",) if kept else ()),
        )
        drawn = Table(
            *(Column(name, justify="left" if name == "text" else "right") for name in names),
            box=None,
            header_style="bold",
            title=f"{teacher} -> student",
            title_justify="left",
            padding=(0, 1, 0, 0),
        )
        for p in rows:
            shares = (
                f"{p[k]:.0%}"
                for k in ("boundary", "completion", "chunk", "cross_entropy_only", "one_to_one")
            )
            mass = (
                (f"{p['kept_mean']:.1%}/{p['kept_p5']:.0%}",)
                if p["kept_mean"] is not None
                else ("",)
                if kept
                else ()
            )
            drawn.add_row(
                " ".join(filter(None, (p["skill"], p["language"]))),
                f"{p['tokens']:,}",
                *shares,
                f"{p['disagreement']:.1%}",
                f"{p['spaces']:.0%}",
                f"{p['event_bytes']:.1f}/{p['token_bytes']:.1f}",
                *mass,
            )
        console.print(drawn)
    console.print(
        "of the student's tokens: events + inside a teacher token + chunk + alone = 100 %; of the common boundaries: differ, spaces; "
        "bytes an event tells / a student token has",
        style="dim",
    )
    for one in check_result["likelihoods"]:
        if not one["language"]:
            console.print(
                f"{one['teacher']}: {one['template']:.2f} bits a byte in its own template, {one['bare']:.2f} on the bare text",
                highlight=False,
            )


def print_report(report: dict[str, Any]) -> None:
    """Student, base and every teacher on every skill; the best teacher is starred, intervals are 95 %."""
    first = next(iter(report["skills"].values()))
    teachers = list(first["teachers"])
    columns = (
        Column(name, overflow="fold") for name in ("skill", "student", "base", *teachers, "kept")
    )  # a long name is folded, never cut
    drawn = Table(*columns, box=None, header_style="bold", padding=(0, 1, 0, 0))
    for name, skill in report["skills"].items():
        cells = [_score_cell(skill["student"]), _score_cell(skill["base"])]
        cells += [_score_cell(skill["teachers"][t], t == skill["best_teacher"]) for t in teachers]
        kept = skill["retained"]
        drawn.add_row(name, *cells, "-" if kept is None else f"{kept:.0%}")
    bits = report["bits_per_byte"]
    drawn.add_row(
        "bits/byte",
        *(
            f"{bits[who]['all']:.2f}" if "all" in bits[who] else "-"
            for who in ("student", "base", *teachers)
        ),
        "",
    )
    n = first["student"]["n"]
    console = Console()
    console.print(drawn)
    console.print(
        f"share of n = {n} held-out answers right, 95 % interval; * best teacher; kept = student / best teacher",
        style="dim",
    )


def _score_cell(score: dict[str, float], best: bool = False) -> str:
    """Value over interval, two short lines, so that five speakers fit into 80 columns."""
    return (
        f"{score['value']:.2f}{'*' if best else ''}\n[dim]{score['low']:.2f}-{score['high']:.2f}[/]"
    )
