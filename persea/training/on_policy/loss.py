"""The on-policy loss: a teacher's scores of the student's own answers, from hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from persea.losses import (
    Divergence,
    ImpossibleTokens,
    LMHead,
    LossOutput,
    MaskedEventMap,
    SpanTargets,
    divergence_loss_from_hidden,
    span_likelihood_loss,
)
from persea.tokenization.tokens import RenderedTokens
from persea.training.loss_balancing import GroupStats
from persea.training.on_policy.candidates import CandidateTokens
from persea.training.on_policy.teacher_scores import TeacherScorer


@dataclass(frozen=True)
class OnPolicyLoss:
    """The loss of one teacher on some answers of the student.

    Attributes:
        position_P: supervised positions that the loss needs, numbered through the answers.
        num_terms: number of boundaries and spans that the loss is a mean over.
        loss_fn: (hidden states and labels at these positions, head) -> loss.
    """

    position_P: torch.Tensor
    num_terms: int
    loss_fn: Callable[[torch.Tensor, LMHead, torch.Tensor], LossOutput]

    def group_stats(self, out: LossOutput, weight: float) -> GroupStats:
        """Return the statistics of a group whose loss is `out`.

        Args:
            out: the result of `loss_fn`.
            weight: weight of the group.
        """
        assert out.token_loss_N is not None
        grad_norm = (
            math.nan if out.grad_norm_N is None else weight * float(out.grad_norm_N.double().sum())
        )
        return GroupStats(
            self.num_terms,
            float(out.token_loss_N.double().sum()),
            float(out.token_loss_N.double().square().sum()),
            grad_norm,
        )


def build_on_policy_loss(
    scorer: TeacherScorer,
    answers: Sequence[tuple[RenderedTokens, RenderedTokens]],
    objective: str,
    candidates: CandidateTokens | None = None,
) -> OnPolicyLoss:
    """Score answers with a teacher and build the loss.

    Args:
        scorer: the teacher's scorer.
        answers: (student tokens, teacher tokens) of each answer.
        objective: events (reverse KL over events at common boundaries, and marker runs) or
            span_likelihood (all spans).
        candidates: see `TeacherScorer.score_boundaries`.
    """
    if objective == "span_likelihood":
        spans, impossible = scorer.score_spans(answers, candidates)
        every_P = torch.arange(sum(int(own.loss_mask_T.sum()) for own, _ in answers))
        return OnPolicyLoss(
            every_P,
            len(spans.teacher_logprob_C),
            lambda hidden, head, labels: span_likelihood_loss(
                head.logits(hidden), labels, spans, impossible
            ),
        )
    scores = scorer.score_boundaries(answers, candidates)
    masked_map = MaskedEventMap(
        scorer.event_map, scores.student_impossible_tokens, scores.teacher_impossible_tokens
    )
    num_events = len(scores.position_C)
    span_P, spans, impossible = _restrict_to_positions(
        scores.marker_spans, scores.marker_impossible_tokens
    )
    num_spans = len(spans.teacher_logprob_C)

    def loss(hidden: torch.Tensor, head: LMHead, labels: torch.Tensor) -> LossOutput:
        """Mean over boundaries and spans; each has the gradient of its reverse KL."""
        parts = []
        if num_events:
            parts.append(
                divergence_loss_from_hidden(
                    hidden[:num_events],
                    head,
                    scores.teacher_outputs,
                    masked_map,
                    Divergence.REVERSE,
                )
            )
        if num_spans:
            parts.append(
                _span_loss(hidden[num_events:], head, labels[num_events:], spans, impossible)
            )
        num_terms = num_events + num_spans
        mean = torch.stack([one.loss * one.num_tokens for one in parts]).sum() / num_terms
        loss_N = torch.cat([one.token_loss_N for one in parts if one.token_loss_N is not None])
        grad_norms = [one.grad_norm_N for one in parts if one.grad_norm_N is not None]
        grad_norm_N = torch.cat(grad_norms) if len(grad_norms) == len(parts) else None
        return LossOutput(mean, {}, num_terms, loss_N, grad_norm_N)

    return OnPolicyLoss(torch.cat([scores.position_C, span_P]), num_events + num_spans, loss)


def _span_loss(
    hidden_PD: torch.Tensor,
    head: LMHead,
    labels_P: torch.Tensor,
    spans: SpanTargets,
    impossible_tokens: ImpossibleTokens,
) -> LossOutput:
    """Return the span loss with the norm of each hidden state's gradient."""
    out = span_likelihood_loss(head.logits(hidden_PD), labels_P, spans, impossible_tokens)
    if not hidden_PD.requires_grad:
        return out
    (grad_PD,) = torch.autograd.grad(out.loss, hidden_PD, retain_graph=True)
    grad_norm_N = torch.linalg.vector_norm(grad_PD.float(), dim=1) * out.num_tokens
    return replace(out, grad_norm_N=grad_norm_N)


def _restrict_to_positions(
    spans: SpanTargets, impossible_tokens: ImpossibleTokens
) -> tuple[torch.Tensor, SpanTargets, ImpossibleTokens]:
    """Renumber spans to the positions that they need: (positions, spans, impossible tokens)."""
    n, c, end_C = len(spans.position_P), len(spans.begin_C), spans.end_C.clone()
    needed_P, index_Q = torch.unique(
        torch.cat([spans.position_P, spans.begin_C, end_C[end_C >= 0]]), return_inverse=True
    )
    end_C[end_C >= 0] = index_Q[n + c :]
    renumbered = SpanTargets(
        spans.span_P, index_Q[:n], index_Q[n : n + c], end_C, spans.teacher_logprob_C
    )
    row_D = torch.searchsorted(needed_P, impossible_tokens.row_D)
    return needed_P, renumbered, ImpossibleTokens(row_D, impossible_tokens.token_D)
