"""Boards are asked for, not imported: tensorboard really shows what was logged, and one that is missing is told before any work."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from persea.errors import MissingRequirementError
from persea.training.trackers import flatten_metrics, open_tracker, refuse_missing_tracker

LINE: dict[str, Any] = {
    "step": 2,
    "loss": 1.5,
    "terms": {"events": 2.0},
    "teachers": {"qwen": 0.5},
    "skipped": [{"step": 1, "loss": "nan"}],
}


def test_a_line_is_flat_numbers() -> None:
    assert dict(flatten_metrics(LINE)) == {"loss": 1.5, "terms/events": 2.0, "teachers/qwen": 0.5}


def test_tensorboard_shows_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    refuse_missing_tracker("tensorboard")
    board = open_tracker("tensorboard", "run", tmp_path, 0, {}, 8)
    board(2, LINE)
    board(4, LINE | {"loss": 1.25})
    shown = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in shown.Scalars("loss")] == [(2, 1.5), (4, 1.25)]
    assert [e.value for e in shown.Scalars("terms/events")] == [2.0, 2.0]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_others_are_begun_and_fed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """In place of the package a module that notes what it is told: how both are called is their documentation's."""
    said: list[Any] = []
    monkeypatch.setitem(
        sys.modules,
        name,
        SimpleNamespace(
            init=lambda **k: said.append(k),
            log=lambda line, step: said.append((step, line)),
            finish=lambda: said.append("over"),
        ),
    )
    board = open_tracker(name, "run", tmp_path, 0, {"steps": 8}, 8)
    board(2, LINE)
    assert said[0] == {
        "project": "persea",
        "name": "run",
        "config": {"steps": 8},
        "resume": "allow",
    }
    assert said[1:] == [(2, {"loss": 1.5, "terms/events": 2.0, "teachers/qwen": 0.5})]
    board(8, {"step": 8, "loss": 1.0})
    assert said[2:] == [(8, {"loss": 1.0}), "over"]


def test_a_board_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_missing_tracker(None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MissingRequirementError,
        match=r"training\.report_to is wandb, which is not installed -> pip install 'persea\[wandb\]'",
    ) as caught:
        refuse_missing_tracker("wandb")
    assert caught.value.exit_code == 7
