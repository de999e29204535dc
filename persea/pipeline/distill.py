"""Distil from Python: run a recipe as `persea run` does, and return where its results are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persea.training.distributed.world import LaunchOptions, ParallelStrategy

if TYPE_CHECKING:
    from persea.config.recipe import Recipe


@dataclass(frozen=True)
class DistillResult:
    """The results of a finished run.

    Attributes:
        folder: The run folder.

    Example:
        >>> from pathlib import Path
        >>> run = DistillResult(Path("runs/avocado"))
        >>> str(run.student)
        'runs/avocado/train/student'
    """

    folder: Path

    @property
    def student(self) -> Path:
        """The folder of the trained student: weights, tokenizer and template, as on the hub."""
        return self.folder / "train" / "student"

    @property
    def page(self) -> Path:
        """The report page, one HTML file."""
        return self.folder / "report" / "index.html"

    @property
    def report(self) -> dict[str, Any]:
        """The content of report.json: every model's score on every skill, with intervals."""
        return _read_json(self.folder / "report" / "report.json")

    @property
    def evaluation(self) -> dict[str, Any]:
        """The content of evaluation.json: scores by language and effort, and comparisons."""
        return _read_json(self.folder / "evaluate" / "evaluation.json")


def distill(
    recipe: Recipe | str | Path,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    num_processes: int = 1,
    parallel: ParallelStrategy = ParallelStrategy.DDP,
    resume: str = "auto",
    progress: Callable[[str, float, str], None] | None = None,
) -> DistillResult:
    """Run a recipe: check, audition, capture, train, evaluate, lineage, report.

    The same as `persea run`. Stages that are up to date are skipped, and an interrupted run
    continues.

    Args:
        recipe: A recipe, or the path of its YAML file.
        out: The run folder; None = runs/<name of the recipe>.
        overrides: "key=value" changes of a recipe that is given as a path, such as
            "training.steps=200".
        num_processes: Processes of this machine to train in.
        parallel: DDP: each process holds the student; FSDP: each holds a part of it.
        resume: "auto" (the newest checkpoint), "never" (train again), or a checkpoint's path.
        progress: Called with the stage, the fraction of it that is done in [0, 1], and a message.
            None = draw progress bars on stderr.

    Returns:
        Where the results are.

    Raises:
        RecipeError: The recipe is wrong, or `overrides` is given with a Recipe.
        DataError: A model or a file is missing or broken.
        RefusedError: A stage refuses its result, or another recipe's student is in `out`.
        SafetyRegressionError: The student is less safe than its base. Everything is written.
        TeacherError: A teacher's server failed.
        StorageError: The disk is full, or another run holds the folder.
        MissingRequirementError: This machine lacks a package, a GPU or a sandbox.

    Example:
        >>> import persea
        >>> run = persea.distill("recipes/quickstart.yaml", "runs/quickstart")  # doctest: +SKIP
        >>> run.student  # doctest: +SKIP
        PosixPath('runs/quickstart/train/student')
        >>> run.report["skills"]["reasoning"]["student"]["value"]  # doctest: +SKIP
        0.84
    """
    from persea.config.recipe import Recipe, load_recipe
    from persea.errors import RecipeError
    from persea.pipeline.model_refs import silence_transformers
    from persea.pipeline.progress import progress_bars
    from persea.pipeline.run_context import RunContext
    from persea.pipeline.stages import run_pipeline
    from persea.tasks.benchmarks import refuse_unmeasured_skills
    from persea.tasks.generated import refuse_too_many_questions
    from persea.teachers.engines import refuse_unknown_engines

    if isinstance(recipe, Recipe):
        if overrides:
            raise RecipeError(
                "overrides need the path of a recipe",
                where="distill",
                remedy="give them to Recipe.from_yaml, or give the path",
            )
        loaded, where = recipe, recipe.name
    else:
        loaded, where = load_recipe(Path(recipe), list(overrides)), str(recipe)
    refuse_unmeasured_skills(loaded, where)
    refuse_too_many_questions(loaded.corpus, where)
    refuse_unknown_engines(loaded.teachers, where)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    silence_transformers()
    folder = Path(out) if out is not None else Path("runs") / loaded.name
    context = RunContext(loaded, folder, LaunchOptions(num_processes, parallel, resume))
    if progress is not None:
        run_pipeline(context, progress)
    else:
        with progress_bars() as bars:
            run_pipeline(context, bars)
    return DistillResult(folder)


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content
