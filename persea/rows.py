"""Rows: one position's teacher distribution each, sparse; its kind says what may be done with it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from persea.errors import DataError

if TYPE_CHECKING:
    import torch

AT_ONCE = 1 << 20  # elements: eight megabytes of float64, and seven arrays of them at most
MASS = 1e-3  # a row's probabilities may exceed 1 by this much: float32 sums of 262k terms stay within 1e-5, float16 servers within 5e-4


class RowKind(StrEnum):
    """What a row knows of the teacher's distribution."""

    FULL = "full"          # every token: any divergence
    SAMPLED = "sampled"    # an unbiased sample: only what is linear in the teacher's probabilities (forward KL)
    TOPK_REST = "topk"     # the likeliest tokens exactly, and how much is left over: never renormalised
    WORDS = "words"        # nothing but the text


@dataclass(frozen=True)
class Rows:
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
    realised_N: npt.NDArray[np.float32]
    kind: RowKind = RowKind.SAMPLED

    def __len__(self) -> int:
        return len(self.offsets_N1) - 1


def refuse_no_distribution(logprobs_NW: torch.Tensor, where: str) -> None:
    """Raises DataError for rows that are no distributions: NaN, a positive log-probability, a mass above 1 + 1e-3."""
    import torch

    remedy = "log-probabilities are natural logs of a softmax; look at the weights, their dtype, or what the server really returns"
    at_once = _at_once(logprobs_NW)
    for first in range(0, len(logprobs_NW), at_once):
        some_NW = logprobs_NW[first:first + at_once]
        nan_N = torch.isnan(some_NW).any(-1)
        for what, bad_N in (("NaN", nan_N), ("a log-probability above 0", (some_NW > MASS).any(-1)),
                            (f"a mass above 1 + {MASS:g}", some_NW.double().exp().sum(-1) > 1 + MASS)):
            if bool(bad_N.any()):
                row = first + int(bad_N.nonzero()[0])
                raise DataError(f"row {row} of {len(logprobs_NW)} is no distribution: {what}", where=where, remedy=remedy)


def _at_once(logprobs_NW: torch.Tensor) -> int:
    """Rows worked on at once, so that a vocabulary of 262,144 costs 64 MiB however long the answer is."""
    return max(1, AT_ONCE // max(1, logprobs_NW.shape[1]))


def sample_rows(logprobs_NW: torch.Tensor, realised_N: npt.NDArray[np.integer], tau: float, seed: str) -> Rows:
    """Rows by systematic threshold sampling: entries of probability >= tau exactly, the rest at random with mean p.

    Below tau an entry is kept with probability p/tau and stored as tau; one random number a row walks the cumulated tail,
    so that a row's mass is 1 within tau. A row that is nearly certain costs one entry; the mean over draws is exactly p.
    (Threshold sampling: Duffield, Lund, Thorup 2005; on distillation: Anshumann et al., ACL 2025.)

    logprobs_NW  natural logs; realised_N  the tokens that stand there; seed  names the draw, the same one gives the same
    rows on every machine. Raises DataError for rows that are no distributions.
    """
    import torch

    rng = np.random.Generator(np.random.Philox(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big")))
    start_N1 = torch.from_numpy(rng.random((len(logprobs_NW), 1)))
    at_once = _at_once(logprobs_NW)
    spans = [slice(first, first + at_once) for first in range(0, max(1, len(logprobs_NW)), at_once)]
    parts = []
    for span in spans:
        p_NW = logprobs_NW[span].double().exp()
        if not bool((p_NW.sum(-1) <= 1 + MASS).all()):  # a NaN and a probability above 1 too
            refuse_no_distribution(logprobs_NW, seed)
        parts.append(_sampled(p_NW, start_N1[span], tau))
    sizes, ids, values = (np.concatenate(some) for some in zip(*parts, strict=True))
    at_N = torch.from_numpy(np.asarray(realised_N, np.int64))
    realised = logprobs_NW[torch.arange(len(at_N)), at_N].float().numpy()
    return Rows(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), ids, values, realised)


def _sampled(p_NW: torch.Tensor, start_N1: torch.Tensor, tau: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Entries kept of each row: how many, which, and their values."""
    import torch

    head_NW = p_NW >= tau
    floor_NW = (torch.where(head_NW, 0.0, p_NW / tau).cumsum(-1) + start_N1).floor()
    kept_NW = head_NW
    kept_NW[:, 1:] |= floor_NW[:, 1:] > floor_NW[:, :-1]
    kept_NW[:, :1] |= floor_NW[:, :1] > 0
    row_M, id_M = kept_NW.nonzero(as_tuple=True)
    p_M = p_NW[row_M, id_M]
    values_M = torch.where(p_M >= tau, p_M, tau)
    return np.bincount(row_M.numpy(), minlength=len(p_NW)), id_M.numpy().astype(np.int32), values_M.numpy().astype(np.float32)
