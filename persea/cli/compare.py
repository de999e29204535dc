"""persea compare: the students of two runs on the same items."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from persea.cli.options import AFTER_PANEL, AsJson, app, refuse_other_versions


@app.command(rich_help_panel=AFTER_PANEL)
def compare(
    run_a: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    run_b: Annotated[Path, typer.Argument(help="Another run folder.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Compare the students of two runs by skill and language, and list where the recipes differ.

    Only items that both runs evaluated are compared.
    """
    from persea.pipeline.progress import print_table
    from persea.report.compare_runs import RUN_COMPARISON_COLUMNS, compare_runs

    for folder in (run_a, run_b):
        refuse_other_versions(folder, "evaluate")
    comparison = compare_runs(run_a, run_b)
    if as_json:
        typer.echo(json.dumps(comparison.to_json(), indent=1, ensure_ascii=False))
        return
    print_table(RUN_COMPARISON_COLUMNS, comparison.table_rows())
    for key, (a, b) in comparison.recipe_differences.items():
        typer.echo(f"{key}: {a} -> {b}")
    typer.echo(comparison.note())
