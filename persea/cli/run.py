"""The river by its verbs: the whole of it, stage by stage, and what is asked before a run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persea.cli.options import (
    DEFAULT_OUT,
    AsJson,
    Out,
    Procs,
    RecipePath,
    Resume,
    Sets,
    Sharding,
    app,
    bundled_folder,
    count_available_cores,
    load_checked_recipe,
    make_run_context,
)
from persea.errors import RecipeError, RefusedError, SafetyRegressionError
from persea.training.distributed.world import LaunchOptions, ParallelStrategy, detect_world

if TYPE_CHECKING:
    from persea.pipeline.run_context import RunContext
    from persea.vocab_extension.resize_model import VocabExtension

recipes_app = typer.Typer(no_args_is_help=True, help="The recipes that come with persea.")
app.add_typer(recipes_app, name="recipes", rich_help_panel="Before a run")


def _run_with_progress(context: RunContext, only_stage: str, as_json: bool) -> None:
    """Run one stage or all, with a bar a stage on a terminal and a line a stage elsewhere."""
    world = detect_world(
        context.launch_options.num_processes, is_training_only=only_stage == "train"
    )
    from persea.pipeline.progress import progress_bars
    from persea.pipeline.stages import run_pipeline

    with progress_bars(quiet=as_json or world.rank > 0) as tell:
        run_pipeline(replace(context, world=world), tell, only_stage)
    if world.rank:
        raise typer.Exit  # what the first process concludes is enough


@app.command(rich_help_panel="The whole river")
def run(
    recipe: RecipePath,
    set_: Sets = [],
    out: Out = DEFAULT_OUT,
    as_json: AsJson = False,
    procs: Procs = 1,
    shard: Sharding = ParallelStrategy.DDP,
    resume: Resume = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and stop: persea plan.")
    ] = False,
) -> None:
    """Check, audition, capture, train, evaluate, lineage, report: every stage in order; what already stands is skipped."""
    if dry_run:
        plan(recipe, set_, out, as_json)
        return
    river = make_run_context(recipe, set_, out, LaunchOptions(procs, shard, resume))
    try:
        _run_with_progress(river, "", as_json)
    except SafetyRegressionError:
        _show_report(river.folder, as_json)
        raise
    _show_report(river.folder, as_json)


@app.command(rich_help_panel="The whole river")
def quickstart(
    set_: Sets = [],
    out: Out = DEFAULT_OUT,
    as_json: AsJson = False,
    procs: Annotated[
        int,
        typer.Option(
            "--procs", min=0, help="Processes to train in; 0 = two where there are two cores."
        ),
    ] = 0,
) -> None:
    """Three tiny bundled teachers of three families teach one student, on this machine, in minutes."""
    run(
        bundled_folder("recipes") / "quickstart.yaml",
        set_,
        out,
        as_json,
        procs or min(2, count_available_cores()),
    )


def _add_stage_command(name: str, help_text: str) -> Callable[..., None]:
    def stage(
        recipe: RecipePath, set_: Sets = [], out: Out = DEFAULT_OUT, as_json: AsJson = False
    ) -> None:
        river = make_run_context(recipe, set_, out)
        try:
            _run_with_progress(river, name, as_json)
        except RefusedError as error:
            if not as_json and (name == "check" or isinstance(error, SafetyRegressionError)):
                _show_stage(name, river)  # what was refused is seen best beside the rest
            raise
        if as_json:
            typer.echo(
                json.dumps(
                    _read_check(river.folder) if name == "check" else river.read_stage_record(name),
                    indent=1,
                )
            )
        else:
            _show_stage(name, river)

    stage.__doc__ = help_text
    return app.command(name, rich_help_panel="Stage by stage")(stage)


def train(
    recipe: RecipePath,
    set_: Sets = [],
    out: Out = DEFAULT_OUT,
    as_json: AsJson = False,
    procs: Procs = 1,
    shard: Sharding = ParallelStrategy.DDP,
    resume: Resume = "auto",
) -> None:
    """Teach the student from all teachers at once. In several processes: --procs N, or under torchrun."""
    river = make_run_context(recipe, set_, out, LaunchOptions(procs, shard, resume))
    _run_with_progress(river, "train", as_json)
    if as_json:
        typer.echo(json.dumps(river.read_stage_record("train"), indent=1))


for _name, _text in (
    (
        "check",
        "Is each pairing of tokenizers sound, by language? Refuses below a floor (exit 4). --json prints check.json.",
    ),
    (
        "audition",
        "Measure every teacher on every skill, with as few questions as it takes; cast the strongest.",
    ),
    ("capture", "Ask the cast; keep answers and distributions."),
    ("train", ""),
    ("evaluate", "The student beside its base and every teacher, on held-out items."),
    ("lineage", "Write down what made the weights."),
    ("report", "The page, the model card, report.json."),
):
    if _name == "train":  # has options of its own, and its place in the help
        app.command(rich_help_panel="Stage by stage")(train)
    else:
        _add_stage_command(_name, _text)


@app.command(rich_help_panel="Before a run")
def plan(
    recipe: RecipePath, set_: Sets = [], out: Out = DEFAULT_OUT, as_json: AsJson = False
) -> None:
    """What a run would do and cost: stages that stand, prompts, positions, gigabytes. Loads no weights."""
    from persea.pipeline.plan import plan_run as estimate

    told = estimate(make_run_context(recipe, set_, out))
    if as_json:
        typer.echo(json.dumps(told.to_json(), indent=1))
        return
    from persea.pipeline.progress import print_table

    print_table(("stage", "state", "work"), told.table_rows())


@app.command(rich_help_panel="Before a run")
def validate(recipe: RecipePath, set_: Sets = [], as_json: AsJson = False) -> None:
    """Read a recipe and tell all its mistakes at once. Touches no model."""
    loaded = load_checked_recipe(recipe, set_)
    typer.echo(
        json.dumps({"name": loaded.name, "hash": loaded.hash})
        if as_json
        else f"{recipe}: a valid recipe, {loaded.name} {loaded.hash[:12]}"
    )


@app.command(rich_help_panel="Before a run")
def schema() -> None:
    """The recipe's JSON schema, for completion in an editor."""
    from persea.config.recipe import recipe_json_schema as describe

    typer.echo(json.dumps(describe(), indent=1))


