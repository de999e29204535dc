"""The statistics of an audit: exact, calibrated, and silent about models that learned nothing."""

from __future__ import annotations

import numpy as np
import pytest

from persea.evaluation.audit import (
    Finding,
    binomial_p_value,
    compare_teachers,
    count_preferred,
    holm,
    sign_flip_p_value,
)

TEACHERS = ("a", "b", "c")


def test_the_binomial_p_value_is_exact() -> None:
    assert binomial_p_value(60, 60) == 2.0**-60
    assert binomial_p_value(43, 60) == pytest.approx(5.3e-4, rel=0.01)  # R's binom.test
    assert binomial_p_value(0, 60) == 1.0
    assert binomial_p_value(5001, 10000) == pytest.approx(0.496, abs=0.001)  # no overflow


def test_preferences_are_counted_without_ties_and_unreadable_pairs() -> None:
    logprobs_P2 = np.array([[-1.0, -2.0], [-2.0, -1.0], [-1.0, -1.0], [np.nan, -1.0], [-3.0, -9.0]])
    test = count_preferred("m", logprobs_P2, [0, 1, 0, 1, 1])
    assert (test.pairs, test.left_out, test.tested, test.preferred) == (5, 2, 3, 2)
    assert test.p_value == 0.5
    assert count_preferred("m", np.empty((0, 2)), []).p_value == 1.0


def test_p_values_of_models_that_never_saw_the_capture_are_uniform() -> None:
    """At most a share of alpha of them is below alpha, for a model with any strong preference."""
    generator = np.random.default_rng(0)
    logprobs_P2 = generator.normal(0, 50, (60, 2))
    logprobs_P2[:, 0] += 100  # it always likes the first answer
    found = [
        count_preferred("m", logprobs_P2, generator.integers(0, 2, 60)).p_value for _ in range(2000)
    ]
    for alpha in (0.01, 0.05, 0.2):
        assert np.mean([p <= alpha for p in found]) <= alpha * 1.3


def test_sign_flips_and_holm() -> None:
    generator = np.random.default_rng(0)
    assert sign_flip_p_value(generator.normal(0.5, 1, 100), 0) == pytest.approx(1e-4)
    assert sign_flip_p_value(generator.normal(-0.5, 1, 100), 0) > 0.99
    assert sign_flip_p_value(np.zeros(50), 0) == 1.0
    nulls = [sign_flip_p_value(generator.normal(0, 1, 40), k, 499) for k in range(300)]
    assert np.mean([p <= 0.1 for p in nulls]) == pytest.approx(0.1, abs=0.05)
    assert holm([0.04, 0.01, 0.5]) == [0.08, 0.03, 0.5]


def gains(seed: int, taught_by: str = "", size: float = 0.2) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    of_prompt = generator.normal(0, 0.3, 60)
    found = {t: of_prompt + generator.normal(0, 0.1, 60) for t in TEACHERS}
    if taught_by:
        found[taught_by] = found[taught_by] + size
    return found


def test_the_teacher_is_found_and_no_other() -> None:
    untaught = [gains(seed) for seed in range(100, 110)]
    result = compare_teachers("s", "base", gains(1, "b"), TEACHERS, (), untaught)
    first, *others = result.teachers
    assert (first.teacher, first.finding, first.prompts) == ("b", Finding.MARKS, 60)
    assert first.effect == pytest.approx(0.2, abs=0.05)
    assert first.z is not None
    assert first.z > 4
    assert {o.finding for o in others} == {Finding.NO_EVIDENCE}


def test_untaught_students_show_no_evidence() -> None:
    untaught = [gains(seed) for seed in range(100, 110)]
    found = [
        evidence.finding
        for seed in range(40)
        for evidence in compare_teachers("s", "b", gains(seed), TEACHERS, (), untaught).teachers
    ]
    assert len(found) == 120
    assert sum(f is not Finding.NO_EVIDENCE for f in found) <= 1


def test_a_siblings_marks_are_named_as_such() -> None:
    """b and c gained alike: neither beats the other, and both beat the mean of the controls."""
    found = gains(2, "b")
    found["c"] = found["b"] + np.random.default_rng(3).normal(0, 0.01, 60)
    found["d"] = gains(2)["a"]
    result = compare_teachers("s", "base", found, ("b",), ("a", "c", "d"))
    assert result.teachers[0].finding is Finding.MARKS_OR_SIBLING
    assert result.teachers[0].p_every > 0.01


def test_a_common_shift_of_untaught_students_is_no_evidence() -> None:
    """p alone would blame b: all students of this base moved towards it."""
    untaught = [gains(seed, "b", 0.2) for seed in range(100, 110)]
    suspect = gains(1, "b", 0.2)
    assert compare_teachers("s", "x", suspect, TEACHERS).teachers[0].finding is Finding.MARKS
    calibrated = compare_teachers("s", "x", suspect, TEACHERS, (), untaught)
    assert {e.finding for e in calibrated.teachers} == {Finding.NO_EVIDENCE}


def test_too_few_texts_are_no_evidence() -> None:
    found = {name: values[:10] for name, values in gains(1, "b", 5.0).items()}
    result = compare_teachers("s", "base", found, TEACHERS)
    assert {e.finding for e in result.teachers} == {Finding.NO_EVIDENCE}
    missing = gains(1, "b")
    missing["c"][:30] = np.nan
    missing["a"][:15] = np.nan
    result = compare_teachers("s", "base", missing, ("b",), ("a", "c"))
    assert result.teachers[0].prompts == 45
