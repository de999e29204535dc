"""Any divergence over common events, from a teacher's whole distributions (rows of kind FULL, a teacher in the loop).

Both sides are masked to what can stand where both tokenizers have a boundary, an event that only one of them can still say is
dropped, and both are renormalised: they are then conditional distributions of the same future, equal for two exact models of one
law wherever the maps agree. For training beside
cross-entropy use `composed`, which needs no normaliser. The same tokenizer on both sides gives the ordinary divergence, bit
for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from persea.alignment.event_map import Bridge
from persea.distributions import RowKind
from persea.errors import DataError
from persea.losses.divergence import Divergence, LossOut, refuse_divergence, same_rows, same_vocabulary
from persea.losses.event_kl import pieces
from persea.losses.event_sums import Dead, kept


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
    """`full`, position by position [N]. Gradient with respect to logits_NV only, once; the teacher's logs need no normaliser.

    some  which of the positions that `sides` masks, in order, these are; None = all
    """
    _refuse_columns(logits_NV, teacher_logprobs_NW, sides.bridge)
    if not len(logits_NV):
        return logits_NV.sum(-1)
    if some is None:
        sides, some = sides.ordered(), slice(0, len(logits_NV))
    loss_N: torch.Tensor = _Rows.apply(logits_NV, teacher_logprobs_NW.detach(), sides, divergence, some)  # type: ignore[no-untyped-call]
    return loss_N


class _Rows(torch.autograd.Function):
    """What positions cost, some at a time; what is kept of them for the gradient is as large as events and the tokens that share one."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, teacher_NW: torch.Tensor, sides: Sides, divergence: Divergence, some: slice) -> torch.Tensor:
        bridge, device = sides.bridge, logits_NV.device
        student, teacher = (kept(event_X, bridge.events, device) for event_X in (bridge.student_event_V, bridge.teacher_event_W))
        found = []
        for few in pieces(len(logits_NV), logits_NV.shape[1] + teacher_NW.shape[1]):
            here = slice(some.start + few.start, some.start + few.stop)
            theirs_FW, mine_FV = teacher_NW[few].to(logits_NV), logits_NV[few]
            log_p_FE, _ = teacher.masses(theirs_FW, _within(sides.teacher_dead, here), _top(theirs_FW), shares=False)
            log_q_FE, share_FG = student.masses(mine_FV, _within(sides.student_dead, here), _top(mine_FV))
            _drop(log_p_FE, log_q_FE, here.start)
            found.append((same_rows(log_q_FE, log_p_FE, divergence), log_q_FE, share_FG))
        loss_N, pull_NE, share_NG = (column[0] if len(column) == 1 else torch.cat(column) for column in zip(*found, strict=True))
        ctx.groups = student
        ctx.save_for_backward(pull_NE, share_NG)
        return loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pull_NE, share_NG = ctx.saved_tensors
        found = [ctx.groups.to_tokens(pull_NE[few] * out_N[few, None], share_NG[few]) for few in pieces(*pull_NE.shape)]
        return found[0] if len(found) == 1 else torch.cat(found), None, None, None, None


def _top(logs_NX: torch.Tensor) -> torch.Tensor:
    """The likeliest token's [N, 1]: less it a row is the same distribution, and has more digits."""
    return logs_NX.amax(-1, keepdim=True).clamp_min_(torch.finfo(logs_NX.dtype).min)


def _drop(log_p_NE: torch.Tensor, log_q_NE: torch.Tensor, first: int) -> None:
    """Leave out, in place, the events that one side cannot say; else a mask on one side alone makes a divergence infinite."""
    lower_NE = torch.minimum(log_p_NE, log_q_NE)
    if bool(lower_NE.amin() > -torch.inf):
        return
    empty_N = lower_NE.amax(-1) == -torch.inf
    if bool(empty_N.any()):
        raise DataError("no event that both sides can say", where=f"position {first + int(empty_N.nonzero()[0])}",
                        remedy="leave the position to the text")
    nobody_NE = lower_NE == -torch.inf
    for side in (log_p_NE, log_q_NE):
        side.masked_fill_(nobody_NE, torch.finfo(side.dtype).min / 4)  # a log of 0 that `same_rows` can take from another, as it cannot -inf


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
