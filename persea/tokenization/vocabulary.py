"""Vocabulary: one tokenizer seen as bytes. Every token is a byte string or a control token; proven by round trip, or refused.

Two tokenizers can only be compared in bytes: their token strings are private spellings (`Ġ`, `▁`, `<0x0A>`), their
characters may be cut in the middle (35 % of Qwen's Burmese token ends fall inside a character), and Qwen normalises.
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
from tokenizers import AddedToken, Tokenizer, models

from persea.errors import DataError

# An added token of this shape steers the model and is never text, also where its tokenizer does not call it special:
# Qwen3's <think> and <tool_call>, Gemma's 6,242 <unusedN>, DeepSeek's wide-barred <｜User｜>, are "not special" in their tokenizer.json.
CONTROL_TOKEN_PATTERN = re.compile(
    r"<([|｜]).*\1>|</?(?:think|tool_call|tool_response|start_of_turn|end_of_turn)>|<unused\d+>|\[multimodal\]|<mask>",
    re.DOTALL,
)

# Encoded and read back when a vocabulary is opened: scripts, split characters, spaces, controls.
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
    """The byte-level alphabet of GPT-2's tokenizer: 256 printable characters that stand for the 256 bytes."""
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
    """Code point -> byte, for str.translate; what stands for no byte becomes what Latin-1 cannot say."""

    def __missing__(self, _: int) -> int:
        return 0xFFFF


