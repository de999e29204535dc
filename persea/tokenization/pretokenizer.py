r"""Where a tokenizer splits text into words before it merges.

Merges never cross a split, so a token boundary that may be a split is always possible. The split is
computed by the tokenizer itself and remembered by character class: a split pattern distinguishes
characters only by the classes that its source names (a property such as \p{L}, white space, a
literal, a range). So one representative of each class is encoded once, and whole vocabularies are
answered from a table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, pre_tokenizers

from persea.tokenization.prefix_space import SPACE_MARK
from persea.tokenization.vocabulary import Vocabulary

# These three decide which tokens count as impossible, so a change needs a new event map format.
LOOKAHEAD_CHARS = 3  # characters after a split that a pattern can look at: a contraction, 'll
# Continuations of the text after a boundary: one of each kind of character, a combining mark, a
# digit, an apostrophe with and without its contraction.
# fmt: off
PROBE_SUFFIXES = (
    "", "a", "A", "1", ".", " ", " a", "\n", "\r", "'", "'s", "'ll", "/", "你",
    "\u0e31", "\u0301", "ʰ",
)
# Texts before a boundary, including a contraction that an earlier token begins.
PROBE_PREFIXES = (
    "", "a", "A", "1", "12", " ", "  ", ".", "'", ".'", "\n", "/", "你", "\u0e31", "\u0e31\u0e31",
    "'l", "'r", "'v",
)
# fmt: on
MAX_PROBED_COUNT = 8  # a pattern may name how long a word is at most, as [ab]{1,3}; beyond: unknown
COUNT_PATTERN = re.compile(r"\{(\d+)(?:,(\d*))?\}")
# The pattern of the ByteLevel pre-tokenizer.
GPT2_SPLIT_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BUILTIN_SPLIT_PATTERNS = {"Digits": r"\p{N}", "Punctuation": r"\p{P}\p{S}"}
CONTRACTION_PATTERN = re.compile(r"'\w+")
REGEX_SYNTAX_PATTERN = re.compile(
    r"\\[pP]\{\^?\w+\}|\\[rnsSdDwWtvf]|\(\?[a-z]*[:!=]|\{\d+(?:,\d*)?\}"
)
# The one look-around that all patterns have: the last of several spaces belongs to the next word.
TRAILING_SPACE_LOOKAHEAD_PATTERN = re.compile(r"(?:\\s| )\+\(\?!\\S\)")
LOOKAROUND_PATTERN = re.compile(r"\(\?[^i:]")
UNSUPPORTED_SYNTAX_PATTERN = re.compile(r"\\[a-zA-Z]|\[:")  # other character classes
WHITESPACE_CHARS = frozenset(
    "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
    + "".join(map(chr, range(0x2000, 0x200B)))
)


@dataclass(eq=False)
class Pretokenizer:
    """The splits of one tokenizer.

    Attributes:
        splitter: The pre-tokenizer itself; None without one.
        never_splits: True for SentencePiece, which has no splits.
        sees_space_marks: Whether a normaliser has replaced every space by "▁" before.
        unsupported: Name of a pre-tokenizer that this module does not know: then every place may be
            a split.
        unicode_properties: Properties that the split patterns name.
        literals: Characters that the split patterns name.
        char_ranges: (first, last) of the character ranges in the split patterns.
        letters_only_in_contractions: Whether letters in the patterns matter only after an
            apostrophe.
        max_count: Largest number of repetitions that a pattern names, as 3 in {1,3}; 1 = none.
    """

    splitter: pre_tokenizers.PreTokenizer | None
    never_splits: bool
    sees_space_marks: bool
    unsupported: str
    unicode_properties: tuple[str, ...]
    literals: frozenset[str]
    char_ranges: tuple[tuple[str, str], ...]
    letters_only_in_contractions: bool
    max_count: int = 1
    _representatives: dict[tuple[str, bool], str] = field(default_factory=dict)
    _first_by_class: dict[tuple[str, bool], str] = field(default_factory=dict)
    _property_splitters: dict[str, pre_tokenizers.Split] = field(default_factory=dict)
    _properties: dict[str, bytes] = field(default_factory=dict)  # character -> a 0 or 1 a property
    _simpler_signatures: dict[str, str] = field(default_factory=dict)
    _stays_joined: dict[tuple[str, str], bool] = field(default_factory=dict)

    @property
    def ignores_signatures(self) -> bool:
        """Whether `can_split` gives one answer for all texts."""
        return bool(self.unsupported) or self.never_splits

    def split_positions(self, text: str) -> list[int]:
        """Return the character positions at which words begin, including 0 if there is text."""
        if self.never_splits or self.splitter is None or not text:
            return [0] if text else []
        if self.sees_space_marks:
            text = text.replace(" ", SPACE_MARK)
        return sorted({begin for _, (begin, _) in self.splitter.pre_tokenize_str(text)} | {0})

    def class_signature(self, text: str) -> str:
        """Return the text with each character replaced by the representative of its class.

        Texts of equal signature are split at the same positions.
        """
        ignore_letter_literals = self.letters_only_in_contractions and "'" not in text
        return "".join([self._representative_of(c, ignore_letter_literals) for c in text])

    @cached_property
    def probe_prefixes(self) -> tuple[str, ...]:
        """PROBE_PREFIXES, and beginnings of words of limited length: a and aa for [ab]{1,3}."""
        named = {c for c in PROBE_PREFIXES if len(c) == 1} | self.literals
        counted = [
            c * k
            for c in sorted(named | {low for low, _ in self.char_ranges})
            if self.max_count > 1 and len(self.split_positions(c * (self.max_count + 1))) > 1
            for k in range(1, self.max_count)
        ]
        return tuple(dict.fromkeys((*PROBE_PREFIXES, *counted)))

    @cached_property
    def _probe_suffixes(self) -> tuple[str, ...]:
        """PROBE_SUFFIXES, one of each signature."""
        signatures = (
            "".join([self._representative_of(c, False) for c in s]) for s in PROBE_SUFFIXES
        )
        return tuple(dict.fromkeys(signatures))

    def can_split(self, before_signature: str, next_signatures: Sequence[str]) -> bool:
        """Return whether a word can end between two texts.

        Args:
            before_signature: Signature of the text before the boundary, see `class_signature`.
            next_signatures: The signatures that the text after it may begin with, see
                `leading_signatures`.
        """
        if self.unsupported:
            return True
        if self.never_splits:
            return False
        if not next_signatures:
            return True
        no_contraction = self.letters_only_in_contractions and "'" not in before_signature
        for signature in next_signatures:
            if no_contraction:  # fewer texts are left to be split
                signature = self._without_letter_literals(signature)
            key = (before_signature, signature)
            if key not in self._stays_joined:
                suffixes = (
                    self._probe_suffixes
                    if len(signature) < LOOKAHEAD_CHARS
                    or all(c in WHITESPACE_CHARS for c in signature)
                    else ("",)
                )
                self._stays_joined[key] = all(
                    len(before_signature)
                    not in self.split_positions(before_signature + signature + suffix)
                    for suffix in suffixes
                )
            if not self._stays_joined[key]:
                return True
        return False

    def _without_letter_literals(self, signature: str) -> str:
        """Return the signature of a text that no apostrophe precedes."""
        if signature not in self._simpler_signatures:
            self._simpler_signatures[signature] = (
                signature if "'" in signature else self.class_signature(signature)
            )
        return self._simpler_signatures[signature]

    def leading_signatures(self, raw: bytes) -> tuple[str, ...]:
        """Return the possible signatures of the first LOOKAHEAD_CHARS characters of some bytes.

        There are several if the bytes begin with a part of a character, and none if that part has
        too many completions: then no split is ruled out.
        """
        characters, partial = decode_whole_characters(raw)
        if characters:
            return (
                "".join([self._representative_of(c, False) for c in characters[:LOOKAHEAD_CHARS]]),
            )
        completions = _characters_with_prefix(partial)
        self._find_properties(completions)
        return tuple(sorted({self._representative_of(c, False) for c in completions}))

    def _find_properties(self, characters: Sequence[str]) -> None:
        """Find out which Unicode properties characters have, by the tokenizer's own engine.

        Another engine's Unicode version may have one more script. The engine is called once for all
        characters: a call for each takes seconds for one vocabulary.
        """
        text = "".join([c for c in characters if c not in self._properties])
        if not text:
            return
        has_PT = np.ones((len(self.unicode_properties), len(text)), np.bool_)
        for row_T, pattern in zip(has_PT, self.unicode_properties, strict=True):
            if pattern not in self._property_splitters:
                self._property_splitters[pattern] = pre_tokenizers.Split(Regex(pattern), "removed")
            for _, (begin, end) in self._property_splitters[pattern].pre_tokenize_str(text):
                row_T[begin:end] = False
        self._properties.update(zip(text, map(bytes, has_PT.T), strict=True))

    def _properties_of(self, c: str) -> bytes:
        if c not in self._properties:
            self._find_properties(c)
        return self._properties[c]

    def _representative_of(self, c: str, ignore_letter_literals: bool) -> str:
        """Return the first character seen of the same class.

        With `ignore_letter_literals` a letter in a pattern is a letter like any other.
        """
        key = (c, ignore_letter_literals)
        if key not in self._representatives:
            literal = (
                c in WHITESPACE_CHARS or c in self.literals or c.casefold() in self.literals
            ) and not (ignore_letter_literals and c.isalpha())
            in_ranges = [
                low <= x <= high
                for low, high in self.char_ranges
                for x in (c, c.lower(), c.upper())
            ]  # a pattern may ignore case
            char_class = c if literal else repr((self._properties_of(c), in_ranges))
            self._representatives[key] = self._first_by_class.setdefault(
                (char_class, ignore_letter_literals), c
            )
        return self._representatives[key]


def load_pretokenizer(vocabulary: Vocabulary) -> Pretokenizer:
    """Read the splits from a tokenizer's own definition."""
    backend = vocabulary.backend
    # The whole tokenizer would be 20 MB of JSON.
    definition, normaliser = (
        json.loads(part.__getstate__()) if part else None
        for part in (backend.pre_tokenizer, backend.normalizer)
    )
    parts = list(_flatten_sequence(definition))
    patterns = [pattern for part in parts for pattern in _split_patterns(part)]
    pattern_text = "".join(patterns)
    literals = REGEX_SYNTAX_PATTERN.sub("", pattern_text)
    unsupported = ", ".join(
        sorted(
            {pattern["type"] for pattern in parts}
            - {"Split", "ByteLevel", "Metaspace", *BUILTIN_SPLIT_PATTERNS}
        )
    )
    if any(pattern["type"] == "ByteLevel" and pattern.get("add_prefix_space") for pattern in parts):
        unsupported = unsupported or "ByteLevel with add_prefix_space"
    if UNSUPPORTED_SYNTAX_PATTERN.search(literals) or LOOKAROUND_PATTERN.search(
        TRAILING_SPACE_LOOKAHEAD_PATTERN.sub("", pattern_text)
    ):
        unsupported = unsupported or f"pattern {pattern_text!r}"
    counts = (n for pair in COUNT_PATTERN.findall(pattern_text) for n in pair if n)
    max_count = max(map(int, counts), default=1)
    if max_count > MAX_PROBED_COUNT:
        unsupported = unsupported or f"pattern {pattern_text!r}"
    # SentencePiece: the normaliser replaces every space before the pre-tokenizer runs.
    marks_spaces = '"content": "▁"' in json.dumps(normaliser, ensure_ascii=False)
    never_splits = not unsupported and (not patterns or (marks_spaces and set(patterns) == {" "}))
    properties = tuple(
        sorted(
            {rf"\p{{{name}}}" for name in re.findall(r"\\[pP]\{\^?(\w+)\}", pattern_text)}
            | {r"\s", r"\w", r"\d"}
        )
    )
    letters_only_in_contractions = "'" in pattern_text and not any(
        c.isalpha() for c in CONTRACTION_PATTERN.sub("", literals)
    )
    char_ranges = tuple(sorted(set(re.findall("(?=(.)-(.))", literals))))
    return Pretokenizer(
        backend.pre_tokenizer,
        never_splits,
        marks_spaces,
        unsupported,
        properties,
        frozenset(literals.casefold()),
        char_ranges,
        letters_only_in_contractions,
        max_count,
    )


