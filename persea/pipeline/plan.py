"""Plan a run: list the work and the cost of each stage, and refuse what the disk cannot hold.

Loads no weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from persea.cache.accounting import left_out_lines
from persea.config.size_defaults import describe_size_defaults, unusual_settings
from persea.licences.verdict import LicenceVerdict
from persea.models.loading import set_threads
from persea.pipeline import cost, preflight, preflight_data
from persea.pipeline.audition_stage import contestants, is_contested_on_texts
from persea.pipeline.base_contest import asks_base, measures_base
from persea.pipeline.licence_gate import licence_verdict
from persea.pipeline.model_refs import BASE, STUDENT
from persea.pipeline.run_context import RunContext
from persea.pipeline.stage_keys import stage_key
from persea.pipeline.stages import STAGES, Stage
from persea.tasks.task import Split
from persea.training.learning_rate import describe_unusual_rate

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
        disk_bytes: Bytes that the run adds to the disk at its peak.
        disk_free: Free bytes on the disk of the run folder.
        costs: Stage -> rough cost, for capture and train.
        notes: How the costs were estimated, and warnings about the recipe.
        left_out: Reason -> number of prompts, texts and lines that are not captured.
        licences: Verdict on the licences of the student's base, teachers and data.
    """

    stages: tuple[StagePlan, ...]
    answers: int
    disk_bytes: int
    disk_free: int
    costs: Mapping[str, cost.StageCost]
    notes: tuple[str, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    licences: LicenceVerdict | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON."""
        licences = {"licences": self.licences.to_json()} if self.licences else {}
        return asdict(self) | licences

    def table_rows(self) -> list[tuple[str, str, str]]:
        """Return (stage, state, work) of each stage, why prompts are left out, and totals."""
        disk = f"about {self.disk_bytes / 1e9:.2f} GB of disk ({self.disk_free / 1e9:.0f} GB free)"
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
    warnings = preflight.check_run(context)
    recipe, num_prompts = context.recipe, len(context.corpus.prompts)
    num_audition, num_test = _count_audition_answers(context), _count_test_answers(context)
    num_scored = sum(
        context.are_answers_given or p.conversation.is_document for p in context.corpus.prompts
    )
    set_threads(recipe.threads)
    most_captured = preflight_data.captured_bytes(context)
    speed, device = cost.measure_matmul_speed()
    capture, training = cost.capture_cost(context, speed), cost.training_cost(context, speed)
    num_teachers = len(context.models.teacher_names)
    captured = [f"{num_prompts - num_scored:,} answers"] if num_scored < num_prompts else []
    captured += [f"{num_scored:,} given texts"] if num_scored else []
    steps = context.training.steps
    work = {
        "check": f"{num_teachers} tokenizer pairs",
        "audition": _audition_work(context, num_audition),
        "capture": f"{' and '.join(captured) or 'nothing'}, at most {most_captured / 1e9:.2f} GB, "
        f"{capture.describe()}",
        "train": f"{steps:,} steps of {context.training.batch_size} conversations, "
        f"learning rate {context.models.learning_rate:g}, {training.describe()}",
        "evaluate": _evaluation_work(context, num_test),
        "lineage": "one record",
        "report": "one page",
    }
    size = context.models.student_size
    trained_bytes = cost.training_bytes(size, recipe.student, context.training)
    disk_bytes = most_captured + preflight_data.example_bytes(context) + (trained_bytes or 0)
    disk_free = shutil.disk_usage(cost.existing_ancestor(context.folder)).free
    states: dict[str, str] = {}
    for stage in STAGES:
        states[stage.name] = _stage_state(context, stage, states)
    return RunPlan(
        tuple(StagePlan(s.name, states[s.name], work[s.name]) for s in STAGES),
        num_audition + num_prompts - num_scored + num_test,
        disk_bytes,
        disk_free,
        {"capture": capture, "train": training},
        (
            *map("warning: {}".format, warnings),
            *_notes(context, speed, device, trained_bytes),
            *_pilot_note(context, capture, training),
        ),
        context.corpus.count_removed(),
        licence_verdict(recipe, context.folder),
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


def _notes(
    context: RunContext, speed: float, device: str, trained_bytes: int | None
) -> tuple[str, ...]:
    """Return how the estimates were made, and warnings."""
    recipe, size = context.recipe, context.models.student_size
    notes = [
        f"seconds: {cost.CAPTURE_EFFICIENCY:.0%} (capture) and {cost.TRAINING_EFFICIENCY:.0%} "
        f"(train) of {speed / 1e9:,.0f} billion operations a second, a matrix product measured "
        f"just now on this machine's {device}; right to a factor of two"
    ]
    if trained_bytes is None:
        notes.append(
            "disk and memory: without the training, since the size of "
            f"{recipe.student.model} is not known before it is downloaded"
        )
    given = recipe.training.learning_rate
    if given is not None and size is not None:
        is_lora = recipe.student.lora is not None
        warning = describe_unusual_rate(given, size.num_parameters, is_lora)
        notes += [f"warning: {warning}"] if warning else []
    if size is not None:
        found = unusual_settings(recipe, size.num_parameters)
        notes += [f"warning: {warning}" for warning in found]
    if line := describe_size_defaults(context.size_defaults, size.num_parameters if size else 0):
        notes.append(f"{line} (docs/reference/defaults.md)")
    return tuple(notes)


def _pilot_note(
    context: RunContext, capture: cost.StageCost, training: cost.StageCost
) -> tuple[str, ...]:
    """Return the cost of a pilot; nothing for a single teacher."""
    from persea.pipeline.pilot import DEFAULT_SHARE, pilot_steps

    recipe, n = context.resolved_recipe, len(context.models.teacher_names)
    if n < 2:
        return ()
    steps = pilot_steps(recipe, DEFAULT_SHARE)
    seconds = None
    if capture.seconds is not None and training.seconds is not None:
        num_prompts = max(1, len(context.corpus.prompts))
        asked = min(1.0, steps * recipe.training.batch_size / num_prompts)
        seconds = n * (capture.seconds * asked + training.seconds * steps / recipe.training.steps)
    about = "" if seconds is None else f", about {cost.format_duration(seconds)}"
    return (f"persea pilot would try {n} teachers with {steps:,} steps each{about}",)


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
            total += len(prompt.given_text.encode(errors="replace"))
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
