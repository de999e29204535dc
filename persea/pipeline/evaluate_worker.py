"""What a worker of an evaluation does: answer the items of a task by one model, and read texts.

Answers are values under the digest of all that they depend on (`persea.evaluation.answering`). So a
worker returns nothing but their files, and the process of the run then finds every answer on disk:
it grades and writes the same bytes as without workers.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from persea import storage
from persea.cache.token_meter import TokenMeter
from persea.errors import RefusedError
from persea.evaluation.answering import (
    EvaluatedModel,
    keep_answers,
    recorded_answer_files,
    reference_bits,
    single_model_loader,
)
from persea.evaluation.text_bits import measure_document_bits
from persea.executors.executor import Attempt, Receipt, WorkUnit
from persea.executors.local import worker_name
from persea.models.loading import set_threads
from persea.pipeline.capture_worker import RECEIPT_FILE, attempt_folder
from persea.pipeline.evaluate_texts import prepare_texts
from persea.pipeline.model_refs import BASE, STUDENT, silence_transformers
from persea.pipeline.run_context import RunContext
from persea.tasks.task import Split

if TYPE_CHECKING:
    from persea.teachers.teacher import Teacher

TEXTS = ""  # task of a unit that reads the held-out texts
ANSWERS_FOLDER = "answers"  # in the folder of an attempt


@dataclass(frozen=True)
class EvaluationUnit:
    """One model on one task.

    Attributes:
        model: Name of the model.
        task: Name of the task; TEXTS = the held-out texts.
    """

    model: str
    task: str


def evaluation_units(context: RunContext, load: Callable[[str], Teacher]) -> dict[str, WorkUnit]:
    """Return name -> unit: each model that runs here or in vLLM, on each task and on the texts.

    A unit is named by the digest of the model, its settings and the items. Models behind a server
    gain nothing from workers.
    """
    settings, units = context.recipe.evaluation, {}
    tasks = [(task.name, [i.prompt.id for i in items]) for task, items in _tasks(context).values()]
    if context.held_out_texts:
        tasks.append((TEXTS, [t.text for t in context.held_out_texts]))
    remote = {t.name for t in context.recipe.teachers if t.endpoint is not None}
    for name in (STUDENT, BASE, *context.models.renderers):
        if name in remote:
            continue
        model = context.models.evaluated_model(name, settings.batch_size, settings.efforts, load)
        for task, ids in tasks:
            key = [model.identity, model.efforts, dict(model.settings), settings.max_new_tokens]
            digest = storage.digest_json(["evaluate", name, key, task, ids])[:32]
            units[digest] = WorkUnit(digest, name, EvaluationUnit(name, task))
    return units


def _tasks(context: RunContext) -> dict[str, Any]:
    return {task.name: (task, items) for task, items in context.held_out_items(Split.TEST)}


@dataclass
class EvaluationRunner:
    """Answers with the model that it loaded last.

    Attributes:
        context: The run.
        folder_of: Returns the folder that an attempt writes to.
        worker: Name of this worker; "" = this process.
    """

    context: RunContext
    folder_of: Callable[[Attempt], Path]
    worker: str = ""
    _meters: list[TokenMeter] = field(default_factory=list)

    def run(self, attempt: Attempt, on_part: Callable[[float], None]) -> Receipt:
        """Answer the items of a unit, and leave the files of the answers in the attempt's folder.

        Raises:
            RefusedError: The model or the items here are not those of the run.
            PerseaError: See `keep_answers` and `measure_document_bits`.
        """
        if attempt.unit.name not in self._units:
            raise RefusedError(
                f"the files of {attempt.unit.group}, or the questions, are others than where the "
                "run was started",
                where=f"{attempt.unit.group}, worker {self.worker or worker_name()}",
                remedy="give every machine the same model folders, data, persea and transformers",
            )
        unit: EvaluationUnit = attempt.unit.payload
        start = time.monotonic()
        on_part(0.0)
        with recorded_answer_files() as files:
            self._answer(unit, on_part)
        folder = self.folder_of(attempt)
        for name, path in files.items():
            storage.write_atomic(folder / ANSWERS_FOLDER / name, path.read_bytes())
        tokens = sum(sum(meter.lengths) for meter in self._meters)
        for meter in self._meters:
            meter.lengths.clear()
        receipt = Receipt(
            attempt.id,
            self.worker or worker_name(),
            time.monotonic() - start,
            tokens,
            tokens,
            digest_answers(folder),
        )
        storage.write_json_with_checksum(folder / RECEIPT_FILE, asdict(receipt))
        return receipt

    def _answer(self, unit: EvaluationUnit, on_part: Callable[[float], None]) -> None:
        settings = self.context.recipe.evaluation
        if unit.task == TEXTS:
            texts = prepare_texts(self.context, self._load)
            if unit.model in texts.measured:
                model = texts.measured[unit.model]
                measure_document_bits(model, texts.windows, lambda share, text: on_part(share))
            return
        model = self._model(unit.model)
        _, items = self._items[unit.task]
        efforts = model.efforts if model.can_be_asked else ()
        for k, effort in enumerate(efforts):
            keep_answers(model, effort, unit.task, items, settings.max_new_tokens)
            on_part((k + 1) / (len(efforts) + 1))
        reference_bits(model, items)

    def _model(self, name: str) -> EvaluatedModel:
        settings = self.context.recipe.evaluation
        return self.context.models.evaluated_model(
            name, settings.batch_size, settings.efforts, self._load
        )

    @cached_property
    def _units(self) -> Mapping[str, WorkUnit]:
        return evaluation_units(self.context, self._load)

    @cached_property
    def _items(self) -> Mapping[str, Any]:
        return _tasks(self.context)

    @cached_property
    def _load(self) -> Callable[[str], Teacher]:
        return single_model_loader(self._load_metered)

    def _load_metered(self, name: str) -> Teacher:
        batch = self.context.recipe.evaluation.batch_size
        teacher = self.context.models.load_participant(name, batch)
        self._meters[:] = [TokenMeter(teacher.engine)]
        return replace(teacher, engine=cast(Any, self._meters[0]))


def digest_answers(folder: Path) -> str:
    """Return the digest of all answer files of an attempt."""
    sha = hashlib.sha256()
    for path in sorted((folder / ANSWERS_FOLDER).glob("*.json")):
        sha.update(path.name.encode() + path.read_bytes())
    return sha.hexdigest()


@dataclass(frozen=True)
class EvaluationRunnerFactory:
    """Makes the runner of a worker process; it is pickled.

    Attributes:
        context: The run, with nothing opened.
        staging: Folder of all attempts.
        num_threads: Threads of one operation, as in the process that started the run.
    """

    context: RunContext
    staging: Path
    num_threads: int

    def __call__(self) -> EvaluationRunner:
        """Make the runner."""
        silence_transformers()
        set_threads(self.num_threads)
        staging = self.staging
        return EvaluationRunner(replace(self.context), lambda one: attempt_folder(staging, one))
