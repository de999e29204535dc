"""Targets: what teachers say about learned positions, as sums over tokens the student can say.

Raw rows become Entries once (events by the bridge, without what cannot stand); Entries become Targets batch by batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from persea.alignment.boundary_mask import BoundaryMask
from persea.alignment.event_map import EventMap
from persea.alignment.token_order import UNRESTRICTED_CONTEXT
from persea.distributions import MASS_TOLERANCE, DistributionKind
from persea.errors import DataError


@dataclass(frozen=True)
class EventTargets:
    """What one teacher says at some positions, over events. M = entries, D = exceptions, R = rests.

    row_M, event_M, probs_M   position, event, natural probability; masked, never renormalised
    entry_D, token_D          student tokens of an entry's event that cannot stand where the teacher has its boundary
    row_R, rest_R             what rows of kind TOPK_REST do not name
    row_A, token_A            student tokens that a rest does not hold though no entry names them: they cannot stand, or their event was
                              named and dropped
    """

    row_M: npt.NDArray[np.int64]
    event_M: npt.NDArray[np.int64]
    probs_M: npt.NDArray[np.float32]
    impossible_entry_D: npt.NDArray[np.int64]
    impossible_token_D: npt.NDArray[np.int64]
    row_R: npt.NDArray[np.int64]
    rest_R: npt.NDArray[np.float32]
    excluded_row_A: npt.NDArray[np.int64]
    excluded_token_A: npt.NDArray[np.int64]
    kind: DistributionKind = DistributionKind.SAMPLED


@dataclass(frozen=True)
class BatchTargets:
    """What one teacher says about some of a batch's N learned positions. M = entries, G = student tokens of all entries.

    row_M      int64, which learned position (0..N-1) an entry belongs to
    probs_M    natural probabilities of the teacher, masked and never renormalised: those of a position sum to the mass kept
    entry_G    int64, which entry a student token belongs to: an entry is the event that any of its tokens is said
    token_G    int64, the token
    rest_N     natural probability of all that a row of kind TOPK_REST does not name; empty for the other kinds
    row_A, token_A  student tokens that are no part of the rest, beside those of the entries
    vocabulary student tokens V: logits must have as many columns
    kind       FULL, SAMPLED, TOPK_REST, or WORDS (no entries)
    """

    row_M: torch.Tensor
    probs_M: torch.Tensor
    entry_G: torch.Tensor
    token_G: torch.Tensor
    rest_N: torch.Tensor
    excluded_row_A: torch.Tensor
    excluded_token_A: torch.Tensor
    vocab_size: int
    kind: DistributionKind = DistributionKind.SAMPLED


def build_event_targets(
    event_map: EventMap,
    row_M: npt.NDArray[np.integer],
    ids_M: npt.NDArray[np.integer],
    probs_M: npt.NDArray[np.floating],
    *,
    student_context_N: npt.NDArray[np.integer] | None = None,
    teacher_context_N: npt.NDArray[np.integer] | None = None,
    kind: DistributionKind = DistributionKind.SAMPLED,
) -> EventTargets:
    """Raw teacher entries over events, and where contexts are given, without what cannot stand there.

    ids_M      raw teacher ids; those of control tokens without counterpart are dropped, their mass goes to the text
    student_N, teacher_N  by position, the contexts before it (`Keeper.contexts`); None = no masks
    A row of kind TOPK_REST names an event only where it names all of the event's teacher tokens; the others are in the rest.
    Raises DataError for ids out of range, and for probabilities that are none: negative, NaN, above 1, or, in rows that are exact, of a
    mass above 1 (a SAMPLED row is exact in the mean) or named twice.
    """
    _refuse_invalid_probs(row_M, ids_M, probs_M, kind)
    event_M = event_map.events_of_teacher_ids(ids_M)
    sizes_E = np.diff(event_map.tokens_by_event[0])
    if (sizes_E[event_M[event_M >= 0]] == 0).any():
        raise AssertionError(
            "an event without student tokens: every fixpoint is a token of both vocabularies"
        )
    row_R = np.unique(row_M) if kind is DistributionKind.TOPK else row_M[:0]
    if len(row_R):
        whole = _is_fully_named(event_map, row_M, event_M)
        row_M, ids_M, probs_M, event_M = row_M[whole], ids_M[whole], probs_M[whole], event_M[whole]
    named_R = (
        np.bincount(np.searchsorted(row_R, row_M), probs_M, minlength=len(row_R))
        if len(row_R)
        else np.empty(0)
    )
    stays = event_M >= 0
    if student_context_N is not None and event_map.teacher_mask is not None:
        stays &= ~_is_impossible(event_map.teacher_mask, student_context_N[row_M], ids_M)
    dropped = [(row_M[~stays & (event_M >= 0)], event_M[~stays & (event_M >= 0)])]
    row_M, event_M, probs_M = row_M[stays], event_M[stays], probs_M[stays]
    entry_D = token_D = np.empty(0, np.int64)
    if teacher_context_N is not None and event_map.student_mask is not None and len(event_M):
        entry_G, token_G = event_map.tokens_of_events(event_M)
        dead_G = _is_impossible(event_map.student_mask, teacher_context_N[row_M[entry_G]], token_G)
        # an event none of whose tokens can stand where the teacher has its boundary: the maps disagree here, its mass goes to the text
        said = np.bincount(entry_G, ~dead_G, minlength=len(event_M)) > 0
        dead_G &= said[entry_G]
        entry_D, token_D = (np.cumsum(said) - 1)[entry_G[dead_G]], token_G[dead_G]
        dropped.append((row_M[~said], event_M[~said]))
        row_M, event_M, probs_M = row_M[said], event_M[said], probs_M[said]
    row_A, token_A = (
        _excluded_from_rest(event_map, dropped, row_M[entry_D], token_D)
        if len(row_R)
        else (token_D[:0], token_D[:0])
    )
    rest_R = np.maximum(1 - named_R, 0)  # float32 sums of exact rows may pass 1 by 1e-6
    return EventTargets(
        row_M.astype(np.int64),
        event_M,
        probs_M.astype(np.float32),
        entry_D.astype(np.int64),
        token_D.astype(np.int64),
        row_R.astype(np.int64),
        rest_R.astype(np.float32),
        row_A.astype(np.int64),
        token_A.astype(np.int64),
        kind,
    )


def concat_event_targets(
    parts: Sequence[EventTargets], first_positions: Sequence[int]
) -> EventTargets:
    """Entries of several lessons as those of one batch. first_of: the number of each lesson's first position in the batch."""
    entries = np.cumsum([0, *(len(p.row_M) for p in parts)])
    shifted = [
        (
            p.row_M + n,
            p.event_M,
            p.probs_M,
            p.impossible_entry_D + m,
            p.impossible_token_D,
            p.row_R + n,
            p.rest_R,
            p.excluded_row_A + n,
            p.excluded_token_A,
        )
        for p, n, m in zip(parts, first_positions, entries[:-1].tolist(), strict=True)
    ]
    row, event, probs, entry, token, row_R, rest, row_A, token_A = (
        np.concatenate(column) for column in zip(*shifted, strict=True)
    )
    kinds = {p.kind for p in parts}
    if len(kinds) > 1:
        raise DataError(
            f"rows of kinds {', '.join(sorted(kinds))} from one teacher in one batch",
            where="losses",
            remedy="one capture of a teacher has one kind",
        )
    return EventTargets(row, event, probs, entry, token, row_R, rest, row_A, token_A, kinds.pop())


