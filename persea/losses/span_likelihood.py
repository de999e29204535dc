"""The debiased chunk term: how likely both find a stretch of bytes, where they share no boundary inside it.

    L = sum of log-probabilities of the stretch's tokens + log beta_end - log beta_start

beta = the mass that can stand where BOTH tokenizers have a boundary (`Mask.dead`): each model's chain conditions on its own
boundaries, and beta takes that condition out again. Without it two exact models of one law differ by .03-.20 nats a chunk,
with exact beta by 0, with masks by 0-.022 (`make bench-bias`, which has the term as a table of its own). The plain form is ALM's
(Minixhofer et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from persea.errors import DataError
from persea.losses.divergence import LossOutput
from persea.losses.event_sums import ImpossibleTokens


@dataclass(frozen=True)
class SpanTargets:
    """C stretches of some student positions and what the teacher gives them.

    chunk_P, position_P  int64: position `position` of the logits says a token of chunk `chunk`
    begin_C, end_C       int64: the position at the chunk's first token, and the one at the first token after it (-1: the turn ends there)
    teacher_C            the teacher's L, natural, its betas included
    """

    span_P: torch.Tensor
    position_P: torch.Tensor
    begin_C: torch.Tensor
    end_C: torch.Tensor
    teacher_logprob_C: torch.Tensor


def log_possible_mass(
    logprobs_NV: torch.Tensor, impossible_tokens: ImpossibleTokens
) -> torch.Tensor:
    """Log beta of each position, [N]: the mass that can stand. Differentiable; a position whose whole mass is dead gives -inf.

    Summed over what stands, not as 1 - dead, which has no digits left where the student is certain of what cannot be.
    """
    row_D, token_D = (
        side.to(logprobs_NV.device) for side in (impossible_tokens.row_D, impossible_tokens.token_D)
    )
    nothing = torch.full((), -torch.inf, dtype=logprobs_NV.dtype, device=logprobs_NV.device)
    return logprobs_NV.index_put((row_D, token_D), nothing).logsumexp(-1)


def span_likelihood_loss(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    spans: SpanTargets,
    impossible_tokens: ImpossibleTokens,
) -> LossOutput:
    """Half the mean squared difference of both sides' L, nats^2 per chunk. Zero for a right student, whatever the tokenizers.

    logits_NV, targets_N  student logits and the tokens that stand there
    dead                  student tokens that cannot stand, by position
    """
    if not len(spans.teacher_logprob_C):
        raise DataError(
            "no chunk", where="losses", remedy="ask for the chunk term only where there are chunks"
        )
    logprobs_NV = torch.log_softmax(logits_NV, -1)
    chunk_P, position_P, begin_C, end_C = (
        side.to(logits_NV.device)
        for side in (spans.span_P, spans.position_P, spans.begin_C, spans.end_C)
    )
    said_N = logprobs_NV.gather(1, labels_N[:, None]).squeeze(1)
    standing_N = log_possible_mass(logprobs_NV, impossible_tokens)
    student_C = torch.zeros(len(spans.teacher_logprob_C), dtype=said_N.dtype, device=said_N.device)
    student_C = student_C.index_add(0, chunk_P, said_N[position_P]) - standing_N[begin_C]
    ends = end_C >= 0
    student_C = student_C.index_add(0, torch.nonzero(ends).squeeze(-1), standing_N[end_C[ends]])
    each_C = (student_C - spans.teacher_logprob_C.to(student_C)).square() / 2
    loss = each_C.mean()
    return LossOutput(
        loss, {"chunk": float(loss.detach())}, len(spans.teacher_logprob_C), each_C.detach()
    )
