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

HALF = 50        # steps after which a step counts for half
MOST = 2.0       # largest ratio: a mastered skill, all of whose losses are near nothing, is not blown up into its own noise
PRIOR = 200      # positions' worth of doubt: so many as if of everybody's scale, until a group has been heard


class Group(NamedTuple):
    """What one teacher teaches of one skill. own: beside the student's own answers, whose losses are of another kind and another scale."""

    teacher: str
    skill: str
    own: bool = False


@dataclass(frozen=True)
class Taught:
    """What a group taught in a part of a step, added up over its positions.

    nats, squares  losses, before any weight, and their squares; NaN where the loss does not say
    pull           norms of the gradients with respect to the hidden states that the head is given, weights included; NaN likewise
    """

    positions: int
    nats: float = math.nan
    squares: float = math.nan
    pull: float = math.nan


@dataclass(frozen=True)
class Scale:
    """Sums over the steps so far, older ones for less: positions, and squares of their losses."""

    positions: float
    squares: float


def added(some: Iterable[Mapping[Group, Taught]]) -> dict[Group, Taught]:
    """What parts and processes say, together: sums in their order."""
    found: dict[Group, Taught] = {}
    for said in some:
        for group, one in said.items():
            was = found.get(group, Taught(0, 0.0, 0.0, 0.0))
            found[group] = Taught(was.positions + one.positions, was.nats + one.nats, was.squares + one.squares, was.pull + one.pull)
    return found


def shares(taught: Mapping[Group, Taught], weight: Mapping[Group, float]) -> dict[str, dict[str, dict[str, float]]]:
    """teacher -> skill -> its shares of positions, of loss and of pull, both as they count, and what one of its positions counts for.

    A share of which not every group tells its part is left out.
    """
    sums = {group: {"positions": float(t.positions), "loss": weight.get(group, 1.0) * t.nats, "gradient": t.pull} for group, t in taught.items()}
    whole = {key: sum(each[key] for each in sums.values()) for key in ("positions", "loss", "gradient")}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for group, each in sums.items():
        told = {key: value / whole[key] for key, value in each.items() if math.isfinite(whole[key]) and whole[key] > 0}
        found.setdefault(group.teacher, {})[group.skill] = told | {"weight": weight.get(group, 1.0)}
    return found


def heard(scales: Mapping[Group, Scale], taught: Mapping[Group, Taught]) -> dict[Group, Scale]:
    """Scales one step later. A group whose losses nobody tells has none."""
    fade = 0.5 ** (1 / HALF)
    found = {group: Scale(fade * scale.positions, fade * scale.squares) for group, scale in scales.items()}
    for group, one in taught.items():
        if math.isfinite(one.squares):
            was = found.get(group, Scale(0.0, 0.0))
            found[group] = Scale(was.positions + one.positions, was.squares + one.squares)
    return found


def weights(scales: Mapping[Group, Scale]) -> dict[Group, float]:
    """The weight of each group heard so far; one that was not counts as 1. Captures and own answers are balanced among themselves."""
    found: dict[Group, float] = {}
    for own in (False, True):
        mine = {group: scale for group, scale in scales.items() if group.own is own and scale.positions > 0}
        positions, squares = (sum(side) for side in zip((0.0, 0.0), *((s.positions, s.squares) for s in mine.values()), strict=True))
        if not squares > 0:
            continue  # nothing was learned, or nothing is left to learn
        whole = squares / positions
        ratios = {group: min(max(math.sqrt(whole / ((s.squares + PRIOR * whole) / (s.positions + PRIOR))), 1 / MOST), MOST)
                  for group, s in mine.items()}
        mean = sum(ratio * mine[group].positions for group, ratio in ratios.items()) / positions
        found |= {group: ratio / mean for group, ratio in ratios.items()}
    return found
