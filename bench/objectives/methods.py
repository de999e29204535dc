"""The methods: student logits and a batch -> one scalar, all composed alike so that every learned position carries weight one.

At the positions where a method speaks: share x its divergence + (1 - share) x cross-entropy; full cross-entropy elsewhere. What a
method may see is its own affair: baselines get the teacher's whole rows, which favours them; persea's rows are named in `rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F

from bench import baselines
from bench.objectives.lessons import Batch, Group, Lesson, Teacher, sampled
from bench.objectives.vocabularies import Speaker
from persea.bridge import Bridge, build
from persea.losses import Targets, composed

TEMPERATURE = 100.0  # of the chunk likelihood, as published


@dataclass(frozen=True)
class Pair:
    """One teacher and the student: all that any method needs to know of the two."""

    teacher: Teacher
    student: Speaker

    @cached_property
    def bridge(self) -> Bridge:
        return build(self.teacher.speaker.voice, self.student.voice)

    @cached_property
    def shared(self) -> baselines.Shared:
        return baselines.shared(self.teacher.speaker.voice, self.student.voice)

    @cached_property
    def prefix_W(self) -> torch.Tensor:
        return baselines.longest_prefix(self.teacher.speaker.voice, self.student.voice)

    @cached_property
    def events(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Event of each teacher token and of each student token; the tokens left out share one more event, cut off afterwards."""
        sides = (self.bridge.teacher_event_W, self.bridge.student_event_V)
        teacher, student = (torch.from_numpy(np.where(side < 0, self.bridge.events, side)).long() for side in sides)
        return teacher, student


@dataclass(frozen=True)
class Setting:
    """What a run's loss is: method, rows ('full', 'sampled .01', 'top-k 16', 'top-k 16 renormalised') and share."""

    method: str
    rows: str
    share: float


Loss: TypeAlias = Callable[[torch.Tensor, Batch, Mapping[str, Pair], Setting], torch.Tensor]


def mixed(logits_NV: torch.Tensor, batch: Batch, said: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], share: float) -> torch.Tensor:
    """(row_C, mass_C, divergence_C) of each teacher -> mean over all positions of share D + (1 - share M) cross-entropy."""
    loss_N = F.cross_entropy(logits_NV, batch.targets_N, reduction="none")
    for row_C, mass_C, divergence_C in said:
        loss_N = loss_N.index_add(0, row_C, share * (divergence_C - mass_C * loss_N[row_C]))
    return loss_N.mean()


def cross_entropy(logits_NV: torch.Tensor, batch: Batch, pairs: Mapping[str, Pair], setting: Setting) -> torch.Tensor:
    return F.cross_entropy(logits_NV, batch.targets_N)


# ---- baselines, on the teacher's whole rows --------------------------------------------------------------------------


def one_to_one(group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions where one student token stands against one teacher token."""
    s0, s1, t0, t1 = group.spans_C4.T
    same = (s1 - s0 == 1) & (t1 - t0 == 1)
    return s0[same], t0[same]


def rowwise(divergence: Callable[[torch.Tensor, torch.Tensor, Pair], torch.Tensor], places: Callable[[Group], tuple[torch.Tensor, torch.Tensor]]
            ) -> Loss:
    """A baseline that compares one student row with one teacher row."""
    def loss(logits_NV: torch.Tensor, batch: Batch, pairs: Mapping[str, Pair], setting: Setting) -> torch.Tensor:
        said = []
        for group in batch.groups:
            pair = pairs[group.who]
            row_C, at_C = places(group)
            with torch.no_grad():
                probs_CW = pair.teacher.logprobs(group.states_TD[at_C]).exp()
            said.append((row_C, torch.ones(len(row_C)), divergence(logits_NV[row_C], probs_CW, pair)))
        return mixed(logits_NV, batch, said, setting.share)
    return loss


def common(group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    return group.row_C, group.at_C


def chunk(logits_NV: torch.Tensor, batch: Batch, pairs: Mapping[str, Pair], setting: Setting) -> torch.Tensor:
    """Plain chunk likelihood (ALM) of every span: one divergence a span, times the temperature, so that its gradient is of order one;
    its positions keep (1 - share) cross-entropy."""
    ce_N = F.cross_entropy(logits_NV, batch.targets_N, reduction="none")
    total_N = ce_N
    for group in batch.groups:
        s0, s1, t0, t1 = group.spans_C4.T
        chunk_N, inside = numbered(s0, s1, len(ce_N))
        student_C = torch.zeros(len(s0)).index_add(0, chunk_N[inside], -ce_N[inside])
        chunk_T, known = numbered(t0, t1, len(group.realised_T))
        teacher_C = torch.zeros(len(t0)).index_add(0, chunk_T[known], group.realised_T[known])
        divergence_C = TEMPERATURE * baselines.chunk_likelihood(student_C, teacher_C, temperature=TEMPERATURE)
        total_N = total_N - setting.share * torch.where(inside, ce_N, 0.0)
        total_N = total_N.index_add(0, s0, setting.share * divergence_C)
    return total_N.mean()


def numbered(first_C: torch.Tensor, last_C: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The span each of n tokens is in, and whether it is in any."""
    out = torch.full((n,), -1)
    sizes = last_C - first_C
    which = torch.repeat_interleave(torch.arange(len(first_C)), sizes)
    out[torch.repeat_interleave(first_C, sizes) + torch.arange(len(which)) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)] = which
    return out, out >= 0


