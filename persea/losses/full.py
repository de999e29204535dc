"""Any divergence over common events, from a teacher's whole distributions (rows of kind FULL, a teacher in the loop).

Both sides are masked to what can stand where both tokenizers have a boundary, an event that only one of them can still say is
dropped, and both are renormalised: they are then conditional distributions of the same future, equal for two exact models of one
law wherever the maps agree. For training beside
cross-entropy use `composed`, which needs no normaliser. The same tokenizer on both sides gives the ordinary divergence, bit
for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from persea.bridge import Bridge
from persea.errors import DataError
from persea.losses.token import Divergence, LossOut, between, same_vocabulary


@dataclass(frozen=True)
class Dead:
    """Tokens that cannot stand, by position: row_D, token_D (int64)."""

    row_D: torch.Tensor
    token_D: torch.Tensor


def over_events(logprobs_NX: torch.Tensor, event_X: torch.Tensor, events: int, dead: Dead | None = None) -> torch.Tensor:
    """Natural logs of the mass of each event [N, E], from log-probabilities over tokens; -inf where nothing of it can stand.

    event_X  event of each token, -1 = left out. Differentiable; linear in positions: one segment sum, no sort.
    """
    if dead is not None and len(dead.row_D):
        nothing = torch.full((), -torch.inf, dtype=logprobs_NX.dtype, device=logprobs_NX.device)
        logprobs_NX = logprobs_NX.index_put((dead.row_D.to(nothing.device), dead.token_D.to(nothing.device)), nothing)
    kept = event_X >= 0
    top_N1 = logprobs_NX[:, kept].detach().amax(-1, keepdim=True)
    mass_NE = torch.zeros(len(logprobs_NX), events, dtype=logprobs_NX.dtype, device=logprobs_NX.device)
    mass_NE = mass_NE.index_add(1, event_X[kept], (logprobs_NX[:, kept] - top_N1).exp())
    return torch.where(mass_NE > 0, mass_NE, 1.0).log().masked_fill(mass_NE == 0, -torch.inf) + top_N1


def full(logits_NV: torch.Tensor, teacher_logprobs_NW: torch.Tensor, bridge: Bridge, divergence: Divergence = Divergence.FORWARD, *,
         student_dead: Dead | None = None, teacher_dead: Dead | None = None) -> LossOut:
    """Mean divergence over events, nats per position.

    logits_NV            student logits at N common boundaries
    teacher_logprobs_NW  the teacher's natural log-probabilities there
    student_dead, teacher_dead  what cannot stand (`Mask.dead`); None = no masks
    Raises DataError where a side has other columns than the bridge knows tokens.
    """
    for name, columns, tokens in (("student", logits_NV.shape[1], len(bridge.student_event_V)),
                                  ("teacher", teacher_logprobs_NW.shape[1], len(bridge.teacher_event_W))):
        if columns != tokens:
            raise DataError(f"{columns} {name} columns, but its tokenizer has {tokens} tokens", where="losses", remedy="cut the padded columns off")
    if bridge.identical and student_dead is None and teacher_dead is None:
        return same_vocabulary(logits_NV, teacher_logprobs_NW, divergence)
    event_V, event_W = (torch.from_numpy(e).long().to(logits_NV.device) for e in (bridge.student_event_V, bridge.teacher_event_W))
    log_q_NE = over_events(torch.log_softmax(logits_NV, -1), event_V, bridge.events, student_dead)
    log_p_NE = over_events(teacher_logprobs_NW.to(logits_NV.device), event_W, bridge.events, teacher_dead)
    nobody = (log_p_NE == -torch.inf) | (log_q_NE == -torch.inf)  # else a mask on one side alone makes a divergence infinite
    log_p_NE, log_q_NE = (_normalised(side.masked_fill(nobody, -torch.inf)) for side in (log_p_NE, log_q_NE))
    loss = between(log_p_NE, log_q_NE, divergence).mean()
    return LossOut(loss, {divergence.value: float(loss.detach())}, len(logits_NV))


def _normalised(log_NE: torch.Tensor) -> torch.Tensor:
    return log_NE - log_NE.logsumexp(-1, keepdim=True)
