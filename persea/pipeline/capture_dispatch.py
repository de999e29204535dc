"""Dispatch the units of a capture: choose the executor, publish attempts, adopt a dead run's.

Worker processes write each attempt into a folder of its own below `RUN/.attempts/`. Only the
process that holds the run folder makes an attempt's files the unit, by hard links, so that two
attempts at one unit never mix.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persea import storage
from persea.cache.capture import CaptureUnit
from persea.cache.shared_store import place_unit
from persea.cache.unit import is_committed, read_record
from persea.errors import DataError, RecipeError, TeacherError
from persea.executors.dispatch import Dispatcher, DispatchPolicy, raise_quarantine
from persea.executors.executor import Attempt, Executor, Receipt, WorkUnit
from persea.executors.ledger import Ledger, LedgerEvent
from persea.executors.local import InProcessExecutor
from persea.pipeline.capture_worker import (
    RECEIPT_FILE,
    CaptureRunner,
    CaptureRunnerFactory,
    attempt_folder,
)
from persea.pipeline.workers import STAGING_FOLDER, has_workers, open_workers, worker_threads

if TYPE_CHECKING:
    from persea.pipeline.run_context import RunContext


@dataclass
class CaptureDispatch:
    """The units of one capture and where they run.

    Attributes:
        context: The run.
        folder: The cache folder.
        ledger: Records every attempt.
        on_load: Called with the name of a teacher before this process loads it.
        on_part: Called with (unit's name, share done).
        on_committed: Called with a unit's name after its commit.
    """

    context: RunContext
    folder: Path
    ledger: Ledger
    on_load: Callable[[str], None]
    on_part: Callable[[str, float], None]
    on_committed: Callable[[str], None]

    @property
    def staging(self) -> Path:
        """Folder of the attempts of worker processes."""
        return self.context.folder / STAGING_FOLDER

    @property
    def is_in_process(self) -> bool:
        """Whether this process captures alone."""
        return not has_workers(self.context)

    def adopt_attempts(self, unit_groups: Mapping[str, str]) -> int:
        """Publish the complete attempts that a dead run left, and delete the others.

        Args:
            unit_groups: Unit -> teacher, of the whole plan.

        Returns:
            How many attempts became units.
        """
        num_adopted = 0
        for path in sorted(self.staging.glob("*")):
            unit, _, number = path.name.rpartition("-")
            receipt = self._read_receipt(path, unit) if unit in unit_groups else None
            if receipt is not None and not is_committed(self.folder, unit):
                place_unit(unit, path, self.folder)
                self.ledger.record(
                    LedgerEvent.COMMITTED,
                    unit,
                    unit_groups[unit],
                    attempt=int(number),
                    worker=receipt.worker,
                    seconds=receipt.seconds,
                    tokens_paid=receipt.tokens_paid,
                    tokens_kept=receipt.tokens_kept,
                )
                num_adopted += 1
        shutil.rmtree(self.staging, ignore_errors=True)
        return num_adopted

    def _read_receipt(self, path: Path, unit: str) -> Receipt | None:
        """Return the receipt of a complete attempt; None if it is incomplete or damaged."""
        try:
            receipt = Receipt(**storage.read_json_with_checksum(path / RECEIPT_FILE, ""))
            record = read_record(path, unit)
            intact = storage.digest_file(path / "units" / f"{unit}.safetensors")
        except (DataError, OSError, TypeError):
            return None
        is_whole = receipt.attempt_id == path.name
        return receipt if is_whole and record["sha256"] == intact == receipt.digest else None

    def run(self, units: Sequence[CaptureUnit], num_planned: int) -> None:
        """Capture units that are not committed, those of one teacher together.

        Raises:
            TeacherError: A unit failed every time; all others are committed.
            PerseaError: What a further attempt would meet too.
        """
        if not units:
            return
        executor = self._open_executor(units)
        settings = self.context.recipe.executor
        dispatcher = Dispatcher(
            executor,
            self.ledger,
            self._keep if self.is_in_process else self._publish,
            DispatchPolicy(settings.max_attempts, min_timeout_s=settings.min_timeout_s),
            lambda unit: self.on_committed(unit.name),
            lambda unit, share: self.on_part(unit.name, share),
        )
        try:
            result = dispatcher.run(WorkUnit(u.name, u.teacher, u) for u in units)
        finally:
            shutil.rmtree(self.staging, ignore_errors=True)
        raise_quarantine(result, num_planned, TeacherError, "capture")

    def _open_executor(self, units: Sequence[CaptureUnit]) -> Executor:
        if self.is_in_process:
            return InProcessExecutor(
                lambda: CaptureRunner(self.context, lambda attempt: self.folder, self.on_load),
                lambda attempt, share: self.on_part(attempt.unit.name, share),
            )
        refuse_shared_budgets(self.context, {u.teacher for u in units})
        factory = CaptureRunnerFactory(
            replace(self.context, folder=self.context.folder.absolute()),
            self.staging.absolute(),
            worker_threads(self.context),
        )
        return open_workers(self.context, factory, self.staging, len(units))

    def _keep(self, unit: WorkUnit, attempt: Attempt, receipt: Receipt) -> bool:
        """Accept a unit that this process committed itself."""
        return True

    def _publish(self, unit: WorkUnit, attempt: Attempt, receipt: Receipt) -> bool:
        """Make an attempt's files the unit, unless it exists; then delete them."""
        path = attempt_folder(self.staging, attempt)
        is_first = not is_committed(self.folder, unit.name)
        if is_first:
            place_unit(unit.name, path, self.folder)
        shutil.rmtree(path, ignore_errors=True)
        return is_first


def refuse_shared_budgets(context: Any, teachers: set[str]) -> None:
    """Check that no teacher behind a server has a budget that each worker would spend anew.

    Raises:
        RecipeError: One has.
    """
    for name in sorted(teachers):
        endpoint = context.models.teacher_ref(name).endpoint
        if endpoint is not None and endpoint.max_total_tokens:
            raise RecipeError(
                f"each worker would spend the budget of {name}",
                where="executor.workers",
                remedy="one worker with `kind: local`, which sends `endpoint.concurrency` requests "
                "at once, or delete `max_total_tokens:` of the endpoint",
            )
