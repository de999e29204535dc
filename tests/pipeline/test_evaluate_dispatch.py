"""Workers of an evaluation: the same bytes, answers by workers alone, strange workers refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from persea.config.recipe import load_recipe
from persea.errors import RefusedError
from persea.executors.executor import Attempt, Receipt, WorkUnit
from persea.executors.ledger import read_ledger
from persea.executors.local import InProcessExecutor
from persea.pipeline import evaluate_dispatch
from persea.pipeline.evaluate_worker import EvaluationRunner, EvaluationUnit, evaluation_units
from persea.pipeline.run_context import RunContext
from persea.pipeline.stages import run_evaluate
from tests.cli.test_cli import SAPLINGS, recipe
from tests.pipeline.test_capture_stage import ONE


def evaluated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int, **more: Any
) -> tuple[RunContext, list[str]]:
    """Evaluate a student (a sapling, nearly) with answers of its own home."""
    folder.mkdir()
    monkeypatch.setenv("PERSEA_HOME", str(folder / "home"))
    path = recipe(folder, **ONE | more)
    context = RunContext(load_recipe(path, [f"executor.workers={workers}"]), folder / "run")
    if not (folder / "run" / "train").exists():
        student = folder / "run" / "train" / "student"
        shutil.copytree(SAPLINGS / "llama-sapling", student)
        weights = load_file(student / "model.safetensors")
        weights["model.norm.weight"] *= 1.01  # not the base, whose answers it would reuse
        save_file(weights, student / "model.safetensors", {"format": "pt"})
    words: list[str] = []
    out = folder / "out"
    out.mkdir()
    run_evaluate(context, out, lambda stage, share, message: words.append(message))
    return context, words


class Home(InProcessExecutor):
    """Runs each attempt with a home of its own, as a machine with nothing in common does."""

    home = ""

    def receive(self, timeout_s: float) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PERSEA_HOME", self.home)
            return super().receive(timeout_s)


def test_workers_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tmp_path / "held.jsonl"
    texts.write_text("".join(json.dumps({"text": t * 3}) + "\n" for t in ("one two ", "drei ")))
    more = {"evaluation": ONE["evaluation"] | {"texts": [{"texts": str(texts)}]}}
    _, alone = evaluated(tmp_path / "1", monkeypatch, 1, **more)
    assert not any("from disk" in words for words in alone)
    Home.home = str(tmp_path / "elsewhere")

    def open_here(context: Any, factory: Any, staging: Path, num_units: int) -> InProcessExecutor:
        assert num_units == 6  # three models, one task and the texts
        return Home(factory)

    monkeypatch.setattr(evaluate_dispatch, "open_workers", open_here)
    context, words = evaluated(tmp_path / "2", monkeypatch, 2, **more)
    files = {p.name for p in (tmp_path / "1" / "out").iterdir()}
    assert {"evaluation.json", "examples.jsonl", "texts.json", "texts.jsonl"} <= files
    for name in files:
        one, two = ((tmp_path / k / "out" / name).read_bytes() for k in ("1", "2"))
        assert one == two, name
    scored = [w for w in words if "languages" in w or "texts" in w]
    assert sum("by a worker" in w for w in scored) == 6
    assert all("by a worker" in w or "from disk" in w for w in scored)
    sums = read_ledger(context.folder)["evaluate"]
    assert (sums.planned, sums.committed, sums.pending) == (6, 6, 0)
    assert sums.tokens_paid == sums.tokens_kept > 0
    assert not (context.folder / ".attempts").exists()


def test_a_worker_with_other_models_or_questions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copytree(SAPLINGS / "llama-sapling", tmp_path / "run" / "train" / "student")
    context = RunContext(load_recipe(recipe(tmp_path, **ONE)), tmp_path / "run")

    def load(name: str) -> Any:
        raise AssertionError(name)

    units = evaluation_units(context, load)
    assert sorted({u.group for u in units.values()}) == ["base", "qwen-sapling", "student"]
    other = RunContext(load_recipe(recipe(tmp_path, **ONE), ["evaluation.items=3"]), context.folder)
    assert not set(units) & set(evaluation_units(other, load))
    runner = EvaluationRunner(other, lambda attempt: tmp_path / attempt.id)
    with pytest.raises(RefusedError, match="others than where the run was started"):
        runner.run(Attempt(next(iter(units.values())), 1), lambda share: None)


def test_answers_that_do_not_arrive_whole_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSEA_HOME", str(tmp_path / "home"))
    context = RunContext(load_recipe(recipe(tmp_path, **ONE)), tmp_path / "run")
    dispatch = evaluate_dispatch.EvaluationDispatch(context, lambda *ignored: None)
    unit = WorkUnit("u", "student", EvaluationUnit("student", "languages"))
    attempt = Attempt(unit, 1)
    receipt = Receipt(attempt.id, "w", 1.0, 1, 1, "another digest")
    folder = dispatch.staging / attempt.id / "answers"
    publish: Callable[..., bool] = dispatch._publish
    for text, digest in (("{}", receipt.digest), ("{}", None)):
        folder.mkdir(parents=True)
        (folder / "ab.json").write_text(text)
        known = digest or evaluate_dispatch.digest_answers(folder.parent)
        publish(unit, attempt, replace(receipt, digest=known))
        assert not (tmp_path / "home" / "answers").exists()
        assert not folder.parent.exists()
