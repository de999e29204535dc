"""Align two tokenizations of the same bytes: common boundaries, spans, partial tokens.

Only byte positions are compared, never token positions, strings or characters. A batch is aligned
in one pass: each conversation gets its own stretch of one line of bytes, the same on both sides,
and one binary search over all of them finds for every student token the teacher token that covers
its first byte.
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
    """How a supervised student token can be taught: the first kind that applies.

    EVENT: both sides begin a token there, so their distributions over events are compared.
    PARTIAL_TOKEN: it begins inside a teacher token that begins at a common boundary. The teacher's
        distribution there, given the bytes since, is its target.
    SPAN: it is inside a span whose two ends are common boundaries, so only the likelihoods of the
        span can be compared. (A teacher token that begins where the student has no boundary
        conditions on something that the student does not know.)
    TEXT: a marker, or bytes that the teacher's rendering lacks: cross-entropy alone.
    """

    EVENT = 0
    PARTIAL_TOKEN = 1
    SPAN = 2
    TEXT = 3


@dataclass(frozen=True)
class CommonBoundaries:
    """Bytes at which both tokenizers begin a supervised token. C = common boundaries, in order.

    Attributes:
        student_C: int64, index of the student token that begins there. The distributions over the
            tokens that begin at a common boundary can be compared.
        teacher_C: int64, index of the teacher token that begins there. The token that ends the turn
            begins at the content's end and corresponds to the other end-of-turn token alone.
    """

    student_C: npt.NDArray[np.int64]
    teacher_C: npt.NDArray[np.int64]


@dataclass(frozen=True)
class AlignedSpans:
    """Half-open token ranges that cover the same bytes on both sides. C = spans, in order.

    Together they tile the supervised content from the first common boundary on, except for bytes
    that only one rendering has (trimmed white space, a thought, text that a length limit cut off)
    and the span around them.

    Attributes:
        student_C2: int64, (first, last + 1) of the student's tokens.
        teacher_C2: int64, (first, last + 1) of the teacher's tokens.
    """

    student_C2: npt.NDArray[np.int64]
    teacher_C2: npt.NDArray[np.int64]

    @property
    def num_one_to_one(self) -> int:
        """Number of spans of one student token and one teacher token."""
        return int(np.sum((np.diff(self.student_C2) == 1) & (np.diff(self.teacher_C2) == 1)))


@dataclass(frozen=True)
class PartialTokens:
    """Student tokens that begin inside a teacher token. I = such tokens, in order.

    Attributes:
        student_I: int64, index of the student token.
        teacher_I: int64, index of the teacher token that covers its first byte.
        prefix_len_I: int64, bytes of the teacher token before it, at least 1.
        at_common_boundary_I: bool, whether the teacher token begins at a common boundary
            (`SupervisionKind.PARTIAL_TOKEN`).
    """

    student_I: npt.NDArray[np.int64]
    teacher_I: npt.NDArray[np.int64]
    prefix_len_I: npt.NDArray[np.int64]
    at_common_boundary_I: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Alignment:
    """Two renderings of each of B conversations, aligned. Token indices count through the batch.

    Attributes:
        student_offsets_B1: int64, index of each conversation's first token: token k of conversation
            b is student_offsets_B1[b] + k.
        teacher_offsets_B1: int64, the same for the teacher.
        boundaries: Common boundaries.
        spans: Spans between them.
        partial_tokens: Student tokens inside teacher tokens.
        supervision_S: int8, `SupervisionKind` of each student token; -1 = not supervised.
    """

    student_offsets_B1: npt.NDArray[np.int64]
    teacher_offsets_B1: npt.NDArray[np.int64]
    boundaries: CommonBoundaries
    spans: AlignedSpans
    partial_tokens: PartialTokens
    supervision_S: npt.NDArray[np.int8]


@dataclass(frozen=True)
class _ContentTokens:
    """Supervised tokens with bytes of content, of all conversations. L = such tokens.

    Attributes:
        offsets_B1: Index of each conversation's first token.
        loss_mask_T: Supervised tokens.
        index_L: Index of each content token.
        begin_L, end_L: Bytes that it covers, on one line for all conversations.
        sort_key_L: Twice the first byte, plus one for the token that ends a turn: the other
            rendering may have kept a space that this one trimmed, and a space is not a stop token.
            Strictly increasing, for binary search.
        conversation_end_L: One past the last content token of the same conversation.
        gap_count_L: Number of gaps before it. A range has no gap if its two ends agree on that.
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
    """Return the common boundaries of two renderings of one conversation."""
    return align(student, teacher).boundaries


