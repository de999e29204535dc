"""How fast a student learns at each step: the learning rate, a function of the step alone, so that nothing of it needs saving."""

from __future__ import annotations

import math

from persea.config.schema import Schedule

FLOOR = 0.1  # of the highest rate: where both schedules end. A student that ends at zero learns nothing from its last batches


def rate(step: int, *, steps: int, highest: float, warmup: int, schedule: Schedule = Schedule.COSINE, cooldown: float = 0.2) -> float:
    """Learning rate of a step (0..steps-1): linear warm-up over `warmup` steps, then the schedule down to a tenth.

    cooldown  share of all steps in which WSD falls; the cosine has none
    """
    warm = min(1.0, (step + 1) / max(1, warmup))
    if schedule is Schedule.WSD:
        begin = max(warmup, round(steps * (1 - cooldown)))
        done = min(1.0, max(0.0, (step - begin) / max(1, steps - begin)))
        return highest * warm * (1 - (1 - FLOOR) * done)
    done = min(1.0, max(0.0, (step - warmup) / max(1, steps - warmup)))
    return highest * warm * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))
