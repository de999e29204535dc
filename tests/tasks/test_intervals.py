"""Intervals equal published values, and cover the truth as often as they claim in simulations.

bench/coverage.py simulates more cases.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isinf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persea.tasks.intervals import (
    betting_wealth,
    mean_interval,
    paired_difference_interval,
    paired_ratio_interval,
    unpaired_difference_interval,
    wilson_interval,
)

shares = st.lists(st.sampled_from((0.0, 1.0)), min_size=1, max_size=60)
graded = st.lists(st.floats(0, 1), min_size=1, max_size=60)
pairs = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=60) | st.lists(
    st.tuples(st.sampled_from((0.0, 1.0)), st.sampled_from((0.0, 1.0))), min_size=1, max_size=60
)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (0, 10, 0.0000, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0000),
        (50, 100, 0.4038, 0.5962),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)  # the last four: Newcombe 1998
def test_wilson_as_published(right: int, n: int, low: float, high: float):
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=5e-5)


def test_nothing_knows_nothing():
    assert wilson_interval(0, 0) == mean_interval([]) == (0.0, 1.0)


@given(n=st.integers(1, 10**6), share=st.floats(0, 1))
def test_wilson_holds_the_share_and_shrinks(n: int, share: float):
    right = round(n * share)
    low, high = wilson_interval(right, n)
    assert 0 <= low <= right / n + 1e-12
    assert right / n <= high + 1e-12
    assert high <= 1
    assert low < high
    assert wilson_interval(n - right, n) == pytest.approx((1 - high, 1 - low))
    few, many = wilson_interval(right, n), wilson_interval(4 * right, 4 * n)
    assert many[1] - many[0] < few[1] - few[0]


@given(shares)
def test_of_rights_and_wrongs_it_is_wilsons(values: list[float]):
    assert mean_interval(values) == pytest.approx(wilson_interval(sum(values), len(values)))


@given(graded)
def test_an_interval_holds_its_mean_and_claims_no_certainty(values: list[float]):
    low, high = mean_interval(values)
    mean = sum(values) / len(values)
    assert 0 <= low <= mean + 1e-9 and mean - 1e-9 <= high <= 1
    assert low < high
    assert (
        high - low
        <= wilson_interval(sum(values), len(values))[1]
        - wilson_interval(sum(values), len(values))[0]
        + 1e-9
    )  # no wider than of shares of that mean


@pytest.mark.parametrize(
    ("x", "y", "n", "low", "high"),
    [  # McNemar tables as Bonett and Price (2012) adjust them, worked by hand
        (0, 0, 10, -0.2310, 0.2310),
        (8, 2, 40, -0.0129, 0.2986),
        (12, 0, 12, 0.5875, 1.0),
    ],
)
def test_a_difference_as_worked_by_hand(x: int, y: int, n: int, low: float, high: float):
    ones = [1.0] * x + [0.0] * y + [1.0] * (n - x - y)
    others = [0.0] * x + [1.0] * y + [1.0] * (n - x - y)
    assert paired_difference_interval(ones, others) == pytest.approx((low, high), abs=6e-4)


@pytest.mark.parametrize(
    ("x", "m", "y", "n", "low", "high"),
    [  # Newcombe 1998, table II, method 10
        (56, 70, 48, 80, 0.0524, 0.3339),
        (9, 10, 3, 10, 0.1705, 0.8090),
        (10, 10, 0, 10, 0.6075, 1.0),
    ],
)
def test_a_gap_as_published(x: int, m: int, y: int, n: int, low: float, high: float):
    assert unpaired_difference_interval(
        [1.0] * x + [0.0] * (m - x), [1.0] * y + [0.0] * (n - y)
    ) == pytest.approx((low, high), abs=1e-4)


@given(pairs)
def test_a_difference_holds_its_mean_and_turns_with_its_sides(values: list[tuple[float, float]]):
    x, y = zip(*values, strict=True)
    low, high = paired_difference_interval(x, y)
    mean = (sum(x) - sum(y)) / len(x)
    assert -1 <= low <= mean + 1e-9 and mean - 1e-9 <= high <= 1
    assert low < high
    assert paired_difference_interval(y, x) == pytest.approx((-high, -low))
    wide = paired_difference_interval(x, y, 0.99)
    assert wide[0] <= low and high <= wide[1]


@given(pairs)
def test_a_ratio_holds_one_just_where_the_difference_holds_nothing(
    values: list[tuple[float, float]],
):
    x, y = zip(*values, strict=True)
    (low, high), (least, most) = paired_difference_interval(x, y), paired_ratio_interval(x, y)
    assert 0 <= least <= most
    if min(abs(low), abs(high), abs(least - 1), abs(most - 1)) > 1e-6:
        assert (low < 0 < high) == (least < 1 < most)
        assert (low > 0) == (least > 1)
    if sum(y) > 0 and len(x) >= 10:
        assert least - 1e-9 <= sum(x) / sum(y) <= most + 1e-9


def test_ratios_at_the_rims():
    assert paired_ratio_interval([0.0] * 20, [0.0] * 20) == (0.0, inf)
    assert paired_ratio_interval([1.0] * 200, [1.0] * 200) == pytest.approx(
        (0.986, 1.014), abs=1e-3
    )
    least, most = paired_ratio_interval([1.0] * 20, [0.0] * 20)
    assert least > 5 and isinf(most)
    assert paired_ratio_interval([0.0] * 20, [1.0] * 20)[1] < 0.2


@pytest.mark.parametrize("other", [[], [1.0, 0.0]])
def test_what_is_no_pair_is_refused(other: list[float]):
    for of in (paired_difference_interval, paired_ratio_interval):
        with pytest.raises(ValueError, match="no pairs"):
            of(other[:1], other)


# --- simulated; the seeds make them the same every time ---

Draw = Callable[[np.random.Generator, int], np.ndarray]
ROUNDS = 1500  # the standard error of a coverage of 95 % is then .006


def drawn(n: int, draw: Draw) -> list[np.ndarray]:
    rng = np.random.default_rng(11)
    return [draw(rng, n) for _ in range(ROUNDS)]


def covered(intervals: list[tuple[float, float]], truth: float) -> float:
    return sum(low <= truth <= high for low, high in intervals) / len(intervals)


@pytest.mark.parametrize(
    ("n", "truth", "draw"),
    [
        (100, 0.3, lambda rng, n: (rng.random(n) < 0.3) * 1.0),
        (50, 0.5, lambda rng, n: (rng.random(n) < 0.5) * 1.0),
        (50, 5 / 7, lambda rng, n: rng.beta(5, 2, n)),
        (50, 0.2, lambda rng, n: np.where(rng.random(n) < 0.7, 0, rng.beta(4, 2, n))),
    ],
    ids=["share .3", "share .5", "graded", "graded, many zeros"],
)
def test_means_are_covered(n: int, truth: float, draw: Draw):
    assert 0.93 <= covered([mean_interval(x) for x in drawn(n, draw)], truth) <= 0.97


def twins(rng: np.random.Generator, n: int, one: float, other: float, alike: float) -> np.ndarray:
    """Two speakers on the same items: right on their shares, alike on some of the items."""
    u = rng.random(n)
    v = np.where(rng.random(n) < alike, u, rng.random(n))
    return np.stack([u < one, v < other]).astype(float)


@pytest.mark.parametrize(
    ("n", "truth", "draw"),
    [
        (100, (0.5, 0.7), lambda rng, n: twins(rng, n, 0.5, 0.7, 0.3)),
        (200, (0.9, 0.95), lambda rng, n: twins(rng, n, 0.9, 0.95, 0.6)),
        (
            50,
            (5 / 7, 29 / 42),
            lambda rng, n: np.stack([x := rng.beta(5, 2, n), 0.5 * x + 0.5 * rng.beta(4, 2, n)]),
        ),
    ],
    ids=["shares", "high shares", "graded"],
)
def test_differences_and_ratios_are_covered(n: int, truth: tuple[float, float], draw: Draw):
    samples = drawn(n, draw)
    assert (
        0.93
        <= covered([paired_difference_interval(*s) for s in samples], truth[0] - truth[1])
        <= 0.97
    )
    assert (
        0.93 <= covered([paired_ratio_interval(*s) for s in samples], truth[0] / truth[1]) <= 0.97
    )


# --- evidence ---


def test_evidence_of_clean_wins_is_a_geometric_mean_of_stakes():
    assert betting_wealth([1.0] * 9)[-1] == pytest.approx(
        (2**10 - 1) / 10, rel=1e-3
    )  # the integral of (1 + stake)^9
    assert betting_wealth([0.0] * 5).tolist() == [1.0] * 5
    assert (betting_wealth([-1.0] * 5) < 1).all()


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=200))
def test_evidence_is_never_negative_and_sees_only_what_came(differences: list[float]):
    told = betting_wealth(differences)
    assert (told > 0).all()
    assert betting_wealth(differences[: len(differences) // 2 + 1]) == pytest.approx(
        told[: len(differences) // 2 + 1]
    )


def test_evidence_seldom_lies_whenever_one_stops():
    rng = np.random.default_rng(3)
    lies = sum(
        betting_wealth(rng.choice([-1.0, 0.0, 1.0], 200, p=[0.3, 0.4, 0.3])).max() >= 20
        for _ in range(1000)
    )
    assert 5 < lies <= 50
    assert (
        betting_wealth(rng.choice([-1.0, 0.0, 1.0], 200, p=[0.2, 0.4, 0.4])).max() >= 20
    )  # and it sees what is there
