"""Runs share what teachers answered: a run with another learning rate asks nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from persea.config.recipe import load_recipe
from persea.pipeline.run_context import RunContext
from persea.pipeline.stages import run_pipeline
from persea.teachers.engines.chat_server import ChatServerEngine
from persea.teachers.engines.token_server import TokenServerEngine
from persea.teachers.engines.transformers import TransformersEngine
from tests.cli.test_cli import SAPLINGS, recipe
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
