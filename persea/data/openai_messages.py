"""Messages and tools in OpenAI's form, as data sets hold them and clients send them.

Everything that changes the meaning of a conversation is read or refused: tool calls with arguments
as text or as an object, results of tools, thoughts in fields of their own or between marks in the
text. `null` means that a value is absent.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from persea.chat.messages import (
    ContentPart,
    Message,
    Role,
    Text,
    Thinking,
    Tool,
    ToolCall,
    ToolResult,
    canonical_json,
)
from persea.errors import DataError

ROLES: Mapping[str, Role] = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
    "function": Role.TOOL,
}
# Fields of an assistant's message that hold its thought, by different servers and data sets.
THINKING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
# Marks around a thought at the beginning of an answer's text.
TEXT_THOUGHT_MARKS = (("<think>", "</think>"), ("<thinking>", "</thinking>"))
MESSAGES_REMEDY = (
    'a message is {"role": "user", "content": "..."}; an assistant may have tool_calls and '
    "reasoning_content, a tool a tool_call_id"
)
# Marks of calls in a text: what follows is a call that a template wrote, not text.
CALL_MARKS = ("<tool_call>", "<function_call>", "[TOOL_CALLS]")
PICTURE_REMEDY = "persea teaches text; leave rows with pictures, sound and files out"


def parse_messages(
    rows: Any, where: str, *, refuse_stray_marks: bool = True
) -> tuple[Message, ...]:
    """Read messages.

    Args:
        rows: A list of objects with role and content.
        where: Location for error messages.
        refuse_stray_marks: Whether an answer with the mark of a thought inside its text is
            refused, as in data to learn from, instead of taken as it is.

    Returns:
        Messages; results of several tools that follow each other are one message.

    Raises:
        DataError: Something is malformed, or cannot be learned, such as a picture.

    Example:
        >>> from persea.data.openai_messages import parse_messages
        >>> user, assistant = parse_messages(
        ...     [{"role": "user", "content": "2 + 2?"},
        ...      {"role": "assistant", "content": "<think>Add.</think>4"}], "line 1")
        >>> assistant.thinking, assistant.text
        ('Add.', '4')
    """
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        _refuse(f"the messages are {_kind(rows)}, not a list of objects", where)
    if not rows:
        _refuse("the list of messages is empty", where)
    messages: list[Message] = []
    names: dict[str, str] = {}
    for k, row in enumerate(rows):
        here = f"{where}, message {k + 1}"
        if not isinstance(row, Mapping):
            _refuse(f"a message is {_kind(row)}", here)
        role = ROLES.get(str(row.get("role")))
        if role is None:
            _refuse(f"a message has role {row.get('role')!r}", here)
        parts = _parse_parts(row, role, names, here, refuse_stray_marks)
        if role is Role.TOOL and messages and messages[-1].role is Role.TOOL:
            messages[-1] = Message(role, (*messages[-1].parts, *parts))
        else:
            messages.append(Message(role, parts))
    return tuple(messages)


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether an assistant's message may be learned: OpenAI's `weight: 0` says that it may not."""
    return message.get("weight") != 0


def _parse_parts(
    row: Mapping[str, Any],
    role: Role,
    names: dict[str, str],
    where: str,
    refuse_stray_marks: bool,
) -> tuple[ContentPart, ...]:
    # OpenAI writes an answer that refuses into a field of its own
    text = _content_text(row.get("content"), where) or _content_text(row.get("refusal"), where)
    thinking = [row[key] for key in THINKING_KEYS if row.get(key)]
    calls = _calls_of(row, where)
    if role is not Role.ASSISTANT and (thinking or calls):
        _refuse("only the assistant may have thinking and tool calls", where)
    if role is Role.TOOL:
        name = names.get(str(row.get("tool_call_id")), row.get("name") or names.get("", ""))
        if not name:
            _refuse(f"a tool result without a call: {row.get('tool_call_id')!r}", where)
        return (ToolResult(str(name), text),)
    if role is not Role.ASSISTANT:
        return (Text(text),)
    if refuse_stray_marks:
        _refuse_written_calls(text, where)
    if any(not isinstance(t, str) for t in thinking) or len(set(thinking)) > 1:
        _refuse("its thought is not one text", where)
    try:
        thought, text = separate_thought(text, where)
    except DataError:
        if refuse_stray_marks:
            raise
        thought = ""
    if thinking and thought:
        _refuse("it has a thought in a field of its own and another one in its text", where)
    thought = unicodedata.normalize("NFC", thinking[0]) if thinking else thought
    parts: list[ContentPart] = [Thinking(thought)] if thought else []
    if text or not calls:
        parts.append(Text(text))
    for call_id, call in calls:
        names[call_id] = names[""] = call.name
        parts.append(call)
    return tuple(parts)


