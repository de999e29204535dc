"""Llama 3: headers and <|eot_id|>. The default student.

    <|begin_of_text|><|start_header_id|>user<|end_header_id|>

    Hello<|eot_id|><|start_header_id|>assistant<|end_header_id|>

    Hi!<|eot_id|>

No thinking: a thought in a conversation is dropped; with the hybrid template a Llama thinks (`hybrid.py`). Texts are trimmed by the template.

Tools stand before the first question. A call is the whole answer, as plain text: {"name": "f", "parameters": {"x": 1}}; so a text of
that shape is a call where tools were declared, and nowhere else. One call a turn, no words beside it; results are quoted.
The same for 3.1, 3.2 and 3.3.
"""

from __future__ import annotations

import json
from typing import Any

from persea.chat.families.tool_format import (
    messages_to_dicts,
    tools_to_json_schema,
    verbatim_unless_escaped,
)
from persea.chat.messages import (
    ContentPart,
    Conversation,
    DecodedPieces,
    Family,
    Message,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
    Tool,
    ToolCall,
    ToolResult,
    edit_texts,
    pieces_to_text,
)
from persea.errors import DataError


def normalise(conversation: Conversation) -> Conversation:
    """Thoughts dropped, texts trimmed; tool results as they are."""

    def change(k: int, m: Message, p: ContentPart) -> str:
        if isinstance(p, Thinking):
            return ""
        return p.text if isinstance(p, ToolResult) else p.text.strip()

    return edit_texts(conversation, change)


def template_inputs(conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages and tools as the template takes them. Refuses what it would lose or make ambiguous."""
    spoken = [m for m in conversation.messages if m.role is not Role.SYSTEM]
    if conversation.tools and spoken and spoken[0].role is not Role.USER:
        raise DataError(
            "tools are declared in the first question, and the conversation does not begin with one",
            where="llama",
            remedy="leave the conversation out",
        )
    for k, m in enumerate(conversation.messages):
        if len(m.calls) > 1 or (m.calls and m.text):
            raise DataError(
                f"message {k} has {len(m.calls)} tool calls"
                + (" and words beside them" if m.text else ""),
                where="llama",
                remedy="its template writes one call a turn and nothing beside it; leave the conversation out",
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
                remedy="make it a ToolCall, or leave it out",
            )
    tools = tools_to_json_schema(conversation.tools)
    return messages_to_dicts(conversation), {"tools": tools} if tools else {}


def parse(pieces: DecodedPieces, effort: ThinkingEffort) -> tuple[ContentPart, ...] | None:
    """One text, no control token inside."""
    text = pieces_to_text(pieces)
    return None if text is None else (Text(text),)


def resolve_calls(
    parts: tuple[ContentPart, ...], tools: tuple[Tool, ...]
) -> tuple[ContentPart, ...] | None:
    """With tools declared, a JSON object of exactly `name` and `parameters` is a call; None where one begins and is broken."""
    text = "".join(p.text for p in parts).strip()
    if not tools or not text.startswith("{"):
        return parts
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None if text.startswith('{"name":') else parts
    if not isinstance(found, dict) or set(found) != {"name", "parameters"}:
        return parts
    call = (
        ToolCall.from_generated(found["name"], found["parameters"])
        if isinstance(found["parameters"], dict)
        else None
    )
    return (call,) if call else None


LLAMA = Family(
    name="llama",
    licence="Llama Community License",
    signature_token="<|start_header_id|>",
    efforts=(ThinkingEffort.NONE,),
    stop_tokens=("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    normalise=normalise,
    template_inputs=template_inputs,
    parse=parse,
    is_tool_text_verbatim=verbatim_unless_escaped,
    resolve_calls=resolve_calls,
)
