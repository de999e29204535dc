"""Beside: what a teacher says of the tokens that a student said, in the teacher's own tokens.

`rows` gives its whole distributions where both begin a token at the same byte; `chunks` how likely it finds each stretch between two such
places, for teachers of which no more is known than log-probabilities. Both know what cannot stand beside the other's boundary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from persea.align import Alignment, align
from persea.bridge import Bridge
from persea.chat import Tokens
from persea.engines import Failed, Namer
from persea.errors import TeacherError
from persea.losses import Chunks, Dead
from persea.masks import Mask
from persea.teacher import Teacher

Ints = npt.NDArray[np.int64]
NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class Beside:
    """A teacher's whole distributions beside some learned positions. C positions.

    place_C                     learned position of the student, counted through the answers laid end to end
    logprobs_CW                 natural
    student_dead, teacher_dead  what cannot stand there; None where both have one tokenizer
    """

    place_C: torch.Tensor
    logprobs_CW: torch.Tensor
    student_dead: Dead | None
    teacher_dead: Dead | None


@dataclass(frozen=True, eq=False)
class Pair:
    """A teacher, and its bridge to the student."""

    teacher: Teacher
    bridge: Bridge
    _gone: dict[tuple[int, int], Ints] = field(default_factory=dict, repr=False)

    def rows(self, some: Sequence[tuple[Tokens, Tokens]]) -> Beside:
        """Of answers (the student's tokens, the teacher's), every common boundary at which an event is left that both can say."""
        laid = [align([own], [theirs]) for own, theirs in some]
        wanted = [_rows_of(theirs)[found.boundaries.teacher_C] for (_, theirs), found in zip(some, laid, strict=True)]
        firsts = np.cumsum([0, *(int(own.learn_T.sum()) for own, _ in some)])
        place_C = np.concatenate([NONE, *(first + _rows_of(own)[found.boundaries.student_C]
                                          for (own, _), found, first in zip(some, laid, firsts[:-1].tolist(), strict=True))])
        pieces: list[list[torch.Tensor]] = [[] for _ in some]
        for k, first, some_NW in self._pieces(some):
            here = wanted[k][(wanted[k] >= first) & (wanted[k] < first + len(some_NW))] - first
            pieces[k].append(some_NW[torch.from_numpy(here)])
        logprobs_CW = torch.cat([piece for mine in pieces for piece in mine])
        if self.bridge.teacher_mask is None or self.bridge.student_mask is None:
            return Beside(torch.from_numpy(place_C), logprobs_CW, None, None)
        dead = [both for pair, found in zip(some, laid, strict=True) for both in self._dead(*pair, found)]
        fits_C = np.array([self._agree(*both) for both in dead], np.bool_)
        dead_V, dead_W = zip(*(both for both, good in zip(dead, fits_C, strict=True) if good), strict=True) if fits_C.any() else ((), ())
        return Beside(torch.from_numpy(place_C[fits_C]), logprobs_CW[torch.from_numpy(fits_C)], _as_dead(range(len(dead_V)), dead_V),
                      _as_dead(range(len(dead_W)), dead_W))

    def chunks(self, some: Sequence[tuple[Tokens, Tokens]]) -> tuple[Chunks, Dead]:
        """Of answers, the stretches that cover the same bytes (align.Spans), and what the student cannot say where one begins or ends.

        The teacher's side takes of each row the realised token's log-probability and, at a boundary, the mass that can stand.
        """
        columns: list[list[Ints]] = [[], [], [], []]
        teacher, dead, first, chunk = list[npt.NDArray[np.float64]](), list[tuple[int, Ints]](), 0, 0
        realised = self._realised(some)
        for (own, theirs), said_N, beta_of in zip(some, *realised, strict=True):
            found = align([own], [theirs])
            (s0, s1), (t0, t1) = found.spans.student_C2.T, found.spans.teacher_C2.T
            place_S, boundaries = _rows_of(own), dict(zip(found.boundaries.student_C.tolist(), found.boundaries.teacher_C.tolist(), strict=True))
            ends = np.array([int(s) in boundaries for s in s1], np.bool_)
            until_T = np.concatenate([[0.0], np.cumsum(said_N)])
            row_T = _rows_of(theirs)
            beta = {s: beta_of[boundaries[s]] for s in {*s0.tolist(), *s1[ends].tolist()}}
            teacher.append(until_T[row_T[t1 - 1] + 1] - until_T[row_T[t0]] - np.array([beta[int(s)] for s in s0])
                           + np.array([beta[int(s)] if end else 0.0 for s, end in zip(s1, ends, strict=True)]))
            if self.bridge.student_mask is not None:
                of = dict(zip(found.boundaries.student_C.tolist(), (both[0] for both in self._dead(own, theirs, found)), strict=True))
                dead += [(first + int(place_S[s]), of[s]) for s in sorted(beta)]
            sizes = s1 - s0
            for column, values in zip(columns, (
                    np.repeat(np.arange(chunk, chunk + len(s0)), sizes),
                    first + place_S[np.concatenate([NONE, *(np.arange(a, b) for a, b in zip(s0, s1, strict=True))])],
                    first + place_S[s0], np.where(ends, first + place_S[np.minimum(s1, len(own) - 1)], -1)), strict=True):
                column.append(values.astype(np.int64))
            first, chunk = first + int(own.learn_T.sum()), chunk + len(s0)
        chunk_P, position_P, begin_C, end_C = (torch.from_numpy(np.concatenate([NONE, *column])) for column in columns)
        return (Chunks(chunk_P, position_P, begin_C, end_C, torch.from_numpy(np.concatenate([np.empty(0), *teacher]))),
                _as_dead([row for row, _ in dead], [gone for _, gone in dead]))

    def _pieces(self, some: Sequence[tuple[Tokens, Tokens]]) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(answer, its first row, rows) as the engine hands them over."""
        at = [0] * len(some)
        for k, some_NW in self.teacher.engine.pieces([theirs.ids_T for _, theirs in some], [theirs.learn_T for _, theirs in some]):
            yield k, at[k], some_NW
            at[k] += len(some_NW)

    def _realised(self, some: Sequence[tuple[Tokens, Tokens]]) -> tuple[list[npt.NDArray[np.float64]], list[dict[int, float]]]:
        """Of each answer the log-probabilities of the teacher's tokens, and at each common boundary (teacher's token) that of what can stand."""
        said = [np.zeros(int(theirs.learn_T.sum())) for _, theirs in some]
        dead: list[dict[int, Ints]] = []
        for own, theirs in some:
            found = align([own], [theirs])
            of = self._dead(own, theirs, found) if self.bridge.teacher_mask is not None else [(NONE, NONE)] * len(found.boundaries.teacher_C)
            dead.append(dict(zip(found.boundaries.teacher_C.tolist(), (both[1] for both in of), strict=True)))
        betas: list[dict[int, float]] = [{} for _ in some]
        engine = self.teacher.engine
        if isinstance(engine, Namer):
            ids, learn = [theirs.ids_T for _, theirs in some], [theirs.learn_T for _, theirs in some]
            for k, rows in enumerate(engine.named(ids, learn)):
                if isinstance(rows, Failed):
                    raise TeacherError(f"an answer of the student could not be scored: {rows.why}", where=self.teacher.name,
                                       remedy="look at the server, and run again: the last checkpoint stands")
                said[k] = rows.realised_N.astype(np.float64)
                of_row = {row: token for row, token in enumerate(np.flatnonzero(learn[k]).tolist()) if token in dead[k]}
                for row, token in of_row.items():  # of what cannot stand only what is named is known: the rest of it is taken to be nothing
                    here = slice(rows.offsets_N1[row], rows.offsets_N1[row + 1])
                    lost = rows.probs_M[here][np.isin(rows.ids_M[here], dead[k][token])].astype(np.float64).sum()
                    betas[k][token] = float(np.log1p(-lost))
            return said, betas
        for k, first, some_NW in self._pieces(some):
            theirs = some[k][1]
            learned = np.flatnonzero(theirs.learn_T)[first:first + len(some_NW)]
            said[k][first:first + len(some_NW)] = some_NW[range(len(learned)), torch.from_numpy(theirs.ids_T[learned]).long()].double().numpy()
            for row, token in enumerate(learned.tolist()):
                if token in dead[k]:
                    gone = dead[k][token]
                    betas[k][token] = float(torch.log1p(-some_NW[row, torch.from_numpy(gone)].double().exp().sum())) if len(gone) else 0.0
        return said, betas

    def _dead(self, own: Tokens, theirs: Tokens, found: Alignment) -> list[tuple[Ints, Ints]]:
        """At each common boundary the student's tokens that cannot stand, and the teacher's."""
        student, teacher = self.bridge.student_mask, self.bridge.teacher_mask
        assert student is not None and teacher is not None
        both = found.boundaries
        contexts = zip(student.keeper.inner(theirs, both.teacher_C).tolist(), teacher.keeper.inner(own, both.student_C).tolist(), strict=True)
        return [(self.gone(student, of_student), self.gone(teacher, of_teacher)) for of_student, of_teacher in contexts]

    def gone(self, mask: Mask, context: int) -> Ints:
        """What cannot stand in a context, of the whole vocabulary; each context is asked once."""
        key = id(mask), context
        if key not in self._gone:
            self._gone[key] = mask.dead(context)
        return self._gone[key]

    def _agree(self, dead_V: Ints, dead_W: Ints) -> bool:
        """Whether some event is left that both sides can say."""
        left = [np.bincount(event_X[event_X >= 0], minlength=self.bridge.events)
                - np.bincount(event_X[dead][event_X[dead] >= 0], minlength=self.bridge.events)
                for event_X, dead in ((self.bridge.student_event_V, dead_V), (self.bridge.teacher_event_W, dead_W))]
        return bool((np.minimum(*left) > 0).any())


def _rows_of(tokens: Tokens) -> Ints:
    """The number of each learned token among the learned ones."""
    return np.cumsum(tokens.learn_T, dtype=np.int64) - 1


def _as_dead(rows: Sequence[int], tokens: Sequence[Ints]) -> Dead:
    return Dead(torch.from_numpy(np.repeat(np.array(rows, np.int64), [len(some) for some in tokens])),
                torch.from_numpy(np.concatenate([NONE, *tokens])))
