"""Top-k distributions: the fewest most likely entries within a KL divergence, and a rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from persea.distributions.blocks import BLOCK_TOKENS, BlockedLogits, blocks_of_logprobs
from persea.distributions.sparse import (
    LOGPROB_STEP_NATS,
    MASS_TOLERANCE,
    DistributionKind,
    SparseDistributions,
    concat_distributions,
    rows_per_chunk,
)

if TYPE_CHECKING:
    import torch

GRID_SUM_TOLERANCE = MASS_TOLERANCE / 2  # of values on the codec's grid
# Grid multiples between stored values: a position takes the coarsest that costs it no entry.
GRID_MULTIPLES = (1, 4, 8, 16, 32, 64, 128)
INITIAL_CANDIDATES = 32  # a position that needs more candidates gets four times as many
MAX_CANDIDATES_AT_ONCE = 1 << 18  # 2 MiB of float64, and about a dozen arrays of them
NEGLIGIBLE_MASS = 1e-9  # the rounding error of a float32 softmax
MIN_FREQUENCY = 1e-300  # avoids a division by 0


def topk_within_kl(
    logprobs_NW: torch.Tensor,
    target_ids_N: npt.NDArray[np.integer],
    max_kl: float,
    frequency_W: npt.NDArray[np.float64],
    where: str,
) -> SparseDistributions:
    """Select the fewest most likely entries of each position with KL(p || q) <= max_kl.

    At least one entry is stored; of equal probabilities the lower ids come first. q is the
    distribution that a reader can reconstruct: the stored values, and the remaining mass spread
    over all other tokens in proportion to `frequency_W`, because nothing stored describes them
    better. Spread evenly, a tail of 152k tokens would cost nats that no reader needs to lose; as a
    single event the KL would not count the loss inside the tail.

    Values lie on the codec's grid, so the codec changes none of them. The most likely token and the
    target token use the finest grid, the most likely one rounded down so that some mass remains;
    the others use the coarsest grid that needs no further entry. The target's log-probability is
    that of its entry, if it has one. Each position depends on itself alone.

    Args:
        logprobs_NW: Natural log-probabilities, [positions, vocabulary].
        target_ids_N: Ids of the target tokens.
        max_kl: Largest KL divergence in nats, at least 0.003, which rounding alone may cost.
        frequency_W: How often each token is expected; above 0, sums to 1.
        where: The place for error messages.

    Raises:
        DataError: A position is no distribution.
    """
    targets_N: npt.NDArray[np.int64] = np.asarray(target_ids_N, np.int64)
    parts = []
    chunk = rows_per_chunk(logprobs_NW)
    for first in range(0, max(1, len(logprobs_NW)), chunk):
        span = slice(first, first + chunk)
        blocks = blocks_of_logprobs(logprobs_NW, span, where, is_complete=False)
        parts.append(topk_blocks_within_kl(blocks, targets_N[span], max_kl, frequency_W))
    return concat_distributions(parts)


def topk_blocks_within_kl(
    blocks: BlockedLogits,
    target_ids_N: npt.NDArray[np.integer],
    max_kl: float,
    frequency_W: npt.NDArray[np.float64],
) -> SparseDistributions:
    """Select as `topk_within_kl` does, from logits.

    Args:
        blocks: The logits, on any device; only likely blocks leave it.
        target_ids_N: Ids of the target tokens.
        max_kl: Largest KL divergence in nats.
        frequency_W: How often each token is expected; above 0, sums to 1.
    """
    import torch

    targets_N: npt.NDArray[np.int64] = np.asarray(target_ids_N, np.int64)
    log_frequency_W = torch.from_numpy(np.log(frequency_W).astype(np.float32))
    mass_N = blocks.exact_mass().cpu().numpy()
    kl_to_frequency_N = blocks.kl_to(log_frequency_W.to(blocks.logits_NW.device)).cpu().numpy()
    pending, num_candidates = np.arange(len(blocks)), INITIAL_CANDIDATES
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64))]
    while len(pending):
        left = []
        at_once = max(1, MAX_CANDIDATES_AT_ONCE // num_candidates)
        for begin in range(0, len(pending), at_once):
            rows = pending[begin : begin + at_once]
            id_RK, p_RK, sizes_R = _likely_tokens(blocks, rows, num_candidates)
            is_candidate_RK = np.arange(id_RK.shape[1]) < sizes_R[:, None]
            count_R, bins_RK = min_entries_within_kl(
                p_RK,
                np.where(is_candidate_RK, frequency_W[id_RK], 0),
                id_RK == targets_N[rows][:, None],
                mass_N[rows],
                kl_to_frequency_N[rows],
                max_kl,
            )
            done_R = (count_R > 0) & (count_R <= sizes_R)
            if num_candidates >= blocks.vocab_size and not done_R.all():
                raise AssertionError(f"a position with all its tokens stored has KL > {max_kl}")
            r, k = np.nonzero((np.arange(id_RK.shape[1]) < count_R[:, None]) & done_R[:, None])
            found.append((rows[r], id_RK[r, k], bins_RK[r, k]))
            left.append(rows[~done_R])
        pending, num_candidates = np.concatenate(left), num_candidates * 4
    row, ids, bins = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((ids, row))
    row, ids, bins = row[order], ids[order], bins[order]
    target_logprob_N = blocks.token_logprobs(targets_N)
    is_target = ids == targets_N[row]
    target_logprob_N[row[is_target]] = bins[is_target] * -LOGPROB_STEP_NATS
    return SparseDistributions(
        np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(blocks)))]).astype(np.int64),
        ids.astype(np.int32),
        np.exp(bins * -LOGPROB_STEP_NATS).astype(np.float32),
        target_logprob_N,
        DistributionKind.TOPK,
    )


def _likely_tokens(
    blocks: BlockedLogits, rows: npt.NDArray[np.int64], num_candidates: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return the tokens of some positions from a logit on, the most likely first.

    The logit is that of the `num_candidates`-th most likely token, or of the best token of the
    `num_candidates`-th block, which at least as many tokens reach. All equals are included, so that
    the number of candidates decides nothing.

    Returns:
        Ids and probabilities, [R, K] with zeros after the last, and the number of each position.
    """
    import torch

    row_R = torch.from_numpy(rows).to(blocks.logits_NW.device)
    max_RB = blocks.max_NB[row_R]
    most_R1 = max_RB
    if max_RB.shape[1] < num_candidates < blocks.vocab_size:
        most_R1 = blocks.logits_NW[row_R]
    kept = min(num_candidates, most_R1.shape[1])
    least_R1 = most_R1.topk(kept, dim=1, sorted=False).values.amin(1, keepdim=True)
    if num_candidates >= blocks.vocab_size:
        least_R1 = torch.full_like(least_R1, -torch.inf)
    r_P, block_P = (max_RB >= least_R1).nonzero(as_tuple=True)
    logit_PK = blocks.block_values(row_R[r_P], block_P)
    p_PK = (logit_PK.double() - blocks.log_total_N[row_R[r_P]][:, None]).exp()
    p, k = ((logit_PK >= least_R1[r_P]) & (p_PK > 0)).nonzero(as_tuple=True)
    row, probs = r_P[p].cpu().numpy(), p_PK[p, k].cpu().numpy()
    ids = (block_P[p] * BLOCK_TOKENS + k).cpu().numpy()
    order = np.lexsort((ids, -probs, row))
    row, ids, probs = row[order], ids[order], probs[order]
    sizes_R = np.bincount(row, minlength=len(rows))
    column = np.arange(len(row)) - np.repeat(np.cumsum(sizes_R) - sizes_R, sizes_R)
    id_RK = np.zeros((len(rows), int(sizes_R.max(initial=0))), np.int64)
    p_RK = np.zeros(id_RK.shape)
    id_RK[row, column], p_RK[row, column] = ids, probs
    return id_RK, p_RK, sizes_R


