"""The app that the verbs belong to, their shared options, and how a recipe is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from persea.errors import RecipeError
from persea.training.distributed.world import LaunchOptions, ParallelStrategy

if TYPE_CHECKING:
    from persea.config.recipe import Recipe
    from persea.pipeline.run_context import RunContext

PIPELINE_PANEL = "The whole pipeline"
BEFORE_PANEL = "Before a run"
STAGE_PANEL = "Single stages"
DURING_PANEL = "During a run"
AFTER_PANEL = "After a run"
PANELS = (PIPELINE_PANEL, BEFORE_PANEL, STAGE_PANEL, DURING_PANEL, AFTER_PANEL)


class PanelOrderedGroup(TyperGroup):
    """Lists the verbs in the order of their panels, whatever the order of their imports."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Return the names of the verbs."""
        return sorted(
            self.commands,
            # typer puts verbs with verbs of their own last; the stage lineage is before the report
            key=lambda name: (
                PANELS.index(str(self.commands[name].rich_help_panel)),  # type: ignore[attr-defined]
                name == "report",
            ),
        )


app = typer.Typer(
    cls=PanelOrderedGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Distil several open-weight model families into one student, although each has its own "
    "tokenizer and chat format.",
)

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Sets = Annotated[
    list[str],
    typer.Option(
        "--set",
        help="Change one key of the recipe, e.g. --set training.steps=200. Repeatable.",
        show_default=False,
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out", help="The run folder. Default: runs/<name of the recipe>.", show_default=False
    ),
]
ExecutorKind = Annotated[
    str,
    typer.Option(
        "--executor",
        help="Where the models answer: local or ray; short for --set executor.kind=ray.",
        show_default=False,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=0,
        help="Processes that hold a model each; short for --set executor.workers=2.",
        show_default=False,
    ),
]
Procs = Annotated[int, typer.Option("--procs", min=1, help="Number of training processes.")]
Sharding = Annotated[
    ParallelStrategy,
    typer.Option(
        "--shard", help="ddp: each process holds the whole student; fsdp: each holds a part."
    ),
]
Resume = Annotated[
    str,
    typer.Option(
        "--resume",
        help="Where the training continues: auto (newest checkpoint), never (train again), or the "
        "path of a checkpoint.",
    ),
]
TaskFiles = Annotated[
    list[Path],
    typer.Option(
        "--tasks",
        help="A Python file with questions and a grader of your own; it runs here. Repeatable.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
DEFAULT_OUT, DEFAULT_LAUNCH = Path(), LaunchOptions()
NO_OVERRIDES: list[str] = []
NO_TASKS: list[Path] = []


def count_available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_checked_recipe(
    path: Path, overrides: list[str], task_files: Sequence[Path] = ()
) -> Recipe:
    """Load a recipe, and refuse unknown skills and benchmarks.

    Args:
        path: The recipe.
        overrides: `--set` changes.
        task_files: Python files with tasks, which measure skills.

    Raises:
        RecipeError: The recipe is wrong. The message lists every problem.
    """
    from persea.config.recipe import load_recipe
    from persea.tasks.benchmarks import refuse_unmeasured_skills
    from persea.tasks.generated import refuse_too_many_questions
    from persea.tasks.own_tasks import task_file_skill
    from persea.teachers.engines import refuse_unknown_engines

    try:
        recipe = load_recipe(path, overrides)
        if os.environ.get("RANK", "0") == "0":  # one process of torchrun's prints for all
            for notice in recipe.notices:
                typer.echo(notice, err=True)
        refuse_unmeasured_skills(recipe, str(path), set(map(task_file_skill, task_files)))
        refuse_too_many_questions(recipe.corpus, str(path))
        refuse_unknown_engines(recipe.teachers, str(path))
    except RecipeError:
        if os.environ.get("LOCAL_RANK", "0") in ("", "-1", "0"):
            raise
        # the first process of this machine reads the same file, and prints the error
        raise SystemExit(RecipeError.exit_code) from None
    return recipe


def executor_overrides(kind: str, workers: int | None) -> list[str]:
    """Return the `--set` changes that `--executor` and `--workers` are short for."""
    return [
        *([f"executor.kind={kind}"] if kind else []),
        *([f"executor.workers={workers}"] if workers is not None else []),
    ]


def make_run_context(
    path: Path,
    overrides: list[str],
    out: Path,
    launch_options: LaunchOptions = DEFAULT_LAUNCH,
    task_files: Sequence[Path] = (),
) -> RunContext:
    """Load a recipe and return its run context."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    recipe = load_checked_recipe(path, overrides, task_files)
    from persea.pipeline.model_refs import silence_transformers
    from persea.pipeline.run_context import RunContext

    silence_transformers()
    return RunContext(
        recipe,
        Path("runs") / recipe.name if out == DEFAULT_OUT else out,
        launch_options,
        task_files=tuple(task_files),
    )


def refuse_other_versions(folder: Path, *stages: str) -> None:
    """Raise if a run folder was written by another version of persea.

    Args:
        folder: A run folder. Any other folder is accepted.
        stages: The stages that are read; none = all.

    Raises:
        RefusedError: A stage has another version. The message names the remedy.
    """
    from persea.pipeline.stage_keys import STAGE_NAMES
    from persea.pipeline.stage_store import StageStore

    StageStore(folder).refuse_other_versions(stages or STAGE_NAMES)
