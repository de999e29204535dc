"""persea compare: two runs beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from persea.cli.options import AsJson, app


@app.command(rich_help_panel="After a run")
def compare(
    run_a: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    run_b: Annotated[Path, typer.Argument(help="Another one.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """The students of two runs, skill by skill and language by language, on the items that both were asked; and what their recipes change."""
    from persea.pipeline.progress import print_table
    from persea.report.compare_runs import RUN_COMPARISON_COLUMNS
    from persea.report.compare_runs import compare_runs as lay

    told = lay(run_a, run_b)
    if as_json:
        typer.echo(json.dumps(told.to_json(), indent=1, ensure_ascii=False))
        return
    print_table(RUN_COMPARISON_COLUMNS, told.table_rows())
    for key, (a, b) in told.recipe_differences.items():
        typer.echo(f"{key}: {a} -> {b}")
    typer.echo(told.note())
