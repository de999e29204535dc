"""What n values in [0, 1] allow to say: of their mean, of two speakers on the same items, and at any time while items still come.

Coverage of each, simulated: bench/coverage.py. Letters: N items, L bets.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, sqrt
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

CONFIDENCE_LEVEL = 0.95
Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution
BETTING_STAKES = 64  # stakes that `evidence` lays at once: nine wins of nine are worth 102.3, of 16 stakes 101.9, of any number 102.3
ScoreValues: TypeAlias = Sequence[float] | npt.NDArray[np.float64]


def wilson_interval(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): never leaves [0, 1], not empty at 0 or n right."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * sqrt(max(0.0, p * (1 - p)) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: ScoreValues) -> tuple[float, float]:
    """95 % interval of the mean of values in [0, 1].

    Wilson's, with as many items as would spread a share this much: n * p (1 - p) / variance. Of rights and wrongs that is n itself. One
    item's worth of the variance is a share's, so that values that happen to be alike claim no certainty. Of graded values
    the bootstrap holds 87 to 95 %, this 94 to 97 (bench/coverage.py).
    """
    x_N = np.asarray(values, np.float64)
    n = len(x_N)
    if n == 0:
        return 0.0, 1.0
    mean = float(x_N.mean())
    most = mean * (1 - mean)
    spread = (float(((x_N - mean) ** 2).sum()) / most + 1) / (n + 1) if most > 1e-12 else 1.0
    low, high = wilson_interval(mean * n / spread, n / spread)
    return min(low, mean), max(high, mean)


def paired_difference_interval(
    values_a: ScoreValues, values_b: ScoreValues, confidence: float = CONFIDENCE_LEVEL
) -> tuple[float, float]:
    """Interval of mean(ones) - mean(others), both over the same items in the same order.

    Rights and wrongs: McNemar's table with one item more on either side of it (Bonett and Price 2012). Values between: Student's t over
    the items' differences, with two items more of the size of their root mean square.
    """
    x_N, y_N = _paired_arrays(values_a, values_b)
    d_N, extra, z = x_N - y_N, _pseudo_item_size(x_N, y_N), _critical_value(x_N, y_N, confidence)
    n = len(d_N) + 2
    mean = float(d_N.sum()) / n
    half = z * sqrt(max(0.0, (float((d_N**2).sum()) + 2 * extra * extra) / n - mean * mean) / n)
    return max(-1.0, mean - half), min(1.0, mean + half)


def paired_ratio_interval(
    values_a: ScoreValues, values_b: ScoreValues, confidence: float = CONFIDENCE_LEVEL
) -> tuple[float, float]:
    """Interval of mean(ones) / mean(others) over the same items; the upper end is infinite where the data allow any.

    Every ratio r for which the items' `one - r * other` are compatible with a mean of 0 (Fieller 1954), with the same two items more as
    `of_difference`: 1 is inside this interval just where 0 is inside that one.
    """
    x_N, y_N = _paired_arrays(values_a, values_b)
    extra, z = _pseudo_item_size(x_N, y_N), _critical_value(x_N, y_N, confidence)
    n = len(x_N) + 2
    x, y = (float(v_N.sum() + extra) / n for v_N in (x_N, y_N))
    xx, yy = (
        (float((v_N**2).sum()) + extra * extra) / n - m * m for v_N, m in ((x_N, x), (y_N, y))
    )
    a, b, c = (
        y * y - z * z / n * yy,
        x * y - z * z / n * (float((x_N * y_N).sum()) / n - x * y),
        x * x - z * z / n * xx,
    )
    root = sqrt(max(0.0, b * b - a * c))
    if b + root <= 0:  # nothing bounds it: two speakers that are right nowhere
        return 0.0, inf
    return max(0.0, c / (b + root)), (b + root) / a if a > 0 else inf


def unpaired_difference_interval(
    values_a: ScoreValues, values_b: ScoreValues
) -> tuple[float, float]:
    """95 % interval of mean(ones) - mean(others), each over items of its own (Newcombe 1998, method 10): wider than of pairs."""
    (one, low, high), (other, least, most) = (
        (float(np.mean(v)), *mean_interval(v)) for v in (values_a, values_b)
    )
    gap = one - other
    return gap - sqrt((one - low) ** 2 + (most - other) ** 2), gap + sqrt(
        (high - one) ** 2 + (other - least) ** 2
    )


def betting_wealth(differences: ScoreValues) -> npt.NDArray[np.float64]:
    """Betting's wealth against "the mean is at most 0" after each item: differences in [-1, 1], in the order they came.

    The mean over BETS stakes of prod(1 + stake * d). While the claim is true no way of stopping makes it reach 1 / alpha with a chance
    above alpha (Ville 1939; Waudby-Smith and Ramdas 2024, section 4), so one may look after every item.
    """
    stakes_L = (np.arange(BETTING_STAKES) + 0.5) / BETTING_STAKES
    logs_NL = np.cumsum(np.log1p(np.outer(np.asarray(differences, np.float64), stakes_L)), axis=0)
    with np.errstate(over="ignore"):  # past 1e308 infinity says enough
        return np.asarray(np.exp(logs_NL).mean(axis=1), np.float64)


def _paired_arrays(
    values_a: ScoreValues, values_b: ScoreValues
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    x_N, y_N = np.asarray(values_a, np.float64), np.asarray(values_b, np.float64)
    if len(x_N) != len(y_N) or not len(x_N):
        raise ValueError(f"{len(x_N)} and {len(y_N)} values are no pairs")
    return x_N, y_N


def _use_binary_bounds(x_N: npt.NDArray[np.float64], y_N: npt.NDArray[np.float64]) -> bool:
    """Whether all are 0 or 1; values between are too few below 10 items for a spread of their own, and are bounded like shares."""
    return len(x_N) < 10 or bool(np.isin(x_N, (0, 1)).all() and np.isin(y_N, (0, 1)).all())


def _pseudo_item_size(x_N: npt.NDArray[np.float64], y_N: npt.NDArray[np.float64]) -> float:
    return (
        1.0
        if _use_binary_bounds(x_N, y_N) or not (x_N != y_N).any()
        else float(np.sqrt(((x_N - y_N) ** 2).mean()))
    )


def _critical_value(
    x_N: npt.NDArray[np.float64], y_N: npt.NDArray[np.float64], confidence: float
) -> float:
    """Of the normal distribution for shares, else of Student's t with n - 1 degrees (Abramowitz and Stegun 26.7.5, four terms)."""
    z, v = NormalDist().inv_cdf((1 + confidence) / 2), len(x_N) - 1
    if _use_binary_bounds(x_N, y_N):
        return z
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )
