"""The methods: student logits and a batch -> one scalar, all composed alike.

Every supervised position has weight one: at positions where a method applies, share x its
divergence + (1 - share) x cross-entropy; full cross-entropy elsewhere. Each method sees the teacher
data that it needs: baselines get the teacher's whole distributions, which favours them; persea's
formats are named in `rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from bench import baselines
from bench.objectives.examples import Batch, Group, Ints, Lesson, Teacher, sampled
from bench.objectives.vocabularies import Speaker
from persea.alignment.event_map import EventMap, load_event_map
from persea.alignment.partial_tokens import (
    PartialTokenProjector,
    make_partial_token_projector,
    token_prefixes,
)
from persea.alignment.spans import align
from persea.alignment.token_order import UNRESTRICTED_CONTEXT
from persea.distributions import DistributionKind, SparseDistributions
from persea.losses import (
    BatchTargets,
    EventTargets,
    build_batch_targets,
    build_event_targets,
    concat_event_targets,
    event_kl_loss,
)

TEMPERATURE = 100.0  # of the chunk likelihood, as published


@dataclass(frozen=True)
class Pair:
    """One teacher and the student, with the tables that a method needs of both."""

    teacher: Teacher
    student: Speaker

    @cached_property
    def event_map(self) -> EventMap:
        return load_event_map(self.teacher.speaker.renderer, self.student.renderer)

    @cached_property
    def completer(self) -> PartialTokenProjector:
        found = make_partial_token_projector(self.event_map)
        assert found is not None, "two different tokenizers"
        return found

    @cached_property
    def shared(self) -> baselines.Shared:
        return baselines.shared(self.teacher.speaker.renderer, self.student.renderer)

    @cached_property
    def prefix_W(self) -> torch.Tensor:
        return baselines.longest_prefix(self.teacher.speaker.renderer, self.student.renderer)

    @cached_property
    def events(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Event of each teacher token and of each student token.

        Tokens without an event share one extra event, which is cut off afterwards.
        """
        sides = (self.event_map.teacher_event_W, self.event_map.student_event_V)
        teacher, student = (
            torch.from_numpy(np.where(side < 0, self.event_map.num_events, side)).long()
            for side in sides
        )
        return teacher, student


@dataclass(frozen=True)
class Setting:
    """The loss of a run: method, share, and rows.

    rows: 'full', 'sampled .01', 'top-k 16', 'top-k 16 renormalised'.
    """

    method: str
    rows: str
    share: float


Loss: TypeAlias = Callable[[torch.Tensor, Batch, Mapping[str, Pair], Setting], torch.Tensor]


def mixed(
    logits_NV: torch.Tensor,
    batch: Batch,
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    share: float,
) -> torch.Tensor:
    """Return the mean over all positions of share D + (1 - share M) cross-entropy.

    Each teacher gives (row_C, mass_C, divergence_C).
    """
    loss_N = F.cross_entropy(logits_NV, batch.labels_N, reduction="none")
    for row_C, mass_C, divergence_C in parts:
        loss_N = loss_N.index_add(0, row_C, share * (divergence_C - mass_C * loss_N[row_C]))
    return loss_N.mean()


def cross_entropy(
    logits_NV: torch.Tensor, batch: Batch, pairs: Mapping[str, Pair], setting: Setting
) -> torch.Tensor:
    return F.cross_entropy(logits_NV, batch.labels_N)


# --- baselines, on the teacher's whole rows ---


