"""persea compare and persea runs: the students of several runs, and a list of all runs."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from persea.cli.options import AFTER_PANEL, AsJson, app, refuse_other_versions
from persea.errors import RecipeError


class TableFormat(StrEnum):
    """How a comparison is printed."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    HTML = "html"


@app.command(rich_help_panel=AFTER_PANEL)
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Two or more run folders.", show_default=False)
    ],
    as_json: AsJson = False,
    form: Annotated[
        TableFormat, typer.Option("--format", help="table, csv, json, or an html page.")
    ] = TableFormat.TABLE,
) -> None:
    """Compare the students of runs by skill and language, and list where the recipes differ.

    Every run is compared with the first, on the items that both evaluated.
    """
    if len(runs) < 2:
        raise RecipeError(
            "one run has nothing to be compared with",
            where=str(runs[0]),
            remedy="name two or more run folders",
        )
    for folder in runs:
        refuse_other_versions(folder, "evaluate")
    form = TableFormat.JSON if as_json else form
    if len(runs) == 2 and form in (TableFormat.TABLE, TableFormat.JSON):
        _compare_two(runs[0], runs[1], as_json=form is TableFormat.JSON)
    else:
        _compare_many(runs, form)


def _compare_two(run_a: Path, run_b: Path, *, as_json: bool) -> None:
    from persea.pipeline.progress import print_table
    from persea.report.compare_runs import RUN_COMPARISON_COLUMNS, compare_runs

    comparison = compare_runs(run_a, run_b)
    if as_json:
        typer.echo(json.dumps(comparison.to_json(), indent=1, ensure_ascii=False))
        return
    print_table(RUN_COMPARISON_COLUMNS, comparison.table_rows())
    for key, (a, b) in comparison.recipe_differences.items():
        typer.echo(f"{key}: {a} -> {b}")
    typer.echo(comparison.note())


def _compare_many(runs: list[Path], form: TableFormat) -> None:
    from persea.pipeline.progress import print_table
    from persea.report.compare_many import compare_many_runs

    comparison = compare_many_runs(runs)
    if form is TableFormat.JSON:
        typer.echo(json.dumps(comparison.to_json(), indent=1, ensure_ascii=False))
    elif form is TableFormat.CSV:
        typer.echo(comparison.to_csv(), nl=False)
    elif form is TableFormat.HTML:
        typer.echo(comparison.to_html())
    else:
        print_table(*comparison.table())
        for key, values in comparison.recipe_values.items():
            typer.echo(f"{key}: {' | '.join(map(str, values))}")


@app.command("runs", rich_help_panel=AFTER_PANEL)
def list_all_runs(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders, or folders that hold them. Default: runs.", show_default=False
        ),
    ] = [],  # noqa: B006 (typer's own form of an optional list)
    as_json: AsJson = False,
) -> None:
    """List runs with their state, the scores of their students, and where their recipes differ."""
    from persea.pipeline.progress import print_table
    from persea.pipeline.run_list import list_runs, table

    found = list_runs(folders or [Path("runs")])
    if as_json:
        typer.echo(json.dumps([run.to_json() for run in found], indent=1, ensure_ascii=False))
    else:
        print_table(*table(found))
