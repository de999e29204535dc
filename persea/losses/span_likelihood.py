"""Debiased likelihood matching of spans: stretches of bytes with no common boundary inside.

    L = sum of log-probabilities of the span's tokens + log beta_end - log beta_start

beta is the mass of the tokens that can follow a boundary of BOTH tokenizers. Each model's chain
conditions on its own boundaries, and beta removes that condition. Without beta two exact models of
one distribution differ by 0.03-0.20 nats a span, with exact beta by 0, with masks by 0-0.022
(`make bench-bias`). Without beta the loss is that of ALM (Minixhofer et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from persea.errors import DataError
from persea.losses.event_sums import ImpossibleTokens
from persea.losses.loss import LossOutput


@dataclass(frozen=True)
class SpanTargets:
    """C spans of student tokens and the teacher's likelihood of each. P = tokens of all spans.

    Attributes:
        span_P: int64, the span of each token.
        position_P: int64, row of the logits that predicts the token.
        begin_C: int64, row of the logits at the span's first token.
        end_C: int64, row of the logits at the first token after the span; -1 = the turn ends there.
        teacher_logprob_C: the teacher's L, nats, with its log beta terms.
    """

    span_P: torch.Tensor
    position_P: torch.Tensor
    begin_C: torch.Tensor
    end_C: torch.Tensor
    teacher_logprob_C: torch.Tensor


def log_possible_mass(
    logprobs_NV: torch.Tensor, impossible_tokens: ImpossibleTokens
) -> torch.Tensor:
    """Return log beta of each position, [N]: the log mass of possible tokens. Differentiable.

    The possible tokens themselves are summed. 1 minus the impossible mass would keep no digits
    where the student is certain of an impossible token. A position without a possible token gives
    -inf.

    Args:
        logprobs_NV: natural log-probabilities.
        impossible_tokens: tokens to leave out, by position.
    """
    row_D, token_D = (
        side.to(logprobs_NV.device) for side in (impossible_tokens.row_D, impossible_tokens.token_D)
    )
    zero_mass = torch.full((), -torch.inf, dtype=logprobs_NV.dtype, device=logprobs_NV.device)
    return logprobs_NV.index_put((row_D, token_D), zero_mass).logsumexp(-1)


def span_likelihood_loss(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    spans: SpanTargets,
    impossible_tokens: ImpossibleTokens,
) -> LossOutput:
    """Compute half the mean squared difference of student and teacher L, nats^2 per span.

    The loss is zero for a student equal to the teacher, whatever the tokenizers.

    Args:
        logits_NV: student logits.
        labels_N: int64 student tokens at these positions.
        spans: C spans and the teacher's L.
        impossible_tokens: student tokens that cannot occur, by position.

    Raises:
        DataError: if there is no span.
    """
    if not len(spans.teacher_logprob_C):
        raise DataError(
            "no span", where="losses", remedy="compute the span loss only where there are spans"
        )
    logprobs_NV = torch.log_softmax(logits_NV, -1)
    span_P, position_P, begin_C, end_C = (
        side.to(logits_NV.device)
        for side in (spans.span_P, spans.position_P, spans.begin_C, spans.end_C)
    )
    label_N = logprobs_NV.gather(1, labels_N[:, None]).squeeze(1)
    log_beta_N = log_possible_mass(logprobs_NV, impossible_tokens)
    num_spans = len(spans.teacher_logprob_C)
    student_C = torch.zeros(num_spans, dtype=label_N.dtype, device=label_N.device)
    student_C = student_C.index_add(0, span_P, label_N[position_P]) - log_beta_N[begin_C]
    ends = end_C >= 0
    student_C = student_C.index_add(0, torch.nonzero(ends).squeeze(-1), log_beta_N[end_C[ends]])
    loss_C = (student_C - spans.teacher_logprob_C.to(student_C)).square() / 2
    loss = loss_C.mean()
    return LossOutput(loss, {"span_likelihood": loss.detach()}, num_spans, loss_C.detach())