@app.command(rich_help_panel="Before a run")
def extend(
    model: Annotated[
        str,
        typer.Argument(
            help="A model folder, a hub id, or a run folder: then its student.", show_default=False
        ),
    ],
    texts: Annotated[
        list[str],
        typer.Option(
            help="A text file, one text a line, or FILE#key for JSON lines; give it again for each.",
            show_default=False,
        ),
    ],
    tokens: Annotated[int, typer.Option(min=1, help="How many more.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="The folder to write: new, or empty.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be gained; write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Give a student more tokens for scripts that it spells by bytes: a folder to name as `student.model`. docs/extend.md."""
    if out is None and not dry_run:
        raise RecipeError(
            "no folder to write to", where="extend", remedy="--out FOLDER, or --dry-run"
        )
    if out is not None:
        if (out.is_symlink() or out.exists()) and not (out.is_dir() and not any(out.iterdir())):
            raise RecipeError(
                "something is there already",
                where=str(out),
                remedy="give a folder that is new or empty",
            )
        above = next(folder for folder in out.absolute().parents if folder.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise RecipeError(
                f"nothing can be written into {above}",
                where=str(out),
                remedy="give a folder that can be made",
            )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from persea.models.loading import resolve_model_source
    from persea.pipeline.progress import progress_bars
    from persea.pipeline.model_refs import silence_transformers
    from persea.vocab_extension import resize_model as longer

    silence_transformers()
    source, _ = resolve_model_source(model, "extend")
    with progress_bars(quiet=as_json) as tell:
        found = longer.extend_vocabulary(source, texts, tokens, tell)
        if out is not None and not dry_run:
            longer.write_extended_model(found, out.resolve(), tell)
    if as_json:
        typer.echo(
            json.dumps(
                {**found.to_json(), "asked": tokens, "out": "" if dry_run else str(out)},
                indent=1,
                ensure_ascii=False,
            )
        )
        return
    _show_extension(found, tokens)
    typer.echo("nothing is written (--dry-run)" if dry_run else f"{out}: name it as student.model")


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the bundled recipes with their first line."""
    for path in sorted(bundled_folder("recipes").glob("*.yaml")):
        typer.echo(f"{path.stem:20} {path.read_text().splitlines()[0].lstrip('# ')}")


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help="Name of a bundled recipe.")]) -> None:
    """Print a bundled recipe, to start from: persea recipes show avocado > mine.yaml"""
    path = bundled_folder("recipes") / f"{name}.yaml"
    if not path.is_file():
        raise RecipeError(f"no recipe {name!r}", remedy="persea recipes ls lists them")
    typer.echo(path.read_text(), nl=False)


