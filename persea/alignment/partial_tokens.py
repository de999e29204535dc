"""Completion: what a teacher's row says to a student token that begins in the middle of a teacher token.

The row at the teacher token's first byte, given the bytes r said since: of its tokens only those that begin with r and go on
are still possible, and what is left of them begins with an event the student can say. Their mass is not renormalised: the
position is weighted by it, so that the loss stays linear in the row. Only rows at common boundaries are used; a teacher token
that begins where the student has no boundary speaks under a condition the student does not know.

Conditions, as at a boundary: the teacher's rest must leave the student's boundary standing, and the student's token must go on
with some teacher token that is longer than r.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from persea.alignment.boundary_mask import UNRESTRICTED_CONTEXT, TokenOrder
from persea.alignment.event_map import EventMap, first_token_of_bytes
from persea.distributions import DistributionKind, SparseDistributions
from persea.errors import RecipeError
from persea.tokenization.vocabulary import Vocabulary


@dataclass(frozen=True)
class PartialTokenTargets:
    """Entries for student tokens inside teacher tokens. M = entries, D = exceptions.

    at_M     index into the student tokens asked about
    event_M, probs_M  event of the rest, natural probability
    entry_D, token_D  student tokens of an entry's event that no teacher token goes on with
    """

    student_index_M: npt.NDArray[np.int64]
    event_M: npt.NDArray[np.int64]
    probs_M: npt.NDArray[np.float32]
    entry_D: npt.NDArray[np.int64]
    token_D: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PartialTokenProjector:
    """Two vocabularies and their bridge, remembering what is left of a token after some of its bytes."""

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
        """What the rows say of I student tokens.

        row_I      the row at the teacher token that each begins in
        said_I     bytes of that token before it, at least one
        context_I  the student's contexts there (`Keeper.contexts`)
        """
        at, events, probs, entries, tokens = (
            list[int](),
            list[int](),
            list[float](),
            list[int](),
            list[int](),
        )
        for i, (row, said, context) in enumerate(
            zip(distribution_index_I.tolist(), prefix_I, context_I.tolist(), strict=True)
        ):
            cannot = (
                np.empty(0, np.int64)
                if context == UNRESTRICTED_CONTEXT
                else self.student_order.impossible_next_tokens(context)
            )
            for m in range(distributions.offsets_N1[row], distributions.offsets_N1[row + 1]):
                raw = self.teacher_order.vocabulary.bytes_W[distributions.ids_M[m]]
                if raw is None or len(raw) <= len(said) or not raw.startswith(said):
                    continue
                event = self._event_of_rest(raw[len(said) :], cannot)
                if event < 0:
                    continue
                members, stand = self._possible_members(said, event)
                if stand.any():
                    entries += [len(at)] * int((~stand).sum())
                    tokens += members[~stand].tolist()
                    at.append(i)
                    events.append(event)
                    probs.append(float(distributions.probs_M[m]))
        return PartialTokenTargets(
            np.array(at, np.int64),
            np.array(events, np.int64),
            np.array(probs, np.float32),
            np.array(entries, np.int64),
            np.array(tokens, np.int64),
        )

    def _event_of_rest(self, rest: bytes, impossible_tokens: npt.NDArray[np.int64]) -> int:
        """The event that some bytes begin with where certain student tokens cannot stand; -1 where none can, or several events could.

        It is that of their first token in the student's own encoding. Where that one cannot stand, a longer token must, which merges
        beyond these bytes; there they name an event only if all that can stand are of one.
        """
        if rest not in self._first_tokens_cache:
            covering, starts = self.student_order.covering_tokens(rest)
            first = first_token_of_bytes(
                rest, self.teacher_order.vocabulary, self.student_order.vocabulary
            )
            self._first_tokens_cache[rest] = first, np.union1d(covering, np.array(starts, np.int64))
        first, firsts = self._first_tokens_cache[rest]
        events = self.event_map.student_event_V
        at = int(np.searchsorted(impossible_tokens, first))
        if at == len(impossible_tokens) or impossible_tokens[at] != first:
            return int(events[first])
        found = np.unique(events[np.setdiff1d(firsts, impossible_tokens, assume_unique=True)])
        return int(found[0]) if len(found) == 1 else -1

    def _possible_members(
        self, prefix: bytes, event: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Student tokens of an event, and which of them some longer teacher token goes on with after these bytes."""
        key = (prefix, event)
        if key not in self._members_cache:
            offsets, tokens = self.event_map.tokens_by_event
            members = tokens[offsets[event] : offsets[event + 1]]
            self._members_cache[key] = (
                members,
                np.array(
                    [
                        self._has_continuation(prefix, self.student_order.vocabulary.bytes_W[u])
                        for u in members.tolist()
                    ],
                    np.bool_,
                ),
            )
        return self._members_cache[key]

    def _has_continuation(self, prefix: bytes, raw: bytes | None) -> bool:
        if raw is None:
            return False
        covering, starts = self.teacher_order.covering_tokens(prefix + raw)
        return len(covering) > 0 or any(
            len(self.teacher_order.vocabulary.bytes_W[w] or b"") > len(prefix) for w in starts
        )


def make_partial_token_projector(event_map: EventMap) -> PartialTokenProjector | None:
    """None where both sides have the same tokenizer: no token begins inside another."""
    if event_map.teacher_mask is None:
        return None
    return PartialTokenProjector(
        event_map, event_map.teacher_mask.own, event_map.teacher_mask.other
    )


def require_projectable_kind(kind: DistributionKind) -> None:
    """Raises RecipeError for rows that cannot be completed: a rest event has no bytes to begin with, and words have no rows."""
    if kind not in (DistributionKind.FULL, DistributionKind.SAMPLED):
        raise RecipeError(
            f"rows of kind {kind.value} say nothing in the middle of a token",
            where="training.completion",
            remedy="capture with `rows: sampled`, or delete `completion:`",
        )


def token_prefixes(
    vocabulary: Vocabulary, ids_I: npt.NDArray[np.integer], prefix_len_I: npt.NDArray[np.integer]
) -> list[bytes]:
    """The first bytes of some tokens."""
    return [
        (vocabulary.bytes_W[i] or b"")[:n]
        for i, n in zip(ids_I.tolist(), prefix_len_I.tolist(), strict=True)
    ]
