"""Which token may follow which in one tokenizer's own encodings.

A tokenizer produces only some of the token sequences that spell a text: after "hel" no BPE
tokenizer with the merge "hel" + "lo" starts the token "lo". Inside a word the merges decide
(tokenization/bpe.py); where a word may end, the pre-tokenizer does (tokenization/pretokenizer.py).
`TokenOrder` answers both questions and caches the answers: those of a student serve all its
teachers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from persea.alignment.impossible_pairs import ImpossiblePairs
from persea.alignment.kept_heads import TokenHeads, keep_heads
from persea.alignment.prefix_index import PrefixIndex
from persea.alignment.token_runs import split_run
from persea.tokenization.bpe import BpeDerivations, derive_bpe
from persea.tokenization.pretokenizer import (
    Pretokenizer,
    decode_whole_characters,
    load_pretokenizer,
)
from persea.tokenization.tokens import RenderedTokens
from persea.tokenization.unigram import UnigramLattice, derive_unigram
from persea.tokenization.vocabulary import Vocabulary

# Context in which every candidate is possible: the start of an answer, or after a control token.
UNRESTRICTED_CONTEXT = -1
MID_CHARACTER = "inside"  # signature of a boundary inside a character, where no word ends
# Contexts whose impossible tokens are cached: about 25 kB each with real vocabularies.
MAX_CACHED_CONTEXTS = 4096
# Fewer tokens are asked one by one: a microsecond or two each, where all at once take 300 for a new
# state and 20 for a known one.
MIN_VECTOR_TOKENS = 32
MAX_CACHED_TOKEN_ORDERS = 8
MAX_CACHED_WORDS = 100_000


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """A tokenizer with the rules of which of its tokens can follow each other.

    Attributes:
        vocabulary: Token ids and bytes.
        derivations: How BPE builds each token from two others, or the lattice of Unigram. Both
            number the states of a sequence of tokens; under BPE the last token alone is the state.
        pretokenizer: Where words end.
    """

    vocabulary: Vocabulary
    derivations: BpeDerivations | UnigramLattice
    pretokenizer: Pretokenizer
    _impossible_cache: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict)
    _context_ids: dict[tuple[int, str], int] = field(default_factory=dict)
    _context_keys: list[tuple[int, str]] = field(default_factory=list)
    # word signature -> by number of a token's leading signatures: whether a word end is possible
    # between them; -1 = not computed yet
    _may_cut_cache: dict[str, npt.NDArray[np.int8]] = field(default_factory=dict)
    _word_signatures: dict[bytes, str] = field(default_factory=dict)
    _ending_signatures: dict[int, tuple[str, ...]] = field(default_factory=dict)
    _can_cut_cache: dict[tuple[str, ...], npt.NDArray[np.int8]] = field(default_factory=dict)
    _can_cut_ahead_cache: dict[tuple[int, bytes], bool] = field(default_factory=dict)

    @cached_property
    def prefixes(self) -> PrefixIndex:
        """The tokens by their bytes."""
        return PrefixIndex(self.vocabulary)

    @cached_property
    def _pairs(self) -> ImpossiblePairs:
        return ImpossiblePairs(self.derivations, len(self.vocabulary))

    @cached_property
    def _is_control_W(self) -> npt.NDArray[np.bool_]:
        return np.array([raw is None for raw in self.vocabulary.bytes_W], np.bool_)

    @cached_property
    def _token_heads(self) -> TokenHeads:
        """(number of each token's leading signatures, the distinct leading signatures)."""
        if self.pretokenizer.ignores_signatures:
            return np.zeros(len(self.vocabulary), np.int64), [()]
        return keep_heads(self.vocabulary, self._make_token_heads)

    def _make_token_heads(self) -> TokenHeads:
        numbers: dict[tuple[str, ...], int] = {}
        head_W = [
            numbers.setdefault(
                self.pretokenizer.leading_signatures(raw) if raw else (), len(numbers)
            )
            for raw in self.vocabulary.bytes_W
        ]
        return np.array(head_W, np.int64), list(numbers)

    @cached_property
    def added_token_bytes(self) -> tuple[bytes, ...]:
        """Bytes of added tokens that are text (Gemma's runs of newlines).

        The tokenizer cuts these out of a text before it merges anything.
        """
        return tuple(sorted(self._added_tokens))

    @cached_property
    def _added_tokens(self) -> dict[bytes, bool]:
        """Bytes of an added text token -> whether it is cut out everywhere.

        False = only as a whole word, or together with the spaces around it.
        """
        tokens = self.vocabulary.backend.get_added_tokens_decoder().items()
        texts = {
            t.content.encode(): not (t.single_word or t.lstrip or t.rstrip)
            for i, t in tokens
            if i < len(self.vocabulary) and self.vocabulary.bytes_W[i] is not None
        }
        # no text contains a run of SentencePiece's "▁": the text has spaces there
        return {
            raw: always
            for raw, always in texts.items()
            if self.vocabulary.byte_level or "▁".encode() not in raw
        }

    @cached_property
    def _may_begin_added_token(self) -> npt.NDArray[np.bool_]:
        """Whether an added token may begin with or inside each token.

        With a pre-tokenizer, text around an added token is split otherwise than its bytes suggest.
        """
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
        """Prefix of an added token -> the suffixes that complete it."""
        found: dict[bytes, list[bytes]] = {}
        for raw in (raw for raw, always in self._added_tokens.items() if always):
            for n in range(1, len(raw)):
                found.setdefault(raw[:n], []).append(raw[n:])
        return {k: tuple(v) for k, v in found.items()}

    def context_ids(
        self, ids_T: npt.NDArray[np.integer], positions: Sequence[int]
    ) -> npt.NDArray[np.int64]:
        """Number the contexts before some tokens of a rendering.

        Args:
            ids_T: Token ids of the rendering.
            positions: C indices of tokens. A context reaches back to the last control token.

        Returns:
            int64 C: context numbers for `impossible_next_tokens`; `UNRESTRICTED_CONTEXT` at the
            start and after control tokens.
        """
        control = self._is_control_W[ids_T]
        edges = np.flatnonzero(np.diff(np.concatenate([[True], control, [True]]).astype(np.int8)))
        raws = list[bytes]()
        # of each token: its run, its state, where its word begins and where it ends in the run
        columns_4T = np.zeros((4, len(ids_T)), np.int64)
        for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            raw, cuts, ends_T = split_run(
                ids_T[begin:end], self.vocabulary, self.pretokenizer, self._added_tokens
            )
            columns_4T[:, begin:end] = (
                np.full(end - begin, len(raws)),
                self._states_of_run(ids_T[begin:end].tolist(), cuts, ends_T),
                cuts[np.searchsorted(cuts, ends_T) - 1],
                ends_T,
            )
            raws.append(raw)
        position_C = np.asarray(positions, np.int64)
        found_C = np.full(len(position_C), UNRESTRICTED_CONTEXT, np.int64)
        inner_C = (position_C > 0) & ~control[position_C - 1] if len(ids_T) else position_C > 0
        found_C[inner_C] = [
            self.context_id(state, raws[run][begin:end])
            for run, state, begin, end in columns_4T[:, position_C[inner_C] - 1].T.tolist()
        ]
        return found_C

    def supervised_context_ids(
        self, tokens: RenderedTokens, positions_C: npt.NDArray[np.integer]
    ) -> npt.NDArray[np.int64]:
        """Number the contexts before supervised tokens of a rendering.

        Args:
            tokens: The rendering.
            positions_C: Indices of supervised tokens.

        Returns:
            int64 C: as `context_ids`. After an unsupervised token the context is unrestricted,
            because the end of a prompt is given, whatever follows.
        """
        found = np.full(len(positions_C), UNRESTRICTED_CONTEXT, np.int64)
        inner_C = tokens.loss_mask_T[np.maximum(positions_C - 1, 0)] & (positions_C > 0)
        found[inner_C] = self.context_ids(tokens.ids_T, positions_C[inner_C].tolist())
        return found

    def _states_of_run(
        self, ids: list[int], cuts: npt.NDArray[np.int64], ends_T: npt.NDArray[np.int64]
    ) -> list[int]:
        """Return the state after each token of a run; every word begins anew."""
        if isinstance(self.derivations, BpeDerivations):
            return ids
        word_starts = set(cuts.tolist())
        states: list[int] = []
        begin = 0
        for token, end in zip(ids, ends_T.tolist(), strict=True):
            states.append(
                self.derivations.state_of(token)
                if begin in word_starts
                else self.derivations.extend(states[-1], token)
            )
            begin = end
        return states

    def context_id(self, state: int, word: bytes) -> int:
        """Return the number of a context.

        Args:
            state: The state after the last token; under BPE the token itself.
            word: Bytes of the current word so far; they end with the token.
        """
        key = (state, "" if self.pretokenizer.never_splits else self._word_signature(word))
        if key not in self._context_ids:
            self._context_ids[key] = len(self._context_keys)
            self._context_keys.append(key)
        return self._context_ids[key]

    def _word_signature(self, word: bytes) -> str:
        """Return the signature of a word so far; cached."""
        found = self._word_signatures.get(word)
        if found is None:
            if len(self._word_signatures) >= MAX_CACHED_WORDS:
                self._word_signatures.clear()
            text, rest = decode_whole_characters(word)
            found = MID_CHARACTER if rest else self.pretokenizer.class_signature(text)
            self._word_signatures[word] = found
        return found

    def impossible_next_tokens(self, context: int) -> npt.NDArray[np.int64]:
        """Return the sorted ids of tokens that cannot follow in a context; cached."""
        if context not in self._impossible_cache:
            if len(self._impossible_cache) >= MAX_CACHED_CONTEXTS:
                self._impossible_cache.clear()
            self._impossible_cache[context] = self._find_impossible_next_tokens(context)
        return self._impossible_cache[context]

    def cannot_follow(self, context: int, tokens: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """Return which tokens are in `impossible_next_tokens(context)`.

        It asks about these tokens alone. A split pattern has thousands of answers for a context,
        of which a distribution needs a few.

        Args:
            context: The context.
            tokens: Token ids, of any shape.
        """
        state, word = self._context_keys[context]
        impossible = self._pairs.are_impossible(state, tokens)
        if self.added_token_bytes:
            if (
                self.vocabulary.bytes_W[self.derivations.last_token(state)]
                in self.added_token_bytes
            ):
                return np.zeros(tokens.shape, np.bool_)
            impossible &= ~self._may_begin_added_token[tokens]
        if word == MID_CHARACTER or self.pretokenizer.never_splits or not impossible.any():
            return impossible
        head_W, heads = self._token_heads
        cut_H = self._may_cut_cache.setdefault(word, np.full(len(heads), -1, np.int8))
        head_D = head_W[tokens[impossible]]
        for h in set(head_D[cut_H[head_D] < 0].tolist()):
            cut_H[h] = self.pretokenizer.can_split(word, heads[h])
        impossible[impossible] = cut_H[head_D] == 0
        return impossible

    def _find_impossible_next_tokens(self, context: int) -> npt.NDArray[np.int64]:
        state, word = self._context_keys[context]
        token = self.derivations.last_token(state)
        unmergeable = self.derivations.impossible_next_tokens(state)
        if self.added_token_bytes:
            # a token that may begin an added token can follow anywhere, and after an added token
            # a new word begins
            unmergeable = (
                unmergeable[:0]
                if self.vocabulary.bytes_W[token] in self.added_token_bytes
                else unmergeable[~self._may_begin_added_token[unmergeable]]
            )
        if word == MID_CHARACTER or self.pretokenizer.never_splits or not len(unmergeable):
            return unmergeable
        head_W, heads = self._token_heads
        head_M, needed_H = head_W[unmergeable], np.zeros(len(heads), np.bool_)
        needed_H[head_M] = True
        # many contexts end in the same signature
        cut_H = self._may_cut_cache.setdefault(word, np.full(len(heads), -1, np.int8))
        for h in np.flatnonzero(needed_H & (cut_H < 0)).tolist():
            cut_H[h] = self.pretokenizer.can_split(word, heads[h])
        impossible: npt.NDArray[np.int64] = unmergeable[cut_H[head_M] == 0]
        return impossible

    def added_token_continuations(self, context: int) -> tuple[bytes, ...]:
        """Return the texts that would complete an added token begun by the context's last token."""
        token = self.derivations.last_token(self._context_keys[context][0])
        return self.added_token_suffixes.get(self.vocabulary.bytes_W[token] or b"", ())

    def can_follow(self, state: int, next_token: int, ahead: bytes = b"") -> bool:
        """Return whether a token may follow in a state, whatever is before its tokens.

        Args:
            state: The state.
            next_token: The token.
            ahead: Bytes that the text after the state begins with, see `is_open_space`.
        """
        if not self.derivations.is_impossible_pair(state, next_token):
            return True
        token = self.derivations.last_token(state)
        raw = self.vocabulary.bytes_W[token] or b""
        next_raw = self.vocabulary.bytes_W[next_token] or b""
        if self.added_token_bytes and (
            self._may_begin_added_token[next_token] or raw in self.added_token_bytes
        ):
            return True
        if self.pretokenizer.never_splits or next_raw[0] & 0xC0 == 0x80:
            return False
        endings = self._endings_of(token)
        if self.is_open_space(next_token, ahead):
            if (token, ahead) not in self._can_cut_ahead_cache:
                signatures = self.pretokenizer.leading_signatures(ahead)
                self._can_cut_ahead_cache[token, ahead] = any(
                    self.pretokenizer.can_split(ending, signatures) for ending in endings
                )
            return self._can_cut_ahead_cache[token, ahead]
        head_W, heads = self._token_heads
        head = int(head_W[next_token])
        # called millions of times with some thousand different keys
        cut_H = self._can_cut_by_head(endings)
        if cut_H[head] < 0:
            cut_H[head] = any(self.pretokenizer.can_split(e, heads[head]) for e in endings)
        return bool(cut_H[head])

    def following_tokens(self, state: int, rest: bytes) -> Iterator[tuple[int, int]]:
        """Yield the tokens of `PrefixIndex.in_search_order` that may follow in a state.

        Args:
            state: The state.
            rest: Bytes that the text after the state begins with.

        Yields:
            The token, and how many tokens stand before it in that order.
        """
        tokens, tokens_T = self.prefixes.in_search_order(rest)
        single = len(tokens)
        # the states of BPE are tokens, and recur
        if single >= MIN_VECTOR_TOKENS and isinstance(self.derivations, BpeDerivations):
            # only tokens shorter than the rest can be open spaces
            single -= self.prefixes.num_longer(rest)
        for place, token in enumerate(tokens[:single]):
            if self.can_follow(state, token, rest):
                yield token, place
        if single < len(tokens):
            for place in np.flatnonzero(self._can_follow_each(state, tokens_T[single:])).tolist():
                yield tokens[single + place], single + place

    def _can_follow_each(
        self, state: int, next_tokens: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Return `can_follow` of tokens that are no open space, under BPE, for all at once."""
        possible = ~self._pairs.are_impossible(state, next_tokens)
        doubtful = np.flatnonzero(~possible)
        if not len(doubtful):
            return possible
        token, tokens = self.derivations.last_token(state), next_tokens[doubtful]
        raw = self.vocabulary.bytes_W[token] or b""
        if self.added_token_bytes:
            if raw in self.added_token_bytes:
                return np.ones(len(next_tokens), np.bool_)
            possible[doubtful] = self._may_begin_added_token[tokens]
        if self.pretokenizer.never_splits:
            return possible
        endings, (head_W, heads) = self._endings_of(token), self._token_heads
        cut_H, head_D = self._can_cut_by_head(endings), head_W[tokens]
        for h in np.unique(head_D[cut_H[head_D] < 0]).tolist():
            cut_H[h] = any(self.pretokenizer.can_split(e, heads[h]) for e in endings)
        possible[doubtful] |= (cut_H[head_D] == 1) & ~self._begins_inside_character[tokens]
        return possible

    @cached_property
    def _begins_inside_character(self) -> npt.NDArray[np.bool_]:
        """Whether each token's first byte continues a character of UTF-8."""
        return np.array(
            [(raw or b" ")[0] & 0xC0 == 0x80 for raw in self.vocabulary.bytes_W], np.bool_
        )

    def _can_cut_by_head(self, endings: tuple[str, ...]) -> npt.NDArray[np.int8]:
        """Return, by number of leading signatures, whether a word can end before; -1 = not asked.

        Args:
            endings: The signatures of words that end here.
        """
        if endings not in self._can_cut_cache:
            self._can_cut_cache[endings] = np.full(len(self._token_heads[1]), -1, np.int8)
        return self._can_cut_cache[endings]

    def _endings_of(self, token: int) -> tuple[str, ...]:
        """Return the signatures of words that end with a token; () inside a character."""
        if token not in self._ending_signatures:
            raw = self.vocabulary.bytes_W[token] or b""
            self._ending_signatures[token] = self._signatures_ending_with(raw)
        return self._ending_signatures[token]

    def is_open_space(self, token: int, ahead: bytes) -> bool:
        """Return whether a token is white space alone and the text is known to go on after it.

        Whether a word ends before white space depends on what follows: patterns leave the last of
        several spaces to the next word.
        """
        raw = self.vocabulary.bytes_W[token] or b""
        return len(raw) < len(ahead) and raw.isspace()

    def can_open_space_follow(self, context: int, space: int, ahead: bytes) -> bool:
        """Return whether white space may follow in a context if the text then goes on.

        Args:
            context: The context. `space` is not in its `impossible_next_tokens`.
            space: A token that `is_open_space` before `ahead`.
            ahead: Bytes that the text after the context begins with.
        """
        state, word = self._context_keys[context]
        last = self.vocabulary.bytes_W[self.derivations.last_token(state)] or b""
        return (
            word == MID_CHARACTER
            or self.pretokenizer.never_splits
            or not self.derivations.is_impossible_pair(state, space)
            or bool(
                self.added_token_bytes
                and (self._may_begin_added_token[space] or last in self.added_token_bytes)
            )
            or self.pretokenizer.can_split(word, self.pretokenizer.leading_signatures(ahead))
        )

    def _signatures_ending_with(self, raw: bytes) -> tuple[str, ...]:
        """Return the distinct signatures of words that end with a token; () inside a character."""
        word, cut_off = decode_whole_characters(raw.lstrip(bytes(range(0x80, 0xC0))))
        if cut_off:
            return ()
        signatures = (
            self.pretokenizer.class_signature(p + word) for p in self.pretokenizer.probe_prefixes
        )
        return tuple(dict.fromkeys(signatures))


_TOKEN_ORDERS: dict[Vocabulary, TokenOrder] = {}


def get_token_order(
    vocabulary: Vocabulary, derivations: BpeDerivations | None = None
) -> TokenOrder:
    """Return the token order of a vocabulary, shared by all event maps of this process.

    Args:
        vocabulary: The tokenizer.
        derivations: Its BPE derivations, if they are known already.
    """
    order = _TOKEN_ORDERS.get(vocabulary)
    if order is None:
        if len(_TOKEN_ORDERS) >= MAX_CACHED_TOKEN_ORDERS:
            _TOKEN_ORDERS.pop(next(iter(_TOKEN_ORDERS)), None)
        pretokenizer = load_pretokenizer(vocabulary)
        order = _TOKEN_ORDERS[vocabulary] = TokenOrder(
            vocabulary,
            derivations or _derive(vocabulary, pretokenizer),
            pretokenizer,
        )
    return order


def _derive(vocabulary: Vocabulary, pretokenizer: Pretokenizer) -> BpeDerivations | UnigramLattice:
    if vocabulary.is_unigram:
        return derive_unigram(vocabulary, cuts_at_spaces=not pretokenizer.never_splits)
    return derive_bpe(vocabulary)
