"""Beside: what a teacher says of the tokens that a student said, in the teacher's own tokens.

`rows` gives its whole distributions where both begin a token at the same byte; `chunks` how likely it finds each stretch between two such
places, for teachers of which no more is known than log-probabilities. Both know what cannot stand beside the other's boundary.

Tokens without bytes (a thought's ends, a call's frame) are other tokens in every template and have no event in common, but they say the same:
here this part ends and that one begins. A run of them with the first content behind it is a stretch too: of the student's own answers the
gradient of its chunk term is that of reverse KL. Without it nobody tells the student where a thought ends, nor whether to call: a teacher that
says "text" by a marker gives the call no mass in the row behind it, and a student that chose text was told so again (tools .97 -> .57).

Rows compare events. Where one token of the student's is several of the teacher's ("27" and "2", "7"), all of an event are alike to them; which of
these it is, the span tells as a stretch. Without it a student forgot figures (code .97 -> .81).

What cannot stand is looked for among tokens that either finds likelier than LIKELY (likely.py). To ask for every token of a real vocabulary takes
seconds a boundary (bench/beside.py); what is missed is the mass of the impossible ones below it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from persea.alignment.boundary_mask import FREE, Mask
from persea.alignment.event_map import Bridge
from persea.alignment.markers import behind, free_of_runs, marks
from persea.alignment.spans import align
from persea.chat.messages import Tokens
from persea.distributions import MASS, Rows
from persea.errors import Refused, TeacherError
from persea.losses import Chunks, Dead, Head
from persea.teachers.engines import Failed, Namer
from persea.teachers.engines.transformers import LocalEngine
from persea.teachers.teacher import Teacher
from persea.training.lm_head import hidden_states, scaling_of
from persea.training.on_policy.candidates import AT_ONCE, Likely, likely_in

Ints = npt.NDArray[np.int64]
NONE = np.empty(0, np.int64)
UNEVEN, ALL = 0, 1  # which spans: those of several tokens on a side, or every one


@dataclass(frozen=True)
class Beside:
    """A teacher's whole distributions beside some learned positions, and stretches for what these do not know. C positions.

    place_C                     learned position of the student, counted through the answers laid end to end
    teacher                     its natural log-probabilities [C, W]; of a model that is open here what its head is given [C, D], and the head
    student_dead, teacher_dead  what cannot stand there; None where both have one tokenizer
    marks, marks_dead           runs of markers and spans of several tokens on a side, over the same positions; what cannot stand at their ends
    """

    place_C: torch.Tensor
    teacher: torch.Tensor | tuple[torch.Tensor, Head]
    student_dead: Dead | None
    teacher_dead: Dead | None
    marks: Chunks
    marks_dead: Dead

    @property
    def logprobs_CW(self) -> torch.Tensor:
        """All of them at once: to look at, not to train by."""
        return self.teacher if isinstance(self.teacher, torch.Tensor) else torch.log_softmax(self.teacher[1].logits(self.teacher[0]), -1)


@dataclass(frozen=True)
class _Laid:
    """One answer in two voices. C common boundaries, runs of markers' beginnings among them; X stretches.

    at_C2       (student token, teacher token) at each, the student's in order
    context_C2  in which the student's candidates stand there, and the teacher's (Mask.dead)
    student_X2, teacher_X2  half-open ranges of tokens
    """

    at_C2: Ints
    context_C2: Ints
    student_X2: Ints
    teacher_X2: Ints


@dataclass(frozen=True, eq=False)
class Pair:
    """A teacher, and its bridge to the student. least: what a token's probability must be to be asked whether it can stand; 0 = every token is."""

    teacher: Teacher
    bridge: Bridge
    least: float = 0.0
    _gone: dict[tuple[int, int], Ints] = field(default_factory=dict, repr=False)

    def rows(self, some: Sequence[tuple[Tokens, Tokens]], found: Likely | None = None) -> Beside:
        """Of answers (the student's tokens, the teacher's), every common boundary at which an event is left that both can say.

        found  the student's likely tokens; None = every token is asked whether it can stand
        """
        laid = [free_of_runs(own, theirs) for own, theirs in some]
        contexts = [self._contexts(own, theirs, np.stack([one.student_C, one.teacher_C], 1)) for (own, theirs), one in zip(some, laid, strict=True)]
        marked = [self._lay(own, theirs, UNEVEN) for own, theirs in some]
        firsts = np.cumsum([0, *(int(own.learn_T.sum()) for own, _ in some)])
        places = [first + _rows_of(own)[one.student_C] for (own, _), one, first in zip(some, laid, firsts[:-1].tolist(), strict=True)]
        said = _Said(self, [theirs for _, theirs in some], marked)
        pieces, gone_W = [list[torch.Tensor]() for _ in some], [list[Ints | None]() for _ in some]
        for k, first, some_NW, some_NX in self._pieces(some):
            wanted, likely = _rows_of(some[k][1])[laid[k].teacher_C], self.likely_in(some_NW)
            here_C = (wanted >= first) & (wanted < first + len(some_NW))
            row_C = wanted[here_C] - first
            pieces[k].append(some_NX[torch.from_numpy(row_C)])
            gone_W[k] += [self.gone(self.bridge.teacher_mask, context, None if likely is None else likely.at(row))
                          for context, row in zip(contexts[k][here_C, 1].tolist(), row_C.tolist(), strict=True)]
            said.take(k, first, some_NW, likely)
        place_C, teacher_CX = np.concatenate([NONE, *places]), torch.cat([piece for mine in pieces for piece in mine])
        marks_ = self._chunks(some, marked, said, found)
        if self.bridge.teacher_mask is None or self.bridge.student_mask is None:
            return Beside(torch.from_numpy(place_C), self._headed(teacher_CX), None, None, *marks_)
        context_C = np.concatenate([NONE, *(one[:, 0] for one in contexts)])
        gone_V = [self.gone(self.bridge.student_mask, context, None if found is None else found.at(place))
                  for context, place in zip(context_C.tolist(), place_C.tolist(), strict=True)]
        both = enumerate(zip(gone_V, [one for mine in gone_W for one in mine], strict=True))
        fit = {c: (v, w) for c, (v, w) in both if v is not None and w is not None and self._agree(v, w)}
        fits_C = np.array(list(fit), np.int64)
        dead_V, dead_W = (_as_dead(range(len(fit)), [sides[which] for sides in fit.values()]) for which in (0, 1))
        return Beside(torch.from_numpy(place_C[fits_C]), self._headed(teacher_CX[torch.from_numpy(fits_C)]), dead_V, dead_W, *marks_)

    def chunks(self, some: Sequence[tuple[Tokens, Tokens]], found: Likely | None = None) -> tuple[Chunks, Dead]:
        """Of answers, the stretches that cover the same bytes (align.Spans) and the runs of markers, and what the student cannot say where one
        begins or ends.

        The teacher's side takes of each row the realised token's log-probability and, at a boundary, the mass that can stand. A stretch is
        left out where nothing that one side knows can stand at its rim, or where the teacher finds it impossible: nothing finite is to be
        learned of it.
        """
        laid = [self._lay(own, theirs, ALL) for own, theirs in some]
        said = _Said(self, [theirs for _, theirs in some], laid)
        engine = self.teacher.engine
        if isinstance(engine, Namer):
            for k, rows in enumerate(engine.named([theirs.ids_T for _, theirs in some], [theirs.learn_T for _, theirs in some])):
                if isinstance(rows, Failed):
                    raise TeacherError(f"an answer of the student could not be scored: {rows.why}", where=self.teacher.name,
                                       remedy="look at the server, and run again: the last checkpoint stands")
                said.take_named(k, rows)
        else:
            for k, first, some_NW, _ in self._pieces(some):
                said.take(k, first, some_NW, self.likely_in(some_NW))
        return self._chunks(some, laid, said, found)

    def _chunks(self, some: Sequence[tuple[Tokens, Tokens]], laid: Sequence[_Laid], said: _Said, likely: Likely | None) -> tuple[Chunks, Dead]:
        columns: list[list[Ints]] = [[], [], [], []]
        teacher, dead, first, chunk = list[npt.NDArray[np.float64]](), list[tuple[int, Ints]](), 0, 0
        for (own, theirs), found, said_N, beta in zip(some, laid, said.realised, said.betas, strict=True):
            (s0, s1), (t0, t1) = found.student_X2.T, found.teacher_X2.T
            place_S, row_T, token_of = _rows_of(own), _rows_of(theirs), dict(found.at_C2.tolist())
            gone_of = {s: self.gone(self.bridge.student_mask, context, None if likely is None else likely.at(first + int(place_S[s])))
                       for s, context in zip(found.at_C2[:, 0].tolist(), found.context_C2[:, 0].tolist(), strict=True)}
            ends = np.array([s in token_of for s in s1.tolist()], np.bool_)
            begin_X, end_X = np.array([[beta[token_of[a]], beta[token_of[b]] if b in token_of else 0.0]
                                       for a, b in zip(s0.tolist(), s1.tolist(), strict=True)]).reshape(-1, 2).T
            sums_X = np.array([said_N[row_T[a]:row_T[b - 1] + 1].sum() for a, b in zip(t0.tolist(), t1.tolist(), strict=True)])
            stands = np.array([all(gone_of[s] is not None for s in (a, b) if s in gone_of) for a, b in zip(s0.tolist(), s1.tolist(), strict=True)],
                              np.bool_)
            kept = stands & np.isfinite(sums_X) & np.isfinite(begin_X) & np.isfinite(end_X)
            s0, s1, ends = s0[kept], s1[kept], ends[kept]
            teacher.append(sums_X[kept] - begin_X[kept] + end_X[kept])
            dead += [(first + int(place_S[s]), gone) for s in sorted({*s0.tolist(), *s1[ends].tolist()}) if (gone := gone_of[s]) is not None]
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
        wanted_C = ~behind(own, spans.student_C2[:, 0], theirs, spans.teacher_C2[:, 0])
        if kind == UNEVEN:
            wanted_C &= (np.diff(spans.student_C2)[:, 0] > 1) | (np.diff(spans.teacher_C2)[:, 0] > 1)
        mine_X2, other_X2 = np.concatenate([spans.student_C2[wanted_C], mine_X2]), np.concatenate([spans.teacher_C2[wanted_C], other_X2])
        order_X = np.argsort(mine_X2[:, 0], kind="stable")
        mine_X2, other_X2 = mine_X2[order_X], other_X2[order_X]
        at_C2 = np.unique(np.concatenate([np.stack([found.boundaries.student_C, found.boundaries.teacher_C], 1),
                                          np.stack([mine_X2[:, 0], other_X2[:, 0]], 1)]), axis=0)
        at_C2 = at_C2[np.isin(at_C2[:, 0], mine_X2)]  # a mask costs: where no stretch begins or ends none is asked
        return _Laid(at_C2, self._contexts(own, theirs, at_C2), mine_X2, other_X2)

    @cached_property
    def _head(self) -> Head | None:
        """Of a model that is open here; None where it is more than a linear map (quantised), or offloaded: then its whole rows are kept."""
        engine = self.teacher.engine
        if not isinstance(engine, LocalEngine) or engine.model.get_output_embeddings().weight.is_meta:  # offloaded: it is here in a forward alone
            return None
        try:
            scaling = scaling_of(engine.model, engine.vocabulary, self.teacher.name)
        except Refused:
            return None
        linear = engine.model.get_output_embeddings()
        return Head(linear.weight, engine.vocabulary, linear.bias, scaling.scale, scaling.cap)

    def _headed(self, teacher_CX: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, Head]:
        return teacher_CX if self._head is None else (teacher_CX, self._head)

    @torch.no_grad()
    def _pieces(self, some: Sequence[tuple[Tokens, Tokens]]) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        """(answer, its first row, rows of log-probabilities, what is kept of them), some at a time."""
        at, engine = [0] * len(some), self.teacher.engine
        if self._head is None or not isinstance(engine, LocalEngine):
            for k, some_NW in engine.pieces([theirs.ids_T for _, theirs in some], [theirs.learn_T for _, theirs in some]):
                yield k, at[k], some_NW, some_NW
                at[k] += len(some_NW)
            return
        for begin in range(0, len(some), engine.batch):
            few = [theirs for _, theirs in some[begin:begin + engine.batch]]
            ids_BS, mask_BS = torch.zeros((2, len(few), max(map(len, few))), dtype=torch.int64)
            for b, theirs in enumerate(few):
                ids_BS[b, :len(theirs)], mask_BS[b, :len(theirs)] = torch.from_numpy(theirs.ids_T), 1
            hidden_BSD = hidden_states(engine.model, ids_BS, mask_BS)
            for b, theirs in enumerate(few):
                states_ND = hidden_BSD[b, torch.from_numpy(np.flatnonzero(theirs.learn_T) - 1)]
                for some_ND in torch.split(states_ND, max(1, AT_ONCE // self._head.vocabulary)):
                    logprobs_NW = torch.log_softmax(self._head.logits(some_ND), -1)
                    if not torch.isfinite(logprobs_NW).all():
                        raise TeacherError("log-probabilities that are not finite", where=self.teacher.name,
                                           remedy="the weights are broken, or need another dtype")
                    yield begin + b, at[begin + b], logprobs_NW, some_ND
                    at[begin + b] += len(some_ND)

    def _contexts(self, own: Tokens, theirs: Tokens, at_C2: Ints) -> Ints:
        """At each common boundary the contexts in which the student's tokens stand, and the teacher's; FREE where both have one tokenizer."""
        student, teacher = self.bridge.student_mask, self.bridge.teacher_mask
        if student is None or teacher is None:
            return np.full((len(at_C2), 2), FREE, np.int64)
        return np.stack([student.keeper.inner(theirs, at_C2[:, 1]), teacher.keeper.inner(own, at_C2[:, 0])], 1)

    def likely_in(self, logprobs_NW: torch.Tensor) -> Likely | None:
        """The tokens of some rows to be asked whether they can stand; None = all."""
        return likely_in(logprobs_NW, self.least) if self.least else None

    def gone(self, mask: Mask | None, context: int, likely: Ints | None) -> Ints | None:
        """What of the likely tokens cannot stand in a context, sorted. None: none of them can, so that nothing is known of what stands there."""
        if mask is None or context == FREE:
            return NONE
        if likely is None:
            key = id(mask), context
            if key not in self._gone:
                self._gone[key] = mask.dead(context)
            return self._gone[key]
        found = mask.dead(context, likely)
        return None if 0 < len(found) == len(likely) else found

    @cached_property
    def _sizes(self) -> tuple[Ints, Ints]:
        """Tokens of each event, on either side."""
        student_E, teacher_E = (np.bincount(event_X[event_X >= 0], minlength=self.bridge.events)
                                for event_X in (self.bridge.student_event_V, self.bridge.teacher_event_W))
        return student_E, teacher_E

    @cached_property
    def _shared(self) -> int:
        return int((np.minimum(*self._sizes) > 0).sum())

    def _agree(self, dead_V: Ints, dead_W: Ints) -> bool:
        """Whether some event is left that both sides can say."""
        lost = set[int]()
        for dead, event_X, size_E in zip((dead_V, dead_W), (self.bridge.student_event_V, self.bridge.teacher_event_W), self._sizes, strict=True):
            events, counts = np.unique(event_X[dead], return_counts=True)
            known = events >= 0
            lost.update(events[known][counts[known] == size_E[events[known]]].tolist())
        student_E, teacher_E = self._sizes
        return sum(int(min(student_E[e], teacher_E[e]) > 0) for e in lost) < self._shared


class _Said:
    """What a teacher finds of its own tokens: of each answer the realised tokens' log-probabilities, and at each boundary (teacher's token) log
    of the mass that can stand; -inf where none is known to."""

    def __init__(self, pair: Pair, theirs: Sequence[Tokens], laid: Sequence[_Laid]) -> None:
        self.pair, self.theirs = pair, theirs
        self.context = [dict(zip(one.at_C2[:, 1].tolist(), one.context_C2[:, 1].tolist(), strict=True)) for one in laid]
        self.realised = [np.zeros(int(tokens.learn_T.sum())) for tokens in theirs]
        self.betas: list[dict[int, float]] = [{} for _ in theirs]

    def take(self, k: int, first: int, some_NW: torch.Tensor, likely: Likely | None) -> None:
        """Some rows of answer k, whole, and their likely tokens. What stands is summed itself: 1 - dead has no digits where the teacher is
        certain of what cannot be."""
        tokens = self.theirs[k]
        learned = np.flatnonzero(tokens.learn_T)[first:first + len(some_NW)]
        said_N = some_NW[range(len(learned)), torch.from_numpy(tokens.ids_T[learned]).long()]
        self.realised[k][first:first + len(some_NW)] = said_N.double().cpu().numpy()
        for row, token in enumerate(learned.tolist()):
            if token in self.context[k]:
                gone = self.pair.gone(self.pair.bridge.teacher_mask, self.context[k][token], None if likely is None else likely.at(row))
                if gone is None or not len(gone):
                    self.betas[k][token] = -np.inf if gone is None else 0.0
                else:
                    gone_M = torch.from_numpy(gone).to(some_NW.device)
                    self.betas[k][token] = float(some_NW[row].double().index_fill(0, gone_M, -torch.inf).logsumexp(0))

    def take_named(self, k: int, rows: Rows) -> None:
        """Rows of answer k that name some tokens. Of what cannot stand only what is named is known: the rest of it is taken to be nothing.
        Where what is named and cannot stand is all there is, to within MASS, what is left is rounding."""
        self.realised[k] = rows.realised_N.astype(np.float64)
        for row, token in enumerate(np.flatnonzero(self.theirs[k].learn_T).tolist()):
            if token in self.context[k]:
                here = slice(rows.offsets_N1[row], rows.offsets_N1[row + 1])
                named = np.unique(rows.ids_M[here]).astype(np.int64)
                gone = self.pair.gone(self.pair.bridge.teacher_mask, self.context[k][token], named)
                lost = rows.probs_M[here][np.isin(rows.ids_M[here], named if gone is None else gone)].astype(np.float64).sum()
                self.betas[k][token] = float(np.log1p(-lost)) if lost < 1 - MASS else -np.inf


def _rows_of(tokens: Tokens) -> Ints:
    """The number of each learned token among the learned ones."""
    return np.cumsum(tokens.learn_T, dtype=np.int64) - 1


def _as_dead(rows: Sequence[int], tokens: Sequence[Ints]) -> Dead:
    return Dead(torch.from_numpy(np.repeat(np.array(rows, np.int64), [len(some) for some in tokens])),
                torch.from_numpy(np.concatenate([NONE, *tokens])))
