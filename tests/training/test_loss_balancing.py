"""Weights come from steps before, are one in the mean over positions, and neither drown a group nor
blow up what is mastered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persea.training.loss_balancing import (
    HALF_LIFE_STEPS,
    MAX_WEIGHT_RATIO,
    PRIOR_TOKENS,
    Group,
    GroupScale,
    GroupStats,
    group_shares,
    group_weights,
    sum_group_stats,
    update_scales,
)

A, B, C = Group("qwen", "languages"), Group("gemma", "code"), Group("gpt-oss", "tools")
OWN = Group("qwen", "languages", on_policy=True)
sides = st.tuples(st.floats(1, 1e4), st.floats(1e-9, 1e6)).map(
    lambda side: GroupScale(side[0], side[1] * side[0])
)
scales = st.dictionaries(
    st.builds(
        Group,
        st.sampled_from(["qwen", "gemma"]),
        st.sampled_from(["code", "tools", "safety"]),
        st.booleans(),
    ),
    sides,
)


def steps(losses: Mapping[Group, float], n: int = 2000, times: int = 1) -> dict[Group, GroupScale]:
    """Scales after steps in which each of a group's n positions costs so much."""
    found: dict[Group, GroupScale] = {}
    for _ in range(times):
        found = update_scales(
            found,
            {group: GroupStats(n, n * loss, n * loss**2, 1.0) for group, loss in losses.items()},
        )
    return found


@given(scales)
def test_the_mean_weight_of_a_position_is_one_and_ratios_are_bounded(
    found: dict[Group, GroupScale],
) -> None:
    told = group_weights(found)
    assert told.keys() == found.keys()
    for own in (False, True):
        mine = {group: scale for group, scale in found.items() if group.on_policy is own}
        if mine:
            total = sum(scale.num_tokens for scale in mine.values())
            assert sum(
                told[group] * scale.num_tokens for group, scale in mine.items()
            ) / total == pytest.approx(1)
            assert max(told[group] for group in mine) / min(
                told[group] for group in mine
            ) <= MAX_WEIGHT_RATIO**2 * (1 + 1e-9)


def test_who_costs_twice_as_much_counts_for_half() -> None:
    told = group_weights(steps({A: 0.8, B: 0.4}, n=10**9))
    assert told[A] / told[B] == pytest.approx(0.5, rel=1e-6)


def test_a_mastered_skill_is_not_blown_up() -> None:
    """Losses of 1e-6: its ratio would be half a million."""
    told = group_weights(steps({A: 0.5, B: 0.5, C: 1e-6}))
    assert told[C] / told[A] <= MAX_WEIGHT_RATIO * math.sqrt(1.5) + 1e-9
    assert group_weights(steps({A: 0.0, B: 0.0})) == {}  # nothing is left to learn: all alike


def test_whoever_was_hardly_heard_counts_like_everybody() -> None:
    found = update_scales(steps({A: 0.5}), {B: GroupStats(1, 2.0, 4.0, 1.0)})
    assert group_weights(found)[B] / group_weights(found)[A] > 0.8
    assert group_weights(steps({A: 0.5}))[A] == pytest.approx(1)
    assert group_weights({}) == {}


def test_old_steps_fade() -> None:
    """A group that has become easy counts as such: half of what is known of it is forgotten in HALF
    steps.
    """
    hard = steps({A: 1.0, B: 1.0}, times=400)
    for _ in range(HALF_LIFE_STEPS):
        hard = update_scales(
            hard, {A: GroupStats(2000, 2000.0, 2000.0), B: GroupStats(2000, 0.0, 0.0)}
        )
    assert hard[B].squared_loss_sum / hard[B].num_tokens == pytest.approx(0.5, rel=0.02)
    assert hard[A].squared_loss_sum / hard[A].num_tokens == pytest.approx(1)


def test_own_answers_are_balanced_among_themselves() -> None:
    """Reverse KL is of another scale: it says nothing of captures, nor they of it."""
    told = group_weights(steps({A: 0.8, B: 0.4, OWN: 1e-3}, n=10**9))
    assert told[OWN] == pytest.approx(1)
    assert {group: told[group] for group in (A, B)} == pytest.approx(
        group_weights(steps({A: 0.8, B: 0.4}, n=10**9))
    )


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from([A, B, C]),
            st.builds(GroupStats, st.integers(1, 99), *[st.floats(0, 9)] * 3),
            min_size=1,
        ),
        min_size=1,
        max_size=4,
    )
)
def test_parts_add_up_however_they_are_cut(parts: list[dict[Group, GroupStats]]) -> None:
    whole, nested = sum_group_stats(parts), sum_group_stats((parts[0], sum_group_stats(parts[1:])))
    assert whole.keys() == nested.keys() == {group for part in parts for group in part}
    for group, one in whole.items():
        assert one.num_tokens == sum(part[group].num_tokens for part in parts if group in part)
        for key in ("loss_sum", "squared_loss_sum", "grad_norm_sum"):
            assert getattr(one, key) == pytest.approx(getattr(nested[group], key))
    one, other = (
        update_scales({A: GroupScale(7, 3)}, whole),
        update_scales({A: GroupScale(7, 3)}, nested),
    )
    assert group_weights(one) == pytest.approx(group_weights(other))


def test_whose_losses_nobody_tells_has_no_scale() -> None:
    assert update_scales({}, {A: GroupStats(5)}) == {}
    assert update_scales({A: GroupScale(4, 4)}, {A: GroupStats(5)})[A].num_tokens < 4
    assert PRIOR_TOKENS > 0


def test_shares_are_of_what_counts() -> None:
    told = group_shares(
        {A: GroupStats(10, 4.0, 2.0, 3.0), B: GroupStats(30, 4.0, 2.0, 1.0)}, {A: 1.5}
    )
    assert told == {
        "qwen": {"languages": {"positions": 0.25, "loss": 0.6, "gradient": 0.75, "weight": 1.5}},
        "gemma": {"code": {"positions": 0.75, "loss": 0.4, "gradient": 0.25, "weight": 1.0}},
    }
    assert group_shares({A: GroupStats(10, 4.0, 2.0), B: GroupStats(30, 4.0, 2.0, 1.0)}, {})[
        "gemma"
    ]["code"].keys() == {"positions", "loss", "weight"}
    assert group_shares({A: GroupStats(10, 0.0, 0.0, 0.0)}, {})["qwen"]["languages"] == {
        "positions": 1.0,
        "weight": 1.0,
    }
