"""Exact gradients of an objective, for a student with one free row of logits per prefix.

Every expectation is exact over a world's strings (bench/worlds.py). At the truth an unbiased
objective has expected gradient zero. A biased objective moves the student away; the distance is
measured in nats of byte KL. This module contains a second, plain implementation of the event
objective in float64, with the masks as weights in [0, 1] on either side.

Shapes: R student prefixes, C common boundaries, W and V teacher and student columns, E events.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from baselines import Shared, bpm, chunk_likelihood, strict, uld
from worlds import Boundary, Floats, Prefix, World, chunks

from persea.alignment.token_order import UNRESTRICTED_CONTEXT

# logit of a token that never follows: e^-60 changes no reported figure and keeps gradients finite
NOWHERE = -60.0

Mask: TypeAlias = Callable[[World, Boundary], tuple[Floats, Floats]]


def no_mask(world: World, b: Boundary) -> tuple[Floats, Floats]:
    return np.ones_like(b.p_W), np.ones_like(b.q_V)


def exact_mask(world: World, b: Boundary) -> tuple[Floats, Floats]:
    """Return 1 where some continuation keeps the other boundary, else 0: the best possible mask."""
    return (b.leak_W > 0).astype(float), (b.leak_V > 0).astype(float)


def exact_weights(world: World, b: Boundary) -> tuple[Floats, Floats]:
    """Return the probability that the other boundary is kept: exact conditioning."""
    return b.leak_W, b.leak_V


def persea_mask(world: World, b: Boundary) -> tuple[Floats, Floats]:
    """Return the mask that persea trains with (persea.alignment.boundary_mask).

    0 for tokens after which no text at all keeps the other boundary. Does not know the
    distribution.
    """
    bridge = world.full_event_map
    if bridge.teacher_mask is None or bridge.student_mask is None:
        return no_mask(world, b)
    found = []
    for mask, prefix, columns in (
        (bridge.teacher_mask, b.student, world.columns_W),
        (bridge.student_mask, b.teacher, world.columns_V),
    ):
        context = (
            mask.other.context_ids(np.array(prefix, np.int64), [len(prefix)])[0]
            if prefix
            else UNRESTRICTED_CONTEXT
        )
        found.append(1.0 - np.isin(columns, mask.impossible_tokens(int(context), columns)))
    return found[0], found[1]


@dataclass(frozen=True)
class Stack:
    """A world under one mask, as float64 tensors.

    mass_C, row_C  probability of each boundary, and the number of its student row
    p_CW, ok_CW, ok_CV  the teacher's rows; the masks
    both_CV        distribution of the next student token, given both boundaries (from the text)
    truth_RV, mass_R, rest_RV  the true rows, their probability, and the joint mass of a next token
        at positions without a common boundary
    events_W, events_V, events  the event map
    """

    mass_C: torch.Tensor
    row_C: torch.Tensor
    p_CW: torch.Tensor
    ok_CW: torch.Tensor
    ok_CV: torch.Tensor
    both_CV: torch.Tensor
    truth_RV: torch.Tensor
    mass_R: torch.Tensor
    rest_RV: torch.Tensor
    events_W: torch.Tensor
    events_V: torch.Tensor
    events: int
    number: dict[Prefix, int]

    @property
    def truth_logits(self) -> torch.Tensor:
        return torch.where(self.truth_RV > 0, self.truth_RV.clamp(min=1e-300).log(), NOWHERE)


def stack(world: World, mask: Mask) -> Stack:
    number = {prefix: r for r, prefix in enumerate(world.s.next)}
    both = world.boundaries
    ok = [mask(world, b) for b in both]

    def tensor(rows: list[Floats] | list[float]) -> torch.Tensor:
        return torch.from_numpy(np.array(rows, np.float64))

    truth_RV = tensor(list(world.truth_RV().values()))
    mass_R = tensor([world.s.mass[prefix] for prefix in number])
    mass_C, row_C = tensor([b.mass for b in both]), torch.tensor([number[b.student] for b in both])
    both_CV = tensor([b.both_q_V for b in both])
    rest_RV = (mass_R[:, None] * truth_RV).index_add(0, row_C, -mass_C[:, None] * both_CV)
    rest_RV = torch.where(
        rest_RV > 1e-15, rest_RV, 0.0
    )  # rounding error of a difference of equal sums
    events_W, events_V = (
        torch.from_numpy(x).long()
        for x in (world.event_map.teacher_event_W, world.event_map.student_event_V)
    )
    return Stack(
        mass_C,
        row_C,
        tensor([b.p_W for b in both]),
        tensor([w for w, _ in ok]),
        tensor([v for _, v in ok]),
        both_CV,
        truth_RV,
        mass_R,
        rest_RV,
        events_W,
        events_V,
        world.event_map.num_events,
        number,
    )


def byte_kl(s: Stack, logits_RV: torch.Tensor) -> float:
    """Return the KL of the byte distribution from the student's, nats per string.

    Probability on other spellings of a string counts as lost to it.
    """
    log_q = torch.log_softmax(logits_RV, -1)
    return float(
        (s.mass_R[:, None] * (torch.xlogy(s.truth_RV, s.truth_RV) - s.truth_RV * log_q)).sum()
    )


# --- objectives: expected loss of a table, nats a string ---

Objective: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


def event_masses(s: Stack, q_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each event the teacher's retained mass and the student's. [C, E]"""
    p_CE = torch.zeros(len(s.mass_C), s.events, dtype=torch.float64).index_add(
        1, s.events_W, s.p_CW * s.ok_CW
    )
    q_CE = torch.zeros(len(s.mass_C), s.events, dtype=torch.float64).index_add(
        1, s.events_V, q_CV * s.ok_CV
    )
    return p_CE, q_CE


