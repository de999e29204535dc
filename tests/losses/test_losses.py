"""The default objective against a slow float64 oracle, against its own algebra, and against a world
whose truth is known.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import worlds
from hypothesis import given
from hypothesis import strategies as st
from worlds import WORLDS

from persea.alignment.event_map import EventMap
from persea.chat.renderer import ChatRenderer
from persea.distributions import DistributionKind, SparseDistributions, sample_distributions
from persea.errors import DataError, RecipeError
from persea.losses import (
    BatchTargets,
    Divergence,
    ImpossibleTokens,
    LossOutput,
    SpanTargets,
    build_batch_targets,
    build_event_targets,
    concat_event_targets,
    cross_entropy,
    divergence_loss,
    event_divergence_loss,
    event_kl_loss,
    event_logprobs,
    refuse_divergence,
    span_likelihood_loss,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "composed.json"
seeds = st.integers(0, 2**32 - 1)


# ---- cases ---------------------------------------------------------------------------------------


def random_bridge(rng: np.random.Generator, W: int, V: int, E: int) -> EventMap:
    """Any maps with at least one student token an event; some tokens of both sides are left out."""
    student = np.concatenate([np.arange(E), rng.integers(-1, E, V - E)])
    return EventMap(
        rng.integers(-1, E, W).astype(np.int32), rng.permutation(student).astype(np.int32), E, ""
    )


def identity(V: int) -> EventMap:
    return EventMap(np.arange(V, dtype=np.int32), np.arange(V, dtype=np.int32), V, "")


@dataclass(frozen=True)
class Said:
    """What a teacher says, raw, and the bridge it is to pass. M = entries."""

    event_map: EventMap
    row_M: np.ndarray
    ids_M: np.ndarray
    probs_M: np.ndarray

    @property
    def targets(self) -> BatchTargets:
        return build_batch_targets(
            self.event_map,
            build_event_targets(self.event_map, self.row_M, self.ids_M, self.probs_M),
            0,
        )


@dataclass(frozen=True)
class Ready:
    """Targets as they are: rows in double precision."""

    targets: BatchTargets


def said_of(bridge: EventMap, rows: dict[int, np.ndarray]) -> Said:
    """Dense rows, position -> p_W; entries of probability 0 are not stored."""
    row = [n for n, p_W in rows.items() for _ in np.flatnonzero(p_W)]
    ids = [w for p_W in rows.values() for w in np.flatnonzero(p_W)]
    probs = [p_W[w] for p_W in rows.values() for w in np.flatnonzero(p_W)]
    return Said(
        bridge, np.array(row, np.int64), np.array(ids, np.int64), np.array(probs, np.float32)
    )


def run(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, teachers: Sequence[Said], share: float
) -> LossOutput:
    return event_kl_loss(logits_NV, targets_N, [said.targets for said in teachers], share)


def asked(bridge: EventMap, row_M: np.ndarray, event_M: np.ndarray) -> BatchTargets:
    """Events asked for one by one: through a teacher whose tokens are the events."""
    names = replace(bridge, teacher_event_W=np.arange(bridge.num_events, dtype=np.int32))
    return Said(names, row_M, event_M, np.ones(len(row_M), np.float32)).targets


@dataclass(frozen=True)
class Case:
    logits_NV: torch.Tensor
    labels_N: torch.Tensor
    teachers: tuple[Said, ...]


def case(seed: int, *, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> Case:
    """Two teachers with vocabularies of their own; each speaks of some positions, nobody of the
    rest.
    """
    rng = np.random.default_rng(seed)
    N, V = int(rng.integers(2, 9)), int(rng.integers(8, 40))
    logits = torch.from_numpy(scale * rng.standard_normal((N, V))).to(dtype)
    whose = rng.integers(0, 3, N)
    teachers = []
    for k in range(2):
        W = int(rng.integers(3, 50))
        rows = {
            n: rng.dirichlet(np.full(W, 0.3))
            for n in rng.permutation(np.flatnonzero(whose == k)).tolist()
        }
        teachers.append(said_of(random_bridge(rng, W, V, int(rng.integers(2, min(9, V)))), rows))
    return Case(logits, torch.from_numpy(rng.integers(0, V, N)), tuple(teachers))


def naive(c: Case, logits_NV: torch.Tensor, share: float) -> torch.Tensor:
    """The module's formula, position by position and event by event, in whatever precision the
    logits have.
    """
    q_NV = torch.softmax(logits_NV, -1)
    total = torch.zeros((), dtype=logits_NV.dtype)
    for n in range(len(logits_NV)):
        ce = -torch.log(q_NV[n, c.labels_N[n]])
        events, mass = torch.zeros_like(ce), 0.0
        for said in c.teachers:
            student = torch.from_numpy(said.event_map.student_event_V)
            for row, w, p in zip(
                said.row_M.tolist(), said.ids_M.tolist(), said.probs_M.tolist(), strict=True
            ):
                event = int(said.event_map.teacher_event_W[w])
                if row == n and event >= 0:
                    events, mass = events - p * torch.log(q_NV[n, student == event].sum()), mass + p
        total = total + share * events + (1 - share * mass) * ce
    return total / len(logits_NV)


def value_and_gradient(c: Case, share: float) -> tuple[LossOutput, torch.Tensor]:
    logits = c.logits_NV.clone().requires_grad_()
    out = run(logits, c.labels_N, c.teachers, share)
    out.loss.backward()
    assert logits.grad is not None
    return out, logits.grad


# ---- against the oracle --------------------------------------------------------------------------


@given(seed=seeds, share=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_composed_is_its_formula(seed: int, share: float):
    c = case(seed)
    exact = c.logits_NV.double().requires_grad_()
    want = naive(c, exact, share)
    want.backward()
    out, gradient = value_and_gradient(c, share)
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-5)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-4, atol=1e-6)
    in_double, gradient = value_and_gradient(replace(c, logits_NV=c.logits_NV.double()), share)
    assert in_double.loss.item() == pytest.approx(want.item(), rel=1e-12, abs=1e-12)
    torch.testing.assert_close(gradient, exact.grad, rtol=1e-9, atol=1e-12)


@given(seed=seeds)
def test_event_logprobs_are_sums_over_members(seed: int):
    rng = np.random.default_rng(seed)
    bridge = random_bridge(rng, 5, 30, 7)
    logits = torch.from_numpy(4 * rng.standard_normal((6, 30))).requires_grad_()
    row_M, event_M = rng.integers(0, 6, 25), rng.integers(0, 7, 25)
    got = event_logprobs(logits, logits.logsumexp(-1), asked(bridge, row_M, event_M))
    member_EV = torch.from_numpy(bridge.student_event_V)[None] == torch.arange(7)[:, None]
    want = torch.log((torch.softmax(logits, -1)[row_M] * member_EV[event_M]).sum(-1))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weights = torch.from_numpy(rng.standard_normal(25))
    mine, theirs = (
        torch.autograd.grad(x @ weights, logits, retain_graph=True)[0] for x in (got, want)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_nothing_asked_is_nothing_answered():
    logits = torch.zeros(2, 5)
    none = np.empty(0, np.int64)
    assert event_logprobs(logits, logits.logsumexp(-1), asked(identity(5), none, none)).shape == (
        0,
    )


def test_an_event_no_student_token_says_is_a_bug_and_not_a_loss():
    bridge = EventMap(np.array([0, 1], np.int32), np.array([0, 0, -1], np.int32), 2, "")
    with pytest.raises(AssertionError, match="without student tokens"):
        run(torch.zeros(1, 3), torch.tensor([0]), [said_of(bridge, {0: np.array([0.5, 0.5])})], 0.7)


# ---- what it reduces to --------------------------------------------------------------------------


@given(seed=seeds)
def test_the_same_tokenizer_and_full_rows_are_forward_kl(seed: int):
    """The divergence everybody knows: soft cross-entropy, whose difference to the forward KL is the
    teacher's own entropy.
    """
    rng = np.random.default_rng(seed)
    N, V = 5, 23
    p_NV = torch.softmax(torch.from_numpy(3 * rng.standard_normal((N, V))), -1)
    c = Case(
        torch.from_numpy(3 * rng.standard_normal((N, V))),
        torch.from_numpy(rng.integers(0, V, N)),
        (),
    )
    row_M, ids_M = np.arange(N).repeat(V), np.tile(np.arange(V), N)
    exact_rows = replace(
        Said(identity(V), row_M, ids_M, p_NV.flatten().numpy()).targets, probs_M=p_NV.flatten()
    )
    c = replace(c, teachers=(Ready(exact_rows),))
    lse_N = c.logits_NV.logsumexp(-1)
    log_q = event_logprobs(c.logits_NV, lse_N, exact_rows)
    assert torch.equal(log_q, (c.logits_NV - lse_N[:, None]).flatten()), (
        "bit for bit: one token an event"
    )
    out, gradient = value_and_gradient(c, 1.0)
    logits = c.logits_NV.clone().requires_grad_()
    plain = F.cross_entropy(logits, p_NV)
    plain.backward()
    assert out.loss.item() == pytest.approx(plain.item(), abs=1e-12)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-10, atol=1e-14)
    divergence = F.kl_div(torch.log_softmax(c.logits_NV, -1), p_NV, reduction="batchmean")
    assert out.loss.item() - divergence.item() == pytest.approx(
        -(p_NV * p_NV.log()).sum(-1).mean().item(), abs=1e-12
    )
    short = value_and_gradient(replace(c, logits_NV=c.logits_NV.float()), 1.0)[0]
    assert short.loss.item() == pytest.approx(plain.item(), abs=2e-6)


@given(seed=seeds)
def test_no_share_and_no_teacher_are_cross_entropy(seed: int):
    c = case(seed, dtype=torch.float64)
    plain = cross_entropy(c.logits_NV, c.labels_N)
    log_q = torch.log_softmax(c.logits_NV.double(), -1)[range(len(c.labels_N)), c.labels_N]
    assert plain.loss.item() == pytest.approx(-log_q.mean().item(), rel=1e-5)
    assert plain.num_tokens == len(c.labels_N)
    by_position = F.cross_entropy(
        c.logits_NV, c.labels_N, reduction="none"
    ).mean()  # another order of summing than plain's
    nobody = tuple(Said(s.event_map, s.row_M[:0], s.ids_M[:0], s.probs_M[:0]) for s in c.teachers)
    control = tuple(
        replace(
            s,
            event_map=replace(
                s.event_map, teacher_event_W=np.full_like(s.event_map.teacher_event_W, -1)
            ),
        )
        for s in c.teachers
    )
    for teachers, share in ((c.teachers, 0.0), ((), 0.7), (nobody, 0.7), (control, 1.0)):
        out = run(c.logits_NV, c.labels_N, teachers, share)
        torch.testing.assert_close(out.loss, by_position, rtol=1e-6, atol=1e-6)
        assert out.metrics["cross_entropy"] == pytest.approx(
            float(plain.metrics["cross_entropy"]), rel=1e-6
        )
        assert out.num_tokens == plain.num_tokens


@given(seed=seeds)
def test_terms_and_positions(seed: int):
    c = case(seed, dtype=torch.float64)
    out = run(c.logits_NV, c.labels_N, c.teachers, 1.0)
    assert out.num_tokens == len(c.labels_N)
    assert out.metrics["cross_entropy"] == pytest.approx(
        cross_entropy(c.logits_NV, c.labels_N).loss.item(), rel=1e-6
    )
    spoken, mass = set(), defaultdict(float)
    for said in c.teachers:
        for n, w, p in zip(
            said.row_M.tolist(), said.ids_M.tolist(), said.probs_M.tolist(), strict=True
        ):
            if said.event_map.teacher_event_W[w] >= 0:
                spoken.add(n)
                mass[n] += p
    with_ce = sum(
        (1 - mass[n]) * ce
        for n, ce in enumerate(F.cross_entropy(c.logits_NV, c.labels_N, reduction="none").tolist())
    )
    events = out.loss.item() * len(c.labels_N) - with_ce
    assert out.metrics["event_kl"] * len(c.labels_N) == pytest.approx(events, rel=1e-4, abs=1e-3)
    assert out.metrics["supervised"] == pytest.approx(
        len([n for n in spoken if mass[n] > 0]) / len(c.labels_N)
    )
    assert not out.loss.requires_grad


# ---- total weight one ----------------------------------------------------------------------------


@given(seed=seeds, share=st.sampled_from([0.3, 0.7, 1.0]))
def test_every_position_carries_total_weight_one(seed: int, share: float):
    """A token that is in no event and is never the target gets its gradient from the normaliser
    alone: total weight times q.
    """
    c = case(seed, dtype=torch.float64)
    N, V = c.logits_NV.shape
    outside = torch.full((N, 1), 1.5, dtype=torch.float64)
    bridges = [
        replace(s.event_map, student_event_V=np.append(s.event_map.student_event_V, np.int32(-1)))
        for s in c.teachers
    ]
    wider = tuple(
        replace(s, event_map=bridge) for s, bridge in zip(c.teachers, bridges, strict=True)
    )
    c = Case(torch.cat([c.logits_NV, outside], 1), c.labels_N, wider)
    _, gradient = value_and_gradient(c, share)
    weight_N = N * gradient[:, V] / torch.softmax(c.logits_NV, -1)[:, V]
    torch.testing.assert_close(
        weight_N, torch.ones(N, dtype=torch.float64), rtol=1e-6, atol=1e-6
    )  # the rows are float32


@given(seed=seeds, share=st.sampled_from([0.3, 0.7, 1.0]))
def test_a_student_that_knows_nothing_pays_what_it_must(seed: int, share: float):
    """Uniform logits: cross-entropy is log V, an event of k tokens costs log V - log k."""
    c = case(seed, scale=0.0)
    N, V = c.logits_NV.shape
    saved = 0.0
    for said in c.teachers:
        sizes = np.bincount(
            said.event_map.student_event_V[said.event_map.student_event_V >= 0],
            minlength=said.event_map.num_events,
        )
        for w, p in zip(said.ids_M.tolist(), said.probs_M.tolist(), strict=True):
            if said.event_map.teacher_event_W[w] >= 0:
                saved += p * math.log(sizes[said.event_map.teacher_event_W[w]])
    out = run(c.logits_NV, c.labels_N, c.teachers, share)
    assert out.loss.item() == pytest.approx(math.log(V) - share * saved / N, abs=1e-5)


def test_mass_on_control_tokens_goes_to_cross_entropy():
    bridge = EventMap(np.array([0, 1, -1], np.int32), np.array([0, 1, 1, -1], np.int32), 2, "")
    logits, target = torch.tensor([[0.3, -1.0, 2.0, 0.5]]), torch.tensor([3])
    log_q = torch.log_softmax(logits[0], -1)
    first, ce = -log_q[0].item(), -log_q[3].item()
    for lost in (0.0, 0.25, 0.9, 1.0):
        out = run(logits, target, [said_of(bridge, {0: np.array([1 - lost, 0.0, lost])})], 0.7)
        assert out.loss.item() == pytest.approx(
            0.7 * (1 - lost) * first + (1 - 0.7 * (1 - lost)) * ce, abs=1e-6
        )


def test_position_by_position():
    """A teacher who speaks of one position changes nothing at the others."""
    c = case(11)
    N, V = c.logits_NV.shape
    ce = cross_entropy(c.logits_NV, c.labels_N)
    bridge = random_bridge(np.random.default_rng(1), 9, V, 4)
    for n in range(N):
        said = said_of(bridge, {n: np.random.default_rng(n).dirichlet(np.ones(9))})
        _, gradient = value_and_gradient(replace(c, teachers=(said,)), 0.7)
        _, plain = value_and_gradient(replace(c, teachers=()), 0.7)
        others = [k for k in range(N) if k != n]
        assert torch.equal(gradient[others], plain[others])
        assert not torch.allclose(gradient[n], plain[n])
        alone = Case(
            c.logits_NV[n : n + 1],
            c.labels_N[n : n + 1],
            (replace(said, row_M=np.zeros_like(said.row_M)),),
        )
        whole = run(c.logits_NV, c.labels_N, (said,), 0.7).loss.item() * N
        rest = ce.loss.item() * N - F.cross_entropy(alone.logits_NV, alone.labels_N).item()
        assert whole == pytest.approx(
            rest + run(alone.logits_NV, alone.labels_N, alone.teachers, 0.7).loss.item(), abs=1e-4
        )


# ---- linear, so unbiased -------------------------------------------------------------------------


@given(seed=seeds, mix=st.floats(0, 1))
def test_linear_in_the_teacher(seed: int, mix: float):
    rng = np.random.default_rng(seed)
    c = case(seed, dtype=torch.float64)
    N, V = c.logits_NV.shape
    bridge = random_bridge(rng, 12, V, 5)
    one, two = ({n: rng.dirichlet(np.full(12, 0.5)) for n in range(N)} for _ in range(2))
    both = {n: mix * one[n] + (1 - mix) * two[n] for n in range(N)}
    a, b, ab = (
        value_and_gradient(replace(c, teachers=(said_of(bridge, rows),)), 0.7)
        for rows in (one, two, both)
    )
    assert ab[0].loss.item() == pytest.approx(
        mix * a[0].loss.item() + (1 - mix) * b[0].loss.item(), abs=1e-5
    )
    torch.testing.assert_close(ab[1], mix * a[1] + (1 - mix) * b[1], rtol=0, atol=1e-6)


DRAWS = 2000


def sampled(p_W: np.ndarray, tau: float) -> SparseDistributions:
    """One distribution drawn DRAWS times, each draw with its own random start."""
    return sample_distributions(
        torch.from_numpy(np.log(p_W)).expand(DRAWS, -1),
        np.zeros(DRAWS, np.int64),
        tau,
        "losses",
    )


def top(p_W: np.ndarray, k: int) -> SparseDistributions:
    """What other tools keep: the k likeliest, renormalised; as many entries as the sample has."""
    best = np.argsort(-p_W)[:k]
    probs = p_W[best] / p_W[best].sum()
    return SparseDistributions(
        np.arange(DRAWS + 1) * k,
        np.tile(best, DRAWS).astype(np.int32),
        np.tile(probs, DRAWS).astype(np.float32),
        np.zeros(DRAWS, np.float32),
    )


def z_scores(
    rows: SparseDistributions, c: Case, bridge: EventMap, full: tuple[float, torch.Tensor]
) -> tuple[float, torch.Tensor]:
    """Standard errors between the mean over draws of loss and gradient, and the full row's."""
    per = 50
    row_M = np.repeat(np.arange(DRAWS), np.diff(rows.offsets_N1))
    ids_M, probs_M = rows.ids_M, rows.probs_M
    wide = Case(
        c.logits_NV.expand(DRAWS, -1),
        c.labels_N.expand(DRAWS),
        (Said(bridge, row_M, ids_M, probs_M),),
    )
    gradient = value_and_gradient(wide, 0.7)[1] * DRAWS
    spread = gradient.std(0) / math.sqrt(DRAWS)
    z_gradient = (gradient.mean(0) - full[1][0]) / spread.clamp(min=1e-6)
    losses = []
    for begin in range(0, DRAWS, per):
        some = (row_M >= begin) & (row_M < begin + per)
        said = Said(bridge, row_M[some] - begin, ids_M[some], probs_M[some])
        losses.append(run(wide.logits_NV[:per], wide.labels_N[:per], [said], 0.7).loss.item())
    return (np.mean(losses) - full[0]) / max(
        1e-6, np.std(losses, ddof=1) / math.sqrt(len(losses))
    ), z_gradient


