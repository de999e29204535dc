"""Measure a recipe's own models on this machine: a few answers, a few texts, a few steps.

The work goes through the stages' own functions, in a folder that is deleted afterwards.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from persea.cache.capture import CaptureUnit, capture_teacher
from persea.cache.unit import is_committed, read_record
from persea.data.prompts import Corpus, Prompt
from persea.evaluation.audition import Cast
from persea.models.loading import set_threads
from persea.pipeline.calibration import (
    NO_TIME,
    AskedSpeed,
    Calibration,
    ScoredSpeed,
    Seconds,
    TrainedSpeed,
)
from persea.pipeline.model_refs import BASE
from persea.pipeline.run_context import RunContext
from persea.pipeline.workload import even_sample
from persea.teachers.teacher import Teacher

if TYPE_CHECKING:
    from persea.config.recipe import Recipe
    from persea.vocab_extension.resize_model import ProgressCallback

FIRST_PROMPTS, MOST_PROMPTS = 8, 256
SMALL_SHARE = 0.25  # of a batch, that is measured too: what a batch costs beside its prompts
CHUNK_BUDGET_S = 8.0  # of one teacher and skill; the first prompts decide how many follow
BUSY_FACTOR = 4.0  # a clock that runs so much faster than this process' own is not waited for
STEP_BUDGET_S, MIN_STEPS, MOST_STEPS = 30.0, 4, 60


def now() -> Seconds:
    """Return the clocks: of the wall, and of this process on all cores."""
    return Seconds(time.perf_counter(), time.process_time())


def since(begin: Seconds) -> Seconds:
    """Return the time since `now` was called."""
    end = now()
    return Seconds(end.wall - begin.wall, end.cpu - begin.cpu)


@dataclass(eq=False)
class CalibrationContext(RunContext):
    """A run over a few prompts, with a cast that is given.

    Attributes:
        sample: The prompts.
        given_cast: Which teacher answers which of them.
    """

    sample: tuple[Prompt, ...] = field(default=(), kw_only=True)
    given_cast: Cast = field(default_factory=lambda: Cast({}, ()), kw_only=True)

    @cached_property
    def corpus(self) -> Corpus:
        """The sampled prompts."""
        return Corpus(self.sample, ())

    @property
    def cast(self) -> Cast:
        """The given cast."""
        return self.given_cast


def calibrate(
    context: RunContext, shares: Mapping[str, Mapping[str, float]], progress: ProgressCallback
) -> Calibration:
    """Measure the speeds of a recipe's models on this machine.

    Args:
        context: The recipe.
        shares: Skill -> teacher -> share of it: those that are measured.
        progress: Called with "calibrate", the fraction done and a message.

    Raises:
        DataError: Weights cannot be read.
        TeacherError: A server cannot be reached.
    """
    set_threads(context.recipe.threads)
    by_skill: dict[str, list[Prompt]] = {}
    for prompt in context.corpus.prompts:
        by_skill.setdefault(prompt.skill, []).append(prompt)
    folder = Path(tempfile.mkdtemp(prefix="persea-calibrate-"))
    asked: dict[str, AskedSpeed] = {}
    scored: dict[str, ScoredSpeed] = {}
    loading: dict[str, Seconds] = {}
    chunks: dict[str, Sequence[Prompt]] = {}  # "teacher/skill" -> prompts that it captured
    try:
        names = [n for n in context.models.teacher_names if any(n in s for s in shares.values())]
        for k, name in enumerate(names):
            progress("calibrate", k / (len(names) + 2), f"loading {name}")
            begin = now()
            teacher = context.models.load_teacher(name, context.recipe.capture.batch_size)
            loading[name] = since(begin)
            for skill, prompts in by_skill.items():
                if name not in shares.get(skill, {}):
                    continue
                progress("calibrate", k / (len(names) + 2), f"{name} on {skill}")
                measure = _TeacherMeasure(context, teacher, folder / "teachers", skill, prompts)
                speed, chunk = measure.speed()
                if isinstance(speed, AskedSpeed):
                    asked[f"{name}/{skill}"] = speed
                elif speed is not None:
                    scored[f"{name}/{skill}"] = speed
                if speed is not None and getattr(speed, "stored_share", 1.0) > 0:
                    chunks[f"{name}/{skill}"] = chunk
            del teacher
        progress("calibrate", len(names) / (len(names) + 2), "the student before training")
        _measure_base(context, by_skill, asked, scored, loading)
        progress("calibrate", (len(names) + 1) / (len(names) + 2), "training steps")
        trained = _measure_training(context, chunks, shares, folder / "run")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    progress("calibrate", 1.0, "")
    today = datetime.now(UTC).date().isoformat()
    return Calibration(asked, scored, trained, loading, today)


@dataclass
class _TeacherMeasure:
    """One teacher on one skill."""

    context: RunContext
    teacher: Teacher
    folder: Path
    skill: str
    prompts: Sequence[Prompt]

    def speed(self) -> tuple[AskedSpeed | ScoredSpeed | None, Sequence[Prompt]]:
        """Return the speed, and the prompts that it was measured on."""
        capture = self.context.recipe.capture
        most = min(capture.batch_size, capture.prompts_per_unit, MOST_PROMPTS)
        first = even_sample(self.prompts, min(FIRST_PROMPTS, most))
        self._capture(first[:2], "warm")
        begin = now()
        found = self._capture(first, "first")
        many = min(most, _affordable(len(first), since(begin)))
        if many <= len(first):
            return found, first
        chunk = even_sample(self.prompts, many)
        speed = self._capture(chunk, "many")
        few = even_sample(chunk, round(len(chunk) * SMALL_SHARE))
        if not isinstance(speed, AskedSpeed) or len(few) < FIRST_PROMPTS:
            return speed, chunk
        small = self._capture(few, "few")
        return speed.with_opening(small) if isinstance(small, AskedSpeed) else speed, chunk

    def _capture(self, prompts: Sequence[Prompt], label: str) -> AskedSpeed | ScoredSpeed | None:
        """Capture prompts through the capture's own function, and time its two halves."""
        settings = self.context.recipe.capture
        name = f"{label}-{self.teacher.name}-{self.skill}"
        unit = CaptureUnit(name, self.teacher.name, tuple(prompts), "")
        begin, written = now(), NO_TIME

        def on_part(_: CaptureUnit, share: float) -> None:
            nonlocal written
            if share <= 0.5:  # WRITING_SHARE: the answers are written by then
                written = since(begin)

        folder = self.folder / name
        capture_teacher(
            [unit],
            self.teacher,
            folder,
            tau=settings.sampling_threshold,
            max_kl=settings.max_kl,
            max_new_tokens=settings.max_new_tokens,
            seed=self.context.recipe.seed,
            use_given_answers=self.context.are_answers_given,
            on_part=on_part,
        )
        whole = since(begin)
        if not is_committed(folder, name):
            return None
        record, n = read_record(folder, name), len(prompts)
        stored = max(1, record["answers"])
        if _is_scored(self.context, prompts):
            size = _text_bytes(prompts)
            reading = self.read(prompts) if label != "warm" else NO_TIME
            return ScoredSpeed(
                size,
                record["positions"] / size,
                record["bytes"] / size,
                whole * (1 / size),
                reading * (1 / size),
            )
        storing = whole + written * -1.0
        return AskedSpeed(
            n,
            record["positions"] / stored,
            record["answers"] / n,
            record["bytes"] / stored,
            written * (1 / n),
            storing * (1 / n),
        )

    def read(self, prompts: Sequence[Prompt]) -> Seconds:
        """Return the time to compute the log-probabilities of given texts."""
        conversations = [
            p.conversation
            if p.conversation.is_document
            else p.conversation.with_answer(*p.given_parts)
            for p in prompts
        ]
        begin = now()
        for _ in self.teacher.compute_target_logprobs(conversations):
            pass
        return since(begin)

    def write(self, prompts: Sequence[Prompt]) -> Seconds:
        """Return the time to answer prompts."""
        begin = now()
        self.teacher.answer(prompts, self.context.recipe.evaluation.max_new_tokens)
        return since(begin)


