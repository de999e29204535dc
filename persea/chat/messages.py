"""Conversations: messages with roles, whose parts are text, thinking, tool calls and tool results.

All content is NFC-normalised before any tokenizer sees it, so that every tokenizer works on the
same bytes.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from enum import StrEnum
from typing import Any, TypeAlias

from persea.errors import DataError
from persea.storage import parse_strict_json

# The templates of gpt-oss and Llama 3 write today's date: without a fixed date a cached prompt
# would change every midnight.
PINNED_DATE = date(2025, 1, 1)


class Role(StrEnum):
    """Who a message is from. The only message of a document has no author, but a role of its own.

    DOCUMENT is a whole document, or the window that ends it; DOCUMENT_PART is a window of a
    document that goes on.
    """

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"
    DOCUMENT = "document"
    DOCUMENT_PART = "document_part"


DOCUMENT_ROLES = (Role.DOCUMENT, Role.DOCUMENT_PART)


class ThinkingEffort(StrEnum):
    """How much the model thinks before it answers; NONE answers at once."""

    NONE = "none"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


class FinishReason(StrEnum):
    """How an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    MALFORMED = "malformed"
    REFUSED = "refused"


@dataclass(frozen=True)
class Text:
    """Text of a message."""

    text: str


@dataclass(frozen=True)
class Thinking:
    """A thought of the assistant."""

    text: str


def canonical_json(value: str) -> str:
    """Return a JSON object spelled as the `tojson` filter of every chat template spells it.

    Keys keep their order, commas and colons are followed by one space, and only the escapes that
    JSON demands remain.

    Raises:
        ValueError: `value` is not a JSON object, or contains NaN or Infinity.
    """
    try:
        parsed = parse_strict_json(value)
        text = json.dumps(parsed, ensure_ascii=False, allow_nan=False)
        text.encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(parsed, dict):
        raise ValueError("not a JSON object")
    return text


TOOL_NAME_PATTERN = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def _validate_tool(name: str, text: str) -> None:
    if not TOOL_NAME_PATTERN.fullmatch(name):
        raise DataError(
            f"{name[:80]!r} is not a valid tool name",
            remedy="use letters, digits, _ . and -, at most 64",
        )
    try:
        is_canonical = canonical_json(text) == text
    except ValueError as error:
        raise DataError(
            f"the JSON of tool {name} is broken: {error}: {text[:60]!r}",
            remedy="give one JSON object as text",
        ) from error
    if not is_canonical:
        raise DataError(
            f"the JSON of tool {name} is not in its canonical spelling: {text[:60]!r}",
            remedy="pass it through persea.chat.messages.canonical_json()",
        )


@dataclass(frozen=True)
class Tool:
    """A tool that the assistant may call.

    Attributes:
        name: Letters, digits, _ . and -, at most 64.
        description: Plain text for the model.
        parameters: JSON schema, spelled as by `canonical_json`.
    """

    name: str
    description: str
    parameters: str

    def __post_init__(self) -> None:
        _validate_tool(self.name, self.parameters)


@dataclass(frozen=True)
class ToolCall:
    """A tool call of the assistant.

    Its content is the text of the arguments; the name belongs to the template.

    Attributes:
        name: Name of the tool.
        arguments: JSON object, spelled as by `canonical_json`.
    """

    name: str
    arguments: str

    def __post_init__(self) -> None:
        _validate_tool(self.name, self.arguments)

    @property
    def text(self) -> str:
        """The arguments, under the name that all parts share."""
        return self.arguments

    @staticmethod
    def from_generated(name: object, arguments: object) -> ToolCall | None:
        """Return a call as a model wrote it; None if it is malformed.

        Args:
            name: Name of the tool.
            arguments: JSON text, or the value that `json.loads` makes of it.
        """
        try:
            text = canonical_json(
                arguments if isinstance(arguments, str) else json.dumps(arguments)
            )
            _nfc_json(text)
        except (ValueError, RecursionError):
            return None
        return (
            ToolCall(name, text)
            if isinstance(name, str) and TOOL_NAME_PATTERN.fullmatch(name)
            else None
        )


@dataclass(frozen=True)
class ToolResult:
    """The result of a tool call. The text is content; the tool's name belongs to the template."""

    name: str
    text: str

    def __post_init__(self) -> None:
        _validate_tool(self.name, "{}")


ContentPart: TypeAlias = Text | Thinking | ToolCall | ToolResult
PART_KINDS: Mapping[str, type[ContentPart]] = {
    "text": Text,
    "thinking": Thinking,
    "call": ToolCall,
    "result": ToolResult,
}


def replace_text(part: ContentPart, text: str) -> ContentPart:
    """Return the same part with another text."""
    return replace(part, arguments=text) if isinstance(part, ToolCall) else replace(part, text=text)


def _nfc(part: ContentPart) -> ContentPart:
    """Return the part in NFC. Raises DataError if two keys of a call's arguments become equal."""
    if not isinstance(part, ToolCall):
        return replace_text(part, unicodedata.normalize("NFC", part.text))
    try:
        return replace_text(part, _nfc_json(part.arguments))
    except ValueError as error:
        raise DataError(
            f"the arguments of tool {part.name} cannot be normalised to NFC: {error}",
            remedy="rename one of the keys, or leave the conversation out",
        ) from error