def aligned_spans(student: RenderedTokens, teacher: RenderedTokens) -> AlignedSpans:
    """Return the spans between common boundaries of two renderings of one conversation.

    The stop token is a span of its own, and markers between parts end a span.
    """
    return align(student, teacher).spans


def align(student: RenderedTokens, teacher: RenderedTokens) -> Alignment:
    """Align two renderings of one conversation.

    Args:
        student: The conversation rendered for the student.
        teacher: The same conversation rendered for the teacher.

    Returns:
        The alignment; token indices are those of the renderings.

    Raises:
        DataError: The tokens of one side overlap, so they are not a rendering.

    Example:
        >>> import persea
        >>> from persea.chat.messages import Text
        >>> student = persea.load_renderer("saplings/llama-sapling")
        >>> teacher = persea.load_renderer("saplings/qwen-sapling")
        >>> question = persea.Conversation.from_question("What is the capital of France?")
        >>> conversation = question.with_answer(Text("The capital is Paris."))
        >>> alignment = persea.align(student.render(conversation), teacher.render(conversation))
        >>> boundaries = alignment.boundaries
        >>> len(boundaries.student_C) == len(boundaries.teacher_C) > 0
        True
        >>> len(alignment.spans.student_C2) == len(boundaries.student_C)
        True
    """
    return align_batch([student], [teacher])


def align_batch(
    students: Sequence[RenderedTokens], teachers: Sequence[RenderedTokens]
) -> Alignment:
    """Align the renderings of several conversations in one pass.

    Args:
        students: B conversations rendered for the student.
        teachers: The same conversations rendered for the teacher, in the same order.

    Returns:
        The alignment; token indices count through the concatenated renderings.

    Raises:
        DataError: The numbers of renderings differ, or the tokens of one side overlap.
    """
    if len(students) != len(teachers):
        raise DataError(
            f"{len(students)} renderings of the student against {len(teachers)} of the teacher",
            where="align",
            remedy="give both sides the same conversations",
        )
    sides = _concatenate_renderings(students), _concatenate_renderings(teachers)
    byte_offsets_B = _byte_offsets(*sides)
    s, t = (_content_tokens(*side, byte_offsets_B) for side in sides)
    if not len(t.index_L):
        return _empty_alignment(s, t)
    # the last teacher token that begins no later than each student token
    covering_L = np.searchsorted(t.sort_key_L, s.sort_key_L, side="right") - 1
    has_covering_L = covering_L >= 0
    covering_L[~has_covering_L] = 0
    is_common_L = has_covering_L & (t.sort_key_L[covering_L] == s.sort_key_L)
    is_inside_L = (
        has_covering_L
        & ~is_common_L
        & (s.begin_L < t.end_L[covering_L])
        & (s.begin_L < s.end_L)  # a stop token has no bytes and is inside no token
    )
    student_C, teacher_C = np.flatnonzero(is_common_L), covering_L[is_common_L]
    spans, in_span_L = _find_spans(s, t, student_C, teacher_C)
    teacher_common_L = np.zeros(len(t.index_L), np.bool_)
    teacher_common_L[teacher_C] = True
    student_I = np.flatnonzero(is_inside_L)
    teacher_I = covering_L[student_I]
    partial_tokens = PartialTokens(
        s.index_L[student_I],
        t.index_L[teacher_I],
        s.begin_L[student_I] - t.begin_L[teacher_I],
        teacher_common_L[teacher_I],
    )
    supervision_L = np.where(in_span_L, SupervisionKind.SPAN, SupervisionKind.TEXT).astype(np.int8)
    supervision_L[student_I[partial_tokens.at_common_boundary_I]] = SupervisionKind.PARTIAL_TOKEN
    supervision_L[student_C] = SupervisionKind.EVENT
    return Alignment(
        s.offsets_B1,
        t.offsets_B1,
        CommonBoundaries(s.index_L[student_C], t.index_L[teacher_C]),
        spans,
        partial_tokens,
        _supervision_of_all_tokens(s, supervision_L),
    )


def _empty_alignment(s: _ContentTokens, t: _ContentTokens) -> Alignment:
    none, none_2 = np.empty(0, np.int64), np.empty((0, 2), np.int64)
    supervision_L = np.full(len(s.index_L), SupervisionKind.TEXT, np.int8)
    return Alignment(
        s.offsets_B1,
        t.offsets_B1,
        CommonBoundaries(none, none),
        AlignedSpans(none_2, none_2),
        PartialTokens(none, none, none, none.astype(np.bool_)),
        _supervision_of_all_tokens(s, supervision_L),
    )


