"""The default learning rate of a size, and the warning about one that is far from it."""

from __future__ import annotations

import pytest

from persea.training.learning_rate import default_learning_rate, describe_unusual_rate


@pytest.mark.parametrize(
    ("size", "rate"),
    [
        (846_720, 3e-3),  # the bundled models keep theirs
        (2_000_000, 3e-3),
        (134_515_008, 8.4e-5),
        (1_000_000_000, 1.5e-5),
        (8_000_000_000, 1e-5),
        (0, 1.5e-5),
    ],
)
def test_it_falls_with_the_number_of_weights(size: int, rate: float) -> None:
    assert default_learning_rate(size) == rate


def test_adapters_take_ten_times_as_much() -> None:
    assert default_learning_rate(134_515_008, True) == 8.4e-4
    assert default_learning_rate(3_000_000_000, True) == 1e-4
    assert default_learning_rate(846_720, True) == 3e-3


def test_a_rate_ten_times_off_is_warned_of() -> None:
    assert describe_unusual_rate(3e-3, 134_515_008) == (
        "training.learning_rate 0.003 is high for a student of 134.5 M weights -> delete the line "
        "for 8.4e-05, the default of this size"
    )
    assert " is low for " in describe_unusual_rate(1e-6, 134_515_008)
    for rate, size in ((8e-4, 134_515_008), (1e-5, 134_515_008), (1.0, 0), (4e-3, 846_720)):
        assert describe_unusual_rate(rate, size) == ""