def text(s: Stack, log_q_RV: torch.Tensor, weight_C: torch.Tensor) -> torch.Tensor:
    """Return cross-entropy: full where there is no common boundary, weight_C at the boundaries."""
    at_boundaries = (s.mass_C * weight_C * -(s.both_CV * log_q_RV[s.row_C]).sum(-1)).sum()
    return at_boundaries - (s.rest_RV * log_q_RV).sum()


def events(s: Stack, share: float = 0.7, renormalised: bool = False) -> Objective:
    """Return the event objective.

        share * sum_{w kept} p(w) * -log q(kept members of w's event)
        + (1 - share * M) * cross-entropy

    M is the teacher's retained mass; a token whose event has no kept student token is not kept. The
    student's members are restricted to the kept ones, but NOT renormalised: then the expected
    gradient at the truth is zero if masks and maps are exact. Renormalised (-log of q(kept members)
    / q(kept)), the masked tokens are counted twice by cross-entropy.
    """

    def of(logits_RV: torch.Tensor) -> torch.Tensor:
        log_q_RV = torch.log_softmax(logits_RV, -1)
        p_CE, q_CE = event_masses(s, log_q_RV.exp()[s.row_C])
        both_CE = (q_CE > 0) & (p_CE > 0)
        p_CE = torch.where(both_CE, p_CE, 0.0)
        kept_C = p_CE.sum(-1)
        loss_C = -(p_CE * torch.where(both_CE, q_CE, 1.0).log()).sum(-1)
        if renormalised:
            loss_C = loss_C + kept_C * torch.where(kept_C > 0, q_CE.sum(-1), 1.0).log()
        return (s.mass_C * share * loss_C).sum() + text(s, log_q_RV, 1 - share * kept_C)

    return of


def rowwise(
    s: Stack, divergence: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], share: float = 0.7
) -> Objective:
    """Compose a baseline (logits_CV, p_CW) -> [C] in the same way."""

    def of(logits_RV: torch.Tensor) -> torch.Tensor:
        loss_C = divergence(logits_RV[s.row_C], s.p_CW)
        return (s.mass_C * share * loss_C).sum() + text(
            s, torch.log_softmax(logits_RV, -1), torch.full_like(s.mass_C, 1 - share)
        )

    return of


def shared_columns(world: World) -> Shared:
    of_student = {b: v for v, b in enumerate(world.bytes_V())}
    pairs = [(w, of_student[b]) for w, b in enumerate(world.bytes_W()) if b in of_student]
    return Shared(torch.tensor([w for w, _ in pairs]), torch.tensor([v for _, v in pairs]))


def prefix_columns(world: World) -> torch.Tensor:
    """Return baselines.longest_prefix over columns."""
    of_student = {b: v for v, b in enumerate(world.bytes_V())}
    return torch.tensor(
        [
            of_student[None]
            if raw is None
            else next(of_student[raw[:n]] for n in range(len(raw), 0, -1) if raw[:n] in of_student)
            for raw in world.bytes_W()
        ]
    )


def baseline(s: Stack, world: World, name: str, share: float = 0.7) -> Objective:
    both, prefix = shared_columns(world), prefix_columns(world)
    divergence = {
        "strict": lambda x, p: strict(x, p, both),
        "uld": uld,
        "bpm": lambda x, p: bpm(x, p, prefix),
    }[name]
    return rowwise(s, divergence, share)


