"""One cached answer as a training example: rendered in the student's chat template and aligned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from persea.alignment.event_map import EventMap
from persea.alignment.partial_tokens import (
    PartialTokenProjector,
    make_partial_token_projector,
    require_projectable_kind,
    token_prefixes,
)
from persea.alignment.spans import Alignment, CommonBoundaries, SupervisionKind, align
from persea.alignment.token_order import UNRESTRICTED_CONTEXT
from persea.cache.unit import CachedAnswer
from persea.chat.messages import ThinkingEffort
from persea.chat.renderer import ChatRenderer
from persea.distributions import DistributionKind, SparseDistributions
from persea.errors import DataError
from persea.losses import EventTargets, build_event_targets, concat_event_targets
from persea.tokenization.bpe import expand_groups
from persea.tokenization.tokens import RenderedTokens

TeachEnd: TypeAlias = Literal["auto", "always", "never"]  # the recipe's `capture.teach_end`
NUM_COUNTS = len(SupervisionKind) + 3  # length of Example.counts


@dataclass(frozen=True)
class Example:
    """An answer in the student's tokens, with the teacher's targets at common boundaries.

    Attributes:
        tokens: the conversation as the student's template renders it.
        teacher: name of the teacher that answered.
        skill: skill of the prompt.
        language: language of the prompt; may be empty.
        targets: distributions over events; positions number the supervised tokens of `tokens`.
        counts: summands of `DatasetStats.supervision`: supervised tokens by `SupervisionKind`,
            common boundaries whose two tokens are different events, the teacher's mass at
            boundaries, and the part of that mass that events and masks retain.
    """

    tokens: RenderedTokens
    teacher: str
    skill: str
    language: str
    targets: EventTargets
    counts: npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ExampleMaker:
    """Makes the examples of one student from the answers of its teachers.

    Attributes:
        renderer: the student's renderer.
        event_maps: event map of each teacher.
        projectors: projector of each teacher, or None; see `build_example`.
        teach_end: see `build_example`.
    """

    renderer: ChatRenderer
    event_maps: Mapping[str, EventMap]
    projectors: Mapping[str, PartialTokenProjector | None]
    teach_end: TeachEnd = "auto"

    @classmethod
    def create(
        cls,
        renderer: ChatRenderer,
        event_maps: Mapping[str, EventMap],
        partial_tokens: bool,
        teach_end: TeachEnd,
    ) -> ExampleMaker:
        """Create a maker; see `DistillDataset` for the arguments."""
        projectors = {
            name: make_partial_token_projector(event_map) if partial_tokens else None
            for name, event_map in event_maps.items()
        }
        return cls(renderer, event_maps, projectors, teach_end)

    def make(self, answer: CachedAnswer) -> Example:
        """Build the example of an answer; see `build_example`."""
        return self.align(answer, render_answer(answer, self.renderer))

    def align(self, answer: CachedAnswer, tokens: RenderedTokens) -> Example:
        """Build the example of an answer that is already rendered.

        Raises:
            DataError: the answer's teacher has no event map, or its distributions are invalid.
        """
        name = answer.answer.teacher
        if name not in self.event_maps:
            raise DataError(
                f"the cache holds answers of {name}, whose tokenizer is not given",
                where="DistillDataset",
                remedy=f"pass teachers={{{name!r}: renderer}}",
            )
        return align_answer(
            answer, tokens, self.event_maps[name], self.projectors[name], self.teach_end
        )


def build_example(
    answer: CachedAnswer,
    renderer: ChatRenderer,
    event_map: EventMap,
    projector: PartialTokenProjector | None = None,
    teach_end: TeachEnd = "auto",
) -> Example:
    """Render a cached answer with the student's template and align the teacher's distributions.

    Args:
        answer: the answer, its tokens and distributions in the teacher's tokens.
        renderer: the student's renderer. The answer is rendered at the thinking effort of its
            prompt, or as a direct answer where the prompt has no effort.
        event_map: map between the teacher's and the student's vocabulary.
        projector: gives targets to student tokens that begin inside a teacher token; None = such
            tokens are trained with cross-entropy.
        teach_end: whether the teacher's distribution at the end of the text is a target: "auto" =
            where the teacher wrote the text itself. A teacher that only scores a text has its own
            view of where texts end, often a wrong one (a base model may give an end 10 bits).

    Raises:
        DataError: if the student's template or tokenizer cannot write the answer, or if the cached
            distributions are invalid.
    """
    return align_answer(answer, render_answer(answer, renderer), event_map, projector, teach_end)


def render_answer(answer: CachedAnswer, renderer: ChatRenderer) -> RenderedTokens:
    """Render a cached answer with the student's template; raises DataError if impossible.

    A document is rendered by the student's rules for plain text.
    """
    conversation = replace(answer.answer.conversation, effort=training_effort(answer))
    return renderer.render(conversation)


def training_effort(answer: CachedAnswer) -> ThinkingEffort:
    """Return the effort at which the student learns an answer: the prompt's, or none."""
    return answer.answer.effort or ThinkingEffort.NONE


