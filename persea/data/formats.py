"""Read prompts from tables of any shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from persea.chat.messages import ContentPart, Conversation, Text
from persea.data.prompts import MalformedLine, Prompt
from persea.data.rows import parse_row
from persea.data.tables import TableRow, iter_table
from persea.errors import DataError

MAX_LINE_BYTES = 16 << 20  # a longer line is a damaged file, not a prompt
MAX_MALFORMED_REASON_CHARS = 300


@dataclass
class ReadReport:
    """What a reader found in a file.

    Attributes:
        num_rows: Rows that were read, those that were left out among them.
        shapes: Shape -> rows of it, see persea.data.rows.
        unread_keys: Column that changes nothing and was not read -> rows that have it.
        left_out: Why rows are not learned -> how many.
        num_turns: Turns of the assistant, or questions, that were taken.
    """

    num_rows: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    unread_keys: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    num_turns: int = 0

    def notes(self) -> list[str]:
        """Return what people should know: nothing about plain prompts."""
        notes = [f"{n:,} rows left out: {reason}" for reason, n in sorted(self.left_out.items())]
        if n := self.shapes["preference"]:
            notes.append(f"the chosen answer of {n:,} preference pairs is taken")
        if self.unread_keys:
            names = ", ".join(f"`{k}`" for k in sorted(self.unread_keys))
            notes.append(f"columns that change nothing, and were not read: {names}")
        return notes


def read_prompts(
    source: Path | Iterable[TableRow],
    skill: str,
    language: str,
    on_malformed: Callable[[MalformedLine], None] | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
    *,
    columns: Mapping[str, str] | None = None,
    learn_turns: str = "last",
    report: ReadReport | None = None,
) -> Iterator[Prompt]:
    r"""Read the prompts of a table.

    Rows have any shape of persea.data.rows, with optional "id", "skill" and "language". The last
    answer becomes the prompt's own; capture scores it with `capture.answers: given` and ignores it
    otherwise.

    Args:
        source: A table or a folder, see persea.data.tables, or rows.
        skill: Skill of rows that name none.
        language: Language of rows that name none.
        on_malformed: Receives each row that is not a prompt; None = raise instead.
        max_line_bytes: Longest line of JSON lines, in bytes; a longer one is malformed.
        columns: Name as persea reads it -> column of the file.
        learn_turns: "last", or "all" for a prompt at every turn of the assistant.
        report: Receives what was found.

    Yields:
        Prompts in the order of the file. Empty lines are skipped.

    Raises:
        DataError: The file cannot be read, or a row is malformed and `on_malformed` is None.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "prompts.jsonl"
        >>> _ = path.write_text('{"prompt": "2 + 2?", "answer": "4"}\n')
        >>> [(p.conversation.messages[-1].text, p.answer) for p in read_prompts(path, "sums", "en")]
        [('2 + 2?', '4')]
    """
    found = report or ReadReport()
    rows = iter_table(source, max_line_bytes) if isinstance(source, Path) else source
    for row in rows:
        try:
            if row.error:
                raise DataError(row.error, where=row.where, remedy=_row_remedy(max_line_bytes))
            parsed = parse_row(row.value, row.where, columns)
            turns = parsed.turns(last_only=learn_turns == "last")
        except DataError as error:
            if on_malformed is None:
                raise
            reason = error.message[:MAX_MALFORMED_REASON_CHARS]
            on_malformed(MalformedLine(error.where, reason, row.num_bytes, row.prefix))
            continue
        found.num_rows += 1
        found.shapes[parsed.shape] += 1
        found.unread_keys.update(parsed.unread_keys)
        if parsed.left_out:
            found.left_out[parsed.left_out] += 1
            continue
        found.num_turns += len(turns)
        yield from _prompts_of_row(row, turns, skill, language, columns or {})


def _prompts_of_row(
    row: TableRow,
    turns: Sequence[tuple[Conversation, tuple[ContentPart, ...]]],
    skill: str,
    language: str,
    columns: Mapping[str, str],
) -> Iterator[Prompt]:
    """Yield a prompt for each turn; the turns of one row are numbered."""

    def value(key: str, default: str) -> str:
        # exports write null for a missing value
        found = row.value.get(columns.get(key, key))
        return default if found is None else str(found)

    for number, (conversation, answer) in enumerate(turns, start=1):
        is_text = all(isinstance(part, Text) for part in answer)
        yield Prompt(
            value("id", row.name) + (f" turn {number}" if len(turns) > 1 else ""),
            conversation,
            value("skill", skill),
            value("language", language),
            "".join(part.text for part in answer if isinstance(part, Text)),
            answer_parts=() if is_text else answer,
        )


def _row_remedy(max_line_bytes: int) -> str:
    return (
        f"one JSON object a line, of at most {max_line_bytes:,} bytes (`max_line_bytes:`); correct "
        "or delete the row, or set it aside with `on_malformed: quarantine`"
    )