def _supervision_of_all_tokens(
    s: _ContentTokens, supervision_L: npt.NDArray[np.int8]
) -> npt.NDArray[np.int8]:
    supervision_S = np.where(s.loss_mask_T, SupervisionKind.TEXT, -1).astype(np.int8)
    supervision_S[s.index_L] = supervision_L
    return supervision_S


def _concatenate_renderings(
    renderings: Sequence[RenderedTokens],
) -> tuple[RenderedTokens, npt.NDArray[np.int64]]:
    """Return the renderings as one, and the index of each one's first token in it."""
    columns = (
        np.concatenate([np.empty(0, dtype), *(getattr(r, name) for r in renderings)])
        for name, dtype in (
            ("ids_T", np.int32),
            ("starts_T", np.int32),
            ("ends_T", np.int32),
            ("loss_mask_T", np.bool_),
        )
    )
    offsets_B1 = np.concatenate([[0], np.cumsum([len(r.ids_T) for r in renderings])])
    return RenderedTokens(*columns), offsets_B1.astype(np.int64)


def _byte_offsets(*sides: tuple[RenderedTokens, npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Return the first byte of each conversation on the common line, with a free byte between two.

    Where a rendering is empty, `reduceat` gives the size of the next one, which is enough.
    """
    sizes = [
        np.maximum.reduceat(np.append(tokens.ends_T, 0), offsets_B1[:-1])
        for tokens, offsets_B1 in sides
        if len(offsets_B1) > 1
    ]
    if not sizes:
        return np.empty(0, np.int64)
    sizes_B: npt.NDArray[np.int64] = np.maximum.reduce(sizes, axis=0).astype(np.int64).clip(0) + 1
    return np.cumsum(sizes_B) - sizes_B


def _content_tokens(
    tokens: RenderedTokens, offsets_B1: npt.NDArray[np.int64], byte_offsets_B: npt.NDArray[np.int64]
) -> _ContentTokens:
    index_L = np.flatnonzero(tokens.loss_mask_T & (tokens.starts_T >= 0))
    counts_B1 = np.searchsorted(index_L, offsets_B1)
    sizes_B = np.diff(counts_B1)
    byte_offset_L = np.repeat(byte_offsets_B, sizes_B)
    begin_L = tokens.starts_T[index_L] + byte_offset_L
    end_L = tokens.ends_T[index_L] + byte_offset_L
    sort_key_L = 2 * begin_L + (begin_L == end_L)
    if (sort_key_L[1:] <= sort_key_L[:-1]).any():
        raise DataError(
            "two tokens begin at the same byte, or in the wrong order",
            where="align",
            remedy="align renderings of a ChatRenderer",
        )
    is_gap_L = np.concatenate([[False], begin_L[1:] != end_L[:-1]])[: len(index_L)]
    return _ContentTokens(
        offsets_B1,
        tokens.loss_mask_T,
        index_L,
        begin_L,
        end_L,
        sort_key_L,
        np.repeat(counts_B1[1:], sizes_B),
        np.cumsum(is_gap_L),
    )


def _find_spans(
    s: _ContentTokens,
    t: _ContentTokens,
    student_C: npt.NDArray[np.int64],
    teacher_C: npt.NDArray[np.int64],
) -> tuple[AlignedSpans, npt.NDArray[np.bool_]]:
    """Return the spans, and which student tokens are in one.

    A range with a gap on one side, or with another end on the other side, is not a span: its two
    sides cover different bytes.
    """
    last_s, last_t = _last_token_of_span(s, student_C), _last_token_of_span(t, teacher_C)
    end_s, end_t = (
        s.end_L[last_s] * 2 + s.sort_key_L[last_s] % 2,
        t.end_L[last_t] * 2 + t.sort_key_L[last_t] % 2,
    )
    is_span_C = (
        (s.gap_count_L[last_s] == s.gap_count_L[student_C])
        & (t.gap_count_L[last_t] == t.gap_count_L[teacher_C])
        & (end_s == end_t)
    )
    edges = np.zeros(len(s.index_L) + 1, np.int64)
    edges[student_C[is_span_C]] += 1
    edges[last_s[is_span_C] + 1] -= 1
    spans = AlignedSpans(
        *(
            np.stack([side.index_L[first[is_span_C]], side.index_L[last[is_span_C]] + 1], axis=1)
            for side, first, last in ((s, student_C, last_s), (t, teacher_C, last_t))
        )
    )
    return spans, np.cumsum(edges)[:-1].astype(np.bool_)


def _last_token_of_span(
    side: _ContentTokens, first_C: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return the last token before the next common boundary, in the same conversation."""
    last_C: npt.NDArray[np.int64] = (
        np.minimum(np.append(first_C[1:], len(side.index_L)), side.conversation_end_L[first_C]) - 1
    )
    return last_C
