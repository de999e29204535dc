"""Plan a run: list the work and the cost of each stage, and refuse what cannot fit.

Loads no weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from persea.cache.accounting import left_out_lines
from persea.cache.maintenance import committed_units
from persea.config.size_defaults import describe_size_defaults, unusual_settings
from persea.errors import DataError
from persea.licences.verdict import LicenceVerdict
from persea.models.facts import find_facts
from persea.models.loading import set_threads
from persea.models.placement import compute_device, has_fast_bfloat16
from persea.pipeline import cost, preflight, preflight_data
from persea.pipeline.audition_stage import contestants, is_contested_on_texts
from persea.pipeline.base_contest import asks_base, measures_base
from persea.pipeline.calibration import Calibration, read_calibration
from persea.pipeline.census import SampledContext, sampled_context
from persea.pipeline.cost_lines import (
    CostLine,
    Way,
    compare_ways,
    count_units,
    fleet_lines,
    fleet_rates,
    mean_sequence,
    total_failures,
)
from persea.pipeline.first_prompt import RenderedPrompt, render_first_prompt
from persea.pipeline.hardware import Fleet
from persea.pipeline.licence_gate import licence_verdict
from persea.pipeline.machine_cost import machine_lines, machine_rates, refuse_unfit_machine
from persea.pipeline.model_refs import BASE, STUDENT, model_source
from persea.pipeline.plan_tables import cost_table, way_rows
from persea.pipeline.run_context import RunContext
from persea.pipeline.stage_keys import stage_key
from persea.pipeline.stages import STAGES, Stage
from persea.pipeline.workload import SkillWork, context_shares, even_sample, skill_work
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
        answers: Questions that models still answer, at most.
        disk_bytes: Bytes that the run still adds to the disk at its peak.
        disk_free: Free bytes on the disk of the run folder.
        costs: Stage -> rough cost, for capture and train, of the whole stage.
        notes: How the costs were estimated, and warnings about the recipe.
        left_out: Reason -> number of prompts, texts and lines that are not captured.
        licences: Verdict on the licences of the student's base, teachers and data.
        lines: Cost of each stage and model that is still to be paid.
        ways: Cached, online and on-policy training compared for each teacher.
        first_prompt: The first prompt as each model reads it.
        hardware: The accelerators that the lines are for; "" = this machine.
        units: Files of the capture.
        failures: Accelerators that are expected to fail; None = this machine.
    """

    stages: tuple[StagePlan, ...]
    answers: int
    disk_bytes: int
    disk_free: int
    costs: Mapping[str, cost.StageCost]
    notes: tuple[str, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    licences: LicenceVerdict | None = None
    lines: tuple[CostLine, ...] = ()
    ways: tuple[Way, ...] = ()
    first_prompt: tuple[RenderedPrompt, ...] = ()
    hardware: str = ""
    units: int = 0
    failures: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON."""
        licences = {"licences": self.licences.to_json()} if self.licences else {}
        shown = {"first_prompt": [p.to_json() for p in self.first_prompt]}
        return asdict(self) | licences | shown

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

    def cost_table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return columns and rows of the table of costs; the last of several rows is their sum."""
        return cost_table(self.lines)

    def way_rows(self) -> list[tuple[str, ...]]:
        """Return the rows of the table of ways to use a teacher."""
        return way_rows(self.ways)


def plan_run(
    context: RunContext,
    fleet: Fleet | None = None,
    price: float | None = None,
    calibration: Calibration | None = None,
) -> RunPlan:
    """Count the answers, bytes and steps of each stage, and what they cost.

    Args:
        context: The recipe and its run folder. A large corpus is counted and sampled.
        fleet: Accelerators that the plan is for; None = this machine.
        price: Price of one accelerator, or of this machine, for an hour; None = unknown.
        calibration: Speeds measured on this machine; None = those kept in PERSEA_HOME, if any.

    Raises:
        RefusedError: The disk, the memory or the accelerators cannot hold the run.
        RecipeError: The corpus asks for a thinking effort that no model supports.
        DataError: A file of the recipe is missing or broken.
    """
    context = sampled_context(context)
    warnings = preflight.check_run(context)
    if fleet is None:
        refuse_unfit_machine(context)
    recipe, num_prompts = context.recipe, context.num_prompts
    calibration = calibration or (None if fleet else read_calibration(context))
    set_threads(recipe.threads)
    works = plan_works(context, calibration)
    num_audition, num_test = _count_audition_answers(context), _count_test_answers(context)
    num_scored = sum(w.scored for w in works)
    states: dict[str, str] = {}
    for stage in STAGES:
        states[stage.name] = _stage_state(context, stage, states)
    done = _done_shares(context, states)
    speed, device = cost.measure_matmul_speed()
    capture, training = cost.capture_cost(context, speed), cost.training_cost(context, speed)
    work = _stage_works(context, works, capture, training, num_audition, num_test, done)
    size = context.models.student_size
    trained_bytes = cost.training_bytes(size, recipe.student, context.training)
    lines, ways = _costs(context, works, fleet, price, calibration, speed, done)
    asked = {
        "audition": num_audition,
        "capture": num_prompts - num_scored,
        "evaluate": num_test,
    }
    left = sum(round(n * (1 - done.get(stage, 0.0))) for stage, n in asked.items())
    notes = [f"warning: {warning}" for warning in warnings]
    notes += _basis_notes(context, fleet, calibration, speed, device)
    notes += _notes(context, trained_bytes)
    notes += _pilot_note(context, capture, training)
    return RunPlan(
        tuple(StagePlan(s.name, states[s.name], work[s.name]) for s in STAGES),
        left,
        preflight_data.missing_disk_bytes(context),
        shutil.disk_usage(cost.existing_ancestor(context.folder)).free,
        {"capture": capture, "train": training},
        tuple(notes),
        context.corpus.count_removed(),
        licence_verdict(recipe, context.folder),
        tuple(lines),
        tuple(ways),
        render_first_prompt(context),
        fleet.name if fleet else "",
        count_units(recipe, works),
        total_failures(lines) if fleet else None,
    )


def plan_works(context: RunContext, calibration: Calibration | None = None) -> list[SkillWork]:
    """Return how much is captured of each skill, and by which teachers."""
    by_skill: dict[str, list[Any]] = {}
    for prompt in context.corpus.prompts:
        by_skill.setdefault(prompt.skill, []).append(prompt)
    counts = (
        context.prompts_by_skill
        if isinstance(context, SampledContext)
        else {skill: len(prompts) for skill, prompts in by_skill.items()}
    )
    shares, renderer = context_shares(context), context.models.student_renderer
    return [
        skill_work(
            skill,
            count,
            even_sample(by_skill.get(skill, [])),
            renderer,
            context.recipe,
            shares.get(skill, {}),
            calibration,
        )
        for skill, count in counts.items()
    ]


def _costs(
    context: RunContext,
    works: list[SkillWork],
    fleet: Fleet | None,
    price: float | None,
    calibration: Calibration | None,
    speed: float,
    done: Mapping[str, float],
) -> tuple[list[CostLine], list[Way]]:
    """Return the lines of cost, and the comparison of ways to use each teacher."""
    models, recipe = context.models, context.resolved_recipe
    if fleet is None:
        lines = machine_lines(context, works, calibration, speed, price, done)
        rates = machine_rates(context, works, lines, speed)
        kinds = {n: f.is_moe for n in models.teacher_names if (f := _facts(context, n))}
        comparable = rates is not None and len(kinds) == len(models.teacher_names)
        return lines, compare_ways(recipe, works, kinds, rates) if comparable and rates else []
    facts = {n: f for n in models.teacher_names if (f := _facts(context, n))}
    student = _facts(context, STUDENT)
    missing = [n for n in (STUDENT, *models.teacher_names) if n not in {*facts, STUDENT}]
    if student is None or missing:
        raise DataError(
            "its size is not known, and the catalogue does not have it",
            where=(missing or ["student.model"])[0],
            remedy="download its configuration (`hf download MODEL config.json`), or plan without "
            "--hardware",
        )
    trained = student.parameters
    if models.student_size is not None:
        trained = cost.checkpoint_bytes(models.student_size, recipe.student) // (
            cost.BYTES_PER_PARAMETER * cost.ADAM_COPIES
        )
    lines = [
        line
        for line in fleet_lines(recipe, works, student, facts, fleet, trained, price)
        if done.get(line.stage, 0.0) < 1
    ]
    rates = fleet_rates(recipe, mean_sequence(works), student, facts, fleet, trained)
    return lines, compare_ways(recipe, works, {n: f.is_moe for n, f in facts.items()}, rates)


