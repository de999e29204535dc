"""Rows are sparse and unbiased, and what is no distribution is refused before anything is drawn from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from persea.errors import DataError
from persea.rows import RowKind, Rows, refuse_no_distribution
from persea.rows import sample_rows as draw

EPS = 1e-5


def logprobs(seed: int, rows: int, width: int, heat: float) -> torch.Tensor:
    """Distributions from flat (heat 0) to nearly certain (heat 20)."""
    return torch.log_softmax(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * heat, dim=-1)


def dense(rows: Rows, width: int) -> np.ndarray:
    out = np.zeros((len(rows), width))
    for n in range(len(rows)):
        span = slice(rows.offsets_N1[n], rows.offsets_N1[n + 1])
        np.add.at(out[n], rows.ids_M[span], rows.probs_M[span].astype(np.float64))
    return out


def sample_rows(logs: torch.Tensor, tau: float, seed: str) -> Rows:
    return draw(logs, np.zeros(len(logs), np.int64), tau, seed)


taus = st.sampled_from((0.001, 0.01, 0.05, 0.2, 0.5))


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 400), st.floats(0, 20), taus)
@example(0, 1, 1, 0.0, 0.5)
@example(0, 3, 2, 0.0, 0.5)  # exactly tau
@example(7, 2, 400, 0.0, 0.5)  # nothing reaches tau
def test_a_row_keeps_the_head_exactly_and_its_mass(seed: int, n: int, width: int, heat: float, tau: float) -> None:
    logs = logprobs(seed, n, width, heat)
    p, rows = logs.double().exp().numpy(), sample_rows(logs, tau, str(seed))
    q = dense(rows, width)
    assert (rows.offsets_N1.dtype, rows.ids_M.dtype, rows.probs_M.dtype) == (np.int64, np.int32, np.float32)
    assert len(rows) == n
    assert rows.offsets_N1[-1] == len(rows.ids_M) == len(rows.probs_M)
    assert np.abs(q.sum(1) - p.sum(1)).max() <= tau + EPS
    assert np.array_equal(q[p >= tau], p[p >= tau].astype(np.float32))
    assert set(np.unique(q[p < tau]).tolist()) <= {0.0, float(np.float32(tau))}
    for k in range(n):  # ids rise, so no token stands twice in a row
        assert (np.diff(rows.ids_M[rows.offsets_N1[k]:rows.offsets_N1[k + 1]]) > 0).all()


@given(st.integers(0, 10**6), st.floats(0, 8), taus)
def test_a_draw_depends_on_its_seed_and_on_nothing_else(seed: int, heat: float, tau: float) -> None:
    logs = logprobs(seed, 8, 200, heat)
    one, again = (sample_rows(logs, tau, str(seed)) for _ in range(2))
    for field in ("offsets_N1", "ids_M", "probs_M"):
        assert np.array_equal(getattr(one, field), getattr(again, field))


def test_another_seed_is_another_draw() -> None:
    flat = logprobs(0, 8, 200, 0.0)
    assert len({sample_rows(flat, 0.05, name).ids_M.tobytes() for name in ("0 qwen a", "0 qwen b", "1 qwen a", "0 gemma a")}) == 4


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


def test_the_realised_token_is_kept_whatever_was_drawn() -> None:
    logs = logprobs(2, 50, 300, 4.0)
    realised = np.random.default_rng(0).integers(0, 300, 50)
    rows = draw(logs, realised, 0.2, "realised")
    assert rows.kind is RowKind.SAMPLED
    assert rows.realised_N.dtype == np.float32
    assert np.array_equal(rows.realised_N, logs[range(50), realised].numpy())


@pytest.mark.parametrize(("change", "reason"), [
    (lambda x: x.__setitem__((3, 7), float("nan")), "row 3 of 6 is no distribution: NaN"),
    (lambda x: x.__setitem__((2, 0), 0.5), "row 2 of 6 is no distribution: a log-probability above 0"),
    (lambda x: x.__setitem__(slice(4, 5), x[4] + 0.01), r"row 4 of 6 is no distribution: a mass above 1 \+ 0.001"),
    (lambda x: x.__setitem__((5, 1), float("inf")), "row 5 of 6 is no distribution: a log-probability above 0")])
def test_what_is_no_distribution_is_refused(change: object, reason: str) -> None:
    logs = logprobs(1, 6, 50, 1.0)
    refuse_no_distribution(logs, "here")
    sample_rows(logs, 0.1, "whole")
    change(logs)  # type: ignore[operator]
    with pytest.raises(DataError, match=reason) as caught:
        sample_rows(logs, 0.1, "qwen p17")
    assert caught.value.exit_code == 3
    assert caught.value.where == "qwen p17"
    assert "softmax" in caught.value.remedy


@pytest.mark.parametrize("at_once", [1, 301, 900, 1 << 20])
def test_how_many_rows_are_worked_on_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    logs = logprobs(4, 23, 300, 1.5)
    whole = sample_rows(logs, 0.03, "chunks")
    monkeypatch.setattr("persea.rows.AT_ONCE", at_once)
    some = sample_rows(logs, 0.03, "chunks")
    for field in ("offsets_N1", "ids_M", "probs_M"):
        assert np.array_equal(getattr(whole, field), getattr(some, field))
    logs[17, 3] = float("nan")
    with pytest.raises(DataError, match="row 17 of 23 is no distribution: NaN"):
        sample_rows(logs, 0.03, "chunks")


def test_the_memory_of_sampling_does_not_grow_with_the_answer() -> None:
    """A vocabulary of 262,144: what is allocated beside the log-probabilities stays under 64 MiB and a little."""
    logs = torch.log_softmax(torch.randn(24, 262_144, generator=torch.Generator().manual_seed(0)), -1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        sample_rows(logs, 0.01, "memory")
    held = most = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 8 << 20 < most < 72 << 20, most / 2**20


def test_an_answer_without_learned_tokens_has_no_rows() -> None:
    assert len(sample_rows(torch.empty(0, 300), 0.01, "nothing")) == 0