def _nfc_json(text: str) -> str:
    """Return a canonical JSON object in NFC. Raises ValueError if two keys become equal."""
    normalised = unicodedata.normalize("NFC", text)
    json.loads(normalised, object_pairs_hook=_refuse_equal_keys)
    return canonical_json(normalised)


def _refuse_equal_keys(pairs: list[tuple[str, Any]]) -> None:
    keys: set[str] = set()
    for key, _ in pairs:
        if key in keys:
            raise ValueError(f"two keys become {key!r}")
        keys.add(key)


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: Who the message is from.
        parts: Texts, thoughts, tool calls or tool results, in order.
    """

    role: Role
    parts: tuple[ContentPart, ...]

    @staticmethod
    def from_assistant(text: str) -> Message:
        """Return an assistant's message with text only."""
        return Message(Role.ASSISTANT, (Text(text),))

    @property
    def text(self) -> str:
        """All text parts joined, without thoughts, calls and results."""
        return "".join(p.text for p in self.parts if isinstance(p, Text))

    @property
    def thinking(self) -> str:
        """All thoughts joined."""
        return "".join(p.text for p in self.parts if isinstance(p, Thinking))

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The tool calls."""
        return tuple(p for p in self.parts if isinstance(p, ToolCall))


@dataclass(frozen=True)
class Conversation:
    """Messages, the requested thinking effort, and the tools that the assistant may call.

    Attributes:
        messages: Messages in order.
        effort: Thinking effort of the next answer.
        tools: Tools that the assistant may call.

    Example:
        >>> from persea.chat.messages import Conversation, Text
        >>> conversation = Conversation.from_question("2 + 3?").with_answer(Text("5"))
        >>> [message.text for message in conversation.messages]
        ['2 + 3?', '5']
    """

    messages: tuple[Message, ...]
    effort: ThinkingEffort = ThinkingEffort.NONE
    tools: tuple[Tool, ...] = ()

    @staticmethod
    def from_question(
        question: str, *, system: str = "", effort: ThinkingEffort = ThinkingEffort.NONE
    ) -> Conversation:
        """Return a conversation of one question, NFC-normalised.

        The text is normalised once, before every tokenizer, because some tokenizers normalise and
        others do not (Qwen's does, which changes 71 % of Burmese lines).
        """
        turns = [(Role.SYSTEM, system)] if system else []
        turns.append((Role.USER, question))
        return Conversation(
            tuple(
                Message(role, (Text(unicodedata.normalize("NFC", text)),)) for role, text in turns
            ),
            effort,
        )

    @staticmethod
    def from_document(text: str, *, ends: bool = True) -> Conversation:
        """Return plain text without roles as a conversation of one message, NFC-normalised.

        Every model renders it by its own rules for plain text, without a chat template.

        Args:
            text: The text.
            ends: Whether the document ends here; False for a window of a document that goes on.

        Example:
            >>> from persea.chat.messages import Conversation
            >>> Conversation.from_document("Selamat pagi.").is_document
            True
        """
        role = Role.DOCUMENT if ends else Role.DOCUMENT_PART
        return Conversation((Message(role, (Text(unicodedata.normalize("NFC", text)),)),))

    @property
    def is_document(self) -> bool:
        """Whether this is plain text without roles."""
        return len(self.messages) == 1 and self.messages[0].role in DOCUMENT_ROLES

    def with_answer(self, *parts: ContentPart | str) -> Conversation:
        """Return this conversation followed by an assistant's answer, NFC-normalised.

        Answers are normalised too because models do generate decomposed text.

        Args:
            parts: Parts of the answer; a str is a text part.

        Raises:
            DataError: Two argument names of a tool call are equal after normalisation.
        """
        given = (Text(part) if isinstance(part, str) else part for part in parts)
        return replace(
            self, messages=(*self.messages, Message(Role.ASSISTANT, tuple(map(_nfc, given))))
        )

    def parts(self) -> Iterator[ContentPart]:
        """Iterate over the parts of all messages in order."""
        for message in self.messages:
            yield from message.parts

    def to_json(self) -> dict[str, Any]:
        """Return the conversation as JSON values.

        The key "tools" is absent without tools, so that records written before tools existed keep
        their bytes.
        """
        kind = {t: name for name, t in PART_KINDS.items()}
        value: dict[str, Any] = {
            "effort": self.effort.value,
            "messages": [
                {
                    "role": m.role.value,
                    "parts": [{"kind": kind[type(p)], **vars(p)} for p in m.parts],
                }
                for m in self.messages
            ],
        }
        return value | ({"tools": [vars(t) for t in self.tools]} if self.tools else {})

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Conversation:
        """Return the conversation that `to_json` wrote."""

        def part(kind: str, **fields: str) -> ContentPart:
            return PART_KINDS[kind](**fields)

        return Conversation(
            tuple(
                Message(Role(m["role"]), tuple(part(**p) for p in m["parts"]))
                for m in value["messages"]
            ),
            ThinkingEffort(value["effort"]),
            tuple(Tool(**t) for t in value.get("tools", ())),
        )
