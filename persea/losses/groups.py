"""A map of tokens to events as sums over it want it: most events hold one token, which is copied; only the tokens of the others are added up.

Of Llama 3's 128,256 tokens 22,170 share an event with another where the other side is Qwen 3; of Gemma 3's 262,145 beside Llama 3, 192,183.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, eq=False)
class Groups:
    """X tokens over E events, of which M hold several: G tokens, event by event. Indices are int32 where torch gathers by them: a third faster.

    event_X  event of each token; of one that is left out, any
    left_L   tokens that are left out
    token_E  a token of each event; of an event without tokens, any
    none_U   events without tokens
    token_G, of_G     token, and which of the M it belongs to
    event_M, size_M   event, and how many tokens
    """

    event_X: torch.Tensor
    left_L: torch.Tensor
    token_E: torch.Tensor
    none_U: torch.Tensor
    token_G: torch.Tensor
    of_G: torch.Tensor
    event_M: torch.Tensor
    size_M: torch.Tensor

    def to(self, device: torch.device) -> Groups:
        return Groups(**{name: side.to(device) for name, side in vars(self).items()})

    def masses(self, logs_NX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logs of each event's mass [N, E], -inf where there is none, and each shared event's tokens' shares of it [N, G]; no graph.

        Each event's own maximum is taken out: an event of e^-120 counts too. segment_reduce adds up in the order of tokens, on a GPU
        too, where index_add's order is never the same.
        """
        log_NE, share_NG = pick(logs_NX, self.token_E), pick(logs_NX, self.token_G)
        if len(self.none_U):
            log_NE.index_fill_(1, self.none_U, -torch.inf)
        if len(self.event_M):
            top_NM = self._reduced(share_NG, "max")
            top_NM.masked_fill_(top_NM == -torch.inf, 0)
            mass_NM = self._reduced(share_NG.sub_(pick(top_NM, self.of_G)).exp_(), "sum")
            _put(log_NE, self.event_M, mass_NM.log().add_(top_NM))
            share_NG.div_(pick(mass_NM.masked_fill_(mass_NM == 0, 1), self.of_G))
        return log_NE, share_NG

    def to_tokens(self, pull_NE: torch.Tensor, share_NG: torch.Tensor) -> torch.Tensor:
        """The gradient with respect to tokens [N, X] of one with respect to logs of events, which must be 0 where these are -inf."""
        if not pull_NE.shape[1]:
            return pull_NE.new_zeros(len(pull_NE), len(self.event_X))
        pull_NX = pick(pull_NE, self.event_X)
        if len(self.left_L):
            pull_NX.index_fill_(1, self.left_L, 0)
        if len(self.event_M):
            _put(pull_NX, self.token_G, pick(pull_NX, self.token_G).mul_(share_NG))
        return pull_NX

    def _reduced(self, values_NG: torch.Tensor, how: str) -> torch.Tensor:
        sizes = self.size_M if len(values_NG) == 1 else self.size_M.repeat(len(values_NG))
        return torch.segment_reduce(values_NG.flatten(), how, lengths=sizes, unsafe=True).view(len(values_NG), -1)


def pick(values_NX: torch.Tensor, index_Y: torch.Tensor) -> torch.Tensor:
    """Columns of a matrix; of a single row without the strides, which takes a quarter less."""
    return values_NX[0].index_select(0, index_Y)[None] if len(values_NX) == 1 else values_NX.index_select(1, index_Y)


def _put(values_NX: torch.Tensor, index_Y: torch.Tensor, of_NY: torch.Tensor) -> None:
    if len(values_NX) == 1:
        values_NX[0].scatter_(0, index_Y.long(), of_NY[0])
    else:
        values_NX.index_copy_(1, index_Y.long(), of_NY)


def laid(event_X: torch.Tensor, events: int) -> Groups:
    """Groups of a map; -1 = left out."""
    event_X = event_X.cpu().long()
    kept_X = event_X >= 0
    order = event_X.argsort(stable=True)[int((~kept_X).sum()):]
    size_E = torch.bincount(event_X[kept_X], minlength=events)
    first_E = size_E.cumsum(0) - size_E
    token_E = order[first_E.clamp(max=len(order) - 1)] if len(order) else first_E
    several_E = size_E > 1
    token_G = order[several_E[event_X[order]]]
    size_M = size_E[several_E]
    of_G = torch.arange(len(size_M)).repeat_interleave(size_M)
    return Groups(event_X.clamp(min=0).int(), (~kept_X).nonzero().flatten(), token_E.int(), (size_E == 0).nonzero().flatten(), token_G.int(),
                  of_G.int(), several_E.nonzero().flatten(), size_M)


_KEPT: dict[tuple[int, torch.device], Groups] = {}


def kept(event_X: npt.NDArray[np.int32], events: int, device: torch.device) -> Groups:
    """Groups of a bridge's map, made once for each device and forgotten with the map: on-policy asks for them at every position."""
    key = (id(event_X), device)
    if key not in _KEPT:
        _KEPT[key] = laid(torch.from_numpy(event_X), events).to(device)
        weakref.finalize(event_X, _KEPT.pop, key, None)
    return _KEPT[key]
