"""What the verbs share: the app they belong to, their options, how a recipe is loaded and a river opened, where bundled files lie."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from persea.training.distributed.world import LaunchOptions, ParallelStrategy

if TYPE_CHECKING:
    from persea.config.recipe import Recipe
    from persea.pipeline.run_context import RunContext

PANELS = ("The whole river", "Before a run", "Stage by stage", "While it runs", "After a run")


class PanelOrderedGroup(TyperGroup):
    """The verbs in the order in which they are wanted, whatever the order in which their files are imported."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]  # typer's own click is not public
        return sorted(
            self.commands,
            key=lambda name: PANELS.index(str(getattr(self.commands[name], "rich_help_panel"))),
        )


app = typer.Typer(
    cls=PanelOrderedGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Distil several open-weight model families at once into one student, although each has its own tokenizer and chat format.",
)

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Sets = Annotated[
    list[str],
    typer.Option(
        "--set", help="Change one key, e.g. --set training.steps=200.", show_default=False
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out", help="The run folder; default runs/<name of the recipe>.", show_default=False
    ),
]
Procs = Annotated[
    int, typer.Option("--procs", min=1, help="Processes of this machine to train in.")
]
Sharding = Annotated[
    ParallelStrategy,
    typer.Option("--shard", help="ddp: each process holds the student; fsdp: a part of it."),
]
Resume = Annotated[
    str,
    typer.Option(
        "--resume", help="auto (the newest checkpoint), never (train anew), or a checkpoint's path."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output, one JSON value.")]
DEFAULT_OUT, DEFAULT_LAUNCH = Path(), LaunchOptions()


def count_available_cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bundled_folder(kind: str) -> Path:
    """The recipes or saplings that come with persea: beside the package in a checkout, inside it when installed."""
    here = Path(__file__).resolve().parent.parent
    inside = here / "bundled" / kind
    return inside if inside.is_dir() else here.parent / kind


def load_checked_recipe(path: Path, overrides: list[str]) -> Recipe:
    from persea.config.recipe import load_recipe
    from persea.tasks.benchmarks import reject_unknown_names
    from persea.teachers.engines import reject_unknown_engines

    recipe = load_recipe(path, overrides)
    if os.environ.get("RANK", "0") == "0":  # one process of torchrun's prints for all
        for notice in recipe.notices:
            typer.echo(notice, err=True)
    reject_unknown_names(recipe.evaluation.benchmarks, recipe.corpus, str(path))
    reject_unknown_engines(recipe.teachers, str(path))
    return recipe


def make_run_context(
    path: Path, overrides: list[str], out: Path, launch_options: LaunchOptions = DEFAULT_LAUNCH
) -> RunContext:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    recipe = load_checked_recipe(path, overrides)
    from persea.pipeline.run_context import RunContext, silence_transformers

    silence_transformers()
    return RunContext(
        recipe, Path("runs") / recipe.name if out == DEFAULT_OUT else out, launch_options
    )
