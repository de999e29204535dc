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
        str,
        typer.Argument(
            help="A run folder, such as runs/quickstart; or the `capture.store` of runs elsewhere, "
            "such as s3://bucket/persea.",
            show_default=False,
        ),
    ],
    as_json: AsJson = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Print the status every 2 s until the run ends.")
    ] = False,
) -> None:
    """Show which stages are done, what runs, its speed, the time left and the last error.

    Reads files only, so it also works for a run that was killed. A run whose captures are in an
    object store copies its status there.
    """
    from persea.cache.object_store import is_object_store
    from persea.pipeline.status import WRITE_INTERVAL_S, RunState, read_status, status_lines
    from persea.pipeline.status_copy import COPY_INTERVAL_S, read_copied_statuses

    is_copied = is_object_store(run)
    while True:
        found = list(read_copied_statuses(run)) if is_copied else [("", read_status(Path(run)))]
        if watch and not as_json:
            typer.echo("\033[2J\033[H", nl=False)
        for url, one in found:
            if as_json:
                typer.echo(json.dumps(one.to_json() | ({"url": url} if is_copied else {})))
                continue
            lines = status_lines(one, time.time())
            typer.echo("\n".join([url, *lines] if is_copied else lines))
        if not watch or all(one.state is not RunState.RUNNING for _, one in found):
            return
        time.sleep(COPY_INTERVAL_S if is_copied else WRITE_INTERVAL_S)
