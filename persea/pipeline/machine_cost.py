"""The cost of each stage on this machine: from measured speeds, or from a matrix product."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from persea.errors import RefusedError
from persea.evaluation.answering import ITEMS_PER_ANSWER_FILE
from persea.models.placement import compute_device
from persea.pipeline import cost, preflight_data
from persea.pipeline.audition_stage import contestants
from persea.pipeline.base_contest import asks_base
from persea.pipeline.calibration import NO_TIME, Calibration, Seconds
from persea.pipeline.cost_lines import CostLine, Rates, teacher_tokens
from persea.pipeline.model_refs import BASE, STUDENT
from persea.pipeline.remote_teachers import is_remote
from persea.pipeline.workload import SkillWork
from persea.tasks.task import Split

if TYPE_CHECKING:
    from persea.pipeline.run_context import RunContext

BYTES_PER_WEIGHT = 4  # float32, as models are computed with on a CPU
MATMUL_BASIS = "a share of a matrix product"


def machine_lines(
    context: RunContext,
    works: Sequence[SkillWork],
    calibration: Calibration | None,
    speed: float,
    price: float | None,
    done: Mapping[str, float],
) -> list[CostLine]:
    """Return the cost of each stage and teacher on this machine.

    Args:
        context: The recipe.
        works: What is captured.
        calibration: Measured speeds; None = shares of a matrix product.
        speed: Operations a second in a matrix product.
        price: Price of this machine for an hour; None = unknown.
        done: Stage -> share of it that is done; 1 = nothing is left.
    """
    lines = []
    if calibration is not None:
        lines += _question_lines(context, calibration, Split.AUDITION, price)
    for name in context.models.teacher_names:
        lines += _capture_lines(context, works, name, calibration, speed, price)
    lines.append(_training_line(context, works, calibration, speed, price))
    if calibration is not None:
        lines += _question_lines(context, calibration, Split.TEST, price)
    return [_scaled(line, 1 - done.get(line.stage, 0.0)) for line in lines]


def _scaled(line: CostLine, share: float) -> CostLine:
    if share == 1:
        return line

    def scale(value: float | None) -> float | None:
        return None if value is None else value * share

    return CostLine(
        line.stage,
        line.model,
        round(line.tokens_written * share),
        round(line.tokens_read * share),
        scale(line.seconds),
        scale(line.gpu_hours),
        line.memory_bytes if share else 0,
        round(line.disk_bytes * share),
        round(line.network_bytes * share),
        scale(line.money),
        scale(line.cpu_seconds),
        line.is_upper_bound,
        line.basis,
    )


def _line(
    stage: str,
    model: str,
    written: float,
    read: float,
    time: Seconds | None,
    memory: int | None,
    disk: float,
    price: float | None,
    *,
    is_upper_bound: bool = False,
    basis: str = "",
) -> CostLine:
    hours = None if time is None else time.wall / 3600
    return CostLine(
        stage,
        model,
        round(written),
        round(read),
        None if time is None else time.wall,
        hours,
        memory,
        round(disk),
        0,
        None if hours is None or price is None else hours * price,
        None if time is None or not time.cpu else time.cpu,
        is_upper_bound,
        basis,
    )


def _capture_lines(
    context: RunContext,
    works: Sequence[SkillWork],
    name: str,
    calibration: Calibration | None,
    speed: float,
    price: float | None,
) -> list[CostLine]:
    written, read = teacher_tokens(works, name)
    if not written + read:
        return []
    ref, size = context.models.teacher_ref(name), context.models.teacher_sizes[name]
    upper = any(w.is_upper_bound for w in works if name in w.shares)
    memory = (
        None
        if size is None
        else cost.PROCESS_BYTES + cost.LOGIT_BYTES + BYTES_PER_WEIGHT * size.num_parameters
    )
    unit = min(context.recipe.capture.batch_size, context.recipe.capture.prompts_per_unit)
    measured = _measured_capture(works, name, calibration, unit) if calibration else None
    if measured is not None and calibration is not None:
        time, disk = measured
        return [
            _line(
                "capture",
                name,
                written,
                read,
                time + calibration.loading.get(name, NO_TIME),
                memory,
                disk,
                price,
                is_upper_bound=upper,
                basis=f"measured here ({calibration.measured_on})",
            )
        ]
    share = written + read
    total = sum(sum(teacher_tokens(works, n)) for n in context.models.teacher_names)
    disk = preflight_data.captured_bytes(context) * share / max(1.0, total)
    if size is None or is_remote(ref):
        return [_line("capture", name, written, read, None, memory, disk, price)]
    seconds = share * 2 * size.num_parameters / (speed * cost.CAPTURE_EFFICIENCY)
    return [
        _line(
            "capture",
            name,
            written,
            read,
            Seconds(seconds, 0.0),
            memory,
            disk,
            price,
            is_upper_bound=upper,
            basis=MATMUL_BASIS,
        )
    ]


def _measured_capture(
    works: Sequence[SkillWork], name: str, calibration: Calibration, batch: int
) -> tuple[Seconds, float] | None:
    """Return the time and the bytes of a teacher's capture; None = it was not measured."""
    time, disk = NO_TIME, 0.0
    for work in works:
        share = work.shares.get(name, 0.0)
        if share and work.prompts:
            asked = calibration.asked_speed(name, work.skill)
            if asked is None:
                return None
            prompts = work.prompts * share
            time = time + asked.asking(prompts, batch) + asked.storing * prompts
            disk += work.prompts * share * asked.stored_share * asked.stored_bytes
        if share and work.scored:
            scored = calibration.scored_speed(name)
            if scored is None:
                return None
            size = work.scored * share * work.scored_bytes
            time, disk = time + scored.capturing * size, disk + size * scored.stored_bytes
    return time, disk


