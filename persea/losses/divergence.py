"""Cross-entropy, and divergences between a teacher and a student that share one vocabulary."""

from __future__ import annotations

import math
from enum import StrEnum

import torch
import torch.nn.functional as F

from persea.distributions import DistributionKind
from persea.errors import RecipeError
from persea.losses.loss import LossOutput


class Divergence(StrEnum):
    """Divergence between a teacher distribution p and a student distribution q.

    FORWARD is sum p log(p/q) and covers every mode of the teacher. REVERSE is sum q log(q/p) and
    avoids outcomes that the teacher avoids. JSD is half of each against the mean of both (Lin
    1991).
    """

    FORWARD = "forward"
    REVERSE = "reverse"
    JSD = "jsd"

    @property
    def metric_name(self) -> str:
        """Key of the divergence among metrics: forward_kl, reverse_kl or jsd."""
        return self.value if self is Divergence.JSD else f"{self.value}_kl"


def cross_entropy(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> LossOutput:
    """Compute the mean negative log-likelihood of the labels, nats per position.

    Args:
        logits_NV: float logits.
        labels_N: int64 token ids.

    Returns:
        The loss -1/N sum_n log softmax(logits_n)[label_n].
    """
    loss = F.cross_entropy(logits_NV, labels_N)
    return LossOutput(loss, {"cross_entropy": loss.detach()}, len(labels_N))


def refuse_divergence(kind: DistributionKind, divergence: Divergence) -> None:
    """Check that a divergence can be computed from distributions of a kind.

    Only forward KL is linear in the teacher's probabilities. Any other divergence is biased for
    sampled distributions and for the top k tokens with a rest.

    Raises:
        RecipeError: if the divergence needs the whole distribution and the kind is not FULL.
    """
    if kind is DistributionKind.TEXT_ONLY or (
        divergence is not Divergence.FORWARD and kind is not DistributionKind.FULL
    ):
        remedy = (
            "use cross-entropy on the text"
            if kind is DistributionKind.TEXT_ONLY
            else "use forward KL, or distributions of kind full (a teacher in the loop)"
        )
        raise RecipeError(
            f"{divergence.value} KL needs more than distributions of kind {kind.value}",
            where="losses",
            remedy=remedy,
        )


def divergence_of_logprobs(
    log_p_NE: torch.Tensor, log_q_NE: torch.Tensor, divergence: Divergence
) -> torch.Tensor:
    """Compute the divergence of each row.

    Args:
        log_p_NE: natural log-probabilities of the teacher over E outcomes; -inf where p is 0.
        log_q_NE: natural log-probabilities of the student over the same outcomes.
        divergence: which divergence.

    Returns:
        Nats, [N]. An outcome with p = q = 0 adds nothing. An outcome with p > 0 and q = 0 makes
        forward KL infinite; one with q > 0 and p = 0 makes reverse KL infinite.
    """
    if divergence is Divergence.FORWARD:
        return _kl(log_p_NE, log_q_NE)
    if divergence is Divergence.REVERSE:
        return _kl(log_q_NE, log_p_NE)
    # 0 where both are 0, or the gradient of logaddexp is NaN
    both_zero = (log_p_NE == -torch.inf) & (log_q_NE == -torch.inf)
    log_m_NE = torch.logaddexp(
        log_p_NE.masked_fill(both_zero, 0), log_q_NE.masked_fill(both_zero, 0)
    ) - math.log(2)
    return (_kl(log_p_NE, log_m_NE) + _kl(log_q_NE, log_m_NE)) / 2


def _kl(log_a_NE: torch.Tensor, log_b_NE: torch.Tensor) -> torch.Tensor:
    """Return KL(a || b) of each row, nats."""
    is_zero = log_a_NE == -torch.inf
    log_a_NE = log_a_NE.masked_fill(is_zero, 0)
    return (
        (log_a_NE.exp() * (log_a_NE - log_b_NE.masked_fill(is_zero, 0)))
        .masked_fill(is_zero, 0)
        .sum(-1)
    )


def divergence_loss(
    logits_NV: torch.Tensor,
    teacher_logprobs_NV: torch.Tensor,
    divergence: Divergence = Divergence.FORWARD,
) -> LossOutput:
    """Compute the mean divergence between distributions over the same tokens, nats per position.

    Args:
        logits_NV: student logits.
        teacher_logprobs_NV: natural log-probabilities of the teacher.
        divergence: which divergence.

    Raises:
        RecipeError: if the vocabularies differ; `event_divergence_loss` takes an event map.
    """
    if logits_NV.shape != teacher_logprobs_NV.shape:
        raise RecipeError(
            f"student logits {tuple(logits_NV.shape)}, "
            f"teacher log-probabilities {tuple(teacher_logprobs_NV.shape)}",
            where="losses",
            remedy="different vocabularies need an event map",
        )
    loss = divergence_of_logprobs(
        teacher_logprobs_NV, torch.log_softmax(logits_NV, -1), divergence
    ).mean()
    return LossOutput(loss, {divergence.metric_name: loss.detach()}, len(logits_NV))


@torch.no_grad()
def divergence_with_gradient(
    logits_NV: torch.Tensor, teacher_logits_NV: torch.Tensor, divergence: Divergence
) -> torch.Tensor:
    """Compute the divergence of each position, and its gradient in place.

    With t, s natural log-probabilities of p, q, and m = (p + q) / 2, the gradient of a position is
        forward  q - p
        reverse  q (s - t - KL(q|p))
        jsd      q (s - log m - KL(q|m)) / 2

    Args:
        logits_NV: student logits, finite; overwritten by the gradient of the sum over positions.
        teacher_logits_NV: teacher logits, -inf allowed; overwritten (scratch memory).
        divergence: which divergence.

    Returns:
        The divergence of each position, nats, [N]; the same values as `divergence_loss`.
    """
    t_NV, s_NV = (side.sub_(side.amax(-1, keepdim=True)) for side in (teacher_logits_NV, logits_NV))
    # torch's softmax is one pass and takes half the time of exp alone
    p_NV, q_NV = (side.softmax(-1) for side in (t_NV, s_NV))
    # log normalisers: the logit of the most probable token is 0
    lse_t_N1, lse_s_N1 = (-side.amax(-1, keepdim=True).log() for side in (p_NV, q_NV))
    loss_N: torch.Tensor
    if divergence is Divergence.FORWARD:
        loss_N = _expectation(p_NV, t_NV.sub_(s_NV))
        torch.sub(q_NV, p_NV, out=s_NV)
        return loss_N.add_((lse_s_N1 - lse_t_N1).squeeze(-1))
    if divergence is Divergence.REVERSE:
        loss_N = torch.linalg.vecdot(q_NV, s_NV.sub_(t_NV))
        s_NV.sub_(loss_N[:, None]).mul_(q_NV)
        return loss_N.add_((lse_t_N1 - lse_s_N1).squeeze(-1))
    t_NV.sub_(lse_t_N1)
    s_NV.sub_(lse_s_N1)
    # where p + q underflows, p and q do too, and any finite log is multiplied by 0
    log_m_NV = (
        torch.add(p_NV, q_NV).clamp_min_(torch.finfo(p_NV.dtype).tiny).log_().sub_(math.log(2))
    )
    kl_q_m_N: torch.Tensor = torch.linalg.vecdot(q_NV, s_NV.sub_(log_m_NV))
    loss_N = _expectation(p_NV, t_NV.sub_(log_m_NV)).add_(kl_q_m_N).div_(2)
    s_NV.sub_(kl_q_m_N[:, None]).mul_(q_NV).div_(2)
    return loss_N


def _expectation(p_NV: torch.Tensor, values_NV: torch.Tensor) -> torch.Tensor:
    """Return sum p f of each row; f is overwritten and may be -inf only where p is 0.

    -inf is rare, so the rows are masked only after the sum turned out not finite.
    """
    mean_N: torch.Tensor = values_NV.mul_(p_NV).sum(-1)
    return mean_N if bool(mean_N.isfinite().all()) else values_NV.masked_fill_(p_NV == 0, 0).sum(-1)