def _facts(context: RunContext, name: str) -> Any:
    if name == STUDENT:
        return find_facts(model_source(context.recipe.student), context.models.student_size)
    return find_facts(
        model_source(context.models.teacher_ref(name)), context.models.teacher_sizes[name]
    )


def _done_shares(context: RunContext, states: Mapping[str, str]) -> dict[str, float]:
    """Return stage -> share of it that is done: all, or the committed units of a capture."""
    done = {stage: 1.0 for stage, state in states.items() if state == UP_TO_DATE}
    if "capture" in done or isinstance(context, SampledContext):
        return done
    try:
        units = context.capture_units
    except DataError:  # the audition has not run
        return done
    committed = set(committed_units(context.folder / "capture"))
    total = sum(len(u.prompts) for u in units)
    if total and committed:
        done["capture"] = sum(len(u.prompts) for u in units if u.name in committed) / total
    return done


def _stage_works(
    context: RunContext,
    works: list[SkillWork],
    capture: cost.StageCost,
    training: cost.StageCost,
    num_audition: int,
    num_test: int,
    done: Mapping[str, float],
) -> dict[str, str]:
    """Return stage -> what it does, in words."""
    num_prompts, num_scored = context.num_prompts, sum(w.scored for w in works)
    captured = [f"{num_prompts - num_scored:,} answers"] if num_scored < num_prompts else []
    captured += [f"{num_scored:,} given texts"] if num_scored else []
    most_captured = preflight_data.captured_bytes(context)
    share = done.get("capture", 0.0)
    begun = f", {share:.0%} of them done" if 0 < share < 1 else ""
    training_section = context.training
    passes = training_section.steps * training_section.batch_size / max(num_prompts, 1)
    return {
        "check": f"{len(context.models.teacher_names)} tokenizer pairs",
        "audition": _audition_work(context, num_audition),
        "capture": f"{' and '.join(captured) or 'nothing'}{begun}, at most "
        f"{most_captured / 1e9:.2f} GB, {capture.describe()}",
        "train": f"{training_section.steps:,} steps of {training_section.batch_size} "
        f"conversations, {passes:,.1f} passes over the prompts, learning rate "
        f"{context.models.learning_rate:g}, {training.describe()}",
        "evaluate": _evaluation_work(context, num_test),
        "lineage": "one record",
        "report": "one page",
    }