def align_answer(
    answer: CachedAnswer,
    tokens: RenderedTokens,
    event_map: EventMap,
    projector: PartialTokenProjector | None,
    teach_end: TeachEnd = "auto",
) -> Example:
    """Build the example of an answer that is already rendered; see `build_example`."""
    aligned = align(tokens, answer.tokens)
    boundaries, rows = aligned.boundaries, answer.distributions
    boundaries, num_untaught_ends = _without_untaught_end(
        boundaries, tokens, answer, event_map, teach_end
    )
    index_S, index_T = supervised_index(tokens), supervised_index(answer.tokens)
    row_C, position_C = index_T[boundaries.teacher_C], index_S[boundaries.student_C]
    entry_M, which_M = expand_groups(rows.offsets_N1, row_C)
    contexts = np.full((2, int(tokens.loss_mask_T.sum())), UNRESTRICTED_CONTEXT)
    if event_map.teacher_mask is not None and event_map.student_mask is not None:
        contexts[0, position_C] = event_map.teacher_mask.other.supervised_context_ids(
            tokens, boundaries.student_C
        )
        contexts[1, position_C] = event_map.student_mask.other.supervised_context_ids(
            answer.tokens, boundaries.teacher_C
        )
    targets = build_event_targets(
        event_map,
        position_C[which_M],
        rows.ids_M[entry_M],
        rows.probs_M[entry_M],
        student_context_N=contexts[0],
        teacher_context_N=contexts[1],
        kind=rows.kind,
    )
    differ = (
        event_map.student_event_V[tokens.ids_T[boundaries.student_C]]
        != event_map.teacher_event_W[answer.tokens.ids_T[boundaries.teacher_C]]
    )
    supervision = np.bincount(
        aligned.supervision_S[aligned.supervision_S >= 0], minlength=len(SupervisionKind)
    )
    supervision[SupervisionKind.EVENT] -= num_untaught_ends
    supervision[SupervisionKind.TEXT] += num_untaught_ends
    if rows.kind is DistributionKind.TEXT_ONLY:  # boundaries without a distribution
        supervision = np.bincount(
            [SupervisionKind.TEXT], [supervision.sum()], minlength=len(SupervisionKind)
        )
    mass, retained = rows.probs_M[entry_M].sum(), targets.probs_M.sum()
    counts = np.array([*supervision, differ.sum(), mass, retained], np.float64)
    if projector is not None:
        more = _partial_token_targets(answer, tokens, aligned, projector)
        targets = concat_event_targets([targets, more], [0, 0])
    one = answer.answer
    return Example(tokens, one.teacher, one.skill, one.language, targets, counts)


def _without_untaught_end(
    boundaries: CommonBoundaries,
    tokens: RenderedTokens,
    answer: CachedAnswer,
    event_map: EventMap,
    teach_end: TeachEnd,
) -> tuple[CommonBoundaries, int]:
    """Leave out the boundary at the end of the text where the end is learned from the text alone.

    The end of a document is also left out where the two models' ends are different events: the
    teacher's distribution would then teach another end than the text.

    Returns:
        The boundaries, and how many were left out: 0 or 1.
    """
    student_C, teacher_C = boundaries.student_C, boundaries.teacher_C
    is_end_C = tokens.starts_T[student_C] == tokens.ends_T[student_C]
    if teach_end == "always" or (teach_end == "auto" and answer.answer.is_own):
        student_event_C = event_map.student_event_V[tokens.ids_T[student_C]]
        teacher_event_C = event_map.teacher_event_W[answer.tokens.ids_T[teacher_C]]
        differs_C = (student_event_C != teacher_event_C) | (student_event_C < 0)
        is_end_C &= differs_C & answer.answer.conversation.is_document
    kept = CommonBoundaries(student_C[~is_end_C], teacher_C[~is_end_C])
    return kept, int(is_end_C.sum())


def supervised_index(tokens: RenderedTokens) -> npt.NDArray[np.int64]:
    """Return the number of each supervised token among the supervised ones."""
    return np.cumsum(tokens.loss_mask_T, dtype=np.int64) - 1


def _partial_token_targets(
    answer: CachedAnswer,
    tokens: RenderedTokens,
    aligned: Alignment,
    projector: PartialTokenProjector,
) -> EventTargets:
    """Return targets of student tokens that begin inside a teacher token."""
    rows: SparseDistributions = answer.distributions
    require_projectable_kind(rows.kind)
    partial = aligned.partial_tokens
    student_I, teacher_I, prefix_len_I = (
        side[partial.at_common_boundary_I]
        for side in (partial.student_I, partial.teacher_I, partial.prefix_len_I)
    )
    prefixes = token_prefixes(
        projector.teacher_order.vocabulary, answer.tokens.ids_T[teacher_I], prefix_len_I
    )
    projected = projector.project(
        rows,
        supervised_index(answer.tokens)[teacher_I],
        prefixes,
        projector.student_order.supervised_context_ids(tokens, student_I),
    )
    none = np.empty(0, np.int64)
    return EventTargets(
        supervised_index(tokens)[student_I][projected.student_index_M],
        projected.event_M,
        projected.probs_M,
        projected.entry_D,
        projected.token_D,
        none,
        none.astype(np.float32),
        none,
        none,
        rows.kind,
    )