def test_sampled_rows_are_unbiased_and_top_k_is_not():
    rng = np.random.default_rng(5)
    p_W = rng.dirichlet(np.full(80, 0.25)) * 0.999 + 0.001 / 80
    bridge = random_bridge(rng, 80, 60, 30)
    c = Case(
        torch.from_numpy(2 * rng.standard_normal((1, 60))),
        torch.tensor([3]),
        (said_of(bridge, {0: p_W}),),
    )
    out, gradient = value_and_gradient(c, 0.7)
    full = (out.loss.item(), gradient)
    rows = sampled(p_W, 0.1)
    mean_size = len(rows.ids_M) / DRAWS
    assert mean_size < 12, "sparse"
    z_loss, z_gradient = z_scores(rows, c, bridge, full)
    assert abs(z_loss) < 4
    assert (z_gradient.abs() < 4).all()
    z_loss, z_gradient = z_scores(top(p_W, round(mean_size)), c, bridge, full)
    assert abs(z_loss) > 40, "this test would not see a bias"
    assert z_gradient.abs().max() > 40


# ---- a head with a rest --------------------------------------------------------------------------


def top_said(bridge: EventMap, rows: dict[int, np.ndarray], k: int) -> Said:
    """The k likeliest entries of dense rows, as a server gives them: exact, never renormalised."""
    return said_of(
        bridge, {n: np.where(p_W >= np.sort(p_W)[-k], p_W, 0.0) for n, p_W in rows.items()}
    )


