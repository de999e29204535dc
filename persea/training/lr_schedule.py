"""Learning rate schedules: functions of the step alone, so a checkpoint needs no schedule state."""

from __future__ import annotations

import math

from persea.config.schema import LRSchedule

# Where both schedules end, relative to the peak. A student whose rate ends at zero learns nothing
# from its last batches.
MIN_LEARNING_RATE_RATIO = 0.1


def learning_rate_at_step(
    step: int,
    *,
    total_steps: int,
    peak_learning_rate: float,
    warmup_steps: int,
    schedule: LRSchedule = LRSchedule.COSINE,
    cooldown_share: float = 0.2,
    min_ratio: float = MIN_LEARNING_RATE_RATIO,
) -> float:
    """Return the learning rate of a step.

    Args:
        step: the step, 0 to total_steps - 1.
        total_steps: number of steps.
        peak_learning_rate: the highest rate, reached at the end of the warm-up.
        warmup_steps: steps of the linear warm-up.
        schedule: shape after the warm-up.
        cooldown_share: share of all steps in which WSD falls; the cosine ignores the argument.
        min_ratio: last learning rate relative to the peak.

    Example:
        >>> learning_rate_at_step(9, total_steps=100, peak_learning_rate=1.0, warmup_steps=10)
        1.0
    """
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    if schedule is LRSchedule.WSD:
        begin = max(warmup_steps, round(total_steps * (1 - cooldown_share)))
        done = min(1.0, max(0.0, (step - begin) / max(1, total_steps - begin)))
        return peak_learning_rate * warm * (1 - (1 - min_ratio) * done)
    if schedule is LRSchedule.CONSTANT:
        return peak_learning_rate * warm
    done = min(1.0, max(0.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))
    if schedule is LRSchedule.LINEAR:
        return peak_learning_rate * warm * (1 - (1 - min_ratio) * done)
    return (
        peak_learning_rate
        * warm
        * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * done)))
    )