def chunk(
    s: Stack, world: World, *, temperature: float = 100.0, exact: bool = False, share: float = 0.7
) -> Objective:
    """Return baselines.chunk_likelihood over every chunk of every string.

    Plus (1 - share) cross-entropy everywhere. exact: debiased.
    """
    column = {int(i): v for v, i in enumerate(world.columns_V)}
    found: dict[tuple[int, int, Prefix, Prefix], float] = {}
    for c in chunks(world):
        key = (c.begin, c.end, c.teacher_ids, c.student_ids)
        found[key] = found.get(key, 0.0) + c.weight
    b_T, b_S = (
        torch.tensor(
            [getattr(b, name) for b in world.boundaries] + [1.0], dtype=torch.float64
        ).log()
        for name in ("b_T", "b_S")
    )
    keys = list(found)
    weight = torch.tensor([found[k] for k in keys], dtype=torch.float64)
    begin, end = torch.tensor([k[0] for k in keys]), torch.tensor([k[1] for k in keys])
    correction = (
        (b_T[end] - b_T[begin]) - (b_S[end] - b_S[begin]) if exact else torch.zeros_like(weight)
    )
    teacher: list[float] = []
    where: list[tuple[int, int, int]] = []  # student row, token, chunk
    for n, (at, _, ids_t, ids_s) in enumerate(keys):
        prefix_t, prefix_s = world.boundaries[at].teacher, world.boundaries[at].student
        teacher.append(math.log(world.t.mass[prefix_t + ids_t] / world.t.mass[prefix_t]))
        for k, i in enumerate(ids_s):
            where.append((s.number[prefix_s + ids_s[:k]], column[i], n))
    return _chunk(
        s,
        weight,
        torch.tensor(teacher, dtype=torch.float64),
        correction,
        torch.tensor(where),
        temperature,
        share,
    )


def _chunk(
    s: Stack,
    weight_C: torch.Tensor,
    teacher_C: torch.Tensor,
    correction_C: torch.Tensor,
    where_G3: torch.Tensor,
    temperature: float,
    share: float,
) -> Objective:
    row_G, token_G, chunk_G = where_G3.unbind(-1)

    def of(logits_RV: torch.Tensor) -> torch.Tensor:
        log_q_RV = torch.log_softmax(logits_RV, -1)
        student_C = torch.zeros_like(weight_C).index_add(0, chunk_G, log_q_RV[row_G, token_G])
        term = (
            weight_C
            * chunk_likelihood(
                student_C, teacher_C, temperature=temperature, correction_C=correction_C
            )
        ).sum()
        return share * term - (1 - share) * (s.mass_R[:, None] * s.truth_RV * log_q_RV).sum()

    return of


# --- what an objective does to a student ---


def gradient(objective: Objective, logits_RV: torch.Tensor) -> torch.Tensor:
    logits = logits_RV.clone().requires_grad_()
    (out,) = torch.autograd.grad(objective(logits), logits)
    return out


def push(objective: Objective, s: Stack) -> float:
    """Return the total |expected gradient| at the truth, nats per string: zero if unbiased."""
    return float(gradient(objective, s.truth_logits).abs().sum())


def descend(
    objective: Objective, s: Stack, logits_RV: torch.Tensor, steps: int = 100, rate: float = 0.1
) -> torch.Tensor:
    """Descend with momentum .9 and a step size that falls to zero.

    Each row has its own pace: its gradient over its probability.
    """
    logits, speed = logits_RV.clone(), torch.zeros_like(logits_RV)
    for k in range(steps):
        speed = 0.9 * speed - gradient(objective, logits) / s.mass_R[:, None]
        logits = logits + rate * (1 - k / steps) * speed
    return logits


def iterate(
    objective: Objective, s: Stack, logits_RV: torch.Tensor, steps: int = 80
) -> torch.Tensor:
    """Iterate q <- pull, for objectives whose gradient is q - pull with a distribution `pull`.

    Errors inside an event shrink by the share of events in each step, errors between events vanish
    at once.
    """
    logits = logits_RV.clone()
    for _ in range(steps):
        pull = torch.softmax(logits, -1) - gradient(objective, logits) / s.mass_R[:, None]
        if float(pull.min()) < -1e-9:
            raise ValueError(
                f"this objective pulls a token to {float(pull.min()):.3g}: it has no such iteration"
            )
        logits = torch.where(pull > 0, pull.clamp(min=1e-300).log(), NOWHERE).clamp(min=NOWHERE)
    return logits


def random_logits(s: Stack, seed: int) -> torch.Tensor:
    return torch.randn(
        s.truth_RV.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
