"""Sparse teacher distributions, one for each position: sampled, top-k, full, or text only."""

from __future__ import annotations

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
    chunk = rows_per_chunk(logprobs_NW)
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


def rows_per_chunk(logprobs_NW: torch.Tensor) -> int:
    """Return how many positions to process at once.

    A vocabulary of 262,144 then costs 64 MiB however long the answer is.
    """
    return max(1, MAX_CHUNK_ELEMENTS // max(1, logprobs_NW.shape[1]))


def slice_distributions(whole: SparseDistributions, begin: int, end: int) -> SparseDistributions:
    """Return the positions [begin, end)."""
    entries = slice(whole.offsets_N1[begin], whole.offsets_N1[end])
    return SparseDistributions(
        whole.offsets_N1[begin : end + 1] - whole.offsets_N1[begin],
        whole.ids_M[entries],
        whole.probs_M[entries],
        whole.target_logprob_N[begin:end],
        whole.kind,
    )


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
