"""Plan: what a run would do and cost, told before anything starts; refuses what cannot fit. Loads no weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from persea.errors import RefusedError
from persea.pipeline.preflight import refuse_missing_logprobs
from persea.pipeline.run_context import BASE, STUDENT, RunContext, digest_json
from persea.pipeline.stages import STAGES, Stage
from persea.tasks.task import Split

SAMPLED_BYTES_PER_TOKEN = 40  # the most: broad text of a 152k vocabulary at tau .02 costs 34 without its text, reasoning 9 (docs/cache.md)
TOPK_BYTES_PER_TOKEN = 400  # with `distributions: topk` at max_kl .01 broad text costs 316, reasoning 53 (docs/cache.md)


@dataclass(frozen=True)
class StagePlan:
    """One stage: `state` is "stands", "to do", or "waits" where it needs a stage before it; `work` in words."""

    stage: str
    state: str
    work: str


@dataclass(frozen=True)
class RunPlan:
    """stages in order; disk_bytes: the most this run will add; answers: questions asked of models in all."""

    stages: tuple[StagePlan, ...]
    answers: int
    disk_bytes: int
    disk_free: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table_rows(self) -> list[tuple[str, str, str]]:
        rows = [(c.stage, c.state, c.work) for c in self.stages]
        disk = (
            f"at most {self.disk_bytes / 1e9:.2f} GB of disk ({self.disk_free / 1e9:.0f} GB free)"
        )
        return [*rows, ("in all", "", f"{self.answers:,} answers, {disk}")]


def plan_run(context: RunContext) -> RunPlan:
    """Count what each stage asks, keeps and writes. Raises Refused where the disk cannot hold it, RecipeError for a mode nobody knows."""
    context.lm_eval_digests()  # told now and not after hours
    context.refuse_unsupported_efforts()
    refuse_missing_logprobs(context)
    from persea.training.checkpoint import MAX_CHECKPOINTS  # torch comes with it

    recipe, teachers = context.recipe, len(context.teacher_names)
    asked = sum(len(items) for _, items in context.held_out_items(Split.AUDITION)) * sum(
        len(context.measured_efforts(name, recipe.audition.efforts))
        for name in context.teacher_names
    )
    tested = sum(len(items) for _, items in context.held_out_items(Split.TEST)) * sum(
        len(context.measured_efforts(name, recipe.evaluation.efforts))
        for name in (STUDENT, BASE, *context.renderers)
    )
    tested += sum(
        sum(not i.choices for i in items) * len(context.taught_efforts.get(skill.name, ()))
        for skill, items in context.held_out_items(Split.TEST)
    )
    prompts = len(context.corpus.prompts)
    weights = _weight_bytes(recipe.student.model)
    captured = (
        prompts
        * recipe.capture.max_new_tokens
        * (
            SAMPLED_BYTES_PER_TOKEN
            if recipe.capture.distributions == "sampled"
            else TOPK_BYTES_PER_TOKEN
        )
    )
    work = {
        "check": f"{teachers} pairings of tokenizers",
        "audition": f"at most {asked:,} answers by {teachers} teachers",
        "capture": f"{prompts:,} answers, at most {captured / 1e9:.2f} GB ({context.corpus.num_inputs - prompts:,} prompts left out)",
        "train": f"{recipe.training.steps:,} steps of {recipe.training.batch_size} conversations",
        "evaluate": f"{tested:,} answers by {len(context.renderers) + 2} speakers",
        "lineage": "one record",
        "report": "one page",
    }
    disk = captured + weights * (
        1 + 3 * (MAX_CHECKPOINTS + 1)
    )  # weights and two Adam moments a checkpoint; an old one goes when the new one stands
    free = shutil.disk_usage(_existing_ancestor(context.folder)).free
    if disk > free:
        raise RefusedError(
            f"the run needs up to {disk / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            where=str(context.folder),
            remedy="free space or give another --out",
        )
    states: dict[str, str] = {}
    for stage in STAGES:
        states[stage.name] = _stage_state(context, stage, states)
    return RunPlan(
        tuple(StagePlan(s.name, states[s.name], work[s.name]) for s in STAGES),
        asked + prompts + tested,
        disk,
        free,
    )


def _stage_state(context: RunContext, stage: Stage, earlier_states: Mapping[str, str]) -> str:
    needed = {
        "capture": ("audition",),
        "train": ("capture",),
        "evaluate": ("train",),
        "lineage": ("train",),
        "report": tuple(earlier_states),
    }
    if any(earlier_states[name] != "stands" for name in needed.get(stage.name, ())):
        return "waits"
    return (
        "stands"
        if context.is_up_to_date(stage.name, digest_json(stage.inputs(context)))
        else "to do"
    )


def _weight_bytes(model: str) -> int:
    """Bytes of a local model's weights in float32 (they may be stored in half); 0 where they are not on this disk."""
    return (
        sum(2 * p.stat().st_size for p in Path(model).glob("*.safetensors"))
        if Path(model).is_dir()
        else 0
    )


def _existing_ancestor(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder
