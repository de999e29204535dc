"""Report the progress inside a step, and let signals in while the backward pass runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch

# (steps done, as a fraction of a step is done too, what is being done)
PartCallback = Callable[[float, str], None]
SAY_INTERVAL_S = 1.0  # between two reports inside a step
FORWARD_SHARE = 1 / 3  # of a micro-batch's time: the backward pass costs twice the forward pass


class StepWatch:
    """Hooks on the trainable parameters: each is called when its gradient is ready.

    Python handles a signal between two of its own instructions. The backward pass is one call into
    C++; the hooks return to Python inside it, so that a signal is handled within it too.

    Args:
        parameters: The trainable parameters.
        on_part: Receives the progress inside a step, at most every SAY_INTERVAL_S.
        clock: Returns seconds.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        on_part: PartCallback,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._parameters, self._on_part, self._clock = parameters, on_part, clock
        self._handles: list[Any] = []
        self._last_said = clock()
        self._ready = 0
        self._step, self._part, self._parts = 0, 0, 1

    def __enter__(self) -> Self:
        """Register the hooks."""
        for parameter in self._parameters:
            handle = parameter.register_hook(self._gradient_ready)  # type: ignore[no-untyped-call]
            self._handles.append(handle)
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def begin_part(self, step: int, part: int, parts: int) -> None:
        """Note that a micro-batch begins.

        Args:
            step: The step, from 0.
            part: The micro-batch, from 0.
            parts: Micro-batches of the step in this process.
        """
        self._step, self._part, self._parts, self._ready = step, part, parts, 0
        self._say(0.0, "forward")

    def say(self, steps_done: float, words: str) -> None:
        """Report that something else than a micro-batch is done."""
        self._last_said = self._clock()
        self._on_part(steps_done, words)

    def _gradient_ready(self, gradient: torch.Tensor) -> None:
        self._ready += 1
        share = min(1.0, self._ready / len(self._parameters))
        self._say(FORWARD_SHARE + (1 - FORWARD_SHARE) * share, "backward")

    def _say(self, share_of_part: float, phase: str) -> None:
        if self._clock() - self._last_said < SAY_INTERVAL_S:
            return
        part = f", part {self._part + 1} of {self._parts}" if self._parts > 1 else ""
        fraction = (self._part + share_of_part) / self._parts
        self.say(self._step + fraction, f"step {self._step + 1}{part}: {phase} pass")
