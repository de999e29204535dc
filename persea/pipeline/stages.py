"""The seven stages of a run, in order. Read this file first.

    check -> audition -> capture -> train -> evaluate -> lineage -> report

A stage writes into runs/<name>/<stage>/ and nowhere else. A finished stage is skipped while its
inputs and its output files are unchanged (`stage_store`, `stage_keys`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persea import storage
from persea.chat.messages import ThinkingEffort
from persea.models.loading import set_threads
from persea.pipeline import preflight, stage_keys
from persea.pipeline.licence_gate import (
    copy_to_student,
    refuse_unlicensed,
)
from persea.pipeline.lm_eval_stage import results_files, run_lm_eval_tasks
from persea.pipeline.model_refs import BASE, STUDENT
from persea.pipeline.progress import WARNING_PREFIX
from persea.pipeline.run_context import RunContext
from persea.pipeline.status import record_status
from persea.pipeline.status_copy import status_copies
from persea.pipeline.workers import has_workers
from persea.tasks.task import Split
from persea.training.distributed.heartbeat import join_process_group

if TYPE_CHECKING:
    from persea.teachers.teacher import Teacher
    from persea.vocab_extension.resize_model import ProgressCallback

# Stages that make or describe a student: a licence may forbid them. Measuring a teacher needs none.
LICENSED_STAGES = ("capture", "train", "lineage")


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    Attributes:
        name: Name of the stage, of its folder in the run folder, and of its verb.
        inputs: Returns everything that the output depends on, as JSON.
        run: Writes the output into the folder that it is given.
        resumable: Files and folders of the output that an interrupted run resumes from.
    """

    name: str
    inputs: Callable[[RunContext], object]
    run: Callable[[RunContext, Path, ProgressCallback], None]
    resumable: tuple[str, ...] = ()


def run_check(context: RunContext, folder: Path, progress: ProgressCallback) -> None:
    """Measure whether each teacher's tokenizer and template suit the student.

    Raises:
        RefusedError: A pair is outside the limits of the `check` section.
    """
    from persea.pipeline.check_stage import check_teachers

    check_teachers(context, folder, progress)


def run_audition(context: RunContext, folder: Path, progress: ProgressCallback) -> None:
    """Measure every teacher and the student's base, and cast the best teacher for each skill.

    Raises:
        RefusedError: A skill has no teacher, or none that is better than the student's base and
            the recipe refuses that.
    """
    from persea.pipeline.audition_stage import audition_teachers

    audition_teachers(context, folder, progress)


def run_capture(context: RunContext, folder: Path, progress: ProgressCallback) -> None:
    """Let the cast teachers answer the corpus; store answers and token distributions.

    Raises:
        RefusedError: A budget is spent, no answer is complete, or verification rejected all.
        DataError: A prompt has no answer although `capture.answers` is `given`.
    """
    from persea.pipeline.capture_stage import capture_corpus

    capture_corpus(context, folder, progress)


def run_train(context: RunContext, folder: Path, progress: ProgressCallback) -> None:
    """Train the student on the answers of all teachers, in one process or several."""
    from persea.pipeline.train_stage import train_in_processes

    train_in_processes(context, folder, stage_keys.train_inputs(context), progress)