TO_LATIN1 = _Latin1({ord(c): b for c, b in CHAR_TO_BYTE.items()})


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """One tokenizer as bytes.

    name      what to call it in messages (a path or a model name)
    backend   the `tokenizers` tokenizer; every control token in a text given to it is text
    bytes_W   bytes of each id; None where the id is a control token (or a hole in the numbering)
    control   control token -> id
    digest    sha256 of the tokenizer's whole definition
    byte_level  True for byte-level BPE, False for SentencePiece with byte fallback
    """

    name: str
    backend: Tokenizer
    bytes_W: tuple[bytes | None, ...] = field(repr=False)
    control_token_ids: Mapping[str, int] = field(repr=False)
    digest: str
    byte_level: bool

    def __len__(self) -> int:
        return len(self.bytes_W)

    @cached_property
    def lengths_W(self) -> npt.NDArray[np.int32]:
        """Bytes per id; 0 for control tokens."""
        return np.array([len(b) if b is not None else 0 for b in self.bytes_W], dtype=np.int32)

    @cached_property
    def control_names(self) -> dict[int, str]:
        """Id -> control token."""
        return {i: name for name, i in self.control_token_ids.items()}

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain text: no template, no BOS, never a control token. Refuses a text whose bytes do not come back."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once."""
        raws = [self._encode_utf8(text) for text in texts]
        batches = [
            e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]
        for text, raw, ids in zip(texts, raws, batches, strict=True):
            self._check_round_trip(text, raw, ids)
        return batches

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of content ids. Refuses control tokens and ids out of range."""
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
        """Ids -> runs of content bytes and the control tokens (str) between them. Refuses ids out of range."""
        out: list[str | bytes] = []
        for i in ids:
            if not 0 <= i < len(self):
                raise DataError(
                    f"id {i} lies outside the vocabulary of {len(self)} tokens",
                    where=self.name,
                    remedy="the ids come from another tokenizer",
                )
            piece = self.bytes_W[i]
            if piece is None:
                out.append(self.control_names.get(i, f"<hole {i}>"))
            elif out and isinstance(out[-1], bytes):
                out[-1] += piece
            else:
                out.append(piece)
        return tuple(out)

    def _encode_utf8(self, text: str) -> bytes:
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"half a surrogate pair (\\u{ord(text[error.start]):04x}) at character {error.start} has no bytes",
                where=self.name,
                remedy="the text was cut inside a character; mend it or leave it out",
            ) from error

    def _check_round_trip(self, text: str, expected: bytes, ids: Sequence[int]) -> None:
        try:  # a tenth of encoding and aligning; quicker than asking every token whether it has bytes
            got = b"".join(map(self.bytes_W.__getitem__, ids))  # type: ignore[arg-type]
        except TypeError:  # a control token has none
            got = b"".join(self.bytes_W[i] or b"" for i in ids)
        if expected == got:
            return
        at = next(
            (k for k, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b),
            min(len(expected), len(got)),
        )
        nfc = unicodedata.is_normalized("NFC", text)
        raise DataError(
            f"the tokenizer does not give the text back: byte {at} of {text[:40]!r} is {expected[at : at + 8].hex(' ') or 'the end'}"
            f", came back as {got[at : at + 8].hex(' ') or 'the end'}",
            where=self.name,
            remedy="the tokenizer is lossy on this text; leave the text out"
            if nfc
            else "normalise the text to NFC first",
        )


def load_vocabulary(tokenizer: Any, name: str = "tokenizer") -> Vocabulary:
    """A Hugging Face (fast) tokenizer, or a bare `tokenizers.Tokenizer`, as a Vocabulary.

    Knows byte-level BPE (Llama 3, Qwen, gpt-oss, GPT-2; tiktoken files converted to it) and SentencePiece-style BPE
    with byte fallback (Gemma). Anything else, or a tokenizer that does not give back `PROBES`, is refused.
    The tokenizer object itself is left unchanged.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, Tokenizer):
        raise DataError(
            "not a fast tokenizer: it has no tokenizer.json form",
            where=name,
            remedy="convert it with transformers' AutoTokenizer first",
        )
    byte_level = _is_byte_level(backend, name)
    added = (
        backend.get_added_tokens_decoder()
    )  # asked part by part: to parse the whole definition takes half a second
    control = {
        t.content: i
        for i, t in added.items()
        if t.special or CONTROL_TOKEN_PATTERN.fullmatch(t.content)
    }
    ids = backend.get_vocab(with_added_tokens=False)
    bytes_W: list[bytes | None] = [None] * (max([*ids.values(), *added]) + 1)
    to_bytes = _byte_level_bytes if byte_level else _sentencepiece_bytes
    for token, i in ids.items():
        bytes_W[i] = to_bytes(token)
    for i, t in added.items():
        if t.content in control:
            bytes_W[i] = None
        elif bytes_W[i] is None:
            bytes_W[i] = t.content.encode()
    definition = backend.to_str()
    plain = Tokenizer.from_str(definition)
    plain.no_padding()
    plain.no_truncation()
    plain.add_special_tokens([AddedToken(c, special=True, normalized=False) for c in control])
    plain.encode_special_tokens = True  # from here on a control token in a text is text
    vocabulary = Vocabulary(
        name,
        plain,
        tuple(bytes_W),
        control,
        hashlib.sha256(definition.encode()).hexdigest(),
        byte_level,
    )
    vocabulary.encode_batch([unicodedata.normalize("NFC", p) for p in ROUND_TRIP_PROBES])
    return vocabulary


def _is_byte_level(backend: Tokenizer, name: str) -> bool:
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
    kinds = {d["type"] for d in decoder.get("decoders", [decoder]) if d}
    bpe = isinstance(backend.model, models.BPE)
    if bpe and "ByteLevel" in kinds:
        return True
    if bpe and "ByteFallback" in kinds and backend.model.byte_fallback:
        return False
    raise DataError(
        f"neither byte-level BPE nor SentencePiece BPE with byte fallback "
        f"(model {type(backend.model).__name__}, decoder {sorted(kinds)})",
        where=name,
        remedy="its bytes cannot be known exactly; use a model of another family",
    )


def _byte_level_bytes(token: str) -> bytes | None:
    try:
        return token.translate(TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError:  # it has characters that stand for no byte
        return None


def _sentencepiece_bytes(token: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
