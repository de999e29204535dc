"""Qwen's tool calls key by key (Qwen3-Coder, Qwen 3.5).

    <tool_call>
    <function=f>
    <parameter=x>
    1
    </parameter>
    </function>
    </tool_call>

Values stand there bare: whether 1 is a number or a text, only the tool's schema says. `read_keys` reads every value as a text, `typed`
gives it the declared type. A call whose arguments would not come back so is refused when it is rendered.
"""

from __future__ import annotations

import json
import re
from typing import Any

from persea.chat.messages import ContentPart, Conversation, Tool, ToolCall, canonical_json
from persea.errors import DataError

XML_FUNCTION_PATTERN = re.compile(r"\s*<function=([^>\n]*)>\n(.*)</function>\s*", re.DOTALL)
XML_PARAMETER_PATTERN = re.compile(r"<parameter=([^>\n]*)>\n(.*?)\n</parameter>\n", re.DOTALL)
PYTHON_LITERALS = {"True": True, "False": False, "None": None}  # Jinja writes Python's


def parse_xml_call(text: str) -> ToolCall | None:
    """A call with every value as text; None where it is malformed."""
    function = XML_FUNCTION_PATTERN.fullmatch(text)
    if function is None:
        return None
    found, at = {}, 0
    for m in XML_PARAMETER_PATTERN.finditer(function[2]):
        if m.start() != at or m[1] in found:
            return None
        found[m[1]], at = m[2], m.end()
    return ToolCall.from_generated(function[1], found) if at == len(function[2]) else None


def resolve_call_types(
    parts: tuple[ContentPart, ...], tools: tuple[Tool, ...]
) -> tuple[ContentPart, ...] | None:
    """The calls among the parts with the types that the tools declare; a value that is not declared is JSON where it can be, else text."""
    said = tuple(_apply_schema_types(p, tools) if isinstance(p, ToolCall) else p for p in parts)
    return tuple(p for p in said if p is not None) if all(said) else None


def _apply_schema_types(call: ToolCall, tools: tuple[Tool, ...]) -> ToolCall | None:
    schema: dict[str, Any] = next(
        (json.loads(t.parameters) for t in tools if t.name == call.name), {}
    )
    properties = schema.get("properties")
    values = json.loads(call.arguments)
    for key, value in values.items():
        declared = properties.get(key) if isinstance(properties, dict) else None
        if isinstance(value, str) and not (
            isinstance(declared, dict) and declared.get("type") == "string"
        ):
            values[key] = _parse_value(value)
    return ToolCall.from_generated(call.name, values)


def _parse_value(text: str) -> Any:
    if text in PYTHON_LITERALS:
        return PYTHON_LITERALS[text]
    try:
        found = json.loads(text)
        canonical_json(json.dumps({"value": found}))
        return found
    except (ValueError, RecursionError):
        return text


def refuse_ambiguous_calls(conversation: Conversation, where: str) -> None:
    """Refuses a call whose arguments would be read back as others."""
    for k, m in enumerate(conversation.messages):
        for call in m.calls:
            pairs = "".join(
                f"<parameter={key}>\n{_format_value(value)}\n</parameter>\n"
                for key, value in json.loads(call.arguments).items()
            )
            read = parse_xml_call(f"<function={call.name}>\n{pairs}</function>")
            if read is None or _apply_schema_types(read, conversation.tools) != call:
                raise DataError(
                    f"the arguments of {call.name} in message {k} cannot be told apart when written key by key",
                    where=where,
                    remedy="declare the types of the tool's parameters; or leave the conversation out",
                )


def _format_value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
