"""Where weights run; an engine knows token ids only, never words or templates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch


class Engine(Protocol):
    """Token ids in, token ids or log-probabilities out."""

    def generate(self, prompts: Sequence[npt.NDArray[np.int32]], stop_ids: Sequence[int], max_new_tokens: int) -> list[npt.NDArray[np.int32]]:
        """What follows each prompt, greedily, up to and including a stop id or until max_new_tokens."""
        ...

    def pieces(self, sequences: Sequence[npt.NDArray[np.int32]], learn: Sequence[npt.NDArray[np.bool_]]) -> Iterator[tuple[int, torch.Tensor]]:
        """What `score` gives, some rows at a time: (number of the sequence, its next rows), so that an answer of any length never stands
        whole beside a vocabulary. A sequence's rows come in order; those of several sequences may come in turns; one without learned
        tokens comes as a piece without rows."""
        ...

    def score(self, sequences: Sequence[npt.NDArray[np.int32]], learn: Sequence[npt.NDArray[np.bool_]]) -> Iterator[torch.Tensor]:
        """For each sequence, natural-log probabilities [learned tokens, vocabulary] of the distribution each learned token
        was drawn from: row k belongs to the k-th token with learn = True and is predicted by the token before it."""
        ...
