"""Rows of published files, each with its file and line; and what a published set is."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persea.chat.messages import Conversation, Message, Tool
from persea.data.prompts import Prompt
from persea.errors import DataError, MissingRequirementError
from persea.storage import parse_strict_json
from persea.tasks.task import Grade, Split, TaskItem, Verdict

MAX_ANSWER_CHARS = 200_000  # characters of an answer; a longer one is a model that cannot stop, and no grader's time is given to it
HUB_PREFIX = "hub:"


@dataclass(frozen=True)
class BenchmarkSource:
    """Where a set's questions are.

    file      a local file in the form it was published in; or "hub:OWNER/NAME", read through `datasets`
    answers   the file of the answers, where they are published apart
    language  of the questions' answers; "" = the set's own
    config, split  of a hub set
    """

    file: str
    answers: str = ""
    language: str = ""
    config: str = ""
    split: str = "test"


@dataclass(frozen=True)
class BenchmarkRow:
    """where = file:line, or what comes nearest; number counts from 0."""

    location: str
    index: int
    fields: Mapping[str, Any]

    def text(self, key: str) -> str:
        """A field that must be a text and not empty, NFC."""
        value = self.fields.get(key)
        if not isinstance(value, str) or not value.strip():
            raise self.data_error(
                f"`{key}` is {'missing' if value is None else 'empty' if value == '' else 'not a text'}"
            )
        return unicodedata.normalize("NFC", value.strip())

    def value(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """A field that must be of a kind."""
        value = self.fields.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.data_error(
                f"`{key}` is {'missing' if value is None else f'a {type(value).__name__}'}"
            )
        return value

    def data_error(self, what: str) -> DataError:
        return DataError(
            what,
            where=self.location,
            remedy="mend or delete the row; docs/sets.md shows the form of each set",
        )


@dataclass(frozen=True)
class BenchmarkItems:
    """A set's questions, and how many were left out for what reason."""

    items: tuple[TaskItem, ...]
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class Benchmark:
    """One published set.

    name      what a recipe calls it
    language  of its answers, where it has one language; "" = the recipe says it
    items     source -> every question that can be graded, in the file's order
    grade     (item, what was said) -> how good that is
    needs     modules of extras that grading takes
    runs      whether answers are run, in the sandbox
    skill     what its skill is called where the recipe does not say: the name, unless it is about safety
    """

    name: str
    language: str
    load_items: Callable[[BenchmarkSource], BenchmarkItems]
    grade: Callable[[TaskItem, Message], Grade]
    required_modules: tuple[str, ...] = ()
    runs_code: bool = False
    skill: str = ""

    def grade_answer(self, item: TaskItem, answer: Message) -> Grade:
        """`grade`, but for what is too long to be an answer."""
        length = len(answer.text) + len(answer.thinking)
        if length > MAX_ANSWER_CHARS:
            return Grade(Verdict.MALFORMED, 0.0, f"{length:,} characters")
        return self.grade(item, answer)


def require_module(module: str, extra: str, what: str) -> None:
    """Raises EnvironmentLacks (exit 7) where a module of an extra is not installed."""
    if importlib.util.find_spec(module) is None:
        raise MissingRequirementError(
            f"{what} needs {module}, which is not installed",
            where=what,
            remedy=f"pip install 'persea[{extra}]'",
        )


def benchmark_item(
    name: str,
    row: BenchmarkRow,
    language: str,
    question: str,
    reference: str = "",
    *,
    answer_key: str = "",
    choices: tuple[str, ...] = (),
    tools: tuple[Tool, ...] = (),
    **more: Any,
) -> TaskItem:
    """A question of a set. Its id tells the set, the language and the row."""
    asked = Conversation.from_question(question)
    asked = Conversation(asked.messages, asked.effort, tools)
    return TaskItem(
        Prompt(f"{name}/{language}/{row.fields.get('id', row.index)}", asked, name, language),
        unicodedata.normalize("NFC", reference),
        choices=choices,
        answer_key=answer_key,
        **more,
    )


def binary_grade(is_right: bool, reason: str = "") -> Grade:
    return Grade(Verdict.RIGHT if is_right else Verdict.WRONG, float(is_right), reason)


def malformed_grade(reason: str) -> Grade:
    return Grade(Verdict.MALFORMED, 0.0, reason)


def select_split(
    items: Sequence[TaskItem], split: Split, n: int, seed: int
) -> tuple[TaskItem, ...]:
    """At most n items of a split, in an order of the seed. A quarter is AUDITION, the rest TEST, for ever, by set and row.

    The same row in another language is in the same split and stands beside it, so that languages stay even and nothing is auditioned
    in one language that is tested in another. Nothing of a published set is taught.
    """

    def hashed(word: object, i: TaskItem) -> bytes:
        name, _, row = i.prompt.id.split("/", 2)
        return hashlib.sha256(f"{word} {name}/{row}".encode()).digest()

    wanted = {Split.AUDITION: True, Split.TEST: False}.get(split)
    mine = [i for i in items if (hashed("split", i)[0] < 64) is wanted]
    return tuple(sorted(mine, key=lambda i: (hashed(seed, i), i.prompt.id))[:n])


# --- files ---


