"""Losses from hidden states are those from logits, in float64 to the last digits, however small the
chunks; and they need little room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory import Peak

from persea.distributions import DistributionKind
from persea.errors import DataError
from persea.losses import (
    Divergence,
    ImpossibleTokens,
    LMHead,
    LossOutput,
    MaskedEventMap,
    build_batch_targets,
    build_event_targets,
    cross_entropy,
    divergence_loss,
    divergence_loss_from_hidden,
    event_divergence_loss,
    event_kl_loss,
    event_kl_loss_from_hidden,
    split_targets,
)
from persea.losses import chunked_head as heads
from tests.losses.test_losses import case, random_bridge, said_of, seeds

DIVERGENCES = list(Divergence)


@contextmanager
def room(size: int) -> Iterator[None]:
    """So many bytes for a chunk's logits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(heads.MAX_CHUNK_BYTES, "cpu", size)
        yield


def random_head(
    rng: np.random.Generator, V: int, D: int, dtype: torch.dtype = torch.float64
) -> LMHead:
    """Padded, with or without bias, scale and cap."""
    padded = V + int(rng.integers(0, 3))
    weight = torch.from_numpy(rng.standard_normal((padded, D))).to(dtype).requires_grad_()
    bias = (
        torch.from_numpy(rng.standard_normal(padded)).to(dtype).requires_grad_()
        if rng.integers(0, 2)
        else None
    )
    return LMHead(weight, V, bias, float(rng.choice([1.0, 0.3])), float(rng.choice([0.0, 4.0])))


def gradients(
    out: LossOutput, hidden: torch.Tensor, head: LMHead, times: float = 1.0
) -> list[torch.Tensor]:
    leaves = [hidden, head.weight_VD] + ([] if head.bias_V is None else [head.bias_V])
    return list(torch.autograd.grad(out.loss * times, leaves))


