"""Runs share what teachers answered: a run with another learning rate asks nobody."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from persea import storage
from persea.cache.canaries import KEY_FILE, read_pairs
from persea.cache.object_store import ObjectStore
from persea.cache.shared_store import SharedStore
from persea.cache.unit import read_record
from persea.config.recipe import load_recipe
from persea.errors import RecipeError
from persea.executors.executor import Attempt, Receipt
from persea.executors.ledger import read_ledger
from persea.pipeline import capture_dispatch
from persea.pipeline.capture_dispatch import refuse_shared_budgets
from persea.pipeline.capture_stage import _CaptureRun
from persea.pipeline.capture_worker import RECEIPT_FILE
from persea.pipeline.run_context import RunContext
from persea.pipeline.stages import run_pipeline
from persea.teachers.engines.chat_server import ChatServerEngine
from persea.teachers.engines.token_server import TokenServerEngine
from persea.teachers.engines.transformers import TransformersEngine
from tests.cli.test_cli import SAPLINGS, recipe, tree
from tests.pipeline.test_remote_teachers import mixed

ONE: dict[str, Any] = {
    "teachers": [{"model": str(SAPLINGS / "qwen-sapling")}],
    "corpus": [{"skill": "languages", "generate": 12}],
    "audition": {"items": 4},
    "training": {"steps": 2, "batch_size": 4, "warmup_steps": 1},
    "evaluation": {"items": 4, "max_new_tokens": 24},
}


class Requests:
    """Counts the calls of engines that compute answers or distributions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for engine in (TransformersEngine, TokenServerEngine, ChatServerEngine):
            for name in (
                "generate",
                "generate_with_distributions",
                "reduce_distributions",
                "compute_sparse_distributions",
            ):
                if hasattr(engine, name):
                    monkeypatch.setattr(engine, name, self.counted(getattr(engine, name)))

    def counted(self, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            return real(*arguments, **options)

        return call

    def take(self) -> int:
        """Return the calls since the last time."""
        count, self.count = self.count, 0
        return count


def test_a_run_with_another_learning_rate_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, requests = recipe(tmp_path, **ONE), Requests(monkeypatch)
    summaries = []
    for rate in ("1e-3", "2e-3"):
        told: list[str] = []
        out = tmp_path / rate
        context = RunContext(load_recipe(path, [f"training.learning_rate={rate}"]), out)
        for stage in ("audition", "capture"):
            run_pipeline(context, lambda s, f, words, told=told: told.append(words), stage)
        assert (requests.take() > 0) == (rate == "1e-3")
        run_pipeline(context, lambda *ignored: None, "train")
        requests.take()  # of the check before it
        summaries.append(json.loads((out / "capture" / "summary.json").read_text()))
    assert "qwen-sapling: 2 of 2 units of earlier runs" in told
    assert summaries[0] == summaries[1]
    weights = [(tmp_path / r / "train/student/model.safetensors") for r in ("1e-3", "2e-3")]
    assert weights[0].read_bytes() != weights[1].read_bytes()


def test_servers_are_asked_once_for_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = Requests(monkeypatch)
    for number in range(2):
        overrides = [f"capture.store={tmp_path / 'store'}"]
        context = RunContext(load_recipe(mixed(tmp_path), overrides), tmp_path / str(number))
        run_pipeline(context, lambda *ignored: None, "audition")
        requests.take()
        run_pipeline(context, lambda *ignored: None, "capture")
        assert (requests.take() > 0) == (number == 0)


def test_a_store_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    told: list[str] = []
    context = RunContext(
        load_recipe(recipe(tmp_path, **ONE), [f"capture.store={tmp_path / 'file'}"]),
        tmp_path / "run",
    )
    for stage in ("audition", "capture"):
        run_pipeline(context, lambda s, f, words: told.append(words), stage)
    assert [w for w in told if "later runs cannot reuse this capture" in w]


def test_a_store_without_a_guarantee_is_named(tmp_path: Path) -> None:
    told: list[str] = []
    for store in (ObjectStore(f"file://{tmp_path}/store"), SharedStore(tmp_path / "store")):
        run = _CaptureRun(
            RunContext(load_recipe(recipe(tmp_path, **ONE)), tmp_path / "run"),
            tmp_path,
            lambda stage, share, words: told.append(words),
            cast(Any, SimpleNamespace(fraction_done=0.0)),
            store,
        )
        run._warn_of_weak_store()
    assert len(told) == 1
    assert "cannot refuse to create an object that exists -> let one run at a time" in told[0]


def test_worker_processes_write_the_same_cache_and_account_for_every_attempt(
    tmp_path: Path,
) -> None:
    """Two workers, one killed in the middle: the same bytes as from one process, nothing twice.

    With the same key the canary pairs are the same too.
    """
    caches, ledgers, pairs = [], [], []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        overrides = [
            f"executor.workers={workers}",
            "capture.prompts_per_unit=3",
            "capture.canaries=8",
        ]
        context = RunContext(load_recipe(recipe(folder, **ONE), overrides), folder / "run")
        run_pipeline(context, lambda *ignored: None, "audition")
        if workers == 2:
            shutil.copy(tmp_path / "1" / "run" / KEY_FILE, folder / "run")
        killed: list[int] = []

        def kill_one(
            stage: str,
            fraction: float,
            words: str,
            run: Path = folder / "run",
            killed: Any = killed,
        ) -> None:
            for attempt in () if killed else (run / ".attempts").glob("*-1"):
                pid = next(
                    int(line["worker"].split()[1])
                    for line in map(json.loads, (run / "ledger.jsonl").read_text().splitlines())
                    if line["event"] == "started" and attempt.name == f"{line['unit']}-1"
                )
                killed.append(pid)
                os.kill(pid, signal.SIGKILL)

        run_pipeline(context, kill_one if workers == 2 else lambda *ignored: None, "capture")
        assert not (folder / "run" / ".attempts").exists()
        caches.append(
            {
                **tree(folder / "run" / "capture" / "units"),
                **tree(folder / "run" / "capture" / "commits"),
            }
        )
        pairs.append(read_pairs(folder / "run"))
        ledgers.append(read_ledger(folder / "run")["capture"])
    assert len(caches[0]) == 8
    assert caches[0] == caches[1]
    assert pairs[0] == pairs[1] and 0 < len(pairs[0]) <= 8
    one, two = ledgers
    assert (one.committed, two.committed) == (4, 4)
    assert one.tokens_paid >= one.tokens_kept == two.tokens_kept > 0
    assert two.num_attempts == 4 + two.num_lost + two.num_failed + two.num_duplicates
    assert two.num_unknown == two.num_lost + two.num_failed


def test_a_finished_attempt_of_a_dead_run_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path, **ONE)
    context = RunContext(load_recipe(path), tmp_path / "run")
    for stage in ("audition", "capture"):
        run_pipeline(context, lambda *ignored: None, stage)
    run, unit = tmp_path / "run", context.capture_units[0]
    before = tree(run / "capture")
    attempt = run / ".attempts" / f"{unit.name}-2"  # the run died before it published this one
    for kind in ("units", "commits"):
        (file,) = (run / "capture" / kind).glob(f"{unit.name}*")
        (attempt / kind).mkdir(parents=True)
        file.rename(attempt / kind / file.name)
    record = read_record(attempt, unit.name)
    receipt = Receipt(attempt.name, "pid 1", 0.5, 500, record["tokens"], record["sha256"])
    storage.write_json_with_checksum(attempt / RECEIPT_FILE, asdict(receipt))
    (run / ".attempts" / f"{unit.name}-3" / "units").mkdir(parents=True)  # cut short
    requests = Requests(monkeypatch)
    shutil.rmtree(tmp_path / "shared-captures")
    again = RunContext(load_recipe(path), tmp_path / "run")
    run_pipeline(again, lambda *ignored: None, "capture")
    assert requests.take() == 0
    after = tree(run / "capture")
    assert {k: v for k, v in after.items() if k != "done.json"} == {
        k: v for k, v in before.items() if k != "done.json"
    }
    sums = read_ledger(run)["capture"]
    assert (sums.committed, sums.pending, sums.running) == (2, 0, {})


