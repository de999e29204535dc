"""Sums of blocks are those of float64, and samples from them are those of a walk over tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persea.distributions import SparseDistributions
from persea.distributions.blocks import (
    BLOCK_TOKENS,
    STRIP_TOKENS,
    TILE_ROWS,
    BlockedLogits,
    LogitBuffer,
    blocks_of_logits,
)
from persea.distributions.lm_head import LMHead
from persea.distributions.sampling import sample_blocks
from persea.distributions.topk import topk_blocks_within_kl

WIDTHS = st.sampled_from(
    [1, 3, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, STRIP_TOKENS, 2 * STRIP_TOKENS + 77]
)


def logits(seed: int, n: int, width: int, heat: float, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator) * heat + shift


def walk(logits_NW: torch.Tensor, uniform_N: np.ndarray, tau: float) -> list[dict[int, float]]:
    """The definition: every token in turn, in float64."""
    out = []
    for logit_W, u in zip(logits_NW.double(), uniform_N, strict=True):
        p_W = torch.softmax(logit_W, -1).numpy()
        found, total = {}, float(u)
        for token, p in enumerate(p_W.tolist()):
            if p >= tau:
                found[token] = p
                continue
            before, total = np.floor(total), total + p / tau
            if np.floor(total) > before:
                found[token] = tau
        out.append(found)
    return out


def entries(rows: SparseDistributions, n: int) -> dict[int, float]:
    span = slice(rows.offsets_N1[n], rows.offsets_N1[n + 1])
    return dict(zip(rows.ids_M[span].tolist(), rows.probs_M[span].tolist(), strict=True))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(0, 4), WIDTHS, st.floats(0, 20), st.floats(-1e4, 1e4))
def test_sums_and_maxima_are_those_of_float64(
    seed: int, n: int, width: int, heat: float, shift: float
) -> None:
    made = logits(seed, n, width, heat, shift)
    blocks = blocks_of_logits(made)
    assert torch.equal(blocks.logits_NW[:, :width], made)
    assert (blocks.logits_NW[:, width:] == -torch.inf).all()
    torch.testing.assert_close(
        blocks.log_total_N, torch.logsumexp(made.double(), -1), rtol=0, atol=2e-6
    )
    torch.testing.assert_close(
        blocks.prob_NB.sum(-1), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-9
    )
    if n:
        target = np.arange(n) % width
        wanted = torch.log_softmax(made.double(), -1)[range(n), target].float()
        assert np.allclose(blocks.token_logprobs(target), wanted, atol=2e-6)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10**6),
    st.sampled_from([3, BLOCK_TOKENS + 9, 3 * BLOCK_TOKENS]),
    st.floats(0, 12),
    st.sampled_from((0.003, 0.02, 0.1, 0.5)),
)
def test_a_sample_is_that_of_a_walk_over_all_tokens(
    seed: int, width: int, heat: float, tau: float
) -> None:
    """Float32 sums of blocks move a sample only where a number of the walk is all but whole."""
    made, uniform_N = logits(seed, 6, width, heat), np.random.default_rng(seed).random(6)
    rows = sample_blocks(blocks_of_logits(made), np.zeros(6, np.int64), uniform_N, tau)
    moved = 0
    for n, wanted in enumerate(walk(made, uniform_N, tau)):
        found = entries(rows, n)
        if found.keys() != wanted.keys():
            moved += 1
            assert len(found.keys() ^ wanted.keys()) <= 2
            continue
        assert all(abs(found[k] - p) <= 2e-6 for k, p in wanted.items())
    assert moved <= 1


def test_samples_moved_by_rounding_are_rare() -> None:
    made, uniform_N = logits(5, 400, 2000, 2.0), np.random.default_rng(5).random(400)
    rows = sample_blocks(blocks_of_logits(made), np.zeros(400, np.int64), uniform_N, 0.01)
    walked = walk(made, uniform_N, 0.01)
    same = [entries(rows, n).keys() == one.keys() for n, one in enumerate(walked)]
    assert sum(map(len, walked)) > 10_000
    assert np.mean(same) > 0.99


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_is_in_its_total(bad: float) -> None:
    made = logits(0, 3, 700, 1.0)
    made[1, 650] = bad
    assert torch.isfinite(blocks_of_logits(made).log_total_N).tolist() == [True, False, True]


@pytest.mark.parametrize("at", [0, 255, 650, 699])
def test_the_smallest_logit_shows_minus_infinity_and_nan(at: int) -> None:
    made = logits(0, 2 * TILE_ROWS + 3, 700, 1.0)
    made[1, at], made[2 * TILE_ROWS, at] = -torch.inf, torch.nan
    found = blocks_of_logits(made).min_N
    assert found[1] == -torch.inf and found[2 * TILE_ROWS].isnan()
    others = [k for k in range(len(made)) if k not in (1, 2 * TILE_ROWS)]
    assert torch.equal(found[others], made[others].amin(1))


def test_tokens_without_probability_are_never_stored() -> None:
    made = torch.full((2, 600), -torch.inf)
    made[0, 300], made[1, [5, 599]] = 2.0, torch.tensor([0.0, 0.0])
    blocks = blocks_of_logits(made)
    rows = sample_blocks(blocks, np.array([300, 5]), np.array([0.999, 0.5]), 0.01)
    assert entries(rows, 0) == {300: 1.0} and entries(rows, 1) == {5: 0.5, 599: 0.5}
    named = topk_blocks_within_kl(blocks, np.array([300, 5]), 0.01, np.full(600, 1 / 600))
    assert entries(named, 0).keys() == {300} and entries(named, 1).keys() == {5, 599}


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([50, 300, STRIP_TOKENS + 9]), st.floats(0, 12))
def test_the_kl_to_a_frequency_is_that_of_float64(seed: int, width: int, heat: float) -> None:
    made = logits(seed, 4, width, heat, 30.0)
    frequency_W = np.random.default_rng(seed).dirichlet(np.ones(width)) + 1e-9
    p_NW = torch.softmax(made.double(), -1)
    log_frequency_W = torch.from_numpy(np.log(frequency_W))
    wanted = (p_NW * (torch.log_softmax(made.double(), -1) - log_frequency_W)).sum(-1)
    found = blocks_of_logits(made).kl_to(log_frequency_W.float())
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)


def test_a_small_mass_beside_a_certain_token_is_not_lost() -> None:
    made = torch.full((2, 600), -200.0)
    made[:, 3], made[1, 4] = 0.0, -18.4  # 1.02e-8 in one block with a certain token
    blocks = blocks_of_logits(made)
    beside = (
        blocks.exact_mass()
        - blocks.block_logprobs(torch.arange(2), torch.zeros(2).long())[:, 3].exp()
    )
    assert abs(float(beside[0])) < 1e-12
    assert float(beside[1]) == pytest.approx(np.exp(-18.4), rel=1e-4)


def test_some_rows_are_those_rows() -> None:
    blocks = blocks_of_logits(logits(1, 5, 600, 3.0))
    some = blocks.rows(2, 4)
    assert isinstance(some, BlockedLogits) and len(some) == 2
    uniform_N = np.random.default_rng(0).random(5)
    whole = sample_blocks(blocks, np.arange(5), uniform_N, 0.02)
    part = sample_blocks(some, np.arange(5)[2:4], uniform_N[2:4], 0.02)
    assert [entries(part, k) for k in range(2)] == [entries(whole, k) for k in (2, 3)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.25, 0.0), (2.0, 3.0)])
def test_a_heads_blocks_are_its_logits(bias: bool, scale: float, softcap: float) -> None:
    generator = torch.Generator().manual_seed(0)
    size = STRIP_TOKENS + 300  # the last rows of the matrix are padding
    weight_VD = torch.randn(size + 5, 16, generator=generator)
    bias_V = torch.randn(size + 5, generator=generator) if bias else None
    head = LMHead(weight_VD, size, bias_V, scale, softcap)
    hidden_ND = torch.randn(7, 16, generator=generator)
    blocks = head.blocked_logits(hidden_ND)
    torch.testing.assert_close(
        blocks.logits_NW[:, :size], head.logits(hidden_ND), rtol=1e-5, atol=1e-5
    )
    assert blocks.vocab_size == size


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("size", [300, 2 * STRIP_TOKENS, STRIP_TOKENS + 300])
def test_a_heads_blocks_in_bfloat16_are_its_products(softcap: float, size: int) -> None:
    """Products stay as they are, what follows is float32, and sums are those of what is stored."""
    generator = torch.Generator().manual_seed(0)
    weight_VD, hidden_ND = (
        torch.randn(n, 16, generator=generator).bfloat16() for n in (size, TILE_ROWS + 5)
    )
    head = LMHead(weight_VD, size, logit_softcap=softcap)
    buffer = LogitBuffer()
    head.blocked_logits(torch.full_like(hidden_ND, 9.0), buffer)  # leaves other logits in it
    blocks = head.blocked_logits(hidden_ND, buffer)
    product_NV = torch.cat(
        [hidden_ND @ part.T for part in weight_VD.split(STRIP_TOKENS)], dim=1
    )  # one matrix product may round otherwise than two
    assert blocks.logits_NW.dtype is (torch.float32 if softcap else torch.bfloat16)
    assert head.stored_dtype(hidden_ND) is blocks.logits_NW.dtype
    wanted = softcap * torch.tanh(product_NV.float() / softcap) if softcap else product_NV.float()
    stored = blocks.logits_NW[:, :size].float()
    torch.testing.assert_close(stored, wanted, rtol=2**-7, atol=1e-3)
    again = blocks_of_logits(stored)
    for name in ("min_N", "max_NB", "log_sum_NB", "log_total_N"):
        assert torch.equal(getattr(blocks, name), getattr(again, name)), name
    target, uniform_N = np.arange(len(blocks)) * 7, np.random.default_rng(0).random(len(blocks))
    one, other = (sample_blocks(x, target, uniform_N, 0.02) for x in (blocks, again))
    assert np.array_equal(one.ids_M, other.ids_M) and np.array_equal(one.probs_M, other.probs_M)
    assert np.array_equal(one.target_logprob_N, other.target_logprob_N)
    frequency_V = np.full(size, 1 / size)
    one, other = (topk_blocks_within_kl(x, target, 0.01, frequency_V) for x in (blocks, again))
    assert np.array_equal(one.ids_M, other.ids_M) and np.array_equal(one.probs_M, other.probs_M)
