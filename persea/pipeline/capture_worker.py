"""What a worker of a capture does: hold one teacher, capture units into a folder of their own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from persea import storage
from persea.cache.capture import CaptureUnit, capture_unit
from persea.cache.sparsifier import DistributionSparsifier
from persea.cache.unit import read_record
from persea.errors import RefusedError
from persea.executors.executor import Attempt, Receipt
from persea.executors.local import worker_name
from persea.models.loading import set_threads
from persea.pipeline.model_refs import silence_transformers
from persea.pipeline.run_context import RunContext

if TYPE_CHECKING:
    from persea.teachers.teacher import Teacher

RECEIPT_FILE = "receipt.json"  # beside the unit of an attempt


@dataclass
class CaptureRunner:
    """Captures units with the teacher that it loaded last.

    Attributes:
        context: The run.
        folder_of: Returns the cache folder that an attempt writes to.
        on_load: Called with the name of a teacher before it is loaded.
        worker: Name of this worker; "" = this process.
        keeps_receipts: Whether the receipt is also written beside the unit, for a run that is
            resumed after it died between the two.
    """

    context: RunContext
    folder_of: Callable[[Attempt], Path]
    on_load: Callable[[str], None] = lambda name: None
    worker: str = ""
    keeps_receipts: bool = False
    _teacher: Teacher | None = None

    def run(self, attempt: Attempt, on_part: Callable[[float], None]) -> Receipt:
        """Capture a unit.

        Raises:
            RefusedError: The teacher's files here are not those of the run.
            PerseaError: See `capture_unit` and `ModelRefs.load_teacher`.
        """
        unit: CaptureUnit = attempt.unit.payload
        teacher = self._load(unit)
        recipe, folder = self.context.recipe, self.folder_of(attempt)
        start = time.monotonic()
        on_part(0.0)
        paid = capture_unit(
            unit,
            teacher,
            folder,
            max_new_tokens=recipe.capture.max_new_tokens,
            sparsifier=DistributionSparsifier(
                recipe.seed, recipe.capture.sampling_threshold, recipe.capture.max_kl
            ),
            use_given_answers=self.context.are_answers_given,
            canaries=self.context.canaries,
            refuse_if_changed=partial(self.context.models.refuse_changed_teacher, unit.teacher),
            on_part=on_part,
        )
        record = read_record(folder, unit.name)
        receipt = Receipt(
            attempt.id,
            self.worker or worker_name(),
            time.monotonic() - start,
            paid,
            int(record["tokens"]),
            str(record["sha256"]),
        )
        if self.keeps_receipts:
            storage.write_json_with_checksum(folder / RECEIPT_FILE, asdict(receipt))
        return receipt

    def _load(self, unit: CaptureUnit) -> Teacher:
        """Return the unit's teacher; the one before is dropped first."""
        if self._teacher is not None and self._teacher.name == unit.teacher:
            return self._teacher
        self._teacher = None
        models = self.context.models
        if models.teacher_identities[unit.teacher] != unit.identity:
            raise RefusedError(
                f"the files of {unit.teacher} are others than where the run was started",
                where=f"{models.teacher_ref(unit.teacher).model}, worker {self.worker}",
                remedy="give every machine the same model folders, persea and transformers",
            )
        self.on_load(unit.teacher)
        self._teacher = models.load_teacher(unit.teacher, self.context.recipe.capture.batch_size)
        return self._teacher


def attempt_folder(staging: Path, attempt: Attempt) -> Path:
    """Return the cache folder that an attempt of a worker process writes to."""
    return staging / attempt.id


@dataclass(frozen=True)
class CaptureRunnerFactory:
    """Makes the runner of a worker process; it is pickled.

    Attributes:
        context: The run, with nothing opened.
        staging: Folder of all attempts.
        num_threads: Threads of one operation, as in the process that started the run: Ray gives
            its workers another number, which changes last digits.
    """

    context: RunContext
    staging: Path
    num_threads: int

    def __call__(self) -> CaptureRunner:
        """Make the runner."""
        silence_transformers()
        set_threads(self.num_threads)
        return CaptureRunner(
            replace(self.context), partial(attempt_folder, self.staging), keeps_receipts=True
        )
