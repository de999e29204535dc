"""Llama 3.1, 3.2 and 3.3: headers and <|eot_id|>. The default student.

    <|begin_of_text|><|start_header_id|>user<|end_header_id|>

    Hello<|eot_id|><|start_header_id|>assistant<|end_header_id|>

    Hi!<|eot_id|>

Without thinking: a thought in a conversation is dropped (with the hybrid template a Llama thinks,
see `hybrid.py`). The template trims texts.

Tools are declared before the first question. A call is the whole answer, as plain text:
{"name": "f", "parameters": {"x": 1}}. So a text of that shape is a call if tools are declared, and
only then. One call a turn, and no text in that turn; results are quoted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from persea.chat.families.tool_format import (
    messages_to_dicts,
    tools_to_json_schema,
    verbatim_unless_escaped,
)
from persea.chat.family import DecodedPieces, Family, edit_texts, pieces_to_text
from persea.chat.messages import (
    ContentPart,
    Conversation,
    Message,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
    Tool,
    ToolCall,
    ToolResult,
)
from persea.errors import DataError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def normalise(conversation: Conversation) -> Conversation:
    """Drop thoughts and trim texts; tool results stay unchanged."""

    def change(k: int, m: Message, p: ContentPart) -> str:
        if isinstance(p, Thinking):
            return ""
        return p.text if isinstance(p, ToolResult) else p.text.strip()

    return edit_texts(conversation, change)


def template_inputs(conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return messages and tools; refuse content that the template would drop or make ambiguous."""
    turns = [m for m in conversation.messages if m.role is not Role.SYSTEM]
    if conversation.tools and turns and turns[0].role is not Role.USER:
        raise DataError(
            "the template declares tools in the first question, but the conversation does not "
            "begin with a question",
            where="llama",
            remedy="leave the conversation out",
        )
    for k, m in enumerate(conversation.messages):
        if len(m.calls) > 1 or (m.calls and m.text):
            raise DataError(
                f"message {k} has {len(m.calls)} tool calls" + (" and text" if m.text else ""),
                where="llama",
                remedy="the template writes one call a turn and no text; "
                "leave the conversation out",
            )
        if (
            m.role is Role.ASSISTANT
            and not m.calls
            and m.text
            and resolve_calls((Text(m.text),), conversation.tools) != (Text(m.text),)
        ):
            raise DataError(
                f"the text of message {k} reads as a tool call",
                where="llama",
                remedy="make it a ToolCall, or leave the conversation out",
            )
    tools = tools_to_json_schema(conversation.tools)
    return messages_to_dicts(conversation), {"tools": tools} if tools else {}


def parse(pieces: DecodedPieces, effort: ThinkingEffort) -> tuple[ContentPart, ...] | None:
    """Parse one text without control tokens."""
    text = pieces_to_text(pieces)
    return None if text is None else (Text(text),)


def resolve_calls(
    parts: tuple[ContentPart, ...], tools: tuple[Tool, ...]
) -> tuple[ContentPart, ...] | None:
    """Turn a JSON object of exactly `name` and `parameters` into a call, if tools are declared.

    None if a call begins but is malformed.
    """
    text = "".join(p.text for p in parts).strip()
    if not tools or not text.startswith("{"):
        return parts
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return None if text.startswith('{"name":') else parts
    if not isinstance(parsed, dict) or set(parsed) != {"name", "parameters"}:
        return parts
    call = (
        ToolCall.from_generated(parsed["name"], parsed["parameters"])
        if isinstance(parsed["parameters"], dict)
        else None
    )
    return (call,) if call else None


def _random_config(common: dict[str, Any], sizes: Mapping[str, int]) -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(intermediate_size=3 * common["hidden_size"], **common)


LLAMA = Family(
    name="llama",
    signature_token="<|start_header_id|>",
    efforts=(ThinkingEffort.NONE,),
    stop_tokens=("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    normalise=normalise,
    template_inputs=template_inputs,
    parse=parse,
    is_tool_text_verbatim=verbatim_unless_escaped,
    resolve_calls=resolve_calls,
    random_config=_random_config,
)
