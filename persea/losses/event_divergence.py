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

from persea.alignment.event_map import EventMap
from persea.distributions import DistributionKind
from persea.errors import DataError
from persea.losses.divergence import (
    Divergence,
    LossOutput,
    divergence_loss,
    divergence_with_gradient,
    refuse_divergence,
)
from persea.losses.event_kl import row_slices
from persea.losses.event_sums import ImpossibleTokens, cached_event_groups


@dataclass(frozen=True, eq=False)
class MaskedEventMap:
    """How a teacher's whole distributions lie over a student's.

    student_dead, teacher_dead  what cannot stand (`Mask.dead`); None = no masks
    """

    event_map: EventMap
    student_impossible_tokens: ImpossibleTokens | None = None
    teacher_impossible_tokens: ImpossibleTokens | None = None

    @property
    def is_same_vocabulary(self) -> bool:
        """Whether both sides are one vocabulary and nothing is masked: then this is the ordinary divergence."""
        return (
            self.event_map.is_identity
            and self.student_impossible_tokens is None
            and self.teacher_impossible_tokens is None
        )

    def sorted_by_row(self) -> MaskedEventMap:
        """The same, what is dead in the order of positions."""
        return MaskedEventMap(
            self.event_map,
            *(
                None if dead is None else _sorted_by_row(dead)
                for dead in (self.student_impossible_tokens, self.teacher_impossible_tokens)
            ),
        )


def event_divergence_loss(
    logits_NV: torch.Tensor,
    teacher_logprobs_NW: torch.Tensor,
    event_map: EventMap,
    divergence: Divergence = Divergence.FORWARD,
    *,
    kind: DistributionKind = DistributionKind.FULL,
    student_impossible_tokens: ImpossibleTokens | None = None,
    teacher_impossible_tokens: ImpossibleTokens | None = None,
) -> LossOutput:
    """Mean divergence over events, nats per position.

    logits_NV            student logits at N common boundaries
    teacher_logprobs_NW  the teacher's natural log-probabilities there
    student_dead, teacher_dead  what cannot stand (`Mask.dead`); None = no masks
    kind                 what the teacher's rows are: anything but FULL is refused where the divergence needs more
    Raises DataError where a side has other columns than the bridge knows tokens, or where nothing can stand at a position.
    """
    refuse_divergence(kind, divergence)
    sides = MaskedEventMap(event_map, student_impossible_tokens, teacher_impossible_tokens)
    if sides.is_same_vocabulary:
        _refuse_columns(logits_NV, teacher_logprobs_NW, event_map)
        return divergence_loss(logits_NV, teacher_logprobs_NW, divergence)
    loss = event_divergence_per_token(logits_NV, teacher_logprobs_NW, sides, divergence).mean()
    return LossOutput(loss, {divergence.value: float(loss.detach())}, len(logits_NV))


def event_divergence_per_token(
    logits_NV: torch.Tensor,
    teacher_logprobs_NW: torch.Tensor,
    masked_map: MaskedEventMap,
    divergence: Divergence,
    positions: slice | None = None,
) -> torch.Tensor:
    """`full`, position by position [N]. Gradient with respect to logits_NV only, once; the teacher's logs need no normaliser.

    some  which of the positions that `sides` masks, in order, these are; None = all
    """
    _refuse_columns(logits_NV, teacher_logprobs_NW, masked_map.event_map)
    if not len(logits_NV):
        return logits_NV.sum(-1)
    if positions is None:
        masked_map, positions = masked_map.sorted_by_row(), slice(0, len(logits_NV))
    loss_N: torch.Tensor = _EventDivergence.apply(
        logits_NV, teacher_logprobs_NW.detach(), masked_map, divergence, positions
    )  # type: ignore[no-untyped-call]
    return loss_N