def build_batch_targets(
    event_map: EventMap, event_targets: EventTargets, num_tokens: int
) -> BatchTargets:
    """Entries as Targets of a batch with so many learned positions."""
    entry_G, token_G = event_map.tokens_of_events(event_targets.event_M)
    V = len(event_map.student_event_V)
    if len(event_targets.impossible_entry_D):
        lives_G = ~np.isin(
            entry_G * V + token_G,
            event_targets.impossible_entry_D * V + event_targets.impossible_token_D,
        )
        entry_G, token_G = entry_G[lives_G], token_G[lives_G]
    rest_N = np.zeros(num_tokens if event_targets.kind is DistributionKind.TOPK else 0, np.float32)
    rest_N[event_targets.row_R] = event_targets.rest_R
    columns = (
        event_targets.row_M,
        event_targets.probs_M,
        entry_G,
        token_G,
        rest_N,
        event_targets.excluded_row_A,
        event_targets.excluded_token_A,
    )
    row, probs, entry, token, rest, row_A, token_A = (
        torch.from_numpy(column) for column in columns
    )
    return BatchTargets(row, probs, entry, token, rest, row_A, token_A, V, event_targets.kind)


def split_targets(targets: BatchTargets, bounds: Sequence[int]) -> list[BatchTargets]:
    """Targets of a batch as those of consecutive positions bounds[k] .. bounds[k + 1]: entries sorted once, then cut."""
    order_M = targets.row_M.argsort(stable=True)
    row_M, probs_M = targets.row_M[order_M], targets.probs_M[order_M]
    entry_G = torch.empty_like(order_M).index_put(
        (order_M,), torch.arange(len(order_M), device=order_M.device)
    )[targets.entry_G]
    entry_G, order_G = entry_G.sort(stable=True)
    token_G = targets.token_G[order_G]
    row_A, order_A = targets.excluded_row_A.sort(stable=True)
    token_A = targets.excluded_token_A[order_A]
    edges = torch.tensor(bounds, device=row_M.device)
    at_M = torch.searchsorted(row_M, edges)
    at_G, at_A = (
        torch.searchsorted(entry_G, at_M).tolist(),
        torch.searchsorted(row_A, edges).tolist(),
    )
    parts = []
    for (begin, end), (m, m_end), (g, g_end), (a, a_end) in zip(
        *(pairwise(x) for x in (bounds, at_M.tolist(), at_G, at_A)), strict=True
    ):
        parts.append(
            BatchTargets(
                row_M[m:m_end] - begin,
                probs_M[m:m_end],
                entry_G[g:g_end] - m,
                token_G[g:g_end],
                targets.rest_N[begin:end],
                row_A[a:a_end] - begin,
                token_A[a:a_end],
                targets.vocab_size,
                targets.kind,
            )
        )
    return parts


