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

from persea.chat.messages import Tokens
from persea.tokenization.bpe import Merges, derive, expand, offsets_of
from persea.tokenization.pretokenizer import BEFORE, Pretokens, characters, open_pretokens, places
from persea.tokenization.vocabulary import Vocabulary

FREE = -1  # a context after which every candidate can stand: an answer's beginning, a control token
INSIDE = "inside"  # signature of a boundary in the middle of a character, where no word ends
REMEMBERED = 4096  # contexts whose forbidden tokens are kept: some 25 kB each with real vocabularies
State: TypeAlias = tuple[bool, int, bytes, int]  # whose turn it is (True = the keeper's), its last token, what it must cover, the other's last
PATIENCE = 20_000  # tokens asked for one candidate, some 20 ms; one that is not ruled out by then stays
WITNESSES = 8       # of each candidate: tokens of the keeper's over it that are known to go on, and so have not to be searched again
STATES = 1_000_000  # remembered, some 250 bytes each; then all are forgotten


@dataclass(frozen=True, eq=False)
class Keeper:
    """A tokenizer whose boundaries are to be kept. A `place` is a token's rank among all tokens in the order of their bytes."""

    vocabulary: Vocabulary
    merges: Merges
    pretokens: Pretokens
    _covers: dict[bytes, tuple[npt.NDArray[np.int64], tuple[int, ...]]] = field(default_factory=dict)
    _ways: dict[bytes, tuple[int, ...]] = field(default_factory=dict)
    _cannot: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict)
    _numbers: dict[tuple[int, str], int] = field(default_factory=dict)
    _contexts: list[tuple[int, str]] = field(default_factory=list)
    _cuts: dict[str, npt.NDArray[np.int8]] = field(default_factory=dict)  # by word and head: whether a cut may come between; -1 = not asked yet
    _endings: dict[int, tuple[str, ...]] = field(default_factory=dict)
    _may: dict[tuple[tuple[str, ...], int], bool] = field(default_factory=dict)

    @cached_property
    def ordered(self) -> tuple[list[bytes], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Token bytes in order, the token at each place, and the place of each token (-1 for control tokens)."""
        pairs = sorted((raw, i) for i, raw in enumerate(self.vocabulary.bytes_W) if raw)
        token = np.array([i for _, i in pairs], np.int64)
        place = np.full(len(self.vocabulary), -1, np.int64)
        place[token] = np.arange(len(token))
        return [raw for raw, _ in pairs], token, place

    @cached_property
    def by_bytes(self) -> dict[bytes, tuple[int, ...]]:
        found: dict[bytes, tuple[int, ...]] = {}
        for i, raw in enumerate(self.vocabulary.bytes_W):
            if raw:
                found[raw] = (*found.get(raw, ()), i)
        return found

    @cached_property
    def _heads(self) -> tuple[npt.NDArray[np.int64], list[tuple[str, ...]]]:
        """What each token begins with, for the cuts: number of its heads, and the heads by number."""
        numbers: dict[tuple[str, ...], int] = {}
        of = [numbers.setdefault(self.pretokens.heads(raw) if raw else (), len(numbers)) for raw in self.vocabulary.bytes_W]
        return np.array(of, np.int64), list(numbers)

    @cached_property
    def added(self) -> tuple[bytes, ...]:
        """Added tokens of text (Gemma's runs of newlines), which are cut out of a text before anything is merged."""
        return tuple(sorted(self._added))

    @cached_property
    def _added(self) -> dict[bytes, bool]:
        """Bytes of an added token of text -> whether it is cut out wherever it stands, and not only as a word, or with spaces around it."""
        tokens = self.vocabulary.backend.get_added_tokens_decoder().items()
        texts = {t.content.encode(): not (t.single_word or t.lstrip or t.rstrip) for i, t in tokens
                 if i < len(self.vocabulary) and self.vocabulary.bytes_W[i] is not None}
        # a run of SentencePiece signs is in no text: there stands a space
        return {raw: always for raw, always in texts.items() if self.vocabulary.byte_level or "▁".encode() not in raw}

    @cached_property
    def _begins_added(self) -> npt.NDArray[np.bool_]:
        """Tokens that an added token may begin with or in: split by words, what stands around it is not what its neighbours are."""
        return np.array([raw is not None and (raw.startswith(self.added) or (not self.pretokens.whole and any(
            a.startswith(raw) or a in raw for a in self.added))) for raw in self.vocabulary.bytes_W], np.bool_)

    @cached_property
    def longer(self) -> dict[bytes, tuple[bytes, ...]]:
        """Of each beginning of an added token: what makes it whole."""
        found: dict[bytes, list[bytes]] = {}
        for raw in (raw for raw, always in self._added.items() if always):
            for n in range(1, len(raw)):
                found.setdefault(raw[:n], []).append(raw[n:])
        return {k: tuple(v) for k, v in found.items()}

    def contexts(self, ids_T: npt.NDArray[np.integer], at: Sequence[int]) -> npt.NDArray[np.int64]:
        """The context before each token of `at`: its number, or FREE where the token before it is a control token or none.

        ids_T  a rendering; what stands before a token is looked at back to the last control token
        """
        control = np.array([self.vocabulary.bytes_W[i] is None for i in ids_T.tolist()], bool)
        edges = np.flatnonzero(np.diff(np.concatenate([[True], control, [True]]).astype(np.int8)))
        begins = edges[::2]
        runs = [self._run(ids_T[b:e]) for b, e in zip(begins, edges[1::2], strict=True)]
        found = []
        for k in at:
            if k == 0 or control[k - 1]:
                found.append(FREE)
                continue
            run = int(np.searchsorted(begins, k, side="left")) - 1
            raw, cuts, ends_T = runs[run]
            end = int(ends_T[k - 1 - begins[run]])
            word = raw[int(cuts[np.searchsorted(cuts, end, side="left") - 1]):end]
            found.append(self.number(int(ids_T[k - 1]), word))
        return np.array(found, np.int64)

    def inner(self, tokens: Tokens, at_C: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """The contexts of some learned tokens of a rendering. FREE where the token before is not learned: what a prompt ends with is
        given, whatever comes after."""
        found = np.full(len(at_C), FREE, np.int64)
        inner_C = tokens.learn_T[np.maximum(at_C - 1, 0)] & (at_C > 0)
        found[inner_C] = self.contexts(tokens.ids_T, at_C[inner_C].tolist())
        return found

    def _run(self, ids: npt.NDArray[np.integer]) -> tuple[bytes, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The bytes of tokens, the byte places of their cuts, and where each token ends."""
        raw = b"".join(self.vocabulary.bytes_W[i] or b"" for i in ids.tolist())
        ends_T = np.cumsum(self.vocabulary.lengths_W[ids])
        if self.pretokens.whole:
            return raw, np.zeros(1, np.int64), ends_T
        # an added token is cut out first: what stands before and after it is split apart from it
        edges = {0, len(raw)} | {int(e) for i, end in zip(ids.tolist(), ends_T.tolist(), strict=True) if self.vocabulary.bytes_W[i] in self.added
                                 for e in (end - self.vocabulary.lengths_W[i], end)}
        cuts: list[int] = []
        for begin, end in pairwise(sorted(edges)):
            text = characters(raw[begin:end])[0]
            cuts += [begin, *(begin + places(text, self.pretokens.cuts(text))).tolist()]
        return raw, np.unique(np.array(cuts, np.int64)), ends_T

    def number(self, token: int, word: bytes) -> int:
        """The number of a context: the last token, and the word so far, which ends with it."""
        text, rest = ("", b"") if self.pretokens.whole else characters(word)
        key = (token, INSIDE if rest else self.pretokens.signature(text))
        if key not in self._numbers:
            self._numbers[key] = len(self._contexts)
            self._contexts.append(key)
        return self._numbers[key]

    def cannot_follow(self, context: int) -> npt.NDArray[np.int64]:
        """Tokens, sorted, that cannot stand in this context; remembered for a while."""
        if context not in self._cannot:
            if len(self._cannot) >= REMEMBERED:
                self._cannot.clear()
            self._cannot[context] = self._find(context)
        return self._cannot[context]

    def _find(self, context: int) -> npt.NDArray[np.int64]:
        token, word = self._contexts[context]
        crossing = self.merges.cannot_follow(token)
        if self.added:  # what begins with an added token stands wherever it begins, and an added token ends a word
            crossing = crossing[:0] if self.vocabulary.bytes_W[token] in self.added else crossing[~self._begins_added[crossing]]
        if word == INSIDE or self.pretokens.whole or not len(crossing):
            return crossing
        of, heads = self._heads
        group, asked_H = of[crossing], np.zeros(len(heads), np.bool_)
        asked_H[group] = True
        cut_H = self._cuts.setdefault(word, np.full(len(heads), -1, np.int8))  # many contexts end in the same signature
        for h in np.flatnonzero(asked_H & (cut_H < 0)).tolist():
            cut_H[h] = self.pretokens.may_cut(word, heads[h])
        left: npt.NDArray[np.int64] = crossing[cut_H[group] == 0]
        return left

    def grown(self, context: int) -> tuple[bytes, ...]:
        """Beginnings of text that would make an added token out of the context's last token."""
        return self.longer.get(self.vocabulary.bytes_W[self._contexts[context][0]] or b"", ())

    def covers(self, raw: bytes) -> tuple[npt.NDArray[np.int64], tuple[int, ...]]:
        """The tokens that a text which begins with these bytes can begin with: those that cover all of them, and those that do not."""
        if raw not in self._covers:
            ordered, token, _ = self.ordered
            low, after = bisect_left(ordered, raw), raw.rstrip(b"\xff")
            high = bisect_left(ordered, after[:-1] + bytes([after[-1] + 1])) if after else len(ordered)
            self._covers[raw] = token[low:high], tuple(u for n in range(1, len(raw)) for u in self.by_bytes.get(raw[:n], ()))
        return self._covers[raw]

    def ways(self, raw: bytes) -> tuple[int, ...]:
        """The same tokens in the order in which a meeting is looked for: of just these bytes, of fewer, of more."""
        if raw not in self._ways:  # asked at each step of a search, of the same bytes again and again
            (covering, starts), just = self.covers(raw), self.by_bytes.get(raw, ())
            self._ways[raw] = (*just, *starts, *covering[len(just):].tolist())
        return self._ways[raw]

    def may_follow(self, token: int, after: int) -> bool:
        """Whether `after` may stand after `token`, of which nothing is known but that it stands."""
        if not self.merges.crosses(token, after):
            return True
        raw, rest = self.vocabulary.bytes_W[token] or b"", self.vocabulary.bytes_W[after] or b""
        if self.added and (self._begins_added[after] or raw in self.added):
            return True
        if self.pretokens.whole or rest[0] & 0xC0 == 0x80:
            return False
        if token not in self._endings:
            word, cut_off = characters(raw.lstrip(bytes(range(0x80, 0xC0))))
            self._endings[token] = () if cut_off else tuple(dict.fromkeys(self.pretokens.signature(before + word) for before in BEFORE))
        of, heads = self._heads
        key = self._endings[token], int(of[after])
        if key not in self._may:  # asked millions of times, of some thousand different ones
            self._may[key] = any(self.pretokens.may_cut(ending, heads[key[1]]) for ending in key[0])
        return self._may[key]


_KEEPERS: dict[Vocabulary, Keeper] = {}


def open_keeper(vocabulary: Vocabulary, merges: Merges | None = None) -> Keeper:
    """A tokenizer as a keeper of its boundaries: one for all bridges, because what it remembers of a student serves all its teachers.

    merges  its derivations where they are known already
    """
    keeper = _KEEPERS.get(vocabulary)
    if keeper is None:
        if len(_KEEPERS) >= 8:
            _KEEPERS.pop(next(iter(_KEEPERS)), None)
        keeper = _KEEPERS[vocabulary] = Keeper(vocabulary, merges or derive(vocabulary), open_pretokens(vocabulary))
    return keeper


@dataclass(frozen=True, eq=False)
class Mask:
    """Which candidates (tokens of `own`) cannot stand where the keeper (the other tokenizer) has a boundary.

    first_W  first token of each candidate's bytes in the keeper's own encoding (bridge.first_tokens); -1 = control token

    Whether both go on from a keeper's token over a candidate does not depend on the context, only whether that token may stand in it does.
    """

    keeper: Keeper
    own: Keeper
    first_W: npt.NDArray[np.integer]
    _never: set[State] = field(default_factory=set)  # both never meet from there
    _meets: set[State] = field(default_factory=set)  # they do
    _unsure: set[State] = field(default_factory=set)  # first states that PATIENCE was not enough for: not searched again

    @cached_property
    def _witness_WK(self) -> npt.NDArray[np.int32]:
        """By candidate: keeper's tokens from which both meet, as found so far; -1 = none."""
        return np.full((len(self.first_W), WITNESSES), -1, np.int32)

    @cached_property
    def _by_first(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        known = np.flatnonzero(self.first_W >= 0)
        order = known[np.argsort(self.first_W[known], kind="stable")]
        return offsets_of(self.first_W[known], len(self.keeper.vocabulary)), order

    def dead(self, context: int, candidates: npt.NDArray[np.integer] | None = None) -> npt.NDArray[np.int64]:
        """Those of the candidates (default: the whole vocabulary), sorted, that no text keeps the boundary after.

        Control tokens never are: the turn may end anywhere.
        """
        if context == FREE:
            return np.empty(0, np.int64)
        cannot, longer = self.keeper.cannot_follow(context), self.keeper.grown(context)
        blocked_W = np.zeros(len(self.keeper.vocabulary) + 1, np.bool_)
        blocked_W[cannot] = blocked_W[-1] = True  # the last is what first_W and witnesses of -1 find
        if candidates is None:
            offsets, order = self._by_first
            some = order[expand(offsets, cannot)[0]]
        else:  # one whose own bytes the keeper can say here, first token first, can stand: no need to look further
            first = self.first_W[candidates]
            some = candidates[(first >= 0) & blocked_W[first]]
        some = some[blocked_W[self._witness_WK[some]].all(-1)]  # .1 ms for 200 candidates; to search them anew takes 100
        found = {c for c in some.tolist() if not self._meet(blocked_W, c)}
        if longer:
            among = range(len(self.first_W)) if candidates is None else candidates.tolist()
            found |= {c for c in among if (self.own.vocabulary.bytes_W[c] or b"").startswith(longer)}
        return np.array(sorted(found), np.int64)

    def _meet(self, blocked_W: npt.NDArray[np.bool_], candidate: int) -> bool:
        """Whether there is a text over which both tokenizers go on from here, the own one by the candidate, until they meet."""
        raw = self.own.vocabulary.bytes_W[candidate] or b""
        asked = [0]
        for u in self.keeper.ways(raw):
            if blocked_W[u]:
                continue
            root = self._after(True, u, raw, candidate)
            if root in self._unsure:
                return True
            goes_on = self._goes_on(root, asked)
            if goes_on is None:
                self._unsure.add(root)
                return True
            if goes_on:
                known_K = self._witness_WK[candidate]
                known_K[:] = [u, *known_K[:-1].tolist()]
                return True
        return False

    def _goes_on(self, root: State, asked: list[int]) -> bool | None:
        """Whether both meet from a state; None where that is not known after PATIENCE. `asked` counts the tokens looked at."""
        if not root[2] or root in self._meets:
            return True
        if root in self._never:
            return False
        if len(self._never) + len(self._meets) > STATES:
            for some in (self._never, self._meets, self._unsure):
                some.clear()
        seen, path, ways = {root}, [root], [self._onward(root, asked)]
        while ways:
            state = next(ways[-1], None)
            if state is None:
                ways.pop()
                path.pop()
            elif asked[0] > PATIENCE:  # what comes then was not asked whether it may follow
                return None
            elif not state[2] or state in self._meets:
                self._meets.update(path)
                return True
            elif state not in seen and state not in self._never:
                seen.add(state)
                path.append(state)
                ways.append(self._onward(state, asked))
        self._never.update(seen)
        return False

    def _onward(self, state: State, asked: list[int]) -> Iterator[State]:
        """The states after one, those first where both meet; `asked` counts the tokens looked at."""
        keepers, last, rest, other = state
        side = self.keeper if keepers else self.own
        for u in side.ways(rest):
            asked[0] += 1
            if asked[0] > PATIENCE or side.may_follow(last, u):
                yield self._after(keepers, u, rest, other)

    def _after(self, keepers: bool, token: int, rest: bytes, other: int) -> State:
        """The state after one side has said `token` over `rest`: its own again where bytes are left, else the other's."""
        raw = (self.keeper if keepers else self.own).vocabulary.bytes_W[token] or b""
        return (keepers, token, rest[len(raw):], other) if len(raw) < len(rest) else (not keepers, other, raw[len(rest):], token)
