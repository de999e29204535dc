"""Stop a training by SIGTERM or SIGINT, also inside a step that would take long."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# A step that ends this many seconds after the signal is finished; a longer one is abandoned. With
# the time to write a checkpoint, the training ends within ten seconds.
GRACE_S = 2.0
RETRY_S = 1.0  # Python swallows an exception that is raised inside a destructor: it is raised again


class StepAbandoned(BaseException):
    """A step is left unfinished. No `Exception`: no library may mistake it for a failure.

    Attributes:
        signal_number: The signal that asked for it.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number


class StopSignals:
    """The signals that ask this process to stop.

    Attributes:
        received: Numbers of the signals so far.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._may_abandon = False

    @property
    def first(self) -> int:
        """Number of the first signal; 0 = none."""
        return self.received[0] if self.received else 0

    @contextmanager
    def may_abandon(self, enabled: bool = True) -> Iterator[None]:
        """Mark work that is repeated after a resume, so that it need not be finished.

        Args:
            enabled: False = finish it. One of several processes cannot leave the others waiting.

        Raises:
            StepAbandoned: GRACE_S after a signal.
        """
        self._may_abandon = enabled
        try:
            if enabled and self.received:
                self._start_timer()
            yield
        finally:
            self._may_abandon = False
            if enabled and self.received:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if self._may_abandon:
            self._start_timer()

    def _start_timer(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, GRACE_S, RETRY_S)

    def _abandon(self, number: int, frame: FrameType | None) -> None:
        if self._may_abandon:
            raise StepAbandoned(self.first)


@contextmanager
def collect_stop_signals() -> Iterator[StopSignals]:
    """Collect SIGTERM and SIGINT instead of raising where they arrive.

    In a thread that is not the main one signals stay with their owner, and none is collected.
    """
    signals = StopSignals()
    handlers: dict[int, Any] = {}
    try:
        for one, handler in (
            (signal.SIGTERM, signals._record),
            (signal.SIGINT, signals._record),
            (signal.SIGALRM, signals._abandon),
        ):
            handlers[one] = signal.signal(one, handler)
    except ValueError:  # not the main thread (a notebook's worker), which may set no handlers
        handlers = {}
    try:
        yield signals
    finally:
        for number, before in handlers.items():
            signal.signal(number, before)
