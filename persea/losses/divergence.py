"""Losses over the student's own tokens: the text, and a teacher of the same vocabulary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F

from persea.distributions import DistributionKind
from persea.errors import RecipeError


class Divergence(StrEnum):
    """From teacher p to student q. FORWARD: sum p log(p/q), covers all the teacher does; REVERSE: sum q log(q/p), does nothing the
    teacher would not; JSD: half of each against the mean of both (Lin 1991).
    """

    FORWARD = "forward"
    REVERSE = "reverse"
    JSD = "jsd"


@dataclass(frozen=True)
class LossOutput:
    """loss: scalar tensor to minimise; terms: its parts, detached, nats per learned position; positions: how many; each_N: what each
    of them cost before its weight, detached; pull_N: where the loss came from a head, the norm of the gradient of N x loss with respect to
    each hidden state, weight included.
    """

    loss: torch.Tensor
    metrics: Mapping[str, float]
    num_tokens: int
    token_loss_N: torch.Tensor | None = None
    grad_norm_N: torch.Tensor | None = None


def cross_entropy(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> LossOutput:
    """Mean negative log-likelihood, nats per position: -1/N sum_n log softmax(logits_n)[target_n]."""
    loss = F.cross_entropy(logits_NV, labels_N)
    return LossOutput(loss, {"cross_entropy": float(loss.detach())}, len(labels_N))


def refuse_divergence(kind: DistributionKind, divergence: Divergence) -> None:
    """Raises RecipeError where a divergence needs more than a row of this kind knows.

    Only forward KL is linear in the teacher's probabilities: of a sample, or of a head with a rest, anything else is biased.
    """
    if kind is DistributionKind.TEXT_ONLY or (
        divergence is not Divergence.FORWARD and kind is not DistributionKind.FULL
    ):
        remedy = (
            "teach from the text alone"
            if kind is DistributionKind.TEXT_ONLY
            else "use forward KL, or rows of kind full (a teacher in the loop)"
        )
        raise RecipeError(
            f"{divergence.value} KL needs more than rows of kind {kind.value}",
            where="losses",
            remedy=remedy,
        )


def divergence_of_logprobs(
    log_p_NE: torch.Tensor, log_q_NE: torch.Tensor, divergence: Divergence
) -> torch.Tensor:
    """Divergence of each row, nats, [N]. log_p, log_q: natural logs of distributions over the same E outcomes; -inf where p or q is 0.

    An outcome that both rule out costs nothing; one that only q rules out costs forward KL infinity, and the reverse.
    """
    if divergence is Divergence.FORWARD:
        return _kl(log_p_NE, log_q_NE)
    if divergence is Divergence.REVERSE:
        return _kl(log_q_NE, log_p_NE)
    nobody = (log_p_NE == -torch.inf) & (
        log_q_NE == -torch.inf
    )  # 0 there, or the gradient of logaddexp is NaN
    log_m_NE = torch.logaddexp(
        log_p_NE.masked_fill(nobody, 0), log_q_NE.masked_fill(nobody, 0)
    ) - math.log(2)
    return (_kl(log_p_NE, log_m_NE) + _kl(log_q_NE, log_m_NE)) / 2


def _kl(log_a_NE: torch.Tensor, log_b_NE: torch.Tensor) -> torch.Tensor:
    nowhere = log_a_NE == -torch.inf
    log_a_NE = log_a_NE.masked_fill(nowhere, 0)
    return (
        (log_a_NE.exp() * (log_a_NE - log_b_NE.masked_fill(nowhere, 0)))
        .masked_fill(nowhere, 0)
        .sum(-1)
    )


def divergence_loss(
    logits_NV: torch.Tensor,
    teacher_logprobs_NV: torch.Tensor,
    divergence: Divergence = Divergence.FORWARD,
) -> LossOutput:
    """Mean divergence between a teacher's and a student's distributions over the same tokens, nats per position.

    Raises RecipeError where the vocabularies differ: then it takes a bridge (`losses.full`).
    """
    if logits_NV.shape != teacher_logprobs_NV.shape:
        raise RecipeError(
            f"student logits {tuple(logits_NV.shape)}, teacher log-probabilities {tuple(teacher_logprobs_NV.shape)}",
            where="losses",
            remedy="between different vocabularies a bridge is needed",
        )
    loss = divergence_of_logprobs(
        teacher_logprobs_NV, torch.log_softmax(logits_NV, -1), divergence
    ).mean()
    return LossOutput(loss, {divergence.value: float(loss.detach())}, len(logits_NV))


@torch.no_grad()
def divergence_with_gradient(
    logits_NV: torch.Tensor, teacher_logits_NV: torch.Tensor, divergence: Divergence
) -> torch.Tensor:
    """`same_vocabulary` position by position [N], from logits of both sides; the student's are overwritten by the gradient of the sum,
    the teacher's by no matter what. A teacher's logit may be -inf, a student's not.

    With t, s natural log-probabilities of p, q, and m = (p + q) / 2, the gradient of a position is
        forward  q - p
        reverse  q (s - t - KL(q|p))
        jsd      q (s - log m - KL(q|m)) / 2
    """
    t_NV, s_NV = (side.sub_(side.amax(-1, keepdim=True)) for side in (teacher_logits_NV, logits_NV))
    p_NV, q_NV = (
        side.softmax(-1) for side in (t_NV, s_NV)
    )  # one pass of torch's own: half of what exp alone takes
    of_t_N1, of_s_N1 = (
        -side.amax(-1, keepdim=True).log() for side in (p_NV, q_NV)
    )  # log normalisers: the likeliest token's logit is 0
    loss_N: torch.Tensor
    if divergence is Divergence.FORWARD:
        loss_N = _expectation(p_NV, t_NV.sub_(s_NV))
        torch.sub(q_NV, p_NV, out=s_NV)
        return loss_N.add_((of_s_N1 - of_t_N1).squeeze(-1))
    if divergence is Divergence.REVERSE:
        loss_N = torch.linalg.vecdot(q_NV, s_NV.sub_(t_NV))
        s_NV.sub_(loss_N[:, None]).mul_(q_NV)
        return loss_N.add_((of_t_N1 - of_s_N1).squeeze(-1))
    t_NV.sub_(of_t_N1)
    s_NV.sub_(of_s_N1)
    # where p + q has no digits neither p nor q has: whatever finite number stands for its log is multiplied by nothing
    log_m_NV = (
        torch.add(p_NV, q_NV).clamp_min_(torch.finfo(p_NV.dtype).tiny).log_().sub_(math.log(2))
    )
    towards_N: torch.Tensor = torch.linalg.vecdot(q_NV, s_NV.sub_(log_m_NV))
    loss_N = _expectation(p_NV, t_NV.sub_(log_m_NV)).add_(towards_N).div_(2)
    s_NV.sub_(towards_N[:, None]).mul_(q_NV).div_(2)
    return loss_N


def _expectation(p_NV: torch.Tensor, values_NV: torch.Tensor) -> torch.Tensor:
    """Sum p f; f is overwritten. It may be -inf only where p is 0: not looked for before it shows, for it seldom does."""
    mean_N: torch.Tensor = values_NV.mul_(p_NV).sum(-1)
    return mean_N if bool(mean_N.isfinite().all()) else values_NV.masked_fill_(p_NV == 0, 0).sum(-1)
