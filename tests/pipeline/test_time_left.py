"""After a minute the time left is right to 30 percent, whatever came before and is left."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from persea.cache.accounting import CaptureBudget, UnitProgress
from persea.pipeline.time_left import TimeLeft


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def estimates(
    steps: list[tuple[float, float]], loading: float = 0.0, begun: float = 0.0
) -> Iterator[tuple[float, float, float]]:
    """(seconds since the work began, estimate, truth) after each step of (seconds, work)."""
    clock, total = Clock(), sum(work for _, work in steps)
    left = TimeLeft(clock)
    left.update("train", begun, "")
    left.update("train", begun, "loading")
    clock.now += loading
    left.update("train", begun, "begins")
    start, done = clock.now, 0.0
    end = start + sum(seconds for seconds, _ in steps)
    for seconds, work in steps:
        clock.now += seconds
        done += work
        told = left.update("train", begun + (1 - begun) * done / total, "works")
        assert told is not None
        yield clock.now - start, told, end - clock.now


def right(told: float, truth: float) -> bool:
    return abs(told - truth) <= 0.3 * truth + 1


STEPS = {
    "train, equal steps": ([(6.0, 1.0)] * 100, 0.0, 0.0),
    "train, resumed at a half after 40 s of loading": ([(6.0, 1.0)] * 100, 40.0, 0.5),
    "capture, texts of any length": (
        [(n / 50, float(n)) for n in random.Random(0).choices(range(20, 2000), k=300)],
        30.0,
        0.0,
    ),
    "evaluate, models of three sizes": (
        [(w, w) for w in [0.5] * 200 + [1.5] * 200 + [5.0] * 100],
        10.0,
        0.0,
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_after_a_minute_it_is_right_to_30_percent(name: str) -> None:
    late = [(told, truth) for at, told, truth in estimates(*STEPS[name]) if at >= 60]
    assert len(late) > 40
    assert all(right(told, truth) for told, truth in late)


def test_a_pace_that_changes_is_followed() -> None:
    """A machine that becomes three times slower in the middle: right again after two minutes."""
    steps = [(2.0, 1.0)] * 60 + [(6.0, 1.0)] * 60
    late = [(told, truth) for at, told, truth in estimates(steps) if at >= 120 + 120]
    assert all(right(told, truth) for told, truth in late)


def test_another_stage_and_an_empty_message_begin_anew() -> None:
    clock = Clock()
    left = TimeLeft(clock)
    assert left.update("capture", 0.0, "") is None
    clock.now += 10
    assert left.update("capture", 0.5, "half") == pytest.approx(10)
    assert left.update("train", 0.0, "") is None
    assert left.update("train", 0.8, "") is None  # resumed
    clock.now += 10
    assert left.update("train", 0.9, "one more") == pytest.approx(10)


def test_a_capture_tells_by_work_and_not_by_prompts() -> None:
    """Two units of 10 prompts; the second has nine times the text."""
    clock = Clock()
    budget = CaptureBudget(20, clock=clock, work_by_unit={"a": 100.0, "b": 900.0})
    clock.now += 50  # loading
    assert budget.record_part("a", 0.0) == (0.0, "0/20 prompts")
    clock.now += 10
    assert budget.record_unit(UnitProgress(10, 500, True, "a")) == (
        0.1,
        "10/20 prompts, 50 tokens/s, 90 s left",
    )
    clock.now += 30
    fraction, words = budget.record_part("b", 1 / 3)
    assert fraction == pytest.approx(0.4) and words.endswith("60 s left")