def _show_extension(extension: VocabExtension, num_requested: int) -> None:
    from persea.pipeline.progress import print_table

    print_table(
        ("text", "held-out lines", "bytes a token", "after", "tokens"),
        [
            (
                Path(c.file).name,
                f"{c.lines:,}",
                f"{c.bytes / c.tokens_before:.2f}",
                f"{c.bytes / c.tokens_after:.2f}",
                f"{c.tokens_after / c.tokens_before - 1:+.0%}",
            )
            for c in extension.costs
        ],
    )
    few = (
        f" ({num_requested:,} asked for: no other pair is seen twice)"
        if len(extension.old_ids_by_new_id) < num_requested
        else ""
    )
    typer.echo(
        f"{len(extension.old_ids_by_new_id):,} tokens more{few}, from id {min(extension.old_ids_by_new_id):,} on; rows: {extension.num_embedding_rows[0]:,} -> {extension.num_embedding_rows[1]:,}"
    )


def _show_report(folder: Path, as_json: bool) -> None:
    report: dict[str, Any] = json.loads((folder / "report" / "report.json").read_text())
    if as_json:
        typer.echo(json.dumps(report, indent=1))
        return
    from persea.pipeline.progress import print_report, print_table
    from persea.report import thinking_section as hybrid_page

    print_report(report)
    if (modes := hybrid_page.read_thinking_modes(folder)) is not None:
        print_table(hybrid_page.THINKING_COLUMNS, hybrid_page.thinking_rows(modes))
        typer.echo("\n".join(hybrid_page.thinking_sentences(modes)))
    typer.echo(
        f"page     {folder / 'report' / 'index.html'}\nstudent  {folder / 'train' / 'student'}"
    )


def _show_stage(stage: str, context: RunContext) -> None:
    """What a person wants to see of a stage that ended."""
    if stage == "check":
        _show_check(context.folder)
    elif stage == "audition":
        _show_cast(context)
    elif stage == "evaluate":
        _show_scores(context.folder)
    elif stage == "report":
        _show_report(context.folder, as_json=False)


def _read_check(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "check" / "check.json").read_text())
    return found


def _show_check(folder: Path) -> None:
    from persea.pipeline.progress import print_check

    print_check(_read_check(folder))


def _show_cast(context: RunContext) -> None:
    from persea.evaluation.audition import CAST_TABLE_COLUMNS, cast_table
    from persea.pipeline.progress import print_table as draw

    draw(CAST_TABLE_COLUMNS, cast_table(context.cast))


def _show_scores(folder: Path) -> None:
    from persea.pipeline.progress import print_table

    found = json.loads((folder / "evaluate" / "evaluation.json").read_text())
    beside = {
        (p["other_model_name"], p["skill"], p["effort"]): p
        for p in found["compared"]
        if not p["language"]
    }
    rows = []
    for s in (s for s in found["scores"] if not s["language"]):
        pair = beside.get((s["model_name"], s["skill"], s["effort"])) or beside.get(
            (s["model_name"], s["skill"], found["effort"])
        )
        rows.append(
            (
                s["skill"],
                s["model_name"],
                s["effort"],
                f"{s['value']:.2f} ({s['low']:.2f}-{s['high']:.2f})",
                str(s["n"]),
                f"{pair['difference']:+.2f} ({pair['low']:+.2f}, {pair['high']:+.2f})"
                if pair
                else "",
            )
        )
    print_table(
        ("skill", "model", "effort", "score", "n", "student - it"),
        sorted(rows, key=lambda row: row[0]),
    )
    typer.echo(
        f"each language: {folder / 'evaluate' / 'evaluation.json'}; each answer: {folder / 'evaluate' / 'examples.jsonl'}"
    )
