"""persea's debiased span likelihood term beside its event term.

Spans lie between two common boundaries and are not one token against one token. The term has its
own weight: event loss + weight x span loss. Impossible tokens at a boundary (whole vocabularies, by
persea's masks) are found once per context, the teacher's log-probability of every span once per
window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from bench.objectives.examples import Batch, Ints, Lesson
from bench.objectives.methods import Loss, Pair, Setting, boundary_contexts, targets_of
from persea.alignment.boundary_mask import BoundaryMask
from persea.losses import ImpossibleTokens, SpanTargets, event_kl_loss
from persea.losses import span_likelihood_loss as chunk_term

WEIGHTS = (0.01, 0.03, 0.1)


@dataclass(frozen=True)
class Stretches:
    """Spans of one window, in its own numbering. C spans.

    student_C2  student tokens of each; ends_C: whether it ends at a common boundary (else the
        window ends there)
    teacher_C   the teacher's log-probability, with its boundary corrections
    row_D, token_D  impossible student tokens at the boundaries that begin or end a span
    """

    student_C2: Ints
    ends_C: np.ndarray
    teacher_C: np.ndarray
    row_D: Ints
    token_D: Ints


DEAD: dict[tuple[int, int], Ints] = {}
KEPT: dict[int, Stretches] = {}


def dead(mask: BoundaryMask, context: int) -> Ints:
    """Return all impossible tokens of a context, computed once per context."""
    if (id(mask), context) not in DEAD:
        DEAD[id(mask), context] = mask.impossible_tokens(context)
    return DEAD[id(mask), context]


def stretches(one: Lesson, pair: Pair) -> Stretches:
    if id(one) in KEPT:
        return KEPT[id(one)]
    event_map = pair.event_map
    assert event_map.teacher_mask is not None and event_map.student_mask is not None
    s0, s1, t0, t1 = one.spans_C4.T
    mixed = (s1 - s0 != 1) | (t1 - t0 != 1)
    s0, s1, t0, t1 = s0[mixed], s1[mixed], t0[mixed], t1[mixed]
    teacher_of = dict(zip(one.student_C.tolist(), one.teacher_C.tolist(), strict=True))
    ends_C = np.array([int(s) in teacher_of for s in s1], bool)
    of_student, of_teacher = boundary_contexts(one, event_map)
    places = sorted({*s0.tolist(), *s1[ends_C].tolist()})
    beta = {}
    rows, tokens = [], []
    for s in places:
        impossible = dead(event_map.teacher_mask, int(of_student[s]))
        p_W = pair.teacher.logprobs(one.states_TD[teacher_of[s]][None])[0]
        beta[s] = float(torch.log1p(-p_W[torch.from_numpy(impossible)].exp().sum()))
        own = dead(event_map.student_mask, int(of_teacher[s]))
        rows.append(np.full(len(own), s))
        tokens.append(own)
    cumulative = np.concatenate([[0.0], np.cumsum(one.realised_T.double().numpy())])
    value = [
        cumulative[b] - cumulative[a] - beta[int(x)] + (beta[int(y)] if end else 0.0)
        for a, b, x, y, end in zip(t0, t1, s0, s1, ends_C, strict=True)
    ]
    empty = np.empty(0, np.int64)
    KEPT[id(one)] = Stretches(
        np.stack([s0, s1], 1),
        ends_C,
        np.array(value, np.float32),
        np.concatenate([empty, *rows]),
        np.concatenate([empty, *tokens]),
    )
    return KEPT[id(one)]


def gathered(batch: Batch, pairs: Mapping[str, Pair]) -> tuple[SpanTargets, ImpossibleTokens]:
    """Return the spans of a batch in the batch's numbering."""
    chunk_P, position_P, begin, end, teacher, row_D, token_D = [], [], [], [], [], [], []
    n = 0
    for group in batch.groups:
        for one, first in zip(group.examples, group.first_student, strict=True):
            own = stretches(one, pairs[group.who])
            sizes = own.student_C2[:, 1] - own.student_C2[:, 0]
            chunk_P.append(np.repeat(np.arange(n, n + len(sizes)), sizes))
            position_P.append(
                np.concatenate(
                    [np.empty(0, np.int64), *(np.arange(a, b) for a, b in own.student_C2)]
                )
                + first
            )
            begin.append(own.student_C2[:, 0] + first)
            end.append(np.where(own.ends_C, own.student_C2[:, 1] + first, -1))
            teacher.append(own.teacher_C)
            row_D.append(own.row_D + first)
            token_D.append(own.token_D)
            n += len(sizes)
    a, b, c, d, e, r, t = (
        torch.from_numpy(np.concatenate(x))
        for x in (chunk_P, position_P, begin, end, teacher, row_D, token_D)
    )
    return SpanTargets(a, b, c, d, e), ImpossibleTokens(r, t)


def with_chunks(weight: float) -> Loss:
    def loss(
        logits_NV: torch.Tensor, batch: Batch, pairs: Mapping[str, Pair], setting: Setting
    ) -> torch.Tensor:
        chunks, impossible = gathered(batch, pairs)
        events = event_kl_loss(
            logits_NV, batch.labels_N, targets_of(batch, pairs, setting), setting.share
        ).loss
        return events + weight * chunk_term(logits_NV, batch.labels_N, chunks, impossible).loss

    return loss


CHUNKED: dict[str, Callable[..., torch.Tensor]] = {
    f"events + masks + {w:g} chunk": with_chunks(w) for w in WEIGHTS
}