def same(
    from_head: Callable[[], LossOutput],
    from_logits: Callable[[], tuple[torch.Tensor, LossOutput]],
    hidden: torch.Tensor,
    head: LMHead,
    times: float,
) -> None:
    mine, (want_N, theirs) = from_head(), from_logits()
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=1e-12, atol=1e-12)
    assert mine.token_loss_N is not None
    torch.testing.assert_close(mine.token_loss_N, want_N, rtol=1e-11, atol=1e-11)
    for a, b in zip(
        gradients(mine, hidden, head, times), gradients(theirs, hidden, head, times), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def one_by_one(loss_of: Callable[[int], LossOutput], n: int) -> torch.Tensor:
    return torch.stack([loss_of(k).loss.detach() for k in range(n)])


@given(
    seed=seeds,
    share=st.sampled_from([0.0, 0.7, 1.0]),
    size=st.sampled_from([1, 700, 1 << 20]),
    times=st.sampled_from([1.0, -2.5]),
)
def test_composed_from_hidden_states_is_composed_from_logits(
    seed: int, share: float, size: int, times: float
):
    rng = np.random.default_rng(seed)
    c = case(seed, dtype=torch.float64)
    N, V = c.logits_NV.shape
    head = random_head(rng, V, 5)
    hidden = torch.from_numpy(rng.standard_normal((N, 5))).requires_grad_()
    said = [t.targets for t in c.teachers]

    def from_logits() -> tuple[torch.Tensor, LossOutput]:
        logits = head.logits(hidden)
        alone = [split_targets(s, range(N + 1)) for s in said]
        each = one_by_one(
            lambda n: event_kl_loss(
                logits[n : n + 1], c.labels_N[n : n + 1], [a[n] for a in alone], share
            ),
            N,
        )
        return each, event_kl_loss(logits, c.labels_N, said, share)

    with room(size):
        same(
            lambda: event_kl_loss_from_hidden(hidden, head, c.labels_N, said, share),
            from_logits,
            hidden,
            head,
            times,
        )
        mine, theirs = (
            event_kl_loss_from_hidden(hidden, head, c.labels_N, said, share),
            event_kl_loss(head.logits(hidden), c.labels_N, said, share),
        )
    assert (
        mine.metrics == pytest.approx({k: float(v) for k, v in theirs.metrics.items()})
        and mine.num_tokens == N
    )


@given(seed=seeds, size=st.sampled_from([1, 1 << 20]))
def test_a_head_with_a_rest_too(seed: int, size: int):
    rng = np.random.default_rng(seed)
    N, V, W = 5, 24, 15
    bridge = random_bridge(rng, W, V, 6)
    rows = {
        n: np.where((p := rng.dirichlet(np.full(W, 0.4))) >= np.sort(p)[-3], p, 0.0)
        for n in (3, 0, 2)
    }
    raw = said_of(bridge, rows)
    said = build_batch_targets(
        bridge,
        build_event_targets(bridge, raw.row_M, raw.ids_M, raw.probs_M, kind=DistributionKind.TOPK),
        N,
    )
    head, tokens = random_head(rng, V, 4), torch.from_numpy(rng.integers(0, V, N))
    hidden = torch.from_numpy(rng.standard_normal((N, 4))).requires_grad_()
    with room(size):
        mine = event_kl_loss_from_hidden(hidden, head, tokens, [said], 0.7)
    theirs = event_kl_loss(head.logits(hidden), tokens, [said], 0.7)
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(mine, hidden, head), gradients(theirs, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@given(seed=seeds, size=st.sampled_from([1, 1 << 20]))
def test_without_teachers_it_is_cross_entropy(seed: int, size: int):
    rng = np.random.default_rng(seed)
    head, hidden = (
        random_head(rng, 30, 6),
        torch.from_numpy(rng.standard_normal((7, 6))).requires_grad_(),
    )
    tokens = torch.from_numpy(rng.integers(0, 30, 7))

    def from_logits() -> tuple[torch.Tensor, LossOutput]:
        logits = head.logits(hidden)
        return one_by_one(
            lambda n: cross_entropy(logits[n : n + 1], tokens[n : n + 1]), 7
        ), cross_entropy(logits, tokens)

    with room(size):
        same(
            lambda: event_kl_loss_from_hidden(hidden, head, tokens, [], 0.7),
            from_logits,
            hidden,
            head,
            1.0,
        )


def test_weights_count_positions():
    rng = np.random.default_rng(5)
    c = case(5, dtype=torch.float64)
    N, V = c.logits_NV.shape
    head, hidden = (
        random_head(rng, V, 3),
        torch.from_numpy(rng.standard_normal((N, 3))).requires_grad_(),
    )
    weight = torch.from_numpy(rng.random(N))
    said = [t.targets for t in c.teachers]
    alone = [split_targets(s, range(N + 1)) for s in said]
    logits = head.logits(hidden)
    want = (
        sum(
            weight[n]
            * event_kl_loss(
                logits[n : n + 1], c.labels_N[n : n + 1], [a[n] for a in alone], 0.7
            ).loss
            for n in range(N)
        )
        / N
    )
    with room(300):
        out = event_kl_loss_from_hidden(hidden, head, c.labels_N, said, 0.7, weight)
    torch.testing.assert_close(out.loss, want)
    theirs = gradients(replace(out, loss=want), hidden, head)
    for a, b in zip(gradients(out, hidden, head), theirs, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(out.grad_norm_N, theirs[0].norm(dim=1) * N)
    assert out.token_loss_N is not None
    torch.testing.assert_close(
        (out.token_loss_N * weight).mean(), out.loss.detach()
    )  # what each cost is without its weight
    assert (
        event_kl_loss_from_hidden(hidden.detach(), head, c.labels_N, said, 0.7).grad_norm_N is None
    )


# ---- whole distributions -------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
@given(
    seed=seeds,
    size=st.sampled_from([1, 1 << 20]),
    online=st.booleans(),
    times=st.sampled_from([1.0, 0.5]),
)
def test_divergences_of_one_vocabulary(
    divergence: Divergence, seed: int, size: int, online: bool, times: float
):
    """From rows that are given, some tokens ruled out where the divergence allows it, and from a
    teacher's own head.
    """
    rng = np.random.default_rng(seed)
    N, V = 6, 21
    head, theirs = random_head(rng, V, 5), random_head(rng, V, 9)
    hidden, thinks = (
        torch.from_numpy(rng.standard_normal((N, d))).requires_grad_() for d in (5, 9)
    )
    p_NV = theirs.logits(thinks).detach().log_softmax(-1)
    if not online and divergence is not Divergence.REVERSE:
        p_NV = p_NV.masked_fill(torch.from_numpy(rng.random((N, V)) < 0.3), -torch.inf).log_softmax(
            -1
        )
    before = p_NV.clone()

    def from_logits() -> tuple[torch.Tensor, LossOutput]:
        logits = head.logits(hidden)
        return one_by_one(
            lambda n: divergence_loss(logits[n : n + 1], p_NV[n : n + 1], divergence), N
        ), divergence_loss(logits, p_NV, divergence)

    with room(size):
        same(
            lambda: divergence_loss_from_hidden(
                hidden, head, (thinks, theirs) if online else p_NV, divergence=divergence
            ),
            from_logits,
            hidden,
            head,
            times,
        )
    assert torch.equal(p_NV, before)  # what was given is as it was
    assert thinks.grad is None and theirs.weight_VD.grad is None


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_what_both_all_but_rule_out_costs_nothing(divergence: Divergence):
    """Probabilities of e^-200 are 0 in float32, and 0 times the log of 0 would be NaN."""
    head = LMHead(torch.tensor([[200.0], [0.0], [-1.0]], requires_grad=True), 3)
    hidden = torch.ones(1, 1, requires_grad=True)
    p_NV = torch.log_softmax(torch.tensor([[150.0, 0.0, -30.0]]), -1)
    out = divergence_loss_from_hidden(hidden, head, p_NV, divergence=divergence)
    assert float(out.loss.detach()) == pytest.approx(0, abs=1e-6)
    assert all(torch.isfinite(g).all() for g in gradients(out, hidden, head))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("online", [False, True])
def test_divergences_over_events(
    divergence: Divergence, masked: bool, online: bool, monkeypatch: pytest.MonkeyPatch
):
    rng = np.random.default_rng(3)
    N, V, W = 7, 26, 19
    bridge = random_bridge(rng, W, V, 6)
    head, theirs = random_head(rng, V, 5), random_head(rng, W, 4)
    hidden, thinks = (
        torch.from_numpy(rng.standard_normal((N, d))).requires_grad_() for d in (5, 4)
    )
    p_NW = theirs.logits(thinks).detach().log_softmax(-1)
    order = torch.from_numpy(rng.permutation(N))
    dead = ImpossibleTokens(order, torch.from_numpy(rng.integers(0, V, N))) if masked else None
    sides = MaskedEventMap(
        bridge, dead, dead and ImpossibleTokens(order, torch.from_numpy(rng.integers(0, W, N)))
    )
    theirs_out = event_divergence_loss(
        head.logits(hidden),
        p_NW,
        bridge,
        divergence,
        student_impossible_tokens=sides.student_impossible_tokens,
        teacher_impossible_tokens=sides.teacher_impossible_tokens,
    )
    monkeypatch.setattr("persea.losses.event_kl.CPU_CACHE_ELEMENTS", 90)  # two positions at a time
    with room(8 * (V + W) * 3):
        mine = divergence_loss_from_hidden(
            hidden, head, (thinks, theirs) if online else p_NW, sides, divergence
        )
    torch.testing.assert_close(mine.loss, theirs_out.loss, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        gradients(mine, hidden, head), gradients(theirs_out, hidden, head), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# ---- precision, room, refusals -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_and_bfloat16_stay_near_float64(dtype: torch.dtype):
    rng = np.random.default_rng(11)
    c = case(11, dtype=torch.float64)
    N, V = c.logits_NV.shape
    exact = LMHead(
        torch.from_numpy(rng.standard_normal((V, 32)) / 4).to(dtype).double().requires_grad_(), V
    )
    hidden = torch.from_numpy(rng.standard_normal((N, 32))).to(dtype).double().requires_grad_()
    said = [t.targets for t in c.teachers]
    want = event_kl_loss(exact.logits(hidden), c.labels_N, said, 0.7)
    head, low = (
        replace(exact, weight_VD=exact.weight_VD.detach().to(dtype).requires_grad_()),
        hidden.detach().to(dtype).requires_grad_(),
    )
    out = event_kl_loss_from_hidden(low, head, c.labels_N, said, 0.7)
    assert out.loss.item() == pytest.approx(want.loss.item(), rel=1e-5)
    rtol, atol = (
        (1e-4, 1e-6) if dtype is torch.float32 else (1e-2, 1e-3)
    )  # a bfloat16 gradient has 8 bits
    for a, b in zip(gradients(out, low, head), gradients(want, hidden, exact), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_rounds_factors_where_hidden_states_are_bfloat16(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three products, of a float32 weight; and no product after them."""
    seen, setting = [], torch.backends.mkldnn.matmul
    before = setting.fp32_precision

    def watch(name: str) -> None:
        real = getattr(heads, name)

        def product(*args: Any, **named: Any) -> Any:
            seen.append(setting.fp32_precision)
            return real(*args, **named)

        monkeypatch.setattr(heads, name, product)

    for name in ("project_to_logits", "project_to_hidden", "accumulate_weight_gradient"):
        watch(name)
    c = case(3, dtype=torch.float32)
    N, V = c.logits_NV.shape
    head = LMHead(torch.randn(V, 32, requires_grad=True), V)
    hidden = torch.randn(N, 32).to(dtype).requires_grad_()
    event_kl_loss_from_hidden(hidden, head, c.labels_N, [t.targets for t in c.teachers], 0.7)
    assert seen == 3 * ["bf16" if dtype is torch.bfloat16 else before]
    assert setting.fp32_precision == before and head.weight_VD.dtype is torch.float32


@pytest.mark.parametrize("divergence", [None, *DIVERGENCES])
@given(
    seed=seeds,
    N=st.sampled_from([1, 15, 17, 37]),
    size=st.sampled_from([1, 4 * 2 * 21 * 16, 1 << 20]),
)
def test_rows_of_zeros_beside_a_chunk_change_nothing(
    divergence: Divergence | None, seed: int, N: int, size: int
):
    """Float32 products are made with more rows than there are positions (products.padded_rows),
    whatever head and chunks; float64's are not.
    """
    rng = np.random.default_rng(seed)
    exact, V = random_head(rng, 21, 5), 21
    hidden, thinks = (
        torch.from_numpy(rng.standard_normal((N, 5))).float().double().requires_grad_()
        for _ in range(2)
    )
    exact = replace(
        exact,
        weight_VD=exact.weight_VD.detach().float().double().requires_grad_(),
        bias_V=None
        if exact.bias_V is None
        else exact.bias_V.detach().float().double().requires_grad_(),
    )
    low = hidden.detach().float().requires_grad_()
    head = replace(
        exact,
        weight_VD=exact.weight_VD.detach().float().requires_grad_(),
        bias_V=None if exact.bias_V is None else exact.bias_V.detach().float().requires_grad_(),
    )
    tokens, weight = torch.from_numpy(rng.integers(0, V, N)), torch.from_numpy(rng.random(N))

    def loss(states: torch.Tensor, one: LMHead) -> LossOutput:
        if divergence is None:
            return event_kl_loss_from_hidden(states, one, tokens, [], 0.7, weight)
        return divergence_loss_from_hidden(
            states,
            one,
            (thinks.detach().to(states.dtype), replace(one, weight_VD=one.weight_VD.detach() / 2)),
            divergence=divergence,
            weight_N=weight,
        )

    with room(size):
        mine, theirs = loss(low, head), loss(hidden, exact)
    torch.testing.assert_close(mine.loss.double(), theirs.loss, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(mine, low, head), gradients(theirs, hidden, exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-6)


def test_autocast_does_not_reach_into_the_head():
    rng = np.random.default_rng(2)
    head, hidden = (
        random_head(rng, 50, 64, torch.float32),
        torch.from_numpy(rng.standard_normal((9, 64))).float().requires_grad_(),
    )
    tokens = torch.from_numpy(rng.integers(0, 50, 9))
    plain = event_kl_loss_from_hidden(hidden, head, tokens, [], 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = event_kl_loss_from_hidden(hidden, head, tokens, [], 0.0)
    assert torch.equal(plain.loss, inside.loss)


@pytest.mark.parametrize("positions", [64, 512])
@pytest.mark.parametrize("teachers", [1, 4])
def test_workspace_does_not_grow_with_positions_or_teachers(positions: int, teachers: int):
    """Beside the gradients themselves, and what the rows themselves take, a few chunks' worth: half
    a MiB here for 1.5 MiB of logits and more.
    """
    rng = np.random.default_rng(0)
    V, D = 6_000, 8
    weight, hidden = (
        torch.randn(V, D, requires_grad=True),
        torch.randn(positions, D, requires_grad=True),
    )
    bridge = random_bridge(rng, 40, V, 30)
    said = [
        said_of(
            bridge, {n: rng.dirichlet(np.full(40, 0.3)) for n in range(k, positions, 4 * teachers)}
        ).targets
        for k in range(teachers)
    ]
    tokens = torch.from_numpy(rng.integers(0, V, positions))
    entries = sum(len(s.token_G) for s in said)
    with room(1 << 19), Peak() as peak:
        event_kl_loss_from_hidden(hidden, LMHead(weight, V), tokens, said, 0.7)
    floor = 4 * (weight.numel() + hidden.numel())
    assert peak.bytes > floor  # the meter sees what is there
    assert peak.bytes < floor + (3 << 20) + 80 * (entries + positions), (
        f"{(peak.bytes - floor) / 2**20:.1f} MiB beside the gradients"
    )


def test_a_frozen_weight_gets_no_gradient_and_takes_no_room():
    weight, hidden = torch.randn(9_000, 64), torch.randn(5, 64, requires_grad=True)
    with Peak() as peak:
        event_kl_loss_from_hidden(
            hidden, LMHead(weight, 9_000), torch.arange(5), [], 0.7
        ).loss.backward()
    assert weight.grad is None and hidden.grad is not None
    assert peak.bytes < weight.numel() * 4


def test_without_gradients_it_is_a_loss():
    head, hidden = (
        LMHead(torch.randn(9, 3, requires_grad=True), 9),
        torch.randn(4, 3, requires_grad=True),
    )
    with torch.no_grad():
        out = event_kl_loss_from_hidden(hidden, head, torch.arange(4), [], 0.7)
    assert not out.loss.requires_grad
    torch.testing.assert_close(
        out.loss, cross_entropy(head.logits(hidden), torch.arange(4)).loss.detach()
    )


def test_a_gradient_is_had_once():
    out = event_kl_loss_from_hidden(
        torch.randn(4, 3, requires_grad=True),
        LMHead(torch.randn(9, 3), 9),
        torch.arange(4),
        [],
        0.7,
    )
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        out.loss.backward()


class Sharded(torch.Tensor):
    """A tensor that is more than a tensor, as DTensor is."""


@pytest.mark.parametrize(
    ("hidden", "weight", "reason"),
    [
        (torch.zeros(2, 3), torch.zeros(9, 4), r"hidden states \(2, 3\) for a head \(9, 4\)"),
        (torch.zeros(0, 4), torch.zeros(9, 4), "at least one supervised position"),
        (torch.zeros(2, 4), torch.zeros(8, 4), "of 9 tokens"),
        (torch.zeros(2, 4, device="meta"), torch.zeros(9, 4), "hidden states on meta"),
        (
            torch.zeros(2, 4),
            torch.zeros(9, 4).as_subclass(Sharded),
            "is a Sharded, not a whole matrix",
        ),
    ],
)
def test_a_head_that_does_not_fit_is_refused(
    hidden: torch.Tensor, weight: torch.Tensor, reason: str
):
    with pytest.raises(DataError, match=reason):
        event_kl_loss_from_hidden(
            hidden, LMHead(weight, 9), torch.zeros(len(hidden), dtype=torch.int64), [], 0.7
        )


def test_a_teacher_of_other_positions_or_tokens_is_refused():
    hidden, head = torch.zeros(2, 4), LMHead(torch.zeros(9, 4), 9)
    teachers: list[Any] = [
        torch.zeros(3, 9),
        torch.zeros(2, 8),
        (torch.zeros(2, 4), LMHead(torch.zeros(8, 4), 8)),
    ]
    for teacher in teachers:
        with pytest.raises(DataError, match="different vocabularies need an event map"):
            divergence_loss_from_hidden(hidden, head, teacher)
