"""Remove an API key from everything that a server says, in every spelling.

A server can say the key back in an error, a model's name, an answer, or cut in the middle. So its
responses are cleaned where they arrive, before anything is cut, stored or printed.
"""

from __future__ import annotations

import base64
import html
import json
import re
from functools import lru_cache
from typing import Any
from urllib.parse import quote

MASK = "***"
# A piece of this length is treated as the key, of keys that are long enough to be secret.
MIN_PIECE_CHARS, MIN_KEY_CHARS = 8, 16


def redact_text(text: str, key: str, *, with_pieces: bool = True) -> str:
    """Return a text without a key: plain, encoded, in another case, reversed, or cut.

    Args:
        text: The text.
        key: The key; "" = nothing is removed.
        with_pieces: Remove pieces of the key too. A piece could be a word of a teacher's answer,
            which must not be changed.

    Example:
        >>> redact_text("bad key sk-12345678901234567890", "sk-12345678901234567890")
        'bad key ***'
    """
    if len(text) < min(len(key), MIN_PIECE_CHARS) or not key.strip():
        return text
    return _pattern(key, with_pieces).sub(MASK, text)


def redact_value(value: Any, key: str, *, with_pieces: bool) -> Any:
    """Return a JSON value without a key in any of its texts, names of entries included.

    A key of a few letters ("EMPTY") protects nothing and could be a word: without `with_pieces` it
    stays.
    """
    if len(key.strip()) < (1 if with_pieces else MIN_KEY_CHARS):
        return value
    if isinstance(value, str):
        return redact_text(value, key, with_pieces=with_pieces)
    if isinstance(value, list):
        return [redact_value(v, key, with_pieces=with_pieces) for v in value]
    if isinstance(value, dict):
        return {
            redact_text(k, key, with_pieces=with_pieces): redact_value(
                v, key, with_pieces=with_pieces
            )
            for k, v in value.items()
        }
    return value


@lru_cache(maxsize=32)
def _pattern(key: str, with_pieces: bool) -> re.Pattern[str]:
    """Return a pattern of all spellings, the longest first."""
    url = quote(key, safe="")
    spellings = {key, key[::-1], url, quote(url, safe=""), html.escape(key)}
    spellings |= {json.dumps(key)[1:-1], repr(key)[1:-1], key.encode().hex()}
    for prefix in ("", "Bearer ", ":"):
        spellings |= _base64_spellings((prefix + key).encode())
    words = [re.escape(w) for w in sorted(spellings - {""}, key=len, reverse=True)]
    if with_pieces and len(key) >= MIN_KEY_CHARS:
        pieces = {key[k : k + MIN_PIECE_CHARS] for k in range(len(key) - MIN_PIECE_CHARS + 1)}
        letters = "".join(sorted(re.escape(c) for c in set(key)))
        words.append(f"(?:{'|'.join(map(re.escape, sorted(pieces)))})[{letters}]*")
    return re.compile("|".join(words), re.IGNORECASE)


def _base64_spellings(data: bytes) -> set[str]:
    """Return what base64 makes of bytes at each of three places in a text, without the edges."""
    found = set()
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + data).decode()
        # characters that depend on the bytes before or after are left out
        core = encoded.rstrip("=")[(0, 2, 3)[shift] :]
        core = core[: len(core) - (len(core) > MIN_PIECE_CHARS)]
        found |= {core, core.replace("+", "-").replace("/", "_")}
    return found