def run_evaluate(context: RunContext, folder: Path, progress: ProgressCallback) -> None:
    """Measure student, base, teachers and reference models on the held-out test items."""
    from persea.evaluation.answering import single_model_loader
    from persea.evaluation.evaluate import (
        EvaluationAnswers,
        EvaluationResult,
        compare_student,
        evaluate_model,
        find_regressions,
    )
    from persea.pipeline.work import EvaluationWork, model_work
    from persea.report.claims import NOTHING_MEASURED

    tasks, settings = context.held_out_items(Split.TEST), context.recipe.evaluation
    teacher_names, renderers = context.models.teacher_names, context.models.renderers
    names = [STUDENT, BASE, *renderers]

    def load_reporting(name: str) -> Teacher:
        work.report_words(f"loading {name}")
        teacher = context.models.load_participant(name, settings.batch_size)
        return teacher.reporting(partial(work.report_answers, name))

    load = single_model_loader(load_reporting)
    if has_workers(context) and (tasks or context.held_out_texts):
        from persea.pipeline.evaluate_dispatch import EvaluationDispatch

        progress = EvaluationDispatch(context, progress).run(load)
    answers = EvaluationAnswers()
    work = EvaluationWork(
        [model_work(context, name) for name in names],
        bool(tasks) + bool(context.held_out_texts),
        partial(progress, "evaluate"),
    )
    if not tasks and not context.held_out_texts:
        progress("evaluate", 1.0, NOTHING_MEASURED)
    for k, name in enumerate(names if tasks else ()):
        evaluate_model(
            answers,
            context.models.evaluated_model(name, settings.batch_size, settings.efforts, load),
            tasks,
            settings.max_new_tokens,
            partial(work.report_model, k),
        )
    result = EvaluationResult(
        STUDENT,
        BASE,
        teacher_names,
        ThinkingEffort.NONE,
        tuple(answers.iter_scores()),
        answers.bits_per_byte,
        tuple(name for name in renderers if name not in teacher_names),
        compare_student(answers, STUDENT),
        find_regressions(answers, STUDENT, BASE),
        tuple(n for n in names if context.models.renderer(n).is_text),
    )
    records = list(answers.iter_answer_records())
    storage.write_json_lines(folder / "examples.jsonl", records)
    storage.write_json(folder / "evaluation.json", result.to_json())
    storage.write_json(folder / "sets.json", [b.to_json() for b in context.benchmarks])
    if context.held_out_texts:
        from persea.pipeline.evaluate_texts import evaluate_texts

        evaluate_texts(context, folder, load, work.report_texts)
    if settings.lm_eval:
        run_lm_eval_tasks(context, folder, progress)
    if context.taught_efforts and tasks:
        _write_thinking_modes(context, folder, load(STUDENT), records, progress)


def _write_thinking_modes(
    context: RunContext,
    folder: Path,
    student: Any,
    records: Sequence[dict[str, Any]],
    progress: ProgressCallback,
) -> None:
    """Measure a hybrid student in each thinking mode of the corpus; writes modes.json."""
    from persea.evaluation.thinking_modes import measure_thinking_modes, select_direct_answers

    modes = measure_thinking_modes(
        student,
        context.held_out_items(Split.TEST),
        context.taught_efforts,
        context.recipe.evaluation.max_new_tokens,
        select_direct_answers(records, STUDENT, context.taught_efforts),
        lambda message: progress("evaluate", 0.99, message),
    )
    storage.write_json(folder / "modes.json", modes.to_json())


def run_lineage(context: RunContext, folder: Path, progress: ProgressCallback) -> None:
    """Record which models, data and recipe made the student's weights."""
    from persea.pipeline.lineage_stage import write_lineage

    write_lineage(context, folder)


def run_report(context: RunContext, folder: Path, progress: ProgressCallback) -> None:
    """Write the report page, the model card and report.json."""
    from persea.report.page import write_report

    given = {name: Path(f) for name, f in context.recipe.evaluation.lm_eval_results.items()}
    write_report(context.folder, results_files(context.folder) | given, folder)


STAGES: tuple[Stage, ...] = (
    Stage("check", stage_keys.check_inputs, run_check),
    Stage("audition", stage_keys.audition_inputs, run_audition),
    Stage("capture", stage_keys.capture_inputs, run_capture, ("units", "commits", "canaries")),
    Stage(
        "train",
        stage_keys.train_inputs,
        run_train,
        ("checkpoints", "metrics.jsonl", "tensorboard"),
    ),
    Stage("evaluate", stage_keys.evaluate_inputs, run_evaluate),
    Stage("lineage", stage_keys.lineage_inputs, run_lineage),
    Stage("report", stage_keys.report_inputs, run_report),
)


SLOW_START_S = 8.0  # a large tokenizer takes longer to open; nothing is said of shorter starts


