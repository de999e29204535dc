"""Run tasks of lm-evaluation-harness on a model of this machine, with lm-eval's own backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from persea.errors import DataError, MissingRequirementError, PerseaError
from persea.tasks.benchmarks.benchmark import require_module

# what persea.evaluation.lm_eval_results reads; the rest of lm-eval's results is its configuration
KEPT_KEYS = ("results", "n-samples", "higher_is_better", "versions", "n-shot")


def _task_manager(include_folder: str) -> Any:
    require_module("lm_eval", "lm-eval", "evaluation.lm_eval")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingRequirementError(
            f"lm-eval does not import: {error}",
            where="evaluation.lm_eval",
            remedy="pip install 'persea[lm-eval]'",
        ) from error
    return TaskManager(include_path=include_folder or None)


def refuse_unknown_tasks(tasks: Sequence[str], include_folder: str) -> None:
    """Check that lm-eval knows the tasks. Loads no data set and no model.

    Args:
        tasks: Names of tasks, groups or tags.
        include_folder: Folder with further task files; "" = none.

    Raises:
        MissingRequirementError: lm-eval is not installed.
        DataError: A task is unknown.
    """
    manager = _task_manager(include_folder)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise DataError(
            f"lm-eval has no task {', '.join(unknown)}",
            where="evaluation.lm_eval",
            remedy="`lm-eval ls tasks` lists its tasks; a folder with your own .yaml files is "
            "`lm_eval_include:`",
        )


def run_lm_eval(
    model_path: str,
    tasks: Sequence[str],
    include_folder: str = "",
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> Mapping[str, Any]:
    """Run tasks on one model by lm-eval's backend for transformers.

    Args:
        model_path: A folder in Hugging Face form, or a hub id.
        tasks: Names of tasks, groups or tags.
        include_folder: Folder with further task files; "" = none.
        limit: Questions of each task, at most; None = all.
        batch_size: Sequences that are computed at once.
        seed: Seed of the few-shot examples and of torch.

    Returns:
        The part of lm-eval's results file that persea reads.

    Raises:
        MissingRequirementError: lm-eval is not installed.
        DataError: A task or its data set cannot be loaded, or lm-eval fails.
    """
    manager = _task_manager(include_folder)
    import torch
    from lm_eval import simple_evaluate

    try:
        found = simple_evaluate(
            model="hf",
            model_args={"pretrained": model_path, "trust_remote_code": False},
            tasks=list(tasks),
            limit=limit,
            batch_size=batch_size,
            device="cuda" if torch.cuda.is_available() else "cpu",  # lm-eval's default needs CUDA
            task_manager=manager,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except PerseaError:
        raise
    except Exception as error:  # lm-eval, datasets and the hub raise dozens of kinds
        raise DataError(
            f"lm-eval failed: {type(error).__name__}: {str(error)[:300]}",
            where=f"evaluation.lm_eval, {model_path}",
            remedy="run `lm-eval run --model hf` with the same model and tasks to see the whole "
            "message; data sets of the hub need a network",
        ) from error
    return {key: found[key] for key in KEPT_KEYS if key in found}
