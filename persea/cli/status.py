"""persea status: a run at a glance, from its files, whether it lives or not."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from persea.cli.options import AsJson, app


@app.command(rich_help_panel="While it runs")
def status(
    run: Annotated[
        Path, typer.Argument(help="A run folder, such as runs/quickstart.", show_default=False)
    ],
    as_json: AsJson = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Say it again every 2 s, until the run has ended.")
    ] = False,
) -> None:
    """What stands, what runs, how fast, how long still, and the last error: from files alone, also of a dead run."""
    from persea.pipeline.status import WRITE_INTERVAL_S, RunState, status_lines
    from persea.pipeline.status import read_status as read

    while True:
        told = read(run)
        if watch and not as_json:
            typer.echo("\033[2J\033[H", nl=False)
        typer.echo(
            json.dumps(told.to_json()) if as_json else "\n".join(status_lines(told, time.time()))
        )
        if not watch or told.state is not RunState.RUNNING:
            return
        time.sleep(WRITE_INTERVAL_S)
