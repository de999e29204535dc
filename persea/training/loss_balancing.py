"""Weights of groups of examples, so that no teacher and no skill dominates the loss.

A group is one teacher's answers of one skill, captured or on-policy. The scale of a group is the
root mean square of its losses, nats per position, over the steps before, with exponential decay:

    ratio(g)  = clip(scale(all) / scale(g), 1 / max_ratio, max_ratio)
    weight(g) = ratio(g) / (mean of ratio over the positions seen)

The weights of a step depend on earlier steps only, so all parts and processes share them, and a
checkpoint that holds the sums resumes with the same bits. Their mean over positions is one, so the
learning rate keeps its meaning. (Balancing by a clipped ratio of deviations: DN-MOPD,
Domain-Normalised Multi-teacher On-Policy Distillation, where the deviation is that of advantages
about their mean.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

HALF_LIFE_STEPS = 50  # steps after which the losses of a step count for half
# Largest ratio. A mastered skill, whose losses are near zero, is not amplified into its own noise.
MAX_WEIGHT_RATIO = 2.0
PRIOR_TOKENS = 200  # tokens at the overall scale that every group starts with


class Group(NamedTuple):
    """One teacher's examples of one skill.

    Attributes:
        teacher: name of the teacher.
        skill: name of the skill.
        on_policy: whether the examples are the student's own answers. Their losses have another
            scale, so they are balanced among themselves.
    """

    teacher: str
    skill: str
    on_policy: bool = False


@dataclass(frozen=True)
class GroupStats:
    """Sums over a group's positions in a part of a step; NaN where a value is unknown.

    Attributes:
        num_tokens: number of positions.
        loss_sum: losses before any weight, nats.
        squared_loss_sum: squares of these losses.
        grad_norm_sum: norms of the gradients with respect to hidden states, weights included.
    """

    num_tokens: int
    loss_sum: float = math.nan
    squared_loss_sum: float = math.nan
    grad_norm_sum: float = math.nan


@dataclass(frozen=True)
class GroupScale:
    """Exponentially decayed sums over the steps so far.

    The order of the fields is the order in checkpoints.

    Attributes:
        num_tokens: number of positions.
        squared_loss_sum: squares of their losses.
    """

    num_tokens: float
    squared_loss_sum: float


def sum_group_stats(parts: Iterable[Mapping[Group, GroupStats]]) -> dict[Group, GroupStats]:
    """Add up the statistics of parts or processes, in their order."""
    sums: dict[Group, GroupStats] = {}
    for stats in parts:
        for group, one in stats.items():
            before = sums.get(group, GroupStats(0, 0.0, 0.0, 0.0))
            sums[group] = GroupStats(
                before.num_tokens + one.num_tokens,
                before.loss_sum + one.loss_sum,
                before.squared_loss_sum + one.squared_loss_sum,
                before.grad_norm_sum + one.grad_norm_sum,
            )
    return sums


def group_shares(
    group_stats: Mapping[Group, GroupStats], weights: Mapping[Group, float]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the shares of each group: teacher -> skill -> positions, loss, gradient and weight.

    Loss and gradient are weighted. A share is left out if the value of any group is unknown.

    Args:
        group_stats: sums of a step.
        weights: weight of each group; 1 where a group has none.
    """
    sums = {
        group: {
            "positions": float(t.num_tokens),
            "loss": weights.get(group, 1.0) * t.loss_sum,
            "gradient": t.grad_norm_sum,
        }
        for group, t in group_stats.items()
    }
    total = {
        key: sum(each[key] for each in sums.values()) for key in ("positions", "loss", "gradient")
    }
    shares: dict[str, dict[str, dict[str, float]]] = {}
    for group, each in sums.items():
        known = {
            key: value / total[key]
            for key, value in each.items()
            if math.isfinite(total[key]) and total[key] > 0
        }
        shares.setdefault(group.teacher, {})[group.skill] = known | {
            "weight": weights.get(group, 1.0)
        }
    return shares


def update_scales(
    scales: Mapping[Group, GroupScale],
    group_stats: Mapping[Group, GroupStats],
    half_life_steps: float = HALF_LIFE_STEPS,
) -> dict[Group, GroupScale]:
    """Return the scales after one more step; a group whose losses are unknown gets none.

    Args:
        scales: scales before the step.
        group_stats: sums of the step.
        half_life_steps: steps after which the losses of a step count for half.
    """
    decay = 0.5 ** (1 / half_life_steps)
    updated = {
        group: GroupScale(decay * scale.num_tokens, decay * scale.squared_loss_sum)
        for group, scale in scales.items()
    }
    for group, one in group_stats.items():
        if math.isfinite(one.squared_loss_sum):
            before = updated.get(group, GroupScale(0.0, 0.0))
            updated[group] = GroupScale(
                before.num_tokens + one.num_tokens, before.squared_loss_sum + one.squared_loss_sum
            )
    return updated


def group_weights(
    scales: Mapping[Group, GroupScale],
    max_ratio: float = MAX_WEIGHT_RATIO,
    prior_tokens: float = PRIOR_TOKENS,
) -> dict[Group, float]:
    """Return the weight of each group with a scale; the weight of any other group is 1.

    Captured and on-policy groups are balanced among themselves.

    Args:
        scales: scales of the steps so far.
        max_ratio: largest ratio of scales, and the inverse of the smallest.
        prior_tokens: tokens at the overall scale that every group starts with.
    """
    weights: dict[Group, float] = {}
    for on_policy in (False, True):
        known = {
            group: scale
            for group, scale in scales.items()
            if group.on_policy is on_policy and scale.num_tokens > 0
        }
        positions, squares = (
            sum(side)
            for side in zip(
                (0.0, 0.0),
                *((s.num_tokens, s.squared_loss_sum) for s in known.values()),
                strict=True,
            )
        )
        if not squares > 0:
            continue  # no loss yet, or all losses are zero
        overall = squares / positions
        ratios = {}
        for group, scale in known.items():
            own = (scale.squared_loss_sum + prior_tokens * overall) / (
                scale.num_tokens + prior_tokens
            )
            ratios[group] = min(max(math.sqrt(overall / own), 1 / max_ratio), max_ratio)
        mean = sum(ratio * known[group].num_tokens for group, ratio in ratios.items()) / positions
        weights |= {group: ratio / mean for group, ratio in ratios.items()}
    return weights
