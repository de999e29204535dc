"""persea status: a run at a glance, read from its files."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from persea.cli.options import DURING_PANEL, AsJson, app


@app.command(rich_help_panel=DURING_PANEL)
def status(
    run: Annotated[
        Path, typer.Argument(help="A run folder, such as runs/quickstart.", show_default=False)
    ],
    as_json: AsJson = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Print the status every 2 s until the run ends.")
    ] = False,
) -> None:
    """Show which stages are done, what runs, its speed, the time left and the last error.

    Reads files only, so it also works for a run that was killed.
    """
    from persea.pipeline.status import WRITE_INTERVAL_S, RunState, read_status, status_lines

    while True:
        run_status = read_status(run)
        if watch and not as_json:
            typer.echo("\033[2J\033[H", nl=False)
        typer.echo(
            json.dumps(run_status.to_json())
            if as_json
            else "\n".join(status_lines(run_status, time.time()))
        )
        if not watch or run_status.state is not RunState.RUNNING:
            return
        time.sleep(WRITE_INTERVAL_S)