def _affordable(count: int, spent: Seconds) -> int:
    """Return the prompts that CHUNK_BUDGET_S allows; on a busy machine by this process' clock."""
    seconds = max(spent.cpu, spent.wall / BUSY_FACTOR, 1e-3)
    return int(count * CHUNK_BUDGET_S / seconds)


def _is_scored(context: RunContext, prompts: Sequence[Prompt]) -> bool:
    return context.are_answers_given or prompts[0].conversation.is_document


def _text_bytes(prompts: Sequence[Prompt]) -> int:
    """Return the bytes of documents, or of given answers."""
    return max(
        1,
        sum(
            len(part.text.encode(errors="replace"))
            for p in prompts
            for part in (p.conversation.parts() if p.conversation.is_document else p.given_parts)
        ),
    )


def _measure_base(
    context: RunContext,
    by_skill: Mapping[str, Sequence[Prompt]],
    asked: dict[str, AskedSpeed],
    scored: dict[str, ScoredSpeed],
    loading: dict[str, Seconds],
) -> None:
    """Measure the untrained student, which answers and reads in audition and evaluation."""
    begin = now()
    base = context.models.load_participant(BASE, context.recipe.evaluation.batch_size)
    loading[BASE] = since(begin)
    most = min(context.recipe.evaluation.batch_size, MOST_PROMPTS)
    for skill, prompts in by_skill.items():
        measure = _TeacherMeasure(context, base, Path(), skill, prompts)
        is_scored = _is_scored(context, prompts)
        if not is_scored and base.renderer.is_text:
            continue
        work = measure.read if is_scored else measure.write
        chunk = even_sample(prompts, min(FIRST_PROMPTS, most))
        work(chunk[:2])
        spent = work(chunk)
        few, small = len(chunk), spent
        many = min(most, _affordable(len(chunk), spent))
        if many > len(chunk):
            chunk = even_sample(prompts, many)
            spent = work(chunk)
        if is_scored:
            size = _text_bytes(chunk)
            scored[f"{BASE}/{skill}"] = ScoredSpeed(size, 0.0, 0.0, NO_TIME, spent * (1 / size))
        else:
            n = len(chunk)
            speed = AskedSpeed(n, 0.0, 0.0, 0.0, spent * (1 / n), NO_TIME)
            if n > few:
                speed = speed.with_opening(replace(speed, prompts=few, writing=small * (1 / few)))
            asked[f"{BASE}/{skill}"] = speed


