"""Conversation, Tokens, Family, Voice: a conversation is bytes with roles; templates are clothing.

A Family says how one model family dresses a conversation; a Voice is a Family bound to one tokenizer and one chat
template. `Voice.render` gives exactly the ids the model's own template gives, and says where the content's bytes are.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from enum import StrEnum
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

PINNED_DATE = date(2025, 1, 1)  # gpt-oss and Llama 3 templates write today's date: a cached prompt would change every midnight


class Role(StrEnum):
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


class Effort(StrEnum):
    """The thinking dial, as a value: NONE answers at once."""

    NONE = "none"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


class Finish(StrEnum):
    """How an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    MALFORMED = "malformed"
    REFUSED = "refused"


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Thinking:
    text: str


Part: TypeAlias = Text | Thinking


@dataclass(frozen=True)
class Message:
    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """What is said, without what was thought."""
        return "".join(p.text for p in self.parts if isinstance(p, Text))

    @property
    def thinking(self) -> str:
        return "".join(p.text for p in self.parts if isinstance(p, Thinking))


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    effort: Effort = Effort.NONE

    @staticmethod
    def ask(question: str, *, system: str = "", effort: Effort = Effort.NONE) -> Conversation:
        """One question, NFC-normalised once, before every tokenizer (Qwen's normalises: 71 % of Burmese lines change)."""
        turns = [(Role.SYSTEM, system)] if system else []
        turns.append((Role.USER, question))
        return Conversation(tuple(Message(r, (Text(unicodedata.normalize("NFC", t)),)) for r, t in turns), effort)

    def answered(self, *parts: Part) -> Conversation:
        """This conversation with the assistant's answer at its end, NFC-normalised too: models do say decomposed text."""
        said = tuple(replace(p, text=unicodedata.normalize("NFC", p.text)) for p in parts)
        return replace(self, messages=(*self.messages, Message(Role.ASSISTANT, said)))

    def parts(self) -> Iterator[Part]:
        for message in self.messages:
            yield from message.parts

    def to_json(self) -> dict[str, Any]:
        kind = {Text: "text", Thinking: "thinking"}
        return {"effort": self.effort.value, "messages": [
            {"role": m.role.value, "parts": [{"kind": kind[type(p)], "text": p.text} for p in m.parts]} for m in self.messages]}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Conversation:
        kind: dict[str, type[Text] | type[Thinking]] = {"text": Text, "thinking": Thinking}
        return Conversation(tuple(
            Message(Role(m["role"]), tuple(kind[p["kind"]](p["text"]) for p in m["parts"])) for m in value["messages"]), Effort(value["effort"]))


@dataclass(frozen=True)
class Tokens:
    """One tokenizer's view of a conversation. T = tokens.

    Content bytes: the conversation's parts laid end to end with one byte left free between them, so that the end of one
    part and the start of the next are different places. A family that drops a part has no token there.

    ids_T     int32
    starts_T  int32, first content byte of the token; -1 = marker with no bytes. The token that ends the turn stands
              at the end of the content with no bytes (start = end).
    ends_T    int32, one past its last content byte; -1 = marker
    learn_T   bool, the last assistant turn: what a model in this voice must produce itself, its stop token included
    """

    ids_T: npt.NDArray[np.int32]
    starts_T: npt.NDArray[np.int32]
    ends_T: npt.NDArray[np.int32]
    learn_T: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids_T)


Pieces: TypeAlias = Sequence["str | bytes"]  # control tokens (str) and runs of content bytes


@dataclass(frozen=True)
class Family:
    """What a model family says of itself. Instances only, one a file in `families/`; no subclasses.

    name        "qwen"
    licence     the family's usual licence, checked by a person, never inferred
    signature   a control token that only this family has: how it is recognised
    efforts     the efforts it can tell apart
    stops       control tokens that end the assistant's turn
    normalise   what this family keeps of a conversation: same messages and parts, a text trimmed or emptied
    inputs      conversation -> what its own Jinja template takes (messages and keyword arguments)
    parse       the pieces of an answer, stop token excluded -> parts, or None where they are malformed
    """

    name: str
    licence: str
    signature: str
    efforts: tuple[Effort, ...]
    stops: tuple[str, ...]
    normalise: Callable[[Conversation], Conversation]
    inputs: Callable[[Conversation], tuple[list[dict[str, Any]], dict[str, Any]]]
    parse: Callable[[Pieces, Effort], tuple[Part, ...] | None]


def edit(conversation: Conversation, change: Callable[[int, Message, Part], str]) -> Conversation:
    """The same conversation with each message's texts trimmed to `change(message index, message, text)`, its thoughts likewise.

    A template sees the texts of one message as one, so `change` does too; each part keeps its share.
    """
    return replace(conversation, messages=tuple(
        replace(m, parts=_cut(m.parts, {type(p): (p.text, change(k, m, p)) for p in (Text(m.text), Thinking(m.thinking))}))
        for k, m in enumerate(conversation.messages)))


def _cut(parts: Sequence[Part], wholes: Mapping[type[Part], tuple[str, str]]) -> tuple[Part, ...]:
    """Each part's share of what is kept of all parts of its kind; wholes = kind -> (their texts laid end to end, what is kept of it)."""
    cut: list[Part] = []
    at = {kind: -max(0, whole.find(kept)) for kind, (whole, kept) in wholes.items()}
    for p in parts:
        begin, end = at[type(p)], at[type(p)] + len(p.text)
        cut.append(replace(p, text=wholes[type(p)][1][max(0, begin):max(0, end)]))
        at[type(p)] = end
    return tuple(cut)


def text_of(pieces: Pieces) -> str | None:
    """The text of pieces that must hold no control token; None where one stands in them."""
    if any(isinstance(p, str) for p in pieces):
        return None
    return b"".join(p for p in pieces if isinstance(p, bytes)).decode()
