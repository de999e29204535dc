"""Mask: which tokens can NOT stand next where the other tokenizer has a boundary, whatever text comes after them.

At a common boundary each model speaks on a condition of its own: that ITS tokenizer begins a token here. A teacher's token
after which no text whatever keeps the student's boundary belongs to a future the student's condition has ruled out, and the
other way round. Dropping these on both sides takes away the bias a boundary brings (on exact worlds total variation .015-.109
falls to .000-.010; `make bench-bias`). Only what is impossible is dropped: encoding last token + candidate alone looks no
further than the candidate, and deletes .6-1.5 % of realised tokens in Japanese and Thai under Qwen (`bench/masks.py`).

A candidate c stays if both tokenizers can go on to a place where they meet: the keeper from its last token over c, the
candidate's own tokenizer from c over whatever the keeper's token covers beyond it, in turn. Whether one token may follow
another is decided by merges.py inside a word, and by pretokens.py where a word may end.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from persea.tokenization.bpe import BpeDerivations, derive_bpe, expand_groups, group_offsets
from persea.tokenization.pretokenizer import (
    PROBE_PREFIXES,
    Pretokenizer,
    char_to_byte_offsets,
    decode_whole_characters,
    load_pretokenizer,
)
from persea.tokenization.tokens import RenderedTokens
from persea.tokenization.vocabulary import Vocabulary

UNRESTRICTED_CONTEXT = (
    -1
)  # a context after which every candidate can stand: an answer's beginning, a control token
MID_CHARACTER = "inside"  # signature of a boundary in the middle of a character, where no word ends
MAX_CACHED_CONTEXTS = (
    4096  # contexts whose forbidden tokens are kept: some 25 kB each with real vocabularies
)
SearchState: TypeAlias = tuple[
    bool, int, bytes, int
]  # whose turn it is (True = the keeper's), its last token, what it must cover, the other's last
MAX_SEARCH_TOKENS = (
    20_000  # tokens asked for one candidate, some 20 ms; one that is not ruled out by then stays
)
WITNESSES_PER_CANDIDATE = 8  # of each candidate: tokens of the keeper's over it that are known to go on, and so have not to be searched again
MAX_CACHED_STATES = 1_000_000  # remembered, some 250 bytes each; then all are forgotten


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """A tokenizer whose boundaries are to be kept. A `place` is a token's rank among all tokens in the order of their bytes."""

    vocabulary: Vocabulary
    derivations: BpeDerivations
    pretokenizer: Pretokenizer
    _covering_cache: dict[bytes, tuple[npt.NDArray[np.int64], tuple[int, ...]]] = field(
        default_factory=dict
    )
    _search_order_cache: dict[bytes, tuple[int, ...]] = field(default_factory=dict)
    _impossible_cache: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict)
    _context_ids: dict[tuple[int, str], int] = field(default_factory=dict)
    _context_keys: list[tuple[int, str]] = field(default_factory=list)
    _may_cut_cache: dict[str, npt.NDArray[np.int8]] = field(
        default_factory=dict
    )  # by word and head: whether a cut may come between; -1 = not asked yet
    _ending_signatures: dict[int, tuple[str, ...]] = field(default_factory=dict)
    _can_cut_cache: dict[tuple[tuple[str, ...], int], bool] = field(default_factory=dict)

    @cached_property
    def sorted_tokens(self) -> tuple[list[bytes], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Token bytes in order, the token at each place, and the place of each token (-1 for control tokens)."""
        pairs = sorted((raw, i) for i, raw in enumerate(self.vocabulary.bytes_W) if raw)
        token = np.array([i for _, i in pairs], np.int64)
        place = np.full(len(self.vocabulary), -1, np.int64)
        place[token] = np.arange(len(token))
        return [raw for raw, _ in pairs], token, place

    @cached_property
    def tokens_by_bytes(self) -> dict[bytes, tuple[int, ...]]:
        found: dict[bytes, tuple[int, ...]] = {}
        for i, raw in enumerate(self.vocabulary.bytes_W):
            if raw:
                found[raw] = (*found.get(raw, ()), i)
        return found

    @cached_property
    def _token_heads(self) -> tuple[npt.NDArray[np.int64], list[tuple[str, ...]]]:
        """What each token begins with, for the cuts: number of its heads, and the heads by number."""
        numbers: dict[tuple[str, ...], int] = {}
        of = [
            numbers.setdefault(
                self.pretokenizer.leading_signatures(raw) if raw else (), len(numbers)
            )
            for raw in self.vocabulary.bytes_W
        ]
        return np.array(of, np.int64), list(numbers)

    @cached_property
    def added_token_bytes(self) -> tuple[bytes, ...]:
        """Added tokens of text (Gemma's runs of newlines), which are cut out of a text before anything is merged."""
        return tuple(sorted(self._added_tokens))

    @cached_property
    def _added_tokens(self) -> dict[bytes, bool]:
        """Bytes of an added token of text -> whether it is cut out wherever it stands, and not only as a word, or with spaces around it."""
        tokens = self.vocabulary.backend.get_added_tokens_decoder().items()
        texts = {
            t.content.encode(): not (t.single_word or t.lstrip or t.rstrip)
            for i, t in tokens
            if i < len(self.vocabulary) and self.vocabulary.bytes_W[i] is not None
        }
        # a run of SentencePiece signs is in no text: there stands a space
        return {
            raw: always
            for raw, always in texts.items()
            if self.vocabulary.byte_level or "▁".encode() not in raw
        }

    @cached_property
    def _may_begin_added_token(self) -> npt.NDArray[np.bool_]:
        """Tokens that an added token may begin with or in: split by words, what stands around it is not what its neighbours are."""
        return np.array(
            [
                raw is not None
                and (
                    raw.startswith(self.added_token_bytes)
                    or (
                        not self.pretokenizer.never_splits
                        and any(a.startswith(raw) or a in raw for a in self.added_token_bytes)
                    )
                )
                for raw in self.vocabulary.bytes_W
            ],
            np.bool_,
        )

    @cached_property
    def added_token_suffixes(self) -> dict[bytes, tuple[bytes, ...]]:
        """Of each beginning of an added token: what makes it whole."""
        found: dict[bytes, list[bytes]] = {}
        for raw in (raw for raw, always in self._added_tokens.items() if always):
            for n in range(1, len(raw)):
                found.setdefault(raw[:n], []).append(raw[n:])
        return {k: tuple(v) for k, v in found.items()}

    def context_ids(
        self, ids_T: npt.NDArray[np.integer], positions: Sequence[int]
    ) -> npt.NDArray[np.int64]:
        """The context before each token of `at`: its number, or FREE where the token before it is a control token or none.

        ids_T  a rendering; what stands before a token is looked at back to the last control token
        """
        control = np.array([self.vocabulary.bytes_W[i] is None for i in ids_T.tolist()], bool)
        edges = np.flatnonzero(np.diff(np.concatenate([[True], control, [True]]).astype(np.int8)))
        begins = edges[::2]
        runs = [self._split_run(ids_T[b:e]) for b, e in zip(begins, edges[1::2], strict=True)]
        found = []
        for k in positions:
            if k == 0 or control[k - 1]:
                found.append(UNRESTRICTED_CONTEXT)
                continue
            run = int(np.searchsorted(begins, k, side="left")) - 1
            raw, cuts, ends_T = runs[run]
            end = int(ends_T[k - 1 - begins[run]])
            word = raw[int(cuts[np.searchsorted(cuts, end, side="left") - 1]) : end]
            found.append(self.context_id(int(ids_T[k - 1]), word))
        return np.array(found, np.int64)

    def supervised_context_ids(
        self, tokens: RenderedTokens, positions_C: npt.NDArray[np.integer]
    ) -> npt.NDArray[np.int64]:
        """The contexts of some learned tokens of a rendering. FREE where the token before is not learned: what a prompt ends with is
        given, whatever comes after.
        """
        found = np.full(len(positions_C), UNRESTRICTED_CONTEXT, np.int64)
        inner_C = tokens.loss_mask_T[np.maximum(positions_C - 1, 0)] & (positions_C > 0)
        found[inner_C] = self.context_ids(tokens.ids_T, positions_C[inner_C].tolist())
        return found

    def _split_run(
        self, ids: npt.NDArray[np.integer]
    ) -> tuple[bytes, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The bytes of tokens, the byte places of their cuts, and where each token ends."""
        raw = b"".join(self.vocabulary.bytes_W[i] or b"" for i in ids.tolist())
        ends_T = np.cumsum(self.vocabulary.lengths_W[ids])
        if self.pretokenizer.never_splits:
            return raw, np.zeros(1, np.int64), ends_T
        # an added token is cut out first: what stands before and after it is split apart from it
        edges = {0, len(raw)} | {
            int(e)
            for i, end in zip(ids.tolist(), ends_T.tolist(), strict=True)
            if self.vocabulary.bytes_W[i] in self.added_token_bytes
            for e in (end - self.vocabulary.lengths_W[i], end)
        }
        cuts: list[int] = []
        for begin, end in pairwise(sorted(edges)):
            text = decode_whole_characters(raw[begin:end])[0]
            cuts += [
                begin,
                *(
                    begin + char_to_byte_offsets(text, self.pretokenizer.split_positions(text))
                ).tolist(),
            ]
        return raw, np.unique(np.array(cuts, np.int64)), ends_T

    def context_id(self, token: int, word: bytes) -> int:
        """The number of a context: the last token, and the word so far, which ends with it."""
        text, rest = ("", b"") if self.pretokenizer.never_splits else decode_whole_characters(word)
        key = (token, MID_CHARACTER if rest else self.pretokenizer.class_signature(text))
        if key not in self._context_ids:
            self._context_ids[key] = len(self._context_keys)
            self._context_keys.append(key)
        return self._context_ids[key]

    def impossible_next_tokens(self, context: int) -> npt.NDArray[np.int64]:
        """Tokens, sorted, that cannot stand in this context; remembered for a while."""
        if context not in self._impossible_cache:
            if len(self._impossible_cache) >= MAX_CACHED_CONTEXTS:
                self._impossible_cache.clear()
            self._impossible_cache[context] = self._find_impossible_next_tokens(context)
        return self._impossible_cache[context]

    def _find_impossible_next_tokens(self, context: int) -> npt.NDArray[np.int64]:
        token, word = self._context_keys[context]
        crossing = self.derivations.impossible_next_tokens(token)
        if self.added_token_bytes:  # what begins with an added token stands wherever it begins, and an added token ends a word
            crossing = (
                crossing[:0]
                if self.vocabulary.bytes_W[token] in self.added_token_bytes
                else crossing[~self._may_begin_added_token[crossing]]
            )
        if word == MID_CHARACTER or self.pretokenizer.never_splits or not len(crossing):
            return crossing
        of, heads = self._token_heads
        group, asked_H = of[crossing], np.zeros(len(heads), np.bool_)
        asked_H[group] = True
        cut_H = self._may_cut_cache.setdefault(
            word, np.full(len(heads), -1, np.int8)
        )  # many contexts end in the same signature
        for h in np.flatnonzero(asked_H & (cut_H < 0)).tolist():
            cut_H[h] = self.pretokenizer.can_split(word, heads[h])
        left: npt.NDArray[np.int64] = crossing[cut_H[group] == 0]
        return left

    def added_token_continuations(self, context: int) -> tuple[bytes, ...]:
        """Beginnings of text that would make an added token out of the context's last token."""
        return self.added_token_suffixes.get(
            self.vocabulary.bytes_W[self._context_keys[context][0]] or b"", ()
        )

    def covering_tokens(self, raw: bytes) -> tuple[npt.NDArray[np.int64], tuple[int, ...]]:
        """The tokens that a text which begins with these bytes can begin with: those that cover all of them, and those that do not."""
        if raw not in self._covering_cache:
            ordered, token, _ = self.sorted_tokens
            low, after = bisect_left(ordered, raw), raw.rstrip(b"\xff")
            high = (
                bisect_left(ordered, after[:-1] + bytes([after[-1] + 1])) if after else len(ordered)
            )
            self._covering_cache[raw] = (
                token[low:high],
                tuple(u for n in range(1, len(raw)) for u in self.tokens_by_bytes.get(raw[:n], ())),
            )
        return self._covering_cache[raw]

    def tokens_in_search_order(self, raw: bytes) -> tuple[int, ...]:
        """The same tokens in the order in which a meeting is looked for: of just these bytes, of fewer, of more."""
        if (
            raw not in self._search_order_cache
        ):  # asked at each step of a search, of the same bytes again and again
            (covering, starts), just = self.covering_tokens(raw), self.tokens_by_bytes.get(raw, ())
            self._search_order_cache[raw] = (*just, *starts, *covering[len(just) :].tolist())
        return self._search_order_cache[raw]

    def can_follow(self, token: int, after: int) -> bool:
        """Whether `after` may stand after `token`, of which nothing is known but that it stands."""
        if not self.derivations.is_impossible_pair(token, after):
            return True
        raw, rest = self.vocabulary.bytes_W[token] or b"", self.vocabulary.bytes_W[after] or b""
        if self.added_token_bytes and (
            self._may_begin_added_token[after] or raw in self.added_token_bytes
        ):
            return True
        if self.pretokenizer.never_splits or rest[0] & 0xC0 == 0x80:
            return False
        if token not in self._ending_signatures:
            word, cut_off = decode_whole_characters(raw.lstrip(bytes(range(0x80, 0xC0))))
            self._ending_signatures[token] = (
                ()
                if cut_off
                else tuple(
                    dict.fromkeys(
                        self.pretokenizer.class_signature(before + word)
                        for before in PROBE_PREFIXES
                    )
                )
            )
        of, heads = self._token_heads
        key = self._ending_signatures[token], int(of[after])
        if (
            key not in self._can_cut_cache
        ):  # asked millions of times, of some thousand different ones
            self._can_cut_cache[key] = any(
                self.pretokenizer.can_split(ending, heads[key[1]]) for ending in key[0]
            )
        return self._can_cut_cache[key]


_TOKEN_ORDERS: dict[Vocabulary, TokenOrder] = {}


def get_token_order(
    vocabulary: Vocabulary, derivations: BpeDerivations | None = None
) -> TokenOrder:
    """A tokenizer as a keeper of its boundaries: one for all bridges, because what it remembers of a student serves all its teachers.

    merges  its derivations where they are known already
    """
    keeper = _TOKEN_ORDERS.get(vocabulary)
    if keeper is None:
        if len(_TOKEN_ORDERS) >= 8:
            _TOKEN_ORDERS.pop(next(iter(_TOKEN_ORDERS)), None)
        keeper = _TOKEN_ORDERS[vocabulary] = TokenOrder(
            vocabulary, derivations or derive_bpe(vocabulary), load_pretokenizer(vocabulary)
        )
    return keeper


@dataclass(frozen=True, eq=False)
class BoundaryMask:
    """Which candidates (tokens of `own`) cannot stand where the keeper (the other tokenizer) has a boundary.

    first_W  first token of each candidate's bytes in the keeper's own encoding (bridge.first_tokens); -1 = control token

    Whether both go on from a keeper's token over a candidate does not depend on the context, only whether that token may stand in it does.
    """

    other: TokenOrder
    own: TokenOrder
    first_token_W: npt.NDArray[np.integer]
    _dead_end_states: set[SearchState] = field(default_factory=set)  # both never meet from there
    _meeting_states: set[SearchState] = field(default_factory=set)  # they do
    _undecided_states: set[SearchState] = field(
        default_factory=set
    )  # first states that PATIENCE was not enough for: not searched again

    @cached_property
    def _witness_WK(self) -> npt.NDArray[np.int32]:
        """By candidate: keeper's tokens from which both meet, as found so far; -1 = none."""
        return np.full((len(self.first_token_W), WITNESSES_PER_CANDIDATE), -1, np.int32)

    @cached_property
    def _candidates_by_first_token(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        known = np.flatnonzero(self.first_token_W >= 0)
        order = known[np.argsort(self.first_token_W[known], kind="stable")]
        return group_offsets(self.first_token_W[known], len(self.other.vocabulary)), order

    def impossible_tokens(
        self, context: int, candidates: npt.NDArray[np.integer] | None = None
    ) -> npt.NDArray[np.int64]:
        """Those of the candidates (default: the whole vocabulary), sorted, that no text keeps the boundary after.

        Control tokens never are: the turn may end anywhere.
        """
        if context == UNRESTRICTED_CONTEXT:
            return np.empty(0, np.int64)
        cannot, longer = (
            self.other.impossible_next_tokens(context),
            self.other.added_token_continuations(context),
        )
        blocked_W = np.zeros(len(self.other.vocabulary) + 1, np.bool_)
        blocked_W[cannot] = blocked_W[-1] = (
            True  # the last is what first_W and witnesses of -1 find
        )
        if candidates is None:
            offsets, order = self._candidates_by_first_token
            some = order[expand_groups(offsets, cannot)[0]]
        else:  # one whose own bytes the keeper can say here, first token first, can stand: no need to look further
            first = self.first_token_W[candidates]
            some = candidates[(first >= 0) & blocked_W[first]]
        some = some[
            blocked_W[self._witness_WK[some]].all(-1)
        ]  # .1 ms for 200 candidates; to search them anew takes 100
        found = {c for c in some.tolist() if not self._can_meet(blocked_W, c)}
        if longer:
            among = range(len(self.first_token_W)) if candidates is None else candidates.tolist()
            found |= {
                c for c in among if (self.own.vocabulary.bytes_W[c] or b"").startswith(longer)
            }
        return np.array(sorted(found), np.int64)

    def _can_meet(self, blocked_W: npt.NDArray[np.bool_], candidate: int) -> bool:
        """Whether there is a text over which both tokenizers go on from here, the own one by the candidate, until they meet."""
        raw = self.own.vocabulary.bytes_W[candidate] or b""
        asked = [0]
        for u in self.other.tokens_in_search_order(raw):
            if blocked_W[u]:
                continue
            root = self._advance(True, u, raw, candidate)
            if root in self._undecided_states:
                return True
            goes_on = self._search_meeting(root, asked)
            if goes_on is None:
                self._undecided_states.add(root)
                return True
            if goes_on:
                known_K = self._witness_WK[candidate]
                known_K[:] = [u, *known_K[:-1].tolist()]
                return True
        return False

    def _search_meeting(self, root: SearchState, search_count: list[int]) -> bool | None:
        """Whether both meet from a state; None where that is not known after PATIENCE. `asked` counts the tokens looked at."""
        if not root[2] or root in self._meeting_states:
            return True
        if root in self._dead_end_states:
            return False
        if len(self._dead_end_states) + len(self._meeting_states) > MAX_CACHED_STATES:
            for some in (self._dead_end_states, self._meeting_states, self._undecided_states):
                some.clear()
        seen, path, ways = {root}, [root], [self._next_states(root, search_count)]
        while ways:
            state = next(ways[-1], None)
            if state is None:
                ways.pop()
                path.pop()
            elif (
                search_count[0] > MAX_SEARCH_TOKENS
            ):  # what comes then was not asked whether it may follow
                return None
            elif not state[2] or state in self._meeting_states:
                self._meeting_states.update(path)
                return True
            elif state not in seen and state not in self._dead_end_states:
                seen.add(state)
                path.append(state)
                ways.append(self._next_states(state, search_count))
        self._dead_end_states.update(seen)
        return False

    def _next_states(self, state: SearchState, search_count: list[int]) -> Iterator[SearchState]:
        """The states after one, those first where both meet; `asked` counts the tokens looked at."""
        keepers, last, rest, other = state
        side = self.other if keepers else self.own
        for u in side.tokens_in_search_order(rest):
            search_count[0] += 1
            if search_count[0] > MAX_SEARCH_TOKENS or side.can_follow(last, u):
                yield self._advance(keepers, u, rest, other)

    def _advance(
        self, is_others_turn: bool, token: int, rest: bytes, waiting_token: int
    ) -> SearchState:
        """The state after one side has said `token` over `rest`: its own again where bytes are left, else the other's."""
        raw = (self.other if is_others_turn else self.own).vocabulary.bytes_W[token] or b""
        return (
            (is_others_turn, token, rest[len(raw) :], waiting_token)
            if len(raw) < len(rest)
            else (not is_others_turn, waiting_token, raw[len(rest) :], token)
        )
