"""Confidence intervals of bits per byte: sums over documents, divided by sums of their bytes.

A document is the unit of sampling: its bytes depend on each other. All models are measured on the
same documents, so every comparison is paired. Shape letters: N documents, M models, G groups (the
languages of a skill).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, inf, pi, sqrt
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from persea.tasks.intervals import CONFIDENCE_LEVEL

MIN_DF_FOR_EXPANSION = 3  # below, the quantile of Student's t is computed in closed form


def student_t_quantile(confidence: float, df: float) -> float:
    """Return the two-sided quantile of Student's t.

    Exact for one and two degrees of freedom, and within 1 % above: Abramowitz and Stegun 26.7.5,
    four terms. A fraction below three is rounded down, which is on the safe side.

    Args:
        confidence: Coverage of the two-sided interval.
        df: Degrees of freedom, at least 1; may be a fraction.

    Example:
        >>> [round(student_t_quantile(0.95, df), 2) for df in (1, 2, 10)]
        [12.71, 4.3, 2.23]
    """
    if df < 2:
        angle = pi * (1 - confidence) / 2
        return cos(angle) / sqrt(1 - cos(angle) ** 2)
    if df < MIN_DF_FOR_EXPANSION:
        return confidence * sqrt(2 / (1 - confidence * confidence))
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return (
        z
        + (z**3 + z) / (4 * df)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
    )


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval; an end is None if the data do not bound it."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, eq=False)
class BitsPerByte:
    """Bits per byte of several models on the same documents, in one language or several.

    Attributes:
        rates_M: Bits per byte of each model; the mean over groups, each counted once.
        covariances_GMM: Covariance of the groups' estimates; NaN for a group of one document.
        df_G: Degrees of freedom of each group: its documents less one.
    """

    rates_M: npt.NDArray[np.float64]
    covariances_GMM: npt.NDArray[np.float64]
    df_G: npt.NDArray[np.float64]

    @staticmethod
    def from_groups(
        groups: Sequence[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]],
    ) -> BitsPerByte:
        """Estimate from documents.

        The variance of a ratio of sums is the jackknife's: every document is left out once (Miller,
        "The jackknife - a review", 1974).

        Args:
            groups: (bits_NM, bytes_N) of each language, at least one document each.
        """
        rates, covariances, dfs = [], [], []
        for bits_NM, bytes_N in groups:
            n, total = len(bytes_N), float(bytes_N.sum())
            rate_M = bits_NM.sum(axis=0) / total
            rates.append(rate_M)
            if n == 1:
                covariances.append(np.full((len(rate_M), len(rate_M)), np.nan))
            else:
                # how far the rate moves when one document is left out
                change_NM = (bits_NM - np.outer(bytes_N, rate_M)) / (total - bytes_N)[:, None]
                covariances.append((n - 1) / n * change_NM.T @ change_NM)
            dfs.append(float(n - 1))
        return BitsPerByte(np.mean(rates, axis=0), np.array(covariances), np.array(dfs))

    def rate(self, model: int, confidence: float = CONFIDENCE_LEVEL) -> Interval:
        """Return a model's bits per byte."""
        return self._interval(self._unit(model), confidence)

    def difference(self, model: int, other: int, confidence: float = CONFIDENCE_LEVEL) -> Interval:
        """Return a model's bits per byte minus another's, on the same documents."""
        return self._interval(self._unit(model) - self._unit(other), confidence)

    def gap_closed(
        self, student: int, base: int, teacher: int, confidence: float = CONFIDENCE_LEVEL
    ) -> Interval | None:
        """Return the share of the gap from base to teacher that the student closed.

        The share is (base - student) / (base - teacher). Its interval is Fieller's (1954): every
        share that the documents are compatible with. It has no ends where the gap itself is not
        told apart from 0.

        Returns:
            The share; None if the teacher is not better than the base.
        """
        gained_M = self._unit(base) - self._unit(student)
        gap_M = self._unit(base) - self._unit(teacher)
        gained, gap = float(self.rates_M @ gained_M), float(self.rates_M @ gap_M)
        if gap <= 0:
            return None
        covariance_MM = self._covariance_MM
        t = self._quantile(gap_M, confidence)
        if not np.isfinite(covariance_MM).all():
            return Interval(gained / gap, None, None)
        # the shares r with (gained - r gap)^2 <= t^2 variance(gained - r gap)
        a = gap * gap - t * t * float(gap_M @ covariance_MM @ gap_M)
        b = gained * gap - t * t * float(gained_M @ covariance_MM @ gap_M)
        c = gained * gained - t * t * float(gained_M @ covariance_MM @ gained_M)
        if a <= 0:
            return Interval(gained / gap, None, None)
        root = sqrt(max(0.0, b * b - a * c))
        return Interval(gained / gap, (b - root) / a, (b + root) / a)

    # --- private ---

    @property
    def _covariance_MM(self) -> npt.NDArray[np.float64]:
        covariance_MM: npt.NDArray[np.float64] = (
            self.covariances_GMM.sum(axis=0) / len(self.df_G) ** 2
        )
        return covariance_MM

    def _unit(self, model: int) -> npt.NDArray[np.float64]:
        unit_M = np.zeros(len(self.rates_M))
        unit_M[model] = 1
        return unit_M

    def _interval(self, contrast_M: npt.NDArray[np.float64], confidence: float) -> Interval:
        value = float(self.rates_M @ contrast_M)
        variance = float(contrast_M @ self._covariance_MM @ contrast_M)
        if not np.isfinite(variance):  # a language of one document
            return Interval(value, None, None)
        half = self._quantile(contrast_M, confidence) * sqrt(max(0.0, variance))
        return Interval(value, value - half, value + half)

    def _quantile(self, contrast_M: npt.NDArray[np.float64], confidence: float) -> float:
        """Student's t with Welch's and Satterthwaite's degrees of freedom."""
        variance_G = np.einsum("m,gmk,k->g", contrast_M, self.covariances_GMM, contrast_M)
        if not np.isfinite(variance_G).all():
            return inf
        total = float(variance_G.sum())
        spread = float((variance_G**2 / self.df_G).sum())
        df = total * total / spread if spread > 0 else float(self.df_G.sum())
        return student_t_quantile(confidence, max(1.0, df))
