"""What a worker of an on-policy training does: sample the student's answers with given weights.

The process of the training writes the weights of a step to a file, named in every unit by its
digest. A worker loads them before it samples, and records the digest of the file that it read and
the step that is written in it, so that whoever reads the answers knows whose they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from persea import storage
from persea.errors import DataError, RefusedError, TeacherError
from persea.executors.executor import Attempt, Receipt
from persea.executors.local import worker_name
from persea.models.loading import set_threads
from persea.pipeline.capture_worker import RECEIPT_FILE, attempt_folder
from persea.pipeline.model_refs import STUDENT, silence_transformers
from persea.pipeline.run_context import RunContext
from persea.training.on_policy.sampling import SampledAnswers, SamplingUnit, sample_unit

if TYPE_CHECKING:
    from persea.training.student import StudentModel

ANSWERS_FILE = "answers.json"  # in the folder of an attempt
STEP_KEY = "step"  # in the metadata of a file of weights


@dataclass(frozen=True)
class RolloutUnit:
    """A unit of a batch of rollouts, and the weights to sample it with.

    Attributes:
        unit: Prompts, settings and seed.
        student: Identity of the student's files, whose trained weights are replaced.
        weights: sha256 of the file of weights.
        path: The file.
    """

    unit: SamplingUnit
    student: str
    weights: str
    path: Path


@dataclass
class RolloutRunner:
    """Samples with the weights that it loaded last.

    Attributes:
        context: The run.
        folder_of: Returns the folder that an attempt writes to.
        worker: Name of this worker; "" = this process.
    """

    context: RunContext
    folder_of: Callable[[Attempt], Path]
    worker: str = ""
    _weights: tuple[str, int] = ("", -1)  # digest and step of what the student holds

    def run(self, attempt: Attempt, on_part: Callable[[float], None]) -> Receipt:
        """Sample the answers of a unit, and leave them in the attempt's folder.

        Raises:
            RefusedError: The student's files here are not those of the run.
            TeacherError: The file of weights is not there, or another one than the unit names.
        """
        work: RolloutUnit = attempt.unit.payload
        if self.context.models.student_identity != work.student:
            raise RefusedError(
                "the files of the student are others than where the run was started",
                where=f"student.model, worker {self.worker or worker_name()}",
                remedy="give every machine the same model folders, persea and transformers",
            )
        start = time.monotonic()
        on_part(0.0)
        if self._weights[0] != work.weights:
            self._weights = ("", -1)  # half of them, if an error comes
            self._weights = load_weights(self._student, work)
        on_part(0.1)
        ids = sample_unit(self._student, work.unit)
        folder, (digest, step) = self.folder_of(attempt), self._weights
        write_answers(folder / ANSWERS_FILE, SampledAnswers(step, ids, digest))
        sampled = sum(map(len, ids))
        receipt = Receipt(
            attempt.id,
            self.worker or worker_name(),
            time.monotonic() - start,
            sum(map(len, work.unit.prompts)) + sampled,
            sampled,
            storage.digest_file(folder / ANSWERS_FILE),
        )
        storage.write_json_with_checksum(folder / RECEIPT_FILE, asdict(receipt))
        return receipt

    @cached_property
    def _student(self) -> StudentModel:
        return self.context.models.load_student()


def save_weights(student: StudentModel, path: Path, step: int) -> str:
    """Write a student's trained weights, and return the sha256 of the file.

    Raises:
        StorageError: The file cannot be written.
    """
    from safetensors.torch import save

    weights = {
        name: one.detach().cpu().contiguous()
        for name, one in student.model.named_parameters()
        if one.requires_grad
    }
    return storage.write_atomic(path, save(weights, {STEP_KEY: str(step)}))


def load_weights(student: StudentModel, work: RolloutUnit) -> tuple[str, int]:
    """Load the weights of a unit into a student; return their digest and training step.

    Raises:
        TeacherError: The file is not there, or another one.
    """
    import torch
    from safetensors import safe_open

    try:
        digest = storage.digest_file(work.path)
    except OSError as error:
        raise stale_weights_error(f"their file cannot be read: {error.strerror}", work) from error
    if digest != work.weights:
        raise stale_weights_error(f"the file here is {digest[:12]}", work)
    with safe_open(work.path, "pt") as file, torch.no_grad():  # type: ignore[no-untyped-call]
        own = {n: p for n, p in student.model.named_parameters() if p.requires_grad}
        if sorted(file.keys()) != sorted(own):
            raise stale_weights_error("the file has other names of weights", work)
        for name, parameter in own.items():
            parameter.copy_(file.get_tensor(name))
        return digest, int(file.metadata()[STEP_KEY])


def stale_weights_error(what: str, work: RolloutUnit) -> TeacherError:
    """Return the error of answers that other weights sampled; another attempt may not meet it."""
    return TeacherError(
        f"answers of the weights of step {work.unit.step} ({work.weights[:12]}) were asked: {what}",
        where=f"{STUDENT}, rollouts",
        remedy="the file system of the run folder must show every machine the same files",
    )


def write_answers(path: Path, answers: SampledAnswers) -> None:
    """Write sampled answers with their weights' step and digest, and a checksum.

    Raises:
        StorageError: The file cannot be written.
    """
    record = {
        "step": answers.step,
        "weights": answers.weights,
        "ids": [ids_T.tolist() for ids_T in answers.ids],
    }
    storage.write_json_with_checksum(path, record)


def read_answers(path: Path) -> SampledAnswers | None:
    """Return the answers of a file; None if it is absent or damaged."""
    try:
        record: dict[str, Any] = storage.read_json_with_checksum(path, "")
        ids = tuple(np.array(one, np.int32) for one in record["ids"])
        return SampledAnswers(int(record["step"]), ids, str(record["weights"]))
    except (DataError, OSError, KeyError, TypeError, ValueError):
        return None


@dataclass(frozen=True)
class RolloutRunnerFactory:
    """Makes the runner of a worker process; it is pickled.

    Attributes:
        context: The run, with nothing opened.
        staging: Folder of all attempts.
        num_threads: Threads of one operation, as in the process of the training.
    """

    context: RunContext
    staging: Path
    num_threads: int

    def __call__(self) -> RolloutRunner:
        """Make the runner."""
        silence_transformers()
        set_threads(self.num_threads)
        return RolloutRunner(replace(self.context), partial(attempt_folder, self.staging))
