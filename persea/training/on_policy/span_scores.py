"""Likelihoods that a teacher gives to spans of the student's answers, as span targets.

A span covers the same bytes in both tokenizers and has no common boundary inside, or is a run of
tokens without bytes (markers) with the first content token behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from persea.alignment.boundary_mask import BoundaryMask
from persea.alignment.event_map import EventMap
from persea.distributions import MASS_TOLERANCE, SparseDistributions
from persea.losses import ImpossibleTokens, SpanTargets
from persea.tokenization.tokens import IntArray, RenderedTokens
from persea.training.example import supervised_index
from persea.training.on_policy.candidates import NO_TOKENS, CandidateTokens

MULTI_TOKEN_SPANS, ALL_SPANS = 0, 1  # which spans: of several tokens on a side, or every span


@dataclass(frozen=True)
class AlignedAnswer:
    """One answer in student and teacher tokens: C common boundaries, X spans.

    Attributes:
        boundary_C2: (student token, teacher token) at each boundary where a span begins or ends,
            sorted by student token; beginnings of marker runs included.
        context_C2: context of the student's candidates at the boundary, and of the teacher's.
        student_span_X2: half-open ranges of student tokens.
        teacher_span_X2: half-open ranges of teacher tokens.
    """

    boundary_C2: IntArray
    context_C2: IntArray
    student_span_X2: IntArray
    teacher_span_X2: IntArray


class ImpossibleTokenSource(Protocol):
    """Finds impossible tokens; `TeacherScorer` is one."""

    @property
    def event_map(self) -> EventMap:
        """Map between the teacher's and the student's vocabulary."""

    def impossible_tokens(
        self, mask: BoundaryMask | None, context: int, candidates: IntArray | None
    ) -> IntArray | None:
        """Return the impossible candidates; None if all of them are."""


class TeacherSpanScores:
    """A teacher's log-probabilities of its own tokens of each answer, from its distributions.

    Attributes:
        token_logprobs: by answer, the log-probability of each supervised token.
        log_possible_mass: by answer, teacher token at a boundary -> log mass of possible tokens,
            nats; -inf if no candidate is possible.
    """

    def __init__(
        self,
        scorer: ImpossibleTokenSource,
        teacher_tokens: Sequence[RenderedTokens],
        aligned: Sequence[AlignedAnswer],
    ) -> None:
        self.scorer, self.teacher_tokens = scorer, teacher_tokens
        self.contexts = [
            dict(zip(one.boundary_C2[:, 1].tolist(), one.context_C2[:, 1].tolist(), strict=True))
            for one in aligned
        ]
        self.token_logprobs = [np.zeros(int(tokens.loss_mask_T.sum())) for tokens in teacher_tokens]
        self.log_possible_mass: list[dict[int, float]] = [{} for _ in teacher_tokens]

    def add_logprobs(
        self, k: int, first: int, logprobs_NW: torch.Tensor, candidates: CandidateTokens | None
    ) -> None:
        """Add whole distributions of answer k.

        The possible tokens themselves are summed. 1 minus the impossible mass would keep no digits
        where the teacher is certain of an impossible token.

        Args:
            k: number of the answer.
            first: supervised token of the first row.
            logprobs_NW: natural log-probabilities.
            candidates: candidates of each row; None = all tokens.
        """
        tokens, end = self.teacher_tokens[k], first + len(logprobs_NW)
        supervised = np.flatnonzero(tokens.loss_mask_T)[first:end]
        ids = torch.from_numpy(tokens.ids_T[supervised]).long()
        label_N = logprobs_NW[range(len(supervised)), ids]
        self.token_logprobs[k][first:end] = label_N.double().cpu().numpy()
        for row, token in enumerate(supervised.tolist()):
            if token in self.contexts[k]:
                impossible = self.scorer.impossible_tokens(
                    self.scorer.event_map.teacher_mask,
                    self.contexts[k][token],
                    None if candidates is None else candidates.at(row),
                )
                if impossible is None or not len(impossible):
                    self.log_possible_mass[k][token] = -np.inf if impossible is None else 0.0
                else:
                    index_M = torch.from_numpy(impossible).to(logprobs_NW.device)
                    self.log_possible_mass[k][token] = float(
                        logprobs_NW[row].double().index_fill(0, index_M, -torch.inf).logsumexp(0)
                    )

    def add_sparse(self, k: int, rows: SparseDistributions) -> None:
        """Add distributions of answer k that name some tokens.

        Only named tokens can be found impossible; unnamed impossible tokens are taken to have no
        mass. If the named impossible tokens hold all mass but MASS_TOLERANCE, the remainder is
        rounding error and counts as no mass.
        """
        self.token_logprobs[k] = rows.target_logprob_N.astype(np.float64)
        for row, token in enumerate(np.flatnonzero(self.teacher_tokens[k].loss_mask_T).tolist()):
            if token in self.contexts[k]:
                entries = slice(rows.offsets_N1[row], rows.offsets_N1[row + 1])
                ids_M, probs_M = rows.ids_M[entries], rows.probs_M[entries]
                named = np.unique(ids_M).astype(np.int64)
                impossible = self.scorer.impossible_tokens(
                    self.scorer.event_map.teacher_mask, self.contexts[k][token], named
                )
                is_lost_M = np.isin(ids_M, named if impossible is None else impossible)
                lost = probs_M[is_lost_M].astype(np.float64).sum()
                self.log_possible_mass[k][token] = (
                    float(np.log1p(-lost)) if lost < 1 - MASS_TOLERANCE else -np.inf
                )


def build_span_targets(
    scorer: ImpossibleTokenSource,
    answers: Sequence[tuple[RenderedTokens, RenderedTokens]],
    aligned: Sequence[AlignedAnswer],
    teacher_scores: TeacherSpanScores,
    candidates: CandidateTokens | None,
) -> tuple[SpanTargets, ImpossibleTokens]:
    """Build span targets of several answers, and the impossible student tokens at span edges.

    A span is left out if no candidate of one side is possible at its edge, or if the teacher gives
    the span no probability: the target would not be finite.

    Args:
        scorer: finds impossible tokens.
        answers: (student tokens, teacher tokens) of each answer.
        aligned: boundaries and spans of each answer.
        teacher_scores: the teacher's log-probabilities of its tokens.
        candidates: the student's candidates by supervised position, numbered through all answers;
            None = all tokens.
    """
    builder = _SpanTargetsBuilder(scorer, candidates)
    for (own, theirs), one, logprob_N, log_beta in zip(
        answers,
        aligned,
        teacher_scores.token_logprobs,
        teacher_scores.log_possible_mass,
        strict=True,
    ):
        builder.add(own, theirs, one, logprob_N, log_beta)
    return builder.build()


class _SpanTargetsBuilder:
    """Collects the spans of several answers; positions and spans are numbered through all."""

    def __init__(self, scorer: ImpossibleTokenSource, candidates: CandidateTokens | None) -> None:
        self.scorer, self.candidates = scorer, candidates
        self.first_position = self.first_span = 0
        self.columns: tuple[list[IntArray], ...] = ([], [], [], [])
        self.teacher_logprobs: list[npt.NDArray[np.float64]] = []
        self.impossible: list[tuple[int, IntArray]] = []

    def add(
        self,
        own: RenderedTokens,
        theirs: RenderedTokens,
        aligned: AlignedAnswer,
        logprob_N: npt.NDArray[np.float64],
        log_beta: dict[int, float],
    ) -> None:
        """Add the spans of one answer; `log_beta` is by teacher token."""
        index_S, index_T = supervised_index(own), supervised_index(theirs)
        (s0, s1), (t0, t1) = aligned.student_span_X2.T, aligned.teacher_span_X2.T
        teacher_token = dict(aligned.boundary_C2.tolist())
        impossible_at = self._impossible_at_boundaries(aligned, index_S)
        ends = np.array([s in teacher_token for s in s1.tolist()], np.bool_)
        beta_begin_X = np.array([log_beta[teacher_token[s]] for s in s0.tolist()], np.float64)
        beta_end_X = np.array(
            [log_beta[teacher_token[s]] if s in teacher_token else 0.0 for s in s1.tolist()],
            np.float64,
        )
        sums_X = np.array(
            [
                logprob_N[index_T[a] : index_T[b - 1] + 1].sum()
                for a, b in zip(t0.tolist(), t1.tolist(), strict=True)
            ],
            np.float64,
        )
        is_possible_X = np.array(
            [
                all(impossible_at[s] is not None for s in (a, b) if s in impossible_at)
                for a, b in zip(s0.tolist(), s1.tolist(), strict=True)
            ],
            np.bool_,
        )
        finite_X = np.isfinite(sums_X) & np.isfinite(beta_begin_X) & np.isfinite(beta_end_X)
        use_X = is_possible_X & finite_X
        s0, s1, ends = s0[use_X], s1[use_X], ends[use_X]
        self.teacher_logprobs.append(sums_X[use_X] - beta_begin_X[use_X] + beta_end_X[use_X])
        self.impossible += [
            (self.first_position + int(index_S[s]), tokens)
            for s in sorted({*s0.tolist(), *s1[ends].tolist()})
            if (tokens := impossible_at[s]) is not None
        ]
        span_tokens = np.concatenate(
            [NO_TOKENS, *(np.arange(a, b) for a, b in zip(s0, s1, strict=True))]
        )
        end_position_X = self.first_position + index_S[np.minimum(s1, len(own) - 1)]
        for column, values in zip(
            self.columns,
            (
                np.repeat(np.arange(self.first_span, self.first_span + len(s0)), s1 - s0),
                self.first_position + index_S[span_tokens],
                self.first_position + index_S[s0],
                np.where(ends, end_position_X, -1),
            ),
            strict=True,
        ):
            column.append(values.astype(np.int64))
        self.first_position += int(own.loss_mask_T.sum())
        self.first_span += len(s0)

    def _impossible_at_boundaries(
        self, aligned: AlignedAnswer, index_S: IntArray
    ) -> dict[int, IntArray | None]:
        """Return the impossible student tokens at each boundary, by student token."""
        return {
            s: self.scorer.impossible_tokens(
                self.scorer.event_map.student_mask,
                context,
                None
                if self.candidates is None
                else self.candidates.at(self.first_position + int(index_S[s])),
            )
            for s, context in zip(
                aligned.boundary_C2[:, 0].tolist(), aligned.context_C2[:, 0].tolist(), strict=True
            )
        }

    def build(self) -> tuple[SpanTargets, ImpossibleTokens]:
        """Return the targets of all answers."""
        span_P, position_P, begin_C, end_C = (
            torch.from_numpy(np.concatenate([NO_TOKENS, *column])) for column in self.columns
        )
        teacher_C = torch.from_numpy(np.concatenate([np.empty(0), *self.teacher_logprobs]))
        return (
            SpanTargets(span_P, position_P, begin_C, end_C, teacher_C),
            to_impossible_tokens(
                [row for row, _ in self.impossible], [tokens for _, tokens in self.impossible]
            ),
        )


def to_impossible_tokens(rows: Sequence[int], tokens: Sequence[IntArray]) -> ImpossibleTokens:
    """Return the tokens of each row as tensors."""
    return ImpossibleTokens(
        torch.from_numpy(np.repeat(np.array(rows, np.int64), [len(some) for some in tokens])),
        torch.from_numpy(np.concatenate([NO_TOKENS, *tokens])),
    )
