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
from persea.losses.token import Divergence, LossOut, between, refuse_divergence, same_vocabulary
from persea.rows import RowKind


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
    logprobs_NX, event_X = logprobs_NX[:, kept], event_X[kept]
    none_NE = torch.full((len(logprobs_NX), events), -torch.inf, dtype=logprobs_NX.dtype, device=logprobs_NX.device)
    top_NE = none_NE.scatter_reduce(1, event_X.expand(len(logprobs_NX), -1), logprobs_NX.detach(), "amax")  # an event of e^-120 counts too
    nothing_NE = top_NE == -torch.inf
    top_NE = top_NE.masked_fill(nothing_NE, 0)
    mass_NE = torch.zeros_like(none_NE).index_add(1, event_X, (logprobs_NX - top_NE[:, event_X]).exp())
    return mass_NE.masked_fill(nothing_NE, 1).log().masked_fill(nothing_NE, -torch.inf) + top_NE


@dataclass(frozen=True, eq=False)
class Sides:
    """How a teacher's whole distributions lie over a student's.

    student_dead, teacher_dead  what cannot stand (`Mask.dead`); None = no masks
    """

    bridge: Bridge
    student_dead: Dead | None = None
    teacher_dead: Dead | None = None

    @property
    def same(self) -> bool:
        """Whether both sides are one vocabulary and nothing is masked: then this is the ordinary divergence."""
        return self.bridge.identical and self.student_dead is None and self.teacher_dead is None

    def ordered(self) -> Sides:
        """The same, what is dead in the order of positions."""
        return Sides(self.bridge, *(None if dead is None else _in_order(dead) for dead in (self.student_dead, self.teacher_dead)))


def full(logits_NV: torch.Tensor, teacher_logprobs_NW: torch.Tensor, bridge: Bridge, divergence: Divergence = Divergence.FORWARD, *,
         kind: RowKind = RowKind.FULL, student_dead: Dead | None = None, teacher_dead: Dead | None = None) -> LossOut:
    """Mean divergence over events, nats per position.

    logits_NV            student logits at N common boundaries
    teacher_logprobs_NW  the teacher's natural log-probabilities there
    student_dead, teacher_dead  what cannot stand (`Mask.dead`); None = no masks
    kind                 what the teacher's rows are: anything but FULL is refused where the divergence needs more
    Raises DataError where a side has other columns than the bridge knows tokens, or where nothing can stand at a position.
    """
    refuse_divergence(kind, divergence)
    sides = Sides(bridge, student_dead, teacher_dead)
    if sides.same:
        _refuse_columns(logits_NV, teacher_logprobs_NW, bridge)
        return same_vocabulary(logits_NV, teacher_logprobs_NW, divergence)
    loss = full_rows(logits_NV, teacher_logprobs_NW, sides, divergence).mean()
    return LossOut(loss, {divergence.value: float(loss.detach())}, len(logits_NV))


def full_rows(logits_NV: torch.Tensor, teacher_logprobs_NW: torch.Tensor, sides: Sides, divergence: Divergence, some: slice | None = None
              ) -> torch.Tensor:
    """`full`, position by position [N]. some: which of the positions that `sides` masks, in order, these are; None = all."""
    bridge = sides.bridge
    _refuse_columns(logits_NV, teacher_logprobs_NW, bridge)
    event_V, event_W = (torch.from_numpy(e).long().to(logits_NV.device) for e in (bridge.student_event_V, bridge.teacher_event_W))
    student_dead, teacher_dead = (_within(dead, some) for dead in (sides.student_dead, sides.teacher_dead))
    log_q_NE = over_events(torch.log_softmax(logits_NV, -1), event_V, bridge.events, student_dead)
    log_p_NE = over_events(teacher_logprobs_NW.to(logits_NV.device), event_W, bridge.events, teacher_dead)
    alive_N = ((log_p_NE > -torch.inf) & (log_q_NE > -torch.inf)).any(-1)
    if not bool(alive_N.all()):
        raise DataError("no event that both sides can say", where=f"position {(some.start if some else 0) + int((~alive_N).nonzero()[0])}",
                        remedy="leave the position to the text")
    nobody = (log_p_NE == -torch.inf) | (log_q_NE == -torch.inf)  # else a mask on one side alone makes a divergence infinite
    log_p_NE, log_q_NE = (_normalised(side.masked_fill(nobody, -torch.inf)) for side in (log_p_NE, log_q_NE))
    return between(log_p_NE, log_q_NE, divergence)


def _in_order(dead: Dead) -> Dead:
    row_D, order_D = dead.row_D.sort()
    return Dead(row_D, dead.token_D[order_D])


def _within(dead: Dead | None, some: slice | None) -> Dead | None:
    """What is dead at some positions, counted from the first of them; `dead` is in order."""
    if dead is None or some is None:
        return dead
    begin, end = torch.searchsorted(dead.row_D, torch.tensor([some.start, some.stop], device=dead.row_D.device)).tolist()
    return Dead(dead.row_D[begin:end] - some.start, dead.token_D[begin:end])


def _refuse_columns(logits_NV: torch.Tensor, teacher_logprobs_NW: torch.Tensor, bridge: Bridge) -> None:
    for name, columns, tokens in (("student", logits_NV.shape[1], len(bridge.student_event_V)),
                                  ("teacher", teacher_logprobs_NW.shape[1], len(bridge.teacher_event_W))):
        if columns != tokens:
            raise DataError(f"{columns} {name} columns, but its tokenizer has {tokens} tokens", where="losses", remedy="cut the padded columns off")


def _normalised(log_NE: torch.Tensor) -> torch.Tensor:
    return log_NE - log_NE.logsumexp(-1, keepdim=True)