def _excluded_from_rest(
    event_map: EventMap,
    dropped: Sequence[tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]]],
    row_D: npt.NDArray[np.integer],
    token_D: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(position, student token) of what was named and dropped: none of it is in the rest."""
    row_M, event_M = (np.concatenate(side) for side in zip(*dropped, strict=True))
    entry_G, token_G = event_map.tokens_of_events(event_M)
    return np.concatenate([row_M[entry_G], row_D]).astype(np.int64), np.concatenate(
        [token_G, token_D]
    )


def _is_fully_named(
    event_map: EventMap, row_M: npt.NDArray[np.integer], event_M: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Entries of events all of whose teacher tokens the row names, and of control tokens.

    Of any other event the rest holds a part: it belongs there whole, or it looks less likely than it is. What the rest holds of dead
    tokens nobody can tell; so a rest stays biased between tokenizers (tests/bench/test_worlds.py pins how far).
    """
    sizes = np.bincount(
        event_map.teacher_event_W[event_map.teacher_event_W >= 0], minlength=event_map.num_events
    )
    key, which, named = np.unique(
        row_M.astype(np.int64) * (event_map.num_events + 1) + event_M + 1,
        return_inverse=True,
        return_counts=True,
    )
    event = key % (event_map.num_events + 1) - 1
    whole: npt.NDArray[np.bool_] = ((event < 0) | (named == sizes[event]))[which]
    return whole


def _is_impossible(
    mask: BoundaryMask, context_P: npt.NDArray[np.integer], token_P: npt.NDArray[np.integer]
) -> npt.NDArray[np.bool_]:
    """Whether each of some tokens cannot stand in its context."""
    out = np.zeros(len(token_P), bool)
    order = np.argsort(context_P, kind="stable")
    begins = np.flatnonzero(np.diff(context_P[order], prepend=UNRESTRICTED_CONTEXT - 1))
    for begin, end in pairwise([*begins.tolist(), len(order)]):
        context = int(context_P[order[begin]])
        if context != UNRESTRICTED_CONTEXT:
            asked = token_P[order[begin:end]]
            out[order[begin:end]] = np.isin(
                asked, mask.impossible_tokens(context, np.unique(asked))
            )
    return out


def _refuse_invalid_probs(
    row_M: npt.NDArray[np.integer],
    ids_M: npt.NDArray[np.integer],
    probs_M: npt.NDArray[np.floating],
    kind: DistributionKind,
) -> None:
    if not len(probs_M):
        return
    bad = ~((probs_M >= 0) & (probs_M <= 1 + MASS_TOLERANCE))  # NaN too
    if bad.any():
        raise DataError(
            f"a teacher's probability is {float(probs_M[bad][0]):g}",
            where=f"position {int(row_M[bad][0])}",
            remedy="the rows are broken: capture again",
        )
    if kind in (DistributionKind.FULL, DistributionKind.TOPK):
        mass_N = np.bincount(row_M, probs_M.astype(np.float64))
        if mass_N.max() > 1 + MASS_TOLERANCE:
            raise DataError(
                f"a teacher's probabilities sum to {mass_N.max():.4f}",
                where=f"position {int(mass_N.argmax())}",
                remedy="rows of this kind are exact and never exceed 1: capture again",
            )
        _, times = np.unique(
            np.stack([row_M.astype(np.int64), ids_M.astype(np.int64)]), axis=1, return_counts=True
        )
        if times.max() > 1:
            raise DataError(
                "a row names a token twice",
                where=f"a row of kind {kind.value}",
                remedy="the rows are broken: capture again",
            )
