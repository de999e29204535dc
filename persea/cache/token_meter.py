"""Count the tokens that an attempt at a unit pays for, answers that are left out included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.teachers.engines import Engine, EngineFailure, GeneratedTokens, Reducer
from persea.teachers.teacher import Teacher


class TokenMeter:
    """An engine that counts the tokens of the prompts it continues, and of its answers.

    Args:
        engine: The engine that works; everything but generating and `reporting` is its own.

    Attributes:
        lengths: Tokens of each prompt with its answer, in the order of the prompts.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.lengths: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(
        self, prompts: Sequence[npt.NDArray[np.int32]], stop_ids: Sequence[int], max_new_tokens: int
    ) -> Sequence[npt.NDArray[np.int32] | EngineFailure]:
        """Generate with the engine, and count."""
        results = self._engine.generate(prompts, stop_ids, max_new_tokens)
        self.lengths += [
            len(prompt) + (0 if isinstance(result, EngineFailure) else len(result))
            for prompt, result in zip(prompts, results, strict=True)
        ]
        return results

    def generate_with_distributions(
        self,
        prompts: Sequence[npt.NDArray[np.int32]],
        stop_ids: Sequence[int],
        max_new_tokens: int,
        reducer: Reducer,
    ) -> Sequence[GeneratedTokens | EngineFailure]:
        """Generate with the engine, and count."""
        results = self._engine.generate_with_distributions(
            prompts, stop_ids, max_new_tokens, reducer
        )
        self.lengths += [
            len(prompt) + (0 if isinstance(result, EngineFailure) else len(result.ids_T))
            for prompt, result in zip(prompts, results, strict=True)
        ]
        return results

    def reporting(self, on_progress: Callable[[float], None]) -> TokenMeter:
        """Report the progress of the engine, and keep counting here."""
        reporting = getattr(self._engine, "reporting", None)
        if reporting is not None:
            self._engine = reporting(on_progress)
        return self


def server_tokens(teacher: Teacher) -> int:
    """Return the tokens that a teacher's server has been asked for so far; 0 without a server."""
    client = getattr(teacher.engine, "client", None)
    return 0 if client is None else int(client.num_tokens_used)
