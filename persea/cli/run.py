"""The verbs of the pipeline: the whole of it, single stages, and tools before a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persea.cli.options import (
    BEFORE_PANEL,
    DEFAULT_OUT,
    NO_OVERRIDES,
    NO_TASKS,
    PIPELINE_PANEL,
    STAGE_PANEL,
    AsJson,
    ExecutorKind,
    Out,
    Procs,
    RecipePath,
    Resume,
    Sets,
    Sharding,
    TaskFiles,
    Workers,
    app,
    count_available_cores,
    executor_overrides,
    load_checked_recipe,
    make_run_context,
)
from persea.cli.plan import plan
from persea.config.bundled import bundled_folder, portable_recipe
from persea.errors import RecipeError, RefusedError, SafetyRegressionError
from persea.training.distributed.world import LaunchOptions, ParallelStrategy, detect_world

if TYPE_CHECKING:
    from persea.config.recipe import Recipe
    from persea.pipeline.run_context import RunContext

recipes_app = typer.Typer(no_args_is_help=True, help="The recipes that come with persea.")
app.add_typer(recipes_app, name="recipes", rich_help_panel=BEFORE_PANEL)


def _run_with_progress(context: RunContext, only_stage: str, as_json: bool) -> None:
    """Run one stage or all, with progress bars on a terminal and lines elsewhere."""
    world = detect_world(
        context.launch_options.num_processes, is_training_only=only_stage == "train"
    )
    from persea.pipeline.progress import progress_bars
    from persea.pipeline.stages import run_pipeline

    with progress_bars(quiet=as_json or world.rank > 0) as progress:
        run_pipeline(replace(context, world=world), progress, only_stage)
    if world.rank:
        raise typer.Exit  # the first process prints the result


@app.command(rich_help_panel=PIPELINE_PANEL)
def run(
    recipe: RecipePath,
    set_: Sets = NO_OVERRIDES,
    out: Out = DEFAULT_OUT,
    as_json: AsJson = False,
    procs: Procs = 1,
    shard: Sharding = ParallelStrategy.DDP,
    resume: Resume = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, and stop: persea plan.")
    ] = False,
    tasks: TaskFiles = NO_TASKS,
    executor: ExecutorKind = "",
    workers: Workers = None,
) -> None:
    """Run all stages: check, audition, capture, train, evaluate, lineage, report.

    Stages that are up to date are skipped, and an interrupted stage continues.
    """
    set_ = [*set_, *executor_overrides(executor, workers)]
    if dry_run:
        plan(recipe, set_, out, as_json, tasks)
        return
    context = make_run_context(recipe, set_, out, LaunchOptions(procs, shard, resume), tasks)
    try:
        _run_with_progress(context, "", as_json)
    except SafetyRegressionError:
        _show_report(context.folder, as_json)
        raise
    _show_report(context.folder, as_json)


@app.command(rich_help_panel=PIPELINE_PANEL)
def quickstart(
    set_: Sets = NO_OVERRIDES,
    out: Out = DEFAULT_OUT,
    as_json: AsJson = False,
    procs: Annotated[
        int,
        typer.Option(
            "--procs",
            min=0,
            help="Number of training processes; 0 = two if there are two CPU cores.",
        ),
    ] = 0,
) -> None:
    """Distil three tiny bundled teachers of three families into one student, in minutes."""
    run(
        bundled_folder("recipes") / "quickstart.yaml",
        set_,
        out,
        as_json,
        procs or min(2, count_available_cores()),
    )


def make_stage_command(name: str, help_text: str) -> Callable[..., None]:
    """Return the command of a stage, with the options that all stages have."""

    def stage(
        recipe: RecipePath,
        set_: Sets = NO_OVERRIDES,
        out: Out = DEFAULT_OUT,
        as_json: AsJson = False,
        tasks: TaskFiles = NO_TASKS,
    ) -> None:
        _run_stage(name, make_run_context(recipe, set_, out, task_files=tasks), as_json)

    stage.__doc__ = help_text
    return stage


def _run_stage(name: str, context: RunContext, as_json: bool) -> None:
    """Run a stage and print its result."""
    try:
        _run_with_progress(context, name, as_json)
    except RefusedError as error:
        # a refused result is shown with the rest
        if not as_json and (name == "check" or isinstance(error, SafetyRegressionError)):
            _show_stage(name, context)
        raise
    if not as_json:
        _show_stage(name, context)
        return
    is_check = name == "check"
    result = _read_check(context.folder) if is_check else context.stages.read_record(name)
    typer.echo(json.dumps(result, indent=1))


def _add_stage_command(name: str, help_text: str) -> None:
    app.command(name, rich_help_panel=STAGE_PANEL)(make_stage_command(name, help_text))


def capture(
    recipe: RecipePath,
    set_: Sets = NO_OVERRIDES,
    out: Out = DEFAULT_OUT,
    as_json: AsJson = False,
    tasks: TaskFiles = NO_TASKS,
    executor: ExecutorKind = "",
    workers: Workers = None,
) -> None:
    """Let the cast teachers answer the corpus; store answers and token distributions."""
    changes = [*set_, *executor_overrides(executor, workers)]
    _run_stage("capture", make_run_context(recipe, changes, out, task_files=tasks), as_json)


def train(
    recipe: RecipePath,
    set_: Sets = NO_OVERRIDES,
    out: Out = DEFAULT_OUT,
    as_json: AsJson = False,
    procs: Procs = 1,
    shard: Sharding = ParallelStrategy.DDP,
    resume: Resume = "auto",
    tasks: TaskFiles = NO_TASKS,
    executor: ExecutorKind = "",
    workers: Workers = None,
) -> None:
    """Train the student on the captured answers. Several processes: --procs N, or torchrun."""
    changes = [*set_, *executor_overrides(executor, workers)]
    context = make_run_context(recipe, changes, out, LaunchOptions(procs, shard, resume), tasks)
    _run_with_progress(context, "train", as_json)
    if as_json:
        typer.echo(json.dumps(context.stages.read_record("train"), indent=1))


def evaluate(
    recipe: RecipePath,
    set_: Sets = NO_OVERRIDES,
    out: Out = DEFAULT_OUT,
    as_json: AsJson = False,
    tasks: TaskFiles = NO_TASKS,
    executor: ExecutorKind = "",
    workers: Workers = None,
) -> None:
    """Compare the student with its base and every teacher on held-out items."""
    changes = [*set_, *executor_overrides(executor, workers)]
    _run_stage("evaluate", make_run_context(recipe, changes, out, task_files=tasks), as_json)


_add_stage_command(
    "check",
    "Check that each teacher's tokenizer and template suit the student; exit code 4 if one does "
    "not. --json prints check.json.",
)
_add_stage_command(
    "audition", "Measure every teacher on every skill, and cast the best teacher for each skill."
)
for own_options in (capture, train, evaluate):
    app.command(rich_help_panel=STAGE_PANEL)(own_options)
_add_stage_command("report", "Write the report page, the model card and report.json.")


@app.command(rich_help_panel=BEFORE_PANEL)
def validate(recipe: RecipePath, set_: Sets = NO_OVERRIDES, as_json: AsJson = False) -> None:
    """Check a recipe and list every mistake in it; print the verdict on its licences.

    Loads no model and asks no hub: a licence that only a hub model's card states is read by plan.
    """
    from persea.licences.notice import verdict_lines
    from persea.pipeline.licence_gate import licence_verdict

    loaded = load_checked_recipe(recipe, set_)
    if warning := _learning_rate_warning(loaded):
        typer.echo(f"warning: {warning}", err=True)
    verdict = licence_verdict(loaded, None)
    if as_json:
        licences = verdict.to_json()
        typer.echo(json.dumps({"name": loaded.name, "hash": loaded.hash, "licences": licences}))
        return
    typer.echo(f"{recipe}: a valid recipe, {loaded.name} {loaded.hash[:12]}")
    typer.echo(
        "  only the recipe was read: persea plan also reads data files and model configurations, "
        "persea check the tokenizers and weights"
    )
    typer.echo("\n".join(verdict_lines(verdict)))
    if verdict.outcome == "ask":
        typer.echo("  persea plan also reads GGUF files and the cards of hub models")


def _learning_rate_warning(recipe: Recipe) -> str:
    """Return a warning about the learning rate, if the student's weights are in a local folder."""
    from math import prod

    from persea.models.weight_shapes import read_weight_shapes
    from persea.training.learning_rate import describe_unusual_rate

    given, folder = recipe.training.learning_rate, Path(recipe.student.model).expanduser()
    if given is None or not folder.is_dir():
        return ""
    num_parameters = sum(prod(shape) for _, shape in read_weight_shapes(folder))
    return describe_unusual_rate(given, num_parameters, recipe.student.lora is not None)


