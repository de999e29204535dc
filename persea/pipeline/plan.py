"""Plan: what a run would do and cost, told before anything starts; refuses what cannot fit. Loads no weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from persea.errors import Refused
from persea.pipeline.preflight import refuse_mute
from persea.pipeline.run_context import BASE, STUDENT, River, digest_of
from persea.pipeline.stages import STAGES, Stage
from persea.tasks.task import Split

BYTES_PER_TOKEN = 40  # the most: broad text of a 152k vocabulary at tau .02 costs 34 without its text, reasoning 9 (docs/cache.md)
BYTES_PER_TOP = 400  # with `rows: topk` at kl .01 broad text costs 316, reasoning 53 (docs/cache.md)


@dataclass(frozen=True)
class Cost:
    """One stage: `state` is "stands", "to do", or "waits" where it needs a stage before it; `work` in words."""

    stage: str
    state: str
    work: str


@dataclass(frozen=True)
class Plan:
    """stages in order; disk_bytes: the most this run will add; answers: questions asked of models in all."""

    stages: tuple[Cost, ...]
    answers: int
    disk_bytes: int
    disk_free: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, str, str]]:
        rows = [(c.stage, c.state, c.work) for c in self.stages]
        disk = f"at most {self.disk_bytes / 1e9:.2f} GB of disk ({self.disk_free / 1e9:.0f} GB free)"
        return [*rows, ("in all", "", f"{self.answers:,} answers, {disk}")]


def plan(river: River) -> Plan:
    """Count what each stage asks, keeps and writes. Raises Refused where the disk cannot hold it, RecipeError for a mode nobody knows."""
    river.lm_eval()  # told now and not after hours
    river.refuse_modes()
    refuse_mute(river)
    from persea.training.checkpoint import KEPT  # torch comes with it

    recipe, teachers = river.recipe, len(river.teaching)
    asked = sum(len(items) for _, items in river.items(Split.AUDITION)) * sum(
        len(river.efforts(name, recipe.audition.efforts)) for name in river.teaching)
    tested = sum(len(items) for _, items in river.items(Split.TEST)) * sum(
        len(river.efforts(name, recipe.evaluation.efforts)) for name in (STUDENT, BASE, *river.voices))
    tested += sum(sum(not i.choices for i in items) * len(river.modes.get(skill.name, ())) for skill, items in river.items(Split.TEST))
    prompts = len(river.corpus.prompts)
    weights = _weights(recipe.student.model)
    captured = prompts * recipe.capture.max_new_tokens * (BYTES_PER_TOKEN if recipe.capture.rows == "sampled" else BYTES_PER_TOP)
    work = {
        "check": f"{teachers} pairings of tokenizers",
        "audition": f"at most {asked:,} answers by {teachers} teachers",
        "capture": f"{prompts:,} answers, at most {captured / 1e9:.2f} GB ({river.corpus.came - prompts:,} prompts left out)",
        "train": f"{recipe.training.steps:,} steps of {recipe.training.batch} conversations",
        "evaluate": f"{tested:,} answers by {len(river.voices) + 2} speakers",
        "lineage": "one record", "report": "one page"}
    disk = captured + weights * (1 + 3 * (KEPT + 1))  # weights and two Adam moments a checkpoint; an old one goes when the new one stands
    free = shutil.disk_usage(_existing(river.folder)).free
    if disk > free:
        raise Refused(f"the run needs up to {disk / 1e9:.1f} GB, {free / 1e9:.1f} GB are free", where=str(river.folder),
                      remedy="free space or give another --out")
    states: dict[str, str] = {}
    for stage in STAGES:
        states[stage.name] = _state(river, stage, states)
    return Plan(tuple(Cost(s.name, states[s.name], work[s.name]) for s in STAGES), asked + prompts + tested, disk, free)


def _state(river: River, stage: Stage, before: Mapping[str, str]) -> str:
    needed = {"capture": ("audition",), "train": ("capture",), "evaluate": ("train",), "lineage": ("train",), "report": tuple(before)}
    if any(before[name] != "stands" for name in needed.get(stage.name, ())):
        return "waits"
    return "stands" if river.stands(stage.name, digest_of(stage.inputs(river))) else "to do"


def _weights(model: str) -> int:
    """Bytes of a local model's weights in float32 (they may be stored in half); 0 where they are not on this disk."""
    return sum(2 * p.stat().st_size for p in Path(model).glob("*.safetensors")) if Path(model).is_dir() else 0


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder
