"""Runs of tokens without bytes (a thought's ends, a call's frame) in two renderings of one answer: where one side's lie beside the other's.

They are other tokens in every template and have no event in common, but they say the same: here this part ends and that one begins.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from persea.alignment.spans import CommonBoundaries, align
from persea.tokenization.tokens import RenderedTokens

IntArray = npt.NDArray[np.int64]


def align_marker_runs(
    student: RenderedTokens, teacher: RenderedTokens
) -> tuple[IntArray, IntArray]:
    """The shortest stretches around runs of learned tokens without bytes that begin and end at the same bytes on both sides, with at most one
    run in them on each and, where there is any, some content behind it: (student's, teacher's) half-open ranges of tokens.

    Content behind, because one side's markers may be nothing on the other: what an answer begins with (text, a call) gpt-oss says by a channel,
    the student by its first word. A token that content and template share (the full stop and newline behind a thought) counts as one of a
    run. A run that nothing follows was cut off, and says nothing yet.
    """
    (mine, begin_s), (others, begin_t) = (_marker_runs(side) for side in (student, teacher))
    common, found = sorted(begin_s.keys() & begin_t.keys()), set[tuple[int, int, int, int]]()
    for before, after in {*mine, *others}:
        beside = [run for run in (*mine, *others) if run[0] < after and before < run[1]]
        begins, ends = min(run[0] for run in beside), max(run[1] for run in beside)
        first = max((place for place in common if place <= begins), default=None)
        last = min((place for place in common if place > ends), default=max(common, default=None))
        if (
            first is None
            or last is None
            or last < ends
            or begin_s[last] <= begin_s[first]
            or begin_t[last] <= begin_t[first]
        ):
            continue
        if all(sum(first <= run[0] < last for run in runs) <= 1 for runs in (mine, others)):
            found.add((begin_s[first], begin_s[last], begin_t[first], begin_t[last]))
    both = np.array(sorted(found), np.int64).reshape(-1, 4)
    return both[:, :2], both[:, 2:]


def boundaries_not_after_markers(
    student: RenderedTokens, teacher: RenderedTokens
) -> CommonBoundaries:
    """Common boundaries, but for those right behind a run of markers."""
    found = align([student], [teacher]).boundaries
    free_C = ~is_after_markers(student, found.student_C, teacher, found.teacher_C)
    return CommonBoundaries(found.student_C[free_C], found.teacher_C[free_C])


def is_after_markers(
    student: RenderedTokens,
    student_index_C: IntArray,
    teacher: RenderedTokens,
    teacher_index_C: IntArray,
) -> npt.NDArray[np.bool_]:
    """Which boundaries stand right behind a run of markers, on either side: there one side may have decided already what comes (text, a call, a
    thought) and the other has not, so that the row of the one says nothing of the other's choice.
    """
    return np.logical_or(
        *(
            (at_X > 0) & tokens.loss_mask_T[at_X - 1] & (tokens.starts_T[at_X - 1] < 0)
            for tokens, at_X in ((student, student_index_C), (teacher, teacher_index_C))
        )
    )


def _marker_runs(tokens: RenderedTokens) -> tuple[list[tuple[int, int]], dict[int, int]]:
    """(place before, place after) of every run, and which token begins at a place: a token of content, or the first of a run.

    A place is twice a byte, and one more for the stop, which is not what begins at its byte; what an answer begins with is at -2.
    """
    learned = np.flatnonzero(tokens.loss_mask_T)
    starts_L, ends_L = (
        tokens.starts_T[learned].astype(np.int64),
        tokens.ends_T[learned].astype(np.int64),
    )
    place_L = 2 * starts_L + (starts_L == ends_L)
    edges = np.flatnonzero(
        np.diff(np.concatenate([[False], starts_L < 0, [False]]).astype(np.int8))
    ).reshape(-1, 2)
    runs = [
        (2 * int(ends_L[a - 1]) if a else -2, int(place_L[b]))
        for a, b in edges.tolist()
        if b < len(learned)
    ]
    begins = {
        int(place): int(token)
        for place, token in zip(place_L[starts_L >= 0], learned[starts_L >= 0], strict=True)
    }
    return runs, {-2: int(learned[0])} | begins | {
        before: int(learned[a]) for (before, _), (a, _) in zip(runs, edges.tolist(), strict=False)
    }
