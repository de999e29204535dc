"""Read prompt files: JSON lines with `prompt` or `messages`."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from persea.chat.messages import Conversation, Message, Role, Text
from persea.data.prompts import MalformedLine, Prompt
from persea.errors import DataError

MAX_LINE_BYTES = 16 << 20  # a longer line is a damaged file, not a prompt
MALFORMED_PREFIX_BYTES = 200  # enough to recognise a malformed line; the file has the rest
MAX_MALFORMED_REASON_CHARS = 300
ROW_REMEDY = 'a line is {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'


def read_prompts(
    path: Path,
    skill: str,
    language: str,
    on_malformed: Callable[[MalformedLine], None] | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[Prompt]:
    r"""Read the prompts of a .jsonl file.

    A line is {"prompt": "...", "answer": "..."} or {"messages": [{"role", "content"}, ...]}, with
    optional "id", "skill" and "language". The answer, or the last assistant message, becomes
    `Prompt.answer`; capture scores it with `capture.answers: given` and ignores it otherwise.

    Args:
        path: The file.
        skill: Skill of lines that name none.
        language: Language of lines that name none.
        on_malformed: Receives each line that is not a prompt; None = raise instead.
        max_line_bytes: Longest line, in bytes; a longer one is malformed.

    Yields:
        Prompts in the order of the file. Empty lines are skipped.

    Raises:
        DataError: The file cannot be read, or a line is malformed and `on_malformed` is None.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "prompts.jsonl"
        >>> _ = path.write_text('{"prompt": "2 + 2?", "answer": "4"}\n')
        >>> [(p.conversation.messages[-1].text, p.answer) for p in read_prompts(path, "sums", "en")]
        [('2 + 2?', '4')]
    """

    def parse(row: Any, where: str, line_id: str) -> Prompt:
        return _parse_row(row, where, line_id, skill, language)

    yield from iter_json_lines(path, parse, on_malformed, max_line_bytes)


Row = TypeVar("Row")


def iter_json_lines(
    path: Path,
    parse: Callable[[Any, str, str], Row],
    on_malformed: Callable[[MalformedLine], None] | None,
    max_line_bytes: int,
) -> Iterator[Row]:
    """Parse every line of a .jsonl file that is not empty.

    Args:
        path: The file.
        parse: (JSON value, place for messages, name "file:line") -> what the line holds. It raises
            DataError for a malformed line.
        on_malformed: Receives each malformed line; None = raise instead.
        max_line_bytes: Longest line, in bytes.

    Raises:
        DataError: The file cannot be read, or a line is malformed and `on_malformed` is None.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read prompts: {error.strerror}",
            where=str(path),
            remedy="check `corpus:` in the recipe",
        ) from error
    for number, line in enumerate(data.split(b"\n"), start=1):
        if len(line) <= max_line_bytes and not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            parsed = parse(_parse_json(line, where, max_line_bytes), where, f"{path.name}:{number}")
        except DataError as error:
            if on_malformed is None:
                raise
            prefix = line[:MALFORMED_PREFIX_BYTES].decode(errors="backslashreplace")
            reason = error.message[:MAX_MALFORMED_REASON_CHARS]
            on_malformed(MalformedLine(error.where, reason, len(line), prefix))
        else:
            yield parsed


def _parse_json(line: bytes, where: str, max_line_bytes: int) -> Any:
    if len(line) > max_line_bytes:
        raise DataError(
            f"a line of {len(line):,} bytes",
            where=where,
            remedy=f"a prompt has at most {max_line_bytes:,}; raise `max_line_bytes:` of its part "
            "of the corpus for a longer one",
        )
    try:
        row = json.loads(line)
        # half a surrogate pair ("\\ud83d") is valid JSON, but cannot be encoded as bytes
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"not JSON: {error}",
            where=where,
            remedy="one JSON object a line; correct or delete the line",
        ) from error
    return row


def _parse_row(row: Any, where: str, fallback_id: str, skill: str, language: str) -> Prompt:
    if not isinstance(row, dict) or not ({"prompt", "messages"} & row.keys()):
        raise DataError("neither `prompt` nor `messages`", where=where, remedy=ROW_REMEDY)
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise DataError("`prompt` is not a text", where=where, remedy=ROW_REMEDY)
        conversation, answer = Conversation.from_question(row["prompt"]), row.get("answer", "")
        if not isinstance(answer, str):
            raise DataError("`answer` is not a text", where=where, remedy=ROW_REMEDY)
    else:
        conversation, answer = _parse_messages(row["messages"], where)

    def value(key: str, default: str) -> str:
        # exports write null for a missing value
        return default if row.get(key) is None else str(row[key])

    return Prompt(
        value("id", fallback_id),
        conversation,
        value("skill", skill),
        value("language", language),
        unicodedata.normalize("NFC", answer),
    )


def _parse_messages(rows: Any, where: str) -> tuple[Conversation, str]:
    messages: list[Message] = []
    for row in rows if isinstance(rows, list) else []:
        role, content = (
            (row.get("role"), row.get("content")) if isinstance(row, dict) else (None, None)
        )
        if role not in (Role.SYSTEM, Role.USER, Role.ASSISTANT) or not isinstance(content, str):
            raise DataError(
                f"message {len(messages) + 1} has role {role!r} and content "
                f"{type(content).__name__}",
                where=where,
                remedy=ROW_REMEDY,
            )
        messages.append(Message(Role(role), (Text(unicodedata.normalize("NFC", content)),)))
    answer = messages.pop().text if messages and messages[-1].role is Role.ASSISTANT else ""
    if not messages or messages[-1].role is not Role.USER:
        raise DataError("the messages hold no user turn to answer", where=where, remedy=ROW_REMEDY)
    return Conversation(tuple(messages)), answer
