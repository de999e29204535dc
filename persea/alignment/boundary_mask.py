"""Boundary masks: tokens that no continuation of the text allows at the other tokenizer's boundary.

At a common boundary each model conditions on its own tokenizer starting a token there, which
carries information about the next bytes. Tokens that cannot follow the other tokenizer's boundary
are therefore removed on both sides. In worlds with known distributions this reduces the bias from a
total variation of .015-.109 to .000-.010 (`make bench-bias`). A simpler test, encoding the last
token and the candidate alone, removes .6-1.5 % of the observed tokens in Japanese and Thai under
Qwen, because it looks no further than the candidate (`bench/masks.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from persea.alignment.token_order import UNRESTRICTED_CONTEXT, TokenOrder
from persea.tokenization.bpe import expand_groups, group_offsets

# (whether it is the other tokenizer's turn, its state after its last token, bytes it must cover,
# state of the waiting side); under BPE a state is the last token
SearchState: TypeAlias = tuple[bool, int, bytes, int]
MAX_SEARCH_TOKENS = 20_000  # per candidate; about 20 ms
# Tokens looked at ahead for one candidate, as a multiple of those that may be tried.
MAX_LOOKAHEAD = 10
# Tokens of the other side from which a candidate is known to meet, kept so as not to search again.
WITNESSES_PER_CANDIDATE = 8
MAX_CACHED_ANSWERS = 4_000_000  # 9 bytes each
MAX_CACHED_STATES = 1_000_000  # about 250 bytes each; when full, all are dropped


@dataclass(eq=False)
class _Answers:
    """Whether a candidate is impossible in a context, by context * W + candidate.

    Attributes:
        key_K: int64, sorted.
        is_impossible_K: The answers.
    """

    key_K: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    is_impossible_K: npt.NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))

    def find(
        self, key_P: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Return the answers, and which of them are known."""
        if not len(self.key_K):
            return np.zeros(len(key_P), np.bool_), np.zeros(len(key_P), np.bool_)
        at_P = np.minimum(np.searchsorted(self.key_K, key_P), len(self.key_K) - 1)
        return self.is_impossible_K[at_P], self.key_K[at_P] == key_P

    def add(self, key_N: npt.NDArray[np.int64], is_impossible_N: npt.NDArray[np.bool_]) -> None:
        """Keep the answers of new keys, which are sorted."""
        at_N = np.searchsorted(self.key_K, key_N)
        self.key_K = np.insert(self.key_K, at_N, key_N)
        self.is_impossible_K = np.insert(self.is_impossible_K, at_N, is_impossible_N)

    def clear(self) -> None:
        self.key_K, self.is_impossible_K = self.key_K[:0], self.is_impossible_K[:0]


