"""Sums of token probabilities over events.

Most events hold one token, whose value is copied; only the tokens of the other events are added up.
Between Llama 3 and Qwen 3, 22,170 of Llama's 128,256 tokens share an event with another token;
between Gemma 3 and Llama 3, 192,183 of Gemma's 262,145.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class ImpossibleTokens:
    """Tokens that cannot occur at a position: no text keeps the other tokenizer's boundary there.

    Attributes:
        row_D: int64, position of each impossible token.
        token_D: int64, the token.
    """

    row_D: torch.Tensor
    token_D: torch.Tensor


@dataclass(frozen=True, eq=False)
class EventGroups:
    """Index tables to sum X tokens over E events.

    M of the events hold several tokens, G tokens together, in the order of events. Indices are
    int32 where torch gathers by them, which is a third faster.

    Attributes:
        event_X: event of each token; any event for an ignored token.
        ignored_token_L: tokens without an event.
        empty_event_U: events without a token.
        gathered_token_Z: tokens to gather, Z = E + G: one token of each event (any token for an
            empty event), then token_G.
        slot_X: where in gathered_token_Z each token counts: at its event, or among the G; -1 =
            ignored.
        token_G: tokens of the events with several tokens.
        group_G: which of the M events each of them belongs to.
        event_M: the events with several tokens.
        size_M: number of tokens of each.
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
        """Return a copy on another device."""
        return EventGroups(**{name: side.to(device) for name, side in vars(self).items()})

    def log_event_masses(
        self,
        logs_NX: torch.Tensor,
        impossible_tokens: ImpossibleTokens | None = None,
        top_N1: torch.Tensor | None = None,
        with_shares: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum token probabilities over events, without an autograd graph.

        Impossible tokens are removed from the gathered values, so that no copy of all X columns is
        made. Each event's own maximum is subtracted, so that an event of probability e^-120 counts
        too. segment_reduce adds in the order of tokens, also on a GPU, where index_add's order
        varies.

        Args:
            logs_NX: log-probabilities or logits of N positions.
            impossible_tokens: tokens to leave out; None = none.
            top_N1: value subtracted from every log of a row; None = nothing.
            with_shares: whether to compute the second result.

        Returns:
            Log mass of each event [N, E], -inf for mass 0, and the share of each of the G tokens in
            the mass of its event [N, G].
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
        """Map a gradient of log event masses to a gradient of token logs, [N, X].

        Args:
            grad_NE: gradient of the log masses; must be 0 where a log mass is -inf.
            share_NG: shares that `log_event_masses` returned.
        """
        if not grad_NE.shape[1]:
            return grad_NE.new_zeros(len(grad_NE), len(self.event_X))
        grad_NX = select_columns(grad_NE, self.event_X)
        if len(self.ignored_token_L):
            grad_NX.index_fill_(1, self.ignored_token_L, 0)
        if len(self.event_M):
            _write_columns(
                grad_NX, self.token_G, select_columns(grad_NX, self.token_G).mul_(share_NG)
            )
        return grad_NX

    def _segment_reduce(self, values_NG: torch.Tensor, how: str) -> torch.Tensor:
        sizes = self.size_M if len(values_NG) == 1 else self.size_M.repeat(len(values_NG))
        return torch.segment_reduce(values_NG.flatten(), how, lengths=sizes, unsafe=True).view(
            len(values_NG), -1
        )


def select_columns(values_NX: torch.Tensor, index_Y: torch.Tensor) -> torch.Tensor:
    """Select columns; a single row is indexed without strides, which takes a quarter less time."""
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
    """Build the index tables of a map from tokens to events.

    Args:
        event_X: integer event of each token; -1 = ignored.
        events: number of events E.
    """
    event_X = event_X.cpu().long()
    has_event_X = event_X >= 0
    order = event_X.argsort(stable=True)[int((~has_event_X).sum()) :]
    size_E = torch.bincount(event_X[has_event_X], minlength=events)
    first_E = size_E.cumsum(0) - size_E
    token_E = order[first_E.clamp(max=len(order) - 1)] if len(order) else first_E
    several_E = size_E > 1
    token_G = order[several_E[event_X[order]]]
    size_M = size_E[several_E]
    group_G = torch.arange(len(size_M)).repeat_interleave(size_M)
    slot_X = event_X.clone()
    slot_X[token_G] = torch.arange(len(token_G)) + events
    return EventGroups(
        event_X.clamp(min=0).int(),
        (~has_event_X).nonzero().flatten(),
        (size_E == 0).nonzero().flatten(),
        torch.cat([token_E, token_G]).int(),
        slot_X,
        token_G.int(),
        group_G.int(),
        several_E.nonzero().flatten(),
        size_M,
    )


_EVENT_GROUPS_CACHE: dict[tuple[int, torch.device], EventGroups] = {}


def cached_event_groups(
    event_X: npt.NDArray[np.int32], events: int, device: torch.device
) -> EventGroups:
    """Return the index tables of an event map, cached for each device.

    On-policy training needs them at every position. The cache entry is dropped with the map.
    """
    key = (id(event_X), device)
    if key not in _EVENT_GROUPS_CACHE:
        _EVENT_GROUPS_CACHE[key] = build_event_groups(torch.from_numpy(event_X), events).to(device)
        weakref.finalize(event_X, _EVENT_GROUPS_CACHE.pop, key, None)
    return _EVENT_GROUPS_CACHE[key]
