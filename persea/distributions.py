"""Sparse teacher distributions, one for each position: sampled, top-k, full, or text only."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from persea.errors import DataError

if TYPE_CHECKING:
    import torch

# Elements processed at once: 8 MB of float64, and at most seven arrays of them.
MAX_CHUNK_ELEMENTS = 1 << 20
LOGPROB_STEP_NATS = 1 / 512  # grid of the log-probabilities in the codec's file format
# The probabilities of a position may sum to more than 1 by this much: float32 sums of 262k terms
# stay within 1e-5, float16 servers within 5e-4.
MASS_TOLERANCE = 1e-3
FLOAT32_SUM_TOLERANCE = MASS_TOLERANCE / 100
GRID_SUM_TOLERANCE = MASS_TOLERANCE / 2  # of values on the codec's grid
# Grid multiples between stored values: a position takes the coarsest that costs it no entry.
GRID_MULTIPLES = (1, 4, 8, 16, 32, 64, 128)
INITIAL_CANDIDATES = 32  # a position that needs more candidates gets four times as many
NEGLIGIBLE_MASS = 1e-9  # the rounding error of a float32 softmax
MIN_LOGPROB = -1e4  # instead of -inf: a probability of 0 contributes 0 and no NaN
MIN_FREQUENCY = 1e-300  # avoids a division by 0


class DistributionKind(StrEnum):
    """How much of the teacher's distribution is stored, which decides the possible losses."""

    FULL = "full"  # every token: for any divergence
    # An unbiased sample: only for losses linear in the teacher's probabilities (forward KL).
    SAMPLED = "sampled"
    TOPK = "topk"  # the most likely tokens exactly, and the remaining mass; never renormalised
    TEXT_ONLY = "words"  # no probabilities


@dataclass(frozen=True)
class SparseDistributions:
    """Sparse next-token distributions of a teacher. N = positions with a loss, M = stored entries.

    Attributes:
        offsets_N1: int64, the entries of position n are [offsets[n], offsets[n + 1]); none for
            TEXT_ONLY.
        ids_M: int32 teacher token ids, never mapped to another vocabulary: one capture serves every
            student.
        probs_M: float32 probabilities. They sum to 1 within the sampling threshold for SAMPLED, to
            at most 1 for TOPK.
        target_logprob_N: float32 natural log-probability of the target token; NaN if the teacher
            gave none.
        kind: The kind of all positions.
    """

    offsets_N1: npt.NDArray[np.int64]
    ids_M: npt.NDArray[np.int32]
    probs_M: npt.NDArray[np.float32]
    target_logprob_N: npt.NDArray[np.float32]
    kind: DistributionKind = DistributionKind.SAMPLED

    def __len__(self) -> int:
        return len(self.offsets_N1) - 1


def validate_logprobs(logprobs_NW: torch.Tensor, where: str, is_complete: bool = False) -> None:
    """Refuse log-probabilities that are no distribution.

    Args:
        logprobs_NW: Natural log-probabilities, [positions, vocabulary].
        where: The place for error messages.
        is_complete: Whether the whole vocabulary is given, so that a sum below 1 - MASS_TOLERANCE
            is refused too.

    Raises:
        DataError: A position contains NaN, a log-probability above MASS_TOLERANCE, or probabilities
            with a sum above 1 + MASS_TOLERANCE.
    """
    import torch

    remedy = (
        "log-probabilities must be natural logarithms of a softmax; check the weights, their "
        "dtype, or the server's response"
    )
    chunk = _rows_per_chunk(logprobs_NW)
    for first in range(0, len(logprobs_NW), chunk):
        chunk_NW = logprobs_NW[first : first + chunk]
        nan_N, sum_N = torch.isnan(chunk_NW).any(-1), chunk_NW.double().exp().sum(-1)
        for fault, bad_N in (
            ("NaN", nan_N),
            (
                f"a log-probability above {MASS_TOLERANCE:g}",
                (chunk_NW > MASS_TOLERANCE).any(-1),
            ),
            (f"a sum of probabilities above 1 + {MASS_TOLERANCE:g}", sum_N > 1 + MASS_TOLERANCE),
            (
                f"a sum of probabilities below 1 - {MASS_TOLERANCE:g}",
                (sum_N < 1 - MASS_TOLERANCE) & is_complete,
            ),
        ):
            if bool(bad_N.any()):
                row = first + int(bad_N.nonzero()[0])
                raise DataError(
                    f"row {row} of {len(logprobs_NW)} is no distribution: {fault}",
                    where=where,
                    remedy=remedy,
                )