def one_to_one(group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions where one student token matches one teacher token."""
    s0, s1, t0, t1 = group.spans_C4.T
    same = (s1 - s0 == 1) & (t1 - t0 == 1)
    return s0[same], t0[same]


def rowwise(
    divergence: Callable[[torch.Tensor, torch.Tensor, Pair], torch.Tensor],
    places: Callable[[Group], tuple[torch.Tensor, torch.Tensor]],
) -> Loss:
    """Return a baseline that compares one student row with one teacher row."""

    def loss(
        logits_NV: torch.Tensor, batch: Batch, pairs: Mapping[str, Pair], setting: Setting
    ) -> torch.Tensor:
        parts = []
        for group in batch.groups:
            pair = pairs[group.who]
            row_C, at_C = places(group)
            with torch.no_grad():
                probs_CW = pair.teacher.logprobs(group.states_TD[at_C]).exp()
            parts.append(
                (row_C, torch.ones(len(row_C)), divergence(logits_NV[row_C], probs_CW, pair))
            )
        return mixed(logits_NV, batch, parts, setting.share)

    return loss


def common(group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    return group.row_C, group.at_C


def chunk(
    logits_NV: torch.Tensor, batch: Batch, pairs: Mapping[str, Pair], setting: Setting
) -> torch.Tensor:
    """Return plain chunk likelihood (ALM) of every span.

    One divergence per span, times the temperature, so that its gradient is of order one; its
    positions keep (1 - share) cross-entropy.
    """
    ce_N = F.cross_entropy(logits_NV, batch.labels_N, reduction="none")
    total_N = ce_N
    for group in batch.groups:
        s0, s1, t0, t1 = group.spans_C4.T
        chunk_N, inside = numbered(s0, s1, len(ce_N))
        student_C = torch.zeros(len(s0)).index_add(0, chunk_N[inside], -ce_N[inside])
        chunk_T, known = numbered(t0, t1, len(group.realised_T))
        teacher_C = torch.zeros(len(t0)).index_add(0, chunk_T[known], group.realised_T[known])
        divergence_C = TEMPERATURE * baselines.chunk_likelihood(
            student_C, teacher_C, temperature=TEMPERATURE
        )
        total_N = total_N - setting.share * torch.where(inside, ce_N, 0.0)
        total_N = total_N.index_add(0, s0, setting.share * divergence_C)
    return total_N.mean()


def numbered(
    first_C: torch.Tensor, last_C: torch.Tensor, n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the span of each of n tokens, and whether the token is in any."""
    out = torch.full((n,), -1)
    sizes = last_C - first_C
    which = torch.repeat_interleave(torch.arange(len(first_C)), sizes)
    out[
        torch.repeat_interleave(first_C, sizes)
        + torch.arange(len(which))
        - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    ] = which
    return out, out >= 0


# --- events ---


def events_full(
    logits_NV: torch.Tensor, batch: Batch, pairs: Mapping[str, Pair], setting: Setting
) -> torch.Tensor:
    """Return event_kl_loss on whole rows, written densely.

    An [N, E] table is cheaper than N x W entries; tests hold both equal.
    """
    parts = []
    for group in batch.groups:
        pair = pairs[group.who]
        event_W, event_V = pair.events
        with torch.no_grad():
            probs_CW = pair.teacher.logprobs(group.states_TD[group.at_C]).exp()
            p_CE = summed(probs_CW, event_W, pair.event_map.num_events)
        q_CE = summed(torch.softmax(logits_NV[group.row_C], -1), event_V, pair.event_map.num_events)
        log_q_CE = torch.log(
            q_CE.clamp_min(torch.finfo(q_CE.dtype).tiny)
        )  # an event of probability below 1e-38 counts as 1e-38
        parts.append((group.row_C, p_CE.sum(-1), -(p_CE * log_q_CE).sum(-1)))
    return mixed(logits_NV, batch, parts, setting.share)


def summed(values_NW: torch.Tensor, event_W: torch.Tensor, events: int) -> torch.Tensor:
    return torch.zeros(len(values_NW), events + 1).index_add(1, event_W, values_NW)[:, :events]


KEPT: dict[
    tuple[str, str, bool, bool], EventTargets
] = {}  # entries of a window are sampled once, as in a capture


def entries(
    one: Lesson, pair: Pair, rows: str, masked: bool, completed: bool = False
) -> EventTargets:
    """Return a window's rows over events, as persea.training.dataset builds them.

    Positions are the window's student tokens, at common boundaries. completed: also inside a
    teacher token that starts at a common boundary.
    """
    key = (one.window.text, rows, masked, completed)
    if key not in KEPT:
        if completed:
            KEPT[key] = concat_event_targets(
                [entries(one, pair, rows, masked), inside(one, pair, rows)], [0, 0]
            )
        else:
            places, ids_M, probs_M, kind = raw(one, pair, rows)
            contexts = boundary_contexts(one, pair.event_map) if masked else (None, None)
            KEPT[key] = build_event_targets(
                pair.event_map,
                one.student_C[places],
                ids_M,
                probs_M,
                student_context_N=contexts[0],
                teacher_context_N=contexts[1],
                kind=kind,
            )
    return KEPT[key]


def inside(one: Lesson, pair: Pair, rows: str) -> EventTargets:
    """Return partial-token targets: a row restricted to the rest of its teacher token."""
    places, ids_M, probs_M, kind = raw(one, pair, rows)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(places, minlength=len(one.teacher_C)))])
    drawn = SparseDistributions(
        offsets, ids_M.astype(np.int32), probs_M, np.zeros(len(offsets) - 1, np.float32), kind
    )
    found = align(one.student, one.spoken).partial_tokens
    at_I, in_I, said_I = (
        side[found.at_common_boundary_I]
        for side in (found.student_I, found.teacher_I, found.prefix_len_I)
    )
    completer = pair.completer
    bytes_I = token_prefixes(completer.teacher_order.vocabulary, one.spoken.ids_T[in_I], said_I)
    row_I = np.searchsorted(one.teacher_C, in_I)
    more = completer.project(
        drawn,
        row_I,
        bytes_I,
        np.array(completer.student_order.context_ids(one.student.ids_T, at_I.tolist()), np.int64),
    )
    none = np.empty(0, np.int64)
    return EventTargets(
        at_I[more.student_index_M],
        more.event_M,
        more.probs_M,
        more.entry_D,
        more.token_D,
        none,
        none.astype(np.float32),
        none,
        none,
        kind,
    )


