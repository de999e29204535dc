"""Score a student's answers with a teacher that uses another tokenizer.

`score_boundaries` gives the teacher's whole distributions where both tokenizers begin a token at
the same byte. `score_spans` gives the likelihood of each span between two such boundaries, for
teachers that give only log-probabilities. Both find the tokens that are impossible at the other's
boundary.

Tokens without bytes (the ends of thinking, the frame of a tool call) differ between templates and
share no event, but mean the same: one part ends and the next begins. A run of them with the first
content token behind is a span too; for the student's own answers the gradient of the span loss is
that of reverse KL. Without these spans the student does not learn where thinking ends or whether to
call a tool: a teacher that marks text with a marker gives a tool call no mass in the distribution
behind the marker, and a student that chose text was reinforced (tools 0.97 -> 0.57).

Distributions compare events. Where one student token is several teacher tokens ("27" and "2", "7"),
all tokens of an event look alike, and only the span distinguishes them. Without these spans a
student forgot digits (code 0.97 -> 0.81).

Impossible tokens are looked for among tokens that either side gives at least `min_prob`. Testing
every token of a real vocabulary takes seconds a boundary (bench/mask_cost.py); the mass of
impossible tokens below `min_prob` is missed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import cast

import numpy as np
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
from persea.errors import RefusedError, TeacherError
from persea.losses import ImpossibleTokens, LMHead, SpanTargets
from persea.models.hidden_states import find_logit_scaling, hidden_states
from persea.teachers.engines import EngineFailure
from persea.teachers.engines.transformers import TransformersEngine
from persea.teachers.teacher import Teacher
from persea.tokenization.tokens import IntArray, RenderedTokens
from persea.training.example import supervised_index
from persea.training.on_policy.candidates import (
    MAX_LOGIT_ELEMENTS,
    NO_TOKENS,
    CandidateTokens,
    candidates_from_logprobs,
)
from persea.training.on_policy.span_scores import (
    ALL_SPANS,
    MULTI_TOKEN_SPANS,
    AlignedAnswer,
    TeacherSpanScores,
    build_span_targets,
    to_impossible_tokens,
)


@dataclass(frozen=True)
class TeacherScores:
    """A teacher's whole distributions at C common boundaries, and spans for the rest.

    Attributes:
        position_C: supervised position of the student, numbered through all answers.
        teacher_outputs: natural log-probabilities [C, W], or for a local model its hidden states
            [C, D] and its head.
        student_impossible_tokens: impossible student tokens; None = both share one tokenizer.
        teacher_impossible_tokens: impossible teacher tokens; None = both share one tokenizer.
        marker_spans: runs of markers, and spans of several tokens on a side.
        marker_impossible_tokens: impossible student tokens at the edges of these spans.
    """

    position_C: torch.Tensor
    teacher_outputs: torch.Tensor | tuple[torch.Tensor, LMHead]
    student_impossible_tokens: ImpossibleTokens | None
    teacher_impossible_tokens: ImpossibleTokens | None
    marker_spans: SpanTargets
    marker_impossible_tokens: ImpossibleTokens

    @property
    def logprobs_CW(self) -> torch.Tensor:
        """All log-probabilities at once, for inspection and tests; training does not use them."""
        return (
            self.teacher_outputs
            if isinstance(self.teacher_outputs, torch.Tensor)
            else torch.log_softmax(self.teacher_outputs[1].logits(self.teacher_outputs[0]), -1)
        )


@dataclass(frozen=True, eq=False)
class TeacherScorer:
    """Scores answers of the student with one teacher.

    Attributes:
        teacher: the teacher.
        event_map: map between the teacher's and the student's vocabulary.
        min_prob: least probability at which a teacher token is tested for impossibility; 0 = test
            every token.
    """

    teacher: Teacher
    event_map: EventMap
    min_prob: float = 0.0
    _impossible_cache: dict[tuple[int, int], IntArray] = field(default_factory=dict, repr=False)

    def score_boundaries(
        self,
        answers: Sequence[tuple[RenderedTokens, RenderedTokens]],
        candidates: CandidateTokens | None = None,
    ) -> TeacherScores:
        """Score every common boundary at which an event is left that both can produce.

        Args:
            answers: (student tokens, teacher tokens) of each answer.
            candidates: the student's candidates by supervised position, numbered through all
                answers; None = test every student token for impossibility.
        """
        boundaries = [boundaries_not_after_markers(own, theirs) for own, theirs in answers]
        contexts = [
            self._boundary_contexts(own, theirs, np.stack([one.student_C, one.teacher_C], 1))
            for (own, theirs), one in zip(answers, boundaries, strict=True)
        ]
        aligned = [self._align_answer(own, theirs, MULTI_TOKEN_SPANS) for own, theirs in answers]
        firsts = np.cumsum([0, *(int(own.loss_mask_T.sum()) for own, _ in answers)])
        positions = [
            first + supervised_index(own)[one.student_C]
            for (own, _), one, first in zip(answers, boundaries, firsts[:-1].tolist(), strict=True)
        ]
        span_scores = TeacherSpanScores(self, [theirs for _, theirs in answers], aligned)
        # by answer: an engine may return the answers in another order
        outputs = [list[torch.Tensor]() for _ in answers]
        impossible_W = [list[IntArray | None]() for _ in answers]
        for k, first, logprobs_NW, output_NX in self._iter_logprobs(answers):
            wanted_C = supervised_index(answers[k][1])[boundaries[k].teacher_C]
            teacher_candidates = self.find_candidates(logprobs_NW)
            here_C = (wanted_C >= first) & (wanted_C < first + len(logprobs_NW))
            row_C = wanted_C[here_C] - first
            outputs[k].append(output_NX[torch.from_numpy(row_C)])
            impossible_W[k] += [
                self.impossible_tokens(
                    self.event_map.teacher_mask,
                    context,
                    None if teacher_candidates is None else teacher_candidates.at(row),
                )
                for context, row in zip(
                    contexts[k][here_C, 1].tolist(), row_C.tolist(), strict=True
                )
            ]
            span_scores.add_logprobs(k, first, logprobs_NW, teacher_candidates)
        position_C = np.concatenate([NO_TOKENS, *positions])
        teacher_CX = torch.cat([part for parts in outputs for part in parts])
        spans = build_span_targets(self, answers, aligned, span_scores, candidates)
        if self.event_map.teacher_mask is None or self.event_map.student_mask is None:
            return TeacherScores(
                torch.from_numpy(position_C), self._with_head(teacher_CX), None, None, *spans
            )
        context_C = np.concatenate([NO_TOKENS, *(one[:, 0] for one in contexts)])
        impossible_V = [
            self.impossible_tokens(
                self.event_map.student_mask,
                context,
                None if candidates is None else candidates.at(position),
            )
            for context, position in zip(context_C.tolist(), position_C.tolist(), strict=True)
        ]
        usable = {
            c: (v, w)
            for c, (v, w) in enumerate(zip(impossible_V, chain(*impossible_W), strict=True))
            if v is not None and w is not None and self._has_common_event(v, w)
        }
        usable_C = np.array(list(usable), np.int64)
        student_impossible, teacher_impossible = (
            to_impossible_tokens(range(len(usable)), [sides[which] for sides in usable.values()])
            for which in (0, 1)
        )
        return TeacherScores(
            torch.from_numpy(position_C[usable_C]),
            self._with_head(teacher_CX[torch.from_numpy(usable_C)]),
            student_impossible,
            teacher_impossible,
            *spans,
        )

    def score_spans(
        self,
        answers: Sequence[tuple[RenderedTokens, RenderedTokens]],
        candidates: CandidateTokens | None = None,
    ) -> tuple[SpanTargets, ImpossibleTokens]:
        """Score every span that covers the same bytes, and every run of markers.

        Args:
            answers: (student tokens, teacher tokens) of each answer.
            candidates: the student's candidates by supervised position, numbered through all
                answers; None = test every student token for impossibility.

        Returns:
            Spans with the teacher's likelihoods, and the impossible student tokens at their edges.
            Of each teacher distribution only the log-probability of the actual token is used, and
            at a boundary the mass of possible tokens. See `build_span_targets` for spans left out.

        Raises:
            TeacherError: if a server could not score an answer.
        """
        aligned = [self._align_answer(own, theirs, ALL_SPANS) for own, theirs in answers]
        span_scores = TeacherSpanScores(self, [theirs for _, theirs in answers], aligned)
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
                        remedy="check the server, and run again: the training resumes from the "
                        "last checkpoint",
                    )
                span_scores.add_sparse(k, rows)
        else:
            for k, first, logprobs_NW, _ in self._iter_logprobs(answers):
                span_scores.add_logprobs(k, first, logprobs_NW, self.find_candidates(logprobs_NW))
        return build_span_targets(self, answers, aligned, span_scores, candidates)

    def _align_answer(
        self, student_tokens: RenderedTokens, teacher_tokens: RenderedTokens, span_kind: int
    ) -> AlignedAnswer:
        """Return the marker runs and the spans of a kind that cover the same bytes."""
        alignment = align(student_tokens, teacher_tokens)
        student_X2, teacher_X2 = align_marker_runs(student_tokens, teacher_tokens)
        spans = alignment.spans
        wanted_C = ~is_after_markers(
            student_tokens, spans.student_C2[:, 0], teacher_tokens, spans.teacher_C2[:, 0]
        )
        if span_kind == MULTI_TOKEN_SPANS:
            wanted_C &= (np.diff(spans.student_C2)[:, 0] > 1) | (
                np.diff(spans.teacher_C2)[:, 0] > 1
            )
        student_X2 = np.concatenate([spans.student_C2[wanted_C], student_X2])
        teacher_X2 = np.concatenate([spans.teacher_C2[wanted_C], teacher_X2])
        order_X = np.argsort(student_X2[:, 0], kind="stable")
        student_X2, teacher_X2 = student_X2[order_X], teacher_X2[order_X]
        boundaries = alignment.boundaries
        boundary_C2 = np.unique(
            np.concatenate(
                [
                    np.stack([boundaries.student_C, boundaries.teacher_C], 1),
                    np.stack([student_X2[:, 0], teacher_X2[:, 0]], 1),
                ]
            ),
            axis=0,
        )
        # masks are slow, so only boundaries where a span begins or ends are tested
        boundary_C2 = boundary_C2[np.isin(boundary_C2[:, 0], student_X2)]
        contexts = self._boundary_contexts(student_tokens, teacher_tokens, boundary_C2)
        return AlignedAnswer(boundary_C2, contexts, student_X2, teacher_X2)

    @cached_property
    def _local_head(self) -> LMHead | None:
        """The head of a local model; None = whole distributions are kept instead.

        None for a head that is no plain linear map (quantised) or is offloaded: an offloaded weight
        is in memory only during a forward pass.
        """
        if not self.teacher.engine.capabilities.has_local_model:
            return None
        engine = cast(TransformersEngine, self.teacher.engine)
        if engine.model.get_output_embeddings().weight.is_meta:
            return None
        try:
            scaling = find_logit_scaling(engine.model, engine.vocab_size, self.teacher.name)
        except RefusedError:
            return None
        linear = engine.model.get_output_embeddings()
        return LMHead(linear.weight, engine.vocab_size, linear.bias, scaling.scale, scaling.softcap)

    def _with_head(self, teacher_CX: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, LMHead]:
        """Return the outputs, with the head where they are hidden states."""
        return teacher_CX if self._local_head is None else (teacher_CX, self._local_head)

    @torch.no_grad()
    def _iter_logprobs(
        self, answers: Sequence[tuple[RenderedTokens, RenderedTokens]]
    ) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        """Yield (answer, first supervised token, log-probabilities, outputs to keep of them)."""
        done = [0] * len(answers)
        if self._local_head is None:
            for k, logprobs_NW in self.teacher.engine.iter_logprobs(
                [theirs.ids_T for _, theirs in answers],
                [theirs.loss_mask_T for _, theirs in answers],
            ):
                yield k, done[k], logprobs_NW, logprobs_NW
                done[k] += len(logprobs_NW)
            return
        engine = cast(TransformersEngine, self.teacher.engine)
        for begin in range(0, len(answers), engine.batch_size):
            batch = [theirs for _, theirs in answers[begin : begin + engine.batch_size]]
            ids_BS, mask_BS = torch.zeros((2, len(batch), max(map(len, batch))), dtype=torch.int64)
            for b, theirs in enumerate(batch):
                ids_BS[b, : len(theirs)], mask_BS[b, : len(theirs)] = (
                    torch.from_numpy(theirs.ids_T),
                    1,
                )
            hidden_BSD = hidden_states(engine.model, ids_BS, mask_BS)
            for b, theirs in enumerate(batch):
                states_ND = hidden_BSD[b, torch.from_numpy(np.flatnonzero(theirs.loss_mask_T) - 1)]
                for part_ND in torch.split(
                    states_ND, max(1, MAX_LOGIT_ELEMENTS // self._local_head.vocab_size)
                ):
                    logprobs_NW = torch.log_softmax(self._local_head.logits(part_ND), -1)
                    if not torch.isfinite(logprobs_NW).all():
                        raise TeacherError(
                            "log-probabilities that are not finite",
                            where=self.teacher.name,
                            remedy="the weights are damaged, or need another dtype",
                        )
                    yield begin + b, done[begin + b], logprobs_NW, part_ND
                    done[begin + b] += len(part_ND)

    def _boundary_contexts(
        self, student_tokens: RenderedTokens, teacher_tokens: RenderedTokens, boundary_C2: IntArray
    ) -> IntArray:
        """Return the contexts that decide impossible student and teacher tokens, [C, 2].

        UNRESTRICTED_CONTEXT everywhere if both share one tokenizer.
        """
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
        """Return the teacher tokens to test for impossibility; None = all."""
        return candidates_from_logprobs(logprobs_NW, self.min_prob) if self.min_prob else None

    def impossible_tokens(
        self, mask: BoundaryMask | None, context: int, candidates: IntArray | None
    ) -> IntArray | None:
        """Return the impossible candidates in a context, sorted.

        Args:
            mask: boundary mask of one side; None = nothing is impossible.
            context: context id of the other side.
            candidates: tokens to test; None = all.

        Returns:
            Token ids, or None if all candidates are impossible: which tokens are possible is then
            unknown.
        """
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
        """Number of student and of teacher tokens of each event."""
        student_E, teacher_E = (
            np.bincount(event_X[event_X >= 0], minlength=self.event_map.num_events)
            for event_X in (self.event_map.student_event_V, self.event_map.teacher_event_W)
        )
        return student_E, teacher_E

    @cached_property
    def _num_shared_events(self) -> int:
        """Number of events with tokens on both sides."""
        return int((np.minimum(*self._event_sizes) > 0).sum())

    def _has_common_event(self, impossible_V: IntArray, impossible_W: IntArray) -> bool:
        """Return whether an event is left that both sides can produce."""
        lost = set[int]()
        for impossible, event_X, size_E in zip(
            (impossible_V, impossible_W),
            (self.event_map.student_event_V, self.event_map.teacher_event_W),
            self._event_sizes,
            strict=True,
        ):
            events, counts = np.unique(event_X[impossible], return_counts=True)
            known = events >= 0
            lost.update(events[known][counts[known] == size_E[events[known]]].tolist())
        student_E, teacher_E = self._event_sizes
        return sum(int(min(student_E[e], teacher_E[e]) > 0) for e in lost) < self._num_shared_events
