"""A loss far above its start is named once; noise, on-policy steps and NaN are not."""

from __future__ import annotations

import math
import random

from persea.training.divergence import DivergenceWatch


def warnings(losses: list[float], terms: dict[str, float] | None = None) -> list[str]:
    watch = DivergenceWatch()
    lines = [{"step": k, "loss": loss, "terms": terms or {}} for k, loss in enumerate(losses)]
    return [w for line in lines if (w := watch.observe(line))]


def test_a_rising_loss_is_named_once() -> None:
    (warning,) = warnings([1.1] * 10 + [5.4] * 40)
    assert "far above its start of 1.10" in warning


def test_noise_and_small_losses_are_not() -> None:
    rng = random.Random(0)
    assert not warnings([1 + rng.random() for _ in range(500)])
    assert not warnings([0.02] * 10 + [0.2] * 50)
    assert not warnings([1.0] * 10 + [math.nan] * 50)
    assert not warnings([1.0] * 20 + [9.0] + [1.0] * 20)


def test_on_policy_steps_are_not_compared() -> None:
    assert not warnings([1.0] * 10 + [9.0] * 30, {"reverse_kl": 9.0})
