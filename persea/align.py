"""Spans: two tokenizers laid over the same bytes. By bytes only, never by position, string or character."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from persea.chat import Tokens


@dataclass(frozen=True)
class Boundaries:
    """Where both tokenizers begin a learned token at the same byte. C = common boundaries, in byte order.

    student_C, teacher_C  index of the token that begins there, in each rendering; the distribution over it is what can be
                          compared. The token that ends the turn begins at the content's end on both sides.
    """

    student_C: npt.NDArray[np.int64]
    teacher_C: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Spans:
    """Half-open token ranges that cover the SAME bytes; together they tile the learned content from the first common
    boundary on. C = spans.

    student_C2, teacher_C2  int64
    """

    student_C2: npt.NDArray[np.int64]
    teacher_C2: npt.NDArray[np.int64]

    @property
    def one_to_one(self) -> int:
        """Spans of one student and one teacher token."""
        return int(np.sum((np.diff(self.student_C2) == 1) & (np.diff(self.teacher_C2) == 1)))


def _learned(tokens: Tokens) -> npt.NDArray[np.int64]:
    """Indices of learned tokens that begin at a content byte."""
    return np.flatnonzero(tokens.learn_T & (tokens.starts_T >= 0))


def boundaries(student: Tokens, teacher: Tokens) -> Boundaries:
    """Common boundaries of two renderings of one conversation. Starts are unique and rise, so one sorted intersection does."""
    s, t = _learned(student), _learned(teacher)
    _, at_s, at_t = np.intersect1d(student.starts_T[s], teacher.starts_T[t], assume_unique=True, return_indices=True)
    return Boundaries(s[at_s].astype(np.int64), t[at_t].astype(np.int64))


def spans(student: Tokens, teacher: Tokens) -> Spans:
    """From common boundary to common boundary. The stop token is a span of its own; markers between parts end one."""
    both = boundaries(student, teacher)
    return Spans(_ranges(student, both.student_C), _ranges(teacher, both.teacher_C))


def _ranges(tokens: Tokens, first_C: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[first, last + 1) of each span: up to the next span, without the markers that stand between."""
    learned = _learned(tokens)
    after_C = np.append(first_C[1:], learned[-1] + 1 if len(learned) else 0)
    last_C = learned[np.searchsorted(learned, after_C) - 1] if len(first_C) else first_C
    return np.stack([first_C, last_C + 1], axis=1)
