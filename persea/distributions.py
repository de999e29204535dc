"""Rows: one position's teacher distribution each, sparse; its kind says what may be done with it."""

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

MAX_CHUNK_ELEMENTS = (
    1 << 20
)  # elements: eight megabytes of float64, and seven arrays of them at most
LOGPROB_STEP_NATS = 1 / 512  # nats between log-probabilities that the codec keeps
MASS_TOLERANCE = 1e-3  # a row's probabilities may exceed 1 by this much: float32 sums of 262k terms stay within 1e-5, float16 servers within 5e-4


class DistributionKind(StrEnum):
    """What a row knows of the teacher's distribution."""

    FULL = "full"  # every token: any divergence
    SAMPLED = "sampled"  # an unbiased sample: only what is linear in the teacher's probabilities (forward KL)
    TOPK = "topk"  # the likeliest tokens exactly, and how much is left over: never renormalised
    TEXT_ONLY = "words"  # nothing but the text


@dataclass(frozen=True)
class SparseDistributions:
    """Sparse distributions, one a learned token (N).

    offsets_N1  int64, entries of row n are [offsets[n], offsets[n + 1]); none in a row of kind WORDS
    ids_M       int32, raw teacher ids, never coarsened: one capture serves every student
    probs_M     float32, natural probabilities; a row of kind SAMPLED sums to 1 within tau, of kind TOPK_REST to at most 1
    realised_N  float32, natural log-probability of the token that stands there; NaN where the teacher gave none
    kind        of all rows
    """

    offsets_N1: npt.NDArray[np.int64]
    ids_M: npt.NDArray[np.int32]
    probs_M: npt.NDArray[np.float32]
    target_logprob_N: npt.NDArray[np.float32]
    kind: DistributionKind = DistributionKind.SAMPLED

    def __len__(self) -> int:
        return len(self.offsets_N1) - 1


def validate_logprobs(logprobs_NW: torch.Tensor, where: str) -> None:
    """Raises DataError for rows that are no distributions: NaN, a positive log-probability, a mass above 1 + 1e-3."""
    import torch

    remedy = "log-probabilities are natural logs of a softmax; look at the weights, their dtype, or what the server really returns"
    at_once = _rows_per_chunk(logprobs_NW)
    for first in range(0, len(logprobs_NW), at_once):
        some_NW = logprobs_NW[first : first + at_once]
        nan_N = torch.isnan(some_NW).any(-1)
        for what, bad_N in (
            ("NaN", nan_N),
            ("a log-probability above 0", (some_NW > MASS_TOLERANCE).any(-1)),
            (
                f"a mass above 1 + {MASS_TOLERANCE:g}",
                some_NW.double().exp().sum(-1) > 1 + MASS_TOLERANCE,
            ),
        ):
            if bool(bad_N.any()):
                row = first + int(bad_N.nonzero()[0])
                raise DataError(
                    f"row {row} of {len(logprobs_NW)} is no distribution: {what}",
                    where=where,
                    remedy=remedy,
                )


