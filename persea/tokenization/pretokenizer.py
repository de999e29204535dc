"""Pretokens: where a tokenizer cuts text into words before it merges, asked as a black box and
remembered by character class.

Merges never cross a cut, so a boundary that may be a cut may always stand. What a split pattern
does depends on its text only through the classes its own source names: a property such as \\p{L},
white space, a literal, a range. So one representative of each class is asked, once, and whole
vocabularies are answered from a table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, pre_tokenizers

from persea.tokenization.vocabulary import Vocabulary

LOOKAHEAD_CHARS = 3  # characters of what comes after that can matter: the longest a pattern looks at behind a cut is a contraction, 'll
# What may come after a token that ends: one of each kind, a mark, a digit, an apostrophe with and
# without its contraction.
PROBE_SUFFIXES = (
    "",
    "a",
    "A",
    "1",
    ".",
    " ",
    " a",
    "\n",
    "\r",
    "'",
    "'s",
    "'ll",
    "/",
    "你",
    "\u0e31",
    "\u0301",
    "ʰ",
)
PROBE_PREFIXES = (
    "",
    "a",
    "A",
    "1",
    "12",
    " ",
    "  ",
    ".",
    "'",
    ".'",
    "\n",
    "/",
    "你",
    "\u0e31",
    "\u0e31\u0e31",
    "'l",
    "'r",
    "'v",
)  # what may stand before, a contraction begun by an earlier token too
GPT2_SPLIT_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own
)
BUILTIN_SPLIT_PATTERNS = {"Digits": r"\p{N}", "Punctuation": r"\p{P}\p{S}"}
CONTRACTION_PATTERN = re.compile(r"'\w+")
REGEX_SYNTAX_PATTERN = re.compile(
    r"\\[pP]\{\^?\w+\}|\\[rnsSdDwWtvf]|\(\?[a-z]*[:!=]|\{\d+(?:,\d*)?\}"
)
TRAILING_SPACE_LOOKAHEAD_PATTERN = re.compile(
    r"(?:\\s| )\+\(\?!\\S\)"
)  # the one look-around every pattern has: of a run of spaces the last goes with the word
LOOKAROUND_PATTERN = re.compile(r"\(\?[^i:]")
UNSUPPORTED_SYNTAX_PATTERN = re.compile(r"\\[a-zA-Z]|\[:")  # what else a pattern may say of classes
WHITESPACE_CHARS = frozenset(
    "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
    + "".join(map(chr, range(0x2000, 0x200B)))
)


@dataclass(eq=False)
class Pretokenizer:
    """A tokenizer's cuts. `unknown` names a pre-tokenizer this module does not know: then every
    place may be a cut."""

    backend: Tokenizer
    never_splits: bool  # no cut at all (SentencePiece)
    unsupported: str
    unicode_properties: tuple[str, ...]
    literals: frozenset[str]
    char_ranges: tuple[tuple[str, str], ...]
    letters_only_in_contractions: bool  # letters of the pattern matter behind an apostrophe only
    _representatives: dict[tuple[str, bool], str] = field(default_factory=dict)
    _first_by_class: dict[tuple[str, bool], str] = field(default_factory=dict)
    _property_splitters: dict[str, pre_tokenizers.Split] = field(default_factory=dict)
    _stays_joined: dict[tuple[str, str], bool] = field(default_factory=dict)

    def split_positions(self, text: str) -> list[int]:
        """Character places where a pretoken begins, 0 included where there is text."""
        if self.never_splits or not text:
            return [0] if text else []
        return sorted(
            {begin for _, (begin, _) in self.backend.pre_tokenizer.pre_tokenize_str(text)} | {0}
        )

    def class_signature(self, text: str) -> str:
        """What stands before a place, each character replaced by the first one seen of its class:
        an equal signature, equal cuts."""
        plain = self.letters_only_in_contractions and "'" not in text
        return "".join([self._representative_of(c, plain) for c in text])

    def can_split(self, before_signature: str, next_signatures: Sequence[str]) -> bool:
        """Whether a pretoken can end between `before` (its signature) and any of these beginnings
        (see `heads`)."""
        if self.unsupported:
            return True
        if self.never_splits:
            return False
        if not next_signatures:
            return True
        for head in next_signatures:
            key = (before_signature, head)
            if key not in self._stays_joined:
                afters = (
                    PROBE_SUFFIXES
                    if len(head) < LOOKAHEAD_CHARS or all(c in WHITESPACE_CHARS for c in head)
                    else ("",)
                )
                self._stays_joined[key] = all(
                    len(before_signature)
                    not in self.split_positions(before_signature + head + after)
                    for after in afters
                )
            if not self._stays_joined[key]:
                return True
        return False

    def leading_signatures(self, raw: bytes) -> tuple[str, ...]:
        """What some bytes begin with, as signatures of at most HEAD characters; all possible ones
        where they begin with a part of a character. Empty where that cannot be told: no cut is
        ruled out there.
        """
        whole, rest = decode_whole_characters(raw)
        if whole:
            return ("".join([self._representative_of(c, False) for c in whole[:LOOKAHEAD_CHARS]]),)
        return tuple(
            sorted({self._representative_of(c, False) for c in _characters_with_prefix(rest)})
        )

    def _has_property(self, property_pattern: str, c: str) -> bool:
        """Whether the tokenizer's own engine finds a property in a character: another's Unicode may
        be newer by a script."""
        if property_pattern not in self._property_splitters:
            self._property_splitters[property_pattern] = pre_tokenizers.Split(
                Regex(property_pattern), "removed"
            )
        return not self._property_splitters[property_pattern].pre_tokenize_str(c)

    def _representative_of(self, c: str, ignore_letter_literals: bool) -> str:
        """plain: a letter that the pattern names is a letter like any other."""
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
            kind = (
                c
                if literal
                else repr([self._has_property(p, c) for p in self.unicode_properties] + in_ranges)
            )
            self._representatives[key] = self._first_by_class.setdefault(
                (kind, ignore_letter_literals), c
            )
        return self._representatives[key]


def load_pretokenizer(vocabulary: Vocabulary) -> Pretokenizer:
    """What a tokenizer's own definition says of its cuts."""
    backend = vocabulary.backend
    # their own state, not the whole tokenizer's: that is 20 MB of JSON
    definition, normaliser = (
        json.loads(part.__getstate__()) if part else None
        for part in (backend.pre_tokenizer, backend.normalizer)
    )
    parts = list(_flatten_sequence(definition))
    patterns = [p for part in parts for p in _split_patterns(part)]
    text = "".join(patterns)
    rest = REGEX_SYNTAX_PATTERN.sub("", text)
    unknown = ", ".join(
        sorted({p["type"] for p in parts} - {"Split", "ByteLevel", *BUILTIN_SPLIT_PATTERNS})
    )
    if any(p["type"] == "ByteLevel" and p.get("add_prefix_space") for p in parts):
        unknown = unknown or "ByteLevel with add_prefix_space"
    if UNSUPPORTED_SYNTAX_PATTERN.search(rest) or LOOKAROUND_PATTERN.search(
        TRAILING_SPACE_LOOKAHEAD_PATTERN.sub("", text)
    ):
        unknown = unknown or f"pattern {text!r}"
    # SentencePiece: the normaliser has written a sign for every space before the pre-tokenizer
    # looks for spaces
    signs = '"content": "▁"' in json.dumps(normaliser, ensure_ascii=False)
    whole = not unknown and (not patterns or (signs and set(patterns) == {" "}))
    properties = tuple(
        sorted(
            {rf"\p{{{name}}}" for name in re.findall(r"\\[pP]\{\^?(\w+)\}", text)}
            | {r"\s", r"\w", r"\d"}
        )
    )
    plain_letters = "'" in text and not any(c.isalpha() for c in CONTRACTION_PATTERN.sub("", rest))
    ranges = tuple(sorted(set(re.findall("(?=(.)-(.))", rest))))
    return Pretokenizer(
        backend, whole, unknown, properties, frozenset(rest.casefold()), ranges, plain_letters
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
    if part["type"] == "ByteLevel":
        return [GPT2_SPLIT_PATTERN] if part.get("use_regex", True) else []
    return [BUILTIN_SPLIT_PATTERNS[part["type"]]] if part["type"] in BUILTIN_SPLIT_PATTERNS else []


def decode_whole_characters(raw: bytes) -> tuple[str, bytes]:
    """The whole characters some bytes begin with, and the bytes after them."""
    try:
        return raw.decode(), b""
    except UnicodeDecodeError as error:
        return raw[: error.start].decode(), raw[error.start :]


@lru_cache(maxsize=4096)
def _characters_with_prefix(prefix: bytes) -> tuple[str, ...]:
    """The characters whose UTF-8 begins with these bytes; none where they are more than a plane's
    worth, or no beginning at all."""
    sizes = [
        n
        for n, low, high in ((2, 0xC2, 0xDF), (3, 0xE0, 0xEF), (4, 0xF0, 0xF4))
        if prefix and low <= prefix[0] <= high
    ]
    if not sizes or len(prefix) >= sizes[0] or sizes[0] - len(prefix) > 2:
        return ()
    missing = sizes[0] - len(prefix)
    tails = [bytes(t) for t in np.ndindex(*[64] * missing)]
    found = []
    for tail in tails:
        try:
            found.append((prefix + bytes(0x80 + b for b in tail)).decode())
        except UnicodeDecodeError:
            continue
    return tuple(found)


def char_to_byte_offsets(text: str, positions: Sequence[int]) -> npt.NDArray[np.int64]:
    """Character places as byte places."""
    sizes = np.fromiter((len(c.encode()) for c in text), np.int64, len(text))
    ends = np.concatenate([[0], np.cumsum(sizes)])
    return ends[np.asarray(positions, np.int64)]