class _EventDivergence(torch.autograd.Function):
    """What positions cost, some at a time; what is kept of them for the gradient is as large as events and the tokens that share one."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: torch.Tensor,
        teacher_NW: torch.Tensor,
        masked_map: MaskedEventMap,
        divergence: Divergence,
        positions: slice,
    ) -> torch.Tensor:
        bridge, device = masked_map.event_map, logits_NV.device
        student, teacher = (
            cached_event_groups(event_X, bridge.num_events, device)
            for event_X in (bridge.student_event_V, bridge.teacher_event_W)
        )
        found = []
        for few in row_slices(len(logits_NV), logits_NV.shape[1] + teacher_NW.shape[1]):
            here = slice(positions.start + few.start, positions.start + few.stop)
            theirs_FW, mine_FV = teacher_NW[few].to(logits_NV), logits_NV[few]
            log_p_FE, _ = teacher.log_event_masses(
                theirs_FW,
                _slice_impossible_tokens(masked_map.teacher_impossible_tokens, here),
                _max_logprobs(theirs_FW),
                with_shares=False,
            )
            log_q_FE, share_FG = student.log_event_masses(
                mine_FV,
                _slice_impossible_tokens(masked_map.student_impossible_tokens, here),
                _max_logprobs(mine_FV),
            )
            _drop_unmatched_events(log_p_FE, log_q_FE, here.start)
            found.append(
                (divergence_with_gradient(log_q_FE, log_p_FE, divergence), log_q_FE, share_FG)
            )
        loss_N, pull_NE, share_NG = (
            column[0] if len(column) == 1 else torch.cat(column)
            for column in zip(*found, strict=True)
        )
        ctx.groups = student
        ctx.save_for_backward(pull_NE, share_NG)
        return loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pull_NE, share_NG = ctx.saved_tensors
        found = [
            ctx.groups.token_gradient(pull_NE[few] * out_N[few, None], share_NG[few])
            for few in row_slices(*pull_NE.shape)
        ]
        return found[0] if len(found) == 1 else torch.cat(found), None, None, None, None


def _max_logprobs(logs_NX: torch.Tensor) -> torch.Tensor:
    """The likeliest token's [N, 1]: less it a row is the same distribution, and has more digits."""
    return logs_NX.amax(-1, keepdim=True).clamp_min_(torch.finfo(logs_NX.dtype).min)


def _drop_unmatched_events(log_p_NE: torch.Tensor, log_q_NE: torch.Tensor, first: int) -> None:
    """Leave out, in place, the events that one side cannot say; else a mask on one side alone makes a divergence infinite."""
    lower_NE = torch.minimum(log_p_NE, log_q_NE)
    if bool(lower_NE.amin() > -torch.inf):
        return
    empty_N = lower_NE.amax(-1) == -torch.inf
    if bool(empty_N.any()):
        raise DataError(
            "no event that both sides can say",
            where=f"position {first + int(empty_N.nonzero()[0])}",
            remedy="leave the position to the text",
        )
    nobody_NE = lower_NE == -torch.inf
    for side in (log_p_NE, log_q_NE):
        side.masked_fill_(
            nobody_NE, torch.finfo(side.dtype).min / 4
        )  # a log of 0 that `same_rows` can take from another, as it cannot -inf


def _sorted_by_row(impossible_tokens: ImpossibleTokens) -> ImpossibleTokens:
    row_D, order_D = impossible_tokens.row_D.sort()
    return ImpossibleTokens(row_D, impossible_tokens.token_D[order_D])


def _slice_impossible_tokens(
    impossible_tokens: ImpossibleTokens | None, positions: slice | None
) -> ImpossibleTokens | None:
    """What is dead at some positions, counted from the first of them; `dead` is in order."""
    if impossible_tokens is None or positions is None:
        return impossible_tokens
    begin, end = torch.searchsorted(
        impossible_tokens.row_D,
        torch.tensor([positions.start, positions.stop], device=impossible_tokens.row_D.device),
    ).tolist()
    return ImpossibleTokens(
        impossible_tokens.row_D[begin:end] - positions.start, impossible_tokens.token_D[begin:end]
    )


def _refuse_columns(
    logits_NV: torch.Tensor, teacher_logprobs_NW: torch.Tensor, event_map: EventMap
) -> None:
    for name, columns, tokens in (
        ("student", logits_NV.shape[1], len(event_map.student_event_V)),
        ("teacher", teacher_logprobs_NW.shape[1], len(event_map.teacher_event_W)),
    ):
        if columns != tokens:
            raise DataError(
                f"{columns} {name} columns, but its tokenizer has {tokens} tokens",
                where="losses",
                remedy="cut the padded columns off",
            )