def read_text(path: str) -> str:
    """A file's text. DataError where it cannot be read or is not UTF-8."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read the set: {error.strerror}",
            where=path,
            remedy="check `evaluation.sets:` in the recipe",
        ) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"not UTF-8: {error.reason}", where=f"{path}:{line}", remedy="save the file as UTF-8"
        ) from error


def load_json(text: str, where: str) -> Any:
    """JSON, with the line of what is wrong with it. NaN and Infinity are no JSON."""
    try:
        return parse_strict_json(text)
    except (ValueError, RecursionError) as error:
        at = (
            f":{error.lineno}"
            if isinstance(error, json.JSONDecodeError) and ":" not in where[-8:]
            else ""
        )
        raise DataError(
            f"not JSON: {error}", where=f"{where}{at}", remedy="mend the file, or fetch it again"
        ) from error


def read_json_lines(path: str) -> Iterator[BenchmarkRow]:
    """One JSON object a line; empty lines are none."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            fields = load_json(line, f"{path}:{number}")
            if not isinstance(fields, dict):
                raise DataError(
                    "not a JSON object", where=f"{path}:{number}", remedy="one object a line"
                )
            yield BenchmarkRow(f"{path}:{number}", number - 1, fields)


def read_json_list(path: str, key: str = "") -> Iterator[BenchmarkRow]:
    """The objects of a JSON list, the whole file or under a key."""
    found = load_json(read_text(path), path)
    rows = found.get(key) if key and isinstance(found, dict) else found
    if not isinstance(rows, list):
        raise DataError(
            f"no list{f' under `{key}`' if key else ''}",
            where=path,
            remedy="fetch the file again; docs/sets.md shows its form",
        )
    for number, fields in enumerate(rows):
        if not isinstance(fields, dict):
            raise DataError(
                "not a JSON object",
                where=f"{path}, entry {number + 1}",
                remedy="mend or delete the entry",
            )
        yield BenchmarkRow(f"{path}, entry {number + 1}", number, fields)


def read_delimited(
    path: str, delimiter: str, columns: Sequence[str] = ()
) -> Iterator[BenchmarkRow]:
    """Rows of a .csv or .tsv by column; without a head where the columns are given, then unquoted. Each row has every column."""
    text = read_text(path)
    file = io.StringIO(text, newline="")
    reader = csv.reader(
        file,
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if columns else csv.QUOTE_MINIMAL,
        strict=True,
    )
    try:
        cells_of = _read_cells(reader, len(text))
    except csv.Error as error:
        raise DataError(
            f"not a table: {error}",
            where=f"{path}:{reader.line_num}",
            remedy="mend the file, or fetch it again",
        ) from error
    head = list(columns) or (cells_of.pop(0)[1] if cells_of else [])
    for number, (line, cells) in enumerate(cells_of):
        where = f"{path}:{line}"
        if not cells:
            continue
        if len(cells) != len(head):
            raise DataError(
                f"{len(cells)} columns, not {len(head)} ({', '.join(head)})",
                where=where,
                remedy="mend or delete the row",
            )
        yield BenchmarkRow(where, number, dict(zip(head, cells, strict=True)))


def _read_cells(reader: Any, max_cell_chars: int) -> list[tuple[int, list[str]]]:
    """(line, cells) of all rows. At once, because the longest cell that csv takes is a setting of the whole process."""
    before = csv.field_size_limit(max_cell_chars + 1)
    try:
        return [(reader.line_num, cells) for cells in reader]
    finally:
        csv.field_size_limit(before)


def read_benchmark_rows(
    source: BenchmarkSource, read_local: Callable[[str], Iterator[BenchmarkRow]]
) -> Iterator[BenchmarkRow]:
    """A local file's rows in the set's form, or a hub set's through `datasets`."""
    if not source.file.startswith(HUB_PREFIX):
        yield from read_local(source.file)
        return
    from datasets import load_dataset

    name = source.file.removeprefix(HUB_PREFIX)
    try:
        found = load_dataset(name, source.config or None, split=source.split)
    except Exception as error:  # whatever the hub, the network or the builder raises
        raise DataError(
            f"cannot load the set: {type(error).__name__}: {error}"[:400],
            where=name,
            remedy="check name, config and split; or download the file and name it",
        ) from error
    for number, fields in enumerate(found):
        yield BenchmarkRow(f"{name}[{source.split}] row {number}", number, fields)


def collect_items(
    items_or_reasons: Iterable[TaskItem | str], source: BenchmarkSource
) -> BenchmarkItems:
    """All items; in an item's stead stands the reason why it is left out. DataError for a set without any, or with two of one id."""
    items: list[TaskItem] = []
    left_out = Counter[str]()
    for one in items_or_reasons:
        if isinstance(one, str):
            left_out[one] += 1
        else:
            items.append(one)
    if not items:
        raise DataError(
            f"the set holds no question{' that can be graded: ' if left_out else ''}{', '.join(left_out)}",
            where=source.file,
            remedy="fetch the file again",
        )
    twice = [i for i, n in Counter(i.prompt.id for i in items).items() if n > 1]
    if twice:
        raise DataError(
            f"two questions have the id {twice[0]}",
            where=source.file,
            remedy="give each row an id of its own",
        )
    return BenchmarkItems(tuple(items), dict(left_out))