@given(seed=seeds, share=st.sampled_from([0.3, 0.7, 1.0]), k=st.integers(1, 4))
def test_a_rest_is_one_event(seed: int, share: float, k: int):
    """By brute force: what is not named is one event, of all tokens of no named event."""
    rng = np.random.default_rng(seed)
    N, V, W = 4, 24, 15
    bridge = random_bridge(rng, W, V, 6)
    rows = {n: rng.dirichlet(np.full(W, 0.4)) for n in (0, 2, 3)}
    raw = top_said(bridge, rows, k)
    said = build_batch_targets(
        bridge,
        build_event_targets(bridge, raw.row_M, raw.ids_M, raw.probs_M, kind=DistributionKind.TOPK),
        N,
    )
    logits, tokens = (
        torch.from_numpy(2 * rng.standard_normal((N, V))),
        torch.from_numpy(rng.integers(0, V, N)),
    )
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    q_NV, want = torch.softmax(theirs, -1), torch.zeros((), dtype=torch.float64)
    for n in range(N):
        ce, events, mass, named = (
            -q_NV[n, tokens[n]].log(),
            torch.zeros((), dtype=torch.float64),
            0.0,
            torch.zeros(V, dtype=torch.bool),
        )
        total = sum(p for row, p in zip(raw.row_M, raw.probs_M.tolist(), strict=True) if row == n)
        for row, w, p in zip(raw.row_M, raw.ids_M, raw.probs_M.tolist(), strict=True):
            event = int(bridge.teacher_event_W[w])
            whole = set(np.flatnonzero(bridge.teacher_event_W == event)) <= set(
                raw.ids_M[raw.row_M == n]
            )
            if row == n and event >= 0 and not whole:
                total -= p  # the rest holds a part of this event: it holds all of it
            elif row == n and event >= 0:
                member = torch.from_numpy(bridge.student_event_V == event)
                events, mass, named = (
                    events - p * q_NV[n, member].sum().log(),
                    mass + p,
                    named | member,
                )
        if n in rows:
            rest = max(0.0, 1 - total)
            events, mass = events - rest * q_NV[n, ~named].sum().log(), mass + rest
        want = want + share * events + (1 - share * mass) * ce
    (want / N).backward()
    out = event_kl_loss(mine, tokens, [said], share)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(want.item() / N, rel=1e-5)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_a_rest_keeps_its_digits_where_the_student_is_certain():
    bridge = identity(4)
    raw = Said(bridge, np.array([0]), np.array([0]), np.array([0.75], np.float32))
    said = build_batch_targets(
        bridge,
        build_event_targets(bridge, raw.row_M, raw.ids_M, raw.probs_M, kind=DistributionKind.TOPK),
        1,
    )
    logits = torch.tensor(
        [[60.0, 0.0, 0.0, 1.0]], requires_grad=True
    )  # q(rest) = 4e-26: 1 - q(0) is 0 in float32, and in float64
    out = event_kl_loss(logits, torch.tensor([0]), [said], 1.0)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.25 * (60 - math.log(2 + math.e)), rel=1e-6)
    rest = torch.softmax(torch.tensor([0.0, 0.0, 1.0]), 0)
    torch.testing.assert_close(
        logits.grad, torch.tensor([[0.25, *(-0.25 * rest).tolist()]]), rtol=1e-5, atol=1e-6
    )


