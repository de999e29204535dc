"""How fast a student learns at each step: the learning rate, a function of the step alone, so that nothing of it needs saving."""

from __future__ import annotations

import math

from persea.config.schema import LRSchedule

MIN_LEARNING_RATE_RATIO = 0.1  # of the highest rate: where both schedules end. A student that ends at zero learns nothing from its last batches


def learning_rate_at_step(
    step: int,
    *,
    total_steps: int,
    peak_learning_rate: float,
    warmup_steps: int,
    schedule: LRSchedule = LRSchedule.COSINE,
    cooldown_share: float = 0.2,
) -> float:
    """Learning rate of a step (0..steps-1): linear warm-up over `warmup` steps, then the schedule down to a tenth.

    cooldown  share of all steps in which WSD falls; the cosine has none
    """
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    if schedule is LRSchedule.WSD:
        begin = max(warmup_steps, round(total_steps * (1 - cooldown_share)))
        done = min(1.0, max(0.0, (step - begin) / max(1, total_steps - begin)))
        return peak_learning_rate * warm * (1 - (1 - MIN_LEARNING_RATE_RATIO) * done)
    done = min(1.0, max(0.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))
    return (
        peak_learning_rate
        * warm
        * (
            MIN_LEARNING_RATE_RATIO
            + (1 - MIN_LEARNING_RATE_RATIO) * 0.5 * (1 + math.cos(math.pi * done))
        )
    )
