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
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from persea.alignment.boundary_mask import BoundaryMask
from persea.alignment.event_map import EventMap
from persea.alignment.markers import (
    align_marker_runs,
    boundaries_not_after_markers,
    is_after_markers,
)
from persea.alignment.spans import align
from persea.alignment.token_order import UNRESTRICTED_CONTEXT
from persea.distributions import MASS_TOLERANCE, SparseDistributions
from persea.errors import RefusedError, TeacherError
from persea.losses import ImpossibleTokens, LMHead, SpanTargets
from persea.teachers.engines import EngineFailure
from persea.teachers.engines.transformers import TransformersEngine
from persea.teachers.teacher import Teacher
from persea.tokenization.tokens import RenderedTokens
from persea.training.lm_head import find_logit_scaling, hidden_states
from persea.training.on_policy.candidates import (
    MAX_LOGIT_ELEMENTS,
    CandidateTokens,
    candidates_from_logprobs,
)

IntArray = npt.NDArray[np.int64]
NO_TOKENS = np.empty(0, np.int64)
MULTI_TOKEN_SPANS, ALL_SPANS = 0, 1  # which spans: those of several tokens on a side, or every one


@dataclass(frozen=True)
class TeacherScores:
    """A teacher's whole distributions beside some learned positions, and stretches for what these do not know. C positions.

    place_C                     learned position of the student, counted through the answers laid end to end
    teacher                     its natural log-probabilities [C, W]; of a model that is open here what its head is given [C, D], and the head
    student_dead, teacher_dead  what cannot stand there; None where both have one tokenizer
    marks, marks_dead           runs of markers and spans of several tokens on a side, over the same positions; what cannot stand at their ends
    """

    position_C: torch.Tensor
    teacher_outputs: torch.Tensor | tuple[torch.Tensor, LMHead]
    student_impossible_tokens: ImpossibleTokens | None
    teacher_impossible_tokens: ImpossibleTokens | None
    marker_spans: SpanTargets
    marker_impossible_tokens: ImpossibleTokens

    @property
    def logprobs_CW(self) -> torch.Tensor:
        """All of them at once: to look at, not to train by."""
        return (
            self.teacher_outputs
            if isinstance(self.teacher_outputs, torch.Tensor)
            else torch.log_softmax(self.teacher_outputs[1].logits(self.teacher_outputs[0]), -1)
        )


@dataclass(frozen=True)
class _AlignedAnswer:
    """One answer in two voices. C common boundaries, runs of markers' beginnings among them; X stretches.

    at_C2       (student token, teacher token) at each, the student's in order
    context_C2  in which the student's candidates stand there, and the teacher's (Mask.dead)
    student_X2, teacher_X2  half-open ranges of tokens
    """

    boundary_C2: IntArray
    context_C2: IntArray
    student_span_X2: IntArray
    teacher_span_X2: IntArray


