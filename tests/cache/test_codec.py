"""Tokens and rows come back as they were packed, log-probabilities within 1e-3 nats; what cannot be
kept is refused.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from persea.cache.codec import CODEC_TOLERANCE_NATS, decode_block, encode_unit
from persea.distributions import (
    LOGPROB_STEP_NATS,
    DistributionKind,
    SparseDistributions,
    sample_distributions,
)
from persea.errors import DataError
from persea.tokenization.tokens import RenderedTokens

W = 300
Spoken = tuple[RenderedTokens, SparseDistributions]


def tokens(rng: np.random.Generator, length: int, odd: bool = False) -> RenderedTokens:
    """A plausible rendering: markers, parts, tokens of any width; odd = starts and ends that follow
    no rule.
    """
    marker = rng.random(length) < 0.2
    covers = np.where(marker, 0, rng.integers(0, 6, length))
    ends = np.cumsum(covers + (rng.random(length) < 0.1))
    starts, ends = np.where(marker, -1, ends - covers), np.where(marker, -1, ends)
    if odd:
        starts, ends = rng.integers(-1, 90, length), rng.integers(-1, 90, length)
    learn = np.cumsum(rng.random(length) < 0.2) % 2 == 1
    return RenderedTokens(
        rng.integers(0, W, length).astype(np.int32),
        starts.astype(np.int32),
        ends.astype(np.int32),
        learn,
    )


def spoken(seed: int, count: int, heat: float, tau: float, odd: bool = False) -> list[Spoken]:
    rng, out = np.random.default_rng(seed), []
    for k in range(count):
        one = tokens(rng, int(rng.integers(0, 40)), odd)
        logs = torch.log_softmax(
            torch.from_numpy(rng.normal(size=(int(one.loss_mask_T.sum()), W)) * heat).float(), -1
        )
        out.append(
            (one, sample_distributions(logs, one.ids_T[one.loss_mask_T], tau, f"{seed} {k}"))
        )
    return out


def topk(seed: int, count: int, heat: float, k: int = 4) -> list[Spoken]:
    """The largest entries of each row, as a server gives them."""
    out = []
    for one, _ in spoken(seed, count, heat, 0.5):
        rng, n = np.random.default_rng(seed), int(one.loss_mask_T.sum())
        logs = torch.log_softmax(torch.from_numpy(rng.normal(size=(n, W)) * heat).float(), -1)
        ids = logs.topk(k, -1).indices.sort(-1).values
        realised = logs[range(n), one.ids_T[one.loss_mask_T]].numpy()
        out.append(
            (
                one,
                SparseDistributions(
                    np.arange(n + 1) * k,
                    ids.int().numpy().reshape(-1),
                    logs.gather(1, ids).exp().numpy().reshape(-1),
                    realised,
                    DistributionKind.TOPK,
                ),
            )
        )
    return out


def words(some: list[Spoken]) -> list[Spoken]:
    """Nothing but the text."""
    return [
        (
            one,
            SparseDistributions(
                np.zeros(len(rows) + 1, np.int64),
                np.empty(0, np.int32),
                np.empty(0, np.float32),
                np.full(len(rows), np.nan, np.float32),
                DistributionKind.TEXT_ONLY,
            ),
        )
        for one, rows in some
    ]


def assert_same(one: Spoken, other: Spoken) -> None:
    for k, field in (
        (0, "ids_T"),
        (0, "starts_T"),
        (0, "ends_T"),
        (0, "loss_mask_T"),
        (1, "offsets_N1"),
        (1, "ids_M"),
    ):
        a, b = getattr(one[k], field), getattr(other[k], field)
        assert np.array_equal(a, b), field
        assert a.dtype == b.dtype, field
    assert other[1].probs_M.dtype == other[1].target_logprob_N.dtype == np.float32
    assert np.allclose(
        np.log(one[1].probs_M), np.log(other[1].probs_M), rtol=0, atol=CODEC_TOLERANCE_NATS
    )
    assert np.allclose(
        one[1].target_logprob_N,
        other[1].target_logprob_N,
        rtol=0,
        atol=CODEC_TOLERANCE_NATS,
        equal_nan=True,
    )
    assert other[1].kind is one[1].kind


def there_and_back(
    blocks: list[list[Spoken]], kind: DistributionKind, tau: float
) -> list[list[Spoken]]:
    layout, streams = encode_unit(blocks, kind, tau, "here")
    return [
        decode_block(stream, layout, len(block))
        for stream, block in zip(streams, blocks, strict=True)
    ]


def test_nothing_moves_by_more_than_a_thousandth_of_a_nat() -> None:
    assert LOGPROB_STEP_NATS / 2 < CODEC_TOLERANCE_NATS < 1e-3


@given(
    st.integers(0, 10**6),
    st.lists(st.integers(0, 4), max_size=4),
    st.floats(0, 15),
    st.sampled_from((0.5, 0.05, 0.01, 0.001)),
    st.booleans(),
)
@example(0, [], 1.0, 0.05, False)
@example(0, [0, 1], 1.0, 0.05, False)
def test_what_is_packed_comes_back(
    seed: int, counts: list[int], heat: float, tau: float, odd: bool
) -> None:
    sampled = [spoken(seed + k, count, heat, tau, odd) for k, count in enumerate(counts)]
    best = [topk(seed + k, count, heat) for k, count in enumerate(counts)]
    for kind, blocks in (
        (DistributionKind.SAMPLED, sampled),
        (DistributionKind.TOPK, best),
        (DistributionKind.TEXT_ONLY, [words(b) for b in sampled]),
    ):
        back = there_and_back(blocks, kind, tau)
        for block, other in zip(blocks, back, strict=True):
            for a, b in zip(block, other, strict=True):
                assert_same(a, b)
        again = there_and_back(back, kind, tau)  # what was rounded once does not move again
        for block, other in zip(back, again, strict=True):
            for a, b in zip(block, other, strict=True):
                assert np.array_equal(a[1].probs_M, b[1].probs_M)
                assert np.array_equal(a[1].target_logprob_N, b[1].target_logprob_N, equal_nan=True)


def test_tail_entries_are_exactly_tau_and_a_row_keeps_its_mass() -> None:
    back = there_and_back([spoken(1, 8, 1.0, 0.01)], DistributionKind.SAMPLED, 0.01)[0]
    rows = max((rows for _, rows in back), key=len)
    assert (rows.probs_M == np.float32(0.01)).sum() > 50
    mass = np.add.reduceat(rows.probs_M, rows.offsets_N1[:-1])
    assert np.abs(mass - 1).max() <= 0.01 + 1e-3


def test_a_near_certain_answer_costs_next_to_nothing() -> None:
    """Realised token = largest entry: no id, no tail, one bin."""
    n = 4000
    ids = np.random.default_rng(0).integers(0, 50, n).astype(np.int32)
    ends = np.arange(1, n + 1, dtype=np.int32)
    logs = torch.full((n, 50), float(np.log(1e-5 / 49)))
    logs[range(n), ids.astype(np.int64)] = float(np.log1p(-1e-5))
    rows = sample_distributions(logs, ids, 0.01, "sure")
    layout, (stream,) = encode_unit(
        [[(RenderedTokens(ids, ends - 1, ends, np.ones(n, np.bool_)), rows)]],
        DistributionKind.SAMPLED,
        0.01,
        "sure",
    )
    assert len(stream) * 32 / n < np.log2(50) + 0.1  # the tokens themselves
    assert decode_block(stream, layout, 1)[0][1].ids_M.tolist() == rows.ids_M.tolist()
    assert len(rows.ids_M) < n + 10


def test_realised_tokens_of_probability_zero_and_unknown_ones_are_kept_as_that() -> None:
    one = RenderedTokens(
        np.array([1, 2, 3], np.int32),
        np.array([0, 1, 2], np.int32),
        np.array([1, 2, 3], np.int32),
        np.ones(3, np.bool_),
    )
    rows = SparseDistributions(
        np.array([0, 1, 1, 1]),
        np.array([7], np.int32),
        np.array([0.9], np.float32),
        np.array([-np.inf, np.nan, -3.25], np.float32),
        DistributionKind.TOPK,
    )
    back = there_and_back([[(one, rows)]], DistributionKind.TOPK, 0.01)[0][0][1]
    assert back.target_logprob_N[0] == -np.inf
    assert np.isnan(back.target_logprob_N[1])
    assert back.target_logprob_N[2] == -3.25


def broken(change: str) -> Spoken:
    one, rows = spoken(5, 1, 0.5, 0.01)[0]
    assert len(rows.ids_M) > 2
    ids, probs = rows.ids_M.copy(), rows.probs_M.copy()
    if change == "the number of distributions is not the number of learned tokens":
        return replace(one, loss_mask_T=np.ones(len(one), np.bool_)), rows
    if change == "the token ids of a distribution do not rise":
        ids[[0, 1]] = ids[[1, 0]]
    elif change == "stands twice":
        ids[1] = ids[0]
    elif change == "distributions that are not sampled":
        return one, replace(rows, kind=DistributionKind.TOPK)
    elif change == "the log-probability of a target token differs from its entry":
        first = slice(0, int(rows.offsets_N1[1]))
        ids[first] = one.ids_T[one.loss_mask_T][0] + np.arange(rows.offsets_N1[1])
        probs[0] = 0.5
        return one, replace(
            rows, ids_M=ids, probs_M=probs, target_logprob_N=np.full(len(rows), -5, np.float32)
        )
    else:
        probs[0] = float(change.split()[-1])
    return one, replace(rows, ids_M=ids, probs_M=probs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("probability nan", "no probability"),
        ("probability 0", "no probability"),
        ("probability -0.1", "no probability"),
        ("probability 1.01", "no probability"),
        ("the token ids of a distribution do not rise", ""),
        ("stands twice", "do not rise"),
        ("the number of distributions is not the number of learned tokens", ""),
        ("distributions that are not sampled", ""),
        ("the log-probability of a target token differs from its entry", ""),
    ],
)
def test_what_cannot_be_kept_is_refused_by_its_place(change: str, reason: str) -> None:
    with pytest.raises(DataError, match=f"unit 7, block 1: .*{reason or change}") as caught:
        encode_unit(
            [spoken(9, 2, 1.0, 0.01), [broken(change)]], DistributionKind.SAMPLED, 0.01, "unit 7"
        )
    assert caught.value.exit_code == 3


def test_a_stream_that_would_not_come_back_is_not_published(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever is changed on the way back: `pack` reads what it wrote."""

    def other(stream: object, layout: object, count: object) -> list[Spoken]:
        (one, rows), *rest = decode_block(stream, layout, count)  # type: ignore[arg-type]
        return [(one, replace(rows, probs_M=rows.probs_M * np.float32(0.998))), *rest]

    assert encode_unit([spoken(4, 3, 1.0, 0.01)], DistributionKind.SAMPLED, 0.01, "here")
    monkeypatch.setattr("persea.cache.codec.decode_block", other)
    with pytest.raises(AssertionError, match="the decoded unit differs"):
        encode_unit([spoken(4, 3, 1.0, 0.01)], DistributionKind.SAMPLED, 0.01, "here")