def _refuse_written_calls(text: str, where: str) -> None:
    """Refuse a call that a template wrote into the text: it would be learned as letters."""
    if mark := next((m for m in CALL_MARKS if m in text), ""):
        raise DataError(
            f"a call is written in its text: {mark}",
            where=where,
            remedy='write it as "tool_calls": [{"function": {"name": ..., "arguments": {...}}}], '
            "and the tools in `tools`",
        )


def _content_text(content: Any, where: str) -> str:
    """Return the text of a message's content: a text, null, or a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return unicodedata.normalize("NFC", content)
    texts = []
    for part in content if isinstance(content, Sequence) else [content]:
        if not isinstance(part, Mapping):
            _refuse(f"its content is {_kind(content)}, not a text", where)
        kind = part.get("type", "text")
        if kind not in ("text", "input_text", "output_text"):
            raise DataError(
                f"its content holds a part of type {str(kind)[:40]!r}",
                where=where,
                remedy=MESSAGES_REMEDY if "tool" in str(kind) else PICTURE_REMEDY,
            )
        part_text = part.get("text", part.get("value"))  # `value` in LLaMA-Factory's lists
        if not isinstance(part_text, str):
            _refuse("a text part of its content has no text", where)
        texts.append(part_text)
    return unicodedata.normalize("NFC", "".join(texts))


def _calls_of(row: Mapping[str, Any], where: str) -> list[tuple[str, ToolCall]]:
    """Return (id, call) of each tool call, also of OpenAI's older function_call."""
    found: list[tuple[str, ToolCall]] = []
    calls = list(row.get("tool_calls") or ())
    if row.get("function_call"):
        calls.append({"function": row["function_call"]})
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        function = call if function is None and isinstance(call, Mapping) else function
        if not isinstance(function, Mapping):
            _refuse(f"a tool call is {_kind(call)}", where)
        arguments = function.get("arguments")
        arguments = {} if arguments in (None, "") else arguments
        if isinstance(arguments, Mapping):  # tables fill the arguments of other rows' tools in
            arguments = {key: value for key, value in arguments.items() if value is not None}
        read = ToolCall.from_generated(function.get("name"), arguments)
        if read is None:
            name = str(function.get("name"))[:40]
            _refuse(
                f"{name!r} is no name of a tool"
                if ToolCall.from_generated(function.get("name"), {}) is None
                else f"the arguments of its call of {name!r} are no JSON object: "
                f"{str(arguments)[:60]!r}",
                where,
            )
        found.append((str(call.get("id") or ""), read))
    return found


def separate_thought(text: str, where: str) -> tuple[str, str]:
    """Return (thought, text) of an answer whose thought stands between marks at its beginning.

    A closing mark without an opening one ends a thought that the template opened in the prompt.

    Raises:
        DataError: A mark is left open, or stands elsewhere in the text.
    """
    for opening, closing in TEXT_THOUGHT_MARKS:
        if opening not in text and closing not in text:
            continue
        start = text.lstrip().removeprefix(opening)
        thought, mark, rest = start.partition(closing)
        if not mark or opening in thought or opening in rest or closing in rest:
            _refuse(f"the mark {opening} or {closing} is not at the beginning of its text", where)
        return thought.strip("\n"), rest.lstrip("\n")
    return "", text


def parse_tools(value: Any, where: str) -> tuple[Tool, ...]:
    """Read tools: OpenAI's form, bare functions, or JSON text of either.

    Raises:
        DataError: A tool has no name, or parameters that are no JSON schema.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError) as error:
            raise DataError(
                "the tools are not JSON", where=where, remedy="give a list of tools"
            ) from error
    tools: list[Tool] = []
    for entry in value or ():
        function = entry.get("function", entry) if isinstance(entry, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            _refuse(f"a tool is {_kind(entry)}, without a name", where)
        parameters = function.get("parameters")
        if parameters is None:
            parameters = function.get("input_schema") or {}
        try:
            text = canonical_json(
                parameters
                if isinstance(parameters, str)
                else json.dumps(_without_nulls(parameters))
            )
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"the parameters of tool {function['name'][:40]} are not plain JSON",
                where=where,
                remedy="give a JSON schema",
            ) from error
        description = function.get("description") or ""
        tools.append(Tool(function["name"], unicodedata.normalize("NFC", str(description)), text))
    return tuple(tools)


def _without_nulls(value: Any) -> Any:
    """Return JSON without null values: tables fill the keys of other rows in with them.

    Lists keep their nulls: a schema's `enum` may name one.
    """
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _refuse(reason: str, where: str) -> NoReturn:
    raise DataError(reason, where=where, remedy=MESSAGES_REMEDY)
