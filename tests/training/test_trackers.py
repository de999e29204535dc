"""Trackers are imported on demand; tensorboard shows the logged values; a missing one is an error
before any work.
"""

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
    "terms": {"event_kl": 2.0},
    "teachers": {"qwen": 0.5},
    "skipped": [{"step": 1, "loss": "nan"}],
}


def test_a_line_is_flat_numbers() -> None:
    assert dict(flatten_metrics(LINE)) == {"loss": 1.5, "terms/event_kl": 2.0, "teachers/qwen": 0.5}


def test_tensorboard_shows_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    refuse_missing_tracker("tensorboard")
    log = open_tracker("tensorboard", "run", tmp_path, 0, {}, 8)
    log(2, LINE)
    log(4, LINE | {"loss": 1.25})
    shown = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in shown.Scalars("loss")] == [(2, 1.5), (4, 1.25)]
    assert [e.value for e in shown.Scalars("terms/event_kl")] == [2.0, 2.0]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_are_opened_fed_and_finished(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """A stand-in module records the calls; how both are called is in their documentation."""
    calls = stand_in(monkeypatch, name)
    log = open_tracker(name, "run", tmp_path, 0, {"steps": 8}, 8)
    log(2, LINE)
    assert {k: v for k, v in calls[0].items() if k != "id"} == {
        "project": "persea",
        "name": "run",
        "config": {"steps": 8},
        "resume": "allow",
    }
    assert ("id" in calls[0]) == (name == "wandb")
    assert calls[1:] == [(2, {"loss": 1.5, "terms/event_kl": 2.0, "teachers/qwen": 0.5})]
    log(8, {"step": 8, "loss": 1.0})
    assert calls[2:] == [(8, {"loss": 1.0}), "finished"]


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """Put a module in place of a tracker and return the list of calls."""
    calls: list[Any] = []
    monkeypatch.setitem(
        sys.modules,
        name,
        SimpleNamespace(
            init=lambda **k: calls.append(k),
            log=lambda line, step: calls.append((step, line)),
            finish=lambda: calls.append("finished"),
        ),
    )
    return calls


def test_a_resumed_training_goes_on_in_the_same_wandb_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """wandb ignores resume="allow" without an id; a training from step 0 is a new run."""
    calls = stand_in(monkeypatch, "wandb")
    for steps_done in (0, 4, 0):
        open_tracker("wandb", "run", tmp_path, steps_done, {}, 8)
    first, resumed, again = (call["id"] for call in calls)
    assert first == resumed != again


def test_a_missing_tracker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_missing_tracker(None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MissingRequirementError,
        match=r"training\.report_to is wandb, which is not installed "
        r"-> pip install 'persea\[wandb\]'",
    ) as caught:
        refuse_missing_tracker("wandb")
    assert caught.value.exit_code == 7
