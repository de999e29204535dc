"""Partial tokens: project a teacher's distribution onto a student token inside a teacher token.

A teacher token begins at a common boundary; r are its bytes before the student token. Of the
teacher's distribution there, only tokens that start with r and go on are still possible, and the
bytes that they have left begin with an event of the student. Their mass is not renormalised: the
position is weighted by it, so that the loss stays linear in the distribution. Only distributions at
common boundaries are used, because a teacher token that begins where the student has no boundary
conditions on something that the student does not know.

As at a boundary, impossible tokens are left out on both sides: the rest of the teacher token must
keep the student's boundary possible, and the student's token must be the prefix of some rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from persea.alignment.event_map import EventMap, first_token_of_bytes
from persea.alignment.token_order import UNRESTRICTED_CONTEXT, TokenOrder
from persea.distributions import DistributionKind, SparseDistributions
from persea.errors import RecipeError
from persea.tokenization.vocabulary import Vocabulary


@dataclass(frozen=True)
class PartialTokenTargets:
    """Targets of student tokens inside teacher tokens. M = entries, D = excluded tokens.

    Attributes:
        student_index_M: int64, index among the student tokens that were asked for.
        event_M: int64, event that the rest of the teacher token begins with.
        probs_M: float32, its probability, not renormalised.
        entry_D: int64, index of an entry.
        token_D: int64, student token of the entry's event that no teacher token continues with.
    """

    student_index_M: npt.NDArray[np.int64]
    event_M: npt.NDArray[np.int64]
    probs_M: npt.NDArray[np.float32]
    entry_D: npt.NDArray[np.int64]
    token_D: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PartialTokenProjector:
    """Projects teacher distributions to positions inside teacher tokens; caches by bytes.

    Attributes:
        event_map: Events of both vocabularies.
        teacher_order: Token order of the teacher.
        student_order: Token order of the student.
    """

    event_map: EventMap
    teacher_order: TokenOrder
    student_order: TokenOrder
    _first_tokens_cache: dict[bytes, tuple[int, npt.NDArray[np.int64]]] = field(
        default_factory=dict
    )
    _members_cache: dict[tuple[bytes, int], tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]] = (
        field(default_factory=dict)
    )

    def project(
        self,
        distributions: SparseDistributions,
        distribution_index_I: npt.NDArray[np.integer],
        prefix_I: list[bytes],
        context_I: npt.NDArray[np.integer],
    ) -> PartialTokenTargets:
        """Project distributions to I student tokens.

        Args:
            distributions: Teacher distributions with N positions, full or sampled.
            distribution_index_I: Index into N of the teacher token that each begins in.
            prefix_I: Bytes of that teacher token before the student token, at least one.
            context_I: The student's contexts there (`TokenOrder.context_ids`).

        Returns:
            The targets. A student token without entries has no target.
        """
        index, events, probs = list[int](), list[int](), list[float]()
        entries, tokens = list[int](), list[int]()
        for i, (row, prefix, context) in enumerate(
            zip(distribution_index_I.tolist(), prefix_I, context_I.tolist(), strict=True)
        ):
            impossible = (
                np.empty(0, np.int64)
                if context == UNRESTRICTED_CONTEXT
                else self.student_order.impossible_next_tokens(context)
            )
            for m in range(distributions.offsets_N1[row], distributions.offsets_N1[row + 1]):
                raw = self.teacher_order.vocabulary.bytes_W[distributions.ids_M[m]]
                if raw is None or len(raw) <= len(prefix) or not raw.startswith(prefix):
                    continue
                event = self._event_of_rest(raw[len(prefix) :], impossible)
                if event < 0:
                    continue
                members, is_possible = self._possible_members(prefix, event)
                if is_possible.any():
                    entries += [len(index)] * int((~is_possible).sum())
                    tokens += members[~is_possible].tolist()
                    index.append(i)
                    events.append(event)
                    probs.append(float(distributions.probs_M[m]))
        return PartialTokenTargets(
            np.array(index, np.int64),
            np.array(events, np.int64),
            np.array(probs, np.float32),
            np.array(entries, np.int64),
            np.array(tokens, np.int64),
        )

    def _event_of_rest(self, rest: bytes, impossible_tokens: npt.NDArray[np.int64]) -> int:
        """Return the event that some bytes begin with; -1 if there is none, or it is ambiguous.

        It is the event of their first token in the student's encoding. If that token is impossible,
        a longer one must follow, which merges beyond these bytes. Then the bytes have an event only
        if all possible tokens belong to the same one.

        Args:
            rest: Bytes that the teacher token has left.
            impossible_tokens: Sorted student tokens that cannot follow here.
        """
        if rest not in self._first_tokens_cache:
            covering, starts = self.student_order.prefixes.covering(rest)
            first = first_token_of_bytes(rest, self.student_order.vocabulary)
            self._first_tokens_cache[rest] = first, np.union1d(covering, np.array(starts, np.int64))
        first, firsts = self._first_tokens_cache[rest]
        if first < 0:  # the student's vocabulary lacks a byte of the rest
            return -1
        events = self.event_map.student_event_V
        at = int(np.searchsorted(impossible_tokens, first))
        if at == len(impossible_tokens) or impossible_tokens[at] != first:
            return int(events[first])
        found = np.unique(events[np.setdiff1d(firsts, impossible_tokens, assume_unique=True)])
        return int(found[0]) if len(found) == 1 else -1

    def _possible_members(
        self, prefix: bytes, event: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return an event's student tokens, and which of them a teacher token continues with.

        Args:
            prefix: Bytes of the teacher token before the student token.
            event: The event.
        """
        key = (prefix, event)
        if key not in self._members_cache:
            offsets, tokens = self.event_map.tokens_by_event
            members = tokens[offsets[event] : offsets[event + 1]]
            bytes_V = self.student_order.vocabulary.bytes_W
            is_possible = [self._has_continuation(prefix, bytes_V[u]) for u in members.tolist()]
            self._members_cache[key] = members, np.array(is_possible, np.bool_)
        return self._members_cache[key]

    def _has_continuation(self, prefix: bytes, raw: bytes | None) -> bool:
        """Return whether a teacher token longer than the prefix agrees with prefix + raw."""
        if raw is None:
            return False
        covering, starts = self.teacher_order.prefixes.covering(prefix + raw)
        return len(covering) > 0 or any(
            len(self.teacher_order.vocabulary.bytes_W[w] or b"") > len(prefix) for w in starts
        )


