"""Beside: what a teacher says of the tokens that a student said, in the teacher's own tokens.

`rows` gives its whole distributions where both begin a token at the same byte; `chunks` how likely it finds each stretch between two such
places, for teachers of which no more is known than log-probabilities. Both know what cannot stand beside the other's boundary.

Tokens without bytes (a thought's ends, a call's frame) are other tokens in every template and have no event in common, but they say the same:
here this part ends and that one begins. A run of them with the first content behind it is a stretch too: of the student's own answers the
gradient of its chunk term is that of reverse KL. Without it nobody tells the student where a thought ends, nor whether to call: a teacher that
says "text" by a marker gives the call no mass in the row behind it, and a student that chose text was told so again (tools .97 -> .57).

Rows compare events. Where one token of the student's is several of the teacher's ("27" and "2", "7"), all of an event are alike to them; which of
these it is, the span tells as a stretch. Without it a student forgot figures (code .97 -> .81).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from persea.align import Boundaries, align
from persea.balance import Taught
from persea.bridge import Bridge
from persea.chat import Tokens
from persea.engines import Failed, Namer
from persea.errors import TeacherError
from persea.losses import Chunks, Dead, Divergence, Head, LossOut, Sides, chunk, divergence_head
from persea.masks import Mask
from persea.rows import MASS, Rows
from persea.teacher import Teacher

Ints = npt.NDArray[np.int64]
NONE = np.empty(0, np.int64)
UNEVEN, ALL = 0, 1  # which spans: those of several tokens on a side, or every one


@dataclass(frozen=True)
class Beside:
    """A teacher's whole distributions beside some learned positions, and stretches for what these do not know. C positions.

    place_C                     learned position of the student, counted through the answers laid end to end
    logprobs_CW                 natural
    student_dead, teacher_dead  what cannot stand there; None where both have one tokenizer
    marks, marks_dead           runs of markers and spans of several tokens on a side, over the same positions; what cannot stand at their ends
    """

    place_C: torch.Tensor
    logprobs_CW: torch.Tensor
    student_dead: Dead | None
    teacher_dead: Dead | None
    marks: Chunks
    marks_dead: Dead


@dataclass(frozen=True)
class _Laid:
    """One answer in two voices. C common boundaries, runs of markers' beginnings among them; X stretches.

    at_C2     (student token, teacher token) at each, the student's in order
    dead_C    what cannot stand there: the student's tokens, the teacher's
    student_X2, teacher_X2  half-open ranges of tokens
    """

    at_C2: Ints
    dead_C: list[tuple[Ints, Ints]]
    student_X2: Ints
    teacher_X2: Ints


@dataclass(frozen=True, eq=False)
class Pair:
    """A teacher, and its bridge to the student."""

    teacher: Teacher
    bridge: Bridge
    _gone: dict[tuple[int, int], Ints] = field(default_factory=dict, repr=False)

    def rows(self, some: Sequence[tuple[Tokens, Tokens]]) -> Beside:
        """Of answers (the student's tokens, the teacher's), every common boundary at which an event is left that both can say."""
        laid = [_free_of_runs(own, theirs) for own, theirs in some]
        marked = [self._lay(own, theirs, UNEVEN) for own, theirs in some]
        firsts = np.cumsum([0, *(int(own.learn_T.sum()) for own, _ in some)])
        place_C = np.concatenate([NONE, *(first + _rows_of(own)[found.student_C]
                                          for (own, _), found, first in zip(some, laid, firsts[:-1].tolist(), strict=True))])
        said = _Said([theirs for _, theirs in some], marked)
        pieces: list[list[torch.Tensor]] = [[] for _ in some]
        for k, first, some_NW in self._pieces(some):
            wanted = _rows_of(some[k][1])[laid[k].teacher_C]
            pieces[k].append(some_NW[torch.from_numpy(wanted[(wanted >= first) & (wanted < first + len(some_NW))] - first)])
            said.take(k, first, some_NW)
        logprobs_CW = torch.cat([piece for mine in pieces for piece in mine])
        marks = self._chunks(some, marked, said)
        if self.bridge.teacher_mask is None or self.bridge.student_mask is None:
            return Beside(torch.from_numpy(place_C), logprobs_CW, None, None, *marks)
        dead = [both for (own, theirs), found in zip(some, laid, strict=True)
                for both in self._dead(own, theirs, np.stack([found.student_C, found.teacher_C], 1))]
        fits_C = np.array([self._agree(*both) for both in dead], np.bool_)
        dead_V, dead_W = zip(*(both for both, good in zip(dead, fits_C, strict=True) if good), strict=True) if fits_C.any() else ((), ())
        return Beside(torch.from_numpy(place_C[fits_C]), logprobs_CW[torch.from_numpy(fits_C)], _as_dead(range(len(dead_V)), dead_V),
                      _as_dead(range(len(dead_W)), dead_W), *marks)

    def chunks(self, some: Sequence[tuple[Tokens, Tokens]]) -> tuple[Chunks, Dead]:
        """Of answers, the stretches that cover the same bytes (align.Spans) and the runs of markers, and what the student cannot say where one
        begins or ends.

        The teacher's side takes of each row the realised token's log-probability and, at a boundary, the mass that can stand. A stretch is
        left out where nothing that one side knows can stand at its rim, or where the teacher finds it impossible: nothing finite is to be
        learned of it.
        """
        laid = [self._lay(own, theirs, ALL) for own, theirs in some]
        said = _Said([theirs for _, theirs in some], laid)
        engine = self.teacher.engine
        if isinstance(engine, Namer):
            for k, rows in enumerate(engine.named([theirs.ids_T for _, theirs in some], [theirs.learn_T for _, theirs in some])):
                if isinstance(rows, Failed):
                    raise TeacherError(f"an answer of the student could not be scored: {rows.why}", where=self.teacher.name,
                                       remedy="look at the server, and run again: the last checkpoint stands")
                said.take_named(k, rows)
        else:
            for k, first, some_NW in self._pieces(some):
                said.take(k, first, some_NW)
        return self._chunks(some, laid, said)

    def _chunks(self, some: Sequence[tuple[Tokens, Tokens]], laid: Sequence[_Laid], said: _Said) -> tuple[Chunks, Dead]:
        columns: list[list[Ints]] = [[], [], [], []]
        teacher, dead, first, chunk = list[npt.NDArray[np.float64]](), list[tuple[int, Ints]](), 0, 0
        for (own, theirs), found, said_N, beta in zip(some, laid, said.realised, said.betas, strict=True):
            (s0, s1), (t0, t1) = found.student_X2.T, found.teacher_X2.T
            place_S, row_T, token_of = _rows_of(own), _rows_of(theirs), dict(found.at_C2.tolist())
            gone_of = dict(zip(found.at_C2[:, 0].tolist(), (both[0] for both in found.dead_C), strict=True))
            ends = np.array([s in token_of for s in s1.tolist()], np.bool_)
            begin_X, end_X = np.array([[beta[token_of[a]], beta[token_of[b]] if b in token_of else 0.0]
                                       for a, b in zip(s0.tolist(), s1.tolist(), strict=True)]).reshape(-1, 2).T
            sums_X = np.array([said_N[row_T[a]:row_T[b - 1] + 1].sum() for a, b in zip(t0.tolist(), t1.tolist(), strict=True)])
            stands = np.array([all(len(gone_of[s]) < len(self.bridge.student_event_V) for s in (a, b) if s in gone_of)
                               for a, b in zip(s0.tolist(), s1.tolist(), strict=True)], np.bool_)
            kept = stands & np.isfinite(sums_X) & np.isfinite(begin_X) & np.isfinite(end_X)
            s0, s1, ends = s0[kept], s1[kept], ends[kept]
            teacher.append(sums_X[kept] - begin_X[kept] + end_X[kept])
            dead += [(first + int(place_S[s]), gone_of[s]) for s in sorted({*s0.tolist(), *s1[ends].tolist()})]
            for column, values in zip(columns, (
                    np.repeat(np.arange(chunk, chunk + len(s0)), s1 - s0),
                    first + place_S[np.concatenate([NONE, *(np.arange(a, b) for a, b in zip(s0, s1, strict=True))])],
                    first + place_S[s0], np.where(ends, first + place_S[np.minimum(s1, len(own) - 1)], -1)), strict=True):
                column.append(values.astype(np.int64))
            first, chunk = first + int(own.learn_T.sum()), chunk + len(s0)
        chunk_P, position_P, begin_C, end_C = (torch.from_numpy(np.concatenate([NONE, *column])) for column in columns)
        return (Chunks(chunk_P, position_P, begin_C, end_C, torch.from_numpy(np.concatenate([np.empty(0), *teacher]))),
                _as_dead([row for row, _ in dead], [gone for _, gone in dead]))

    def _lay(self, own: Tokens, theirs: Tokens, kind: int) -> _Laid:
        """Runs of markers, and the spans of a kind that cover the same bytes."""
        found, (mine_X2, other_X2) = align([own], [theirs]), marks(own, theirs)
        spans = found.spans
        wanted_C = ~_behind(own, spans.student_C2[:, 0], theirs, spans.teacher_C2[:, 0])
        if kind == UNEVEN:
            wanted_C &= (np.diff(spans.student_C2)[:, 0] > 1) | (np.diff(spans.teacher_C2)[:, 0] > 1)
        mine_X2, other_X2 = np.concatenate([spans.student_C2[wanted_C], mine_X2]), np.concatenate([spans.teacher_C2[wanted_C], other_X2])
        order_X = np.argsort(mine_X2[:, 0], kind="stable")
        mine_X2, other_X2 = mine_X2[order_X], other_X2[order_X]
        at_C2 = np.unique(np.concatenate([np.stack([found.boundaries.student_C, found.boundaries.teacher_C], 1),
                                          np.stack([mine_X2[:, 0], other_X2[:, 0]], 1)]), axis=0)
        at_C2 = at_C2[np.isin(at_C2[:, 0], mine_X2)]  # a mask costs: where no stretch begins or ends none is asked
        return _Laid(at_C2, self._dead(own, theirs, at_C2), mine_X2, other_X2)

    def _pieces(self, some: Sequence[tuple[Tokens, Tokens]]) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(answer, its first row, rows) as the engine hands them over."""
        at = [0] * len(some)
        for k, some_NW in self.teacher.engine.pieces([theirs.ids_T for _, theirs in some], [theirs.learn_T for _, theirs in some]):
            yield k, at[k], some_NW
            at[k] += len(some_NW)

    def _dead(self, own: Tokens, theirs: Tokens, at_C2: Ints) -> list[tuple[Ints, Ints]]:
        """At each common boundary the student's tokens that cannot stand, and the teacher's; none where both have one tokenizer."""
        student, teacher = self.bridge.student_mask, self.bridge.teacher_mask
        if student is None or teacher is None:
            return [(NONE, NONE)] * len(at_C2)
        contexts = zip(student.keeper.inner(theirs, at_C2[:, 1]).tolist(), teacher.keeper.inner(own, at_C2[:, 0]).tolist(), strict=True)
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


