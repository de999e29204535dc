"""Where weights run, here or behind a server: token ids in, token ids or log-probabilities out; or, of a chat route, words alone.

What an engine can give decides what is kept of a teacher: whole distributions are sampled, named heads keep their rest, words stay words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from persea.chat.messages import Conversation, Finish, Part
from persea.distributions import RowKind, Rows

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Abilities:
    """What an engine gives of each distribution.

    kind  FULL: all of it; TOPK_REST: the likeliest tokens exactly; WORDS: nothing but the text
    top   how many tokens are named; only with TOPK_REST
    """

    kind: RowKind
    top: int = 0


WHOLE = Abilities(RowKind.FULL)


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn: temperature 0 = the likeliest token each time; else from the likeliest tokens of mass top_p."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


@dataclass(frozen=True)
class Failed:
    """What came of one prompt where nothing could be got of it; why, in plain words."""

    why: str


class Engine(Protocol):
    """Token ids in, token ids or log-probabilities out."""

    @property
    def abilities(self) -> Abilities: ...

    def generate(self, prompts: Sequence[npt.NDArray[np.int32]], stop_ids: Sequence[int], max_new_tokens: int
                 ) -> Sequence[npt.NDArray[np.int32] | Failed]:
        """What follows each prompt, up to and including a stop id or until max_new_tokens."""
        ...

    def pieces(self, sequences: Sequence[npt.NDArray[np.int32]], learn: Sequence[npt.NDArray[np.bool_]]) -> Iterator[tuple[int, torch.Tensor]]:
        """What `score` gives, some rows at a time: (number of the sequence, its next rows), so that an answer of any length never stands
        whole beside a vocabulary. A sequence's rows come in order; those of several sequences may come in turns; one without learned
        tokens comes as a piece without rows."""
        ...

    def score(self, sequences: Sequence[npt.NDArray[np.int32]], learn: Sequence[npt.NDArray[np.bool_]]) -> Iterator[torch.Tensor]:
        """For each sequence, natural-log probabilities [learned tokens, vocabulary] of the distribution each learned token
        was drawn from: row k belongs to the k-th token with learn = True and is predicted by the token before it.
        Raises TeacherError where the engine has no whole distributions."""
        ...


@runtime_checkable
class Namer(Protocol):
    """An engine without whole distributions."""

    @property
    def abilities(self) -> Abilities: ...

    def named(self, sequences: Sequence[npt.NDArray[np.int32]], learn: Sequence[npt.NDArray[np.bool_]]) -> Iterator[Rows | Failed]:
        """For each sequence, a row of kind `abilities.kind` for each learned token."""
        ...


@runtime_checkable
class Talker(Protocol):
    """An engine behind a chat route: the server dresses the conversation itself; no token ids either way."""

    def say(self, conversations: Sequence[Conversation], max_new_tokens: int) -> Sequence[tuple[tuple[Part, ...], Finish] | Failed]:
        """One answer a conversation, in order, and how it ended."""
        ...
