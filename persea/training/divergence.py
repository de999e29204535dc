"""Notice a training whose loss rises far above its start: it is said, and stops nothing."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

WINDOW_STEPS = 10  # losses that are compared
ON_POLICY_TERMS = frozenset({"reverse_kl", "span_likelihood"})
DIVERGED_RATIO, DIVERGED_NATS = 1.5, 0.3  # both must be exceeded, against noise of small losses


class DivergenceWatch:
    """Compares the median loss of the latest steps with the mean of the first ones.

    On-policy steps have another loss and are not counted.

    Example:
        >>> watch = DivergenceWatch()
        >>> lines = [{"step": k, "loss": 1.0 if k < 10 else 5.0, "terms": {}} for k in range(20)]
        >>> [w.partition(":")[0] for line in lines if (w := watch.observe(line))]
        ['the loss is 5.00, far above its start of 1.00']
    """

    def __init__(self) -> None:
        self._first: list[float] = []
        self._latest: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._has_warned = False

    def observe(self, line: Mapping[str, Any]) -> str:
        """Return a warning at the first step after which the loss is far above its start."""
        loss = line["loss"]
        if ON_POLICY_TERMS & line["terms"].keys() or not math.isfinite(loss):
            return ""
        if len(self._first) < WINDOW_STEPS:
            self._first.append(loss)
            return ""
        self._latest.append(loss)
        start = sum(self._first) / WINDOW_STEPS
        latest = sorted(self._latest)[
            len(self._latest) // 2
        ]  # a median: one spike is no divergence
        is_far = latest > DIVERGED_RATIO * start and latest > start + DIVERGED_NATS
        if self._has_warned or not is_far or len(self._latest) < WINDOW_STEPS // 2:
            return ""
        self._has_warned = True
        return (
            f"the loss is {latest:.2f}, far above its start of {start:.2f}: the training diverges "
            "-> a lower training.learning_rate"
        )
