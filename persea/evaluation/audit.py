"""Did a model learn from this capture, or from that teacher? Two tests, with p-values.

`count_preferred` is exact: under the hypothesis that the suspect never saw the capture, its
preferences are independent of the secret coins, so their agreement is Binomial(n, 1/2) for any
model. `compare_teachers` asks less and assumes more: does the suspect prefer the texts of a teacher
more than its own base does, compared with the texts of control models (difference in differences)?
Either is evidence, never proof; neither shows that a model did not learn from a teacher.

Reference: the control models and the correction for several tests follow Nikolic et al., "Model
Provenance Testing for Large Language Models" (2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

NUM_SIGN_FLIPS = 9_999
ALPHA = 0.01
# Standard deviations of untaught students that an effect must exceed, where they are given: a
# p-value over prompts knows nothing of how students differ that never met the teacher.
MIN_Z = 4.0
MIN_UNTAUGHT = 5
MIN_PAIRED_PROMPTS = 20


class Finding(StrEnum):
    """What the texts of a teacher show about a suspect."""

    MARKS = "marks"  # beats every control
    MARKS_OR_SIBLING = "marks of it or a sibling"  # beats the mean of the controls
    NO_EVIDENCE = "no evidence"


@dataclass(frozen=True)
class CanaryTest:
    """How often a suspect prefers the learned answer of a pair.

    Attributes:
        suspect: Name of the suspect.
        pairs: Canary pairs of the capture.
        left_out: Pairs that the suspect's template or positions cannot hold, and ties.
        preferred: Pairs whose learned answer has the higher log-probability.
        p_value: Exact one-sided binomial probability of so many or more, if the suspect never saw
            the capture.
    """

    suspect: str
    pairs: int
    left_out: int
    preferred: int
    p_value: float

    @property
    def tested(self) -> int:
        """Pairs that count."""
        return self.pairs - self.left_out

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self) | {"tested": self.tested}


@dataclass(frozen=True)
class TeacherEvidence:
    """What the texts of one teacher show about a suspect.

    Attributes:
        teacher: Name of the teacher.
        prompts: Prompts that the teacher and at least one control completed.
        effect: Nats per byte by which the suspect's gain over its base is larger on the teacher's
            texts than on the controls' texts, mean over prompts.
        p_value: One-sided sign-flip p-value against the mean of the controls, after Holm.
        p_every: The same against the control with the largest p-value: the teacher beats them all.
        z: Effect in standard deviations of untaught students, from their mean; None without them.
        finding: What all this shows.
    """

    teacher: str
    prompts: int
    effect: float
    p_value: float
    p_every: float
    z: float | None
    finding: Finding


@dataclass(frozen=True)
class TeacherComparison:
    """The result of `compare_teachers`.

    Attributes:
        suspect: Name of the suspect.
        base: Name of the model that it is compared with.
        controls: Names of the control models; empty = the other teachers are the controls.
        untaught: Students of the same base that did not meet the teachers.
        teachers: Evidence of each teacher, the largest effect first.
    """

    suspect: str
    base: str
    controls: tuple[str, ...]
    untaught: int
    teachers: tuple[TeacherEvidence, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)


def binomial_p_value(successes: int, n: int) -> float:
    """Return the probability of at least so many heads of a fair coin, exactly.

    Args:
        successes: Heads.
        n: Tosses.

    Example:
        >>> binomial_p_value(9, 10)
        0.0107421875
        >>> binomial_p_value(0, 0)
        1.0
    """
    tail = sum(math.comb(n, k) for k in range(successes, n + 1))
    return float(Fraction(tail, 2**n))


def count_preferred(
    suspect: str, logprobs_P2: npt.NDArray[np.float64], learned_P: Sequence[int]
) -> CanaryTest:
    """Count how often a suspect prefers the answer that the coin chose.

    Args:
        suspect: Name of the suspect.
        logprobs_P2: float64 [P, 2], its log-probabilities of both answers of each pair, in nats;
            NaN where it cannot read one.
        learned_P: The coins, 0 or 1.

    Returns:
        The counts and their exact p-value.
    """
    pair_P = np.arange(len(learned_P))
    coin_P = np.asarray(learned_P, np.int64).reshape(-1)
    gap_P = logprobs_P2[pair_P, coin_P] - logprobs_P2[pair_P, 1 - coin_P]
    counted_P = np.isfinite(gap_P) & (gap_P != 0)
    preferred = int((gap_P[counted_P] > 0).sum())
    tested = int(counted_P.sum())
    return CanaryTest(
        suspect,
        len(coin_P),
        len(coin_P) - tested,
        preferred,
        binomial_p_value(preferred, tested),
    )


def sign_flip_p_value(
    differences_N: npt.NDArray[np.float64], seed: int, num_flips: int = NUM_SIGN_FLIPS
) -> float:
    """Return the one-sided p-value of a mean of paired differences.

    Under the null hypothesis each difference is as likely to have the other sign.

    Args:
        differences_N: float64 [N].
        seed: Seed of the random signs.
        num_flips: Random sign vectors.

    Returns:
        (1 + vectors with a sum at least as large) / (1 + vectors).
    """
    generator = np.random.default_rng(seed)
    observed = differences_N.sum()
    at_least = 0
    for begin in range(0, num_flips, 1000):
        count = min(1000, num_flips - begin)
        signs = generator.integers(0, 2, (count, len(differences_N)), np.int8) * 2 - 1
        # a tolerance, since a sum in another order differs in its last bits
        at_least += int((signs @ differences_N >= observed - 1e-9 * abs(observed)).sum())
    return (1 + at_least) / (1 + num_flips)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, after Holm (1979), in the given order.

    Example:
        >>> holm([0.01, 0.04])
        [0.02, 0.04]
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, k in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        largest = max(largest, min(1.0, p_values[k] * (len(p_values) - rank)))
        adjusted[k] = largest
    return adjusted


def compare_teachers(
    suspect: str,
    base: str,
    gains: Mapping[str, npt.NDArray[np.float64]],
    teachers: Sequence[str],
    controls: Sequence[str] = (),
    untaught_gains: Sequence[Mapping[str, npt.NDArray[np.float64]]] = (),
    seed: int = 0,
    alpha: float = ALPHA,
) -> TeacherComparison:
    """Test for each teacher whether the suspect gained more on its texts than on the controls'.

    Args:
        suspect: Name of the suspect.
        base: Name of its base, or of another model of its family.
        gains: Model that wrote the texts -> float64 [N], (log-probability by the suspect minus that
            by the base) of its answer to each prompt, in nats per byte; NaN where there is none.
        teachers: The teachers under test.
        controls: Models that did not teach the suspect; none = the other teachers.
        untaught_gains: The same for students of the base that none of the teachers taught.
        seed: Seed of the random signs.
        alpha: Largest p-value that counts as evidence.

    Returns:
        The evidence, the teacher with the largest effect first.
    """
    found = []
    for teacher in teachers:
        others = list(controls) or [t for t in teachers if t != teacher]
        difference_N = _difference(gains, teacher, others)
        effect = float(difference_N.mean()) if len(difference_N) else 0.0
        enough = len(difference_N) >= MIN_PAIRED_PROMPTS
        p_every = max(sign_flip_p_value(_difference(gains, teacher, [one]), seed) for one in others)
        p_value = sign_flip_p_value(difference_N, seed)
        z = _z_score(effect, [_difference(one, teacher, others) for one in untaught_gains])
        found.append(
            TeacherEvidence(
                teacher,
                len(difference_N),
                effect,
                p_value if enough else 1.0,
                p_every if enough else 1.0,
                z,
                Finding.NO_EVIDENCE,
            )
        )
    p_values = holm([f.p_value for f in found])
    p_every_values = holm([f.p_every for f in found])
    judged = [
        replace(f, p_value=p, p_every=q, finding=_judge(p, q, f.z, alpha))
        for f, p, q in zip(found, p_values, p_every_values, strict=True)
    ]
    return TeacherComparison(
        suspect,
        base,
        tuple(controls),
        len(untaught_gains),
        tuple(sorted(judged, key=lambda f: -f.effect)),
    )


def _difference(
    gains: Mapping[str, npt.NDArray[np.float64]], teacher: str, others: Sequence[str]
) -> npt.NDArray[np.float64]:
    """Return gain on the teacher's text minus mean gain on the others', where both exist."""
    other_CN = np.stack([gains[name] for name in others])
    has_one_N = np.isfinite(other_CN).any(0) & np.isfinite(gains[teacher])
    mean_N = np.nanmean(other_CN[:, has_one_N], 0)
    difference: npt.NDArray[np.float64] = gains[teacher][has_one_N] - mean_N
    return difference


def _z_score(effect: float, untaught: Sequence[npt.NDArray[np.float64]]) -> float | None:
    effects = [float(d.mean()) for d in untaught if len(d)]
    if len(effects) < MIN_UNTAUGHT:
        return None
    deviation = float(np.std(effects, ddof=1))
    return (effect - float(np.mean(effects))) / max(deviation, 1e-12)


def _judge(p_value: float, p_every: float, z: float | None, alpha: float) -> Finding:
    if p_value > alpha or (z is not None and z < MIN_Z):
        return Finding.NO_EVIDENCE
    return Finding.MARKS if p_every <= alpha else Finding.MARKS_OR_SIBLING
