"""Retained mass: how much of a teacher's probability the boundary masks leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.alignment.event_map import EventMap
from persea.alignment.spans import CommonBoundaries, align_batch
from persea.tasks.intervals import Z95
from persea.teachers.teacher import Teacher
from persea.tokenization.tokens import RenderedTokens

# Retained mass counts impossible tokens from this probability on: with a real vocabulary there are
# about ten such tokens at a boundary, out of 262,144.
MIN_COUNTED_PROBABILITY = 1e-3
RETAINED_MASS_QUANTILE = 0.05  # of the boundaries; reported as `retained_mass_p5`

# (student tokens, teacher tokens, common boundaries) -> the teacher's probability mass that the
# boundary masks retain, float64 [C] in [0, 1].
RetainedMassFunction = Callable[
    [Sequence[RenderedTokens], Sequence[RenderedTokens], CommonBoundaries], npt.NDArray[np.float64]
]


def make_retained_mass(
    teacher: Teacher,
    event_map: EventMap,
    min_probability: float = MIN_COUNTED_PROBABILITY,
    on_answer: Callable[[], None] = lambda: None,
) -> RetainedMassFunction:
    """Return a function that measures how much of a teacher's distributions has an event.

    Subtracted are the tokens that the masks remove and those that the student cannot write. Costs
    one forward pass over every answer.

    Args:
        teacher: The teacher; its engine must have full distributions.
        event_map: Event map to the student.
        min_probability: Only tokens of at least this probability are subtracted.
        on_answer: Called after each answer.
    """
    mask = event_map.teacher_mask
    # what the student's vocabulary cannot write: its mass goes to the cross-entropy
    num_bytes_W = np.zeros(1) if mask is None else mask.own.vocabulary.lengths_W
    unwritable_W = (event_map.teacher_event_W < 0) & (num_bytes_W > 0)

    def retained_mass(
        student_tokens: Sequence[RenderedTokens],
        teacher_tokens: Sequence[RenderedTokens],
        boundaries: CommonBoundaries,
    ) -> npt.NDArray[np.float64]:
        mass_C = np.ones(len(boundaries.student_C))
        if mask is None:
            return mass_C
        student_begin, teacher_begin, at = 0, 0, 0
        scored = teacher.engine.compute_logprobs(
            [t.ids_T for t in teacher_tokens], [t.loss_mask_T for t in teacher_tokens]
        )
        for s, t, logprobs_NW in zip(student_tokens, teacher_tokens, scored, strict=True):
            end = int(np.searchsorted(boundaries.student_C, student_begin + len(s)))
            contexts = mask.other.supervised_context_ids(
                s, boundaries.student_C[at:end] - student_begin
            )
            row_of_token_T = np.cumsum(t.loss_mask_T) - 1
            rows = row_of_token_T[boundaries.teacher_C[at:end] - teacher_begin]
            for c, (context, row) in enumerate(zip(contexts.tolist(), rows.tolist(), strict=True)):
                counted = np.flatnonzero(logprobs_NW[row].numpy() >= log(min_probability))
                lost = np.union1d(
                    mask.impossible_tokens(context, counted), counted[unwritable_W[counted]]
                )
                mass_C[at + c] = 1 - float(logprobs_NW[row, lost].exp().sum())
            student_begin, teacher_begin, at = student_begin + len(s), teacher_begin + len(t), end
            on_answer()
        return mass_C

    return retained_mass


def summarize_mass(
    retained_mass: RetainedMassFunction,
    student_tokens: Sequence[RenderedTokens],
    teacher_tokens: Sequence[RenderedTokens],
) -> dict[str, Any]:
    """Measure the mass of some conversations.

    Returns:
        The fields of `PairCompatibility` about it; empty where there is no common boundary. The
        interval of the mean is that of a ratio of sums over conversations.
    """
    boundaries = align_batch(student_tokens, teacher_tokens).boundaries
    if not len(boundaries.student_C):
        return {}
    mass_C = retained_mass(student_tokens, teacher_tokens, boundaries)
    n, mean = len(student_tokens), float(mass_C.mean())
    ends = np.cumsum([len(tokens) for tokens in student_tokens])
    conversation_C = np.searchsorted(ends, boundaries.student_C, side="right")
    residual_N = np.bincount(conversation_C, mass_C - mean, minlength=n)
    margin = Z95 * sqrt(n * float(residual_N.var(ddof=1))) / len(mass_C) if n > 1 else None
    return {
        "retained_mass_mean": mean,
        "retained_mass_p5": float(np.quantile(mass_C, RETAINED_MASS_QUANTILE)),
        "retained_mass_low": None if margin is None else max(0.0, mean - margin),
        "retained_mass_high": None if margin is None else min(1.0, mean + margin),
        "num_mass_boundaries": len(mass_C),
    }
