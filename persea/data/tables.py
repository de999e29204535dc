"""Read rows of data sets: JSON lines and arrays, CSV, Parquet, folders of them, and Hugging Face
data sets.

JSON is parsed here, line by line, and not by `datasets`: its reader gives a text of a mixed column
another type ("007" becomes 7).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from persea.errors import DataError, MissingRequirementError
from persea.storage import MAX_INPUT_BYTES, read_input_bytes

TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
MAX_FIELD_BYTES = 16 << 20
PREFIX_BYTES = 200  # enough to recognise a malformed line; the file has the rest


@dataclass(frozen=True)
class TableRow:
    """One row.

    Attributes:
        where: file:line, or file:row for tables without lines.
        name: The same without folders; it names the row's prompt.
        value: The row; an object in most files.
        error: Why the row cannot be read; "" if it can.
        num_bytes: Length of its line; 0 in tables without lines.
        prefix: The beginning of its line.
    """

    where: str
    name: str
    value: Any
    error: str = ""
    num_bytes: int = 0
    prefix: str = ""


def iter_table(path: Path, max_line_bytes: int = MAX_FIELD_BYTES) -> Iterator[TableRow]:
    r"""Yield the rows of a file, or of all tables of a folder in the order of their names.

    Args:
        path: .jsonl, .json (an array), .csv, .tsv or .parquet, .gz behind the first four, a folder
            of them, or a folder that `datasets` saved.
        max_line_bytes: Longest line of JSON lines; a longer one has an error.

    Raises:
        DataError: The file is missing, of another kind, or broken as a whole.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "pairs.csv"
        >>> _ = path.write_text("question,answer\n2 + 2?,4\n")
        >>> [(row.name, row.value) for row in iter_table(path)]
        [('pairs.csv:2', {'question': '2 + 2?', 'answer': '4'})]
    """
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:  # a name of 300 letters
        _refuse(error.strerror or "no such file", path)
    if is_folder:
        yield from _iter_folder(path, max_line_bytes)
        return
    suffixes = [s for s in path.suffixes[-2:] if s]
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else path.suffix
    if not exists:
        _refuse("no such file", path)
    if kind not in TABLE_SUFFIXES:
        _refuse(f"{path.suffix or 'no suffix'} is no table that persea reads", path)
    if not path.is_file():
        _refuse("not a regular file", path)
    if kind == ".parquet":
        yield from _iter_parquet(path)
        return
    data = _read_bytes(path)
    if kind in (".csv", ".tsv"):
        yield from _iter_csv(data, path, "\t" if kind == ".tsv" else ",")
    elif kind == ".json":
        yield from _iter_json_array(data, path, max_line_bytes)
    else:
        yield from _iter_json_lines(data, path, max_line_bytes)


def iter_hub_table(
    name: str, split: str, config: str = "", revision: str = "", *, streaming: bool = False
) -> Iterator[TableRow]:
    """Yield the rows of a data set on the Hugging Face hub.

    Args:
        name: Its id, such as HuggingFaceH4/ultrachat_200k.
        split: Its split.
        config: Its configuration; "" for the only one.
        revision: Branch, tag or commit; "" for the main branch.
        streaming: Read row by row, without downloading the whole split first.

    Raises:
        DataError: There is no such data set, or the hub cannot be reached.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingRequirementError(
            "reading a data set of the hub needs `datasets`",
            where=name,
            remedy="pip install datasets",
        ) from error
    number = -1
    try:
        rows = datasets.load_dataset(
            name, config or None, split=split, revision=revision or None, streaming=streaming
        )
        for number, row in enumerate(rows):
            yield TableRow(f"{name}/{split}:{number}", f"{name}/{split}:{number}", row)
    except (OSError, ValueError, RuntimeError) as error:  # what `datasets` and its hub client raise
        place = f" after row {number}" if number >= 0 else ""
        raise DataError(
            f"the data set cannot be read{place}: {(str(error).splitlines() or [''])[0][:200]}",
            where=f"{name}, {split}",
            remedy="check `hub:`, `split:` and the network; a local copy is read as a folder",
        ) from error


def _iter_folder(folder: Path, max_line_bytes: int) -> Iterator[TableRow]:
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        yield from _iter_saved(folder)
        return
    files = sorted(
        p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".") and _is_table(p)
    )
    if not files:
        _refuse("the folder holds no table", folder)
    for file in files:
        for row in iter_table(file, max_line_bytes):
            relative = file.relative_to(folder)
            yield TableRow(
                row.where,
                f"{relative}{row.name.removeprefix(file.name)}",
                row.value,
                row.error,
                row.num_bytes,
                row.prefix,
            )


