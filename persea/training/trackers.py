"""Where metrics are shown beside metrics.jsonl: tensorboard, trackio or wandb, imported when asked for and never else."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from persea.errors import MissingRequirementError

Tracker = Callable[[int, Mapping[str, Any]], None]


def refuse_missing_tracker(name: str | None) -> None:
    """Raises EnvironmentLacks where a board is asked for that is not installed: before anything is loaded, and before any step is made."""
    if name and importlib.util.find_spec(name) is None:
        raise MissingRequirementError(
            f"training.report_to is {name}, which is not installed",
            where="train",
            remedy=f"pip install 'persea[{name}]', or delete `report_to:`; metrics.jsonl is always written",
        )


def open_tracker(
    name: str,
    run_name: str,
    folder: Path,
    steps_done: int,
    config: Mapping[str, Any],
    last_step: int,
) -> Tracker:
    """A function (step, line of metrics) that shows it there.

    folder    where tensorboard's files go; the others keep their own
    step      steps done: what a board shows past it was of a run that was killed, and is dropped where the board can
    settings  shown beside the curves: nothing but the recipe's training
    last      the step after whose line the run is over: wandb and trackio send in the background, and a rank ends without waiting for them
    """
    board = importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    if name == "tensorboard":
        writer = board.SummaryWriter(str(folder), purge_step=steps_done + 1)

        def scalars(at: int, line: Mapping[str, Any]) -> None:
            for key, value in flatten_metrics(line):
                writer.add_scalar(key, value, at)
            writer.flush()

        return scalars
    board.init(project="persea", name=run_name, config=dict(config), resume="allow")

    def logged(at: int, line: Mapping[str, Any]) -> None:
        board.log(dict(flatten_metrics(line)), step=at)
        if at == last_step:
            board.finish()

    return logged


def flatten_metrics(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a line of metrics by a name with slashes; texts and lists stay in metrics.jsonl."""
    for key, value in line.items():
        if isinstance(value, Mapping):
            yield from flatten_metrics(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key != "step":
            yield f"{prefix}{key}", float(value)
