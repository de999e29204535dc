"""persea plan: what a run does and costs, before it starts."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from persea.cli.options import (
    BEFORE_PANEL,
    DEFAULT_OUT,
    NO_OVERRIDES,
    NO_TASKS,
    AsJson,
    Out,
    RecipePath,
    Sets,
    TaskFiles,
    app,
    load_checked_recipe,
    make_run_context,
)
from persea.errors import RecipeError

if TYPE_CHECKING:
    from persea.pipeline.calibration import Calibration
    from persea.pipeline.plan import RunPlan
    from persea.pipeline.run_context import RunContext


@app.command(rich_help_panel=BEFORE_PANEL)
def plan(
    recipe: RecipePath,
    set_: Sets = NO_OVERRIDES,
    out: Out = DEFAULT_OUT,
    as_json: AsJson = False,
    tasks: TaskFiles = NO_TASKS,
    hardware: Annotated[
        str,
        typer.Option(
            "--hardware",
            help="Accelerators to plan for, such as 8xH200. Default: the recipe's plan.hardware, "
            "or this machine.",
            show_default=False,
        ),
    ] = "",
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            "--price-per-hour",
            min=0,
            help="Price of one accelerator, or of this machine, for an hour.",
            show_default=False,
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Load the models, measure them on this machine for some minutes, and keep the "
            "speeds for later plans.",
        ),
    ] = False,
) -> None:
    """Show the plan of a run: stages, answers, time, memory, disk, money, licences.

    Loads no weights without --calibrate.
    """
    from persea.pipeline.catalogue_plan import is_planned_by_catalogue, plan_by_catalogue
    from persea.pipeline.hardware import parse_fleet

    loaded = load_checked_recipe(recipe, set_, tasks)
    settings = loaded.plan
    named = hardware or (settings.hardware if settings else "")
    fleet = parse_fleet(named, "--hardware" if hardware else "plan.hardware") if named else None
    price = price_per_hour
    if price is None and settings is not None:
        price = settings.price_per_hour
    if calibrate and fleet is not None:
        raise RecipeError(
            "this machine is measured, and the plan is for others",
            where="--calibrate",
            remedy=f"leave out --calibrate, or {'--hardware' if hardware else '`plan.hardware:`'}",
        )
    if is_planned_by_catalogue(loaded):
        if calibrate:
            raise RecipeError(
                "a model of the recipe is not on this machine",
                where="--calibrate",
                remedy="download it first (`hf download MODEL`)",
            )
        _show(plan_by_catalogue(loaded, fleet, price), as_json)
        return
    context = make_run_context(recipe, set_, out, task_files=tasks)
    measured = _calibrate(context, as_json) if calibrate else None
    from persea.pipeline.plan import plan_run

    _show(plan_run(context, fleet, price, measured), as_json)


def _calibrate(context: RunContext, as_json: bool) -> Calibration:
    from persea.pipeline.calibrate import calibrate
    from persea.pipeline.calibration import write_calibration
    from persea.pipeline.progress import progress_bars
    from persea.pipeline.workload import context_shares

    with progress_bars(quiet=as_json) as progress:
        measured = calibrate(context, context_shares(context), progress)
    write_calibration(context, measured)
    return measured


def _show(run_plan: RunPlan, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(run_plan.to_json(), indent=1))
        return
    from persea.licences.notice import verdict_lines
    from persea.pipeline.plan_tables import WAY_COLUMNS
    from persea.pipeline.progress import print_table

    print_table(("stage", "state", "work"), run_plan.table_rows())
    if run_plan.lines:
        typer.echo(f"\nwhat is still to do costs, on {run_plan.hardware or 'this machine'}:")
        print_table(*run_plan.cost_table())
    if run_plan.ways:
        typer.echo("\nhours of one device, if one teacher taught everything:")
        print_table(WAY_COLUMNS, run_plan.way_rows())
    if run_plan.failures is not None:
        typer.echo(
            f"\n{run_plan.units:,} units; about {run_plan.failures:,.1f} devices fail on the way, "
            "and each costs at most the unit that it was at work on"
        )
    if run_plan.first_prompt:
        typer.echo("\nthe first prompt as each model reads it; what is learned is marked:")
        for rendered in run_plan.first_prompt:
            typer.echo("\n".join(rendered.lines(colour=sys.stdout.isatty())))
    typer.echo("\n" + "\n".join(run_plan.notes))
    if run_plan.licences:
        typer.echo("\n".join(verdict_lines(run_plan.licences)))