def _flatten_sequence(spec: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if spec is None:
        return
    if spec["type"] == "Sequence":
        for part in spec["pretokenizers"]:
            yield from _flatten_sequence(part)
    else:
        yield spec


def _split_patterns(part: Mapping[str, Any]) -> list[str]:
    if part["type"] == "Split":
        return [str(next(iter(part["pattern"].values())))]
    if part["type"] == "Metaspace":
        return [SPACE_MARK] if part.get("split", True) else []
    if part["type"] == "ByteLevel":
        return [GPT2_SPLIT_PATTERN] if part.get("use_regex", True) else []
    return [BUILTIN_SPLIT_PATTERNS[part["type"]]] if part["type"] in BUILTIN_SPLIT_PATTERNS else []


def decode_whole_characters(raw: bytes) -> tuple[str, bytes]:
    """Return the whole characters that some bytes begin with, and the remaining bytes."""
    try:
        return raw.decode(), b""
    except UnicodeDecodeError as error:
        return raw[: error.start].decode(), raw[error.start :]


@lru_cache(maxsize=4096)
def _characters_with_prefix(prefix: bytes) -> tuple[str, ...]:
    """Return the characters whose UTF-8 begins with these bytes.

    None if there are more than a plane of them (65,536), or if no character begins so.
    """
    sizes = [
        n
        for n, low, high in ((2, 0xC2, 0xDF), (3, 0xE0, 0xEF), (4, 0xF0, 0xF4))
        if prefix and low <= prefix[0] <= high
    ]
    if not sizes or len(prefix) >= sizes[0] or sizes[0] - len(prefix) > 2:
        return ()
    missing = sizes[0] - len(prefix)
    tails = [bytes(t) for t in np.ndindex(*[64] * missing)]
    characters = []
    for tail in tails:
        try:
            characters.append((prefix + bytes(0x80 + b for b in tail)).decode())
        except UnicodeDecodeError:
            continue
    return tuple(characters)


def char_to_byte_offsets(text: str, positions: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return int64 UTF-8 byte offsets of character positions."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.dtype("<u4"))
    sizes = 1 + sum((codes >= least).astype(np.int64) for least in (0x80, 0x800, 0x10000))
    ends = np.concatenate([[0], np.cumsum(sizes)])
    return ends[np.asarray(positions, np.int64)]
