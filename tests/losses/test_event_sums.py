"""Sums over events against a plain reference in float64: any map, what cannot stand, and logarithms
as small as they come.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persea.losses import Divergence, ImpossibleTokens, MaskedEventMap, event_divergence_loss
from persea.losses.event_divergence import event_divergence_per_token
from persea.losses.event_sums import (
    _EVENT_GROUPS_CACHE,
    EventGroups,
    build_event_groups,
    cached_event_groups,
)
from tests.losses.test_losses import dead_of, random_bridge, seeds

NOWHERE = -torch.inf


def random_map(rng: np.random.Generator) -> tuple[torch.Tensor, int]:
    """Events of none, one and several tokens, in any order; tokens left out."""
    sizes = rng.choice([0, 1, 1, 2, 9], int(rng.integers(1, 8)))
    events = np.concatenate(
        [np.arange(len(sizes)).repeat(sizes), np.full(int(rng.integers(not sizes.any(), 4)), -1)]
    )
    return torch.from_numpy(rng.permutation(events)), len(sizes)


class OverEvents(torch.autograd.Function):
    """Groups' sums and their gradient, as a function."""

    @staticmethod
    def forward(
        ctx: Any, logs_NX: torch.Tensor, groups: EventGroups, dead: ImpossibleTokens | None
    ) -> torch.Tensor:
        log_NE, share_NG = groups.log_event_masses(logs_NX, dead)
        ctx.groups = groups
        ctx.save_for_backward(log_NE, share_NG)
        return log_NE

    @staticmethod
    def backward(ctx: Any, pull_NE: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        log_NE, share_NG = ctx.saved_tensors
        return (
            ctx.groups.token_gradient(pull_NE.masked_fill(log_NE == NOWHERE, 0), share_NG),
            None,
            None,
        )


def over_events(
    logs_NX: torch.Tensor, event_X: torch.Tensor, events: int, dead: ImpossibleTokens | None = None
) -> torch.Tensor:
    return OverEvents.apply(logs_NX, build_event_groups(event_X, events), dead)


def reference(logs_NX: torch.Tensor, event_X: torch.Tensor, events: int) -> torch.Tensor:
    """Event by event. Where nothing stands logsumexp's gradient is NaN: the event is no function of
    its tokens there.
    """
    out = []
    for e in range(events):
        of_NG = logs_NX[:, event_X == e]
        nothing_N1 = (of_NG == NOWHERE).all(-1, keepdim=True)
        out.append(
            of_NG.masked_fill(nothing_N1, 0).logsumexp(-1).masked_fill(nothing_N1[:, 0], NOWHERE)
            if of_NG.shape[1]
            else logs_NX.new_full((len(logs_NX),), NOWHERE)
        )
    return torch.stack(out, -1)


@given(
    seed=seeds,
    N=st.sampled_from([1, 3]),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_events_are_the_logs_of_sums(seed: int, N: int, masked: bool, dtype: torch.dtype):
    rng = np.random.default_rng(seed)
    event_X, events = random_map(rng)
    X = len(event_X)
    logs_NX = torch.from_numpy(
        3 * rng.standard_normal((N, X)) + rng.choice([0, 0, -120, -800, NOWHERE], (N, X))
    ).to(dtype)
    mine, theirs = logs_NX.clone().requires_grad_(), logs_NX.double().requires_grad_()
    dead, stands_NX = dead_of(rng, N, X) if masked else (None, np.ones((N, X), bool))
    got, want = (
        over_events(mine, event_X, events, dead),
        reference(theirs.masked_fill(~torch.from_numpy(stands_NX), NOWHERE), event_X, events),
    )
    close = (
        {"rtol": 1e-12, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 2e-6, "atol": 2e-6}
    )
    torch.testing.assert_close(got.double(), want, **close)
    pull_NE = torch.from_numpy(rng.standard_normal(want.shape))
    (a,) = torch.autograd.grad(got, mine, pull_NE.to(dtype))
    b = (
        torch.autograd.grad(want, theirs, pull_NE)[0]
        if want.requires_grad
        else torch.zeros_like(theirs)
    )  # no event has a token
    torch.testing.assert_close(
        a.double(), b, **(close if dtype is torch.float64 else {"rtol": 2e-4, "atol": 2e-5})
    )
    assert torch.equal(mine, logs_NX), "what was given is as it was"
    torch.testing.assert_close(
        over_events(logs_NX, event_X, events, dead), got.detach(), rtol=0, atol=0, equal_nan=False
    )


def test_what_comes_of_an_event_that_cannot_be_said_reaches_no_token():
    """A gradient there may be anything: 0 times infinity, of the divergence behind it."""
    logs = torch.tensor([[NOWHERE, -1.0, NOWHERE, NOWHERE, -2.0, -3.0]], requires_grad=True)
    out = over_events(logs, torch.tensor([0, 1, 2, 2, 1, -1]), 4)
    (gradient,) = torch.autograd.grad(
        out, logs, torch.tensor([[torch.nan, 1.0, torch.inf, torch.nan]])
    )
    share = 1 / (1 + np.exp(-1))
    torch.testing.assert_close(
        gradient, torch.tensor([[0, share, 0, 0, 1 - share, 0]], dtype=torch.float32)
    )


@pytest.mark.parametrize("divergence", list(Divergence))
def test_an_event_that_one_side_cannot_say_pulls_at_no_token(divergence: Divergence):
    """Event 1 the student cannot say, event 2 the teacher cannot: neither moves a logit, and the
    rest is as if they were not there.
    """
    bridge = replace(
        random_bridge(np.random.default_rng(0), 4, 5, 4),
        teacher_event_W=np.arange(4, dtype=np.int32),
        student_event_V=np.array([0, 1, 1, 2, 3], np.int32),
    )
    logits_NV, logs_NW = (
        torch.tensor([[0.5, 3.0, 1.0, 2.0, -1.0]], requires_grad=True),
        torch.log_softmax(torch.tensor([[0.1, 1.0, 2.0, 0.7]]), -1),
    )
    sides = MaskedEventMap(
        bridge,
        ImpossibleTokens(torch.tensor([0, 0]), torch.tensor([1, 2])),
        ImpossibleTokens(torch.tensor([0]), torch.tensor([2])),
    )
    loss = event_divergence_per_token(logits_NV, logs_NW, sides, divergence)
    (gradient,) = torch.autograd.grad(loss.sum(), logits_NV)
    assert torch.isfinite(loss).all() and gradient[0, 1:4].tolist() == [0.0, 0.0, 0.0]
    left = torch.tensor([[0.5, -1.0]], requires_grad=True)
    few = event_divergence_loss(
        left,
        torch.log_softmax(torch.tensor([[0.1, 0.7]]), -1),
        replace(
            bridge,
            teacher_event_W=np.arange(2, dtype=np.int32),
            student_event_V=np.arange(2, dtype=np.int32),
            num_events=2,
        ),
        divergence,
    )
    torch.testing.assert_close(loss[0], few.loss)
    torch.testing.assert_close(gradient[0, [0, 4]], torch.autograd.grad(few.loss, left)[0][0])


@pytest.mark.parametrize("divergence", list(Divergence))
@given(seed=seeds, piece=st.sampled_from([1, 90, 1 << 18]))
def test_rows_are_the_same_however_many_at_once(divergence: Divergence, seed: int, piece: int):
    """And are the divergence of what is left, renormalised; the dead in any order; the teacher's
    logs with or without a normaliser.
    """
    rng = np.random.default_rng(seed)
    N, V, W, E = 4, 26, 19, 5
    bridge = random_bridge(rng, W, V, E)
    bridge.teacher_event_W[:E] = np.arange(E)
    logits_NV = torch.from_numpy(3 * rng.standard_normal((N, V))).requires_grad_()
    teacher_NW = torch.from_numpy(3 * rng.standard_normal((N, W))).log_softmax(-1)
    (student_dead, stands_NV), (teacher_dead, stands_NW) = dead_of(rng, N, V), dead_of(rng, N, W)
    order = torch.from_numpy(rng.permutation(len(student_dead.row_D)))
    sides = MaskedEventMap(
        bridge,
        ImpossibleTokens(student_dead.row_D[order], student_dead.token_D[order]),
        teacher_dead,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("persea.losses.event_kl.CPU_CACHE_ELEMENTS", piece)
        got_N = event_divergence_per_token(logits_NV, teacher_NW + 50, sides, divergence)
        (a,) = torch.autograd.grad(got_N.sum(), logits_NV)
    q, p = (
        (side.exp() * torch.from_numpy(stands))
        for side, stands in ((logits_NV, stands_NV), (teacher_NW, stands_NW))
    )
    q, p = (
        torch.stack([side[:, torch.from_numpy(of) == e].sum(-1) for e in range(E)], -1)
        for side, of in ((q, bridge.student_event_V), (p, bridge.teacher_event_W))
    )
    both = (q > 0) & (p > 0)
    want = []
    for n in range(N):
        qn, pn = ((side[n][both[n]] / side[n][both[n]].sum()) for side in (q, p))
        m = (pn + qn) / 2
        forward, reverse = ((x * (x / y).log()).sum() for x, y in ((pn, qn), (qn, pn)))
        shannon = ((pn * (pn / m).log()).sum() + (qn * (qn / m).log()).sum()) / 2
        want.append({"forward": forward, "reverse": reverse, "jsd": shannon}[divergence.value])
    torch.testing.assert_close(got_N, torch.stack(want), rtol=1e-9, atol=1e-11)
    (b,) = torch.autograd.grad(torch.stack(want).sum(), logits_NV)
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_a_map_is_laid_once_and_forgotten_with_its_bridge():
    bridge, device = random_bridge(np.random.default_rng(0), 9, 12, 4), torch.device("cpu")
    before = len(_EVENT_GROUPS_CACHE)
    one = cached_event_groups(bridge.student_event_V, 4, device)
    assert (
        cached_event_groups(bridge.student_event_V, 4, device) is one
        and len(_EVENT_GROUPS_CACHE) == before + 1
    )
    del bridge
    gc.collect()
    assert len(_EVENT_GROUPS_CACHE) <= before