def test_rows_without_a_rest_have_none():
    bridge = identity(5)
    said = build_event_targets(
        bridge,
        np.array([1, 1]),
        np.array([0, 3]),
        np.array([0.5, 0.25], np.float32),
        kind=DistributionKind.TOPK,
    )
    assert said.row_R.tolist() == [1] and said.rest_R.tolist() == [0.25]
    assert build_batch_targets(bridge, said, 3).rest_N.tolist() == [0.0, 0.25, 0.0]
    assert (
        len(
            build_batch_targets(
                bridge,
                build_event_targets(
                    bridge, np.array([1]), np.array([0]), np.array([0.5], np.float32)
                ),
                3,
            ).rest_N
        )
        == 0
    )


# ---- what a row's kind allows --------------------------------------------------------------------


def test_only_full_rows_allow_other_divergences_than_forward():
    for kind, divergence in product(DistributionKind, Divergence):
        if kind is DistributionKind.FULL or (
            divergence is Divergence.FORWARD and kind is not DistributionKind.TEXT_ONLY
        ):
            refuse_divergence(kind, divergence)
        else:
            with pytest.raises(
                RecipeError,
                match=f"{divergence.value} KL needs more than distributions of kind {kind.value}",
            ) as caught:
                refuse_divergence(kind, divergence)
            assert caught.value.exit_code == 2 and caught.value.remedy


