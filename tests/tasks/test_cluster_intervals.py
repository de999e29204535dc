"""Bits per byte over documents: exact where it can be, and as often right as promised."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from persea.tasks.cluster_intervals import BitsPerByte, student_t_quantile

STUDENT, BASE, TEACHER = 0, 1, 2


def documents(
    n: int, seed: int, gained: float = 0.5, gap: float = 1.2
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Bits of student, base and teacher: the student gained `gained` bits a byte of `gap`."""
    rng = np.random.default_rng(seed)
    bytes_N = np.round(np.exp(rng.normal(4.8, 0.6, n))).astype(np.float64)
    base_N = bytes_N * (2.5 + 0.3 * rng.normal(size=n))
    student_N = base_N - bytes_N * (gained + 0.08 * rng.normal(size=n))
    teacher_N = base_N - bytes_N * (gap + 0.2 * rng.normal(size=n))
    return np.stack([student_N, base_N, teacher_N], axis=1), bytes_N


@pytest.mark.parametrize(
    ("df", "table"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (30, 2.042), (1e6, 1.960)]
)
def test_the_quantile_is_that_of_the_tables(df: float, table: float) -> None:
    assert student_t_quantile(0.95, df) == pytest.approx(table, rel=0.01)
    assert student_t_quantile(0.99, df) > student_t_quantile(0.95, df)


def test_rates_are_sums_over_sums_and_a_mean_counts_each_language_once() -> None:
    one = np.array([[10.0, 20.0, 5.0], [30.0, 20.0, 5.0]]), np.array([10.0, 30.0])
    other = np.array([[8.0, 8.0, 8.0], [0.0, 8.0, 8.0]]), np.array([4.0, 4.0])
    assert BitsPerByte.from_groups([one]).rates_M.tolist() == [1.0, 1.0, 0.25]
    assert BitsPerByte.from_groups([one, other]).rates_M.tolist() == [1.0, 1.5, 1.125]


def test_documents_that_agree_leave_no_doubt() -> None:
    bytes_N = np.array([100.0, 50.0, 80.0])
    found = BitsPerByte.from_groups([(np.outer(bytes_N, [1.5, 2.0, 1.0]), bytes_N)])
    difference = found.difference(STUDENT, BASE)
    assert (difference.low, difference.value, difference.high) == pytest.approx((-0.5, -0.5, -0.5))
    gap = found.gap_closed(STUDENT, BASE, TEACHER)
    assert gap and (gap.low, gap.value, gap.high) == pytest.approx((0.5, 0.5, 0.5))


def test_the_interval_of_equal_documents_is_students() -> None:
    bits_NM = np.array([[10.0, 12.0, 1.0], [14.0, 15.0, 1.0], [9.0, 14.0, 1.0]])
    found = BitsPerByte.from_groups([(bits_NM, np.full(3, 10.0))]).difference(STUDENT, BASE)
    d_N = (bits_NM[:, 0] - bits_NM[:, 1]) / 10
    half = 4.3027 * d_N.std(ddof=1) / np.sqrt(3)
    assert found.low is not None and found.high is not None
    assert (found.low, found.high) == pytest.approx((d_N.mean() - half, d_N.mean() + half), 1e-4)


def test_without_a_gap_there_is_no_share_of_it() -> None:
    found = BitsPerByte.from_groups([documents(20, 0, gained=0.1, gap=-0.5)])
    assert found.gap_closed(STUDENT, BASE, TEACHER) is None
    doubtful = BitsPerByte.from_groups([documents(20, 1, gained=0.1, gap=0.02)])
    share = doubtful.gap_closed(STUDENT, BASE, TEACHER)
    assert share is None or (share.low, share.high) == (None, None)


def test_one_document_has_values_and_no_intervals() -> None:
    found = BitsPerByte.from_groups([documents(1, 0), documents(9, 1)])
    assert (found.rate(BASE).low, found.difference(STUDENT, BASE).high) == (None, None)
    share = found.gap_closed(STUDENT, BASE, TEACHER)
    assert share and share.value == pytest.approx(0.5 / 1.2, abs=0.1)
    assert share.low is None and share.high is None


@pytest.mark.parametrize(("n", "languages"), [(12, 1), (30, 1), (12, 4)])
def test_the_intervals_hold_the_truth_as_often_as_they_say(n: int, languages: int) -> None:
    runs, hits = 300, np.zeros(2)
    for run in range(runs):
        groups = [documents(n, 1000 * run + k) for k in range(languages)]
        found = BitsPerByte.from_groups(groups)
        difference = found.difference(STUDENT, BASE)
        share = found.gap_closed(STUDENT, BASE, TEACHER)
        assert share and difference.low is not None and difference.high is not None
        assert share.low is not None and share.high is not None
        hits += difference.low <= -0.5 <= difference.high, share.low <= 0.5 / 1.2 <= share.high
    assert (hits / runs > 0.91).all() and (hits / runs < 0.99).all()
