"""What families share about tools: the form in which every chat template takes them, and where their bytes are (`Family.tool_bytes`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from persea.chat.messages import ContentPart, Conversation, Role, Tool, ToolCall, ToolResult


def always_verbatim(part: ContentPart) -> bool:
    """`Family.tool_bytes` of a template that writes arguments and results as they stand."""
    return True


def verbatim_except_calls(part: ContentPart) -> bool:
    """`Family.tool_bytes` of a template that writes calls key by key."""
    return not isinstance(part, ToolCall)


def verbatim_unless_escaped(part: ContentPart) -> bool:
    """`Family.tool_bytes` of a template that writes a result as a JSON string: its bytes are there where JSON escapes none of them."""
    return (
        isinstance(part, ToolCall) or json.dumps(part.text, ensure_ascii=False) == f'"{part.text}"'
    )


def tools_to_json_schema(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    """Tools in the form all templates take them; None where there are none."""
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
    """Messages in the form templates take them: `content`, the thought of the assistant under the name `thought` ("" = left out),
    `tool_calls` only where there are some, one message for each tool result.
    """
    messages: list[dict[str, Any]] = []
    for m in conversation.messages:
        results = [p for p in m.parts if isinstance(p, ToolResult)]
        for r in results:
            messages.append(
                {"role": m.role.value, "name": r.name, "tool_call_id": r.name, "content": r.text}
            )
        if results:
            continue
        messages.append({"role": m.role.value, "content": m.text})
        if thinking_key and m.role is Role.ASSISTANT:
            messages[-1][thinking_key] = m.thinking
        if m.calls:
            messages[-1]["tool_calls"] = [
                {
                    "type": "function",
                    "id": c.name,
                    "function": {"name": c.name, "arguments": json.loads(c.arguments)},
                }
                for c in m.calls
            ]
    return messages
