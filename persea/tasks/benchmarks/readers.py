"""Read the rows of published files. Each row knows its file and line, which every error names."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persea.chat.messages import Conversation, Message, Tool, ToolCall
from persea.data.prompts import Prompt
from persea.errors import DataError
from persea.storage import parse_strict_json, read_input_bytes
from persea.tasks.benchmarks.benchmark import BenchmarkItems, BenchmarkSource
from persea.tasks.task import TaskItem

HUB_PREFIX = "hub:"


@dataclass(frozen=True)
class BenchmarkRow:
    """One row of a benchmark.

    Attributes:
        location: "file:line", or the closest equivalent of the format.
        index: Position in the file, from 0.
        fields: Column or key -> value.
    """

    location: str
    index: int
    fields: Mapping[str, Any]

    def text(self, key: str) -> str:
        """Return a field as trimmed NFC text.

        Raises:
            DataError: If the field is missing, no text or empty.
        """
        value = self.fields.get(key)
        if not isinstance(value, str) or not value.strip():
            problem = "missing" if value is None else "empty" if value == "" else "not a text"
            raise self.data_error(f"`{key}` is {problem}")
        return unicodedata.normalize("NFC", value.strip())

    def value(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """Return a field of a type; a boolean does not count as a number.

        Raises:
            DataError: If the field is missing or of another type.
        """
        value = self.fields.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            problem = "missing" if value is None else f"a {type(value).__name__}"
            raise self.data_error(f"`{key}` is {problem}")
        return value

    def data_error(self, message: str) -> DataError:
        """Return an error that names the row's file and line."""
        return DataError(
            message,
            where=self.location,
            remedy="correct or delete the row; docs/sets.md shows the format of each benchmark",
        )


def benchmark_item(
    name: str,
    row: BenchmarkRow,
    language: str,
    question: str,
    reference: str = "",
    *,
    before: tuple[Message, ...] = (),
    answer_key: str = "",
    choices: tuple[str, ...] = (),
    tools: tuple[Tool, ...] = (),
    calls: tuple[ToolCall, ...] = (),
) -> TaskItem:
    """Make the item of a row. Its id is "benchmark/language/row".

    Args:
        name: Name of the benchmark.
        row: The row; its field `id` names it, or else its index.
        language: Language of the answer.
        question: Text of the user's message.
        reference: Text of the right answer.
        before: Messages before the user's.
        answer_key: Data for the grader.
        choices: Answers to rank by likelihood.
        tools: Tools that the question declares.
        calls: Tool calls of the right answer.

    Returns:
        The item, its reference in NFC.
    """
    conversation = Conversation.from_question(question)
    conversation = Conversation((*before, *conversation.messages), conversation.effort, tools)
    item_id = f"{name}/{language}/{row.fields.get('id', row.index)}"
    return TaskItem(
        Prompt(item_id, conversation, name, language),
        unicodedata.normalize("NFC", reference),
        calls=calls,
        choices=choices,
        answer_key=answer_key,
    )


def read_text(path: str) -> str:
    """Read a UTF-8 file.

    Raises:
        DataError: If the file cannot be read or is not UTF-8; the message names the line.
    """
    try:
        data = read_input_bytes(Path(path))
    except OSError as error:
        raise DataError(
            f"cannot read the benchmark: {error.strerror}",
            where=path,
            remedy="check `evaluation.benchmarks:` in the recipe",
        ) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"not UTF-8: {error.reason}", where=f"{path}:{line}", remedy="save the file as UTF-8"
        ) from error


def load_json(text: str, where: str) -> Any:
    """Parse strict JSON: NaN and Infinity are refused.

    Args:
        text: The JSON text.
        where: File, or file and line, for the message.

    Returns:
        The value.

    Raises:
        DataError: If the text is no JSON; the message names the line.
    """
    try:
        return parse_strict_json(text)
    except (ValueError, RecursionError) as error:
        has_line = ":" in where[-8:]
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(
            f"not JSON: {error}",
            where=where if has_line else f"{where}{line}",
            remedy="correct the file, or download it again",
        ) from error


