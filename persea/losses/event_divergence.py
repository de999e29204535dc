"""Any divergence over common events, from the teacher's whole distributions (a teacher in the
loop).

Both sides are masked to the tokens that can follow a boundary of both tokenizers. Events that only
one side can still produce are dropped, and both sides are renormalised. Both are then conditional
distributions of the same future: equal for two exact models of one distribution, wherever the event
maps agree. To train together with cross-entropy use `event_kl_loss`, which needs no normaliser.
With the same tokenizer on both sides the result is the ordinary divergence, bit for bit.
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
    divergence_loss,
    divergence_with_gradient,
    refuse_divergence,
)
from persea.losses.event_kl import row_slices
from persea.losses.event_sums import ImpossibleTokens, cached_event_groups
from persea.losses.loss import LossOutput


@dataclass(frozen=True, eq=False)
class MaskedEventMap:
    """An event map together with the impossible tokens at N common boundaries.

    Attributes:
        event_map: event of each token of both vocabularies.
        student_impossible_tokens: student tokens that cannot follow the boundary; None = no mask.
        teacher_impossible_tokens: teacher tokens that cannot follow the boundary; None = no mask.
    """

    event_map: EventMap
    student_impossible_tokens: ImpossibleTokens | None = None
    teacher_impossible_tokens: ImpossibleTokens | None = None

    @property
    def is_same_vocabulary(self) -> bool:
        """Whether both sides share one vocabulary without masks (the ordinary divergence)."""
        return (
            self.event_map.is_identity
            and self.student_impossible_tokens is None
            and self.teacher_impossible_tokens is None
        )

    def sorted_by_row(self) -> MaskedEventMap:
        """Return a copy whose impossible tokens are sorted by position."""
        return MaskedEventMap(
            self.event_map,
            *(
                None if tokens is None else _sorted_by_row(tokens)
                for tokens in (self.student_impossible_tokens, self.teacher_impossible_tokens)
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
    """Compute the mean divergence over events, nats per position.

    Args:
        logits_NV: student logits at N common boundaries.
        teacher_logprobs_NW: natural log-probabilities of the teacher at the same boundaries.
        event_map: event of each token of both vocabularies.
        divergence: which divergence.
        kind: kind of the teacher's distributions; see `refuse_divergence`.
        student_impossible_tokens: student tokens that cannot follow the boundary; None = no mask.
        teacher_impossible_tokens: teacher tokens that cannot follow the boundary; None = no mask.

    Raises:
        DataError: if a side has another number of columns than its tokenizer has tokens, or if no
            event is left at a position that both sides can produce.
        RecipeError: if the divergence needs more than distributions of this kind.
    """
    refuse_divergence(kind, divergence)
    masked_map = MaskedEventMap(event_map, student_impossible_tokens, teacher_impossible_tokens)
    if masked_map.is_same_vocabulary:
        _refuse_columns(logits_NV, teacher_logprobs_NW, event_map)
        return divergence_loss(logits_NV, teacher_logprobs_NW, divergence)
    loss = event_divergence_per_token(logits_NV, teacher_logprobs_NW, masked_map, divergence).mean()
    return LossOutput(loss, {divergence.metric_name: loss.detach()}, len(logits_NV))


def event_divergence_per_token(
    logits_NV: torch.Tensor,
    teacher_logprobs_NW: torch.Tensor,
    masked_map: MaskedEventMap,
    divergence: Divergence,
    positions: slice | None = None,
) -> torch.Tensor:
    """Compute `event_divergence_loss` for each position, [N].

    The gradient flows to logits_NV only, and can be computed once. The teacher's log-probabilities
    may lack their normaliser.

    Args:
        logits_NV: student logits.
        teacher_logprobs_NW: natural log-probabilities of the teacher.
        masked_map: event map and impossible tokens of all positions.
        divergence: which divergence.
        positions: the positions of `masked_map` that the rows belong to, where `masked_map` is
            sorted by row; None = all positions.
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
    """Divergence of each position, computed a few rows at a time.

    The tensors saved for backward have one column an event and one a token that shares its event.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: torch.Tensor,
        teacher_NW: torch.Tensor,
        masked_map: MaskedEventMap,
        divergence: Divergence,
        positions: slice,
    ) -> torch.Tensor:
        event_map, device = masked_map.event_map, logits_NV.device
        student, teacher = (
            cached_event_groups(event_X, event_map.num_events, device)
            for event_X in (event_map.student_event_V, event_map.teacher_event_W)
        )
        parts = []
        for rows in row_slices(len(logits_NV), logits_NV.shape[1] + teacher_NW.shape[1]):
            part = slice(positions.start + rows.start, positions.start + rows.stop)
            teacher_FW, student_FV = teacher_NW[rows].to(logits_NV), logits_NV[rows]
            log_p_FE, _ = teacher.log_event_masses(
                teacher_FW,
                _slice_impossible_tokens(masked_map.teacher_impossible_tokens, part),
                _max_logprobs(teacher_FW),
                with_shares=False,
            )
            log_q_FE, share_FG = student.log_event_masses(
                student_FV,
                _slice_impossible_tokens(masked_map.student_impossible_tokens, part),
                _max_logprobs(student_FV),
            )
            _drop_unmatched_events(log_p_FE, log_q_FE, part.start)
            # log_q_FE is overwritten by the gradient
            parts.append(
                (divergence_with_gradient(log_q_FE, log_p_FE, divergence), log_q_FE, share_FG)
            )
        loss_N, grad_NE, share_NG = (
            column[0] if len(column) == 1 else torch.cat(column)
            for column in zip(*parts, strict=True)
        )
        ctx.groups = student
        ctx.save_for_backward(grad_NE, share_NG)
        return loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_NE, share_NG = ctx.saved_tensors
        parts = [
            ctx.groups.token_gradient(grad_NE[rows] * out_N[rows, None], share_NG[rows])
            for rows in row_slices(*grad_NE.shape)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts), None, None, None, None


def _max_logprobs(logs_NX: torch.Tensor) -> torch.Tensor:
    """Return the maximum of each row [N, 1]; subtracting the maximum keeps more digits."""
    return logs_NX.amax(-1, keepdim=True).clamp_min_(torch.finfo(logs_NX.dtype).min)


def _drop_unmatched_events(log_p_NE: torch.Tensor, log_q_NE: torch.Tensor, first: int) -> None:
    """Drop, in place, the events that one side cannot produce.

    Otherwise a mask on one side alone makes the divergence infinite.
    """
    lower_NE = torch.minimum(log_p_NE, log_q_NE)
    if bool(lower_NE.amin() > -torch.inf):
        return
    empty_N = lower_NE.amax(-1) == -torch.inf
    if bool(empty_N.any()):
        raise DataError(
            "no event that both teacher and student can produce",
            where=f"position {first + int(empty_N.nonzero()[0])}",
            remedy="leave the position out, or train it with cross-entropy on the text",
        )
    dropped_NE = lower_NE == -torch.inf
    for side in (log_p_NE, log_q_NE):
        # a finite log of 0: divergence_with_gradient subtracts logs, and -inf minus -inf is NaN
        side.masked_fill_(dropped_NE, torch.finfo(side.dtype).min / 4)


def _sorted_by_row(impossible_tokens: ImpossibleTokens) -> ImpossibleTokens:
    row_D, order_D = impossible_tokens.row_D.sort()
    return ImpossibleTokens(row_D, impossible_tokens.token_D[order_D])


def _slice_impossible_tokens(
    impossible_tokens: ImpossibleTokens | None, positions: slice | None
) -> ImpossibleTokens | None:
    """Return the impossible tokens of some positions, rows counted from the first of them.

    The input is sorted by row.
    """
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
