"""Estimate how long a stage still takes, from its pace in the last minutes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

MIN_WINDOW_S = 60.0  # the pace is measured over at least so long, if the stage is that old ...
WINDOW_SHARE = 0.5  # ... and over this share of the time since the stage began


class TimeLeft:
    """The time left of the stage that runs, by the fraction of its work that is done.

    Callers report fractions of work (bytes of text times size of the model), not of a count, so the
    pace is that of what is left too. Time before the first work, such as loading weights, is no
    part of the pace. Work of an earlier run is not either: a report with an empty message sets the
    fraction where this run begins.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stage, self._first = "", 0.0
        self._samples: deque[tuple[float, float]] = deque()  # (clock, fraction), oldest first

    def update(self, stage: str, fraction: float, message: str) -> float | None:
        """Take a report, and return the seconds until the stage ends; None = unknown."""
        now = self._clock()
        if stage != self._stage or not message or fraction < self._samples[-1][1]:
            self._stage = stage
            self._samples = deque([(now, fraction)])
            return None
        if len(self._samples) == 1 and fraction == self._samples[0][1]:
            self._samples[0] = now, fraction  # not begun yet
            return None
        if len(self._samples) == 1:
            self._first = self._samples[0][0]
        self._samples.append((now, fraction))
        window = max(MIN_WINDOW_S, WINDOW_SHARE * (now - self._first))
        while len(self._samples) > 2 and self._samples[1][0] <= now - window:
            self._samples.popleft()
        begin, done = self._samples[0]
        return (now - begin) / (fraction - done) * (1 - fraction) if fraction > done else None
