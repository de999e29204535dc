"""Read text files, one text a line, from plain text or one key of JSON lines."""

from __future__ import annotations

import codecs
import json
import sys
import unicodedata
from itertools import islice
from pathlib import Path

from persea.errors import DataError


def read_text_lines(
    file_ref: str, where: str, max_lines: int = sys.maxsize
) -> list[tuple[int, str]]:
    """Read the first texts of a file.

    Args:
        file_ref: `FILE`, or `FILE#key` for that key of a JSON object on every line.
        where: Location for error messages.
        max_lines: Number of texts; lines without text do not count.

    Returns:
        (line number from 1, text in NFC) pairs.

    Raises:
        DataError: The file is missing, not UTF-8 or empty, or a line has no text under the key.
    """
    name, _, key = file_ref.partition("#")
    remedy = "give a UTF-8 file, one text a line"
    try:
        raw = Path(name).read_bytes().removeprefix(codecs.BOM_UTF8)
        # str.splitlines would also split at U+2028 and other marks inside a text
        rows = raw.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    except OSError as error:
        raise DataError(f"cannot read the text: {error}", where=where, remedy=remedy) from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"cannot read the text: not UTF-8 at byte {error.start:,}",
            where=f"{where}:{line}",
            remedy=remedy,
        ) from error
    filled = ((number, row) for number, row in enumerate(rows, start=1) if row.strip())
    texts = [
        (n, unicodedata.normalize("NFC", _text_of_row(row, key, f"{where}:{n}")))
        for n, row in islice(filled, max_lines)
    ]
    if not texts:
        raise DataError("no line with a text", where=where, remedy=remedy)
    return texts


def _text_of_row(row: str, key: str, where: str) -> str:
    """Return the row, or the text under a key of its JSON object."""
    if not key:
        return row
    try:
        value = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise DataError(
            "not a JSON object", where=where, remedy="leave out the `#key` to take the line itself"
        ) from error
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        raise DataError(
            f"no text under {key!r}",
            where=where,
            remedy="name a key that holds a text on every line, after `#`",
        )
    text: str = value[key]
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise DataError(
            "half a surrogate pair has no bytes",
            where=where,
            remedy="the text was cut inside a character; correct it or leave it out",
        )
    return text
