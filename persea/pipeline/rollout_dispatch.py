"""Dispatch the student's own answers to workers, and refuse those of other weights than asked.

Each unit of a batch is named by a digest of its prompts, settings, seed and weights. Its answers
come with the digest and the step of the weights that sampled them. Answers of others than the
unit's are dropped and asked again; committed ones stay in `RUN/.rollouts/` until no checkpoint can
lead back to them, so that a training that died does not pay for them twice.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from persea import storage
from persea.errors import TeacherError
from persea.executors.dispatch import Dispatcher, DispatchPolicy, raise_quarantine
from persea.executors.executor import Attempt, Receipt, WorkUnit
from persea.executors.ledger import Ledger
from persea.pipeline.capture_worker import attempt_folder
from persea.pipeline.model_refs import STUDENT
from persea.pipeline.rollout_worker import (
    ANSWERS_FILE,
    RolloutRunnerFactory,
    RolloutUnit,
    read_answers,
    save_weights,
    stale_weights_error,
)
from persea.pipeline.workers import STAGING_FOLDER, has_workers, open_workers, worker_threads
from persea.training.on_policy.sampling import SampledAnswers, SamplingUnit

if TYPE_CHECKING:
    from persea.pipeline.run_context import RunContext
    from persea.training.student import StudentModel

ROLLOUTS_FOLDER = ".rollouts"  # in the run folder
NAME_LENGTH = 32  # hexadecimal digits: 8 of the training, the others of the unit
TRAINING_LENGTH = 8


def has_rollout_workers(context: RunContext) -> bool:
    """Return whether workers sample the student's answers.

    A training in several processes samples its own; a batch that is one unit gains nothing.
    """
    on = context.training.on_policy
    alone = context.world.size == 1 and context.launch_options.num_processes == 1
    return on is not None and alone and has_workers(context) and _units_of_a_batch(context) > 1


@dataclass
class RolloutDispatch:
    """Samples the units of each batch by workers, which stay from batch to batch.

    Attributes:
        context: The run.
        inputs: Inputs of the training, as JSON.
        on_committed: Called with the training step and a message after each unit.
    """

    context: RunContext
    inputs: Mapping[str, Any]
    on_committed: Callable[[int, str], None]

    @property
    def staging(self) -> Path:
        """Folder of attempts and of weights, which every worker must see."""
        return (self.context.folder / STAGING_FOLDER).absolute()

    @property
    def answers_folder(self) -> Path:
        """Folder of committed answers."""
        return self.context.folder / ROLLOUTS_FOLDER

    def __enter__(self) -> Self:
        """Delete what a training that died left of its attempts."""
        shutil.rmtree(self.staging, ignore_errors=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the workers; delete attempts, and after a whole training the answers."""
        if "_dispatcher" in vars(self):
            self._dispatcher.executor.close()
        shutil.rmtree(self.staging, ignore_errors=True)
        if kind is None:
            shutil.rmtree(self.answers_folder, ignore_errors=True)

    def sample(
        self, student: StudentModel, units: Sequence[SamplingUnit]
    ) -> Sequence[SampledAnswers]:
        """Return the answers of each unit, all of the weights that the student holds now.

        Raises:
            TeacherError: Workers failed at a unit every time, or brought answers of other weights.
            PerseaError: What a further attempt would meet too.
        """
        if not units:
            return []
        step = units[0].step
        path = self.staging / f"weights-{step}.safetensors"
        works = self._name_units(units, path, save_weights(student, path, step))
        self._forget_old(step)
        try:
            self._dispatch(works)
        finally:
            path.unlink(missing_ok=True)
        return [self._read_committed(name, work) for name, work in works.items()]

    def _name_units(
        self, units: Sequence[SamplingUnit], path: Path, weights: str
    ) -> dict[str, RolloutUnit]:
        student = self.context.models.student_identity
        works = {}
        for unit in units:
            ids = [ids_T.tolist() for ids_T in unit.prompts]
            settings = [unit.stop_ids, unit.max_new_tokens, unit.temperature, unit.seed]
            name = storage.digest_json(["rollouts", student, weights, unit.step, settings, ids])
            whole = (self._training_key + name)[:NAME_LENGTH]
            works[whole] = RolloutUnit(unit, student, weights, path)
        return works

    def _dispatch(self, works: Mapping[str, RolloutUnit]) -> None:
        """Let workers sample the units that are not committed."""
        ledger, known = self._dispatcher.ledger, self._kept_units()
        there: dict[str, SampledAnswers] = {}
        for name, work in works.items():
            with suppress(TeacherError):
                there[name] = self._read_committed(name, work)
        planned = dict.fromkeys((*known, *works), STUDENT)
        committed = [name for name in planned if name in known or name in there]
        ledger.begin(planned, committed, lambda name: sum(map(len, there[name].ids)))
        missing = [WorkUnit(n, STUDENT, work) for n, work in works.items() if n not in there]
        result = self._dispatcher.run(missing)
        raise_quarantine(result, len(works), TeacherError, "train")

    @cached_property
    def _training_key(self) -> str:
        return storage.digest_json(self.inputs)[:TRAINING_LENGTH]

    def _kept_units(self) -> dict[str, None]:
        """Return the units of this training that the ledger counts as committed."""
        kept = self._dispatcher.ledger.kept_units
        return dict.fromkeys(n for n in kept if n.startswith(self._training_key))

    @cached_property
    def _dispatcher(self) -> Dispatcher:
        context, settings = self.context, self.context.recipe.executor
        factory = RolloutRunnerFactory(
            replace(context, folder=context.folder.absolute()),
            self.staging,
            worker_threads(context),
        )
        return Dispatcher(
            open_workers(context, factory, self.staging, _units_of_a_batch(context)),
            Ledger(context.folder, "train"),
            self._publish,
            DispatchPolicy(settings.max_attempts, min_timeout_s=settings.min_timeout_s),
            lambda unit: self.on_committed(unit.payload.unit.step, "a worker sampled answers"),
            keeps_executor=True,
        )

    def _publish(self, unit: WorkUnit, attempt: Attempt, receipt: Receipt) -> bool:
        """Keep the answers of an attempt, if the weights of the unit sampled them.

        Returns:
            Whether the ledger counts the unit for the first time.

        Raises:
            TeacherError: Others did, or the answers did not arrive whole.
        """
        work: RolloutUnit = unit.payload
        folder = attempt_folder(self.staging, attempt)
        source = folder / ANSWERS_FILE
        try:
            require_fresh(read_answers(source), work)
            if storage.digest_file(source) != receipt.digest:
                raise stale_weights_error("other answers arrived than the receipt names", work)
            storage.write_atomic(self._path(unit.name, work), source.read_bytes())
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return unit.name not in self._kept_units()

    def _path(self, name: str, work: RolloutUnit) -> Path:
        return self.answers_folder / f"{work.unit.step:08}-{name}.json"

    def _read_committed(self, name: str, work: RolloutUnit) -> SampledAnswers:
        """Return committed answers.

        Raises:
            TeacherError: They are absent, damaged, or of other weights.
        """
        return require_fresh(read_answers(self._path(name, work)), work)

    def _forget_old(self, step: int) -> None:
        """Delete answers from before the checkpoint that a resumed training begins at."""
        oldest = step - 2 * (self.context.training.checkpoint_every or step)
        for path in self.answers_folder.glob("*.json"):
            if int(path.name.partition("-")[0]) < oldest:
                path.unlink(missing_ok=True)


def _units_of_a_batch(context: RunContext) -> int:
    on = context.training.on_policy
    assert on is not None  # `has_rollout_workers`
    return math.ceil(on.rollouts / (on.rollouts_per_unit or on.rollouts))


def require_fresh(answers: SampledAnswers | None, work: RolloutUnit) -> SampledAnswers:
    """Return answers if they are whole and of the weights that a unit names.

    Raises:
        TeacherError: They are not.
    """
    if answers is None:
        raise stale_weights_error("no whole answers are there", work)
    if (answers.weights, answers.step) != (work.weights, work.unit.step):
        raise stale_weights_error(
            f"those of step {answers.step} ({answers.weights[:12]}) came", work
        )
    if len(answers.ids) != len(work.unit.prompts):
        raise stale_weights_error(f"{len(answers.ids)} answers came", work)
    return answers