@pytest.mark.parametrize(
    ("ids", "probs", "kind", "reason"),
    [
        (
            [0, 9],
            [0.5, 0.5],
            DistributionKind.SAMPLED,
            "teacher id 9 is outside the vocabulary of 9 tokens",
        ),
        ([0, -1], [0.5, 0.5], DistributionKind.SAMPLED, "teacher id -1 is outside"),
        ([0, 1], [0.5, float("nan")], DistributionKind.SAMPLED, "a teacher's probability is nan"),
        ([0, 1], [0.5, -0.1], DistributionKind.SAMPLED, r"a teacher's probability is -0\.1"),
        ([0, 1], [0.9, 0.2], DistributionKind.FULL, r"a teacher's probabilities sum to 1\.1"),
        ([0, 1], [0.9, 0.2], DistributionKind.TOPK, r"a teacher's probabilities sum to 1\.1"),
    ],
)
def test_what_is_no_row_is_refused(
    ids: list[int], probs: list[float], kind: DistributionKind, reason: str
):
    bridge = random_bridge(np.random.default_rng(0), 9, 12, 4)
    with pytest.raises(DataError, match=reason) as caught:
        build_event_targets(
            bridge, np.array([3, 3]), np.array(ids), np.array(probs, np.float32), kind=kind
        )
    assert caught.value.exit_code == 3 and caught.value.remedy and "\n" not in str(caught.value)


def test_a_sampled_row_may_exceed_one():
    build_event_targets(
        identity(4), np.array([0, 0]), np.array([0, 1]), np.array([0.9, 0.2], np.float32)
    )


@pytest.mark.parametrize("columns", [11, 13])
def test_logits_of_another_vocabulary_are_refused(columns: int):
    bridge = random_bridge(np.random.default_rng(0), 9, 12, 4)
    said = said_of(bridge, {0: np.full(9, 1 / 9)}).targets
    with pytest.raises(
        DataError, match=f"{columns} logits a position, but the student's tokenizer has 12 tokens"
    ):
        event_kl_loss(torch.zeros(1, columns), torch.tensor([0]), [said], 0.7)
    with pytest.raises(DataError, match=f"{columns} student columns"):
        event_divergence_loss(torch.zeros(1, columns), torch.zeros(1, 9), bridge)
    with pytest.raises(DataError, match=f"{columns} teacher columns"):
        event_divergence_loss(torch.zeros(1, 12), torch.zeros(1, columns), bridge)


def test_entries_of_two_kinds_do_not_mix():
    bridge = identity(4)
    one, two = (
        build_event_targets(
            bridge, np.array([0]), np.array([0]), np.array([0.5], np.float32), kind=kind
        )
        for kind in (DistributionKind.SAMPLED, DistributionKind.FULL)
    )
    with pytest.raises(DataError, match="distributions of kinds full, sampled from one teacher"):
        concat_event_targets([one, two], [0, 1])


# ---- whole distributions -------------------------------------------------------------------------


def dead_of(rng: np.random.Generator, N: int, size: int) -> tuple[ImpossibleTokens, np.ndarray]:
    """Some tokens that cannot stand, never the first: (as pairs, as a mask of those that can)."""
    stands = rng.random((N, size)) < 0.7
    stands[:, 0] = True
    row, token = np.nonzero(~stands)
    return ImpossibleTokens(torch.from_numpy(row), torch.from_numpy(token)), stands


@given(seed=seeds, divergence=st.sampled_from(list(Divergence)), masked=st.booleans())
def test_any_divergence_over_events(seed: int, divergence: Divergence, masked: bool):
    rng = np.random.default_rng(seed)
    N, V, W = 3, 20, 17
    bridge = random_bridge(rng, W, V, 5)
    bridge = replace(
        bridge,
        teacher_event_W=np.concatenate([np.arange(5), bridge.teacher_event_W[5:]]).astype(np.int32),
    )
    logits, rows = (
        torch.from_numpy(2 * rng.standard_normal((N, V))).requires_grad_(),
        torch.from_numpy(rng.dirichlet(np.ones(W), N)),
    )
    student_dead, stands_NV = dead_of(rng, N, V) if masked else (None, np.ones((N, V), bool))
    teacher_dead, stands_NW = dead_of(rng, N, W) if masked else (None, np.ones((N, W), bool))
    sides = []
    for probs, stands, events in (
        (rows, stands_NW, bridge.teacher_event_W),
        (torch.softmax(logits, -1), stands_NV, bridge.student_event_V),
    ):
        mass = torch.stack(
            [(probs * torch.from_numpy(stands & (events == e))).sum(-1) for e in range(5)], -1
        )
        sides.append(mass / mass.sum(-1, keepdim=True))
    p, q = sides
    both = (p > 0) & (q > 0)  # an event that only one side can still say is dropped
    p, q = (torch.where(both, x, 0.0) for x in (p, q))
    p, q = (x / x.sum(-1, keepdim=True) for x in (p, q))
    m = (p + q) / 2
    want = {
        "forward": torch.special.xlogy(p, p / q),
        "reverse": torch.special.xlogy(q, q / p),
        "jsd": (torch.special.xlogy(p, p / m) + torch.special.xlogy(q, q / m)) / 2,
    }[divergence.value]
    want = want.nan_to_num(0).sum(-1).mean()
    got = event_divergence_loss(
        logits,
        rows.log(),
        bridge,
        divergence,
        student_impossible_tokens=student_dead,
        teacher_impossible_tokens=teacher_dead,
    )
    assert got.loss.item() == pytest.approx(want.item(), rel=1e-9, abs=1e-12)
    (mine,) = torch.autograd.grad(got.loss, logits, retain_graph=True)
    if not masked:
        (theirs,) = torch.autograd.grad(want, logits)
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)
    assert torch.isfinite(mine).all()