def _basis_notes(
    context: RunContext,
    fleet: Fleet | None,
    calibration: Calibration | None,
    speed: float,
    device: str,
) -> list[str]:
    """Return how the times were got, and what the counts leave open."""
    notes = []
    if isinstance(context, SampledContext):
        notes.append(
            f"{context.num_prompts:,} prompts were counted and {len(context.corpus.prompts):,} "
            "read: what the run leaves out as repeated is still among them"
        )
    if fleet is not None:
        notes.append(
            f"hours on {fleet.name}: docs/plan.md names the source of each speed; servers were "
            "measured without log-probabilities, so that a capture takes longer"
        )
    elif calibration is not None:
        notes.append(
            f"seconds: measured with these models on this machine on {calibration.measured_on}, "
            "with fewer prompts at once than the run asks: a run takes less (docs/plan.md)"
        )
    notes.append(
        f"seconds of the stages: {cost.CAPTURE_EFFICIENCY:.0%} (capture) and "
        f"{cost.TRAINING_EFFICIENCY:.0%} (train) of {speed / 1e9:,.0f} billion operations a "
        f"second, a matrix product measured just now on this machine's {device}; right to a "
        "factor of two (`--calibrate` measures the models instead)"
    )
    return notes


def _audition_work(context: RunContext, num_answers: int) -> str:
    names = f"{len(context.models.teacher_names)} teachers"
    names += " and the student's base" * measures_base(context)
    num_texts = sum(
        len(one.conversations)
        for skill in context.scored_skills
        if is_contested_on_texts(context, skill)
        for one in context.text_contestants(skill)[1]
    )
    work = [f"at most {num_answers:,} answers"] * (num_answers > 0)
    work += [f"{num_texts:,} texts read"] * (num_texts > 0)
    if not work:
        return "no question: each skill has one possible teacher"
    return f"{' and '.join(work)} by {names}"


def _notes(context: RunContext, trained_bytes: int | None) -> tuple[str, ...]:
    """Return what the plan leaves out, and warnings."""
    recipe, size = context.recipe, context.models.student_size
    notes = []
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
    if recipe.training.precision == "bfloat16" and not has_fast_bfloat16(compute_device()):
        notes.append(
            "warning: training.precision bfloat16: this processor has no instructions for it, and "
            "a step takes several times as long as in float32 -> `precision: float32` under "
            "training, or a GPU"
        )
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
        num_prompts = max(1, context.num_prompts)
        asked = min(1.0, steps * recipe.training.batch_size / num_prompts)
        seconds = n * (capture.seconds * asked + training.seconds * steps / recipe.training.steps)
    about = "" if seconds is None else f", about {cost.format_duration(seconds)}"
    return (f"persea pilot would try {n} teachers with {steps:,} steps each{about}",)


def _evaluation_work(context: RunContext, num_answers: int) -> str:
    texts = f"{len(context.held_out_texts):,} texts" if context.held_out_texts else ""
    answers = f"{num_answers:,} answers" if num_answers or not texts else ""
    work = " and ".join(filter(None, (answers, texts)))
    return f"{work} by {len(context.models.renderers) + 2} models"


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
    if isinstance(context, SampledContext):  # its keys hold every prompt
        return UP_TO_DATE if context.stages.has_record(stage.name) else TO_DO
    key = stage_key(stage.name, stage.inputs(context))
    return UP_TO_DATE if context.stages.is_up_to_date(stage.name, key) else TO_DO
