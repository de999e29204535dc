"""Plan a run: list the work of each stage, and refuse a run that the disk cannot hold.

Loads no weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from persea.cache.accounting import left_out_lines
from persea.config.schema import StudentSection
from persea.errors import RefusedError
from persea.models.gguf_header import find_gguf
from persea.models.gguf_model import gguf_header
from persea.pipeline.audition_stage import contestants, is_contested_on_texts
from persea.pipeline.base_contest import asks_base, measures_base
from persea.pipeline.model_refs import BASE, STUDENT
from persea.pipeline.preflight import (
    refuse_asking_text_models,
    refuse_missing_logprobs,
    refuse_unsupported_efforts,
)
from persea.pipeline.run_context import RunContext
from persea.pipeline.stage_keys import stage_key
from persea.pipeline.stages import STAGES, Stage
from persea.tasks.task import Split

# Upper bounds a captured token, measured in docs/cache.md: broad text of a 152k vocabulary costs
# 34 bytes at a sampling threshold of .02 without its text (reasoning 9), and 316 with
# `distributions: topk` at max_kl .01 (reasoning 53).
SAMPLED_BYTES_PER_TOKEN = 40
TOPK_BYTES_PER_TOKEN = 400
BYTES_PER_PARAMETER = 4  # float32
ADAM_COPIES = 3  # a checkpoint holds each trained weight and its two Adam moments

# name of a matrix in a GGUF file -> its name in transformers, which `lora.targets` uses
GGUF_MATRICES = {
    **{f"attn_{x}": f"{x}_proj" for x in ("q", "k", "v")},
    "attn_output": "o_proj",
    **{f"ffn_{x}": f"{x}_proj" for x in ("gate", "up", "down")},
}

UP_TO_DATE, TO_DO, WAITS = "up to date", "to do", "waits"


@dataclass(frozen=True)
class StagePlan:
    """One stage of a plan.

    Attributes:
        stage: Name of the stage.
        state: "up to date", "to do", or "waits" if it needs the output of an earlier stage.
        work: Description of the work.
    """

    stage: str
    state: str
    work: str


@dataclass(frozen=True)
class RunPlan:
    """The work of a run, before it starts.

    Attributes:
        stages: The stages, in order.
        answers: Questions that models answer, at most.
        disk_bytes: Bytes that the run adds to the disk, at most.
        disk_free: Free bytes on the disk of the run folder.
        left_out: Reason -> number of prompts, texts and lines that are not captured.
    """

    stages: tuple[StagePlan, ...]
    answers: int
    disk_bytes: int
    disk_free: int
    left_out: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON."""
        return asdict(self)

    def table_rows(self) -> list[tuple[str, str, str]]:
        """Return (stage, state, work) of each stage, why prompts are left out, and totals."""
        disk = (
            f"at most {self.disk_bytes / 1e9:.2f} GB of disk ({self.disk_free / 1e9:.0f} GB free)"
        )
        rows = [(s.stage, s.state, s.work) for s in self.stages]
        after_capture = 1 + [s.stage for s in self.stages].index("capture") if self.stages else 0
        rows[after_capture:after_capture] = [
            ("", "", line) for line in left_out_lines(self.left_out)
        ]
        return [
            *rows,
            ("total", "", f"{self.answers:,} answers, {disk}"),
        ]


def plan_run(context: RunContext) -> RunPlan:
    """Count the answers, bytes and steps of each stage.

    Raises:
        RefusedError: The disk cannot hold the run.
        RecipeError: The corpus asks for a thinking effort that no model supports.
        DataError: A file of the recipe is missing or broken.
    """
    context.lm_eval_digests()
    refuse_unsupported_efforts(context)
    refuse_asking_text_models(context)
    refuse_missing_logprobs(context)
    recipe, num_prompts = context.recipe, len(context.corpus.prompts)
    num_audition, num_test = _count_audition_answers(context), _count_test_answers(context)
    num_scored = sum(
        context.are_answers_given or p.conversation.is_document for p in context.corpus.prompts
    )
    captured_bytes = _count_captured_tokens(context) * (
        SAMPLED_BYTES_PER_TOKEN
        if recipe.capture.distributions == "sampled"
        else TOPK_BYTES_PER_TOKEN
    )
    num_teachers = len(context.models.teacher_names)
    captured = [f"{num_prompts - num_scored:,} answers"] if num_scored < num_prompts else []
    captured += [f"{num_scored:,} given texts"] if num_scored else []
    work = {
        "check": f"{num_teachers} tokenizer pairs",
        "audition": _audition_work(context, num_audition),
        "capture": f"{' and '.join(captured) or 'nothing'}, at most {captured_bytes / 1e9:.2f} GB",
        "train": f"{recipe.training.steps:,} steps of {recipe.training.batch_size} conversations",
        "evaluate": _evaluation_work(context, num_test),
        "lineage": "one record",
        "report": "one page",
    }
    disk_bytes = captured_bytes + training_bytes(recipe.student)
    disk_free = shutil.disk_usage(_existing_ancestor(context.folder)).free
    if disk_bytes > disk_free:
        raise RefusedError(
            f"the run needs up to {disk_bytes / 1e9:.1f} GB, {disk_free / 1e9:.1f} GB are free",
            where=str(context.folder),
            remedy="free space or give another --out",
        )
    states: dict[str, str] = {}
    for stage in STAGES:
        states[stage.name] = _stage_state(context, stage, states)
    return RunPlan(
        tuple(StagePlan(s.name, states[s.name], work[s.name]) for s in STAGES),
        num_audition + num_prompts - num_scored + num_test,
        disk_bytes,
        disk_free,
        context.corpus.count_removed(),
    )