def _rows_per_chunk(logprobs_NW: torch.Tensor) -> int:
    """Return how many positions to process at once.

    A vocabulary of 262,144 then costs 64 MiB however long the answer is.
    """
    return max(1, MAX_CHUNK_ELEMENTS // max(1, logprobs_NW.shape[1]))


def concat_distributions(parts: Sequence[SparseDistributions]) -> SparseDistributions:
    """Concatenate distributions of one kind; at least one."""
    sizes_N = np.concatenate([np.diff(p.offsets_N1) for p in parts])
    ids_M, probs_M, target_logprob_N = (
        np.concatenate(column)
        for column in zip(*((p.ids_M, p.probs_M, p.target_logprob_N) for p in parts), strict=True)
    )
    return SparseDistributions(
        np.concatenate([[0], np.cumsum(sizes_N)]).astype(np.int64),
        ids_M,
        probs_M,
        target_logprob_N,
        parts[0].kind,
    )


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
    import torch

    rng = np.random.Generator(
        np.random.Philox(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big"))
    )
    uniform_N1 = torch.from_numpy(rng.random((row_offset + len(logprobs_NW), 1))[row_offset:])
    chunk = _rows_per_chunk(logprobs_NW)
    spans = [slice(first, first + chunk) for first in range(0, max(1, len(logprobs_NW)), chunk)]
    parts = []
    for span in spans:
        p_NW = logprobs_NW[span].double().exp()
        # The comparison is also False for NaN and for a probability above 1.
        if not bool(((p_NW.sum(-1) - 1).abs() <= MASS_TOLERANCE).all()):
            validate_logprobs(logprobs_NW, seed, is_complete=True)
        parts.append(_threshold_sample(p_NW, uniform_N1[span], tau))
    sizes, ids, values = (np.concatenate(some) for some in zip(*parts, strict=True))
    target_N = torch.from_numpy(np.asarray(target_ids_N, np.int64))
    target_logprob_N = logprobs_NW[torch.arange(len(target_N)), target_N].float().numpy()
    return SparseDistributions(
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), ids, values, target_logprob_N
    )


def _threshold_sample(
    p_NW: torch.Tensor, uniform_N1: torch.Tensor, tau: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return the selected entries: how many for each position, their ids and their values."""
    import torch

    head_NW = p_NW >= tau
    count_NW = (torch.where(head_NW, 0.0, p_NW / tau).cumsum(-1) + uniform_N1).floor()
    selected_NW = head_NW
    selected_NW[:, 1:] |= count_NW[:, 1:] > count_NW[:, :-1]
    selected_NW[:, :1] |= count_NW[:, :1] > 0
    row_M, id_M = selected_NW.nonzero(as_tuple=True)
    p_M = p_NW[row_M, id_M]
    values_M = torch.where(p_M >= tau, p_M, tau)
    return (
        np.bincount(row_M.numpy(), minlength=len(p_NW)),
        id_M.numpy().astype(np.int32),
        values_M.numpy().astype(np.float32),
    )


# --- top-k: the most likely tokens and the mass that they leave ---


def distributions_from_top_logprobs(
    ids_NK: npt.NDArray[np.integer],
    logprobs_NK: npt.NDArray[np.floating],
    target_ids_N: npt.NDArray[np.integer],
    target_logprob_N: npt.NDArray[np.floating],
) -> SparseDistributions:
    """Return TOPK distributions from a server's K log-probabilities for each position.

    The values are exact, except at a position whose probabilities sum to more than 1 by more than a
    float32 sum can: there they are rounded down to the codec's grid, so that the codec's own
    rounding does not raise the sum above 1 + MASS_TOLERANCE.

    Args:
        ids_NK: Token ids.
        logprobs_NK: Their natural log-probabilities.
        target_ids_N: Ids of the target tokens, which may be missing in `ids_NK`.
        target_logprob_N: Natural log-probabilities of the target tokens.
    """
    order = np.argsort(ids_NK, axis=1)
    ids_NK, logprobs_NK = (
        np.take_along_axis(ids_NK, order, 1),
        np.take_along_axis(logprobs_NK, order, 1).astype(np.float64),
    )
    too_large_N1 = np.exp(logprobs_NK).sum(1, keepdims=True) > 1 + FLOAT32_SUM_TOLERANCE
    logprobs_NK = np.where(
        too_large_N1, np.ceil(logprobs_NK / -LOGPROB_STEP_NATS) * -LOGPROB_STEP_NATS, logprobs_NK
    )
    is_target_NK = ids_NK == target_ids_N[:, None]
    target_logprobs = np.where(
        is_target_NK.any(1), np.where(is_target_NK, logprobs_NK, 0).sum(1), target_logprob_N
    ).astype(np.float32)
    offsets_N1 = np.arange(len(ids_NK) + 1, dtype=np.int64) * ids_NK.shape[1]
    return SparseDistributions(
        offsets_N1,
        ids_NK.ravel().astype(np.int32),
        np.exp(logprobs_NK).ravel().astype(np.float32),
        target_logprobs,
        DistributionKind.TOPK,
    )


def text_only_distributions(n: int) -> SparseDistributions:
    """Return n TEXT_ONLY positions, which have no entries."""
    return SparseDistributions(
        np.zeros(n + 1, np.int64),
        np.empty(0, np.int32),
        np.empty(0, np.float32),
        np.full(n, np.nan, np.float32),
        DistributionKind.TEXT_ONLY,
    )


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
    import torch

    targets_N: npt.NDArray[np.int64] = np.asarray(target_ids_N, np.int64)
    parts = []
    chunk = _rows_per_chunk(logprobs_NW)
    for first in range(0, max(1, len(logprobs_NW)), chunk):
        logs_NW = logprobs_NW[first : first + chunk].double()
        p_NW = logs_NW.exp()
        if not bool((p_NW.sum(-1) <= 1 + MASS_TOLERANCE).all()):
            validate_logprobs(logprobs_NW, where)
        parts.append(
            _select_topk(
                logs_NW.numpy(), p_NW.numpy(), targets_N[first : first + chunk], max_kl, frequency_W
            )
        )
    sizes, ids, bins, is_target = (np.concatenate(some) for some in zip(*parts, strict=True))
    target_logprob_N = (
        logprobs_NW[torch.arange(len(targets_N)), torch.from_numpy(targets_N)].float().numpy()
    )
    target_logprob_N[np.repeat(np.arange(len(sizes)), sizes)[is_target]] = (
        bins[is_target] * -LOGPROB_STEP_NATS
    )
    return SparseDistributions(
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        ids,
        np.exp(bins * -LOGPROB_STEP_NATS).astype(np.float32),
        target_logprob_N,
        DistributionKind.TOPK,
    )


def _select_topk(
    logprobs_NW: npt.NDArray[np.float64],
    p_NW: npt.NDArray[np.float64],
    target_ids_N: npt.NDArray[np.int64],
    max_kl: float,
    frequency_W: npt.NDArray[np.float64],
) -> tuple[
    npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.bool_]
]:
    """Return the stored entries: number for each position, ids, grid steps, whether the target."""
    n, width = p_NW.shape
    mass_N = p_NW.sum(1)
    kl_to_frequency_N = (p_NW * (np.maximum(logprobs_NW, MIN_LOGPROB) - np.log(frequency_W))).sum(1)
    num_candidates, pending, found = (
        INITIAL_CANDIDATES,
        np.arange(n),
        [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64))],
    )
    while len(pending):
        p_RW = p_NW[pending]
        least_R = -np.partition(-p_RW, min(num_candidates, width) - 1, 1)[
            :, min(num_candidates, width) - 1
        ]
        # All equals of the last candidate are included, so that the number of candidates decides
        # nothing.
        row, ids = np.nonzero((p_RW >= least_R[:, None]) & (p_RW > 0))
        order = np.lexsort((ids, -p_RW[row, ids], row))
        row, ids = row[order], ids[order]
        sizes = np.bincount(row, minlength=len(pending))
        column = np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        id_RK = np.zeros((len(pending), int(sizes.max())), np.int64)
        id_RK[row, column] = ids
        is_candidate = np.arange(id_RK.shape[1]) < sizes[:, None]
        p_RK = np.where(is_candidate, np.take_along_axis(p_RW, id_RK, 1), 0)
        count_R, bins_RK = min_entries_within_kl(
            p_RK,
            np.where(is_candidate, frequency_W[id_RK], 0),
            id_RK == target_ids_N[pending][:, None],
            mass_N[pending],
            kl_to_frequency_N[pending],
            max_kl,
        )
        done_R = (count_R > 0) & (count_R <= sizes)
        if num_candidates >= width and not done_R.all():
            raise AssertionError(f"a position with all its tokens stored has KL > {max_kl}")
        r, k = np.nonzero((np.arange(id_RK.shape[1]) < count_R[:, None]) & done_R[:, None])
        found.append((pending[r], id_RK[r, k], bins_RK[r, k]))
        pending, num_candidates = pending[~done_R], num_candidates * 4
    row, ids, bins = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((ids, row))
    row, ids, bins = row[order], ids[order], bins[order]
    return np.bincount(row, minlength=n), ids.astype(np.int32), bins, ids == target_ids_N[row]


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