@app.command(rich_help_panel=BEFORE_PANEL)
def schema() -> None:
    """Print the JSON schema of a recipe, for completion in an editor."""
    from persea.config.recipe import recipe_json_schema

    typer.echo(json.dumps(recipe_json_schema(), indent=1))


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the bundled recipes with their first line."""
    for path in sorted(bundled_folder("recipes").glob("*.yaml"), key=lambda p: p.stem):
        typer.echo(f"{path.stem:20} {path.read_text().splitlines()[0].lstrip('# ')}")


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help="Name of a bundled recipe.")]) -> None:
    """Print a bundled recipe to start from: persea recipes show avocado > mine.yaml."""
    path = bundled_folder("recipes") / f"{name}.yaml"
    if not path.is_file():
        raise RecipeError(f"no recipe {name!r}", remedy="persea recipes ls lists them")
    typer.echo(portable_recipe(path.read_text()), nl=False)


def _show_report(folder: Path, as_json: bool) -> None:
    report: dict[str, Any] = json.loads((folder / "report" / "report.json").read_text())
    if as_json:
        typer.echo(json.dumps(report, indent=1))
        return
    from persea.pipeline.progress import print_report, print_table
    from persea.report.thinking_section import (
        THINKING_COLUMNS,
        read_thinking_modes,
        thinking_rows,
        thinking_sentences,
    )

    print_report(report)
    _show_texts(folder)
    if (modes := read_thinking_modes(folder)) is not None:
        print_table(THINKING_COLUMNS, thinking_rows(modes))
        typer.echo("\n".join(thinking_sentences(modes)))
    typer.echo(
        f"page     {folder / 'report' / 'index.html'}\nstudent  {folder / 'train' / 'student'}"
    )


def _show_stage(stage: str, context: RunContext) -> None:
    """Print the result of a stage, if it has one for people."""
    if stage == "check":
        from persea.pipeline.progress import print_check

        print_check(_read_check(context.folder))
    elif stage == "audition":
        from persea.evaluation.audition import CAST_TABLE_COLUMNS, cast_table
        from persea.pipeline.progress import print_table

        print_table(CAST_TABLE_COLUMNS, cast_table(context.cast))
        for gain in context.cast.gains:
            typer.echo(gain.sentence)
    elif stage == "capture":
        _show_left_out(context.folder)
    elif stage == "evaluate":
        _show_scores(context.folder)
    elif stage == "report":
        _show_report(context.folder, as_json=False)


def _show_left_out(folder: Path) -> None:
    """Print how many prompts and texts were captured, and a line a reason why others were not."""
    from persea.cache.accounting import count_left_out, left_out_lines

    summary = json.loads((folder / "capture" / "summary.json").read_text())
    typer.echo(f"{summary['kept']:,} of {summary['in']:,} prompts and texts captured")
    for line in left_out_lines(count_left_out(summary)):
        typer.echo(line)


def _read_check(folder: Path) -> dict[str, Any]:
    check: dict[str, Any] = json.loads((folder / "check" / "check.json").read_text())
    return check


def _show_texts(folder: Path) -> None:
    """Print the result on held-out texts, if the recipe names some."""
    from persea.pipeline.progress import print_texts
    from persea.report.text_section import read_text_report

    if (texts := read_text_report(folder)) is not None:
        print_texts(texts)


def _show_scores(folder: Path) -> None:
    from persea.pipeline.progress import print_table

    _show_texts(folder)
    evaluation = json.loads((folder / "evaluate" / "evaluation.json").read_text())
    comparisons = {
        (c["other_model_name"], c["skill"], c["effort"]): c
        for c in evaluation["compared"]
        if not c["language"]
    }
    rows = []
    for s in (s for s in evaluation["scores"] if not s["language"]):
        model, skill = s["model_name"], s["skill"]
        comparison = comparisons.get((model, skill, s["effort"])) or comparisons.get(
            (model, skill, evaluation["effort"])
        )
        difference = ""
        if comparison:
            low, high = comparison["low"], comparison["high"]
            difference = f"{comparison['difference']:+.2f} ({low:+.2f}, {high:+.2f})"
        score = f"{s['value']:.2f} ({s['low']:.2f}-{s['high']:.2f})"
        rows.append((skill, model, s["effort"], score, str(s["n"]), difference))
    if not rows:
        return
    print_table(
        ("skill", "model", "effort", "score", "n", "student - model"),
        sorted(rows, key=lambda row: row[0]),
    )
    evaluate = folder / "evaluate"
    typer.echo(
        f"by language: {evaluate / 'evaluation.json'}; answers: {evaluate / 'examples.jsonl'}"
    )
