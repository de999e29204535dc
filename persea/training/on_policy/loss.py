"""Advice: what a teacher says of a student's own tokens (beside.py), as a loss from hidden states."""

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
    """What a teacher says of some answers, as a loss.

    place_P  learned positions, counted through the answers; weight  how many the loss is the mean of (chunk: stretches)
    loss     from hidden states and targets at these positions, and the head
    """

    position_P: torch.Tensor
    num_terms: int
    loss_fn: Callable[[torch.Tensor, LMHead, torch.Tensor], LossOutput]

    def group_stats(self, out: LossOutput, weight: float) -> GroupStats:
        """What is said of it, once its loss is known and counts so much."""
        assert out.token_loss_N is not None
        pull = (
            math.nan if out.grad_norm_N is None else weight * float(out.grad_norm_N.double().sum())
        )
        return GroupStats(
            self.num_terms,
            float(out.token_loss_N.double().sum()),
            float(out.token_loss_N.double().square().sum()),
            pull,
        )


def build_on_policy_loss(
    scorer: TeacherScorer,
    answers: Sequence[tuple[RenderedTokens, RenderedTokens]],
    objective: str,
    candidates: CandidateTokens | None = None,
) -> OnPolicyLoss:
    """Of answers in the student's own tokens and in the teacher's. objective: events (whole rows, and runs of markers) or span_likelihood. found: as in
    `Pair.rows`.
    """
    if objective == "span_likelihood":
        chunks, dead = scorer.score_spans(answers, candidates)
        every_P = torch.arange(sum(int(own.loss_mask_T.sum()) for own, _ in answers))
        return OnPolicyLoss(
            every_P,
            len(chunks.teacher_logprob_C),
            lambda hidden, head, targets: span_likelihood_loss(
                head.logits(hidden), targets, chunks, dead
            ),
        )
    beside = scorer.score_boundaries(answers, candidates)
    sides, events = (
        MaskedEventMap(
            scorer.event_map, beside.student_impossible_tokens, beside.teacher_impossible_tokens
        ),
        len(beside.position_C),
    )
    every_P, marks, dead = _restrict_to_positions(
        beside.marker_spans, beside.marker_impossible_tokens
    )
    runs = len(marks.teacher_logprob_C)

    def loss(hidden: torch.Tensor, head: LMHead, targets: torch.Tensor) -> LossOutput:
        """The mean over common boundaries and runs of markers: each has the gradient of its reverse KL."""
        parts = []
        if events:
            parts.append(
                divergence_loss_from_hidden(
                    hidden[:events], head, beside.teacher_outputs, sides, Divergence.REVERSE
                )
            )
        if runs:
            own_PD = hidden[events:]
            said = span_likelihood_loss(head.logits(own_PD), targets[events:], marks, dead)
            (pull_PD,) = (
                torch.autograd.grad(said.loss, own_PD, retain_graph=True)
                if own_PD.requires_grad
                else (None,)
            )
            parts.append(
                said
                if pull_PD is None
                else replace(
                    said,
                    grad_norm_N=torch.linalg.vector_norm(pull_PD.float(), dim=1) * said.num_tokens,
                )
            )
        mean = torch.stack([one.loss * one.num_tokens for one in parts]).sum() / (events + runs)
        each_N = torch.cat([one.token_loss_N for one in parts if one.token_loss_N is not None])
        pulls = [one.grad_norm_N for one in parts if one.grad_norm_N is not None]
        return LossOutput(
            mean, {}, events + runs, each_N, torch.cat(pulls) if len(pulls) == len(parts) else None
        )

    return OnPolicyLoss(torch.cat([beside.position_C, every_P]), events + runs, loss)


def _restrict_to_positions(
    spans: SpanTargets, impossible_tokens: ImpossibleTokens
) -> tuple[torch.Tensor, SpanTargets, ImpossibleTokens]:
    """Chunks of many positions as those of the few they need: (these, chunks, dead)."""
    n, c, end_C = len(spans.position_P), len(spans.begin_C), spans.end_C.clone()
    few_P, place_Q = torch.unique(
        torch.cat([spans.position_P, spans.begin_C, end_C[end_C >= 0]]), return_inverse=True
    )
    end_C[end_C >= 0] = place_Q[n + c :]
    said = SpanTargets(
        spans.span_P, place_Q[:n], place_Q[n : n + c], end_C, spans.teacher_logprob_C
    )
    return (
        few_P,
        said,
        ImpossibleTokens(
            torch.searchsorted(few_P, impossible_tokens.row_D), impossible_tokens.token_D
        ),
    )
