"""One verb a stage, and the small ones. torch is imported only by verbs that run a model."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persea import __version__
from persea.errors import PerseaError, RecipeError, Refused, Stopped

if TYPE_CHECKING:
    from persea.recipe import Recipe
    from persea.river import River

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
                  help="Distil several open-weight model families at once into one student, although each has its own tokenizer and chat format.")
recipes = typer.Typer(no_args_is_help=True, help="The recipes that come with persea.")
app.add_typer(recipes, name="recipes")
cache = typer.Typer(no_args_is_help=True, help="What the teachers said, as it lies on disk: a run folder, or its capture/.")
app.add_typer(cache, name="cache")

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Sets = Annotated[list[str], typer.Option("--set", help="Change one key, e.g. --set training.steps=200.", show_default=False)]
Out = Annotated[Path, typer.Option("--out", help="The run folder; default runs/<name of the recipe>.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output, one JSON value.")]
NOWHERE = Path()
USAGE: type[Exception] = typer.BadParameter.__mro__[1]  # click's UsageError, whichever click typer brings; it has no public name there


def bundled(kind: str) -> Path:
    """The recipes or saplings that come with persea: beside the package in a checkout, inside it when installed."""
    here = Path(__file__).resolve().parent
    inside = here / "bundled" / kind
    return inside if inside.is_dir() else here.parent / kind


def _load(path: Path, sets: list[str]) -> Recipe:
    from persea.recipe import load_recipe

    return load_recipe(path, sets)


def _river(path: Path, sets: list[str], out: Path) -> River:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    recipe = _load(path, sets)
    from transformers.utils import logging

    from persea.river import River

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return River(recipe, Path("runs") / recipe.name if out == NOWHERE else out)


def _flow(river: River, only: str, as_json: bool) -> None:
    """Run one stage or all, with a bar a stage on a terminal and a line a stage elsewhere."""
    from persea.progress import bars
    from persea.run import run

    with bars(quiet=as_json) as tell:
        run(river, tell, only)


@app.command(rich_help_panel="The whole river")
def run(recipe: RecipePath, set_: Sets = [], out: Out = NOWHERE, as_json: AsJson = False,  # noqa: B006 (typer copies it)
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and stop: persea plan.")] = False) -> None:
    """Check, audition, capture, train, evaluate, report: every stage in order; what already stands is skipped."""
    if dry_run:
        plan(recipe, set_, out, as_json)
        return
    river = _river(recipe, set_, out)
    _flow(river, "", as_json)
    _conclude(river.folder, as_json)


@app.command(rich_help_panel="The whole river")
def quickstart(set_: Sets = [], out: Out = NOWHERE, as_json: AsJson = False) -> None:  # noqa: B006
    """Three tiny bundled teachers of three families teach one student, on this machine, in minutes."""
    run(bundled("recipes") / "quickstart.yaml", set_, out, as_json)


def _verb(name: str, text: str) -> Callable[..., None]:
    def stage(recipe: RecipePath, set_: Sets = [], out: Out = NOWHERE, as_json: AsJson = False) -> None:  # noqa: B006
        river = _river(recipe, set_, out)
        try:
            _flow(river, name, as_json)
        except Refused:
            if name == "check" and not as_json:
                _show_check(river.folder)  # what was refused is seen best beside the rest
            raise
        if as_json:
            typer.echo(json.dumps(_checked(river.folder) if name == "check" else river.done(name), indent=1))
        elif name == "check":
            _show_check(river.folder)
        elif name == "report":
            _conclude(river.folder, as_json)

    stage.__doc__ = text
    return app.command(name, rich_help_panel="Stage by stage")(stage)


for _name, _text in (
        ("check", "Is each pairing of tokenizers sound, by language? Refuses below a floor (exit 4). --json prints check.json."),
        ("audition", "Measure every teacher on every skill; cast the strongest."),
        ("capture", "Ask the cast; keep answers and distributions."),
        ("train", "Teach the student from all teachers at once."),
        ("evaluate", "The student beside its base and every teacher, on held-out items."),
        ("lineage", "Write down what made the weights."),
        ("report", "The page, the model card, report.json.")):
    _verb(_name, _text)


@app.command(rich_help_panel="Before a run")
def plan(recipe: RecipePath, set_: Sets = [], out: Out = NOWHERE, as_json: AsJson = False) -> None:  # noqa: B006
    """What a run would do and cost: stages that stand, prompts, positions, gigabytes. Loads no weights."""
    from persea.plan import plan as estimate

    told = estimate(_river(recipe, set_, out))
    if as_json:
        typer.echo(json.dumps(told.to_json(), indent=1))
        return
    from persea.progress import table

    table(("stage", "state", "work"), told.rows())


@app.command(rich_help_panel="Before a run")
def validate(recipe: RecipePath, set_: Sets = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Read a recipe and tell all its mistakes at once. Touches no model."""
    loaded = _load(recipe, set_)
    typer.echo(json.dumps({"name": loaded.name, "hash": loaded.hash}) if as_json else f"{recipe}: a valid recipe, {loaded.name} {loaded.hash[:12]}")


