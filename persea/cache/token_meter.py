"""Count the tokens that an attempt at a unit pays for, answers that are left out included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.teachers.engines import Engine, EngineFailure
from persea.teachers.teacher import Answer, Teacher


class TokenMeter:
    """An engine that counts the tokens of the prompts it continues, and of its answers.

    Args:
        engine: The engine that works; everything but `generate` and `reporting` is its own.

    Attributes:
        num_tokens: Prompt and answer tokens so far.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.num_tokens = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(
        self, prompts: Sequence[npt.NDArray[np.int32]], stop_ids: Sequence[int], max_new_tokens: int
    ) -> Sequence[npt.NDArray[np.int32] | EngineFailure]:
        """Generate with the engine, and count."""
        results = self._engine.generate(prompts, stop_ids, max_new_tokens)
        self.num_tokens += sum(map(len, prompts))
        self.num_tokens += sum(len(r) for r in results if not isinstance(r, EngineFailure))
        return results

    def reporting(self, on_progress: Callable[[float], None]) -> TokenMeter:
        """Report the progress of the engine, and keep counting here."""
        reporting = getattr(self._engine, "reporting", None)
        if reporting is not None:
            self._engine = reporting(on_progress)
        return self


def tokens_paid(
    teacher: Teacher, meter: TokenMeter, server_tokens_before: int, answers: Sequence[Answer]
) -> int:
    """Return the tokens of all conversations of an attempt.

    A server's tokens are those that its answers report, repeated requests and scores included: what
    its owner pays. Elsewhere each conversation counts once.

    Args:
        teacher: The teacher, with or without the meter.
        meter: Counted the answers that the teacher wrote.
        server_tokens_before: `server_tokens` of the teacher before the attempt.
        answers: All answers of the attempt; given ones and documents were only read.
    """
    if getattr(teacher.engine, "client", None) is not None:
        return server_tokens(teacher) - server_tokens_before
    read = [a.conversation for a in answers if not a.is_own and teacher.can_render(a.conversation)]
    return meter.num_tokens + sum(len(teacher.renderer.render(c)) for c in read)


def server_tokens(teacher: Teacher) -> int:
    """Return the tokens that a teacher's server has been asked for so far; 0 without a server."""
    client = getattr(teacher.engine, "client", None)
    return 0 if client is None else int(client.num_tokens_used)