def read_json_lines(path: str) -> Iterator[BenchmarkRow]:
    """Yield the rows of a file with one JSON object per line; empty lines are skipped.

    Raises:
        DataError: If a line is no JSON object.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            fields = load_json(line, f"{path}:{number}")
            if not isinstance(fields, dict):
                raise DataError(
                    "not a JSON object", where=f"{path}:{number}", remedy="one object per line"
                )
            yield BenchmarkRow(f"{path}:{number}", number - 1, fields)


def read_json_list(path: str, key: str = "") -> Iterator[BenchmarkRow]:
    """Yield the rows of a JSON list, which is the whole file or the value of a key.

    Raises:
        DataError: If there is no list, or an entry is no JSON object.
    """
    found = load_json(read_text(path), path)
    rows = found.get(key) if key and isinstance(found, dict) else found
    if not isinstance(rows, list):
        raise DataError(
            f"no list{f' under `{key}`' if key else ''}",
            where=path,
            remedy="download the file again; docs/sets.md shows its format",
        )
    for number, fields in enumerate(rows):
        where = f"{path}, entry {number + 1}"
        if not isinstance(fields, dict):
            raise DataError("not a JSON object", where=where, remedy="correct or delete the entry")
        yield BenchmarkRow(where, number, fields)


def read_delimited(
    path: str, delimiter: str, columns: Sequence[str] = ()
) -> Iterator[BenchmarkRow]:
    """Yield the rows of a .csv or .tsv file.

    Args:
        path: The file.
        delimiter: The character between cells.
        columns: Names of the columns of a file without a header, whose cells are not quoted. Empty
            = the first row is the header.

    Yields:
        Rows that have every column.

    Raises:
        DataError: If a row cannot be parsed or has another number of columns.
    """
    text = read_text(path)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if columns else csv.QUOTE_MINIMAL,
        strict=True,
    )
    try:
        rows = _read_cells(reader, len(text))
    except csv.Error as error:
        raise DataError(
            f"not a table: {error}",
            where=f"{path}:{reader.line_num}",
            remedy="correct the file, or download it again",
        ) from error
    header = list(columns) or (rows.pop(0)[1] if rows else [])
    for number, (line, cells) in enumerate(rows):
        where = f"{path}:{line}"
        if not cells:
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{len(cells)} columns, not {len(header)} ({', '.join(header)})",
                where=where,
                remedy="correct or delete the row",
            )
        yield BenchmarkRow(where, number, dict(zip(header, cells, strict=True)))


def _read_cells(reader: Any, max_cell_chars: int) -> list[tuple[int, list[str]]]:
    """Read (line, cells) of all rows at once: the limit of a cell's length is a setting of the
    whole process.
    """
    before = csv.field_size_limit(max_cell_chars + 1)
    try:
        return [(reader.line_num, cells) for cells in reader]
    finally:
        csv.field_size_limit(before)


def read_benchmark_rows(
    source: BenchmarkSource, read_local: Callable[[str], Iterator[BenchmarkRow]]
) -> Iterator[BenchmarkRow]:
    """Yield the rows of a local file, or of a hub dataset through `datasets`.

    Args:
        source: Location of the questions.
        read_local: Reads a local file in the benchmark's format.

    Yields:
        Rows in the order of the file.

    Raises:
        DataError: If the file or the dataset cannot be read.
    """
    if not source.file.startswith(HUB_PREFIX):
        yield from read_local(source.file)
        return
    from datasets import load_dataset

    name = source.file.removeprefix(HUB_PREFIX)
    try:
        rows = iter(enumerate(load_dataset(name, source.config or None, split=source.split)))
    except Exception as error:  # any error of the hub, the network or the builder
        raise _hub_error(name, error) from error
    while True:
        try:
            number, fields = next(rows)
        except StopIteration:
            return
        except Exception as error:  # a broken shard shows only when it is read
            raise _hub_error(name, error) from error
        yield BenchmarkRow(f"{name}[{source.split}] row {number}", number, fields)


def _hub_error(name: str, error: Exception) -> DataError:
    return DataError(
        f"cannot load the benchmark: {type(error).__name__}: {error}"[:400],
        where=name,
        remedy="check name, config and split; or download the file and give its path",
    )


def collect_items(
    items_or_reasons: Iterable[TaskItem | str], source: BenchmarkSource
) -> BenchmarkItems:
    """Collect items, and count the reasons that are given in place of items that are left out.

    Args:
        items_or_reasons: Items; a text is the reason why a row is left out.
        source: Location of the questions, for the message.

    Returns:
        The items and the counts.

    Raises:
        DataError: If no item is left, or two items have one id.
    """
    items: list[TaskItem] = []
    left_out = Counter[str]()
    for one in items_or_reasons:
        if isinstance(one, str):
            left_out[one] += 1
        else:
            items.append(one)
    if not items:
        reasons = f" that can be graded: {', '.join(left_out)}" if left_out else ""
        raise DataError(
            f"the benchmark holds no question{reasons}",
            where=source.file,
            remedy="download the file again",
        )
    twice = [i for i, n in Counter(i.prompt.id for i in items).items() if n > 1]
    if twice:
        raise DataError(
            f"two questions have the id {twice[0]}",
            where=source.file,
            remedy="give each row an id of its own",
        )
    return BenchmarkItems(tuple(items), dict(left_out))
