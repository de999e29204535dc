"""Dispatch the models and tasks of an evaluation to workers, and collect the files of answers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from persea.errors import TeacherError
from persea.evaluation.answering import adopt_answer_file
from persea.executors.dispatch import Dispatcher, DispatchPolicy, raise_quarantine
from persea.executors.executor import Attempt, Receipt, WorkUnit
from persea.executors.ledger import Ledger
from persea.pipeline.capture_worker import attempt_folder
from persea.pipeline.evaluate_worker import (
    ANSWERS_FOLDER,
    EvaluationRunnerFactory,
    digest_answers,
    evaluation_units,
)
from persea.pipeline.workers import STAGING_FOLDER, open_workers, worker_threads

if TYPE_CHECKING:
    from persea.pipeline.run_context import RunContext
    from persea.teachers.teacher import Teacher
    from persea.vocab_extension.resize_model import ProgressCallback

DISPATCHED_SHARE = 0.95  # of the stage's progress; then the answers are read and graded


@dataclass
class EvaluationDispatch:
    """The units of one evaluation.

    Attributes:
        context: The run.
        progress: Called with the stage, the share done and a message.
    """

    context: RunContext
    progress: ProgressCallback
    _published: set[str] = field(default_factory=set, init=False)

    @property
    def staging(self) -> Path:
        """Folder of the attempts."""
        return self.context.folder / STAGING_FOLDER

    def run(self, load: Callable[[str], Teacher]) -> ProgressCallback:
        """Let workers answer everything.

        Args:
            load: Loads the model of a name; called for none that a worker runs.

        Returns:
            The progress callback of what follows.

        Raises:
            TeacherError: A unit failed every time.
            PerseaError: What a further attempt would meet too.
        """
        context, settings = self.context, self.context.recipe.executor
        for path in self.staging.glob(f"*/{ANSWERS_FOLDER}/*.json"):  # of a run that died
            adopt_answer_file(path)
        shutil.rmtree(self.staging, ignore_errors=True)
        units = list(evaluation_units(context, load).values())
        if not units:
            return self.progress
        ledger = Ledger(context.folder, "evaluate")
        ledger.begin({u.name: u.group for u in units}, (), lambda unit: 0)
        done: list[str] = []

        def on_committed(unit: WorkUnit) -> None:
            done.append(unit.name)
            share = DISPATCHED_SHARE * len(done) / len(units)
            task = unit.payload.task or "texts"
            self.progress("evaluate", share, f"{unit.group} {task}, by a worker")

        factory = EvaluationRunnerFactory(
            replace(context, folder=context.folder.absolute()),
            self.staging.absolute(),
            worker_threads(context),
        )
        dispatcher = Dispatcher(
            open_workers(context, factory, self.staging, len(units)),
            ledger,
            self._publish,
            DispatchPolicy(settings.max_attempts, min_timeout_s=settings.min_timeout_s),
            on_committed,
        )
        try:
            result = dispatcher.run(units)
        finally:
            shutil.rmtree(self.staging, ignore_errors=True)
        raise_quarantine(result, len(units), TeacherError, "evaluate")
        return partial(_later_progress, self.progress)

    def _publish(self, unit: WorkUnit, attempt: Attempt, receipt: Receipt) -> bool:
        """Keep the answers of an attempt, and delete its files.

        An answer that is kept already stays. Files that do not arrive whole are answered again by
        this process, so that a folder that a worker sees differently costs time alone.
        """
        folder = attempt_folder(self.staging, attempt)
        if digest_answers(folder) == receipt.digest:
            for path in sorted((folder / ANSWERS_FOLDER).glob("*.json")):
                adopt_answer_file(path)
        shutil.rmtree(folder, ignore_errors=True)
        is_first = unit.name not in self._published
        self._published.add(unit.name)
        return is_first


def _later_progress(progress: ProgressCallback, stage: str, share: float, message: str) -> None:
    progress(stage, DISPATCHED_SHARE + (1 - DISPATCHED_SHARE) * share, message)
