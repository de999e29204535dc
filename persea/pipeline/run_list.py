"""List run folders: their state, their scores, and where their recipes differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from persea.chat.messages import ThinkingEffort
from persea.errors import DataError, PerseaError
from persea.pipeline.status import read_status
from persea.report.compare_runs import flat_recipe

MAX_DEPTH = 3  # folders below the given one that are searched; a run is not searched inside


@dataclass(frozen=True)
class ListedRun:
    """A run folder in a list.

    Attributes:
        folder: The run folder.
        name: Name of the recipe.
        state: State of the run, with the stage that it is in unless it is done.
        scores: Skill -> score of the student, all languages together.
        bits_per_byte: Skill -> the student's bits per byte of held-out texts.
        differs: Recipe key -> its value, where the listed runs of this recipe differ.
        updated_at: Time of the last sign of life, seconds since 1970; 0 = unknown.
    """

    folder: str
    name: str
    state: str
    scores: dict[str, float]
    bits_per_byte: dict[str, float]
    differs: dict[str, Any]
    updated_at: float

    def to_json(self) -> dict[str, Any]:
        """Return the run as JSON."""
        return asdict(self)


def find_runs(folder: Path, depth: int = MAX_DEPTH) -> Iterator[Path]:
    """Yield the run folders in a folder, sorted by path; the folder itself if it is a run."""
    if (folder / "recipe.yaml").is_file() and (folder / "lock").is_file():
        yield folder
    elif depth:
        for child in sorted(p for p in folder.glob("*") if p.is_dir() and p.name[0] != "."):
            yield from find_runs(child, depth - 1)


def list_runs(folders: Sequence[Path]) -> list[ListedRun]:
    """List the runs in some folders.

    Args:
        folders: Run folders, or folders that hold them.

    Raises:
        DataError: A folder does not exist, or none holds a run.
    """
    for folder in folders:
        if not folder.is_dir():
            raise DataError(
                "no such folder", where=str(folder), remedy="give the folder that holds the runs"
            )
    found = list(dict.fromkeys(run for folder in folders for run in find_runs(folder)))
    if not found:
        raise DataError(
            "no run folder in it",
            where=", ".join(map(str, folders)),
            remedy="give the folder that the runs were written to with --out",
        )
    recipes = {run: _recipe_or_empty(run) for run in found}
    return [_listed(run, recipes) for run in found]


def table(runs: Sequence[ListedRun]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the columns and rows of a list of runs; a column for each measured skill."""
    skills = list(dict.fromkeys(skill for run in runs for skill in run.scores))
    texts = list(dict.fromkeys(skill for run in runs for skill in run.bits_per_byte))
    columns = ("run", "state", *skills, *(f"{skill} bits/byte" for skill in texts), "differs in")
    rows = [
        (
            run.folder,
            run.state,
            *(f"{run.scores[s]:.3f}" if s in run.scores else "-" for s in skills),
            *(f"{run.bits_per_byte[s]:.3f}" if s in run.bits_per_byte else "-" for s in texts),
            ", ".join(f"{key}={value}" for key, value in run.differs.items()),
        )
        for run in runs
    ]
    return columns, rows


def _listed(run: Path, recipes: dict[Path, dict[str, Any]]) -> ListedRun:
    recipe = recipes[run]
    alike = [other for other in recipes.values() if other.get("name") == recipe.get("name")]
    keys = dict.fromkeys(key for other in alike for key in other)
    differs = {
        key: recipe.get(key, "default")
        for key in keys
        if any(other.get(key) != alike[0].get(key) for other in alike)
    }
    try:
        status = read_status(run)
        state, updated_at = status.state.value, status.updated_at
        if state != "done" and status.stage:
            state += f" in {status.stage} ({status.fraction_done:.0%})"
    except PerseaError as error:
        state, updated_at = f"broken: {error.message}", 0.0
    evaluation, texts = (_json_or_empty(run / "evaluate" / f"{n}.json") for n in _RESULT_FILES)
    scores = {
        s["skill"]: s["value"]
        for s in evaluation.get("scores", ())
        if (s["model_name"], s["language"], s["effort"])
        == (evaluation.get("student"), "", evaluation.get("effort", ThinkingEffort.NONE))
    }
    bits = {
        group["skill"]: group["bits_per_byte"][texts["student"]]["value"]
        for group in texts.get("groups", ())  # the mean of several languages is the last of a skill
        if texts["student"] in group["bits_per_byte"]
    }
    name = str(recipe.get("name", run.name))
    return ListedRun(str(run), name, state, scores, bits, differs, updated_at)


_RESULT_FILES = ("evaluation", "texts")


def _recipe_or_empty(run: Path) -> dict[str, Any]:
    try:
        return flat_recipe(run)
    except DataError:
        return {}


def _json_or_empty(path: Path) -> dict[str, Any]:
    """Read a result; {} if there is none, or not a whole one. `persea report` names the fault."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