def _is_table(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith(TABLE_SUFFIXES)


def _iter_saved(folder: Path) -> Iterator[TableRow]:
    """Yield the rows of a data set that `Dataset.save_to_disk` wrote."""
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        _refuse(f"not a saved data set: {str(error).splitlines()[0][:200]}", folder)
    for number, row in enumerate(rows):
        yield TableRow(f"{folder}:{number}", f"{folder.name}:{number}", row)


def _iter_json_lines(data: bytes, path: Path, max_line_bytes: int) -> Iterator[TableRow]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        if len(line) <= max_line_bytes and not line.strip():
            continue
        value, error = None, ""
        if len(line) > max_line_bytes:
            error = f"a line of {len(line):,} bytes"
        else:
            value, error = parse_json_line(line)
        prefix = line[:PREFIX_BYTES].decode(errors="backslashreplace")
        yield TableRow(f"{path}:{number}", f"{path.name}:{number}", value, error, len(line), prefix)


def parse_json_line(line: bytes) -> tuple[Any, str]:
    """Return (value, "") of a JSON text, or (None, reason)."""
    try:
        value = json.loads(line)
        # half a surrogate pair ("\\ud83d") is valid JSON, but cannot be encoded as bytes
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"
    return value, ""


def _iter_json_array(data: bytes, path: Path, max_line_bytes: int) -> Iterator[TableRow]:
    """Yield the entries of an array; a .json file of JSON lines is read as such."""
    value, error = parse_json_line(data)
    if error:
        if data.lstrip()[:1] == b"{" and b"\n" in data.strip():
            yield from _iter_json_lines(data, path, max_line_bytes)
            return
        _refuse(error, path)
    if isinstance(value, Mapping):  # {"data": [...]} as some exports write it
        lists = [v for v in value.values() if isinstance(v, list)]
        if len(lists) != 1:
            _refuse("a JSON object with no single list of rows", path)
        value = lists[0]
    if not isinstance(value, list):
        _refuse(f"{type(value).__name__} instead of an array of rows", path)
    for number, row in enumerate(value):
        yield TableRow(f"{path}:[{number}]", f"{path.name}:{number}", row)


def _iter_csv(data: bytes, path: Path, delimiter: str) -> Iterator[TableRow]:
    """Yield the rows of a table with a header; an empty field is absent."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        _refuse(
            f"not UTF-8 at byte {error.start:,}",
            path,
            line,
            remedy="save it as UTF-8 (a spreadsheet offers `CSV UTF-8`)",
        )
    header_line = re.split("[\r\n]", text, maxsplit=1)[0]
    if delimiter == "," and "," not in header_line and ";" in header_line:
        delimiter = ";"  # of spreadsheets where the comma is in numbers
    csv.field_size_limit(MAX_FIELD_BYTES)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header) or not all(header):
            _refuse(
                "a column without a name, or two of one name",
                path,
                1,
                remedy="give each column of the first line a name of its own",
            )
        while True:
            number = reader.line_num + 1  # a quoted field may go over several lines
            row = next(reader, None)
            if row is None:
                return
            if not row:
                continue
            reason = "" if len(row) == len(header) else f"{len(row)} fields, {len(header)} columns"
            value = {k: v for k, v in zip(header, row, strict=False) if v != ""}
            yield TableRow(f"{path}:{number}", f"{path.name}:{number}", value, reason)
    except csv.Error as error:
        _refuse(
            f"broken CSV: {error}",
            path,
            reader.line_num,
            remedy='correct the row: a quoted field ends with ", and " inside it is written ""',
        )


def _iter_parquet(path: Path) -> Iterator[TableRow]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield TableRow(f"{path}:{number}", f"{path.name}:{number}", row)
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        _refuse(f"broken Parquet: {str(error).splitlines()[0][:200]}", path)


def _read_bytes(path: Path) -> bytes:
    try:
        data = read_input_bytes(path)
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
                data = packed.read(MAX_INPUT_BYTES + 1)
            if len(data) > MAX_INPUT_BYTES:
                _refuse(f"more than {MAX_INPUT_BYTES:,} bytes when unpacked", path)
    except (OSError, EOFError) as error:
        _refuse(f"cannot be read: {getattr(error, 'strerror', None) or error}", path)
    return data.removeprefix(b"\xef\xbb\xbf")


def _refuse(reason: str, path: Path, line: int = 0, remedy: str = "") -> NoReturn:
    raise DataError(
        reason,
        where=f"{path}:{line}" if line else str(path),
        remedy=remedy or f"give {', '.join(TABLE_SUFFIXES)}, or a folder of them",
    )