@contextmanager
def _say_if_slow(progress: ProgressCallback, stage: str) -> Iterator[None]:
    """Report what takes so long before the first stage begins, after SLOW_START_S."""
    words = "opening tokenizers and chat templates"
    timer = threading.Timer(SLOW_START_S, progress, (stage, 0.0, words))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def run_pipeline(
    context: RunContext,
    progress: ProgressCallback,
    only_stage: str = "",
    *,
    check_before_train: bool = True,
) -> None:
    """Run every stage in order, or one stage; skip each that is up to date.

    Args:
        context: The recipe and its run folder.
        progress: Called with the stage, the fraction done and a message.
        only_stage: Name of the only stage to run; "" = all.
        check_before_train: Whether the stage `train` alone is preceded by `check`.

    Raises:
        RefusedError: A licence forbids the student, a finished student of another recipe would be
            overwritten, or a stage refuses its result.
        DataError: `only_stage` needs the output of a stage that has not run.
        SafetyRegressionError: The student is less safe than its base, and the recipe does not
            allow it. Raised when all output is written.
    """
    set_threads(context.recipe.threads)
    _start_fork_server(context, only_stage)
    with join_process_group(context.world):
        warnings = list[str]()
        if not context.world.rank:  # one process refuses for all
            with _say_if_slow(progress, only_stage or STAGES[0].name):
                warnings = preflight.check_run(context, only_stage)
            if only_stage in ("", *LICENSED_STAGES):
                refuse_unlicensed(context.recipe, context.folder)
        if only_stage in ("", "train"):
            preflight.refuse_impossible_training(context)
        if context.world.rank:  # the first process alone writes to the run folder
            from persea.pipeline.train_stage import follow_first_rank

            follow_first_rank(context, context.folder / "train", stage_keys.train_inputs)
            return
        copies = status_copies(
            context, lambda why: progress(only_stage or "capture", 0.0, f"{WARNING_PREFIX}{why}")
        )
        on_written = copies.write if copies else lambda is_end: None
        with (
            storage.lock_run_folder(context.folder),
            record_status(
                context.folder, context.recipe.name, progress, on_written
            ) as recorded_progress,
        ):
            context.stages.recover()
            for warning in warnings:
                progress(only_stage or STAGES[0].name, 0.0, f"{WARNING_PREFIX}{warning}")
            if not only_stage and not context.stages.has_record("evaluate"):
                context.models.open_servers(context.recipe.audition.batch_size)
            names = _stage_names(context, only_stage, check_before_train)
            for stage in STAGES:
                if stage.name in names:
                    if stage.name in LICENSED_STAGES:  # a server has named its model by now
                        refuse_unlicensed(context.recipe, context.folder)
                    if stage.name == "capture" and not only_stage:  # the cast is known by now
                        preflight.refuse_other_student(context)
                    _run_stage(context, stage, recorded_progress)
            copy_to_student(context.folder)
        context.world.broadcast("over")
    may_regress = context.recipe.evaluation.allow_safety_regression
    if only_stage in ("", "evaluate", "report") and not may_regress:
        from persea.evaluation.evaluate import refuse_saved_regressions

        refuse_saved_regressions(context.folder / "evaluate" / "evaluation.json")


def _start_fork_server(context: RunContext, only_stage: str) -> None:
    """Let worker processes import their modules while this process does what comes before them."""
    is_needed = any(
        only_stage in ("", stage) and not context.stages.has_record(stage)
        for stage in ("capture", "evaluate")
    )
    is_local = context.recipe.executor.kind == "local"
    if is_needed and is_local and has_workers(context) and not context.world.rank:
        from persea.executors.local import start_fork_server

        start_fork_server()


def _stage_names(context: RunContext, only_stage: str, check_before_train: bool) -> tuple[str, ...]:
    """Return the stages to run: no student is trained on a pair that no check has passed.

    Without a capture there is nothing to train on, which `train` itself says.
    """
    if not only_stage:
        return tuple(stage.name for stage in STAGES)
    if only_stage == "train" and check_before_train and (context.folder / "capture").is_dir():
        return "check", "train"
    return (only_stage,)


def _run_stage(context: RunContext, stage: Stage, progress: ProgressCallback) -> None:
    context.stages.run(
        stage.name,
        stage.inputs(context),
        partial(stage.run, context),
        progress,
        recipe_yaml=context.recipe.to_yaml(),
        resumable=stage.resumable,
        force=stage.name == "train" and context.launch_options.resume == "never",
    )
