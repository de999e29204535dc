"""persea doctor: what this machine has, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from persea.cli.options import BEFORE_PANEL, AsJson, app, load_checked_recipe
from persea.errors import DataError


@app.command(rich_help_panel=BEFORE_PANEL)
def doctor(
    recipe: Annotated[
        Path | None,
        typer.Argument(help="A recipe whose endpoints and licences are looked at too."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look at packages, devices, disk, sandbox, hub, and the endpoints and licences of a recipe.

    Exit code 3 if something would stop a run.
    """
    from persea.pipeline.doctor import State, examine
    from persea.pipeline.model_refs import silence_transformers

    silence_transformers()
    loaded = load_checked_recipe(recipe, []) if recipe is not None else None
    findings = examine(loaded, Path("runs"))
    if as_json:
        typer.echo(json.dumps([f.to_json() for f in findings], indent=1))
    problems = [f for f in findings if f.state is State.PROBLEM]
    if not as_json:
        for finding in findings:
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            typer.echo(f"{finding.state:9}  {finding.what}: {finding.detail}{remedy}")
        typer.echo(f"{len(problems)} problems")
    if problems:
        raise DataError(
            f"{len(problems)} problems would stop a run: {', '.join(f.what for f in problems)}",
            where="doctor",
            remedy="each problem's line names its own remedy",
        )
