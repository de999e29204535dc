"""Targets of a teacher at supervised positions, as sums over student tokens.

`EventTargets` are made once for an example: the teacher's sparse distributions over events, without
impossible tokens. `BatchTargets` are the same for a batch, as tensors of student tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from persea.alignment.event_map import EventMap
from persea.distributions import MASS_TOLERANCE, DistributionKind
from persea.errors import DataError


@dataclass(frozen=True)
class EventTargets:
    """Distributions of one teacher over events at some positions.

    M = entries, D = impossible student tokens of entries, R = positions with a rest, A = student
    tokens excluded from a rest.

    Attributes:
        row_M: position of each entry.
        event_M: event of each entry.
        probs_M: natural probability; masked, never renormalised.
        impossible_entry_D: entry whose event holds an impossible student token.
        impossible_token_D: the student token that cannot follow the teacher's boundary.
        row_R: position with a rest (kind TOPK).
        rest_R: probability that the distribution does not name.
        excluded_row_A: position of a student token that the rest does not hold.
        excluded_token_A: the token: no entry names it, but it is impossible, or its event was named
            and dropped.
        kind: kind of the teacher's distributions.
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
    """Targets of one teacher at some of a batch's N supervised positions.

    M = entries, G = student tokens of all entries, A = student tokens excluded from a rest.

    Attributes:
        row_M: int64, supervised position (0..N-1) of each entry.
        probs_M: natural probability of each entry, masked and never renormalised: the entries of a
            position sum to the retained mass.
        entry_G: int64, entry of each student token: an entry is the event that any of its tokens
            comes next.
        token_G: int64, the student token.
        rest_N: probability that a distribution of kind TOPK does not name; empty for other kinds.
        excluded_row_A: int64, position of a token that is no part of the rest, besides the tokens
            of the entries.
        excluded_token_A: int64, the token.
        vocab_size: number of student tokens V; logits must have as many columns.
        kind: FULL, SAMPLED, TOPK, or TEXT_ONLY (no entries).
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

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BatchTargets:
        """Return a copy whose tensors are on a device."""
        moved = {
            name: side.to(device, non_blocking=non_blocking)
            for name, side in vars(self).items()
            if isinstance(side, torch.Tensor)
        }
        return BatchTargets(**(vars(self) | moved))


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
    """Map a teacher's sparse distributions to events and drop impossible tokens.

    A distribution of kind TOPK names an event only if it names all teacher tokens of the event;
    otherwise the event is part of the rest.

    Args:
        event_map: event of each token of both vocabularies.
        row_M: position of each entry.
        ids_M: teacher token of each entry. Control tokens without an event are dropped, and their
            mass goes to the cross-entropy.
        probs_M: natural probability of each entry.
        student_context_N: context id before each position in the student's tokens
            (`TokenOrder.supervised_context_ids`), which decides the impossible teacher tokens; None
            = no masks.
        teacher_context_N: context id in the teacher's tokens, which decides the impossible student
            tokens; None = no masks.
        kind: kind of the distributions.

    Raises:
        DataError: for ids out of range and for invalid probabilities: negative, NaN, above 1, or,
            for exact distributions, a mass above 1 (a SAMPLED distribution is exact only in the
            mean) or a token named twice.
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
        whole = is_fully_named(event_map, row_M, event_M)
        row_M, ids_M, probs_M, event_M = row_M[whole], ids_M[whole], probs_M[whole], event_M[whole]
    named_R = (
        np.bincount(np.searchsorted(row_R, row_M), probs_M, minlength=len(row_R))
        if len(row_R)
        else np.empty(0)
    )
    keep_M = event_M >= 0
    if student_context_N is not None and event_map.teacher_mask is not None:
        keep_M &= ~event_map.teacher_mask.are_impossible(student_context_N[row_M], ids_M)
    dropped = [(row_M[~keep_M & (event_M >= 0)], event_M[~keep_M & (event_M >= 0)])]
    row_M, event_M, probs_M = row_M[keep_M], event_M[keep_M], probs_M[keep_M]
    entry_D = token_D = np.empty(0, np.int64)
    if teacher_context_N is not None and event_map.student_mask is not None and len(event_M):
        entry_G, token_G = event_map.tokens_of_events(event_M)
        impossible_G = event_map.student_mask.are_impossible(
            teacher_context_N[row_M[entry_G]], token_G
        )
        # An event none of whose student tokens can follow the teacher's boundary: the event maps
        # disagree here, and the mass goes to the cross-entropy.
        possible_M = np.bincount(entry_G, ~impossible_G, minlength=len(event_M)) > 0
        impossible_G &= possible_M[entry_G]
        entry_D = (np.cumsum(possible_M) - 1)[entry_G[impossible_G]]
        token_D = token_G[impossible_G]
        dropped.append((row_M[~possible_M], event_M[~possible_M]))
        row_M, event_M, probs_M = row_M[possible_M], event_M[possible_M], probs_M[possible_M]
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
    """Concatenate the targets of several examples.

    Args:
        parts: targets of each example, of one teacher.
        first_positions: number of each example's first supervised position in the batch.

    Raises:
        DataError: if the examples have distributions of different kinds.
    """
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
            f"distributions of kinds {', '.join(sorted(kinds))} from one teacher in one batch",
            where="losses",
            remedy="use one capture of each teacher; a capture has one kind",
        )
    return EventTargets(row, event, probs, entry, token, row_R, rest, row_A, token_A, kinds.pop())


