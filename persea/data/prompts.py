"""Prompt: what to ask, tagged with skill and language; what repeats another prompt or holds a test item is removed, kept aside with the reason."""

from __future__ import annotations

import json
import unicodedata
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from persea.chat.messages import Conversation, Effort, Message, Role, Text
from persea.data.dedup import HeldOut, Near, folded
from persea.errors import DataError

GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, fill [0, 1) evenly in every stretch
SILVER = 0.41421356237309515  # so do these, and the pairs of both the square: who is asked and how long to think stay independent
MAX_LINE = 16 << 20  # bytes; a longer row is a broken file, not a prompt
BEGINS = 200  # bytes of a broken line that are kept to recognise it by; the file has the rest


@dataclass(frozen=True)
class Prompt:
    """id is unique within a corpus; `conversation` ends with the user's turn; `answer` is the source's own, where it has one.

    effort  the mode it is asked in, and learned in; None = the teacher's own effort, and the student learns to answer at once
    """

    id: str
    conversation: Conversation
    skill: str
    language: str
    answer: str = ""
    effort: Effort | None = None


Choice = TypeVar("Choice")


def in_turn(shares: Sequence[tuple[Choice, float]], number: int, step: float) -> Choice:
    """Which of several has the number-th turn: shares, which sum to 1, hold in every stretch of numbers, without chance."""
    choices, parts = zip(*shares, strict=True)
    found: Choice = choices[min(len(choices) - 1, bisect(list(accumulate(parts)), (number + 1) * step % 1))]
    return found


def in_modes(prompts: Iterable[Prompt], modes: Mapping[Effort, float]) -> list[Prompt]:
    """Prompts with the effort each is asked at, by the modes' shares, however these are ordered; without modes, as they are."""
    shares = [(effort, modes[effort]) for effort in Effort if effort in modes]
    return [replace(p, effort=in_turn(shares, k, SILVER)) if shares else p for k, p in enumerate(prompts)]


class Why(StrEnum):
    """Why a prompt was left out."""

    DUPLICATE = "duplicate"
    NEAR = "near-duplicate"
    TEST_ITEM = "test item"
    CONTAMINATED = "holds a test item"
    EMPTY = "empty"


@dataclass(frozen=True)
class Removed:
    """A prompt that is not asked: `of` is the prompt it repeats, or the test item it is or holds."""

    prompt: Prompt
    why: Why
    of: str = ""

    def to_json(self) -> dict[str, Any]:
        p = self.prompt
        return {"id": p.id, "why": self.why, "of": self.of, "skill": p.skill, "language": p.language, "conversation": p.conversation.to_json(),
                "answer": p.answer}


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
    removed: tuple[Removed, ...]
    broken: tuple[Broken, ...] = ()

    @property
    def came(self) -> int:
        return len(self.prompts) + len(self.removed) + len(self.broken)


def gather(sources: Iterable[Iterable[Prompt]], held_out: Iterable[Prompt], near: Sequence[float | None] = ()) -> Corpus:
    """All prompts of all sources, in order, without duplicates and without anything the student is tested on.

    Two prompts are the same when their texts and tools are, after NFC, case folding and white-space folding. A prompt holds a test item where it, or
    its answer, shares 13 words on end with one (hygiene.HeldOut).

    near  for each source, the share of common word runs from which a prompt repeats another of such sources; None, or no entry = not looked for
    """
    tested = HeldOut((p.id, _text(p.conversation)) for p in held_out)
    seen: dict[str, str] = {}
    alike = Near()
    kept: list[Prompt] = []
    removed: list[Removed] = []
    for k, source in enumerate(sources):
        share = near[k] if k < len(near) else None
        for prompt in source:
            text = _text(prompt.conversation)
            key = folded(text)
            if not key:
                removed.append(Removed(prompt, Why.EMPTY))
            elif of := tested.same(text):
                removed.append(Removed(prompt, Why.TEST_ITEM, of))
            elif key in seen:
                removed.append(Removed(prompt, Why.DUPLICATE, seen[key]))
            elif of := tested.shared(text) or tested.shared(prompt.answer):
                removed.append(Removed(prompt, Why.CONTAMINATED, of))
            elif share is not None and (of := alike.add(prompt.id, text, share)):
                removed.append(Removed(prompt, Why.NEAR, of))
            else:
                seen[key] = prompt.id
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
    def said(key: str, default: str) -> str:
        return default if row.get(key) is None else str(row[key])  # exports fill what is not there with null

    return Prompt(said("id", fallback_id), conversation, said("skill", skill), said("language", language), unicodedata.normalize("NFC", answer))


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


def _text(conversation: Conversation) -> str:
    """What is said, and what tools there are: the same question with other tools is another."""
    return "\n".join([*(p.text for p in conversation.parts()), *(t.name for t in conversation.tools)])
