"""Read text files: one text a line, or documents of JSON lines and whole files."""

from __future__ import annotations

import codecs
import json
import sys
import unicodedata
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from persea.data.formats import MAX_LINE_BYTES, iter_json_lines
from persea.data.prompts import MalformedLine
from persea.errors import DataError

DEFAULT_TEXT_COLUMN = "text"


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


def read_documents(
    path: Path,
    column: str = DEFAULT_TEXT_COLUMN,
    on_malformed: Callable[[MalformedLine], None] | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[tuple[str, str]]:
    r"""Read the documents of a file.

    A .jsonl file has one document a line: an object with the text under `column`, or a bare JSON
    string. Any other file is one document.

    Args:
        path: The file, UTF-8.
        column: Key of the text in an object.
        on_malformed: Receives each line that is no document; None = raise instead.
        max_line_bytes: Longest line of a .jsonl file, in bytes; a longer one is malformed.

    Yields:
        (name of the document: file and line, text in NFC). Texts may be empty.

    Raises:
        DataError: The file cannot be read, or a line is malformed and `on_malformed` is None.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "news.jsonl"
        >>> _ = path.write_text('{"text": "Selamat pagi."}\n"Apa kabar?"\n')
        >>> list(read_documents(path))
        [('news.jsonl:1', 'Selamat pagi.'), ('news.jsonl:2', 'Apa kabar?')]
    """
    if path.suffix == ".jsonl":
        remedy = (
            f'a line is {{"{column}": "..."}} or a text in quotes; name another key with `column:`'
        )

        def parse(row: object, where: str, line_id: str) -> tuple[str, str]:
            text = row.get(column) if isinstance(row, dict) else row
            if not isinstance(text, str):
                raise DataError(f"no text under {column!r}", where=where, remedy=remedy)
            return line_id, unicodedata.normalize("NFC", text)

        yield from iter_json_lines(path, parse, on_malformed, max_line_bytes)
        return
    try:
        raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        yield path.name, unicodedata.normalize("NFC", raw.decode())
    except OSError as error:
        raise DataError(
            f"cannot read the text: {error.strerror}",
            where=str(path),
            remedy="check `corpus:` in the recipe",
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"cannot read the text: not UTF-8 at byte {error.start:,}",
            where=f"{path}:{raw.count(bytes([10]), 0, error.start) + 1}",
            remedy="give a UTF-8 file",
        ) from error


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
