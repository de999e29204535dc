"""Family: the facts about one model family that persea needs to render and parse its conversations.

Each family is one `Family` instance in its own file in `persea/chat/families/`. The chat renderer
(`persea/chat/renderer.py`) combines a family with one tokenizer and one chat template.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from persea.chat.messages import (
    ContentPart,
    Conversation,
    Message,
    Text,
    Thinking,
    ThinkingEffort,
    Tool,
    ToolCall,
    ToolResult,
    replace_text,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DecodedPieces: TypeAlias = Sequence["str | bytes"]
"""A decoded answer: control tokens (str) and the runs of content bytes between them."""


def keep_calls_as_parsed(
    parts: tuple[ContentPart, ...], tools: tuple[Tool, ...]
) -> tuple[ContentPart, ...]:
    """Return the parts unchanged: `Family.resolve_calls` where calls need no tools."""
    return parts


@dataclass(frozen=True)
class Family:
    """The facts about one model family. Instances only, one file each; there are no subclasses.

    Attributes:
        name: Name in recipes, such as "qwen".
        signature_token: A control token that only this family has; the family is detected by it.
        efforts: The thinking efforts that the chat template can distinguish.
        stop_tokens: Control tokens that end the assistant's turn, the one that the template writes
            first.
        normalise: Conversation -> the content that the chat template keeps: the same messages and
            parts, with texts trimmed or emptied.
        template_inputs: Conversation -> (messages, keyword arguments) of the chat template.
        parse: (pieces of an answer without its stop token, effort) -> parts; None for a malformed
            answer.
        template_signature: Text that the family's chat templates contain, where several families
            share a signature token; the longest match wins.
        prompt_only_suffix: Text that ends the generation prompt and is missing in a finished
            conversation; the renderer inserts it there, so that the prompt is a prefix of the
            conversation.
        is_tool_text_verbatim: Whether the template writes the text of this tool call or result
            unchanged. Where it does not, the part has tokens without byte offsets (those of a call
            are still in the loss mask). None for a family without tools: a conversation with tools
            is refused.
        resolve_calls: (parts from `parse`, declared tools) -> parts; None for a malformed answer.
            For notations that need the declared tools to recognise a call or its argument types.
        control_markers: Regular expressions of added tokens that are control tokens although the
            tokenizer does not declare them special. Tokens of the shape <|...|> need no entry.
        thought_ends: Piece sequences that close an unfinished thought. A streaming parser appends
            them to a partial answer in order to parse the thought before the model has ended it.
        text_thought_markers: (opening, closing) of a thought where the tokenizer has them as plain
            text instead of control tokens; ("", "") for none.
        random_config: (settings common to all architectures, sizes) -> configuration of a small
            model of the family's architecture, for random initialisation; None where none is
            defined.
        template_version: Distinguishes the generations of the family's template, where persea
            renders them in different ways; part of the digest of renderings.
        has_hybrid_format: Whether persea's hybrid format gave the family its thinking.
        limitations: Facts about this family that persea does not know, for people; "" for a
            family written by hand.
    """

    name: str
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
    control_markers: tuple[str, ...] = ()
    thought_ends: tuple[DecodedPieces, ...] = ()
    text_thought_markers: tuple[str, str] = ("", "")
    random_config: Callable[[dict[str, Any], Mapping[str, int]], PretrainedConfig] | None = None
    template_version: str = ""
    has_hybrid_format: bool = False
    limitations: str = ""

    @property
    def lowest_effort(self) -> ThinkingEffort:
        """The lowest effort that the template can distinguish; gpt-oss has no NONE."""
        return next(e for e in ThinkingEffort if e in self.efforts)


def edit_texts(
    conversation: Conversation, edit: Callable[[int, Message, ContentPart], str]
) -> Conversation:
    """Return the conversation with trimmed or emptied texts, for `Family.normalise`.

    A chat template sees all text parts of one message as one string, and all its thoughts as
    another, so `edit` gets them joined; each part then keeps its share of the result. Tool results
    are edited one by one. Tool calls stay unchanged.

    Args:
        conversation: The conversation to edit.
        edit: (message index, message, joined part) -> the text to keep, a substring of the part's
            text.
    """
    return replace(
        conversation,
        messages=tuple(
            replace(message, parts=_edit_message_parts(k, message, edit))
            for k, message in enumerate(conversation.messages)
        ),
    )


def _edit_message_parts(
    index: int, message: Message, edit: Callable[[int, Message, ContentPart], str]
) -> tuple[ContentPart, ...]:
    """Return the parts of one message, each with its share of the edited text of its kind."""
    retained: dict[type[ContentPart], str] = {}
    position: dict[type[ContentPart], int] = {}
    for joined in (Text(message.text), Thinking(message.thinking)):
        kind = type(joined)
        retained[kind] = edit(index, message, joined)
        position[kind] = -max(0, joined.text.find(retained[kind]))
    edited: list[ContentPart] = []
    for part in message.parts:
        if isinstance(part, ToolCall):
            edited.append(part)
        elif isinstance(part, ToolResult):
            edited.append(replace_text(part, edit(index, message, part)))
        else:
            start, end = position[type(part)], position[type(part)] + len(part.text)
            edited.append(replace_text(part, retained[type(part)][max(0, start) : max(0, end)]))
            position[type(part)] = end
    return tuple(edited)


def pieces_to_text(pieces: DecodedPieces) -> str | None:
    """Return the text of pieces without control tokens; None if they contain one."""
    if any(isinstance(piece, str) for piece in pieces):
        return None
    return b"".join(piece for piece in pieces if isinstance(piece, bytes)).decode()


def _nothing_to_parse(
    pieces: DecodedPieces, effort: ThinkingEffort
) -> tuple[ContentPart, ...] | None:
    return None


UNKNOWN_FAMILY = Family(
    name="unknown",
    signature_token="",
    efforts=(),
    stop_tokens=(),
    normalise=lambda conversation: conversation,
    template_inputs=lambda conversation: ([], {}),
    parse=_nothing_to_parse,
)
"""Stands in a renderer until the model's family is chosen."""
