"""Experiment trackers besides metrics.jsonl: tensorboard, trackio or wandb, imported on demand."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from persea.errors import MissingRequirementError

Tracker = Callable[[int, Mapping[str, Any]], None]  # (step, line of metrics)
WANDB_ID_FILE = "wandb_run_id"  # in the folder of the training


def refuse_missing_tracker(name: str | None) -> None:
    """Check that a tracker is installed, before any model is loaded.

    Raises:
        MissingRequirementError: if the tracker is not installed.
    """
    if name and importlib.util.find_spec(name) is None:
        raise MissingRequirementError(
            f"training.report_to is {name}, which is not installed",
            where="train",
            remedy=f"pip install 'persea[{name}]', or delete `report_to:`; "
            "metrics.jsonl is always written",
        )


def open_tracker(
    name: str,
    run_name: str,
    folder: Path,
    steps_done: int,
    config: Mapping[str, Any],
    last_step: int,
) -> Tracker:
    """Open a tracker and return a function that logs a line of metrics.

    Args:
        name: tensorboard, trackio or wandb.
        run_name: name of the run in the tracker.
        folder: folder of tensorboard's files, and of the id of a wandb run.
        steps_done: steps of the checkpoint that the training resumes. Points after it are of a
            killed run; tensorboard drops them.
        config: shown with the curves: the recipe's section `training`.
        last_step: last step of the training. wandb and trackio send in the background, so the run
            is finished explicitly after this step.
    """
    module = importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    if name == "tensorboard":
        writer = module.SummaryWriter(str(folder), purge_step=steps_done + 1)

        def log_scalars(step: int, line: Mapping[str, Any]) -> None:
            for key, value in flatten_metrics(line):
                writer.add_scalar(key, value, step)
            writer.flush()

        return log_scalars
    # wandb resumes a run by its id alone: without one, resume="allow" starts a new run
    run_id = {"id": _wandb_run_id(folder, steps_done)} if name == "wandb" else {}
    module.init(project="persea", name=run_name, config=dict(config), resume="allow", **run_id)

    def log(step: int, line: Mapping[str, Any]) -> None:
        module.log(dict(flatten_metrics(line)), step=step)
        if step == last_step:
            module.finish()

    return log


def _wandb_run_id(folder: Path, steps_done: int) -> str:
    """Return the id of the wandb run: that of the resumed training, or a new one."""
    path = folder / WANDB_ID_FILE
    if steps_done and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    run_id = uuid.uuid4().hex[:16]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(run_id, encoding="utf-8")
    return run_id


def flatten_metrics(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a line of metrics, keys joined by slashes, without texts and lists."""
    for key, value in line.items():
        if isinstance(value, Mapping):
            yield from flatten_metrics(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key != "step":
            yield f"{prefix}{key}", float(value)