@dataclass(frozen=True, eq=False)
class TeacherScorer:
    """A teacher, and its bridge to the student. least: what a token's probability must be to be asked whether it can stand; 0 = every token is."""

    teacher: Teacher
    event_map: EventMap
    min_prob: float = 0.0
    _impossible_cache: dict[tuple[int, int], IntArray] = field(default_factory=dict, repr=False)

    def score_boundaries(
        self,
        answers: Sequence[tuple[RenderedTokens, RenderedTokens]],
        candidates: CandidateTokens | None = None,
    ) -> TeacherScores:
        """Of answers (the student's tokens, the teacher's), every common boundary at which an event is left that both can say.

        found  the student's likely tokens; None = every token is asked whether it can stand
        """
        laid = [boundaries_not_after_markers(own, theirs) for own, theirs in answers]
        contexts = [
            self._boundary_contexts(own, theirs, np.stack([one.student_C, one.teacher_C], 1))
            for (own, theirs), one in zip(answers, laid, strict=True)
        ]
        marked = [self._align_answer(own, theirs, MULTI_TOKEN_SPANS) for own, theirs in answers]
        firsts = np.cumsum([0, *(int(own.loss_mask_T.sum()) for own, _ in answers)])
        places = [
            first + _learned_index(own)[one.student_C]
            for (own, _), one, first in zip(answers, laid, firsts[:-1].tolist(), strict=True)
        ]
        said = _TeacherSpanScores(self, [theirs for _, theirs in answers], marked)
        pieces, gone_W = (
            [list[torch.Tensor]() for _ in answers],
            [list[IntArray | None]() for _ in answers],
        )
        for k, first, some_NW, some_NX in self._iter_logprobs(answers):
            wanted, likely = (
                _learned_index(answers[k][1])[laid[k].teacher_C],
                self.find_candidates(some_NW),
            )
            here_C = (wanted >= first) & (wanted < first + len(some_NW))
            row_C = wanted[here_C] - first
            pieces[k].append(some_NX[torch.from_numpy(row_C)])
            gone_W[k] += [
                self.impossible_tokens(
                    self.event_map.teacher_mask, context, None if likely is None else likely.at(row)
                )
                for context, row in zip(
                    contexts[k][here_C, 1].tolist(), row_C.tolist(), strict=True
                )
            ]
            said.add_logprobs(k, first, some_NW, likely)
        place_C, teacher_CX = (
            np.concatenate([NO_TOKENS, *places]),
            torch.cat([piece for mine in pieces for piece in mine]),
        )
        marks_ = self._span_targets(answers, marked, said, candidates)
        if self.event_map.teacher_mask is None or self.event_map.student_mask is None:
            return TeacherScores(
                torch.from_numpy(place_C), self._with_head(teacher_CX), None, None, *marks_
            )
        context_C = np.concatenate([NO_TOKENS, *(one[:, 0] for one in contexts)])
        gone_V = [
            self.impossible_tokens(
                self.event_map.student_mask,
                context,
                None if candidates is None else candidates.at(place),
            )
            for context, place in zip(context_C.tolist(), place_C.tolist(), strict=True)
        ]
        both = enumerate(zip(gone_V, [one for mine in gone_W for one in mine], strict=True))
        fit = {
            c: (v, w)
            for c, (v, w) in both
            if v is not None and w is not None and self._has_common_event(v, w)
        }
        fits_C = np.array(list(fit), np.int64)
        dead_V, dead_W = (
            _to_impossible_tokens(range(len(fit)), [sides[which] for sides in fit.values()])
            for which in (0, 1)
        )
        return TeacherScores(
            torch.from_numpy(place_C[fits_C]),
            self._with_head(teacher_CX[torch.from_numpy(fits_C)]),
            dead_V,
            dead_W,
            *marks_,
        )

    def score_spans(
        self,
        answers: Sequence[tuple[RenderedTokens, RenderedTokens]],
        candidates: CandidateTokens | None = None,
    ) -> tuple[SpanTargets, ImpossibleTokens]:
        """Of answers, the stretches that cover the same bytes (align.Spans) and the runs of markers, and what the student cannot say where one
        begins or ends.

        The teacher's side takes of each row the realised token's log-probability and, at a boundary, the mass that can stand. A stretch is
        left out where nothing that one side knows can stand at its rim, or where the teacher finds it impossible: nothing finite is to be
        learned of it.
        """
        laid = [self._align_answer(own, theirs, ALL_SPANS) for own, theirs in answers]
        said = _TeacherSpanScores(self, [theirs for _, theirs in answers], laid)
        engine = self.teacher.engine
        if not engine.capabilities.has_full_distributions:
            for k, rows in enumerate(
                engine.compute_sparse_distributions(
                    [theirs.ids_T for _, theirs in answers],
                    [theirs.loss_mask_T for _, theirs in answers],
                )
            ):
                if isinstance(rows, EngineFailure):
                    raise TeacherError(
                        f"an answer of the student could not be scored: {rows.reason}",
                        where=self.teacher.name,
                        remedy="look at the server, and run again: the last checkpoint stands",
                    )
                said.add_sparse(k, rows)
        else:
            for k, first, some_NW, _ in self._iter_logprobs(answers):
                said.add_logprobs(k, first, some_NW, self.find_candidates(some_NW))
        return self._span_targets(answers, laid, said, candidates)

    def _span_targets(
        self,
        answers: Sequence[tuple[RenderedTokens, RenderedTokens]],
        aligned: Sequence[_AlignedAnswer],
        teacher_scores: _TeacherSpanScores,
        candidates: CandidateTokens | None,
    ) -> tuple[SpanTargets, ImpossibleTokens]:
        columns: list[list[IntArray]] = [[], [], [], []]
        teacher, dead, first, chunk = (
            list[npt.NDArray[np.float64]](),
            list[tuple[int, IntArray]](),
            0,
            0,
        )
        for (own, theirs), found, said_N, beta in zip(
            answers,
            aligned,
            teacher_scores.token_logprobs,
            teacher_scores.log_possible_mass,
            strict=True,
        ):
            (s0, s1), (t0, t1) = found.student_span_X2.T, found.teacher_span_X2.T
            place_S, row_T, token_of = (
                _learned_index(own),
                _learned_index(theirs),
                dict(found.boundary_C2.tolist()),
            )
            gone_of = {
                s: self.impossible_tokens(
                    self.event_map.student_mask,
                    context,
                    None if candidates is None else candidates.at(first + int(place_S[s])),
                )
                for s, context in zip(
                    found.boundary_C2[:, 0].tolist(), found.context_C2[:, 0].tolist(), strict=True
                )
            }
            ends = np.array([s in token_of for s in s1.tolist()], np.bool_)
            begin_X, end_X = (
                np.array(
                    [
                        [beta[token_of[a]], beta[token_of[b]] if b in token_of else 0.0]
                        for a, b in zip(s0.tolist(), s1.tolist(), strict=True)
                    ]
                )
                .reshape(-1, 2)
                .T
            )
            sums_X = np.array(
                [
                    said_N[row_T[a] : row_T[b - 1] + 1].sum()
                    for a, b in zip(t0.tolist(), t1.tolist(), strict=True)
                ]
            )
            stands = np.array(
                [
                    all(gone_of[s] is not None for s in (a, b) if s in gone_of)
                    for a, b in zip(s0.tolist(), s1.tolist(), strict=True)
                ],
                np.bool_,
            )
            kept = stands & np.isfinite(sums_X) & np.isfinite(begin_X) & np.isfinite(end_X)
            s0, s1, ends = s0[kept], s1[kept], ends[kept]
            teacher.append(sums_X[kept] - begin_X[kept] + end_X[kept])
            dead += [
                (first + int(place_S[s]), gone)
                for s in sorted({*s0.tolist(), *s1[ends].tolist()})
                if (gone := gone_of[s]) is not None
            ]
            for column, values in zip(
                columns,
                (
                    np.repeat(np.arange(chunk, chunk + len(s0)), s1 - s0),
                    first
                    + place_S[
                        np.concatenate(
                            [NO_TOKENS, *(np.arange(a, b) for a, b in zip(s0, s1, strict=True))]
                        )
                    ],
                    first + place_S[s0],
                    np.where(ends, first + place_S[np.minimum(s1, len(own) - 1)], -1),
                ),
                strict=True,
            ):
                column.append(values.astype(np.int64))
            first, chunk = first + int(own.loss_mask_T.sum()), chunk + len(s0)
        chunk_P, position_P, begin_C, end_C = (
            torch.from_numpy(np.concatenate([NO_TOKENS, *column])) for column in columns
        )
        return (
            SpanTargets(
                chunk_P,
                position_P,
                begin_C,
                end_C,
                torch.from_numpy(np.concatenate([np.empty(0), *teacher])),
            ),
            _to_impossible_tokens([row for row, _ in dead], [gone for _, gone in dead]),
        )

    def _align_answer(
        self, student_tokens: RenderedTokens, teacher_tokens: RenderedTokens, span_kind: int
    ) -> _AlignedAnswer:
        """Runs of markers, and the spans of a kind that cover the same bytes."""
        found, (mine_X2, other_X2) = (
            align(student_tokens, teacher_tokens),
            align_marker_runs(student_tokens, teacher_tokens),
        )
        spans = found.spans
        wanted_C = ~is_after_markers(
            student_tokens, spans.student_C2[:, 0], teacher_tokens, spans.teacher_C2[:, 0]
        )
        if span_kind == MULTI_TOKEN_SPANS:
            wanted_C &= (np.diff(spans.student_C2)[:, 0] > 1) | (
                np.diff(spans.teacher_C2)[:, 0] > 1
            )
        mine_X2, other_X2 = (
            np.concatenate([spans.student_C2[wanted_C], mine_X2]),
            np.concatenate([spans.teacher_C2[wanted_C], other_X2]),
        )
        order_X = np.argsort(mine_X2[:, 0], kind="stable")
        mine_X2, other_X2 = mine_X2[order_X], other_X2[order_X]
        at_C2 = np.unique(
            np.concatenate(
                [
                    np.stack([found.boundaries.student_C, found.boundaries.teacher_C], 1),
                    np.stack([mine_X2[:, 0], other_X2[:, 0]], 1),
                ]
            ),
            axis=0,
        )
        at_C2 = at_C2[
            np.isin(at_C2[:, 0], mine_X2)
        ]  # a mask costs: where no stretch begins or ends none is asked
        return _AlignedAnswer(
            at_C2, self._boundary_contexts(student_tokens, teacher_tokens, at_C2), mine_X2, other_X2
        )

    @cached_property
    def _local_head(self) -> LMHead | None:
        """Of a model that is open here; None where it is more than a linear map (quantised), or offloaded: then its whole rows are kept."""
        if not self.teacher.engine.capabilities.has_local_model:
            return None
        engine = cast(TransformersEngine, self.teacher.engine)
        if (
            engine.model.get_output_embeddings().weight.is_meta
        ):  # offloaded: it is here in a forward alone
            return None
        try:
            scaling = find_logit_scaling(engine.model, engine.vocab_size, self.teacher.name)
        except RefusedError:
            return None
        linear = engine.model.get_output_embeddings()
        return LMHead(linear.weight, engine.vocab_size, linear.bias, scaling.scale, scaling.softcap)

    def _with_head(self, teacher_CX: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, LMHead]:
        return teacher_CX if self._local_head is None else (teacher_CX, self._local_head)

    @torch.no_grad()
    def _iter_logprobs(
        self, answers: Sequence[tuple[RenderedTokens, RenderedTokens]]
    ) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        """(answer, its first row, rows of log-probabilities, what is kept of them), some at a time."""
        at = [0] * len(answers)
        if self._local_head is None:
            for k, some_NW in self.teacher.engine.iter_logprobs(
                [theirs.ids_T for _, theirs in answers],
                [theirs.loss_mask_T for _, theirs in answers],
            ):
                yield k, at[k], some_NW, some_NW
                at[k] += len(some_NW)
            return
        engine = cast(TransformersEngine, self.teacher.engine)
        for begin in range(0, len(answers), engine.batch_size):
            few = [theirs for _, theirs in answers[begin : begin + engine.batch_size]]
            ids_BS, mask_BS = torch.zeros((2, len(few), max(map(len, few))), dtype=torch.int64)
            for b, theirs in enumerate(few):
                ids_BS[b, : len(theirs)], mask_BS[b, : len(theirs)] = (
                    torch.from_numpy(theirs.ids_T),
                    1,
                )
            hidden_BSD = hidden_states(engine.model, ids_BS, mask_BS)
            for b, theirs in enumerate(few):
                states_ND = hidden_BSD[b, torch.from_numpy(np.flatnonzero(theirs.loss_mask_T) - 1)]
                for some_ND in torch.split(
                    states_ND, max(1, MAX_LOGIT_ELEMENTS // self._local_head.vocab_size)
                ):
                    logprobs_NW = torch.log_softmax(self._local_head.logits(some_ND), -1)
                    if not torch.isfinite(logprobs_NW).all():
                        raise TeacherError(
                            "log-probabilities that are not finite",
                            where=self.teacher.name,
                            remedy="the weights are broken, or need another dtype",
                        )
                    yield begin + b, at[begin + b], logprobs_NW, some_ND
                    at[begin + b] += len(some_ND)

    def _boundary_contexts(
        self, student_tokens: RenderedTokens, teacher_tokens: RenderedTokens, boundary_C2: IntArray
    ) -> IntArray:
        """At each common boundary the contexts in which the student's tokens stand, and the teacher's; FREE where both have one tokenizer."""
        student, teacher = self.event_map.student_mask, self.event_map.teacher_mask
        if student is None or teacher is None:
            return np.full((len(boundary_C2), 2), UNRESTRICTED_CONTEXT, np.int64)
        return np.stack(
            [
                student.other.supervised_context_ids(teacher_tokens, boundary_C2[:, 1]),
                teacher.other.supervised_context_ids(student_tokens, boundary_C2[:, 0]),
            ],
            1,
        )

    def find_candidates(self, logprobs_NW: torch.Tensor) -> CandidateTokens | None:
        """The tokens of some rows to be asked whether they can stand; None = all."""
        return candidates_from_logprobs(logprobs_NW, self.min_prob) if self.min_prob else None

    def impossible_tokens(
        self, mask: BoundaryMask | None, context: int, candidates: IntArray | None
    ) -> IntArray | None:
        """What of the likely tokens cannot stand in a context, sorted. None: none of them can, so that nothing is known of what stands there."""
        if mask is None or context == UNRESTRICTED_CONTEXT:
            return NO_TOKENS
        if candidates is None:
            key = id(mask), context
            if key not in self._impossible_cache:
                self._impossible_cache[key] = mask.impossible_tokens(context)
            return self._impossible_cache[key]
        found = mask.impossible_tokens(context, candidates)
        return None if 0 < len(found) == len(candidates) else found

    @cached_property
    def _event_sizes(self) -> tuple[IntArray, IntArray]:
        """Tokens of each event, on either side."""
        student_E, teacher_E = (
            np.bincount(event_X[event_X >= 0], minlength=self.event_map.num_events)
            for event_X in (self.event_map.student_event_V, self.event_map.teacher_event_W)
        )
        return student_E, teacher_E

    @cached_property
    def _num_shared_events(self) -> int:
        return int((np.minimum(*self._event_sizes) > 0).sum())

    def _has_common_event(self, impossible_V: IntArray, impossible_W: IntArray) -> bool:
        """Whether some event is left that both sides can say."""
        lost = set[int]()
        for dead, event_X, size_E in zip(
            (impossible_V, impossible_W),
            (self.event_map.student_event_V, self.event_map.teacher_event_W),
            self._event_sizes,
            strict=True,
        ):
            events, counts = np.unique(event_X[dead], return_counts=True)
            known = events >= 0
            lost.update(events[known][counts[known] == size_E[events[known]]].tolist())
        student_E, teacher_E = self._event_sizes
        return sum(int(min(student_E[e], teacher_E[e]) > 0) for e in lost) < self._num_shared_events


class _TeacherSpanScores:
    """What a teacher finds of its own tokens: of each answer the realised tokens' log-probabilities, and at each boundary (teacher's token) log
    of the mass that can stand; -inf where none is known to.
    """

    def __init__(
        self,
        scorer: TeacherScorer,
        teacher_tokens: Sequence[RenderedTokens],
        aligned: Sequence[_AlignedAnswer],
    ) -> None:
        self.scorer, self.teacher_tokens = scorer, teacher_tokens
        self.contexts = [
            dict(zip(one.boundary_C2[:, 1].tolist(), one.context_C2[:, 1].tolist(), strict=True))
            for one in aligned
        ]
        self.token_logprobs = [np.zeros(int(tokens.loss_mask_T.sum())) for tokens in teacher_tokens]
        self.log_possible_mass: list[dict[int, float]] = [{} for _ in teacher_tokens]

    def add_logprobs(
        self, k: int, first: int, some_NW: torch.Tensor, candidates: CandidateTokens | None
    ) -> None:
        """Some rows of answer k, whole, and their likely tokens. What stands is summed itself: 1 - dead has no digits where the teacher is
        certain of what cannot be.
        """
        tokens = self.teacher_tokens[k]
        learned = np.flatnonzero(tokens.loss_mask_T)[first : first + len(some_NW)]
        said_N = some_NW[range(len(learned)), torch.from_numpy(tokens.ids_T[learned]).long()]
        self.token_logprobs[k][first : first + len(some_NW)] = said_N.double().cpu().numpy()
        for row, token in enumerate(learned.tolist()):
            if token in self.contexts[k]:
                gone = self.scorer.impossible_tokens(
                    self.scorer.event_map.teacher_mask,
                    self.contexts[k][token],
                    None if candidates is None else candidates.at(row),
                )
                if gone is None or not len(gone):
                    self.log_possible_mass[k][token] = -np.inf if gone is None else 0.0
                else:
                    gone_M = torch.from_numpy(gone).to(some_NW.device)
                    self.log_possible_mass[k][token] = float(
                        some_NW[row].double().index_fill(0, gone_M, -torch.inf).logsumexp(0)
                    )

    def add_sparse(self, k: int, rows: SparseDistributions) -> None:
        """Rows of answer k that name some tokens. Of what cannot stand only what is named is known: the rest of it is taken to be nothing.
        Where what is named and cannot stand is all there is, to within MASS, what is left is rounding.
        """
        self.token_logprobs[k] = rows.target_logprob_N.astype(np.float64)
        for row, token in enumerate(np.flatnonzero(self.teacher_tokens[k].loss_mask_T).tolist()):
            if token in self.contexts[k]:
                here = slice(rows.offsets_N1[row], rows.offsets_N1[row + 1])
                named = np.unique(rows.ids_M[here]).astype(np.int64)
                gone = self.scorer.impossible_tokens(
                    self.scorer.event_map.teacher_mask, self.contexts[k][token], named
                )
                lost = (
                    rows.probs_M[here][np.isin(rows.ids_M[here], named if gone is None else gone)]
                    .astype(np.float64)
                    .sum()
                )
                self.log_possible_mass[k][token] = (
                    float(np.log1p(-lost)) if lost < 1 - MASS_TOLERANCE else -np.inf
                )


def _learned_index(tokens: RenderedTokens) -> IntArray:
    """The number of each learned token among the learned ones."""
    return np.cumsum(tokens.loss_mask_T, dtype=np.int64) - 1


def _to_impossible_tokens(rows: Sequence[int], tokens: Sequence[IntArray]) -> ImpossibleTokens:
    return ImpossibleTokens(
        torch.from_numpy(np.repeat(np.array(rows, np.int64), [len(some) for some in tokens])),
        torch.from_numpy(np.concatenate([NO_TOKENS, *tokens])),
    )