def make_partial_token_projector(event_map: EventMap) -> PartialTokenProjector | None:
    """Return the projector of an event map; None if both sides have the same tokenizer.

    With one tokenizer no token begins inside another.
    """
    if event_map.teacher_mask is None:
        return None
    return PartialTokenProjector(
        event_map, event_map.teacher_mask.own, event_map.teacher_mask.other
    )


def require_projectable_kind(kind: DistributionKind) -> None:
    """Check that distributions of this kind can be projected.

    Raises:
        RecipeError: A topk distribution has a rest without bytes, a text has no distribution.
    """
    if kind not in (DistributionKind.FULL, DistributionKind.SAMPLED):
        raise RecipeError(
            f"distributions of kind {kind.value} cannot be used inside a token",
            where="training.partial_tokens",
            remedy="capture with `distributions: sampled`, or delete `partial_tokens:`",
        )


def token_prefixes(
    vocabulary: Vocabulary, ids_I: npt.NDArray[np.integer], prefix_len_I: npt.NDArray[np.integer]
) -> list[bytes]:
    """Return the first `prefix_len_I` bytes of each token."""
    return [
        (vocabulary.bytes_W[i] or b"")[:n]
        for i, n in zip(ids_I.tolist(), prefix_len_I.tolist(), strict=True)
    ]
