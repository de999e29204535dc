"""Vocabulary: one tokenizer as bytes.

Every token is a byte string or a control token, which a round trip proves; otherwise the tokenizer
is refused. Two tokenizers can only be compared in bytes: their token strings are private spellings
(`Ġ`, `▁`, `<0x0A>`), their tokens may end inside a character (35 % of Qwen's Burmese tokens do),
and Qwen's tokenizer normalises.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, models

from persea.errors import DataError
from persea.tokenization.control_tokens import ControlFlags, read_control_flags
from persea.tokenization.plain_backend import (
    LOSSY_REMEDY,
    copy_tokenizer,
    lossy_parts,
    normalizes_any,
    open_plain,
    unknown_token,
)
from persea.tokenization.prefix_space import SPACE_MARK, PrefixSpace

# An added token of this shape controls the model and is never text, also where its tokenizer does
# not declare it special, such as DeepSeek's <｜User｜> with wide bars.
CONTROL_MARKER = r"<([|｜]).*\1>"

# Encoded and decoded when a vocabulary is loaded: scripts, split characters, spaces, controls.
ROUND_TRIP_PROBES = (
    "The quick brown fox, 1234567890 times.",
    "  two spaces,\ttab\n\n\nnewlines \r\n end ",
    "def f(x):\n    return [x ** 2 for _ in range(10)]\n",
    "你好，世界。我们三百四十二只猫。",
    "こんにちは、世界。カタカナ",
    "안녕하세요 세계",
    "Xin chào thế giới, một trăm hai mươi ba",
    "สวัสดีชาวโลก สามร้อยสี่สิบสอง",
    "ကမ္ဘာလောက မင်္ဂလာပါ",
    "សួស្តី​ពិភពលោក ສະບາຍດີ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 é ∑∫√ €",
    "\x00\x01\x7f",
)


def _unicode_to_byte() -> dict[str, int]:
    """Return GPT-2's byte-level alphabet: 256 printable characters for the 256 bytes."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    table = {chr(b): b for b in printable}
    others = [b for b in range(256) if b not in printable]
    return table | {chr(256 + i): b for i, b in enumerate(others)}


CHAR_TO_BYTE = _unicode_to_byte()
BYTE_TO_CHAR = {b: c for c, b in CHAR_TO_BYTE.items()}


class _Latin1(dict[int, int]):
    """Code point -> byte, for str.translate; other characters become one outside Latin-1."""

    def __missing__(self, _: int) -> int:
        return 0xFFFF


