"""Weights come from steps before, are one in the mean over positions, and neither drown a group nor blow up what is mastered."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persea.training.loss_balancing import HALF, MOST, PRIOR, Group, Scale, Taught, added, heard, shares, weights

A, B, C = Group("qwen", "languages"), Group("gemma", "code"), Group("gpt-oss", "tools")
OWN = Group("qwen", "languages", own=True)
sides = st.tuples(st.floats(1, 1e4), st.floats(1e-9, 1e6)).map(lambda side: Scale(side[0], side[1] * side[0]))
scales = st.dictionaries(st.builds(Group, st.sampled_from(["qwen", "gemma"]), st.sampled_from(["code", "tools", "safety"]), st.booleans()), sides)


def steps(losses: Mapping[Group, float], n: int = 2000, times: int = 1) -> dict[Group, Scale]:
    """Scales after steps in which each of a group's n positions costs so much."""
    found: dict[Group, Scale] = {}
    for _ in range(times):
        found = heard(found, {group: Taught(n, n * loss, n * loss ** 2, 1.0) for group, loss in losses.items()})
    return found


@given(scales)
def test_the_mean_weight_of_a_position_is_one_and_ratios_are_bounded(found: dict[Group, Scale]) -> None:
    told = weights(found)
    assert told.keys() == found.keys()
    for own in (False, True):
        mine = {group: scale for group, scale in found.items() if group.own is own}
        if mine:
            total = sum(scale.positions for scale in mine.values())
            assert sum(told[group] * scale.positions for group, scale in mine.items()) / total == pytest.approx(1)
            assert max(told[group] for group in mine) / min(told[group] for group in mine) <= MOST ** 2 * (1 + 1e-9)


def test_who_costs_twice_as_much_counts_for_half() -> None:
    told = weights(steps({A: 0.8, B: 0.4}, n=10 ** 9))
    assert told[A] / told[B] == pytest.approx(0.5, rel=1e-6)


def test_a_mastered_skill_is_not_blown_up() -> None:
    """Losses of 1e-6: its ratio would be half a million."""
    told = weights(steps({A: 0.5, B: 0.5, C: 1e-6}))
    assert told[C] / told[A] <= MOST * math.sqrt(1.5) + 1e-9
    assert weights(steps({A: 0.0, B: 0.0})) == {}  # nothing is left to learn: all alike


def test_whoever_was_hardly_heard_counts_like_everybody() -> None:
    found = heard(steps({A: 0.5}), {B: Taught(1, 2.0, 4.0, 1.0)})
    assert weights(found)[B] / weights(found)[A] > 0.8
    assert weights(steps({A: 0.5}))[A] == pytest.approx(1)
    assert weights({}) == {}


def test_old_steps_fade() -> None:
    """A group that has become easy counts as such: half of what is known of it is forgotten in HALF steps."""
    hard = steps({A: 1.0, B: 1.0}, times=400)
    for _ in range(HALF):
        hard = heard(hard, {A: Taught(2000, 2000.0, 2000.0), B: Taught(2000, 0.0, 0.0)})
    assert hard[B].squares / hard[B].positions == pytest.approx(0.5, rel=0.02)
    assert hard[A].squares / hard[A].positions == pytest.approx(1)


def test_own_answers_are_balanced_among_themselves() -> None:
    """Reverse KL is of another scale: it says nothing of captures, nor they of it."""
    told = weights(steps({A: 0.8, B: 0.4, OWN: 1e-3}, n=10 ** 9))
    assert told[OWN] == pytest.approx(1)
    assert {group: told[group] for group in (A, B)} == pytest.approx(weights(steps({A: 0.8, B: 0.4}, n=10 ** 9)))


@given(st.lists(st.dictionaries(st.sampled_from([A, B, C]), st.builds(Taught, st.integers(1, 99), *[st.floats(0, 9)] * 3), min_size=1), min_size=1,
                max_size=4))
def test_parts_add_up_however_they_are_cut(parts: list[dict[Group, Taught]]) -> None:
    whole, nested = added(parts), added((parts[0], added(parts[1:])))
    assert whole.keys() == nested.keys() == {group for part in parts for group in part}
    for group, one in whole.items():
        assert one.positions == sum(part[group].positions for part in parts if group in part)
        for key in ("nats", "squares", "pull"):
            assert getattr(one, key) == pytest.approx(getattr(nested[group], key))
    one, other = heard({A: Scale(7, 3)}, whole), heard({A: Scale(7, 3)}, nested)
    assert weights(one) == pytest.approx(weights(other))


def test_whose_losses_nobody_tells_has_no_scale() -> None:
    assert heard({}, {A: Taught(5)}) == {}
    assert heard({A: Scale(4, 4)}, {A: Taught(5)})[A].positions < 4
    assert PRIOR > 0


def test_shares_are_of_what_counts() -> None:
    told = shares({A: Taught(10, 4.0, 2.0, 3.0), B: Taught(30, 4.0, 2.0, 1.0)}, {A: 1.5})
    assert told == {"qwen": {"languages": {"positions": 0.25, "loss": 0.6, "gradient": 0.75, "weight": 1.5}},
                    "gemma": {"code": {"positions": 0.75, "loss": 0.4, "gradient": 0.25, "weight": 1.0}}}
    assert shares({A: Taught(10, 4.0, 2.0), B: Taught(30, 4.0, 2.0, 1.0)}, {})["gemma"]["code"].keys() == {"positions", "loss", "weight"}
    assert shares({A: Taught(10, 0.0, 0.0, 0.0)}, {})["qwen"]["languages"] == {"positions": 1.0, "weight": 1.0}