def min_entries_within_kl(
    p_NK: npt.NDArray[np.float64],
    frequency_NK: npt.NDArray[np.float64],
    is_target_NK: npt.NDArray[np.bool_],
    mass_N: npt.NDArray[np.float64],
    kl_to_frequency_N: npt.NDArray[np.float64],
    max_kl: float,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return how many candidates each position needs and their values in grid steps.

    Args:
        p_NK: Probabilities of the candidates, most likely first; 0 after the last candidate.
        frequency_NK: Expected frequencies of the candidates; 0 after the last one.
        is_target_NK: Whether the candidate is the target token.
        mass_N: Sum of all probabilities of the position.
        kl_to_frequency_N: KL of the whole position against the frequencies, sum p ln(p /
            frequency).
        max_kl: Largest KL divergence in nats.

    Returns:
        The number of entries (0 = all candidates are not enough), and int64 values in grid steps.
    """
    is_candidate_NK = p_NK > 0
    logs_NK = np.log(np.where(is_candidate_NK, p_NK, 1))
    kl_term_NK = p_NK * (logs_NK - np.log(np.where(is_candidate_NK, frequency_NK, 1)))
    unnamed_mass_NK = mass_N[:, None] - p_NK.cumsum(1)
    is_negligible_NK = unnamed_mass_NK <= NEGLIGIBLE_MASS
    unnamed_kl_NK = np.where(is_negligible_NK, 0, kl_to_frequency_N[:, None] - kl_term_NK.cumsum(1))
    unnamed_frequency_NK = np.maximum(1 - frequency_NK.cumsum(1), MIN_FREQUENCY)
    finest_NK = np.maximum(np.rint(logs_NK / -LOGPROB_STEP_NATS), 0)
    finest_NK[:, :1] = np.ceil(logs_NK[:, :1].clip(max=0) / -LOGPROB_STEP_NATS)
    finest_only_NK = is_target_NK | (np.arange(p_NK.shape[1]) == 0)
    count_N, chosen_NK = np.full(len(p_NK), p_NK.shape[1] + 1), finest_NK
    for multiple in GRID_MULTIPLES:
        bins_NK = np.where(
            finest_only_NK, finest_NK, np.rint(logs_NK / (-LOGPROB_STEP_NATS * multiple)) * multiple
        )
        named_NK = np.where(is_candidate_NK, np.exp(bins_NK * -LOGPROB_STEP_NATS), 0).cumsum(1)
        rest_NK = 1 - named_NK
        valid_NK = (rest_NK > 0) | (is_negligible_NK & (named_NK <= 1 + GRID_SUM_TOLERANCE))
        spread_NK = np.where(
            is_negligible_NK | ~valid_NK,
            0,
            unnamed_mass_NK * np.log(np.where(rest_NK > 0, rest_NK, 1) / unnamed_frequency_NK),
        )
        kl_NK = (
            (p_NK * (logs_NK + bins_NK * LOGPROB_STEP_NATS)).cumsum(1) + unnamed_kl_NK - spread_NK
        )
        close_enough_NK = valid_NK & (kl_NK <= max_kl)
        needed_N = np.where(
            close_enough_NK.any(1), close_enough_NK.argmax(1) + 1, p_NK.shape[1] + 1
        )
        better_N = needed_N <= count_N
        count_N, chosen_NK = (
            np.where(better_N, needed_N, count_N),
            np.where(better_N[:, None], bins_NK, chosen_NK),
        )
    return np.where(count_N <= p_NK.shape[1], count_N, 0), chosen_NK.astype(np.int64)