TO_LATIN1 = _Latin1({ord(c): b for c, b in CHAR_TO_BYTE.items()})


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """One tokenizer as bytes.

    Attributes:
        name: Name in messages (a path or a model name).
        backend: The `tokenizers` tokenizer. It encodes control tokens in a text as text, and writes
            no space before a text.
        bytes_W: Bytes of each id; None for a control token and for an unused id.
        control_token_ids: Control token -> id.
        digest: sha256 of the tokenizer's whole definition.
        byte_level: True for byte-level BPE, False for SentencePiece (BPE or Unigram).
        prefix_space: Where the tokenizer itself writes a space before a text; None for nowhere.
        control_flags: Control token -> its flags; only those that have any.
        original: The tokenizer as it is, to compare renderings with; None where its control tokens
            have no flags and it writes no space.
        start_ids: What its post-processor writes before a text.
        is_unigram: Whether the highest sum of scores decides how a text is cut, not merges.
    """

    name: str
    backend: Tokenizer
    bytes_W: tuple[bytes | None, ...] = field(repr=False)
    control_token_ids: Mapping[str, int] = field(repr=False)
    digest: str
    byte_level: bool
    prefix_space: PrefixSpace | None = None
    control_flags: Mapping[str, ControlFlags] = field(default_factory=dict, repr=False)
    original: Tokenizer | None = field(default=None, repr=False)
    start_ids: tuple[int, ...] = ()
    is_unigram: bool = False

    def __len__(self) -> int:
        return len(self.bytes_W)

    @cached_property
    def lengths_W(self) -> npt.NDArray[np.int32]:
        """int32 number of bytes of each id; 0 for control tokens."""
        return np.array([len(b) if b is not None else 0 for b in self.bytes_W], dtype=np.int32)

    @cached_property
    def control_names(self) -> dict[int, str]:
        """Id -> control token."""
        return {i: name for name, i in self.control_token_ids.items()}

    def prefix_space_before(self, text: str, is_first: bool = True) -> str:
        """Return the space that the tokenizer writes before a run of text, or "".

        Args:
            text: The text between two control tokens, not empty.
            is_first: Whether no control token comes before it.
        """
        return "" if self.prefix_space is None else self.prefix_space.before(text, is_first)

    @cached_property
    def missing_bytes(self) -> bytes:
        """The bytes without a token of their own, sorted; empty for most tokenizers.

        A trainer that does not begin with the whole byte alphabet leaves out the bytes that its
        texts lack: SmolLM2 has no token for 04, c0 and 19 others.
        """
        single = {raw for raw in self.bytes_W if raw is not None and len(raw) == 1}
        return bytes(b for b in range(256) if bytes([b]) not in single)

    @cached_property
    def _single_characters(self) -> frozenset[str]:
        """Characters with a token of their own, which need no byte tokens; none if byte-level."""
        if self.byte_level:
            return frozenset()
        short = (raw for raw in self.bytes_W if raw is not None and len(raw) <= 4)
        texts = (raw.decode(errors="ignore") for raw in short)
        return frozenset(text for text in texts if len(text) == 1)

    def can_write(self, raw: bytes) -> bool:
        """Return whether tokens can spell these bytes, which need not be whole characters."""
        if raw == raw.translate(None, delete=self.missing_bytes):
            return True
        return not self._unwritable_characters(raw.decode(errors="surrogateescape"))

    def _unwritable_characters(self, text: str) -> set[str]:
        """Return the characters of a text that tokens cannot spell."""
        missing = self.missing_bytes
        return {
            c
            for c in set(text) - self._single_characters
            if missing and any(b in missing for b in c.encode(errors="surrogateescape"))
        }

    def encode_alone(self, text: str) -> list[int]:
        """Return the ids that the tokenizer itself gives a text that stands alone, without BOS.

        Under a tokenizer that writes a space before a text they begin with that space.
        """
        return self.encode(self.prefix_space_before(text) + text) if text else []

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a plain text: no template, no BOS, never a control token.

        A tokenizer that writes a space before a text writes none here: the ids have exactly the
        text's bytes. `prefix_space_before` returns the space.

        Raises:
            DataError: The ids do not decode to the same bytes.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of many texts, see `encode`."""
        raws = [self._encode_utf8(text) for text in texts]
        batches = [
            e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]
        for text, raw, ids in zip(texts, raws, batches, strict=True):
            self._check_round_trip(text, raw, ids)
        return batches

    def decode(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of content ids.

        Raises:
            DataError: An id is a control token or outside the vocabulary.
        """
        pieces = []
        for i in ids:
            piece = self.bytes_W[i] if 0 <= i < len(self) else None
            if piece is None:
                raise DataError(
                    f"id {i} ({self.control_names.get(i, 'out of range')}) has no bytes",
                    where=self.name,
                    remedy="only content tokens can be decoded",
                )
            pieces.append(piece)
        return b"".join(pieces)

    def decode_pieces(self, ids: Sequence[int]) -> tuple[str | bytes, ...]:
        """Return ids as control tokens (str) and the runs of content bytes between them.

        Raises:
            DataError: An id is outside the vocabulary.
        """
        pieces: list[str | bytes] = []
        for i in ids:
            if not 0 <= i < len(self):
                raise DataError(
                    f"id {i} lies outside the vocabulary of {len(self)} tokens",
                    where=self.name,
                    remedy="the ids come from another tokenizer",
                )
            piece = self.bytes_W[i]
            if piece is None:
                pieces.append(self.control_names.get(i, f"<hole {i}>"))
            elif pieces and isinstance(pieces[-1], bytes):
                pieces[-1] += piece
            else:
                pieces.append(piece)
        return tuple(pieces)

    def _encode_utf8(self, text: str) -> bytes:
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"half a surrogate pair (\\u{ord(text[error.start]):04x}) at character "
                f"{error.start} has no bytes",
                where=self.name,
                remedy="the text was cut inside a character; correct it or leave it out",
            ) from error

    def _check_round_trip(self, text: str, expected: bytes, ids: Sequence[int]) -> None:
        # This costs a tenth of encoding and aligning; a test of every token for None costs more.
        try:
            got = b"".join(map(self.bytes_W.__getitem__, ids))  # type: ignore[arg-type]
        except TypeError:  # a control token has no bytes
            got = b"".join(self.bytes_W[i] or b"" for i in ids)
        if expected == got:
            return
        if unwritable := self._unwritable_characters(text):
            at, c = next((k, c) for k, c in enumerate(text) if c in unwritable)
            raise DataError(
                f"no token for the bytes {c.encode().hex(' ')} at character {at} of {text[:40]!r}",
                where=self.name,
                remedy="the vocabulary lacks single bytes; leave the text out",
            )
        at = next(
            (k for k, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b),
            min(len(expected), len(got)),
        )
        nfc = unicodedata.is_normalized("NFC", text)
        raise DataError(
            f"the tokenizer does not reproduce the text: byte {at} of {text[:40]!r} is "
            f"{expected[at : at + 8].hex(' ') or 'the end'}"
            f", decoded as {got[at : at + 8].hex(' ') or 'the end'}",
            where=self.name,
            remedy="the tokenizer is lossy on this text; leave the text out"
            if nfc
            else "normalise the text to NFC first",
        )