@dataclass(frozen=True, eq=False)
class BoundaryMask:
    """Finds the tokens of `own` that are impossible where the tokenizer `other` has a boundary.

    A candidate is possible if both tokenizers can go on to a byte where both have a boundary:
    `other` with tokens over the candidate's bytes, `own` over the bytes that the last token of
    `other` adds, in turn. `TokenOrder` decides which token may follow which. Whether both meet
    after a first token of `other` does not depend on the context; only whether that token may
    follow in it does.

    A search that has not ended after `max_search_tokens` keeps its candidate (between Qwen 3 and
    Llama 3, 49 searches of every 50th token in 42 contexts). Searches share their results, so
    whether one ends can depend on earlier ones: a candidate that one process keeps may be removed
    in another that asked in another order. Both are sound, because a token is removed only if it is
    proven impossible, and searches that end do not depend on the order.

    Attributes:
        other: The tokenizer whose boundary is given.
        own: The tokenizer whose tokens are candidates. W = its vocabulary.
        first_token_W: First token of each candidate's bytes encoded by `other`
            (`event_map.first_tokens`); -1 = control token, or bytes that `other` cannot write.
        max_search_tokens: Tokens tried for one candidate before it is kept undecided.
    """

    other: TokenOrder
    own: TokenOrder
    first_token_W: npt.NDArray[np.integer]
    max_search_tokens: int = MAX_SEARCH_TOKENS
    _dead_end_states: set[SearchState] = field(default_factory=set)
    _meeting_states: set[SearchState] = field(default_factory=set)
    _answers: _Answers = field(default_factory=_Answers)
    # first states of searches that were given up; they are not searched again
    _undecided_states: set[SearchState] = field(default_factory=set)

    @cached_property
    def _witness_WK(self) -> npt.NDArray[np.int32]:
        """Tokens of `other` from which a candidate is known to meet; -1 = none."""
        return np.full((len(self.first_token_W), WITNESSES_PER_CANDIDATE), -1, np.int32)

    @cached_property
    def _candidates_by_first_token(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        known = np.flatnonzero(self.first_token_W >= 0)
        order = known[np.argsort(self.first_token_W[known], kind="stable")]
        return group_offsets(self.first_token_W[known], len(self.other.vocabulary)), order

    def impossible_tokens(
        self, context: int, candidates: npt.NDArray[np.integer] | None = None
    ) -> npt.NDArray[np.int64]:
        """Return the candidates that are impossible at a boundary of `other`.

        A candidate is impossible if no continuation lets `other` start a token here. Control tokens
        are always possible: the turn may end anywhere. Tokens that `other` cannot write have no
        event and are not tested.

        Args:
            context: Context in `other` (`TokenOrder.context_ids`).
            candidates: Ids of `own` tokens; None = the whole vocabulary.

        Returns:
            int64: ids, sorted.
        """
        if context == UNRESTRICTED_CONTEXT:
            return np.empty(0, np.int64)
        if candidates is not None:
            candidates_C = np.asarray(candidates, np.int64)
            contexts_C = np.full(len(candidates_C), context)
            return np.sort(candidates_C[self.are_impossible(contexts_C, candidates_C)])
        offsets, order = self._candidates_by_first_token
        blocked = self.other.impossible_next_tokens(context)
        return self._test(
            context, order[expand_groups(offsets, blocked)[0]], range(len(self.first_token_W))
        )

    def are_impossible(
        self, context_P: npt.NDArray[np.integer], token_P: npt.NDArray[np.integer]
    ) -> npt.NDArray[np.bool_]:
        """Return whether each token is impossible at a boundary in its context; answers are kept.

        Args:
            context_P: Contexts in `other` (`TokenOrder.context_ids`).
            token_P: Ids of `own` tokens.
        """
        out_P: npt.NDArray[np.bool_] = np.asarray(context_P) != UNRESTRICTED_CONTEXT
        width = len(self.first_token_W)
        keys_P = context_P[out_P].astype(np.int64) * width + token_P[out_P]
        found_P, is_known_P = self._answers.find(keys_P)
        if not is_known_P.all():
            unknown = np.unique(keys_P[~is_known_P])
            if len(self._answers.key_K) + len(unknown) > MAX_CACHED_ANSWERS:
                self._answers.clear()
                unknown = np.unique(keys_P)
            begins = np.flatnonzero(np.diff(unknown // width, prepend=-1))
            answers = [
                self._answer(int(part[0]) // width, part % width)
                for part in np.split(unknown, begins[1:])
            ]
            self._answers.add(unknown, np.concatenate(answers))
            found_P = self._answers.find(keys_P)[0]
        out_P[out_P] = found_P
        return out_P

    def _answer(self, context: int, candidate_C: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Find out which candidates are impossible in a context."""
        first_C = self.first_token_W[candidate_C]
        known, first = candidate_C[first_C >= 0], first_C[first_C >= 0]
        # a candidate whose first token is possible here is possible itself
        doubtful = known[self.other.cannot_follow(context, first)]
        return np.isin(candidate_C, self._test(context, doubtful, candidate_C.tolist()))

    def _test(
        self, context: int, doubtful: npt.NDArray[np.int64], among: Sequence[int]
    ) -> npt.NDArray[np.int64]:
        """Return the impossible candidates, sorted.

        Args:
            context: The context in `other`.
            doubtful: Candidates whose first token cannot follow in the context.
            among: All candidates that are asked about.
        """
        if len(doubtful):  # .1 ms for 200 candidates; to search them takes 100
            witness_DK = self._witness_WK[doubtful]
            known_DK, is_blocked_DK = witness_DK >= 0, np.ones(witness_DK.shape, np.bool_)
            is_blocked_DK[known_DK] = self.other.cannot_follow(context, witness_DK[known_DK])
            doubtful = doubtful[is_blocked_DK.all(-1)]
        found = {c for c in doubtful.tolist() if not self._can_meet(context, c)}
        if suffixes := self.other.added_token_continuations(context):
            found |= {
                c for c in among if (self.own.vocabulary.bytes_W[c] or b"").startswith(suffixes)
            }
        return np.array(sorted(found), np.int64)

    def _can_meet(self, context: int, candidate: int) -> bool:
        """Return whether some text lets both tokenizers meet after `own` emits the candidate here.

        Args:
            context: The context in `other`.
            candidate: Token of `own`.
        """
        raw = self.own.vocabulary.bytes_W[candidate] or b""
        num_tried = [0, 0]
        tokens_T = self.other.prefixes.in_search_order(raw)[1]
        for u in tokens_T[~self.other.cannot_follow(context, tokens_T)].tolist():
            is_open_space = self.other.is_open_space(u, raw)
            if is_open_space and not self.other.can_open_space_follow(context, u, raw):
                continue
            root = self._advance(
                True,
                self.other.derivations.state_of(u),
                raw,
                self.own.derivations.state_of(candidate),
            )
            if root in self._undecided_states:
                return True
            meets = self._search_meeting(root, num_tried)
            if meets is None:
                self._undecided_states.add(root)
                return True
            if meets:
                if not is_open_space:  # that depends on more of the context
                    known_K = self._witness_WK[candidate]
                    known_K[:] = [u, *known_K[:-1].tolist()]
                return True
        return False

    def _search_meeting(self, root: SearchState, num_tried: list[int]) -> bool | None:
        """Return whether both meet from a state, by depth-first search.

        Args:
            root: The state.
            num_tried: The tokens tried for the candidate, and those looked at ahead, updated.

        Returns:
            None if the search was given up after `max_search_tokens`.
        """
        if not root[2] or root in self._meeting_states:
            return True
        if root in self._dead_end_states:
            return False
        if len(self._dead_end_states) + len(self._meeting_states) > MAX_CACHED_STATES:
            for states in (self._dead_end_states, self._meeting_states, self._undecided_states):
                states.clear()
        seen, path, branches = {root}, [root], [self._next_states(root, num_tried)]
        while branches:
            state = next(branches[-1], None)
            if state is None:
                branches.pop()
                path.pop()
            elif num_tried[0] > self.max_search_tokens:
                return None  # this state was yielded without a check that its token may follow
            elif not state[2] or state in self._meeting_states:
                self._meeting_states.update(path)
                return True
            elif state not in seen and state not in self._dead_end_states:
                seen.add(state)
                path.append(state)
                branches.append(self._next_states(state, num_tried))
        self._dead_end_states.update(seen)
        return False

    def _next_states(self, root: SearchState, num_tried: list[int]) -> Iterator[SearchState]:
        """Yield the states after one, those where both meet first; count the tokens tried."""
        is_others_turn, last, rest, waiting = root
        side, place = self.other if is_others_turn else self.own, -1
        size = len(side.prefixes.in_search_order(rest)[0])
        following: Iterator[tuple[SearchState, int]] = (
            (self._advance(is_others_turn, side.derivations.extend(last, u), rest, waiting), at)
            for u, at in side.following_tokens(last, rest)
        )
        num_tried[1] += size
        if num_tried[1] <= MAX_LOOKAHEAD * self.max_search_tokens:
            kept = list[tuple[SearchState, int]]()
            for after, at in following:
                kept.append((after, at))
                if not after[2]:  # both meet; such a token is among the first
                    yield after
            # Depth first alone would search a thousand states below a token before the next token,
            # from which both meet at once: nine tenths of all states.
            yield from (after for after, _ in kept if self._meets_at_once(after))
            following = iter(kept)
        for after, at in following:
            num_tried[0] += at - place
            place = at
            yield after
        num_tried[0] += size - 1 - place
        if num_tried[0] > self.max_search_tokens:
            yield root  # so that the search sees that it is given up

    def _meets_at_once(self, state: SearchState) -> bool:
        """Return whether both are known to meet from a state, or meet after one more token."""
        is_others_turn, last, rest, _ = state
        if not rest or state in self._meeting_states:
            return True
        side = self.other if is_others_turn else self.own
        exact = side.prefixes.tokens_by_bytes.get(rest, ())
        meets = any(side.can_follow(last, u, rest) for u in exact)
        if meets:
            self._meeting_states.add(state)
        return meets

    def _advance(self, is_others_turn: bool, state: int, rest: bytes, waiting: int) -> SearchState:
        """Return the state after one side has put a token over the bytes that it must cover.

        The same side goes on if bytes are left, else the other side covers what the token adds.
        """
        side = self.other if is_others_turn else self.own
        raw = side.vocabulary.bytes_W[side.derivations.last_token(state)] or b""
        if len(raw) < len(rest):
            return is_others_turn, state, rest[len(raw) :], waiting
        return not is_others_turn, waiting, raw[len(rest) :], state