@app.command(rich_help_panel="Before a run")
def schema() -> None:
    """The recipe's JSON schema, for completion in an editor."""
    from persea.recipe import schema as describe

    typer.echo(json.dumps(describe(), indent=1))


@recipes.command("ls")
def recipes_ls() -> None:
    """List the bundled recipes with their first line."""
    for path in sorted(bundled("recipes").glob("*.yaml")):
        typer.echo(f"{path.stem:20} {path.read_text().splitlines()[0].lstrip('# ')}")


@recipes.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help="Name of a bundled recipe.")]) -> None:
    """Print a bundled recipe, to start from: persea recipes show avocado > mine.yaml"""
    path = bundled("recipes") / f"{name}.yaml"
    if not path.is_file():
        raise RecipeError(f"no recipe {name!r}", remedy="persea recipes ls lists them")
    typer.echo(path.read_text(), nl=False)


CachePath = Annotated[Path, typer.Argument(help="A run folder, or its capture/.", show_default=False)]


@cache.command("info")
def cache_info(folder: CachePath, as_json: AsJson = False) -> None:
    """Units, answers, positions and bytes, in all and by teacher. Reads the commit records only."""
    from persea.shelf import info, shelf

    told = info(shelf(folder))
    if as_json:
        typer.echo(json.dumps(told, indent=1))
        return
    from persea.progress import table

    names = ("units", "answers", "tokens", "positions", "entries", "bytes")
    rows = [*told["teachers"].items(), ("in all", told)]
    table(("teacher", *names), [(name, *(f"{counts.get(n, 0):,}" for n in names)) for name, counts in rows])
    kinds = ", ".join(f"{r['kind']} (tau {r['tau']:g})" for r in told["rows"])
    typer.echo(f"rows: {kinds}; {told.get('bytes_per_position', 0)} bytes a position, text and tokens included")


@cache.command("verify")
def cache_verify(folder: CachePath, as_json: AsJson = False) -> None:
    """Read and unpack every byte; tell everything that is not as it was written (exit 3)."""
    from persea.errors import DataError
    from persea.shelf import committed, shelf, verify

    where = shelf(folder)
    found = verify(where)
    wrong = [f for f in found if not f.harmless]
    if as_json:
        typer.echo(json.dumps([{"where": str(f.where), "what": f.what, "remedy": f.remedy, "harmless": f.harmless} for f in found], indent=1))
    else:
        for f in found:
            typer.echo(f"{f.where}: {f.what} -> {f.remedy}")
        typer.echo(f"{len(committed(where))} units, {len(wrong)} findings")
    if wrong:
        raise DataError(f"{len(wrong)} of {len(committed(where))} units or records are not as they were written", where=str(where),
                        remedy="each is named above with its remedy")


@cache.command("export")
def cache_export(folder: CachePath, to: Annotated[Path, typer.Argument(help="The Parquet file to write.", show_default=False)]) -> None:
    """The whole cache as one Parquet file, a row an answer; every byte is checked on the way."""
    from persea.shelf import export, shelf

    typer.echo(f"{to}: {export(shelf(folder), to):,} answers")


@cache.command("merge")
def cache_merge(into: Annotated[Path, typer.Argument(help="The folder to copy into.", show_default=False)],
                folders: Annotated[list[Path], typer.Argument(help="Run folders, or their capture/.", show_default=False)]) -> None:
    """Copy the units of several caches into one folder; every byte is checked on the way, what stands there already stays."""
    from persea.shelf import merge, shelf

    typer.echo(f"{into}: {merge(into, [shelf(folder) for folder in folders]):,} new units")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"persea {__version__}")
        raise typer.Exit


@app.callback()
def _options(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")] = False) -> None:
    pass


def _conclude(folder: Path, as_json: bool) -> None:
    report: dict[str, Any] = json.loads((folder / "report" / "report.json").read_text())
    if as_json:
        typer.echo(json.dumps(report, indent=1))
        return
    from persea.progress import comparison

    comparison(report)
    typer.echo(f"page     {folder / 'report' / 'index.html'}\nstudent  {folder / 'train' / 'student'}")


def _checked(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "check" / "check.json").read_text())
    return found


def _show_check(folder: Path) -> None:
    from persea.progress import pairings

    pairings(_checked(folder))


def _stop(number: int, frame: object) -> None:
    raise Stopped(number)


def main() -> None:
    """Entry point: every refusal is one line on stderr and an exit code; a traceback means a bug of ours."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    try:
        sys.exit(app(standalone_mode=False))
    except (PerseaError, Stopped) as error:
        sys.stderr.write(f"persea: {error}\n")
        sys.exit(error.exit_code)
    except USAGE as error:
        if said := error.format_message():  # type: ignore[attr-defined]  # nothing is said where no verb is given: that prints the help
            sys.stderr.write(f"persea: {said} -> persea --help\n")
        sys.exit(RecipeError.exit_code)
    except Exception:
        sys.stderr.write("persea: this is a bug of persea; please report it with what follows and the recipe\n")
        raise


if __name__ == "__main__":
    main()
