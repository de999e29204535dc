"""Forward KL over common events, composed with cross-entropy so that every learned position carries total weight one.

For a position n on a boundary that teacher and student share, with teacher entries p(w) over raw teacher tokens, event
maps m_T and m_S (bridge), and student probabilities q:

    events_n = - sum_w p(w) log sum_{v: m_S(v) = m_T(w)} q(v)          (over w whose event is not -1; mass kept M_n)
    loss     = 1/N sum_n [ a events_n + (1 - a M_n) cross_entropy_n ]   (M_n = 0 where no common boundary stands)

It is linear in p, so unbiased for sampled rows. Scaling cross-entropy down everywhere instead made a six-language student
worse than no teacher (docs/diary.md): where events do not reach, full cross-entropy must stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from persea.bridge import Bridge
from persea.losses.token import LossOut


@dataclass(frozen=True)
class Targets:
    """What one teacher says about some of a batch's learned positions. M = entries.

    bridge     teacher -> student events
    row_M      which learned position (0..N-1) an entry belongs to
    ids_M      raw teacher ids
    probs_M    natural probabilities; those of one position sum to about 1
    """

    bridge: Bridge
    row_M: torch.Tensor
    ids_M: torch.Tensor
    probs_M: torch.Tensor


@dataclass(frozen=True)
class _Members:
    """The student tokens of some events, laid end to end. G = tokens; entry_G: which of the M events; token_G: the token."""

    entry_G: torch.Tensor
    token_G: torch.Tensor


def _members(event_M: torch.Tensor, bridge: Bridge) -> _Members:
    offsets, tokens = (torch.from_numpy(a).to(event_M.device) for a in bridge.members)
    sizes_M = offsets[event_M + 1] - offsets[event_M]
    if bool((sizes_M == 0).any()):
        raise AssertionError("an event without student tokens: every fixpoint is a token of both vocabularies")
    entry_G = torch.repeat_interleave(torch.arange(len(event_M), device=event_M.device), sizes_M)
    within_G = torch.arange(len(entry_G), device=event_M.device) - torch.repeat_interleave(sizes_M.cumsum(0) - sizes_M, sizes_M)
    return _Members(entry_G, tokens[offsets[event_M][entry_G] + within_G])


def _logsumexp(values_G: torch.Tensor, entry_G: torch.Tensor, m: int) -> torch.Tensor:
    """Of each of m groups. Exact: each group's own maximum is taken out, so that an event of probability 1e-60 counts too."""
    top_M = torch.full((m,), -torch.inf, dtype=values_G.dtype, device=values_G.device)
    top_M = top_M.scatter_reduce(0, entry_G, values_G.detach(), "amax")
    return torch.zeros_like(top_M).index_add(0, entry_G, (values_G - top_M[entry_G]).exp()).log() + top_M


def event_logprobs(logits_NV: torch.Tensor, lse_N: torch.Tensor, row_M: torch.Tensor, event_M: torch.Tensor, bridge: Bridge) -> torch.Tensor:
    """log of the student's probability of event_M at position row_M, natural, [M]; differentiable.

    Only the tokens of the events asked for are gathered: no [positions, events] matrix, no sort.
    """
    members = _members(event_M, bridge)
    values_G = logits_NV[row_M[members.entry_G], members.token_G]
    return _logsumexp(values_G, members.entry_G, len(event_M)) - lse_N[row_M]


class _Known(torch.autograd.Function):
    """A loss whose gradient is known: softmax / N less what is pulled up. Passes and memory are cross-entropy's own.

    Every position has total weight one, so the softmax's coefficient is 1 whatever the mix of events and text.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, loss: torch.Tensor, logprobs_NV: torch.Tensor, row_G: torch.Tensor, token_G: torch.Tensor,
                pull_G: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logprobs_NV, row_G, token_G, pull_G)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logprobs_NV, row_G, token_G, pull_G = ctx.saved_tensors
        scale = out / len(logprobs_NV)
        gradient_NV = logprobs_NV.exp().mul_(scale)
        gradient_NV.index_put_((row_G, token_G), pull_G * -scale, accumulate=True)
        return gradient_NV, None, None, None, None, None


def composed(logits_NV: torch.Tensor, targets_N: torch.Tensor, teachers: Sequence[Targets], event_share: float) -> LossOut:
    """The default objective; see the module's formula. Gradient with respect to logits_NV only.

    logits_NV    student logits at the N learned positions (float32); columns past the vocabulary must be cut off
    targets_N    the tokens that stand there
    teachers     what each teacher says; positions no teacher speaks of get full cross-entropy
    event_share  a, in [0, 1]
    """
    with torch.no_grad():
        logprobs_NV, n_N = torch.log_softmax(logits_NV, dim=-1), torch.arange(len(targets_N), device=logits_NV.device)
        ce_N = -logprobs_NV[n_N, targets_N]
        mass_N, events_N = torch.zeros_like(ce_N), torch.zeros_like(ce_N)
        rows, tokens, pulls = [n_N], [targets_N], []
        for said in teachers:
            event_M = torch.from_numpy(said.bridge.teacher_event_W)[said.ids_M].long()
            kept = event_M >= 0
            row_M, probs_M = said.row_M[kept].to(ce_N.device), said.probs_M[kept].to(ce_N.device, ce_N.dtype)
            members = _members(event_M[kept].to(ce_N.device), said.bridge)
            values_G = logprobs_NV[row_M[members.entry_G], members.token_G]
            event_logprobs_M = _logsumexp(values_G, members.entry_G, len(row_M))
            mass_N.index_add_(0, row_M, probs_M)
            events_N.index_add_(0, row_M, -probs_M * event_logprobs_M)
            rows.append(row_M[members.entry_G])
            tokens.append(members.token_G)
            pulls.append(event_share * probs_M[members.entry_G] * (values_G - event_logprobs_M[members.entry_G]).exp())
        text_N = 1 - event_share * mass_N
        loss = (event_share * events_N + text_N * ce_N).mean()
        spoken = max(1, int((mass_N > 0).sum()))
        terms = {"cross_entropy": float(ce_N.mean()), "events": float(events_N.sum() / spoken)}
        pull_G = torch.cat([text_N, *pulls])
    known = _Known.apply(logits_NV, loss, logprobs_NV, torch.cat(rows), torch.cat(tokens), pull_G)  # type: ignore[no-untyped-call]
    return LossOut(known, terms, len(targets_N))
