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

import torch
import torch.nn.functional as F

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


def event_logprobs(logits_NV: torch.Tensor, lse_N: torch.Tensor, row_M: torch.Tensor, event_M: torch.Tensor, bridge: Bridge) -> torch.Tensor:
    """log of the student's probability of event_M at position row_M, natural, [M].

    Only the tokens of the events asked for are gathered: no [positions, events] matrix, no sort. Exact in log space
    (each event's own maximum is taken out), so that an event of probability 1e-60 still has its gradient.
    """
    offsets, tokens = (torch.from_numpy(a).to(logits_NV.device) for a in bridge.members)
    sizes_M = offsets[event_M + 1] - offsets[event_M]
    if bool((sizes_M == 0).any()):
        raise AssertionError("an event without student tokens: every fixpoint is a token of both vocabularies")
    entry_G = torch.repeat_interleave(torch.arange(len(event_M), device=logits_NV.device), sizes_M)
    within_G = torch.arange(len(entry_G), device=logits_NV.device) - torch.repeat_interleave(sizes_M.cumsum(0) - sizes_M, sizes_M)
    values_G = logits_NV[row_M[entry_G], tokens[offsets[event_M][entry_G] + within_G]]
    top_M = torch.full((len(event_M),), -torch.inf, dtype=values_G.dtype, device=values_G.device)
    top_M = top_M.scatter_reduce(0, entry_G, values_G.detach(), "amax")
    mass_M = torch.zeros_like(top_M).index_add(0, entry_G, (values_G - top_M[entry_G]).exp())
    return mass_M.log() + top_M - lse_N[row_M]


def composed(logits_NV: torch.Tensor, targets_N: torch.Tensor, teachers: Sequence[Targets], event_share: float) -> LossOut:
    """The default objective; see the module's formula.

    logits_NV    student logits at the N learned positions (float32); columns past the vocabulary must be cut off
    targets_N    the tokens that stand there
    teachers     what each teacher says; positions no teacher speaks of get full cross-entropy
    event_share  a, in [0, 1]
    """
    lse_N = torch.logsumexp(logits_NV, dim=-1)
    ce_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
    mass_N, events_N = torch.zeros_like(ce_N), torch.zeros_like(ce_N)
    for said in teachers:
        event_M = torch.from_numpy(said.bridge.teacher_event_W)[said.ids_M].long()
        kept = event_M >= 0
        row_M, probs_M = said.row_M[kept].to(ce_N.device), said.probs_M[kept].to(ce_N.device, ce_N.dtype)
        mass_N = mass_N.index_add(0, row_M, probs_M)
        logprobs_M = event_logprobs(logits_NV, lse_N, row_M, event_M[kept].to(ce_N.device), said.bridge)
        events_N = events_N.index_add(0, row_M, -probs_M * logprobs_M)
    loss = (event_share * events_N + (1 - event_share * mass_N) * ce_N).mean()
    spoken = max(1, int((mass_N > 0).sum()))
    terms = {"cross_entropy": float(ce_N.detach().mean()), "events": float(events_N.detach().sum() / spoken)}
    return LossOut(loss, terms, len(targets_N))
