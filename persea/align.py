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
                          compared. The token that ends the turn begins at the content's end, and meets its like alone.
    """

    student_C: npt.NDArray[np.int64]
    teacher_C: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Spans:
    """Half-open token ranges that cover the SAME bytes; together they tile the learned content from the first common
    boundary on, but for what only one family kept (a trimmed rim, a thought) and the span it stands in. C = spans.

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
    learned: npt.NDArray[np.int64] = np.flatnonzero(tokens.learn_T & (tokens.starts_T >= 0)).astype(np.int64)
    return learned


def _places(tokens: Tokens) -> npt.NDArray[np.int64]:
    """Where each token begins. The stop token has a place of its own: the other family may have kept a space that this one
    trimmed, and a space is not a stop."""
    places: npt.NDArray[np.int64] = 2 * tokens.starts_T.astype(np.int64) + (tokens.starts_T == tokens.ends_T)
    return places


def boundaries(student: Tokens, teacher: Tokens) -> Boundaries:
    """Common boundaries of two renderings of one conversation. Places are unique and rise, so one sorted intersection does."""
    s, t = _learned(student), _learned(teacher)
    _, at_s, at_t = np.intersect1d(_places(student)[s], _places(teacher)[t], assume_unique=True, return_indices=True)
    return Boundaries(s[at_s].astype(np.int64), t[at_t].astype(np.int64))


def spans(student: Tokens, teacher: Tokens) -> Spans:
    """From common boundary to common boundary. The stop token is a span of its own; markers between parts end one."""
    both = boundaries(student, teacher)
    student_C2, teacher_C2 = _ranges(student, both.student_C), _ranges(teacher, both.teacher_C)
    same = student.ends_T[student_C2[:, 1] - 1] == teacher.ends_T[teacher_C2[:, 1] - 1]
    return Spans(student_C2[same], teacher_C2[same])


def _ranges(tokens: Tokens, first_C: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[first, last + 1) of each span: up to the next span, without the markers that stand between."""
    learned = _learned(tokens)
    after_C = np.append(first_C[1:], learned[-1] + 1 if len(learned) else 0)
    last_C = learned[np.searchsorted(learned, after_C) - 1] if len(first_C) else first_C
    return np.stack([first_C, last_C + 1], axis=1)