def _rows_per_chunk(logprobs_NW: torch.Tensor) -> int:
    """Rows worked on at once, so that a vocabulary of 262,144 costs 64 MiB however long the answer is."""
    return max(1, MAX_CHUNK_ELEMENTS // max(1, logprobs_NW.shape[1]))


def concat_distributions(parts: Sequence[SparseDistributions]) -> SparseDistributions:
    """Rows of one kind laid end to end; at least one part."""
    sizes_N = np.concatenate([np.diff(p.offsets_N1) for p in parts])
    ids_M, probs_M, realised_N = (
        np.concatenate(column)
        for column in zip(*((p.ids_M, p.probs_M, p.target_logprob_N) for p in parts), strict=True)
    )
    return SparseDistributions(
        np.concatenate([[0], np.cumsum(sizes_N)]).astype(np.int64),
        ids_M,
        probs_M,
        realised_N,
        parts[0].kind,
    )


def sample_distributions(
    logprobs_NW: torch.Tensor,
    target_ids_N: npt.NDArray[np.integer],
    tau: float,
    seed: str,
    row_offset: int = 0,
) -> SparseDistributions:
    """Rows by systematic threshold sampling: entries of probability >= tau exactly, the rest at random with mean p.

    Below tau an entry is kept with probability p/tau and stored as tau; one random number a row walks the cumulated tail,
    so that a row's mass is 1 within tau. A row that is nearly certain costs one entry; the mean over draws is exactly p.
    (Threshold sampling: Duffield, Lund, Thorup 2005; on distillation: Anshumann et al., ACL 2025.)

    logprobs_NW  natural logs; realised_N  the tokens that stand there; seed  names the draw, the same one gives the same
    rows on every machine; first  how many rows of the same draw came before these: pieces give what the whole would.
    Raises DataError for rows that are no distributions.
    """
    import torch

    rng = np.random.Generator(
        np.random.Philox(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big"))
    )
    start_N1 = torch.from_numpy(rng.random((row_offset + len(logprobs_NW), 1))[row_offset:])
    at_once = _rows_per_chunk(logprobs_NW)
    spans = [slice(first, first + at_once) for first in range(0, max(1, len(logprobs_NW)), at_once)]
    parts = []
    for span in spans:
        p_NW = logprobs_NW[span].double().exp()
        if not bool(
            (p_NW.sum(-1) <= 1 + MASS_TOLERANCE).all()
        ):  # a NaN and a probability above 1 too
            validate_logprobs(logprobs_NW, seed)
        parts.append(_threshold_sample(p_NW, start_N1[span], tau))
    sizes, ids, values = (np.concatenate(some) for some in zip(*parts, strict=True))
    at_N = torch.from_numpy(np.asarray(target_ids_N, np.int64))
    realised = logprobs_NW[torch.arange(len(at_N)), at_N].float().numpy()
    return SparseDistributions(
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), ids, values, realised
    )


def _threshold_sample(
    p_NW: torch.Tensor, uniform_N1: torch.Tensor, tau: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Entries kept of each row: how many, which, and their values."""
    import torch

    head_NW = p_NW >= tau
    floor_NW = (torch.where(head_NW, 0.0, p_NW / tau).cumsum(-1) + uniform_N1).floor()
    kept_NW = head_NW
    kept_NW[:, 1:] |= floor_NW[:, 1:] > floor_NW[:, :-1]
    kept_NW[:, :1] |= floor_NW[:, :1] > 0
    row_M, id_M = kept_NW.nonzero(as_tuple=True)
    p_M = p_NW[row_M, id_M]
    values_M = torch.where(p_M >= tau, p_M, tau)
    return (
        np.bincount(row_M.numpy(), minlength=len(p_NW)),
        id_M.numpy().astype(np.int32),
        values_M.numpy().astype(np.float32),
    )


# --- the likeliest, and how much is left over ---


def distributions_from_top_logprobs(
    ids_NK: npt.NDArray[np.integer],
    logprobs_NK: npt.NDArray[np.floating],
    target_ids_N: npt.NDArray[np.integer],
    target_logprob_N: npt.NDArray[np.floating],
) -> SparseDistributions:
    """Rows of kind TOPK_REST of what a server named: K tokens a row, and the realised token's own log-probability, named or not.

    Exact, but for a row whose mass passes 1 by more than float32 sums do: its values go to the codec's grid, the next below, so that
    the codec's rounding does not carry it past 1 + MASS.
    """
    order = np.argsort(ids_NK, axis=1)
    ids_NK, logprobs_NK = (
        np.take_along_axis(ids_NK, order, 1),
        np.take_along_axis(logprobs_NK, order, 1).astype(np.float64),
    )
    above_N1 = np.exp(logprobs_NK).sum(1, keepdims=True) > 1 + MASS_TOLERANCE / 100
    logprobs_NK = np.where(
        above_N1, np.ceil(logprobs_NK / -LOGPROB_STEP_NATS) * -LOGPROB_STEP_NATS, logprobs_NK
    )
    real_NK = ids_NK == target_ids_N[:, None]
    realised = np.where(
        real_NK.any(1), np.where(real_NK, logprobs_NK, 0).sum(1), target_logprob_N
    ).astype(np.float32)
    offsets_N1 = np.arange(len(ids_NK) + 1, dtype=np.int64) * ids_NK.shape[1]
    return SparseDistributions(
        offsets_N1,
        ids_NK.ravel().astype(np.int32),
        np.exp(logprobs_NK).ravel().astype(np.float32),
        realised,
        DistributionKind.TOPK,
    )


def text_only_distributions(n: int) -> SparseDistributions:
    """N rows of kind WORDS, of which nothing is known."""
    return SparseDistributions(
        np.zeros(n + 1, np.int64),
        np.empty(0, np.int32),
        np.empty(0, np.float32),
        np.full(n, np.nan, np.float32),
        DistributionKind.TEXT_ONLY,
    )


GRID_MULTIPLES = (
    1,
    4,
    8,
    16,
    32,
    64,
    128,
)  # STEPs between values: a row takes the coarsest that costs it no entry
INITIAL_CANDIDATES = (
    32  # candidates looked at first; a row that needs more looks at four times as many
)
NEGLIGIBLE_MASS = 1e-9  # mass that is the rounding of a float32 softmax


def topk_within_kl(
    logprobs_NW: torch.Tensor,
    target_ids_N: npt.NDArray[np.integer],
    max_kl: float,
    frequency_W: npt.NDArray[np.float64],
    where: str,
) -> SparseDistributions:
    """Rows of kind TOPK_REST: of each the fewest likeliest entries (one at least, of equals the lower ids) with KL(p || q) <= kl.

    q is what a reader can rebuild: the values as stored, and what they leave of 1 spread over the unnamed tokens by frequency_W, as
    nothing names them better. (Evenly spread, a tail of 152k tokens would cost nats that no reader need pay; as one event without
    inside the KL would not count what is lost.) Values lie on the codec's grid, so that it moves none of them; the likeliest and the
    realised token's on its finest, the likeliest rounded down so that a rest stays, the others' on the coarsest at which no further
    entry is needed. The realised log-probability of a named token is its entry's.

    frequency_W  how often each token is expected, above 0, sums to 1. kl >= .003: rounding alone may cost that. Each row depends on
    itself alone. Raises DataError for rows that are no distributions.
    """
    import torch

    real_N: npt.NDArray[np.int64] = np.asarray(target_ids_N, np.int64)
    parts = []
    at_once = _rows_per_chunk(logprobs_NW)
    for first in range(0, max(1, len(logprobs_NW)), at_once):
        logs_NW = logprobs_NW[first : first + at_once].double()
        p_NW = logs_NW.exp()
        if not bool((p_NW.sum(-1) <= 1 + MASS_TOLERANCE).all()):
            validate_logprobs(logprobs_NW, where)
        parts.append(
            _select_topk(
                logs_NW.numpy(), p_NW.numpy(), real_N[first : first + at_once], max_kl, frequency_W
            )
        )
    sizes, ids, bins, real = (np.concatenate(some) for some in zip(*parts, strict=True))
    realised = logprobs_NW[torch.arange(len(real_N)), torch.from_numpy(real_N)].float().numpy()
    realised[np.repeat(np.arange(len(sizes)), sizes)[real]] = bins[real] * -LOGPROB_STEP_NATS
    return SparseDistributions(
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        ids,
        np.exp(bins * -LOGPROB_STEP_NATS).astype(np.float32),
        realised,
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
    """Entries kept of each row: how many, which, their values in STEPs, and whether each is the realised token."""
    n, width = p_NW.shape
    mass_N = p_NW.sum(1)
    lost_N = (p_NW * (np.maximum(logprobs_NW, -1e4) - np.log(frequency_W))).sum(
        1
    )  # a probability of 0 loses nothing, and is no NaN
    some, todo, found = (
        INITIAL_CANDIDATES,
        np.arange(n),
        [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64))],
    )
    while len(todo):
        p_RW = p_NW[todo]
        least_R = -np.partition(-p_RW, min(some, width) - 1, 1)[:, min(some, width) - 1]
        row, ids = np.nonzero(
            (p_RW >= least_R[:, None]) & (p_RW > 0)
        )  # equals of the last come all, so that how many are looked at decides nothing
        order = np.lexsort((ids, -p_RW[row, ids], row))
        row, ids = row[order], ids[order]
        sizes = np.bincount(row, minlength=len(todo))
        place = np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        id_RK = np.zeros((len(todo), int(sizes.max())), np.int64)
        id_RK[row, place] = ids
        real = np.arange(id_RK.shape[1]) < sizes[:, None]
        p_RK = np.where(real, np.take_along_axis(p_RW, id_RK, 1), 0)
        count_R, bins_RK = min_entries_within_kl(
            p_RK,
            np.where(real, frequency_W[id_RK], 0),
            id_RK == target_ids_N[todo][:, None],
            mass_N[todo],
            lost_N[todo],
            max_kl,
        )
        done_R = (count_R > 0) & (count_R <= sizes)
        if some >= width and not done_R.all():
            raise AssertionError(
                f"a row all of whose tokens are named is further than {max_kl} from itself"
            )
        r, k = np.nonzero((np.arange(id_RK.shape[1]) < count_R[:, None]) & done_R[:, None])
        found.append((todo[r], id_RK[r, k], bins_RK[r, k]))
        todo, some = todo[~done_R], some * 4
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
    """Of each row's candidates, likeliest first, how many must be named (0 = all are not enough), and their values in STEPs.

    p, frequency  0 past a row's candidates; real = is it the realised token; mass = of the whole row;
    lost = KL of the whole row against frequency alone, sum p ln(p / frequency)
    """
    there_NK = p_NK > 0
    logs_NK = np.log(np.where(there_NK, p_NK, 1))
    shape_NK = p_NK * (logs_NK - np.log(np.where(there_NK, frequency_NK, 1)))
    left_NK = mass_N[:, None] - p_NK.cumsum(1)
    nothing_NK = left_NK <= NEGLIGIBLE_MASS
    inside_NK = np.where(nothing_NK, 0, kl_to_frequency_N[:, None] - shape_NK.cumsum(1))
    unnamed_NK = np.maximum(1 - frequency_NK.cumsum(1), 1e-300)
    finest_NK = np.maximum(np.rint(logs_NK / -LOGPROB_STEP_NATS), 0)
    finest_NK[:, :1] = np.ceil(logs_NK[:, :1].clip(max=0) / -LOGPROB_STEP_NATS)
    fixed_NK = is_target_NK | (np.arange(p_NK.shape[1]) == 0)
    count_N, chosen_NK = np.full(len(p_NK), p_NK.shape[1] + 1), finest_NK
    for coarse in GRID_MULTIPLES:
        bins_NK = np.where(
            fixed_NK, finest_NK, np.rint(logs_NK / (-LOGPROB_STEP_NATS * coarse)) * coarse
        )
        named_NK = np.where(there_NK, np.exp(bins_NK * -LOGPROB_STEP_NATS), 0).cumsum(1)
        rest_NK = 1 - named_NK
        valid_NK = (rest_NK > 0) | (nothing_NK & (named_NK <= 1 + MASS_TOLERANCE / 2))
        spread_NK = np.where(
            nothing_NK | ~valid_NK,
            0,
            left_NK * np.log(np.where(rest_NK > 0, rest_NK, 1) / unnamed_NK),
        )
        kl_NK = (p_NK * (logs_NK + bins_NK * LOGPROB_STEP_NATS)).cumsum(1) + inside_NK - spread_NK
        near_NK = valid_NK & (kl_NK <= max_kl)
        here_N = np.where(near_NK.any(1), near_NK.argmax(1) + 1, p_NK.shape[1] + 1)
        better_N = here_N <= count_N
        count_N, chosen_NK = (
            np.where(better_N, here_N, count_N),
            np.where(better_N[:, None], bins_NK, chosen_NK),
        )
    return np.where(count_N <= p_NK.shape[1], count_N, 0), chosen_NK.astype(np.int64)
