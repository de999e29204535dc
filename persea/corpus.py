"""Prompt: what to ask, tagged with skill and language; near test items removed, with a record of what went and why."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from persea.chat import Conversation, Message, Role, Text
from persea.errors import DataError

MAX_LINE = 16 << 20  # bytes; a longer row is a broken file, not a prompt
BEGINS = 200  # bytes of a broken line that are kept to recognise it by; the file has the rest


@dataclass(frozen=True)
class Prompt:
    """id is unique within a corpus; `conversation` ends with the user's turn; `answer` is the source's own, where it has one."""

    id: str
    conversation: Conversation
    skill: str
    language: str
    answer: str = ""


class Why(StrEnum):
    """Why a prompt was left out."""

    DUPLICATE = "duplicate"
    TEST_ITEM = "test item"
    EMPTY = "empty"


@dataclass(frozen=True)
class Broken:
    """A line that is no prompt: where it stands (file:line), why, and how it begins."""

    where: str
    why: str
    bytes: int
    begins: str


@dataclass(frozen=True)
class Corpus:
    """What to ask, and what was left out: len(prompts) + len(removed) + len(broken) = everything that came in."""

    prompts: tuple[Prompt, ...]
    removed: tuple[tuple[str, Why], ...]
    broken: tuple[Broken, ...] = ()

    @property
    def came(self) -> int:
        return len(self.prompts) + len(self.removed) + len(self.broken)


def gather(sources: Iterable[Iterable[Prompt]], held_out: Iterable[Prompt]) -> Corpus:
    """All prompts of all sources, in order, without duplicates and without anything the student is tested on.

    Two prompts are the same when their texts and tools are, after NFC, case folding and white-space folding.
    """
    tested = {_key(p.conversation) for p in held_out}
    seen: set[str] = set()
    kept: list[Prompt] = []
    removed: list[tuple[str, Why]] = []
    for source in sources:
        for prompt in source:
            key = _key(prompt.conversation)
            why = Why.EMPTY if not key else Why.TEST_ITEM if key in tested else Why.DUPLICATE if key in seen else None
            if why is not None:
                removed.append((prompt.id, why))
                continue
            seen.add(key)
            kept.append(prompt)
    return Corpus(tuple(kept), tuple(removed))


def read_prompts(path: Path, skill: str, language: str, broken: Callable[[Broken], None] | None = None) -> Iterator[Prompt]:
    """Prompts of a .jsonl file, one object a line: {"prompt": "...", "answer": "..."} or {"messages": [{"role", "content"}, ...]}.

    The answer, or the assistant's turn at the end of `messages`, is kept beside the prompt: it is asked for only where
    the recipe says `capture.answers: given`. Optional "id", "skill", "language".
    A broken line is refused with its number, or handed to `broken`; nothing is skipped in silence.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read prompts: {error.strerror}", where=str(path), remedy="check `corpus:` in the recipe") from error
    for number, line in enumerate(data.split(b"\n"), start=1):
        if len(line) <= MAX_LINE and not line.strip():
            continue
        try:
            prompt = _of_line(line, f"{path}:{number}", f"{path.name}:{number}", skill, language)
        except DataError as error:
            if broken is None:
                raise
            broken(Broken(error.where, error.what[:300], len(line), line[:BEGINS].decode(errors="backslashreplace")))
        else:
            yield prompt


def _of_line(line: bytes, where: str, fallback_id: str, skill: str, language: str) -> Prompt:
    if len(line) > MAX_LINE:
        raise DataError(f"a line of {len(line):,} bytes", where=where, remedy=f"a prompt has at most {MAX_LINE:,}")
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair ("\\ud83d") is JSON, but no text: it has no bytes
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", where=where, remedy="one JSON object a line; mend or delete the line") from error
    return _prompt(row, where, fallback_id, skill, language)


def _prompt(row: Any, where: str, fallback_id: str, skill: str, language: str) -> Prompt:
    remedy = 'a line is {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
    if not isinstance(row, dict) or not ({"prompt", "messages"} & row.keys()):
        raise DataError("neither `prompt` nor `messages`", where=where, remedy=remedy)
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise DataError("`prompt` is not a text", where=where, remedy=remedy)
        conversation, answer = Conversation.ask(row["prompt"]), row.get("answer", "")
        if not isinstance(answer, str):
            raise DataError("`answer` is not a text", where=where, remedy=remedy)
    else:
        conversation, answer = _from_messages(row["messages"], where, remedy)
    return Prompt(str(row.get("id", fallback_id)), conversation, str(row.get("skill", skill)), str(row.get("language", language)),
                  unicodedata.normalize("NFC", answer))


def _from_messages(rows: Any, where: str, remedy: str) -> tuple[Conversation, str]:
    messages: list[Message] = []
    for row in rows if isinstance(rows, list) else []:
        role, content = (row.get("role"), row.get("content")) if isinstance(row, dict) else (None, None)
        if role not in (Role.SYSTEM, Role.USER, Role.ASSISTANT) or not isinstance(content, str):
            raise DataError(f"message {len(messages) + 1} has role {role!r} and content {type(content).__name__}", where=where, remedy=remedy)
        messages.append(Message(Role(role), (Text(unicodedata.normalize("NFC", content)),)))
    answer = messages.pop().text if messages and messages[-1].role is Role.ASSISTANT else ""
    if not messages or messages[-1].role is not Role.USER:
        raise DataError("the messages hold no user turn to answer", where=where, remedy=remedy)
    return Conversation(tuple(messages)), answer


def _key(conversation: Conversation) -> str:
    texts: Sequence[str] = [*(p.text for p in conversation.parts()), *(f"{t.name} {t.parameters}" for t in conversation.tools)]
    return " ".join(unicodedata.normalize("NFC", " ".join(texts)).casefold().split())