class _Said:
    """What a teacher finds of its own tokens: of each answer the realised tokens' log-probabilities, and at each boundary (teacher's token) log
    of the mass that can stand; -inf where none is known to."""

    def __init__(self, theirs: Sequence[Tokens], laid: Sequence[_Laid]) -> None:
        self.theirs = theirs
        self.dead = [dict(zip(one.at_C2[:, 1].tolist(), (both[1] for both in one.dead_C), strict=True)) for one in laid]
        self.realised = [np.zeros(int(tokens.learn_T.sum())) for tokens in theirs]
        self.betas: list[dict[int, float]] = [{} for _ in theirs]

    def take(self, k: int, first: int, some_NW: torch.Tensor) -> None:
        """Some rows of answer k, whole. What stands is summed itself: 1 - dead has no digits where the teacher is certain of what cannot be."""
        tokens = self.theirs[k]
        learned = np.flatnonzero(tokens.learn_T)[first:first + len(some_NW)]
        self.realised[k][first:first + len(some_NW)] = some_NW[range(len(learned)), torch.from_numpy(tokens.ids_T[learned]).long()].double().numpy()
        for row, token in enumerate(learned.tolist()):
            if token in self.dead[k]:
                gone = torch.from_numpy(self.dead[k][token])
                self.betas[k][token] = float(some_NW[row].double().index_fill(0, gone, -torch.inf).logsumexp(0)) if len(gone) else 0.0

    def take_named(self, k: int, rows: Rows) -> None:
        """Rows of answer k that name some tokens. Of what cannot stand only what is named is known: the rest of it is taken to be nothing.
        Where what is named and cannot stand is all there is, to within MASS, what is left is rounding."""
        self.realised[k] = rows.realised_N.astype(np.float64)
        for row, token in enumerate(np.flatnonzero(self.theirs[k].learn_T).tolist()):
            if token in self.dead[k]:
                here = slice(rows.offsets_N1[row], rows.offsets_N1[row + 1])
                lost = rows.probs_M[here][np.isin(rows.ids_M[here], self.dead[k][token])].astype(np.float64).sum()
                self.betas[k][token] = float(np.log1p(-lost)) if lost < 1 - MASS else -np.inf