def _audition_work(context: RunContext, num_answers: int) -> str:
    names = f"{len(context.models.teacher_names)} teachers"
    names += " and the student's base" * measures_base(context)
    num_texts = sum(
        len(one.conversations)
        for skill in context.scored_skills
        if is_contested_on_texts(context, skill)
        for one in context.audition_texts(skill)
    )
    work = [f"at most {num_answers:,} answers"] * (num_answers > 0)
    work += [f"{num_texts:,} texts read"] * (num_texts > 0)
    if not work:
        return "no question: each skill has one possible teacher"
    return f"{' and '.join(work)} by {names}"


def _evaluation_work(context: RunContext, num_answers: int) -> str:
    texts = f"{len(context.held_out_texts):,} texts" if context.held_out_texts else ""
    answers = f"{num_answers:,} answers" if num_answers or not texts else ""
    work = " and ".join(filter(None, (answers, texts)))
    return f"{work} by {len(context.models.renderers) + 2} models"


def _count_captured_tokens(context: RunContext) -> int:
    """Return the most tokens that teachers write or score: a text has at most one a byte."""
    max_new_tokens = context.recipe.capture.max_new_tokens
    total = 0
    for prompt in context.corpus.prompts:
        if prompt.conversation.is_document:
            total += len(prompt.conversation.messages[0].text.encode(errors="replace"))
        elif context.are_answers_given:
            total += len(prompt.answer.encode(errors="replace"))
        else:
            total += max_new_tokens
    return total


def _count_audition_answers(context: RunContext) -> int:
    efforts, models = context.recipe.audition.efforts, context.models
    count = 0
    for task, items in context.held_out_items(Split.AUDITION):
        names = contestants(context, task.name) if task.name in context.asked_skills else ()
        if names:
            asked = sum(len(models.measured_efforts(n, efforts)) for n in names)
            count += len(items) * (asked + asks_base(context))
    return count


def _count_test_answers(context: RunContext) -> int:
    tasks = context.held_out_items(Split.TEST)
    efforts, models = context.recipe.evaluation.efforts, context.models
    names = [n for n in (STUDENT, BASE, *models.renderers) if not models.renderer(n).is_text]
    num_answers = sum(len(items) for _, items in tasks) * sum(
        len(models.measured_efforts(name, efforts)) for name in names
    )
    # a hybrid student answers in each thinking mode, except items with choices
    return num_answers + sum(
        sum(not i.choices for i in items) * len(context.taught_efforts.get(task.name, ()))
        for task, items in tasks
    )


def _stage_state(context: RunContext, stage: Stage, earlier_states: Mapping[str, str]) -> str:
    needed = {
        "capture": ("audition",)
        if context.needs_audition or context.recipe.audition.without_gain != "warn"
        else (),
        "train": ("capture",),
        "evaluate": ("train",),
        "lineage": ("train",),
        "report": tuple(earlier_states),
    }
    if any(earlier_states[name] != UP_TO_DATE for name in needed.get(stage.name, ())):
        return WAITS
    key = stage_key(stage.name, stage.inputs(context))
    return UP_TO_DATE if context.stages.is_up_to_date(stage.name, key) else TO_DO


def training_bytes(student: StudentSection) -> int:
    """Return the bytes that a training adds to the disk, at most: student and checkpoints.

    Checkpoints hold the trained weights: all of them, or the LoRA matrices. Two checkpoints are
    kept, and a third is written before the oldest is deleted. Returns 0 for a model that is not on
    this machine: its size is unknown before it is downloaded.
    """
    from persea.training.checkpoint import MAX_CHECKPOINTS  # imports torch

    shapes = dict(_weight_shapes(student.model))
    num_weights = sum(prod(shape) for shape in shapes.values())
    num_trained = num_weights
    if student.lora:  # each adapted matrix [out, in] gets [rank, in] and [out, rank]
        adapted = {f"{target}.weight" for target in student.lora.targets}
        num_trained = sum(
            student.lora.rank * sum(shape)
            for name, shape in shapes.items()
            if ".".join(name.split(".")[-2:]) in adapted
        )
    return BYTES_PER_PARAMETER * (num_weights + ADAM_COPIES * num_trained * (MAX_CHECKPOINTS + 1))


def _weight_shapes(model: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each tensor, from the headers of the safetensors or the GGUF file."""
    gguf = find_gguf(model, "student.model")
    if gguf is not None:
        for tensor in gguf_header(gguf, "student.model").tensors:
            *block, name, kind = ("." + tensor.name).rsplit(".", 2)
            yield ".".join([*block, GGUF_MATRICES.get(name, name), kind]), tensor.shape
        return
    for path in sorted(Path(model).glob("*.safetensors") if Path(model).is_dir() else ()):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                yield name, tuple(tensor["shape"])


def _existing_ancestor(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder
