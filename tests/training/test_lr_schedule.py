"""The rate rises, stays or falls as its schedule says, and is a function of the step alone."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persea.config.schema import LRSchedule
from persea.training.lr_schedule import learning_rate_at_step


@given(st.integers(1, 400), st.integers(0, 100), st.floats(1e-6, 1))
def test_the_cosine_rises_then_falls_to_a_tenth(steps: int, warmup: int, top: float) -> None:
    def at(step: int) -> float:
        return learning_rate_at_step(
            step, total_steps=steps, peak_learning_rate=top, warmup_steps=warmup
        )

    rates = [at(k) for k in range(steps + 1)]
    assert all(0 < r <= top * (1 + 1e-9) for r in rates)
    rising, falling = rates[:warmup], rates[max(0, warmup - 1) :]
    assert all(b > a for a, b in itertools.pairwise(rising))
    assert all(b <= a for a, b in itertools.pairwise(falling))
    if 0 < warmup <= steps:
        assert rates[0] == pytest.approx(top / warmup)
        assert rates[warmup - 1] == pytest.approx(top)
    if warmup < steps:
        assert rates[steps] == pytest.approx(top / 10)
        assert at(warmup) == pytest.approx(top)
        if (steps - warmup) % 2 == 0:
            assert at((steps + warmup) // 2) == pytest.approx(0.55 * top)


@given(st.integers(2, 400), st.integers(0, 50), st.floats(0.01, 1))
def test_wsd_stays_then_falls_in_a_line_to_a_tenth(
    steps: int, warmup: int, cooldown: float
) -> None:
    rates = [
        learning_rate_at_step(
            k,
            total_steps=steps,
            peak_learning_rate=1.0,
            warmup_steps=warmup,
            schedule=LRSchedule.WSD,
            cooldown_share=cooldown,
        )
        for k in range(steps + 1)
    ]
    begin = max(warmup, round(steps * (1 - cooldown)))
    assert all(b > a for a, b in itertools.pairwise(rates[: min(warmup, steps)]))
    assert all(r == 1.0 for r in rates[warmup : begin + 1][: steps - warmup])
    if begin < steps:
        assert rates[steps] == pytest.approx(0.1)
        falls = [a - b for a, b in itertools.pairwise(rates[begin:])]
        assert falls == pytest.approx([0.9 / (steps - begin)] * len(falls))


def test_only_the_last_stretch_of_wsd_depends_on_how_many_steps_there_are() -> None:
    """So that a longer run goes on as the shorter one began."""
    short, long = (
        [
            learning_rate_at_step(
                k,
                total_steps=n,
                peak_learning_rate=1.0,
                warmup_steps=5,
                schedule=LRSchedule.WSD,
                cooldown_share=0.2,
            )
            for k in range(80)
        ]
        for n in (100, 1000)
    )
    assert short == long
    assert [
        learning_rate_at_step(k, total_steps=100, peak_learning_rate=1.0, warmup_steps=5)
        for k in range(80)
    ] != [
        learning_rate_at_step(k, total_steps=1000, peak_learning_rate=1.0, warmup_steps=5)
        for k in range(80)
    ]
