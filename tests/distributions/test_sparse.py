"""Sampled distributions are sparse and unbiased, and invalid input is refused before any
sampling."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from persea.distributions import (
    LOGPROB_STEP_NATS,
    DistributionKind,
    SparseDistributions,
    concat_distributions,
    sample_distributions,
    topk_within_kl,
    validate_logprobs,
)
from persea.errors import DataError

EPS = 1e-5


def logprobs(seed: int, rows: int, width: int, heat: float) -> torch.Tensor:
    """Distributions from flat (heat 0) to nearly certain (heat 20)."""
    return torch.log_softmax(
        torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * heat, dim=-1
    )


def dense(rows: SparseDistributions, width: int) -> np.ndarray:
    out = np.zeros((len(rows), width))
    for n in range(len(rows)):
        span = slice(rows.offsets_N1[n], rows.offsets_N1[n + 1])
        np.add.at(out[n], rows.ids_M[span], rows.probs_M[span].astype(np.float64))
    return out


def sample_rows(logs: torch.Tensor, tau: float, seed: str) -> SparseDistributions:
    return sample_distributions(logs, np.zeros(len(logs), np.int64), tau, seed)


taus = st.sampled_from((0.001, 0.01, 0.05, 0.2, 0.5))


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 400), st.floats(0, 20), taus)
@example(0, 1, 1, 0.0, 0.5)
@example(0, 3, 2, 0.0, 0.5)  # exactly tau
@example(7, 2, 400, 0.0, 0.5)  # nothing reaches tau
def test_a_row_keeps_the_head_exactly_and_its_mass(
    seed: int, n: int, width: int, heat: float, tau: float
) -> None:
    logs = logprobs(seed, n, width, heat)
    p, rows = logs.double().exp().numpy(), sample_rows(logs, tau, str(seed))
    q = dense(rows, width)
    assert (rows.offsets_N1.dtype, rows.ids_M.dtype, rows.probs_M.dtype) == (
        np.int64,
        np.int32,
        np.float32,
    )
    assert len(rows) == n
    assert rows.offsets_N1[-1] == len(rows.ids_M) == len(rows.probs_M)
    assert np.abs(q.sum(1) - p.sum(1)).max() <= tau + EPS
    assert np.array_equal(q[p >= tau], p[p >= tau].astype(np.float32))
    assert set(np.unique(q[p < tau]).tolist()) <= {0.0, float(np.float32(tau))}
    for k in range(n):  # ids rise, so no token stands twice in a row
        assert (np.diff(rows.ids_M[rows.offsets_N1[k] : rows.offsets_N1[k + 1]]) > 0).all()


@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.lists(st.integers(0, 12), max_size=4),
    st.floats(0, 8),
    taus,
)
def test_chunks_give_the_same_samples_as_the_whole(
    seed: int, n: int, cuts: list[int], heat: float, tau: float
) -> None:
    logs, real_N = logprobs(seed, n, 50, heat), np.arange(n) % 50
    edges = [0, *sorted(min(c, n) for c in cuts), n]
    parts = [
        sample_distributions(logs[a:b], real_N[a:b], tau, str(seed), a) for a, b in pairwise(edges)
    ]
    one, other = sample_distributions(logs, real_N, tau, str(seed)), concat_distributions(parts)
    for field in ("offsets_N1", "ids_M", "probs_M", "target_logprob_N"):
        assert getattr(one, field).tobytes() == getattr(other, field).tobytes()
        assert getattr(one, field).dtype == getattr(other, field).dtype
    assert concat_distributions(parts[:1]).kind is DistributionKind.SAMPLED


@given(st.integers(0, 10**6), st.floats(0, 8), taus)
def test_a_draw_depends_on_its_seed_and_on_nothing_else(seed: int, heat: float, tau: float) -> None:
    logs = logprobs(seed, 8, 200, heat)
    one, again = (sample_rows(logs, tau, str(seed)) for _ in range(2))
    for field in ("offsets_N1", "ids_M", "probs_M"):
        assert np.array_equal(getattr(one, field), getattr(again, field))


def test_another_seed_is_another_draw() -> None:
    flat = logprobs(0, 8, 200, 0.0)
    assert (
        len(
            {
                sample_rows(flat, 0.05, name).ids_M.tobytes()
                for name in ("0 qwen a", "0 qwen b", "1 qwen a", "0 gemma a")
            }
        )
        == 4
    )


@pytest.mark.parametrize(("heat", "tau"), [(0.0, 0.5), (1.0, 0.05), (3.0, 0.01), (8.0, 0.2)])
def test_the_mean_over_draws_is_the_distribution(heat: float, tau: float) -> None:
    draws = 20_000  # each row of one call is a draw of its own
    logs = logprobs(3, 1, 60, heat)
    p = logs.double().exp().numpy()[0]
    rows = sample_rows(logs.expand(draws, -1), tau, "mean")
    mean = np.bincount(rows.ids_M, weights=rows.probs_M, minlength=60) / draws
    deviation = np.where(p < tau, np.sqrt(p * (tau - p).clip(0) / draws), 0)
    assert (np.abs(mean - p) <= 5 * deviation + EPS).all()
    assert np.abs(mean - p).max() > 0 or heat == 8.0  # it was sampled at all


def test_a_certain_row_costs_one_entry() -> None:
    logs = torch.full((3, 1000), -float("inf"))
    logs[range(3), [0, 7, 999]] = 0.0
    rows = sample_rows(logs, 0.01, "certain")
    assert rows.ids_M.tolist() == [0, 7, 999]
    assert rows.probs_M.tolist() == [1.0, 1.0, 1.0]
    nearly = torch.full((500, 1000), float(np.log(1e-7 / 999)))
    nearly[:, 5] = np.log1p(-1e-7)
    assert len(sample_rows(nearly, 0.01, "nearly").ids_M) == 500


def test_the_target_logprob_is_stored_whatever_was_sampled() -> None:
    logs = logprobs(2, 50, 300, 4.0)
    realised = np.random.default_rng(0).integers(0, 300, 50)
    rows = sample_distributions(logs, realised, 0.2, "realised")
    assert rows.kind is DistributionKind.SAMPLED
    assert rows.target_logprob_N.dtype == np.float32
    assert np.array_equal(rows.target_logprob_N, logs[range(50), realised].numpy())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x.__setitem__((3, 7), float("nan")), "row 3 of 6 is no distribution: NaN"),
        (
            lambda x: x.__setitem__((2, 0), 0.5),
            "row 2 of 6 is no distribution: a log-probability above 0.001",
        ),
        (
            lambda x: x.__setitem__(slice(4, 5), x[4] + 0.01),
            r"row 4 of 6 is no distribution: a sum of probabilities above 1 \+ 0.001",
        ),
        (
            lambda x: x.__setitem__((5, 1), float("inf")),
            "row 5 of 6 is no distribution: a log-probability above 0.001",
        ),
    ],
)
def test_invalid_distributions_are_refused(change: object, reason: str) -> None:
    logs = logprobs(1, 6, 50, 1.0)
    validate_logprobs(logs, "here")
    sample_rows(logs, 0.1, "whole")
    change(logs)  # type: ignore[operator]
    with pytest.raises(DataError, match=reason) as caught:
        sample_rows(logs, 0.1, "qwen p17")
    assert caught.value.exit_code == 3
    assert caught.value.where == "qwen p17"
    assert "softmax" in caught.value.remedy


@pytest.mark.parametrize("at_once", [1, 301, 900, 1 << 20])
def test_how_many_rows_are_worked_on_at_once_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    logs = logprobs(4, 23, 300, 1.5)
    whole = sample_rows(logs, 0.03, "chunks")
    monkeypatch.setattr("persea.distributions.sparse.MAX_CHUNK_ELEMENTS", at_once)
    some = sample_rows(logs, 0.03, "chunks")
    for field in ("offsets_N1", "ids_M", "probs_M"):
        assert np.array_equal(getattr(whole, field), getattr(some, field))
    logs[17, 3] = float("nan")
    with pytest.raises(DataError, match="row 17 of 23 is no distribution: NaN"):
        sample_rows(logs, 0.03, "chunks")


def test_the_memory_of_sampling_does_not_grow_with_the_answer() -> None:
    """With a vocabulary of 262,144 the extra memory stays a little above 64 MiB."""
    logs = torch.log_softmax(
        torch.randn(24, 262_144, generator=torch.Generator().manual_seed(0)), -1
    )
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        sample_rows(logs, 0.01, "memory")
    held = most = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 8 << 20 < most < 72 << 20, most / 2**20


def test_an_answer_without_learned_tokens_has_no_rows() -> None:
    assert len(sample_rows(torch.empty(0, 300), 0.01, "nothing")) == 0


# --- the likeliest, and a rest --------------------------------------------------------------------


def frequency(seed: int, width: int) -> np.ndarray:
    counts = np.random.default_rng(seed).zipf(1.5, width).astype(np.float64).clip(max=1e6)
    return counts / counts.sum()


def kl_of_reconstruction(
    p: np.ndarray, rows: SparseDistributions, spread: np.ndarray
) -> np.ndarray:
    """KL(p || reconstruction), computed token by token."""
    q = dense(rows, p.shape[1])
    for n in range(len(p)):
        unnamed = np.setdiff1d(
            np.arange(p.shape[1]), rows.ids_M[rows.offsets_N1[n] : rows.offsets_N1[n + 1]]
        )
        q[n, unnamed] = (
            max(0.0, 1 - q[n].sum()) * spread[unnamed] / spread[unnamed].sum()
            if len(unnamed)
            else 0
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 1e-9, p * np.log(p / q), 0).sum(1)


@given(
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(2, 300),
    st.floats(0, 12),
    st.sampled_from((0.003, 0.01, 0.1, 1.0)),
)
@example(0, 2, 300, 0.0, 0.003)  # flat: nearly all are named
@example(0, 2, 2, 0.0, 0.01)
def test_the_fewest_likeliest_entries_within_the_kl(
    seed: int, n: int, width: int, heat: float, kl: float
) -> None:
    logs, spread = logprobs(seed, n, width, heat), frequency(seed, width)
    p, real = logs.double().exp().numpy(), np.random.default_rng(seed).integers(0, width, n)
    rows = topk_within_kl(logs, real, kl, spread, "here")
    q = dense(rows, width)
    assert rows.kind is DistributionKind.TOPK
    assert (
        rows.offsets_N1.dtype,
        rows.ids_M.dtype,
        rows.probs_M.dtype,
        rows.target_logprob_N.dtype,
    ) == (np.int64, np.int32, np.float32, np.float32)
    assert (np.diff(rows.offsets_N1) >= 1).all()
    assert q.sum(1).max() <= 1 + 1e-3
    assert kl_of_reconstruction(p, rows, spread).max() <= kl + 2e-5
    for k in range(n):
        span = slice(rows.offsets_N1[k], rows.offsets_N1[k + 1])
        named = rows.ids_M[span]
        assert named.tolist() == sorted(np.argsort(-p[k], kind="stable")[: len(named)].tolist())
        # One entry fewer, unrounded, is not enough, or fails by the cost of rounding the most
        # likely value down.
        if len(named) > 1:
            fewer = named[named != np.argsort(-p[k], kind="stable")[len(named) - 1]]
            exact = SparseDistributions(
                np.array([0, len(fewer)]),
                fewer,
                p[k, fewer].astype(np.float32),
                np.zeros(1, np.float32),
            )
            assert kl_of_reconstruction(p[k : k + 1], exact, spread)[0] > kl - 0.003
        bins = np.log(rows.probs_M[span].astype(np.float64)) / -LOGPROB_STEP_NATS
        assert np.abs(bins - np.rint(bins)).max() < 2e-3  # on the codec's grid
        if real[k] in named:
            assert abs(rows.target_logprob_N[k] - np.log(q[k, real[k]])) < 1e-5
            assert (
                abs(rows.target_logprob_N[k] - float(logs[k, real[k]])) <= LOGPROB_STEP_NATS + 1e-5
            )
        else:
            assert rows.target_logprob_N[k] == logs[k, real[k]].numpy()


@pytest.mark.parametrize("at_once", [1, 301, 900])
def test_likeliest_entries_do_not_hang_on_how_many_rows_are_worked_on(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    logs = torch.cat(
        [logprobs(4, 20, 300, 1.5), torch.full((3, 300), -np.log(300)).float()]
    )  # and rows of equals
    some = [topk_within_kl(logs, np.zeros(23, np.int64), 0.01, frequency(1, 300), "chunks")]
    monkeypatch.setattr("persea.distributions.sparse.MAX_CHUNK_ELEMENTS", at_once)
    some.append(topk_within_kl(logs, np.zeros(23, np.int64), 0.01, frequency(1, 300), "chunks"))
    monkeypatch.setattr("persea.distributions.topk.INITIAL_CANDIDATES", 7)
    some.append(topk_within_kl(logs, np.zeros(23, np.int64), 0.01, frequency(1, 300), "chunks"))
    for other in some[1:]:
        for field in ("offsets_N1", "ids_M", "probs_M", "target_logprob_N"):
            assert np.array_equal(getattr(some[0], field), getattr(other, field)), field


def test_values_are_coarser_where_the_kl_allows_it() -> None:
    logs = logprobs(5, 300, 2000, 3.0)
    rows = topk_within_kl(logs, np.zeros(300, np.int64), 0.1, np.full(2000, 1 / 2000), "coarse")
    bins = np.rint(np.log(rows.probs_M.astype(np.float64)) / -LOGPROB_STEP_NATS).astype(int)
    assert (bins % 16 == 0).mean() > 0.5


def test_invalid_distributions_are_refused_as_topk() -> None:
    logs = logprobs(1, 6, 50, 1.0)
    logs[3, 7] = float("nan")
    with pytest.raises(DataError, match="row 3 of 6 is no distribution: NaN"):
        topk_within_kl(logs, np.zeros(6, np.int64), 0.01, np.full(50, 0.02), "here")
    assert (
        len(
            topk_within_kl(
                torch.empty(0, 50), np.zeros(0, np.int64), 0.01, np.full(50, 0.02), "nothing"
            )
        )
        == 0
    )


def test_a_target_that_rounding_alone_misses_is_not_reached_in_silence() -> None:
    with pytest.raises(AssertionError, match="has KL > 1e-12"):
        topk_within_kl(
            logprobs(1, 6, 50, 1.0), np.zeros(6, np.int64), 1e-12, np.full(50, 0.02), "here"
        )


def test_a_position_without_all_of_its_mass_is_refused() -> None:
    """A sample must sum to 1 within tau, which half a distribution cannot."""
    logs_NW = torch.log(torch.tensor([[0.5, 0.5], [0.1, 0.1]]))
    with pytest.raises(
        DataError, match=r"row 1 of 2 is no distribution: a sum of probabilities below 1 - 0.001"
    ):
        sample_distributions(logs_NW, np.zeros(2, np.int64), 0.05, "seed")
    validate_logprobs(logs_NW, "the most likely tokens of a server")