def test_workers_do_not_spend_a_budget_each(tmp_path: Path) -> None:
    context = RunContext(load_recipe(mixed(tmp_path)), tmp_path / "run")
    names = {t.name for t in context.recipe.teachers if t.endpoint}
    refuse_shared_budgets(context, names)
    limited = [
        t.model_copy(update={"endpoint": t.endpoint.model_copy(update={"max_total_tokens": 9})})
        if t.endpoint
        else t
        for t in context.recipe.teachers
    ]
    context.models.recipe = context.recipe.model_copy(update={"teachers": tuple(limited)})
    with pytest.raises(RecipeError, match="each worker would spend the budget"):
        refuse_shared_budgets(context, names)


class Elastic:
    """Workers that come and go, 1 then 3 then 2, and finish in any order; all in this process."""

    def __init__(self, factory: Any, seed: int) -> None:
        self.runner, self.rng = factory(), random.Random(seed)
        self.running: list[Attempt] = []
        self.finished: list[str] = []
        self.sizes: list[int] = []

    @property
    def num_workers(self) -> int:
        return (1, 3, 3, 3, 2)[min(len(self.finished), 4)]

    def submit(self, attempt: Attempt) -> str:
        self.running.append(attempt)
        self.sizes.append(len(self.running))
        return f"worker {len(self.running)}"

    def receive(self, timeout_s: float) -> list[Receipt]:
        attempt = self.running.pop(self.rng.randrange(len(self.running)))
        self.finished.append(attempt.unit.name)
        return [self.runner.run(attempt, lambda share: None)]

    def cancel(self, attempt_id: str) -> None:
        self.running = [a for a in self.running if a.id != attempt_id]

    def close(self) -> None:
        self.running.clear()


def test_elastic_workers_in_any_order_train_the_same_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    students, orders, made = [], [], list[Elastic]()

    def open_elastic(context: Any, factory: Any, staging: Path, num_units: int) -> Elastic:
        made.append(Elastic(factory, seed=len(made)))
        return made[-1]

    monkeypatch.setattr(capture_dispatch, "open_workers", open_elastic)
    for name, workers in (("alone", 1), ("a", 2), ("b", 2)):
        folder = tmp_path / name
        folder.mkdir()
        overrides = [f"executor.workers={workers}", "capture.prompts_per_unit=2"]
        overrides.append(f"capture.store={folder / 'store'}")
        overrides.append("audition.pinned.languages=qwen-sapling")
        context = RunContext(load_recipe(recipe(folder, **ONE), overrides), folder / "run")
        for stage in ("audition", "capture", "train"):
            run_pipeline(context, lambda *ignored: None, stage)
        students.append((folder / "run/train/student/model.safetensors").read_bytes())
        orders.append([u.name for u in context.capture_units])
    assert students[0] == students[1] == students[2]
    assert orders[0] == orders[1] == orders[2]
    a, b = made
    assert sorted(a.finished) == sorted(b.finished) == sorted(orders[0])
    assert a.finished != b.finished  # they did finish in different orders
    assert a.sizes[0] == 1
    assert max(a.sizes) == 3
