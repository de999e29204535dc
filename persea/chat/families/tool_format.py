"""Tools as chat templates take them, and the choices for `Family.is_tool_text_verbatim`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from persea.chat.messages import ContentPart, Conversation, Role, Tool, ToolCall, ToolResult


def always_verbatim(part: ContentPart) -> bool:
    """Return True: the template writes arguments and results unchanged."""
    return True


def verbatim_except_calls(part: ContentPart) -> bool:
    """Return True except for calls: the template writes calls key by key."""
    return not isinstance(part, ToolCall)


def verbatim_plain_results(part: ContentPart) -> bool:
    """Return True for results that JSON does not escape, and False for calls."""
    return not isinstance(part, ToolCall) and verbatim_unless_escaped(part)


def verbatim_unless_escaped(part: ContentPart) -> bool:
    """Return True unless JSON escapes the result: the template writes results as JSON strings."""
    return (
        isinstance(part, ToolCall) or json.dumps(part.text, ensure_ascii=False) == f'"{part.text}"'
    )


def tools_to_json_schema(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    """Return tools in the form that all templates take; None without tools."""
    return [
        {
            "type": "function",
            "function": {
                "name": t.name,
                "description": t.description,
                "parameters": json.loads(t.parameters),
            },
        }
        for t in tools
    ] or None


def messages_to_dicts(conversation: Conversation, thinking_key: str = "") -> list[dict[str, Any]]:
    """Return messages in the form that templates take.

    Each has `role` and `content`; `tool_calls` only if there are calls; a tool's message becomes
    one message per result.

    Args:
        conversation: The conversation to convert.
        thinking_key: Key of the assistant's thought; "" = the thought is left out.
    """
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        results = [p for p in message.parts if isinstance(p, ToolResult)]
        for result in results:
            messages.append(
                {
                    "role": message.role.value,
                    "name": result.name,
                    "tool_call_id": result.name,
                    "content": result.text,
                }
            )
        if results:
            continue
        messages.append({"role": message.role.value, "content": message.text})
        if thinking_key and message.role is Role.ASSISTANT:
            messages[-1][thinking_key] = message.thinking
        if message.calls:
            messages[-1]["tool_calls"] = [
                {
                    "type": "function",
                    "id": call.name,
                    "function": {"name": call.name, "arguments": json.loads(call.arguments)},
                }
                for call in message.calls
            ]
    return messages
