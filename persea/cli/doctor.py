"""persea doctor: what this machine has, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from persea.cli.options import BEFORE_PANEL, AsJson, app, load_checked_recipe


@app.command(rich_help_panel=BEFORE_PANEL)
def doctor(
    recipe: Annotated[
        Path | None,
        typer.Argument(help="A recipe whose endpoints and licences are looked at too."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look at packages, devices, disk, sandbox, hub, and the endpoints and licences of a recipe."""
    from persea.pipeline.doctor import State, examine
    from persea.pipeline.model_refs import silence_transformers

    silence_transformers()
    loaded = load_checked_recipe(recipe, []) if recipe is not None else None
    findings = examine(loaded, Path("runs"))
    if as_json:
        typer.echo(json.dumps([f.to_json() for f in findings], indent=1))
        return
    for finding in findings:
        remedy = f" -> {finding.remedy}" if finding.remedy else ""
        typer.echo(f"{finding.state:9}  {finding.what}: {finding.detail}{remedy}")
    problems = sum(f.state is State.PROBLEM for f in findings)
    typer.echo(f"{problems} problems")
