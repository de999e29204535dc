"""The part of the evaluation that lm-evaluation-harness does: `evaluation.lm_eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from persea import storage
from persea.errors import DataError
from persea.evaluation.lm_eval_run import refuse_unknown_tasks, run_lm_eval
from persea.models.loading import loadable_name
from persea.pipeline.model_refs import BASE, STUDENT, model_source
from persea.pipeline.remote_teachers import is_remote

if TYPE_CHECKING:
    from persea.pipeline.run_context import RunContext
    from persea.vocab_extension.resize_model import ProgressCallback

RESULTS_FOLDER = "lm_eval"


def refuse_impossible_lm_eval(context: RunContext) -> None:
    """Raise if lm-eval could not run the recipe's tasks, before a teacher is asked.

    Raises:
        MissingRequirementError: lm-eval is not installed.
        DataError: A task is unknown.
    """
    evaluation = context.recipe.evaluation
    if evaluation.lm_eval:
        refuse_unknown_tasks(evaluation.lm_eval, evaluation.lm_eval_include)


def measured_models(context: RunContext) -> dict[str, str]:
    """Return name -> folder or hub id of the models that lm-eval can load here.

    The student, its base, and teachers with weights of their own on this machine.
    """
    student = context.recipe.student
    found = {STUDENT: str(context.folder / "train" / "student")}
    if student.sizes is None:
        found[BASE] = loadable_name(model_source(student).model, "student.model")
    for k, teacher in enumerate(context.recipe.teachers):
        if not is_remote(teacher) and teacher.sizes is None:
            found[teacher.name] = loadable_name(teacher.model, f"teachers.{k}.model")
    return found


def run_lm_eval_tasks(context: RunContext, folder: Path, progress: ProgressCallback) -> None:
    """Run the recipe's lm-eval tasks on every model; writes lm_eval/<model>.json.

    Raises:
        DataError: A task cannot be loaded, or lm-eval fails.
    """
    evaluation = context.recipe.evaluation
    for name, path in measured_models(context).items():
        progress("evaluate", 0.99, f"lm-eval on {name}: {', '.join(evaluation.lm_eval)}")
        found = run_lm_eval(
            path,
            evaluation.lm_eval,
            evaluation.lm_eval_include,
            evaluation.lm_eval_limit,
            evaluation.batch_size,
            context.recipe.seed,
        )
        (folder / RESULTS_FOLDER).mkdir(exist_ok=True)
        storage.write_json(folder / RESULTS_FOLDER / f"{name}.json", found)


def results_files(run_folder: Path) -> dict[str, Path]:
    """Return model -> results file that a run's evaluation wrote."""
    files = sorted((run_folder / "evaluate" / RESULTS_FOLDER).glob("*.json"))
    return {path.stem: path for path in files}


def given_results_digests(context: RunContext) -> dict[str, str]:
    """Return model name -> digest of its file of `evaluation.lm_eval_results`.

    Raises:
        DataError: A file is missing.
    """
    digests = {}
    for name, file in context.recipe.evaluation.lm_eval_results.items():
        if not Path(file).is_file():
            raise DataError(
                "no such file",
                where=file,
                remedy=f"run lm_eval on {name} first (docs/evaluate.md), or delete the line",
            )
        digests[name] = storage.digest_file(Path(file))
    return digests