class _EnoughStepsError(Exception):
    """The training was measured long enough."""


def _measure_training(
    context: RunContext,
    chunks: Mapping[str, Sequence[Prompt]],
    shares: Mapping[str, Mapping[str, float]],
    folder: Path,
) -> TrainedSpeed | None:
    """Train some steps on captured prompts, and time the steps and the making of examples."""
    from persea.pipeline.stage_keys import train_inputs
    from persea.pipeline.train_stage import train_rank

    taught = {}
    for skill, one in shares.items():
        names = sorted(one, key=lambda name: -one[name])
        found = next((n for n in names if f"{n}/{skill}" in chunks), None)
        if found:
            taught[skill] = found
    if not taught:
        return None
    sample = tuple(p for s, name in taught.items() for p in chunks[f"{name}/{s}"])
    cast = Cast({skill: ((name, 1.0),) for skill, name in taught.items()}, ())
    recipe = _without_verification(context.resolved_recipe)
    training = recipe.training.model_copy(
        update={"report_to": None, "on_policy": None, "validation_share": None}
    )
    recipe = recipe.model_copy(update={"training": training})
    run = CalibrationContext(recipe, folder, sample=sample, given_cast=cast)
    settings = recipe.capture
    for name in dict.fromkeys(taught.values()):
        capture_teacher(
            run.capture_units,
            run.models.load_teacher(name, settings.batch_size),
            folder / "capture",
            tau=settings.sampling_threshold,
            max_kl=settings.max_kl,
            max_new_tokens=settings.max_new_tokens,
            seed=recipe.seed,
            use_given_answers=run.are_answers_given,
        )
    stored = sum(read_record(folder / "capture", u.name)["answers"] for u in run.capture_units)
    times: list[tuple[str, Seconds]] = []

    def stamp(fraction: float, message: str) -> None:
        times.append((message, now()))
        steps = [at for words, at in times if words.startswith("loss ")]
        if len(steps) > MOST_STEPS or (
            len(steps) > MIN_STEPS and _between(steps[0], steps[-1]).cpu > STEP_BUDGET_S
        ):
            raise _EnoughStepsError

    with suppress(_EnoughStepsError):
        train_rank(run, folder / "train", train_inputs(run), stamp)
    steps = [at for words, at in times if words.startswith("loss ")]
    first = next((at for words, at in times if words.startswith("step ")), None)
    reading = [at for words, at in times if words.startswith("reading ")]
    if len(steps) < 2 or first is None or not reading:
        return None
    n, spent = len(steps) - 1, _between(steps[0], steps[-1])
    # the first examples also fill the masks and maps that the later ones find: they count once
    middle = min(len(reading) - 1, len(reading) // 2)
    example = _between(reading[middle], first) * (1 / max(1, stored - max(0, middle - 1)))
    filling = _between(reading[0], first) + example * -float(stored)
    size = sum(p.stat().st_size for p in (folder / "examples").rglob("*") if p.is_file())
    return TrainedSpeed(
        n,
        spent * (1 / n),
        example,
        size / max(1, stored),
        _between(times[0][1], reading[0]) + Seconds(max(0.0, filling.wall), max(0.0, filling.cpu)),
    )


def _between(begin: Seconds, end: Seconds) -> Seconds:
    return end + begin * -1.0


def _without_verification(recipe: Recipe) -> Recipe:
    capture = recipe.capture.model_copy(update={"drop_wrong_answers": False})
    return recipe.model_copy(update={"capture": capture})
