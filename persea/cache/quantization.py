"""Rounding of log-probabilities, in integers: the same bits on every machine."""

from __future__ import annotations

from decimal import Decimal
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from persea.distributions import LOGPROB_STEP_NATS
from persea.tokenization.tokens import IntArray

# These constants are part of the format: a change needs a new CACHE_FORMAT (cache/unit.py).
CODEC_TOLERANCE_NATS = LOGPROB_STEP_NATS / 2 + 1e-6  # largest change of a log-probability: 0.00098
CODEC_RELATIVE_TOLERANCE = 1e-6  # rounding of float32, in the check after encoding
SMALLEST_PROBABILITY = np.float32(1e-45)  # the smallest positive float32: its logarithm is finite
FIXED_POINT_ONE = 1 << 30  # probability 1 in integers
LOGPROB_MISSING = -1  # a target's log-probability that the teacher did not give
LOGPROB_NEG_INF = -2  # a target's log-probability of minus infinity
NUM_CODING_CONTEXTS = 16
REMAINING_MASS_EDGES = (
    FIXED_POINT_ONE
    * np.array(
        [0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.06, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 0.999]
    )
).astype(np.int64)  # classes of the probability that the target token leaves to the others


@lru_cache(maxsize=8)
def exp_table(num_bins: int) -> npt.NDArray[np.float64]:
    """Return exp(-LOGPROB_STEP_NATS * bin) of the first bins, float64.

    Computed by products alone: numpy's exp differs in the last bit from machine to machine.
    """
    factor = np.full(num_bins, float((-Decimal(LOGPROB_STEP_NATS)).exp()))
    factor[0] = 1.0
    return np.multiply.accumulate(factor)


def quantize_logprobs(logprobs: npt.NDArray[np.floating]) -> IntArray:
    """Return the bin of each log-probability: its multiple of -LOGPROB_STEP_NATS."""
    return np.rint(logprobs.astype(np.float64) / -LOGPROB_STEP_NATS).astype(np.int64)


def bin_probabilities(bins: IntArray) -> IntArray:
    """Return the probabilities of bins as integers, FIXED_POINT_ONE = probability 1."""
    if not len(bins):
        return bins
    size = 1 << max(12, int(bins.max()).bit_length())
    probs: IntArray = (exp_table(size)[bins] * FIXED_POINT_ONE).astype(np.int64)
    return probs


@lru_cache(maxsize=64)
def target_probability_tables(num_bins: int) -> tuple[IntArray, IntArray]:
    """Return probability and coding context of each value of the column "first".

    The context is the class of the probability that the target token leaves to the other tokens.
    """
    prob_H = np.concatenate([[0], bin_probabilities(np.arange(num_bins))])
    return prob_H, np.searchsorted(REMAINING_MASS_EDGES, FIXED_POINT_ONE - prob_H)


def expected_tail_count(remaining_mass_N: IntArray, tau: float) -> tuple[IntArray, IntArray]:
    """Return how many tail entries the remaining mass makes, rounded down, and a coding context.

    The context is the fraction that was rounded away.
    """
    each = int(tau * FIXED_POINT_ONE)
    remaining_mass_N = np.maximum(remaining_mass_N, 0)
    return remaining_mass_N // each, remaining_mass_N % each * NUM_CODING_CONTEXTS // each
