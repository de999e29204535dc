"""What a position counts for in a step, so that no teacher and no skill drowns the others: by how large the losses of its group have been.

A group is what one teacher teaches of one skill, from captures or beside the student's own answers. The scale of a group is the deviation of
its losses from nothing, sqrt(mean of l^2) nats per position, over the steps before, the last ones more (HALF):

    ratio(g) = min(max(scale(all) / scale(g), 1 / MOST), MOST)        weight(g) = ratio(g) / (mean of ratio over the positions seen)

The weights of a step come from steps before it alone, so that parts and processes share them, and a checkpoint that holds the sums goes on
with the same bits. Their mean over positions is one: the learning rate keeps its meaning. (Balancing by a clipped ratio of deviations:
DN-MOPD, Domain-Normalised Multi-teacher On-Policy Distillation; there of advantages, and about their mean.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

HALF_LIFE_STEPS = 50  # steps after which a step counts for half
MAX_WEIGHT_RATIO = 2.0  # largest ratio: a mastered skill, all of whose losses are near nothing, is not blown up into its own noise
PRIOR_TOKENS = 200  # positions' worth of doubt: so many as if of everybody's scale, until a group has been heard


class Group(NamedTuple):
    """What one teacher teaches of one skill. own: beside the student's own answers, whose losses are of another kind and another scale."""

    teacher: str
    skill: str
    on_policy: bool = False


@dataclass(frozen=True)
class GroupStats:
    """What a group taught in a part of a step, added up over its positions.

    nats, squares  losses, before any weight, and their squares; NaN where the loss does not say
    pull           norms of the gradients with respect to the hidden states that the head is given, weights included; NaN likewise
    """

    num_tokens: int
    loss_sum: float = math.nan
    squared_loss_sum: float = math.nan
    grad_norm_sum: float = math.nan


@dataclass(frozen=True)
class GroupScale:
    """Sums over the steps so far, older ones for less: positions, and squares of their losses."""

    num_tokens: float
    squared_loss_sum: float


def sum_group_stats(parts: Iterable[Mapping[Group, GroupStats]]) -> dict[Group, GroupStats]:
    """What parts and processes say, together: sums in their order."""
    found: dict[Group, GroupStats] = {}
    for said in parts:
        for group, one in said.items():
            was = found.get(group, GroupStats(0, 0.0, 0.0, 0.0))
            found[group] = GroupStats(
                was.num_tokens + one.num_tokens,
                was.loss_sum + one.loss_sum,
                was.squared_loss_sum + one.squared_loss_sum,
                was.grad_norm_sum + one.grad_norm_sum,
            )
    return found


def group_shares(
    group_stats: Mapping[Group, GroupStats], weights: Mapping[Group, float]
) -> dict[str, dict[str, dict[str, float]]]:
    """Teacher -> skill -> its shares of positions, of loss and of pull, both as they count, and what one of its positions counts for.

    A share of which not every group tells its part is left out.
    """
    sums = {
        group: {
            "positions": float(t.num_tokens),
            "loss": weights.get(group, 1.0) * t.loss_sum,
            "gradient": t.grad_norm_sum,
        }
        for group, t in group_stats.items()
    }
    whole = {
        key: sum(each[key] for each in sums.values()) for key in ("positions", "loss", "gradient")
    }
    found: dict[str, dict[str, dict[str, float]]] = {}
    for group, each in sums.items():
        told = {
            key: value / whole[key]
            for key, value in each.items()
            if math.isfinite(whole[key]) and whole[key] > 0
        }
        found.setdefault(group.teacher, {})[group.skill] = told | {
            "weight": weights.get(group, 1.0)
        }
    return found


def update_scales(
    scales: Mapping[Group, GroupScale], group_stats: Mapping[Group, GroupStats]
) -> dict[Group, GroupScale]:
    """Scales one step later. A group whose losses nobody tells has none."""
    fade = 0.5 ** (1 / HALF_LIFE_STEPS)
    found = {
        group: GroupScale(fade * scale.num_tokens, fade * scale.squared_loss_sum)
        for group, scale in scales.items()
    }
    for group, one in group_stats.items():
        if math.isfinite(one.squared_loss_sum):
            was = found.get(group, GroupScale(0.0, 0.0))
            found[group] = GroupScale(
                was.num_tokens + one.num_tokens, was.squared_loss_sum + one.squared_loss_sum
            )
    return found


def group_weights(scales: Mapping[Group, GroupScale]) -> dict[Group, float]:
    """The weight of each group heard so far; one that was not counts as 1. Captures and own answers are balanced among themselves."""
    found: dict[Group, float] = {}
    for own in (False, True):
        mine = {
            group: scale
            for group, scale in scales.items()
            if group.on_policy is own and scale.num_tokens > 0
        }
        positions, squares = (
            sum(side)
            for side in zip(
                (0.0, 0.0),
                *((s.num_tokens, s.squared_loss_sum) for s in mine.values()),
                strict=True,
            )
        )
        if not squares > 0:
            continue  # nothing was learned, or nothing is left to learn
        whole = squares / positions
        ratios = {
            group: min(
                max(
                    math.sqrt(
                        whole
                        / (
                            (s.squared_loss_sum + PRIOR_TOKENS * whole)
                            / (s.num_tokens + PRIOR_TOKENS)
                        )
                    ),
                    1 / MAX_WEIGHT_RATIO,
                ),
                MAX_WEIGHT_RATIO,
            )
            for group, s in mine.items()
        }
        mean = sum(ratio * mine[group].num_tokens for group, ratio in ratios.items()) / positions
        found |= {group: ratio / mean for group, ratio in ratios.items()}
    return found
