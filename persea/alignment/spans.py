"""Spans: two tokenizers laid over the same bytes. By bytes only, never by position, string or character.

A batch is laid over another in one pass: every conversation gets room of its own on one line of bytes, the same on both
sides, and one binary search over all of them finds for every student token the teacher token it begins in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from persea.errors import DataError
from persea.tokenization.tokens import RenderedTokens


class SupervisionKind(IntEnum):
    """By what a learned student token can be taught; the first that holds.

    EVENT       both begin a token there: one distribution over events against the other
    COMPLETION  it begins inside a teacher token that itself begins where both do: the teacher's row there, given the bytes
                said since, is its distribution
    CHUNK       it stands inside a span whose two ends are common: only the span's likelihood can be compared. A teacher
                token that begins where the student has no boundary speaks under a condition the student does not know
    TEXT        a marker, or bytes that the teacher's rendering lacks: cross-entropy alone
    """

    EVENT = 0
    PARTIAL_TOKEN = 1
    SPAN = 2
    TEXT = 3


@dataclass(frozen=True)
class CommonBoundaries:
    """Where both tokenizers begin a learned token at the same byte. C = common boundaries, in byte order.

    student_C, teacher_C  index of the token that begins there, in each rendering; the distribution over it is what can be
                          compared. The token that ends the turn begins at the content's end, and meets its like alone.
    """

    student_C: npt.NDArray[np.int64]
    teacher_C: npt.NDArray[np.int64]


@dataclass(frozen=True)
class AlignedSpans:
    """Half-open token ranges that cover the SAME bytes; together they tile the learned content from the first common
    boundary on, but for what only one family kept (a trimmed rim, a thought, what a cap cut off) and the span it stands in.
    C = spans.

    student_C2, teacher_C2  int64
    """

    student_C2: npt.NDArray[np.int64]
    teacher_C2: npt.NDArray[np.int64]

    @property
    def num_one_to_one(self) -> int:
        """Spans of one student and one teacher token."""
        return int(np.sum((np.diff(self.student_C2) == 1) & (np.diff(self.teacher_C2) == 1)))


@dataclass(frozen=True)
class PartialTokens:
    """Student tokens that begin inside a teacher token. I = such tokens, in byte order.

    student_I, teacher_I  the token, and the teacher token that covers its first byte
    said_I                bytes of the teacher token that stand before it, at least 1
    common_I              whether the teacher token begins where the student begins one too (Taught.COMPLETION)
    """

    student_I: npt.NDArray[np.int64]
    teacher_I: npt.NDArray[np.int64]
    prefix_len_I: npt.NDArray[np.int64]
    at_common_boundary_I: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Alignment:
    """B conversations, each in two voices, laid over each other. Tokens are counted through the batch laid end to end.

    student_B1, teacher_B1  where each conversation's tokens begin: token k of conversation b is student_B1[b] + k
    taught_S                int8, a `Taught` for every learned student token, -1 for the others
    """

    student_offsets_B1: npt.NDArray[np.int64]
    teacher_offsets_B1: npt.NDArray[np.int64]
    boundaries: CommonBoundaries
    spans: AlignedSpans
    partial_tokens: PartialTokens
    supervision_S: npt.NDArray[np.int8]


@dataclass(frozen=True)
class _ContentTokens:
    """Learned tokens that begin at a content byte, of all conversations. L = such tokens.

    begin_L, end_L  the bytes they cover, on one line for all conversations
    place_L  twice the first byte, and one more for the token that ends a turn: the other family may have kept a space that this
             one trimmed, and a space is not a stop. They rise strictly, so a binary search does
    last_L   one past the last such token of the same conversation
    gaps_L   how many holes there are before it: a range has none inside where its two ends agree on that
    """

    offsets_B1: npt.NDArray[np.int64]
    loss_mask_T: npt.NDArray[np.bool_]
    index_L: npt.NDArray[np.int64]
    begin_L: npt.NDArray[np.int64]
    end_L: npt.NDArray[np.int64]
    sort_key_L: npt.NDArray[np.int64]
    conversation_end_L: npt.NDArray[np.int64]
    gap_count_L: npt.NDArray[np.int64]


def common_boundaries(student: RenderedTokens, teacher: RenderedTokens) -> CommonBoundaries:
    """Common boundaries of two renderings of one conversation."""
    return align([student], [teacher]).boundaries


def aligned_spans(student: RenderedTokens, teacher: RenderedTokens) -> AlignedSpans:
    """From common boundary to common boundary. The stop token is a span of its own; markers between parts end one."""
    return align([student], [teacher]).spans


def align(students: Sequence[RenderedTokens], teachers: Sequence[RenderedTokens]) -> Alignment:
    """Lay renderings of the same conversations over each other, in order.

    Raises DataError where the numbers of renderings differ, or one side's tokens overlap: those are no renderings.
    """
    if len(students) != len(teachers):
        raise DataError(
            f"{len(students)} renderings of the student against {len(teachers)} of the teacher",
            where="align",
            remedy="give both sides the same conversations",
        )
    laid = _concatenate_renderings(students), _concatenate_renderings(teachers)
    rooms_B = _byte_offsets(*laid)
    s, t = (_content_tokens(*side, rooms_B) for side in laid)
    under_L = (
        np.searchsorted(t.sort_key_L, s.sort_key_L, side="right") - 1
    )  # the last teacher token that begins no later
    known_L = under_L >= 0
    under_L[~known_L] = 0
    if not len(t.index_L):
        return _empty_alignment(s, t)
    common_L = known_L & (t.sort_key_L[under_L] == s.sort_key_L)
    inside_L = (
        known_L & ~common_L & (s.begin_L < t.end_L[under_L]) & (s.begin_L < s.end_L)
    )  # a stop is inside nothing
    at_C, to_C = np.flatnonzero(common_L), under_L[common_L]
    pieces, spanned_L = _find_spans(s, t, at_C, to_C)
    met_L = np.zeros(len(t.index_L), np.bool_)
    met_L[to_C] = True
    in_I = np.flatnonzero(inside_L)
    over_I = under_L[in_I]
    inside = PartialTokens(
        s.index_L[in_I], t.index_L[over_I], s.begin_L[in_I] - t.begin_L[over_I], met_L[over_I]
    )
    taught_L = np.where(spanned_L, SupervisionKind.SPAN, SupervisionKind.TEXT).astype(np.int8)
    taught_L[in_I[inside.at_common_boundary_I]] = SupervisionKind.PARTIAL_TOKEN
    taught_L[at_C] = SupervisionKind.EVENT
    return Alignment(
        s.offsets_B1,
        t.offsets_B1,
        CommonBoundaries(s.index_L[at_C], t.index_L[to_C]),
        pieces,
        inside,
        _supervision_of_all_tokens(s, taught_L),
    )


def _empty_alignment(s: _ContentTokens, t: _ContentTokens) -> Alignment:
    none, none_2 = np.empty(0, np.int64), np.empty((0, 2), np.int64)
    taught_L = np.full(len(s.index_L), SupervisionKind.TEXT, np.int8)
    return Alignment(
        s.offsets_B1,
        t.offsets_B1,
        CommonBoundaries(none, none),
        AlignedSpans(none_2, none_2),
        PartialTokens(none, none, none, none.astype(np.bool_)),
        _supervision_of_all_tokens(s, taught_L),
    )


def _supervision_of_all_tokens(
    s: _ContentTokens, supervision_L: npt.NDArray[np.int8]
) -> npt.NDArray[np.int8]:
    taught_S = np.where(s.loss_mask_T, SupervisionKind.TEXT, -1).astype(np.int8)
    taught_S[s.index_L] = supervision_L
    return taught_S


def _concatenate_renderings(
    renderings: Sequence[RenderedTokens],
) -> tuple[RenderedTokens, npt.NDArray[np.int64]]:
    """Renderings as one, and where each begins in it."""
    columns = (
        np.concatenate([np.empty(0, kind), *(getattr(r, name) for r in renderings)])
        for name, kind in (
            ("ids_T", np.int32),
            ("starts_T", np.int32),
            ("ends_T", np.int32),
            ("loss_mask_T", np.bool_),
        )
    )
    return RenderedTokens(*columns), np.concatenate(
        [[0], np.cumsum([len(r.ids_T) for r in renderings])]
    ).astype(np.int64)


def _byte_offsets(*sides: tuple[RenderedTokens, npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """First byte of each conversation's room, with a byte free between two. Where a rendering is empty its room is the next one's size."""
    sizes = [
        np.maximum.reduceat(np.append(tokens.ends_T, 0), offsets_B1[:-1])
        for tokens, offsets_B1 in sides
        if len(offsets_B1) > 1
    ]
    rooms_B: npt.NDArray[np.int64] = (
        np.maximum.reduce(sizes, axis=0).astype(np.int64).clip(0) + 1
        if sizes
        else np.empty(0, np.int64)
    )
    return np.cumsum(rooms_B) - rooms_B


def _content_tokens(
    tokens: RenderedTokens, offsets_B1: npt.NDArray[np.int64], byte_offsets_B: npt.NDArray[np.int64]
) -> _ContentTokens:
    index_L = np.flatnonzero(tokens.loss_mask_T & (tokens.starts_T >= 0))
    counts_B1 = np.searchsorted(index_L, offsets_B1)
    sizes_B = np.diff(counts_B1)
    room_L = np.repeat(byte_offsets_B, sizes_B)
    begin_L, end_L = tokens.starts_T[index_L] + room_L, tokens.ends_T[index_L] + room_L
    place_L = 2 * begin_L + (begin_L == end_L)
    if (place_L[1:] <= place_L[:-1]).any():
        raise DataError(
            "two tokens begin at the same byte, or in the wrong order",
            where="align",
            remedy="align renderings of a voice",
        )
    gaps_L = np.cumsum(np.concatenate([[False], begin_L[1:] != end_L[:-1]])[: len(index_L)])
    return _ContentTokens(
        offsets_B1,
        tokens.loss_mask_T,
        index_L,
        begin_L,
        end_L,
        place_L,
        np.repeat(counts_B1[1:], sizes_B),
        gaps_L,
    )


def _find_spans(
    s: _ContentTokens, t: _ContentTokens, at_C: npt.NDArray[np.int64], to_C: npt.NDArray[np.int64]
) -> tuple[AlignedSpans, npt.NDArray[np.bool_]]:
    """Spans, and which student tokens stand in one. A range that one side does not fill without a hole, or that ends elsewhere on the
    other side, is none: what it covers is not the same bytes.
    """
    last_s, last_t = _last_token_of_span(s, at_C), _last_token_of_span(t, to_C)
    end_s, end_t = (
        s.end_L[last_s] * 2 + s.sort_key_L[last_s] % 2,
        t.end_L[last_t] * 2 + t.sort_key_L[last_t] % 2,
    )
    whole = (
        (s.gap_count_L[last_s] == s.gap_count_L[at_C])
        & (t.gap_count_L[last_t] == t.gap_count_L[to_C])
        & (end_s == end_t)
    )
    edges = np.zeros(len(s.index_L) + 1, np.int64)
    edges[at_C[whole]] += 1
    edges[last_s[whole] + 1] -= 1
    pieces = AlignedSpans(
        *(
            np.stack([side.index_L[first[whole]], side.index_L[last[whole]] + 1], axis=1)
            for side, first, last in ((s, at_C, last_s), (t, to_C, last_t))
        )
    )
    return pieces, np.cumsum(edges)[:-1].astype(np.bool_)


def _last_token_of_span(
    side: _ContentTokens, first_C: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Last token of the span that begins with each: before the next span, and of the same conversation."""
    last_C: npt.NDArray[np.int64] = (
        np.minimum(np.append(first_C[1:], len(side.index_L)), side.conversation_end_L[first_C]) - 1
    )
    return last_C