def marks(own: Tokens, theirs: Tokens) -> tuple[Ints, Ints]:
    """The shortest stretches around runs of learned tokens without bytes that begin and end at the same bytes on both sides, with at most one
    run in them on each and, where there is any, some content behind it: (student's, teacher's) half-open ranges of tokens.

    Content behind, because one side's markers may be nothing on the other: what an answer begins with (text, a call) gpt-oss says by a channel,
    the student by its first word. A token that content and template share (the full stop and newline behind a thought) counts as one of a
    run. A run that nothing follows was cut off, and says nothing yet.
    """
    (mine, begin_s), (others, begin_t) = (_runs(side) for side in (own, theirs))
    common, found = sorted(begin_s.keys() & begin_t.keys()), set[tuple[int, int, int, int]]()
    for before, after in {*mine, *others}:
        beside = [run for run in (*mine, *others) if run[0] < after and before < run[1]]
        begins, ends = min(run[0] for run in beside), max(run[1] for run in beside)
        first = max((place for place in common if place <= begins), default=None)
        last = min((place for place in common if place > ends), default=max(common, default=None))
        if first is None or last is None or last < ends or begin_s[last] <= begin_s[first] or begin_t[last] <= begin_t[first]:
            continue
        if all(sum(first <= run[0] < last for run in runs) <= 1 for runs in (mine, others)):
            found.add((begin_s[first], begin_s[last], begin_t[first], begin_t[last]))
    both = np.array(sorted(found), np.int64).reshape(-1, 4)
    return both[:, :2], both[:, 2:]


