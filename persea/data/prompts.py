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

from persea.chat.messages import Conversation, Message, Role, Text, ThinkingEffort
from persea.data.dedup import HeldOutIndex, NearDuplicateIndex, normalize_text
from persea.errors import DataError

GOLDEN_RATIO_STEP = (
    0.6180339887498949  # multiples of it, modulo 1, fill [0, 1) evenly in every stretch
)
SILVER_RATIO_STEP = 0.41421356237309515  # so do these, and the pairs of both the square: who is asked and how long to think stay independent
MAX_LINE_BYTES = 16 << 20  # bytes; a longer row is a broken file, not a prompt
MALFORMED_PREFIX_BYTES = (
    200  # bytes of a broken line that are kept to recognise it by; the file has the rest
)


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
    effort: ThinkingEffort | None = None


Choice = TypeVar("Choice")


def pick_by_share(shares: Sequence[tuple[Choice, float]], number: int, step: float) -> Choice:
    """Which of several has the number-th turn: shares, which sum to 1, hold in every stretch of numbers, without chance."""
    choices, parts = zip(*shares, strict=True)
    found: Choice = choices[
        min(len(choices) - 1, bisect(list(accumulate(parts)), (number + 1) * step % 1))
    ]
    return found


def assign_efforts(
    prompts: Iterable[Prompt], effort_shares: Mapping[ThinkingEffort, float]
) -> list[Prompt]:
    """Prompts with the effort each is asked at, by the modes' shares, however these are ordered; without modes, as they are."""
    shares = [
        (effort, effort_shares[effort]) for effort in ThinkingEffort if effort in effort_shares
    ]
    return [
        replace(p, effort=pick_by_share(shares, k, SILVER_RATIO_STEP)) if shares else p
        for k, p in enumerate(prompts)
    ]


class RemovalReason(StrEnum):
    """Why a prompt was left out."""

    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near-duplicate"
    TEST_ITEM = "test item"
    CONTAMINATED = "holds a test item"
    EMPTY = "empty"


@dataclass(frozen=True)
class RemovedPrompt:
    """A prompt that is not asked: `of` is the prompt it repeats, or the test item it is or holds."""

    prompt: Prompt
    reason: RemovalReason
    matched_id: str = ""

    def to_json(self) -> dict[str, Any]:
        p = self.prompt
        return {
            "id": p.id,
            "why": self.reason,
            "of": self.matched_id,
            "skill": p.skill,
            "language": p.language,
            "conversation": p.conversation.to_json(),
            "answer": p.answer,
        }


@dataclass(frozen=True)
class MalformedLine:
    """A line that is no prompt: where it stands (file:line), why, and how it begins."""

    location: str
    reason: str
    num_bytes: int
    prefix: str


@dataclass(frozen=True)
class Corpus:
    """What to ask, and what was left out: len(prompts) + len(removed) + len(broken) = everything that came in."""

    prompts: tuple[Prompt, ...]
    removed: tuple[RemovedPrompt, ...]
    malformed: tuple[MalformedLine, ...] = ()

    @property
    def num_inputs(self) -> int:
        return len(self.prompts) + len(self.removed) + len(self.malformed)


def build_corpus(
    sources: Iterable[Iterable[Prompt]],
    held_out: Iterable[Prompt],
    near_duplicate_thresholds: Sequence[float | None] = (),
) -> Corpus:
    """All prompts of all sources, in order, without duplicates and without anything the student is tested on.

    Two prompts are the same when their texts and tools are, after NFC, case folding and white-space folding. A prompt holds a test item where it, or
    its answer, shares 13 words on end with one (hygiene.HeldOut).

    near  for each source, the share of common word runs from which a prompt repeats another of such sources; None, or no entry = not looked for
    """
    tested = HeldOutIndex((p.id, _dedup_text(p.conversation)) for p in held_out)
    seen: dict[str, str] = {}
    alike = NearDuplicateIndex()
    kept: list[Prompt] = []
    removed: list[RemovedPrompt] = []
    for k, source in enumerate(sources):
        share = near_duplicate_thresholds[k] if k < len(near_duplicate_thresholds) else None
        for prompt in source:
            text = _dedup_text(prompt.conversation)
            key = normalize_text(text)
            if not key:
                removed.append(RemovedPrompt(prompt, RemovalReason.EMPTY))
            elif of := tested.find_exact(text):
                removed.append(RemovedPrompt(prompt, RemovalReason.TEST_ITEM, of))
            elif key in seen:
                removed.append(RemovedPrompt(prompt, RemovalReason.DUPLICATE, seen[key]))
            elif of := tested.find_overlap(text) or tested.find_overlap(prompt.answer):
                removed.append(RemovedPrompt(prompt, RemovalReason.CONTAMINATED, of))
            elif share is not None and (of := alike.find_or_add(prompt.id, text, share)):
                removed.append(RemovedPrompt(prompt, RemovalReason.NEAR_DUPLICATE, of))
            else:
                seen[key] = prompt.id
                kept.append(prompt)
    return Corpus(tuple(kept), tuple(removed))


