"""Where weights run, here or behind a server: token ids in, token ids or log-probabilities out; or, of a chat route, words alone.

What an engine can give decides what is kept of a teacher: whole distributions are sampled, named heads keep their rest, words stay words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from persea.chat.messages import ContentPart, Conversation, FinishReason
from persea.distributions import DistributionKind, SparseDistributions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EngineCapabilities:
    """What an engine gives of each distribution.

    kind  FULL: all of it; TOPK_REST: the likeliest tokens exactly; WORDS: nothing but the text
    top   how many tokens are named; only with TOPK_REST
    """

    kind: DistributionKind
    num_top_logprobs: int = 0


FULL_DISTRIBUTIONS = EngineCapabilities(DistributionKind.FULL)


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn: temperature 0 = the likeliest token each time; else from the likeliest tokens of mass top_p."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


@dataclass(frozen=True)
class EngineFailure:
    """What came of one prompt where nothing could be got of it; why, in plain words."""

    reason: str


class Engine(Protocol):
    """Token ids in, token ids or log-probabilities out."""

    @property
    def capabilities(self) -> EngineCapabilities: ...

    def generate(
        self, prompts: Sequence[npt.NDArray[np.int32]], stop_ids: Sequence[int], max_new_tokens: int
    ) -> Sequence[npt.NDArray[np.int32] | EngineFailure]:
        """What follows each prompt, up to and including a stop id or until max_new_tokens."""
        ...

    def iter_logprobs(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """What `score` gives, some rows at a time: (number of the sequence, its next rows), so that an answer of any length never stands
        whole beside a vocabulary. A sequence's rows come in order; those of several sequences may come in turns; one without learned
        tokens comes as a piece without rows.
        """
        ...

    def compute_logprobs(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[torch.Tensor]:
        """For each sequence, natural-log probabilities [learned tokens, vocabulary] of the distribution each learned token
        was drawn from: row k belongs to the k-th token with learn = True and is predicted by the token before it.
        Raises TeacherError where the engine has no whole distributions.
        """
        ...


@runtime_checkable
class SparseEngine(Protocol):
    """An engine without whole distributions."""

    @property
    def capabilities(self) -> EngineCapabilities: ...

    def compute_sparse_distributions(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[SparseDistributions | EngineFailure]:
        """For each sequence, a row of kind `abilities.kind` for each learned token."""
        ...


@runtime_checkable
class ChatEngine(Protocol):
    """An engine behind a chat route: the server dresses the conversation itself; no token ids either way."""

    def chat(
        self, conversations: Sequence[Conversation], max_new_tokens: int
    ) -> Sequence[tuple[tuple[ContentPart, ...], FinishReason] | EngineFailure]:
        """One answer a conversation, in order, and how it ended."""
        ...