def _training_line(
    context: RunContext,
    works: Sequence[SkillWork],
    calibration: Calibration | None,
    speed: float,
    price: float | None,
) -> CostLine:
    rough = cost.training_cost(context, speed)
    trained = cost.training_bytes(
        context.models.student_size, context.recipe.student, context.training
    )
    measured = calibration.trained if calibration else None
    if measured is None or calibration is None:
        time = None if rough.seconds is None else Seconds(rough.seconds, 0.0)
        disk = preflight_data.example_bytes(context) + (trained or 0)
        basis, is_upper_bound = MATMUL_BASIS, rough.is_upper_bound
    else:
        answers = sum(
            share * (w.prompts * _stored_share(calibration, name, w) + w.scored)
            for w in works
            for name, share in w.shares.items()
        )
        time = measured.step * context.training.steps + measured.example * answers
        time = time + measured.loading
        is_stored = context.recipe.training.store_examples
        disk = round(is_stored * measured.example_bytes * answers) + (trained or 0)
        basis, is_upper_bound = f"measured here ({calibration.measured_on})", False
    return _line(
        "train",
        STUDENT,
        0,
        rough.tokens,
        time,
        rough.memory_bytes,
        disk,
        price,
        is_upper_bound=is_upper_bound,
        basis=basis,
    )


def _stored_share(calibration: Calibration, name: str, work: SkillWork) -> float:
    asked = calibration.asked_speed(name, work.skill)
    return asked.stored_share if asked else 1.0