def _free_of_runs(own: Tokens, theirs: Tokens) -> Boundaries:
    """Common boundaries, but for those right behind a run of markers."""
    found = align([own], [theirs]).boundaries
    free_C = ~_behind(own, found.student_C, theirs, found.teacher_C)
    return Boundaries(found.student_C[free_C], found.teacher_C[free_C])


def _behind(own: Tokens, at_S: Ints, theirs: Tokens, at_T: Ints) -> npt.NDArray[np.bool_]:
    """Which boundaries stand right behind a run of markers, on either side: there one side may have decided already what comes (text, a call, a
    thought) and the other has not, so that the row of the one says nothing of the other's choice."""
    return np.logical_or(*((at_X > 0) & tokens.learn_T[at_X - 1] & (tokens.starts_T[at_X - 1] < 0)
                           for tokens, at_X in ((own, at_S), (theirs, at_T))))


def _runs(tokens: Tokens) -> tuple[list[tuple[int, int]], dict[int, int]]:
    """(place before, place after) of every run, and which token begins at a place: a token of content, or the first of a run.

    A place is twice a byte, and one more for the stop, which is not what begins at its byte; what an answer begins with is at -2.
    """
    learned = np.flatnonzero(tokens.learn_T)
    starts_L, ends_L = tokens.starts_T[learned].astype(np.int64), tokens.ends_T[learned].astype(np.int64)
    place_L = 2 * starts_L + (starts_L == ends_L)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], starts_L < 0, [False]]).astype(np.int8))).reshape(-1, 2)
    runs = [(2 * int(ends_L[a - 1]) if a else -2, int(place_L[b])) for a, b in edges.tolist() if b < len(learned)]
    begins = {int(place): int(token) for place, token in zip(place_L[starts_L >= 0], learned[starts_L >= 0], strict=True)}
    return runs, {-2: int(learned[0])} | begins | {before: int(learned[a]) for (before, _), (a, _) in zip(runs, edges.tolist(), strict=False)}


