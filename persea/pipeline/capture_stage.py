"""The stage `capture`: take shared units, ask teachers for the others, account for prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from persea import storage
from persea.cache.accounting import (
    CaptureBudget,
    UnitProgress,
    account_for_prompts,
    capture_summary,
    count_left_out,
    left_out_lines,
    quarantine_records,
)
from persea.cache.answer_filter import verify_answers
from persea.cache.canaries import count_pairs
from persea.cache.capture import CaptureUnit, open_teacher_caches, refuse_changed_identity
from persea.cache.maintenance import committed_units
from persea.cache.object_store import ObjectStore, is_object_store
from persea.cache.shared_store import SharedStore, default_store_folder
from persea.cache.unit import read_record
from persea.errors import StorageError
from persea.executors.ledger import Ledger
from persea.pipeline import tasks_and_prompts
from persea.pipeline.capture_dispatch import CaptureDispatch
from persea.pipeline.progress import WARNING_PREFIX
from persea.pipeline.work import capture_work
from persea.storage import digest_json

if TYPE_CHECKING:
    from persea.pipeline.run_context import RunContext
    from persea.vocab_extension.resize_model import ProgressCallback


@dataclass
class _CaptureRun:
    """One capture: its budget, its store and what it reports."""

    context: RunContext
    folder: Path
    progress: ProgressCallback
    budget: CaptureBudget
    store: SharedStore | ObjectStore
    served_models: dict[str, str] = field(default_factory=dict)
    taken: Counter[str] = field(default_factory=Counter)
    store_failed: bool = False
    ledger: Ledger | None = None
    units_by_name: dict[str, CaptureUnit] = field(default_factory=dict)

    def run(self, units: Sequence[CaptureUnit]) -> None:
        """Take units from the shared store, then capture the missing ones; record every attempt.

        Raises:
            RefusedError: The folder holds units of another model with a teacher's name.
            TeacherError: A server is gone, or a unit failed every time.
        """
        refuse_changed_identity(units, self.folder)
        groups = {u.name: u.teacher for u in units}
        ledger = Ledger(self.context.folder, "capture")
        dispatch = CaptureDispatch(
            self.context, self.folder, ledger, self._on_load, self._on_part, self._on_committed
        )
        dispatch.adopt_attempts(groups)
        committed = frozenset(committed_units(self.folder))
        for name in dict.fromkeys(groups.values()):
            own = [u for u in units if u.teacher == name]
            if self.context.models.teacher_ref(name).endpoint:
                # the handshake says which model the server runs
                self.context.models.load_teacher(name, self.context.recipe.capture.batch_size)
                fingerprint = self.context.models.remote_engines[name].fingerprints[0].to_json()
                self.served_models[name] = digest_json(fingerprint)
            self._take_shared(name, [u for u in own if u.name not in committed], len(own))
        committed = frozenset(committed_units(self.folder))
        done = [u.name for u in units if u.name in committed]
        ledger.begin(groups, done, lambda unit: int(read_record(self.folder, unit)["tokens"]))
        self.ledger = ledger
        for unit in units:
            if unit.name in committed:
                tokens = ledger.tokens_kept(unit.name)
                self._on_unit(UnitProgress(len(unit.prompts), tokens, False, unit.name))
        missing = [u for u in units if u.name not in committed]
        if missing and not self.context.canaries:
            self._warn_of_weak_store()
        dispatch.run(missing, len(units))

    def _warn_of_weak_store(self) -> None:
        """Tell if two runs can write the record of one unit: the store cannot refuse the second."""
        if not isinstance(self.store, ObjectStore):
            return
        with suppress(StorageError):  # `_share` reports it
            if not self.store.creates_once:
                message = (
                    f"{WARNING_PREFIX}{self.store.url} cannot refuse to create an object that "
                    "exists -> let one run at a time write to it"
                )
                self.progress("capture", self.budget.fraction_done, message)

    def _on_load(self, name: str) -> None:
        self.progress("capture", self.budget.fraction_done, f"loading {name}")

    def _on_part(self, unit_name: str, share: float) -> None:
        self.progress("capture", *self.budget.record_part(unit_name, share))

    def _on_committed(self, unit_name: str) -> None:
        tokens = self.ledger.tokens_kept(unit_name) if self.ledger else 0
        num_prompts = len(self.units_by_name[unit_name].prompts)
        self._on_unit(UnitProgress(num_prompts, tokens, True, unit_name))

    def _take_shared(self, name: str, missing: Sequence[CaptureUnit], num_units: int) -> None:
        if self.context.canaries:  # its pairs are secret, and of this run alone
            return
        served = self.served_models.get(name, "")
        for unit in missing:
            self.taken[name] += self.store.fetch(unit.name, self.folder, served)
        if self.taken[name]:
            message = f"{name}: {self.taken[name]:,} of {num_units:,} units of earlier runs"
            self.progress("capture", self.budget.fraction_done, message)

    def _on_unit(self, unit: UnitProgress) -> None:
        fraction, message = self.budget.record_unit(unit)
        if not unit.is_new:
            self.progress("capture", fraction, "")  # of an earlier run: no part of this one's pace
        elif not (self.store_failed or self.context.canaries):
            self._share(unit.name)
        self.progress("capture", fraction, message)

    def _share(self, unit_name: str) -> None:
        """Add a unit to the store. A full or missing store costs nothing but later reuse."""
        teacher = self.units_by_name[unit_name].teacher
        try:
            self.store.publish(unit_name, self.folder, self.served_models.get(teacher, ""))
        except StorageError as error:
            self.store_failed = True
            message = f"{WARNING_PREFIX}later runs cannot reuse this capture: {error}"
            self.progress("capture", self.budget.fraction_done, message)


def shared_store(context: RunContext) -> SharedStore | ObjectStore:
    """Return the store that a recipe's captures are shared in."""
    given = context.recipe.capture.store
    if is_object_store(given):
        return ObjectStore(given)
    return SharedStore(Path(given) if given else default_store_folder())