def _question_lines(
    context: RunContext, calibration: Calibration, split: Split, price: float | None
) -> list[CostLine]:
    """Return the cost of an audition or an evaluation, for each model that was measured."""
    is_audition = split is Split.AUDITION
    stage = "audition" if is_audition else "evaluate"
    efforts = (context.recipe.audition if is_audition else context.recipe.evaluation).efforts
    models = context.models
    names = [*models.teacher_names, BASE] if is_audition else [STUDENT, BASE, *models.renderers]
    batch = (
        context.recipe.audition.first_round
        if is_audition
        else min(context.recipe.evaluation.batch_size, ITEMS_PER_ANSWER_FILE)
    )
    lines = []
    for name in names:
        time, written, known = NO_TIME, 0.0, True
        measured_as = BASE if name == STUDENT else name
        for task, items in context.held_out_items(split):
            if is_audition:
                asked = contestants(context, task.name) if task.name in context.asked_skills else ()
                is_asked = name in asked or (name == BASE and bool(asked) and asks_base(context))
            else:
                is_asked = not models.renderer(name).is_text
            if not is_asked:
                continue
            speed = calibration.asked_speed(measured_as, task.name)
            if speed is None:
                known = False
                continue
            times = len(items) * len(models.measured_efforts(name, efforts))
            if name == STUDENT:
                times += len(items) * len(context.taught_efforts.get(task.name, ()))
            time = time + speed.asking(len(items), batch) * (times / max(1, len(items)))
            written += times * speed.answer_tokens
        size = _texts_bytes(context, split)
        scored = calibration.scored_speed(measured_as)
        if size and scored is not None:
            time = time + scored.reading * size
        known = known and (not size or scored is not None)
        if time.wall or not known:
            loading = calibration.loading.get(measured_as, NO_TIME)
            lines.append(
                _line(
                    stage,
                    name,
                    written,
                    0,
                    time + loading if known else None,
                    None,
                    0,
                    price,
                    is_upper_bound=is_audition,
                    basis=f"measured here ({calibration.measured_on})",
                )
            )
    return lines


def _texts_bytes(context: RunContext, split: Split) -> int:
    """Return the bytes of the texts that each model reads."""
    if split is Split.TEST:
        return sum(len(t.text.encode(errors="replace")) for t in context.held_out_texts)
    return sum(
        len(part.text.encode(errors="replace"))
        for skill in context.scored_skills
        for one in context.text_contestants(skill)[1]
        for conversation in one.conversations
        for part in conversation.messages[-1].parts
    )


def machine_rates(
    context: RunContext, works: Sequence[SkillWork], lines: Sequence[CostLine], speed: float
) -> Rates | None:
    """Return the speeds of this machine for the comparison of ways; None = a size is unknown."""
    student = context.models.student_size
    if student is None:
        return None
    capture = speed * cost.CAPTURE_EFFICIENCY / 2
    rates = {STUDENT: capture / student.num_parameters}
    for name in context.models.teacher_names:
        size = context.models.teacher_sizes[name]
        if size is None:
            return None
        rates[name] = capture / size.num_parameters
        for line in lines:  # measured: all tokens of the line in its time
            tokens = line.tokens_written + line.tokens_read
            if line.stage == "capture" and line.model == name and line.seconds and tokens:
                rates[name] = tokens / line.seconds
    trained = next((x for x in lines if x.stage == "train" and x.seconds), None)
    a_second = (
        trained.tokens_read / trained.seconds
        if trained is not None and trained.seconds and trained.tokens_read
        else speed * cost.TRAINING_EFFICIENCY / (6 * student.num_parameters)
    )
    return Rates(rates, rates, a_second)


def refuse_unfit_machine(context: RunContext) -> None:
    """Raise if the weights of a local teacher alone exceed this machine's memory.

    Raises:
        RefusedError: They do. The remedy is the nearest thing that fits.
    """
    if compute_device().type != "cpu":
        return
    memory = total_memory()
    for name in context.models.teacher_names:
        size = context.models.teacher_sizes[name]
        if size is None or is_remote(context.models.teacher_ref(name)):
            continue
        needed = BYTES_PER_WEIGHT * size.num_parameters
        if needed > memory:
            largest = memory // BYTES_PER_WEIGHT / 1e9
            raise RefusedError(
                f"its weights take {needed / 1e9:.0f} GB in float32, and this machine has "
                f"{memory / 1e9:.0f} GB of memory",
                where=f"teachers.{name}",
                remedy=f"a server (`endpoint:`), a GPU (`persea plan --hardware 1xH100` plans for "
                f"one), or a teacher of at most {largest:.0f} billion weights",
            )


def total_memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
