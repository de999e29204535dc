"""Tool calls written key by key, as in Qwen3-Coder and Qwen 3.5.

    <tool_call>
    <function=f>
    <parameter=x>
    1
    </parameter>
    </function>
    </tool_call>

Values are written bare: only the tool's schema decides whether 1 is a number or a text.
`parse_xml_call` reads every value as text, `resolve_call_types` gives it the declared type. A call
whose arguments would be parsed back differently is refused when it is rendered.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from persea.chat.messages import ContentPart, Conversation, Tool, ToolCall, canonical_json
from persea.errors import DataError

XML_FUNCTION_PATTERN = re.compile(r"\s*<function=([^>\n]*)>\n(.*)</function>\s*", re.DOTALL)
XML_PARAMETER_PATTERN = re.compile(r"<parameter=([^>\n]*)>\n(.*?)\n</parameter>\n", re.DOTALL)
PYTHON_LITERALS = {"True": True, "False": False, "None": None}  # Jinja writes Python literals


def parse_xml_call(text: str) -> ToolCall | None:
    """Parse a call with every value as text; None if it is malformed."""
    function = XML_FUNCTION_PATTERN.fullmatch(text)
    if function is None:
        return None
    arguments, at = {}, 0
    for m in XML_PARAMETER_PATTERN.finditer(function[2]):
        if m.start() != at or m[1] in arguments:
            return None
        arguments[m[1]], at = m[2], m.end()
    return ToolCall.from_generated(function[1], arguments) if at == len(function[2]) else None


def resolve_call_types(
    parts: tuple[ContentPart, ...], tools: tuple[Tool, ...]
) -> tuple[ContentPart, ...] | None:
    """Give the arguments of calls the types that the tools declare.

    A value without a declaration becomes JSON if it can be parsed, else it stays text. None if a
    call is malformed.
    """
    resolved = tuple(_apply_schema_types(p, tools) if isinstance(p, ToolCall) else p for p in parts)
    return tuple(p for p in resolved if p is not None) if all(resolved) else None


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
    for read in (json.loads, _read_python) if text[:1] in ("{", "[") else (json.loads,):
        try:
            value = read(text)
            canonical_json(json.dumps({"value": value}))
            return value
        except (ValueError, TypeError, RecursionError, MemoryError):
            continue
    return text


def _read_python(text: str) -> Any:
    """Return a mapping or list as Jinja prints it.

    Raises:
        ValueError: It is none.
    """
    try:
        return ast.literal_eval(text)
    except SyntaxError as error:
        raise ValueError(str(error)) from error


def refuse_ambiguous_calls(conversation: Conversation, where: str) -> None:
    """Refuse a call whose arguments would be parsed back differently.

    Raises:
        DataError: There is such a call.
    """
    for k, m in enumerate(conversation.messages):
        for call in m.calls:
            pairs = "".join(
                f"<parameter={key}>\n{_format_value(value)}\n</parameter>\n"
                for key, value in json.loads(call.arguments).items()
            )
            read = parse_xml_call(f"<function={call.name}>\n{pairs}</function>")
            if read is None or _apply_schema_types(read, conversation.tools) != call:
                raise DataError(
                    f"the arguments of {call.name} in message {k} are ambiguous "
                    "when written key by key",
                    where=where,
                    remedy="declare the types of the tool's parameters, "
                    "or leave the conversation out",
                )


def _format_value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
