"""Conversation, Tokens, Family: a conversation is bytes with roles; templates are clothing.

A Family says how one model family dresses a conversation; `voice.py` binds it to one tokenizer and one chat template.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from enum import StrEnum
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from persea.errors import DataError

PINNED_DATE = date(
    2025, 1, 1
)  # gpt-oss and Llama 3 templates write today's date: a cached prompt would change every midnight


class Role(StrEnum):
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class ThinkingEffort(StrEnum):
    """The thinking dial, as a value: NONE answers at once."""

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
    text: str


@dataclass(frozen=True)
class Thinking:
    text: str


def canonical_json(value: str) -> str:
    """A JSON object as every chat template's `tojson` writes it: keys in their order, one space behind comma and colon, no escapes
    but JSON's own. Raises ValueError for what is no such object.
    """
    try:
        found = json.loads(value, parse_constant=_reject_json_constant)
        text = json.dumps(found, ensure_ascii=False, allow_nan=False)
        text.encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return text


def _reject_json_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


TOOL_NAME_PATTERN = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def _validate_tool(name: str, text: str) -> None:
    if not TOOL_NAME_PATTERN.fullmatch(name):
        raise DataError(
            f"{name[:80]!r} is no name of a tool", remedy="letters, digits, _ . and -, at most 64"
        )
    try:
        same = canonical_json(text) == text
    except ValueError as error:
        raise DataError(
            f"the JSON of tool {name} is broken: {error}: {text[:60]!r}",
            remedy="give one JSON object, as a text",
        ) from error
    if not same:
        raise DataError(
            f"the JSON of tool {name} is not in its canonical spelling: {text[:60]!r}",
            remedy="pass it through chat.canonical()",
        )


@dataclass(frozen=True)
class Tool:
    """What the assistant may call. parameters: its JSON schema, spelled as `canonical` does."""

    name: str
    description: str
    parameters: str

    def __post_init__(self) -> None:
        _validate_tool(self.name, self.parameters)


@dataclass(frozen=True)
class ToolCall:
    """The assistant calls a tool. arguments: a JSON object, spelled as `canonical` does; its content is that text, the name is marker."""

    name: str
    arguments: str

    def __post_init__(self) -> None:
        _validate_tool(self.name, self.arguments)

    @property
    def text(self) -> str:
        return self.arguments

    @staticmethod
    def from_generated(name: object, arguments: object) -> ToolCall | None:
        """A call as a model spelled it; None where it is malformed. arguments: JSON text, or what `json.loads` makes of it."""
        try:
            text = canonical_json(
                arguments if isinstance(arguments, str) else json.dumps(arguments)
            )
        except (ValueError, RecursionError):
            return None
        return (
            ToolCall(name, text)
            if isinstance(name, str) and TOOL_NAME_PATTERN.fullmatch(name)
            else None
        )


@dataclass(frozen=True)
class ToolResult:
    """What a tool answered. The tool's name is marker."""

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
    """The same part with another text."""
    return replace(part, arguments=text) if isinstance(part, ToolCall) else replace(part, text=text)


def _nfc(part: ContentPart) -> ContentPart:
    text = unicodedata.normalize("NFC", part.text)
    return replace_text(part, canonical_json(text) if isinstance(part, ToolCall) else text)


@dataclass(frozen=True)
class Message:
    role: Role
    parts: tuple[ContentPart, ...]

    @staticmethod
    def from_assistant(text: str) -> Message:
        """An assistant's words alone."""
        return Message(Role.ASSISTANT, (Text(text),))

    @property
    def text(self) -> str:
        """What is said, without what was thought."""
        return "".join(p.text for p in self.parts if isinstance(p, Text))

    @property
    def thinking(self) -> str:
        return "".join(p.text for p in self.parts if isinstance(p, Thinking))

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        return tuple(p for p in self.parts if isinstance(p, ToolCall))


@dataclass(frozen=True)
class Conversation:
    """tools  what the assistant may call, told at the head of the conversation"""

    messages: tuple[Message, ...]
    effort: ThinkingEffort = ThinkingEffort.NONE
    tools: tuple[Tool, ...] = ()

    @staticmethod
    def from_question(
        question: str, *, system: str = "", effort: ThinkingEffort = ThinkingEffort.NONE
    ) -> Conversation:
        """One question, NFC-normalised once, before every tokenizer (Qwen's normalises: 71 % of Burmese lines change)."""
        turns = [(Role.SYSTEM, system)] if system else []
        turns.append((Role.USER, question))
        return Conversation(
            tuple(Message(r, (Text(unicodedata.normalize("NFC", t)),)) for r, t in turns), effort
        )

    def with_answer(self, *parts: ContentPart) -> Conversation:
        """This conversation with the assistant's answer at its end, NFC-normalised too: models do say decomposed text."""
        return replace(
            self, messages=(*self.messages, Message(Role.ASSISTANT, tuple(map(_nfc, parts))))
        )

    def parts(self) -> Iterator[ContentPart]:
        for message in self.messages:
            yield from message.parts

    def to_json(self) -> dict[str, Any]:
        """Without `tools` where there are none: records from before tools were known keep their bytes."""
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


