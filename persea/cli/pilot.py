"""persea pilot: which teacher, or which loss, does the student learn most from?"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from persea.cli.options import (
    BEFORE_PANEL,
    DEFAULT_OUT,
    NO_OVERRIDES,
    AsJson,
    Out,
    RecipePath,
    Sets,
    app,
    make_run_context,
)
from persea.errors import RefusedError


@app.command(rich_help_panel=BEFORE_PANEL)
def pilot(
    recipe: RecipePath,
    set_: Sets = NO_OVERRIDES,
    out: Out = DEFAULT_OUT,
    as_json: AsJson = False,
    share: Annotated[
        float,
        typer.Option("--share", min=0.0001, max=1, help="Share of the recipe's training steps."),
    ] = 0.03,
    method: Annotated[
        list[str],
        typer.Option(
            "--method",
            help="An objective to try with each teacher: events or sft. Repeatable. Default: the "
            "recipe's own losses.",
            show_default=False,
        ),
    ] = NO_OVERRIDES,
) -> None:
    """Train the student shortly with each teacher, and rank them by what it learned.

    Exit code 4 if no candidate improved the student with confidence.
    """
    context = make_run_context(recipe, set_, out)
    from persea.pipeline.pilot import TABLE_COLUMNS, run_pilot
    from persea.pipeline.progress import print_table, progress_bars

    with progress_bars(quiet=as_json) as progress:
        result = run_pilot(context, progress, share, method)
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=1))
    else:
        print_table(TABLE_COLUMNS, result.table_rows())
        typer.echo(
            f"untrained student {result.base_bits_per_byte:.3f} bits per byte; {result.steps} of "
            f"{result.of_steps} steps each; measured on {result.num_held_out} held-out texts, "
            f"{result.num_bytes:,} bytes; intervals 95 %\n{result.sentence}"
        )
    if result.candidates[0].low <= 0:
        raise RefusedError(
            result.sentence,
            where="pilot",
            remedy="other teachers, a larger --share, or another learning rate",
        )