def read_prompts(
    path: Path,
    skill: str,
    language: str,
    on_malformed: Callable[[MalformedLine], None] | None = None,
) -> Iterator[Prompt]:
    """Prompts of a .jsonl file, one object a line: {"prompt": "...", "answer": "..."} or {"messages": [{"role", "content"}, ...]}.

    The answer, or the assistant's turn at the end of `messages`, is kept beside the prompt: it is asked for only where
    the recipe says `capture.answers: given`. Optional "id", "skill", "language".
    A broken line is refused with its number, or handed to `broken`; nothing is skipped in silence.
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
        if len(line) <= MAX_LINE_BYTES and not line.strip():
            continue
        try:
            prompt = _parse_line(line, f"{path}:{number}", f"{path.name}:{number}", skill, language)
        except DataError as error:
            if on_malformed is None:
                raise
            on_malformed(
                MalformedLine(
                    error.where,
                    error.message[:300],
                    len(line),
                    line[:MALFORMED_PREFIX_BYTES].decode(errors="backslashreplace"),
                )
            )
        else:
            yield prompt


def _parse_line(line: bytes, where: str, fallback_id: str, skill: str, language: str) -> Prompt:
    if len(line) > MAX_LINE_BYTES:
        raise DataError(
            f"a line of {len(line):,} bytes",
            where=where,
            remedy=f"a prompt has at most {MAX_LINE_BYTES:,}",
        )
    try:
        row = json.loads(line)
        json.dumps(
            row, ensure_ascii=False
        ).encode()  # half a surrogate pair ("\\ud83d") is JSON, but no text: it has no bytes
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"not JSON: {error}",
            where=where,
            remedy="one JSON object a line; mend or delete the line",
        ) from error
    return _parse_row(row, where, fallback_id, skill, language)


def _parse_row(row: Any, where: str, fallback_id: str, skill: str, language: str) -> Prompt:
    remedy = 'a line is {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
    if not isinstance(row, dict) or not ({"prompt", "messages"} & row.keys()):
        raise DataError("neither `prompt` nor `messages`", where=where, remedy=remedy)
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise DataError("`prompt` is not a text", where=where, remedy=remedy)
        conversation, answer = Conversation.from_question(row["prompt"]), row.get("answer", "")
        if not isinstance(answer, str):
            raise DataError("`answer` is not a text", where=where, remedy=remedy)
    else:
        conversation, answer = _parse_messages(row["messages"], where, remedy)

    def said(key: str, default: str) -> str:
        return (
            default if row.get(key) is None else str(row[key])
        )  # exports fill what is not there with null

    return Prompt(
        said("id", fallback_id),
        conversation,
        said("skill", skill),
        said("language", language),
        unicodedata.normalize("NFC", answer),
    )


def _parse_messages(rows: Any, where: str, remedy: str) -> tuple[Conversation, str]:
    messages: list[Message] = []
    for row in rows if isinstance(rows, list) else []:
        role, content = (
            (row.get("role"), row.get("content")) if isinstance(row, dict) else (None, None)
        )
        if role not in (Role.SYSTEM, Role.USER, Role.ASSISTANT) or not isinstance(content, str):
            raise DataError(
                f"message {len(messages) + 1} has role {role!r} and content {type(content).__name__}",
                where=where,
                remedy=remedy,
            )
        messages.append(Message(Role(role), (Text(unicodedata.normalize("NFC", content)),)))
    answer = messages.pop().text if messages and messages[-1].role is Role.ASSISTANT else ""
    if not messages or messages[-1].role is not Role.USER:
        raise DataError("the messages hold no user turn to answer", where=where, remedy=remedy)
    return Conversation(tuple(messages)), answer


def _dedup_text(conversation: Conversation) -> str:
    """What is said, and what tools there are: the same question with other tools is another."""
    return "\n".join(
        [*(p.text for p in conversation.parts()), *(t.name for t in conversation.tools)]
    )