@given(
    seed=seeds,
    divergence=st.sampled_from(list(Divergence)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_same_tokenizer_is_the_ordinary_divergence_bit_for_bit(
    seed: int, divergence: Divergence, dtype: torch.dtype
):
    rng = np.random.default_rng(seed)
    logits, teacher = (
        torch.from_numpy(3 * rng.standard_normal((4, 19))).to(dtype) for _ in range(2)
    )
    log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(logits, -1)
    got = event_divergence_loss(logits, log_p, identity(19), divergence)
    assert torch.equal(got.loss, divergence_loss(logits, log_p, divergence).loss)
    plain = {"forward": (log_q, log_p), "reverse": (log_p, log_q)}.get(divergence.value)
    if plain:
        assert torch.equal(
            got.loss, F.kl_div(*plain, reduction="none", log_target=True).sum(-1).mean()
        )
    assert event_divergence_loss(logits, log_q, identity(19), divergence).loss.abs() < (
        1e-6 if dtype is torch.float32 else 1e-14
    )


def test_same_vocabulary_refuses_another():
    with pytest.raises(
        RecipeError, match=r"student logits \(2, 5\), teacher log-probabilities \(2, 6\)"
    ):
        divergence_loss(torch.zeros(2, 5), torch.zeros(2, 6))


# ---- masks ---------------------------------------------------------------------------------------


class Fixed:
    """A mask that is written down: context -> tokens that cannot stand."""

    def __init__(self, dead: dict[int, list[int]]) -> None:
        self.table = dead

    def are_impossible(self, context_P: np.ndarray, token_P: np.ndarray) -> np.ndarray:
        pairs = zip(context_P.tolist(), token_P.tolist(), strict=True)
        return np.array([t in self.table.get(c, []) for c, t in pairs], bool)


@given(seed=seeds, share=st.sampled_from([0.3, 1.0]))
def test_masked_entries_and_members(seed: int, share: float):
    """The module's formula with what cannot stand crossed out by hand, on both sides; nothing is
    renormalised.
    """
    rng = np.random.default_rng(seed)
    N, V, W = 5, 22, 14
    bridge = random_bridge(rng, W, V, 6)
    dead_W, dead_V = (
        {c: sorted(rng.permutation(size)[: size // 3].tolist()) for c in range(3)}
        for size in (W, V)
    )
    bridge = replace(bridge, teacher_mask=Fixed(dead_W), student_mask=Fixed(dead_V))
    contexts = rng.integers(-1, 3, (2, N))  # -1: nothing is ruled out
    rows = {n: rng.dirichlet(np.full(W, 0.5)) for n in range(N)}
    raw = said_of(bridge, rows)
    entries = build_event_targets(
        bridge,
        raw.row_M,
        raw.ids_M,
        raw.probs_M,
        student_context_N=contexts[0],
        teacher_context_N=contexts[1],
    )
    said = build_batch_targets(bridge, concat_event_targets([entries, entries], [0, N]), 2 * N)
    logits, tokens = (
        torch.from_numpy(2 * rng.standard_normal((N, V))).repeat(2, 1),
        torch.from_numpy(rng.integers(0, V, N)).repeat(2),
    )
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    q_NV, want = torch.softmax(theirs, -1), torch.zeros((), dtype=torch.float64)
    for n in range(2 * N):
        ce, events, mass = -q_NV[n, tokens[n]].log(), torch.zeros((), dtype=torch.float64), 0.0
        students, teachers = contexts[:, n % N].tolist()
        for w, p in enumerate(np.float32(rows[n % N]).tolist()):
            event = int(bridge.teacher_event_W[w])
            member = [
                v
                for v in np.flatnonzero(bridge.student_event_V == event).tolist()
                if v not in dead_V.get(teachers, [])
            ]
            if event >= 0 and member and w not in dead_W.get(students, []):
                events, mass = events - p * q_NV[n, member].sum().log(), mass + p
        want = want + share * events + (1 - share * mass) * ce
    (want / (2 * N)).backward()
    out = event_kl_loss(mine, tokens, [said], share)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(want.item() / (2 * N), rel=1e-6)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-8)


def test_named_and_dropped_is_no_part_of_the_rest():
    """The row names A .6, which is impossible, and B .3; .1 is left for C.

    Of the rest's target mass nothing goes to A, also where only A's
    student token cannot stand."""
    bridge = replace(identity(3), teacher_mask=Fixed({0: [0]}), student_mask=Fixed({0: []}))
    also = replace(identity(3), teacher_mask=Fixed({0: []}), student_mask=Fixed({0: [0]}))
    for pair in (bridge, also):
        entries = build_event_targets(
            pair,
            np.array([0, 0]),
            np.array([0, 1]),
            np.array([0.6, 0.3], np.float32),
            student_context_N=np.array([0]),
            teacher_context_N=np.array([0]),
            kind=DistributionKind.TOPK,
        )
        logits = torch.log(torch.tensor([[0.6, 0.3, 0.1]])).requires_grad_()
        event_kl_loss(
            logits, torch.tensor([1]), [build_batch_targets(pair, entries, 1)], 1.0
        ).loss.backward()
        torch.testing.assert_close(
            logits.grad, torch.tensor([[0.6, 0.3 - 0.3 - 0.6, 0.1 - 0.1]]), rtol=1e-5, atol=1e-6
        )


def test_a_rest_that_no_token_is_left_for_goes_to_the_text():
    bridge = identity(2)
    raw = build_event_targets(
        bridge,
        np.array([0, 0]),
        np.array([0, 1]),
        np.array([0.5, 0.499999], np.float32),
        kind=DistributionKind.TOPK,
    )
    out = event_kl_loss(
        torch.zeros(1, 2), torch.tensor([0]), [build_batch_targets(bridge, raw, 1)], 1.0
    )
    assert out.loss.item() == pytest.approx(math.log(2), abs=1e-5)


def test_what_composed_cannot_mean_is_refused():
    bridge = identity(3)
    one = said_of(bridge, {0: np.array([0.5, 0.5, 0.0])}).targets
    with pytest.raises(DataError, match="position 0: two teachers have targets at one position"):
        event_kl_loss(torch.zeros(1, 3), torch.tensor([0]), [one, one], 0.7)
    for logits, tokens in (
        (torch.zeros(1, 3, dtype=torch.bfloat16), torch.tensor([0])),
        (torch.zeros(0, 3), torch.empty(0, dtype=torch.int64)),
    ):
        with pytest.raises(
            DataError, match="pass float32 logits of at least one supervised position"
        ):
            event_kl_loss(logits, tokens, [], 0.7)
    with pytest.raises(DataError, match="a distribution names a token twice"):
        build_event_targets(
            bridge,
            np.array([0, 0]),
            np.array([1, 1]),
            np.array([0.1, 0.1], np.float32),
            kind=DistributionKind.TOPK,
        )


def test_an_event_of_tiny_probability_counts_in_whole_distributions():
    bridge = replace(
        identity(3),
        student_event_V=np.array([0, 1, 0], np.int32),
        teacher_event_W=np.array([0, 1, 0], np.int32),
        num_events=2,
    )
    logits = torch.tensor([[0.0, -120.0, 0.0]], requires_grad=True)
    out = event_divergence_loss(logits, torch.log(torch.tensor([[0.05, 0.9, 0.05]])), bridge)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(
        0.9 * (120 + math.log(2)) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1), rel=1e-5
    )
    torch.testing.assert_close(
        logits.grad, torch.tensor([[0.45, -0.9, 0.45]]), rtol=1e-4, atol=1e-5
    )
    nothing = ImpossibleTokens(torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2]))
    with pytest.raises(DataError, match="no event that both teacher and student can produce"):
        event_divergence_loss(
            logits,
            torch.log(torch.tensor([[0.05, 0.9, 0.05]])),
            bridge,
            student_impossible_tokens=nothing,
        )
    with pytest.raises(RecipeError, match="reverse KL needs more"):
        event_divergence_loss(
            logits,
            torch.log(torch.tensor([[0.05, 0.9, 0.05]])),
            bridge,
            Divergence.REVERSE,
            kind=DistributionKind.SAMPLED,
        )


def test_a_chunk_of_a_student_certain_of_what_cannot_be():
    logits = torch.tensor([[20.0, 3.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    dead = ImpossibleTokens(torch.tensor([0]), torch.tensor([0]))
    whole = SpanTargets(
        torch.tensor([0]),
        torch.tensor([0]),
        torch.tensor([0]),
        torch.tensor([1]),
        torch.tensor([-0.5]),
    )
    out = span_likelihood_loss(logits, torch.tensor([1, 0]), whole, dead)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(
        (math.log(1 / (1 + math.exp(-3))) + 0.5) ** 2 / 2, rel=1e-4
    )
    assert torch.isfinite(logits.grad).all()
    none = torch.empty(0, dtype=torch.int64)
    with pytest.raises(DataError, match="no span"):
        span_likelihood_loss(
            logits, torch.tensor([1, 0]), SpanTargets(none, none, none, none, torch.empty(0)), dead
        )


# ---- chunks --------------------------------------------------------------------------------------


@given(seed=seeds)
def test_the_chunk_term_is_its_formula(seed: int):
    rng = np.random.default_rng(seed)
    N, V = 9, 12
    logits, tokens = (
        torch.from_numpy(rng.standard_normal((N, V))).requires_grad_(),
        torch.from_numpy(rng.integers(0, V, N)),
    )
    dead, stands = dead_of(rng, N, V)
    ranges = [(0, 2), (2, 3), (3, 7), (7, 9)]  # the last one ends the turn
    teacher = torch.from_numpy(-rng.random(4) * 3)
    which = torch.tensor([c for c, (a, b) in enumerate(ranges) for _ in range(a, b)])
    at = torch.tensor([n for a, b in ranges for n in range(a, b)])
    begin, end = (
        torch.tensor([a for a, _ in ranges]),
        torch.tensor([b if b < N else -1 for _, b in ranges]),
    )
    out = span_likelihood_loss(logits, tokens, SpanTargets(which, at, begin, end, teacher), dead)
    q = torch.softmax(logits, -1)
    beta = (q * torch.from_numpy(stands)).sum(-1)
    terms = [
        sum(q[n, tokens[n]].log() for n in range(a, b))
        + (beta[b].log() if b < N else 0)
        - beta[a].log()
        for a, b in ranges
    ]
    want = sum((x - t) ** 2 for x, t in zip(terms, teacher, strict=True)) / 8
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-9)
    assert out.num_tokens == 4
    torch.testing.assert_close(
        *(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (out.loss, want)),
        rtol=1e-7,
        atol=1e-10,
    )
    right = SpanTargets(which, at, begin, end, torch.stack(terms).detach())
    assert span_likelihood_loss(logits, tokens, right, dead).loss.item() < 1e-20, (
        "a student that agrees costs nothing"
    )


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype: torch.dtype):
    """An event of probability e^-400 has a finite cost and its whole gradient; plain sums of exp
    give log 0.
    """
    bridge = EventMap(np.array([0, 1], np.int32), np.array([0, 1, 1, -1], np.int32), 2, "")
    logits = torch.tensor(
        [
            [200.0, -200.0, -201.0, -200.0],
            [-200.0, 200.0, -200.0, 200.0],
            [200.0, 200.0, 200.0, 200.0],
        ],
        dtype=dtype,
    )
    rows = {n: np.array([0.5, 0.5]) for n in range(3)}
    c = Case(logits, torch.tensor([1, 0, 3]), (said_of(bridge, rows),))
    out, gradient = value_and_gradient(c, 0.7)
    assert torch.isfinite(gradient).all()
    pair = math.log1p(math.exp(-1))
    costs = [
        0.7 * 0.5 * (0 + 400 - pair) + 0.3 * 400,
        0.7 * 0.5 * (400 + math.log(2) + math.log(2)) + 0.3 * (400 + math.log(2)),
        0.7 * 0.5 * (math.log(4) + math.log(2)) + 0.3 * math.log(4),
    ]
    assert out.loss.item() == pytest.approx(sum(costs) / 3, rel=1e-6)
    share = torch.softmax(torch.tensor([0.0, -1.0]), 0)
    want = [
        1 - 0.35,
        -0.35 * share[0] - 0.3,
        -0.35 * share[1],
        0.0,
    ]  # q - .7 p(member | event) - .3 target
    torch.testing.assert_close(
        gradient[0] * 3, torch.tensor(want, dtype=dtype), rtol=1e-6, atol=1e-6
    )


@given(seed=seeds)
def test_large_logits_stay_finite(seed: int):
    c = case(seed, scale=100.0)
    out, gradient = value_and_gradient(c, 0.7)
    assert math.isfinite(out.loss.item())
    assert torch.isfinite(gradient).all()
    assert out.loss.item() >= -1e-3
    assert gradient.sum(-1).abs().max() < 1e-5, (
        "a constant added to all logits of a position changes nothing"
    )


def golden_case(k: int) -> Case:
    """Cases without a random generator, so that the values hold on every version of numpy and
    torch.
    """
    N, V, W, E = 4 + k, 17 + 5 * k, 19 + 3 * k, 7
    logits = torch.tensor(
        [[3 * math.sin(1.7 * n + 0.9 * v * (k + 1)) for v in range(V)] for n in range(N)]
    )
    events_W, events_V = (
        [(5 * w + k) % (E + 1) - 1 for w in range(W)],
        [v if v < E else (3 * v) % (E + 1) - 1 for v in range(V)],
    )
    bridge = EventMap(np.array(events_W, np.int32), np.array(events_V, np.int32), E, "")
    weights = {
        n: np.array([math.exp(2 * math.cos(2.3 * n + 1.1 * w)) for w in range(W)])
        for n in range(0, N, 2)
    }
    return Case(
        logits,
        torch.tensor([(7 * n + k) % V for n in range(N)]),
        (said_of(bridge, {n: p / p.sum() for n, p in weights.items()}),),
    )


def golden_values() -> dict[str, float]:
    out = {}
    for k in range(3):
        for share in (0.0, 0.7, 1.0):
            loss, gradient = value_and_gradient(golden_case(k), share)
            out[f"case {k}, share {share}"] = round(loss.loss.item(), 5)
            out[f"case {k}, share {share}, gradient norm"] = round(gradient.norm().item(), 5)
    return out


def test_golden_values():
    """To renew them on purpose: python tests/losses/test_losses.py"""
    want = json.loads(GOLDEN.read_text())
    got = golden_values()
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value == pytest.approx(want[name], abs=3e-5), name


# ---- a world whose truth is known: bench/worlds.py -----------------------------------------------

# mean total variation at the truth: events, and shared byte strings renormalised (strict); with
# masks: tests/bench/test_worlds.py
FLOORS = {
    "same": (0.0, 0.0),
    "nested": (0.0146, 0.0307),
    "crossing": (0.0280, 0.0433),
    "words": (0.0588, 0.0948),
    "long": (0.1085, 0.2167),
}


def strict(
    p: dict[int, float], q: dict[int, float], teacher: ChatRenderer, student: ChatRenderer
) -> float:
    """The baseline: byte strings both vocabularies have, renormalised."""
    t = {teacher.vocabulary.bytes_W[i]: x for i, x in p.items()}  # None = the stop token
    s = {student.vocabulary.bytes_W[i]: x for i, x in q.items()}
    shared = {*teacher.vocabulary.bytes_W} & {*student.vocabulary.bytes_W}
    t_sum, s_sum = (sum(x for b, x in row.items() if b in shared) for row in (t, s))
    return (
        sum(abs(t.get(b, 0) / t_sum - s.get(b, 0) / s_sum) for b in shared) / 2
        if t_sum and s_sum
        else 0.0
    )


@pytest.mark.parametrize("name", WORLDS)
def test_the_floor_of_unmasked_events(name: str):
    world = worlds.world(name)
    teacher, student, t, s, bridge = (
        world.teacher,
        world.student,
        world.t,
        world.s,
        world.full_event_map,
    )
    where = [((b.teacher, b.student), b.mass) for b in world.boundaries]
    weight_N = torch.tensor([w for _, w in where], dtype=torch.float64)
    weight_N /= weight_N.sum()
    logits_NV = torch.full((len(where), len(student.vocabulary)), -2000.0, dtype=torch.float64)
    row, ids, probs, strict_N = [], [], [], []
    for n, ((prefix_t, prefix_s), _) in enumerate(where):
        p, q = t.next[prefix_t], s.next[prefix_s]
        for v, x in q.items():
            logits_NV[n, v] = math.log(x)
        row, ids, probs = row + [n] * len(p), [*ids, *p], [*probs, *p.values()]
        strict_N.append(strict(p, q, teacher, student))
    # the student at its true optimum, through the code that trains: event probabilities against the
    # teacher's
    E = bridge.num_events
    p_NE = torch.zeros(len(where), E, dtype=torch.float64)
    event_M = torch.from_numpy(bridge.teacher_event_W)[torch.tensor(ids)].long()
    p_NE.index_put_(
        (torch.tensor(row), event_M), torch.tensor(probs, dtype=torch.float64), accumulate=True
    )
    said = bridge.student_event_V[[v for q in s.next.values() for v in q]]
    used = torch.from_numpy(np.union1d(event_M.numpy(), said)).long()
    row_M, asked_M = np.arange(len(where)).repeat(len(used)), np.tile(used.numpy(), len(where))
    q_NU = (
        event_logprobs(logits_NV, logits_NV.logsumexp(-1), asked(bridge, row_M, asked_M))
        .exp()
        .reshape(len(where), -1)
    )
    torch.testing.assert_close(q_NU.sum(-1), torch.ones(len(where), dtype=torch.float64))
    events = float(weight_N @ (p_NE[:, used] - q_NU).abs().sum(-1)) / 2
    baseline = float(weight_N @ torch.tensor(strict_N, dtype=torch.float64))
    assert events == pytest.approx(FLOORS[name][0], abs=1e-4)
    assert baseline == pytest.approx(FLOORS[name][1], abs=1e-4)
    assert events < (1e-12 if name == "same" else baseline)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden_values(), indent=1) + "\n")
