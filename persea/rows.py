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
    nan_N = torch.isnan(logprobs_NW).any(-1)
    for what, bad_N in (("NaN", nan_N), ("a log-probability above 0", (logprobs_NW > MASS).any(-1)),
                        (f"a mass above 1 + {MASS:g}", logprobs_NW.double().exp().sum(-1) > 1 + MASS)):
        if bool(bad_N.any()):
            raise DataError(f"row {int(bad_N.nonzero()[0])} of {len(bad_N)} is no distribution: {what}", where=where, remedy=remedy)


def sample_rows(logprobs_NW: torch.Tensor, realised_N: npt.NDArray[np.integer], tau: float, seed: str) -> Rows:
    """Rows by systematic threshold sampling: entries of probability >= tau exactly, the rest at random with mean p.

    Below tau an entry is kept with probability p/tau and stored as tau; one random number a row walks the cumulated tail,
    so that a row's mass is 1 within tau. A row that is nearly certain costs one entry; the mean over draws is exactly p.
    (Threshold sampling: Duffield, Lund, Thorup 2005; on distillation: Anshumann et al., ACL 2025.)

    logprobs_NW  natural logs; realised_N  the tokens that stand there; seed  names the draw, the same one gives the same
    rows on every machine. Raises DataError for rows that are no distributions.
    """
    import torch

    refuse_no_distribution(logprobs_NW, seed)
    p_NW = logprobs_NW.double().exp()
    rng = np.random.Generator(np.random.Philox(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big")))
    start_N1 = torch.from_numpy(rng.random((len(p_NW), 1)))
    head_NW = p_NW >= tau
    steps_NW = torch.where(head_NW, 0.0, p_NW / tau).cumsum(-1) + start_N1
    floor_NW = steps_NW.floor()
    before_NW = torch.cat([start_N1.floor(), floor_NW[:, :-1]], dim=-1)
    row_M, id_M = (head_NW | (floor_NW > before_NW)).nonzero(as_tuple=True)
    values_M = torch.where(head_NW[row_M, id_M], p_NW[row_M, id_M], tau)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_M.numpy(), minlength=len(p_NW)))])
    at_N = torch.from_numpy(np.asarray(realised_N, np.int64))
    realised = logprobs_NW[torch.arange(len(at_N)), at_N].float().numpy()
    return Rows(offsets.astype(np.int64), id_M.numpy().astype(np.int32), values_M.numpy().astype(np.float32), realised)
