"""Runs of marker tokens in two renderings of one answer, and which runs correspond.

Marker tokens have no bytes of content: the ends of a thought, the frame of a tool call. They differ
between chat templates and share no event, but mean the same: one part ends here, another begins.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from persea.alignment.spans import CommonBoundaries, align
from persea.tokenization.tokens import IntArray, RenderedTokens

START_OF_ANSWER = -2  # position of the markers that an answer begins with


def align_marker_runs(
    student: RenderedTokens, teacher: RenderedTokens
) -> tuple[IntArray, IntArray]:
    """Find corresponding stretches around runs of markers.

    A stretch is the shortest one around a run that begins and ends at the same bytes on both sides.
    It has at most one run on each side, and content follows it. Content must follow because one
    side's markers may be nothing on the other: gpt-oss marks the kind of an answer's part (text,
    tool call) by a channel, the student by its first word. A run at the end was cut off and is left
    out. A token that content and template share (the full stop and newline after a thought) counts
    as part of a run.

    Args:
        student: Rendering of the student.
        teacher: Rendering of the same conversation by the teacher.

    Returns:
        (student's, teacher's) half-open ranges of token indices, int64 (N, 2) each.
    """
    student_runs, student_begins = _marker_runs(student)
    teacher_runs, teacher_begins = _marker_runs(teacher)
    common = sorted(student_begins.keys() & teacher_begins.keys())
    found = set[tuple[int, int, int, int]]()
    for before, after in {*student_runs, *teacher_runs}:
        touching = [
            run for run in (*student_runs, *teacher_runs) if run[0] < after and before < run[1]
        ]
        begins, ends = min(run[0] for run in touching), max(run[1] for run in touching)
        first = max((p for p in common if p <= begins), default=None)
        last = min((p for p in common if p > ends), default=max(common, default=None))
        if (
            first is None
            or last is None
            or last < ends
            or student_begins[last] <= student_begins[first]
            or teacher_begins[last] <= teacher_begins[first]
        ):
            continue
        if all(
            sum(first <= run[0] < last for run in runs) <= 1
            for runs in (student_runs, teacher_runs)
        ):
            found.add(
                (
                    student_begins[first],
                    student_begins[last],
                    teacher_begins[first],
                    teacher_begins[last],
                )
            )
    ranges = np.array(sorted(found), np.int64).reshape(-1, 4)
    return ranges[:, :2], ranges[:, 2:]


def boundaries_not_after_markers(
    student: RenderedTokens, teacher: RenderedTokens
) -> CommonBoundaries:
    """Return the common boundaries that do not follow a run of markers on either side."""
    found = align(student, teacher).boundaries
    free_C = ~is_after_markers(student, found.student_C, teacher, found.teacher_C)
    return CommonBoundaries(found.student_C[free_C], found.teacher_C[free_C])


def is_after_markers(
    student: RenderedTokens,
    student_index_C: IntArray,
    teacher: RenderedTokens,
    teacher_index_C: IntArray,
) -> npt.NDArray[np.bool_]:
    """Return which boundaries follow a run of markers on either side.

    There one side may already have chosen the next part (text, a tool call, a thought) and the
    other not, so the distribution of the one does not describe the other's choice.

    Args:
        student: Rendering of the student.
        student_index_C: Its token that begins at each boundary.
        teacher: Rendering of the teacher.
        teacher_index_C: Its token that begins at each boundary.

    Returns:
        bool C.
    """
    return np.logical_or(
        *(
            (at_X > 0) & tokens.loss_mask_T[at_X - 1] & (tokens.starts_T[at_X - 1] < 0)
            for tokens, at_X in ((student, student_index_C), (teacher, teacher_index_C))
        )
    )


def _marker_runs(tokens: RenderedTokens) -> tuple[list[tuple[int, int]], dict[int, int]]:
    """Return the runs of markers and the token that begins at each position.

    A position is twice a byte, plus one for the stop token, which begins at the same byte as the
    content's end.

    Returns:
        (position before, position after) of each run, and position -> index of the content token or
        the first marker of a run that begins there.
    """
    supervised = np.flatnonzero(tokens.loss_mask_T)
    starts_L = tokens.starts_T[supervised].astype(np.int64)
    ends_L = tokens.ends_T[supervised].astype(np.int64)
    position_L = 2 * starts_L + (starts_L == ends_L)
    edges = np.flatnonzero(
        np.diff(np.concatenate([[False], starts_L < 0, [False]]).astype(np.int8))
    ).reshape(-1, 2)
    runs = [
        (2 * int(ends_L[a - 1]) if a else START_OF_ANSWER, int(position_L[b]))
        for a, b in edges.tolist()
        if b < len(supervised)
    ]
    has_bytes_L = starts_L >= 0
    content = {
        int(position): int(token)
        for position, token in zip(position_L[has_bytes_L], supervised[has_bytes_L], strict=True)
    }
    first_markers = {
        before: int(supervised[a])
        for (before, _), (a, _) in zip(runs, edges.tolist(), strict=False)
    }
    return runs, {START_OF_ANSWER: int(supervised[0])} | content | first_markers
