"""Read text files: one text a line, or documents of JSON lines and whole files."""

from __future__ import annotations

import codecs
import json
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from persea.data.formats import MAX_LINE_BYTES, MAX_MALFORMED_REASON_CHARS
from persea.data.prompts import MalformedLine
from persea.data.tables import TableRow, iter_table
from persea.errors import DataError
from persea.storage import read_input_bytes

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
        raw = read_input_bytes(Path(name)).removeprefix(codecs.BOM_UTF8)
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
    source: Path | Iterable[TableRow],
    column: str = DEFAULT_TEXT_COLUMN,
    on_malformed: Callable[[MalformedLine], None] | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[tuple[str, str]]:
    r"""Read the documents of a file.

    A table has one document a row, under `column`; a line of JSON lines may also be a bare JSON
    string. A .txt file is one document.

    Args:
        source: A table or a folder, see persea.data.tables, rows, or a .txt file in UTF-8.
        column: Column of the text.
        on_malformed: Receives each row that is no document; None = raise instead.
        max_line_bytes: Longest line of JSON lines, in bytes; a longer one is malformed.

    Yields:
        (name of the document: file and line, text in NFC). Texts may be empty.

    Raises:
        DataError: The file cannot be read, or a row is malformed and `on_malformed` is None.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "news.jsonl"
        >>> _ = path.write_text('{"text": "Selamat pagi."}\n"Apa kabar?"\n')
        >>> list(read_documents(path))
        [('news.jsonl:1', 'Selamat pagi.'), ('news.jsonl:2', 'Apa kabar?')]
    """
    if isinstance(source, Path) and source.suffix == ".txt":
        yield source.name, _read_text_file(source)
        return
    remedy = f"a row has a text under {column!r}; name another column with `column:`"
    rows = iter_table(source, max_line_bytes) if isinstance(source, Path) else source
    for row in rows:
        text = row.value.get(column) if isinstance(row.value, dict) else row.value
        if not row.error and isinstance(text, str):
            yield row.name, unicodedata.normalize("NFC", text)
            continue
        reason = row.error or f"no text under {column!r}"
        if on_malformed is None:
            raise DataError(reason, where=row.where, remedy=remedy)
        else:
            on_malformed(
                MalformedLine(
                    row.where, reason[:MAX_MALFORMED_REASON_CHARS], row.num_bytes, row.prefix
                )
            )


def _read_text_file(path: Path) -> str:
    try:
        raw = read_input_bytes(path).removeprefix(codecs.BOM_UTF8)
        return unicodedata.normalize("NFC", raw.decode())
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