def load_vocabulary(
    tokenizer: Any, name: str = "tokenizer", control_markers: Sequence[str] = ()
) -> Vocabulary:
    """Load a tokenizer as a Vocabulary. The tokenizer object is not changed.

    Supported are byte-level BPE (Llama 3, Qwen, gpt-oss, GPT-2; tiktoken files converted to it),
    SentencePiece BPE with byte fallback (Gemma, Llama 2) and SentencePiece Unigram (LLM-jp).

    Args:
        tokenizer: A fast Hugging Face tokenizer, or a `tokenizers.Tokenizer`.
        name: Name in messages.
        control_markers: Regular expressions of added tokens that are control tokens although the
            tokenizer does not declare them special; tokens of the shape <|...|> always are. The
            families' are `persea.chat.families.CONTROL_MARKERS`.

    Raises:
        DataError: Another kind of tokenizer, or one that does not reproduce ROUND_TRIP_PROBES.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, Tokenizer):
        raise DataError(
            "not a fast tokenizer: it has no tokenizer.json form",
            where=name,
            remedy="convert it with transformers' AutoTokenizer first",
        )
    byte_level, unigram = _is_byte_level(backend, name), isinstance(backend.model, models.Unigram)
    # To parse the whole definition of the tokenizer would take half a second.
    added = backend.get_added_tokens_decoder()
    marker_pattern = re.compile("|".join([CONTROL_MARKER, *control_markers]), re.DOTALL)
    control = {
        t.content: i for i, t in added.items() if t.special or marker_pattern.fullmatch(t.content)
    }
    ids = backend.get_vocab(with_added_tokens=False)
    bytes_W: list[bytes | None] = [None] * (max([*ids.values(), *added]) + 1)
    to_bytes = _byte_level_bytes if byte_level else _sentencepiece_bytes
    for token, i in ids.items():
        bytes_W[i] = to_bytes(token)
    if unigram:
        control |= unknown_token(backend)
        bytes_W = [None if i in control.values() else raw for i, raw in enumerate(bytes_W)]
    for i, added_token in added.items():
        if added_token.content in control:
            bytes_W[i] = None
        elif bytes_W[i] is None:
            bytes_W[i] = added_token.content.encode()
    definition = backend.to_str()
    probes = [unicodedata.normalize("NFC", p) for p in ROUND_TRIP_PROBES]
    plain, prefix_space = open_plain(backend, definition, control, name, probes)
    flags = read_control_flags(added.values(), control)
    vocabulary = Vocabulary(
        name,
        plain,
        tuple(bytes_W),
        control,
        hashlib.sha256(definition.encode()).hexdigest(),
        byte_level,
        prefix_space,
        flags,
        copy_tokenizer(definition)
        if prefix_space or flags or normalizes_any(backend, control)
        else None,
        _find_start_ids(plain),
        isinstance(plain.model, models.Unigram),
    )
    if vocabulary.missing_bytes:
        unwritable = vocabulary._unwritable_characters("".join(probes))
        probes = ["".join(c for c in p if c not in unwritable) for p in probes]
    try:
        vocabulary.encode_batch(probes)
    except DataError as error:
        raise DataError(
            f"{error.message}{lossy_parts(backend)}", where=name, remedy=LOSSY_REMEDY
        ) from error
    return vocabulary


def _find_start_ids(backend: Tokenizer) -> tuple[int, ...]:
    """Return the ids that a post-processor writes before a text."""
    plain, processed = (
        backend.encode("Hi", add_special_tokens=special).ids for special in (False, True)
    )
    start = next((k for k in range(len(processed)) if processed[k : k + len(plain)] == plain), 0)
    return tuple(processed[:start])


def _is_byte_level(backend: Tokenizer, name: str) -> bool:
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
    decoder_types = {d["type"] for d in decoder.get("decoders", [decoder]) if d}
    bpe = isinstance(backend.model, models.BPE)
    if bpe and "ByteLevel" in decoder_types:
        return True
    if bpe and "ByteFallback" in decoder_types and backend.model.byte_fallback:
        return False
    if isinstance(backend.model, models.Unigram):
        return False
    raise DataError(
        f"neither byte-level BPE, SentencePiece BPE with byte fallback nor Unigram: the bytes of "
        f"its tokens are not known (model {type(backend.model).__name__}, decoder "
        f"{sorted(decoder_types)})",
        where=name,
        remedy=LOSSY_REMEDY,
    )


def _byte_level_bytes(token: str) -> bytes | None:
    try:
        return token.translate(TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError:  # a character that is not in the byte-level alphabet
        return None


def _sentencepiece_bytes(token: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE_MARK, " ").encode()
