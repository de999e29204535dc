"""What a teacher says of a student's own tokens, as one loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from persea.losses import (
    Divergence,
    LMHead,
    MaskedEventMap,
    divergence_loss_from_hidden,
    span_likelihood_loss,
)
from persea.training.on_policy.loss import build_on_policy_loss
from tests.teachers.engines.test_transformers import opened
from tests.training.on_policy.test_rollouts import STUDENT, pair
from tests.training.on_policy.test_teacher_scores import spoken, structured


@pytest.mark.parametrize("name", ["qwen-sapling", "gpt-oss-sapling"])
def test_events_and_stretches_count_alike(name: str) -> None:
    """The mean over boundaries and stretches, each with its own loss; the gradient is that of the
    two apart, and what is told adds up.
    """
    some, here = [*spoken(name), *structured(name)], pair(name)
    size, learned = (
        len(opened(STUDENT)[0].vocabulary),
        sum(int(own.loss_mask_T.sum()) for own, _ in some),
    )
    torch.manual_seed(0)
    hidden_LD = torch.randn(learned, 16, requires_grad=True)
    head = LMHead(torch.randn(size, 16) / 4, size)
    targets_L = torch.from_numpy(
        np.concatenate([own.ids_T[own.loss_mask_T] for own, _ in some])
    ).long()
    said, beside = build_on_policy_loss(here, some, "events"), here.score_boundaries(some)
    out = said.loss_fn(hidden_LD[said.position_P], head, targets_L[said.position_P])
    rows = divergence_loss_from_hidden(
        hidden_LD[beside.position_C],
        head,
        beside.logprobs_CW,
        MaskedEventMap(
            here.event_map, beside.student_impossible_tokens, beside.teacher_impossible_tokens
        ),
        Divergence.REVERSE,
    )
    runs = span_likelihood_loss(
        head.logits(hidden_LD), targets_L, beside.marker_spans, beside.marker_impossible_tokens
    )
    assert (
        said.num_terms == rows.num_tokens + runs.num_tokens
        and min(rows.num_tokens, runs.num_tokens) > 0
    )
    want = (rows.loss * rows.num_tokens + runs.loss * runs.num_tokens) / said.num_terms
    assert float(out.loss.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    (mine,), (apart,) = (
        torch.autograd.grad(loss, hidden_LD, retain_graph=True) for loss in (out.loss, want)
    )
    assert torch.allclose(mine, apart, atol=1e-6)
    told = said.group_stats(out, 2.0)
    assert told.num_tokens == said.num_terms and told.loss_sum == pytest.approx(
        float(want.detach()) * said.num_terms, rel=1e-5
    )
    assert told.grad_norm_sum == pytest.approx(2 * float(out.grad_norm_N.sum())) and math.isfinite(
        told.squared_loss_sum
    )


def test_of_chunks_alone_every_learned_position_may_be_asked() -> None:
    some, here = spoken("qwen-sapling"), pair("qwen-sapling")
    said, (chunks, _) = build_on_policy_loss(here, some, "span_likelihood"), here.score_spans(some)
    assert said.position_P.tolist() == list(
        range(sum(int(own.loss_mask_T.sum()) for own, _ in some))
    )
    assert said.num_terms == len(chunks.teacher_logprob_C) > 0