def build_batch_targets(
    event_map: EventMap, event_targets: EventTargets, num_tokens: int
) -> BatchTargets:
    """Turn targets over events into tensors over student tokens.

    Args:
        event_map: event of each token of both vocabularies.
        event_targets: targets whose positions are numbered through the batch.
        num_tokens: number of supervised positions N of the batch.
    """
    entry_G, token_G = event_map.tokens_of_events(event_targets.event_M)
    V = len(event_map.student_event_V)
    if len(event_targets.impossible_entry_D):
        possible_G = ~np.isin(
            entry_G * V + token_G,
            event_targets.impossible_entry_D * V + event_targets.impossible_token_D,
        )
        entry_G, token_G = entry_G[possible_G], token_G[possible_G]
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
    """Split targets at positions: part k covers positions bounds[k] to bounds[k + 1]."""
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
    """Return (position, student token) of named and dropped events: the rest holds none of them."""
    row_M, event_M = (np.concatenate(side) for side in zip(*dropped, strict=True))
    entry_G, token_G = event_map.tokens_of_events(event_M)
    return np.concatenate([row_M[entry_G], row_D]).astype(np.int64), np.concatenate(
        [token_G, token_D]
    )


def is_fully_named(
    event_map: EventMap, row_M: npt.NDArray[np.integer], event_M: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Return whether all teacher tokens of an entry's event are named; true for control tokens.

    The rest holds a part of every other event. Such an event belongs to the rest as a whole, or the
    event would look less probable than it is. How much of the rest belongs to impossible tokens is
    unknown, so a rest is biased between tokenizers (tests/bench/test_worlds.py measures how much).
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
    is_whole_M: npt.NDArray[np.bool_] = ((event < 0) | (named == sizes[event]))[which]
    return is_whole_M


def _refuse_invalid_probs(
    row_M: npt.NDArray[np.integer],
    ids_M: npt.NDArray[np.integer],
    probs_M: npt.NDArray[np.floating],
    kind: DistributionKind,
) -> None:
    """Raise DataError for probabilities that are no distribution of this kind."""
    if not len(probs_M):
        return
    bad = ~((probs_M >= 0) & (probs_M <= 1 + MASS_TOLERANCE))  # NaN too
    if bad.any():
        raise DataError(
            f"a teacher's probability is {float(probs_M[bad][0]):g}",
            where=f"position {int(row_M[bad][0])}",
            remedy="the cached distributions are corrupt: capture again",
        )
    if kind in (DistributionKind.FULL, DistributionKind.TOPK):
        mass_N = np.bincount(row_M, probs_M.astype(np.float64))
        if mass_N.max() > 1 + MASS_TOLERANCE:
            raise DataError(
                f"a teacher's probabilities sum to {mass_N.max():.4f}",
                where=f"position {int(mass_N.argmax())}",
                remedy="distributions of this kind are exact and never exceed 1: capture again",
            )
        _, times = np.unique(
            np.stack([row_M.astype(np.int64), ids_M.astype(np.int64)]), axis=1, return_counts=True
        )
        if times.max() > 1:
            raise DataError(
                "a distribution names a token twice",
                where=f"a distribution of kind {kind.value}",
                remedy="the cached distributions are corrupt: capture again",
            )