# ---- events ----------------------------------------------------------------------------------------------------------


def events_full(logits_NV: torch.Tensor, batch: Batch, pairs: Mapping[str, Pair], setting: Setting) -> torch.Tensor:
    """persea.losses.composed on whole rows, written densely: an [N, E] table is cheaper than N x W entries (tests hold the two equal)."""
    said = []
    for group in batch.groups:
        pair = pairs[group.who]
        event_W, event_V = pair.events
        with torch.no_grad():
            probs_CW = pair.teacher.logprobs(group.states_TD[group.at_C]).exp()
            p_CE = summed(probs_CW, event_W, pair.bridge.events)
        q_CE = summed(torch.softmax(logits_NV[group.row_C], -1), event_V, pair.bridge.events)
        log_q_CE = torch.log(q_CE.clamp_min(torch.finfo(q_CE.dtype).tiny))  # an event of probability below 1e-38 counts as 1e-38
        said.append((group.row_C, p_CE.sum(-1), -(p_CE * log_q_CE).sum(-1)))
    return mixed(logits_NV, batch, said, setting.share)


def summed(values_NW: torch.Tensor, event_W: torch.Tensor, events: int) -> torch.Tensor:
    return torch.zeros(len(values_NW), events + 1).index_add(1, event_W, values_NW)[:, :events]


def targets(group: Group, pair: Pair, rows: str) -> Targets:
    """The teacher's sparse rows at the common boundaries, as persea's losses take them."""
    kind, value = rows.split()[:2]
    if kind == "sampled":
        tables = [sparse(one, pair, float(value)) for one in group.lessons]
        row_M, ids_M, probs_M = (np.concatenate([t[k] for t in tables]) for k in range(3))
        row_M = row_M + np.repeat(group.first_student, [len(t[0]) for t in tables])
        return Targets(pair.bridge, torch.from_numpy(row_M), torch.from_numpy(ids_M).long(), torch.from_numpy(probs_M))
    k = len(pair.teacher.speaker.vocabulary) if value == "all" else int(value)
    with torch.no_grad():
        top = pair.teacher.logprobs(group.states_TD[group.at_C]).exp().topk(k, -1)
    probs_CK = top.values / top.values.sum(-1, keepdim=True) if rows.endswith("renormalised") else top.values
    return Targets(pair.bridge, torch.repeat_interleave(group.row_C, k), top.indices.reshape(-1), probs_CK.reshape(-1))


KEPT: dict[tuple[int, float], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}  # a window's rows are drawn once, as a capture keeps them


def sparse(one: Lesson, pair: Pair, tau: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(student token, teacher id, probability) of each entry at a common boundary."""
    if (id(one), tau) not in KEPT:
        rows = sampled(one, pair.teacher, tau)
        begins, ends = rows.offsets_N1[one.teacher_C], rows.offsets_N1[one.teacher_C + 1]
        at_M = np.concatenate([np.arange(a, b) for a, b in zip(begins, ends, strict=True)])
        KEPT[id(one), tau] = (np.repeat(one.student_C, ends - begins), rows.ids_M[at_M], rows.probs_M[at_M])
    return KEPT[id(one), tau]


def drawn(batch: Batch, pairs: Mapping[str, Pair], tau: float) -> None:
    """Draws the rows of a batch that are not drawn yet."""
    for group in batch.groups:
        for one in group.lessons:
            sparse(one, pairs[group.who], tau)


def events_sparse(logits_NV: torch.Tensor, batch: Batch, pairs: Mapping[str, Pair], setting: Setting) -> torch.Tensor:
    """persea's own objective on persea's own rows."""
    said = [targets(group, pairs[group.who], setting.rows) for group in batch.groups]
    return composed(logits_NV, batch.targets_N, said, setting.share).loss


def events(logits_NV: torch.Tensor, batch: Batch, pairs: Mapping[str, Pair], setting: Setting) -> torch.Tensor:
    return (events_full if setting.rows == "full" else events_sparse)(logits_NV, batch, pairs, setting)


METHODS: dict[str, Loss] = {
    "cross-entropy": cross_entropy,
    "sft": cross_entropy,  # on text the teacher wrote: see arms.windows_for
    "strict": rowwise(lambda logits, probs, pair: baselines.strict(logits, probs, pair.shared), one_to_one),
    "strict everywhere": rowwise(lambda logits, probs, pair: baselines.strict(logits, probs, pair.shared), common),
    "uld": rowwise(lambda logits, probs, pair: baselines.uld(logits, probs), common),
    "bpm": rowwise(lambda logits, probs, pair: baselines.bpm(logits, probs, pair.prefix_W), common),
    "chunk": chunk,
    "events": events,
}