def open_kept(path: Path) -> None:
    """Load masked entries of an earlier process: they take longer than a run."""
    if path.is_file():
        KEPT.update(torch.load(path, weights_only=False))


def keep(path: Path) -> None:
    masked = {key: parts for key, parts in KEPT.items() if key[2]}
    torch.save(masked, path)


def raw(
    one: Lesson, pair: Pair, rows: str
) -> tuple[Ints, Ints, npt.NDArray[np.float32], DistributionKind]:
    """Return boundary index, teacher id and probability of each entry."""
    kind, value = rows.split()[:2]
    if kind == "sampled":
        drawn = sampled(one, pair.teacher, float(value))
        begins, ends = drawn.offsets_N1[one.teacher_C], drawn.offsets_N1[one.teacher_C + 1]
        at_M = np.concatenate([np.arange(a, b) for a, b in zip(begins, ends, strict=True)])
        return (
            np.repeat(np.arange(len(begins)), ends - begins),
            drawn.ids_M[at_M].astype(np.int64),
            drawn.probs_M[at_M],
            DistributionKind.SAMPLED,
        )
    k = len(pair.teacher.speaker.vocabulary) if value == "all" else int(value)
    with torch.no_grad():
        top = (
            pair.teacher.logprobs(one.states_TD[torch.from_numpy(one.teacher_C)]).exp().topk(k, -1)
        )
    probs_CK = (
        top.values / top.values.sum(-1, keepdim=True)
        if rows.endswith("renormalised")
        else top.values
    )
    of_kind = (
        DistributionKind.TOPK
        if value != "all" and not rows.endswith("renormalised")
        else DistributionKind.FULL
    )
    return (
        np.repeat(np.arange(len(top.values)), k),
        top.indices.reshape(-1).numpy(),
        probs_CK.reshape(-1).numpy(),
        of_kind,
    )


def boundary_contexts(one: Lesson, event_map: EventMap) -> tuple[Ints, Ints]:
    """Return, by student token, the context of each tokenizer's boundary there."""
    found = []
    for mask, ids_T, at_C in (
        (event_map.teacher_mask, one.student.ids_T, one.student_C),
        (event_map.student_mask, one.spoken.ids_T, one.teacher_C),
    ):
        assert mask is not None, "two different tokenizers"
        of_N = np.full(len(one.student), UNRESTRICTED_CONTEXT, np.int64)
        of_N[one.student_C] = mask.other.context_ids(ids_T, at_C.tolist())
        found.append(of_N)
    return found[0], found[1]


def prepare(batch: Batch, pairs: Mapping[str, Pair], setting: Setting) -> None:
    """Sample and mask the batch's missing rows, which a capture and a dataset do before a step."""
    if setting.rows in ("none", "full"):
        return
    for group in batch.groups:
        for one in group.examples:
            entries(
                one,
                pairs[group.who],
                setting.rows,
                "masks" in setting.method,
                "completion" in setting.method,
            )


def targets_of(batch: Batch, pairs: Mapping[str, Pair], setting: Setting) -> list[BatchTargets]:
    out = []
    for group in batch.groups:
        parts = [
            entries(
                one,
                pairs[group.who],
                setting.rows,
                "masks" in setting.method,
                "completion" in setting.method,
            )
            for one in group.examples
        ]
        out.append(
            build_batch_targets(
                pairs[group.who].event_map,
                concat_event_targets(parts, group.first_student),
                len(batch.labels_N),
            )
        )
    return out


def events_sparse(
    logits_NV: torch.Tensor, batch: Batch, pairs: Mapping[str, Pair], setting: Setting
) -> torch.Tensor:
    """Return persea's own objective on persea's own rows."""
    return event_kl_loss(
        logits_NV, batch.labels_N, targets_of(batch, pairs, setting), setting.share
    ).loss


def events(
    logits_NV: torch.Tensor, batch: Batch, pairs: Mapping[str, Pair], setting: Setting
) -> torch.Tensor:
    return (events_full if setting.rows == "full" else events_sparse)(
        logits_NV, batch, pairs, setting
    )


METHODS: dict[str, Loss] = {
    "cross-entropy": cross_entropy,
    "sft": cross_entropy,  # on text sampled from the teacher: see arms.World.teacher_text
    "strict": rowwise(
        lambda logits, probs, pair: baselines.strict(logits, probs, pair.shared), one_to_one
    ),
    "strict everywhere": rowwise(
        lambda logits, probs, pair: baselines.strict(logits, probs, pair.shared), common
    ),
    "uld": rowwise(lambda logits, probs, pair: baselines.uld(logits, probs), common),
    "bpm": rowwise(lambda logits, probs, pair: baselines.bpm(logits, probs, pair.prefix_W), common),
    "chunk": chunk,
    "events": events,
    "events + masks": events_sparse,
    "events + completion": events_sparse,
    "events + masks + completion": events_sparse,
}
