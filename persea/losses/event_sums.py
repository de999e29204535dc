"""A map of tokens to events as sums over it want it: most events hold one token, which is copied; only the tokens of the others are added up.

Of Llama 3's 128,256 tokens 22,170 share an event with another where the other side is Qwen 3; of Gemma 3's 262,145 beside Llama 3, 192,183.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class ImpossibleTokens:
    """Tokens that cannot stand, by position: row_D, token_D (int64)."""

    row_D: torch.Tensor
    token_D: torch.Tensor


@dataclass(frozen=True, eq=False)
class EventGroups:
    """X tokens over E events, of which M hold several: G tokens, event by event. Indices are int32 where torch gathers by them: a third faster.

    event_X  event of each token; of one that is left out, any
    left_L   tokens that are left out
    none_U   events without tokens
    token_Z  what is gathered, Z = E + G: a token of each event (of one without tokens, any), then token_G
    slot_X   where in that each token counts: at its event, or among the G; -1 = left out
    token_G, of_G     token, and which of the M it belongs to
    event_M, size_M   event, and how many tokens
    """

    event_X: torch.Tensor
    ignored_token_L: torch.Tensor
    empty_event_U: torch.Tensor
    gathered_token_Z: torch.Tensor
    slot_X: torch.Tensor
    token_G: torch.Tensor
    group_G: torch.Tensor
    event_M: torch.Tensor
    size_M: torch.Tensor

    def to(self, device: torch.device) -> EventGroups:
        return EventGroups(**{name: side.to(device) for name, side in vars(self).items()})

    def log_event_masses(
        self,
        logs_NX: torch.Tensor,
        impossible_tokens: ImpossibleTokens | None = None,
        top_N1: torch.Tensor | None = None,
        with_shares: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logs of each event's mass [N, E], -inf where there is none, and each shared event's tokens' shares of it [N, G] if `shares`; no graph.

        top_N1 is taken from every log. What is dead is struck out of what was gathered: nothing as large as X is copied. Each event's own
        maximum is taken out: an event of e^-120 counts too. segment_reduce adds up in the order of tokens, on a GPU too, where index_add's
        order is never the same.
        """
        logs_NZ = select_columns(logs_NX, self.gathered_token_Z)
        if top_N1 is not None:
            logs_NZ.sub_(top_N1)
        if impossible_tokens is not None and len(impossible_tokens.row_D):
            slot_D = self.slot_X[impossible_tokens.token_D.to(logs_NX.device)]
            known_D = slot_D >= 0
            logs_NZ.index_put_(
                (impossible_tokens.row_D.to(logs_NX.device)[known_D], slot_D[known_D]),
                logs_NZ.new_full((), -torch.inf),
            )
        events = len(self.gathered_token_Z) - len(self.token_G)
        log_NE, share_NG = logs_NZ[:, :events], logs_NZ[:, events:]
        if len(self.empty_event_U):
            log_NE.index_fill_(1, self.empty_event_U, -torch.inf)
        if len(self.event_M):
            top_NM = self._segment_reduce(share_NG, "max")
            top_NM.masked_fill_(top_NM == -torch.inf, 0)
            mass_NM = self._segment_reduce(
                share_NG.sub_(select_columns(top_NM, self.group_G)).exp_(), "sum"
            )
            _write_columns(log_NE, self.event_M, mass_NM.log().add_(top_NM))
            if with_shares:
                share_NG.div_(select_columns(mass_NM.masked_fill_(mass_NM == 0, 1), self.group_G))
        return log_NE, share_NG

    def token_gradient(self, grad_NE: torch.Tensor, share_NG: torch.Tensor) -> torch.Tensor:
        """The gradient with respect to tokens [N, X] of one with respect to logs of events, which must be 0 where these are -inf."""
        if not grad_NE.shape[1]:
            return grad_NE.new_zeros(len(grad_NE), len(self.event_X))
        pull_NX = select_columns(grad_NE, self.event_X)
        if len(self.ignored_token_L):
            pull_NX.index_fill_(1, self.ignored_token_L, 0)
        if len(self.event_M):
            _write_columns(
                pull_NX, self.token_G, select_columns(pull_NX, self.token_G).mul_(share_NG)
            )
        return pull_NX

    def _segment_reduce(self, values_NG: torch.Tensor, how: str) -> torch.Tensor:
        sizes = self.size_M if len(values_NG) == 1 else self.size_M.repeat(len(values_NG))
        return torch.segment_reduce(values_NG.flatten(), how, lengths=sizes, unsafe=True).view(
            len(values_NG), -1
        )


def select_columns(values_NX: torch.Tensor, index_Y: torch.Tensor) -> torch.Tensor:
    """Columns of a matrix; of a single row without the strides, which takes a quarter less."""
    return (
        values_NX[0].index_select(0, index_Y)[None]
        if len(values_NX) == 1
        else values_NX.index_select(1, index_Y)
    )


def _write_columns(values_NX: torch.Tensor, index_Y: torch.Tensor, new_NY: torch.Tensor) -> None:
    if len(values_NX) == 1:
        values_NX[0].scatter_(0, index_Y.long(), new_NY[0])
    else:
        values_NX.index_copy_(1, index_Y.long(), new_NY)


def build_event_groups(event_X: torch.Tensor, events: int) -> EventGroups:
    """Groups of a map; -1 = left out."""
    event_X = event_X.cpu().long()
    kept_X = event_X >= 0
    order = event_X.argsort(stable=True)[int((~kept_X).sum()) :]
    size_E = torch.bincount(event_X[kept_X], minlength=events)
    first_E = size_E.cumsum(0) - size_E
    token_E = order[first_E.clamp(max=len(order) - 1)] if len(order) else first_E
    several_E = size_E > 1
    token_G = order[several_E[event_X[order]]]
    size_M = size_E[several_E]
    of_G = torch.arange(len(size_M)).repeat_interleave(size_M)
    slot_X = event_X.clone()
    slot_X[token_G] = torch.arange(len(token_G)) + events
    return EventGroups(
        event_X.clamp(min=0).int(),
        (~kept_X).nonzero().flatten(),
        (size_E == 0).nonzero().flatten(),
        torch.cat([token_E, token_G]).int(),
        slot_X,
        token_G.int(),
        of_G.int(),
        several_E.nonzero().flatten(),
        size_M,
    )


_EVENT_GROUPS_CACHE: dict[tuple[int, torch.device], EventGroups] = {}


def cached_event_groups(
    event_X: npt.NDArray[np.int32], events: int, device: torch.device
) -> EventGroups:
    """Groups of a bridge's map, made once for each device and forgotten with the map: on-policy asks for them at every position."""
    key = (id(event_X), device)
    if key not in _EVENT_GROUPS_CACHE:
        _EVENT_GROUPS_CACHE[key] = build_event_groups(torch.from_numpy(event_X), events).to(device)
        weakref.finalize(event_X, _EVENT_GROUPS_CACHE.pop, key, None)
    return _EVENT_GROUPS_CACHE[key]