def capture_corpus(context: RunContext, folder: Path, progress: ProgressCallback) -> None:
    """Let the cast teachers answer the corpus; store answers and token distributions.

    Units that an earlier run captured are taken from the shared store.

    Raises:
        RefusedError: A budget is spent, no answer is complete, or verification rejected all.
        DataError: A prompt has no answer although `capture.answers` is `given`.
    """
    settings, units, corpus = (
        context.recipe.capture,
        context.capture_units,
        context.captured_corpus,
    )
    budget = CaptureBudget(
        len(corpus.prompts),
        settings.max_total_tokens or 0,
        settings.max_hours or 0,
        work_by_unit=capture_work(context),
    )
    run = _CaptureRun(context, folder, progress, budget, shared_store(context))
    if context.canaries:
        context.canaries.save_key(context.folder)
    run.units_by_name = {u.name: u for u in units}
    run.run(units)
    storage.write_json_lines(folder / "removed.jsonl", (r.to_json() for r in corpus.removed))
    summary = capture_summary(units, folder)
    quarantine = quarantine_records(units, folder, corpus.malformed)
    if quarantine:
        storage.write_json_lines(folder / "quarantine.jsonl", quarantine)
    summary["removed"] = dict(Counter(r.reason.value for r in corpus.removed))
    if settings.drop_wrong_answers:
        items = tasks_and_prompts.items_by_question(
            context.recipe.corpus, context.tasks, corpus.prompts, context.recipe.seed
        )
        caches = [reader for reader, _ in open_teacher_caches(units, folder)]
        summary["verified"] = verify_answers(caches, items, context.tasks, folder)
    summary |= account_for_prompts(summary, corpus, quarantine)
    if corpus.notes:
        summary["notes"] = list(corpus.notes)
    canary_note = []
    if context.canaries:
        num_pairs = count_pairs(folder, [u.name for u in units])
        summary["canaries"] = {"prompts": len(context.canaries.prompt_ids), "pairs": num_pairs}
        canary_note = [f"{num_pairs:,} canary pairs"]
    storage.write_json(folder / "summary.json", summary)
    kept = f"{summary['kept']:,} of {summary['in']:,} kept"
    left_out = left_out_lines(count_left_out(summary))
    progress("capture", 1.0, ", ".join([kept, *left_out, *corpus.notes, *canary_note]))
