"""Unbiased sparse samples of next-token distributions: systematic threshold sampling."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from persea.distributions.blocks import BLOCK_TOKENS, BlockedLogits, blocks_of_logprobs
from persea.distributions.sparse import (
    SparseDistributions,
    concat_distributions,
    rows_per_chunk,
)

if TYPE_CHECKING:
    import torch


def uniform_draws(seed: str, count: int) -> npt.NDArray[np.float64]:
    """Return the first random numbers in [0, 1) of a draw, one for each position.

    Args:
        seed: Name of the draw; the same name gives the same numbers on every machine.
        count: Number of positions.
    """
    digest = hashlib.sha256(seed.encode()).digest()
    bits = np.random.Philox(int.from_bytes(digest[:8], "big"))
    return np.random.Generator(bits).random(count)


def sample_distributions(
    logprobs_NW: torch.Tensor,
    target_ids_N: npt.NDArray[np.integer],
    tau: float,
    seed: str,
    row_offset: int = 0,
) -> SparseDistributions:
    """Sample sparse distributions by systematic threshold sampling.

    Entries with probability >= tau are stored exactly. Below tau an entry is selected with
    probability p / tau and stored as tau, so its expectation is exactly p. One random number a
    position walks the cumulative tail, so the stored probabilities sum to 1 within tau. A position
    that is nearly certain costs one entry.

    Args:
        logprobs_NW: Natural log-probabilities, [positions, vocabulary].
        target_ids_N: Ids of the target tokens.
        tau: The sampling threshold, a probability.
        seed: Name of the draw; the same name gives the same samples on every machine.
        row_offset: Positions of the same draw before these: chunks give the same samples as the
            whole.

    Raises:
        DataError: A position is no distribution.

    Reference:
        Threshold sampling: Duffield, Lund and Thorup, 2005. In distillation: Anshumann et al., ACL
        2025.
    """
    target_N = np.asarray(target_ids_N, np.int64)
    uniform_N = uniform_draws(seed, row_offset + len(logprobs_NW))[row_offset:]
    chunk = rows_per_chunk(logprobs_NW)
    parts = []
    for first in range(0, max(1, len(logprobs_NW)), chunk):
        span = slice(first, first + chunk)
        blocks = blocks_of_logprobs(logprobs_NW, span, seed, is_complete=True)
        parts.append(sample_blocks(blocks, target_N[span], uniform_N[span], tau))
    return concat_distributions(parts)


def sample_blocks(
    blocks: BlockedLogits,
    target_ids_N: npt.NDArray[np.integer],
    uniform_N: npt.NDArray[np.float64],
    tau: float,
) -> SparseDistributions:
    """Sample as `sample_distributions` does, from logits and one random number a position.

    Args:
        blocks: The logits, on any device; only the entries leave it.
        target_ids_N: Ids of the target tokens.
        uniform_N: Random numbers in [0, 1).
        tau: The sampling threshold, a probability.
    """
    import torch

    device = blocks.logits_NW.device
    # What each block leaves below tau: all of it, but where a token reaches tau.
    row_P, block_P = (blocks.max_prob_NB >= tau).nonzero(as_tuple=True)
    p_PK = blocks.block_logprobs(row_P, block_P).exp()
    is_head_PK = p_PK >= tau
    tail_NB = blocks.prob_NB
    tail_NB[row_P, block_P] = torch.where(is_head_PK, 0.0, p_PK).sum(-1)
    # A block has as many samples below tau as its cumulative sum passes whole numbers.
    start_N1 = torch.from_numpy(np.asarray(uniform_N, np.float64))[:, None].to(device)
    sum_NB1 = torch.cat([start_N1, (tail_NB / tau).cumsum(-1) + start_N1], dim=1)
    count_NB1 = sum_NB1.floor()
    row_Q, block_Q = (count_NB1[:, 1:] > count_NB1[:, :-1]).nonzero(as_tuple=True)
    p_QK = blocks.block_logprobs(row_Q, block_Q).exp()
    p_QK = torch.where(p_QK >= tau, 0.0, p_QK)
    # The tokens of a block share its sum, which was made in float32.
    share_QK = (
        p_QK * ((sum_NB1[row_Q, block_Q + 1] - sum_NB1[row_Q, block_Q]) / p_QK.sum(-1))[:, None]
    )
    sum_QK = share_QK.cumsum(-1) + sum_NB1[row_Q, block_Q][:, None]
    count_QK1 = torch.cat([count_NB1[row_Q, block_Q][:, None], sum_QK.floor()], dim=1)
    is_sampled_QK = (count_QK1[:, 1:] > count_QK1[:, :-1]) & (p_QK > 0)
    head, sampled = is_head_PK.nonzero(as_tuple=True), is_sampled_QK.nonzero(as_tuple=True)
    row_M = torch.cat([row_P[head[0]], row_Q[sampled[0]]]).cpu().numpy()
    block_M = torch.cat([block_P[head[0]], block_Q[sampled[0]]]).cpu().numpy()
    id_M = block_M * BLOCK_TOKENS + torch.cat([head[1], sampled[1]]).cpu().numpy()
    p_M = np.full(len(row_M), tau)
    p_M[: len(head[0])] = p_PK[head].cpu().numpy()
    order = np.lexsort((id_M, row_M))
    sizes_N = np.bincount(row_M, minlength=len(blocks))
    return SparseDistributions(
        np.concatenate([[0], np.cumsum(sizes_N)]).astype(np.int64),
        id_M[order].astype(np.int32),
        p_M[order].astype(np.float32),
        blocks.token_logprobs(target_ids_N),
    )