def _rows_of(tokens: Tokens) -> Ints:
    """The number of each learned token among the learned ones."""
    return np.cumsum(tokens.learn_T, dtype=np.int64) - 1


def _as_dead(rows: Sequence[int], tokens: Sequence[Ints]) -> Dead:
    return Dead(torch.from_numpy(np.repeat(np.array(rows, np.int64), [len(some) for some in tokens])),
                torch.from_numpy(np.concatenate([NONE, *tokens])))


@dataclass(frozen=True)
class Advice:
    """What a teacher says of some answers, as a loss.

    place_P  learned positions, counted through the answers; weight  how many the loss is the mean of (chunk: stretches)
    loss     from hidden states and targets at these positions, and the head
    """

    place_P: torch.Tensor
    weight: int
    loss: Callable[[torch.Tensor, Head, torch.Tensor], LossOut]

    def told(self, out: LossOut, weight: float) -> Taught:
        """What is said of it, once its loss is known and counts so much."""
        assert out.each_N is not None
        pull = math.nan if out.pull_N is None else weight * float(out.pull_N.double().sum())
        return Taught(self.weight, float(out.each_N.double().sum()), float(out.each_N.double().square().sum()), pull)


def advice(pair: Pair, some: Sequence[tuple[Tokens, Tokens]], objective: str) -> Advice:
    """Of answers in the student's own tokens and in the teacher's. objective: events (whole rows, and runs of markers) or chunk."""
    if objective == "chunk":
        chunks, dead = pair.chunks(some)
        every_P = torch.arange(sum(int(own.learn_T.sum()) for own, _ in some))
        return Advice(every_P, len(chunks.teacher_C), lambda hidden, head, targets: chunk(head.logits(hidden), targets, chunks, dead))
    beside = pair.rows(some)
    sides, events = Sides(pair.bridge, beside.student_dead, beside.teacher_dead), len(beside.place_C)
    every_P, marks, dead = _among(beside.marks, beside.marks_dead)
    runs = len(marks.teacher_C)

    def loss(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> LossOut:
        """The mean over common boundaries and runs of markers: each has the gradient of its reverse KL."""
        parts = []
        if events:
            parts.append(divergence_head(hidden[:events], head, beside.logprobs_CW, sides, Divergence.REVERSE))
        if runs:
            own_PD = hidden[events:]
            said = chunk(head.logits(own_PD), targets[events:], marks, dead)
            (pull_PD,) = torch.autograd.grad(said.loss, own_PD, retain_graph=True) if own_PD.requires_grad else (None,)
            parts.append(said if pull_PD is None else replace(said, pull_N=torch.linalg.vector_norm(pull_PD.float(), dim=1) * said.positions))
        mean = torch.stack([one.loss * one.positions for one in parts]).sum() / (events + runs)
        each_N = torch.cat([one.each_N for one in parts if one.each_N is not None])
        pulls = [one.pull_N for one in parts if one.pull_N is not None]
        return LossOut(mean, {}, events + runs, each_N, torch.cat(pulls) if len(pulls) == len(parts) else None)

    return Advice(torch.cat([beside.place_C, every_P]), events + runs, loss)


def _among(chunks: Chunks, dead: Dead) -> tuple[torch.Tensor, Chunks, Dead]:
    """Chunks of many positions as those of the few they need: (these, chunks, dead)."""
    n, c, end_C = len(chunks.position_P), len(chunks.begin_C), chunks.end_C.clone()
    few_P, place_Q = torch.unique(torch.cat([chunks.position_P, chunks.begin_C, end_C[end_C >= 0]]), return_inverse=True)
    end_C[end_C >= 0] = place_Q[n + c:]
    said = Chunks(chunks.chunk_P, place_Q[:n], place_Q[n:n + c], end_C, chunks.teacher_C)
    return few_P, said, Dead(torch.searchsorted(few_P, dead.row_D), dead.token_D)