@dataclass(frozen=True)
class RenderedTokens:
    """One tokenizer's view of a conversation. T = tokens.

    Content bytes: the conversation's parts laid end to end with one byte left free between them, so that the end of one
    part and the start of the next are different places. A family that drops a part has no token there.

    ids_T     int32
    starts_T  int32, first content byte of the token; -1 = marker with no bytes, or a token that the template's text shares, on
              whatever side. The token that ends the turn stands at the end of the content with no bytes (start = end).
    ends_T    int32, one past its last content byte; -1 = marker
    learn_T   bool, the last assistant turn: what a model in this voice must produce itself, its stop token included
    """

    ids_T: npt.NDArray[np.int32]
    starts_T: npt.NDArray[np.int32]
    ends_T: npt.NDArray[np.int32]
    loss_mask_T: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids_T)


DecodedPieces: TypeAlias = Sequence["str | bytes"]  # control tokens (str) and runs of content bytes


def keep_calls_as_parsed(
    parts: tuple[ContentPart, ...], tools: tuple[Tool, ...]
) -> tuple[ContentPart, ...]:
    """`Family.recall` of a notation that says without the tools what a call is."""
    return parts


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
    template_mark  words that its chat templates hold, where several families share a signature; the longest wins
    opening     what its prompt writes where an answer begins and its template leaves out of a finished conversation; put back
    tool_bytes  whether its template writes the text of this call or result as it stands; where not, the part is scaffolding without
                bytes (of a call: learned, like a <think>). None = it has no notation for tools: such a conversation is refused
    recall      parts that `parse` read, once the declared tools are known -> parts, or None where they are malformed
    unknown     what persea does not know of this family, in plain words; "" for one a person wrote
    """

    name: str
    licence: str
    signature_token: str
    efforts: tuple[ThinkingEffort, ...]
    stop_tokens: tuple[str, ...]
    normalise: Callable[[Conversation], Conversation]
    template_inputs: Callable[[Conversation], tuple[list[dict[str, Any]], dict[str, Any]]]
    parse: Callable[[DecodedPieces, ThinkingEffort], tuple[ContentPart, ...] | None]
    template_signature: str = ""
    prompt_only_suffix: str = ""
    is_tool_text_verbatim: Callable[[ContentPart], bool] | None = None
    resolve_calls: Callable[
        [tuple[ContentPart, ...], tuple[Tool, ...]], tuple[ContentPart, ...] | None
    ] = keep_calls_as_parsed
    limitations: str = ""


def edit_texts(
    conversation: Conversation, change: Callable[[int, Message, ContentPart], str]
) -> Conversation:
    """The same conversation with each message's texts trimmed to `change(message index, message, text)`, its thoughts likewise.

    A template sees the texts of one message as one, so `change` does too; each part keeps its share. Tool results are changed one by
    one; tool calls stay as they are.
    """
    return replace(
        conversation,
        messages=tuple(
            replace(
                m,
                parts=_split_retained_text(
                    m.parts,
                    {
                        type(p): (p.text, change(k, m, p))
                        for p in (Text(m.text), Thinking(m.thinking))
                    },
                    lambda p, k=k, m=m: change(k, m, p),
                ),
            )  # type: ignore[misc]
            for k, m in enumerate(conversation.messages)
        ),
    )


def _split_retained_text(
    parts: Sequence[ContentPart],
    texts_by_kind: Mapping[type[ContentPart], tuple[str, str]],
    edit_result: Callable[[ContentPart], str],
) -> tuple[ContentPart, ...]:
    """Each part's share of what is kept of all parts of its kind; wholes = kind -> (their texts laid end to end, what is kept of it)."""
    cut: list[ContentPart] = []
    at = {kind: -max(0, whole.find(kept)) for kind, (whole, kept) in texts_by_kind.items()}
    for p in parts:
        if isinstance(p, (ToolCall, ToolResult)):
            cut.append(p if isinstance(p, ToolCall) else replace_text(p, edit_result(p)))
            continue
        begin, end = at[type(p)], at[type(p)] + len(p.text)
        cut.append(replace(p, text=texts_by_kind[type(p)][1][max(0, begin) : max(0, end)]))
        at[type(p)] = end
    return tuple(cut)


def pieces_to_text(pieces: DecodedPieces) -> str | None:
    """The text of pieces that must hold no control token; None where one stands in them."""
    if any(isinstance(p, str) for p in pieces):
        return None
    return b"".join(p for p in pieces if isinstance(p, bytes)).decode()
