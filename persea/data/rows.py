"""One row of a data set as a conversation and its answer: the shapes that data sets have.

The rule: a key that changes the meaning is used, or refused with the mapping that would read it; a
key that does not is named once by the reader. `null` means that a value is absent.

shape           keys
messages        `messages`, with `tools` or `functions`; UltraChat's `prompt` may stand beside
sharegpt        `conversations` of {from, value}
completion      `prompt` and `completion`: texts, or lists of messages
preference      `chosen`, with or without `prompt` (or `question`); `rejected` is not learned
kto             `prompt`, `completion` and `label`; undesirable ones are left out
alpaca          `instruction` with `output` (or `response`, `answer`), `input` (or `context`),
                `history`, `system`
question        `question` and `answer`
prompt          `prompt`, with `answer` or `response`
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from persea.chat.messages import ContentPart, Conversation, Message, Role, Text
from persea.data.column_names import ANSWER_LIKE, CONTEXT_LIKE, suggest_columns, written
from persea.data.openai_messages import is_learned, parse_messages, parse_tools
from persea.errors import DataError

# Keys that say what is asked, answered, or how: one that nothing reads is refused.
MEANINGFUL_KEYS = frozenset(
    "answer chosen completion conversations conversation functions history image images input "
    "instruction label messages output prompt question audio audios video videos reasoning "
    "reasoning_content rejected response system system_prompt text thinking tools context passage "
    "document".split()
)
MEDIA_KEYS = frozenset("image images audio audios video videos".split())
# Keys that `columns:` may map to.
CANONICAL_KEYS = tuple(sorted(MEANINGFUL_KEYS | {"id", "skill", "language"}))
SHAREGPT_ROLES: Mapping[str, str] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True)
class Row:
    """A conversation with its answers.

    Attributes:
        conversation: All messages, the assistant's among them, and the tools.
        shape: Name of the shape.
        unread_keys: Keys that change nothing and were not read.
        left_out: Why the row must not be learned, such as an undesirable answer; "" otherwise.
        unlearned: Assistant's messages, counted from 0, that `weight: 0` keeps from being learned.
    """

    conversation: Conversation
    shape: str
    unread_keys: tuple[str, ...] = ()
    left_out: str = ""
    unlearned: frozenset[int] = frozenset()

    def turns(self, *, last_only: bool) -> list[tuple[Conversation, tuple[ContentPart, ...]]]:
        """Return (question, answer) of the assistant's turns; the answer is () if there is none.

        Args:
            last_only: Only the last turn, instead of every one.
        """
        c = self.conversation
        answered = [k for k, m in enumerate(c.messages) if m.role is Role.ASSISTANT]
        if not answered or c.messages[-1].role is not Role.ASSISTANT:
            is_open = c.messages[-1].role in (Role.USER, Role.TOOL)
            whole: list[tuple[Conversation, tuple[ContentPart, ...]]] = [(c, ())] * is_open
            learned = self._learned(answered)
            return whole if last_only or not answered else [*self._pairs(learned), *whole]
        learned = self._learned(answered)
        return self._pairs(learned[-1:] if last_only else learned)

    def _learned(self, answered: list[int]) -> list[int]:
        return [k for number, k in enumerate(answered) if number not in self.unlearned]

    def _pairs(self, answered: list[int]) -> list[tuple[Conversation, tuple[ContentPart, ...]]]:
        c = self.conversation
        return [
            (Conversation(c.messages[:k], c.effort, c.tools), c.messages[k].parts)
            for k in answered
            if k and c.messages[k - 1].role in (Role.USER, Role.TOOL)
        ]


# (values that are there, location) -> messages, keys that were read, why the row is left out.
_Shape: TypeAlias = Callable[[Mapping[str, Any], str], "tuple[tuple[Message, ...], set[str], str]"]


def parse_row(row: Any, where: str, columns: Mapping[str, str] | None = None) -> Row:
    r"""Read a row of any known shape.

    Args:
        row: The row: column -> value.
        where: file:line, for error messages.
        columns: Name as persea reads it -> column of the data set, such as {"prompt": "query"}.

    Returns:
        The row as a conversation.

    Raises:
        DataError: The row has no known shape, holds pictures, or has a key that changes its meaning
            and that nothing reads. The remedy is the mapping that would read it.

    Example:
        >>> from persea.data.rows import parse_row
        >>> row = parse_row({"instruction": "Translate.", "input": "one", "output": "satu"}, "x:1")
        >>> row.shape, [m.text for m in row.conversation.messages]
        ('alpaca', ['Translate.\n\none', 'satu'])
    """
    if not isinstance(row, Mapping):
        raise DataError(
            f"a row is {type(row).__name__}, not an object", where=where, remedy=_shapes_remedy()
        )
    values = _rename_columns(row, columns or {}, where)
    if media := sorted(MEDIA_KEYS & values.keys()):
        raise DataError(
            f"`{media[0]}`: persea teaches text only",
            where=where,
            remedy="leave rows with pictures, sound and video out",
        )
    shape, parse = _find_shape(values, where)
    messages, read_keys, left_out = parse(values, where)
    read_keys |= {"id", "skill", "language", "tools", "functions", "system", "system_prompt"}
    _refuse_unread(values, read_keys, messages, where)
    messages = _with_system(messages, values, where)
    tools = parse_tools(values.get("tools", values.get("functions")), where)
    _refuse_impossible(messages, where)
    rest = tuple(sorted(values.keys() - read_keys))
    unlearned = _unlearned(values.get("messages"))
    if unlearned and len(unlearned) == sum(m.role is Role.ASSISTANT for m in messages):
        left_out = left_out or "every answer has weight 0"
    return Row(Conversation(messages, tools=tools), shape, rest, left_out, unlearned)


def _unlearned(messages: Any) -> frozenset[int]:
    """Return the assistant's messages, counted from 0, that have `weight: 0`."""
    rows = messages if isinstance(messages, list) else []
    answers = [m for m in rows if isinstance(m, Mapping) and m.get("role") == "assistant"]
    return frozenset(k for k, m in enumerate(answers) if not is_learned(m))


def _refuse_unread(
    values: Mapping[str, Any],
    read_keys: set[str],
    messages: tuple[Message, ...],
    where: str,
) -> None:
    """Refuse a key that changes what the row means and that nothing reads."""
    unread = sorted((MEANINGFUL_KEYS & values.keys()) - read_keys)
    if not any(m.role is Role.ASSISTANT for m in messages):
        unread += sorted((ANSWER_LIKE & values.keys()) - read_keys)
    if not unread:
        return
    key, read = unread[0], read_keys & values.keys()
    remedy = f"leave it unread with `{written({key: ''})}`"
    asked = next((k for k in ("question", "prompt", "instruction") if k in read), "")
    if key in CONTEXT_LIKE and asked and isinstance(values[key], str):
        mapping = {"instruction": asked, "input": key}
        mapping = {k: v for k, v in mapping.items() if k != v}
        remedy = f"map it with `{written(mapping)}`, or {remedy}"
    elif key not in CONTEXT_LIKE and isinstance(values[key], str) and asked:
        remedy = f"map it with `{written({'answer': key})}`, or {remedy}"
    raise DataError(
        f"`{key}` changes what the row means, and nothing reads it beside "
        f"{' and '.join(f'`{k}`' for k in sorted(read))}",
        where=where,
        remedy=remedy,
    )


def _rename_columns(
    row: Mapping[str, Any], columns: Mapping[str, str], where: str
) -> dict[str, Any]:
    """Return the values that are not null, under persea's names."""
    dropped = {name for name, column in columns.items() if not column}
    columns = {name: column for name, column in columns.items() if column}
    if unknown := sorted(columns.keys() - set(CANONICAL_KEYS)):
        raise DataError(
            f"`columns:` maps {unknown[0]!r}, a name that persea does not read",
            where=where,
            remedy=f"use {', '.join(CANONICAL_KEYS)}",
        )
    if missing := [column for column in columns.values() if column not in row]:
        raise DataError(
            f"no column `{missing[0]}`",
            where=where,
            remedy=f"the row has {', '.join(sorted(map(str, row)))}; correct `columns:`, or give "
            "rows of another shape a file and a part of their own",
        )
    taken = set(columns.values())
    values = {k: v for k, v in row.items() if v is not None and k not in taken | dropped}
    renamed = {name: row[column] for name, column in columns.items() if row[column] is not None}
    # A mapped name stands for its column alone: the row's own column of that name is not read.
    return {k: v for k, v in values.items() if k not in columns} | renamed


def _find_shape(values: Mapping[str, Any], where: str) -> tuple[str, _Shape]:
    for name, needed, parse in _SHAPES:
        if all(key in values for key in needed):
            return name, parse
    if isinstance(values.get("text"), str):
        raise DataError(
            "`text` alone is no conversation",
            where=where,
            remedy="teach plain texts with `texts:` instead of `file:`",
        )
    raise DataError(
        f"the row has {', '.join(f'`{k}`' for k in sorted(map(str, values))[:8]) or 'nothing'}: no "
        "known shape",
        where=where,
        remedy=f"map it with `{mapping}`"
        if (mapping := suggest_columns(values))
        else _shapes_remedy(),
    )


def _shapes_remedy() -> str:
    return (
        'a line is {"prompt": "...", "answer": "..."} or {"messages": [{"role": "user", '
        '"content": "..."}]}; other names are mapped with `columns: {prompt: query, answer: reply}`'
    )


# --- shapes ---


def _messages_shape(values: Mapping[str, Any], where: str) -> tuple[Any, set[str], str]:
    messages = parse_messages(values["messages"], where)
    read = {"messages"}
    first = next((m.text for m in messages if m.role is Role.USER), "")
    if isinstance(values.get("prompt"), str) and _nfc(values["prompt"]).strip() == first.strip():
        read.add("prompt")  # UltraChat repeats the first question
    return messages, read, ""


def _sharegpt_shape(values: Mapping[str, Any], where: str) -> tuple[Any, set[str], str]:
    key = "conversations" if "conversations" in values else "conversation"
    rows: list[Any] = []
    for k, one in enumerate(values[key] if isinstance(values[key], list) else ()):
        if not isinstance(one, Mapping):
            _refuse(f"turn {k + 1} is not an object", where)
        if "role" in one or "from" not in one:
            rows.append(one)
            continue
        role = SHAREGPT_ROLES.get(str(one["from"]))
        if role is None:
            _refuse(f"turn {k + 1} is from {one['from']!r}", where)
        if role != "call":
            rows.append({"role": role, "content": one.get("value")})
            continue
        call = _json_value(one.get("value"), where)
        calls = call if isinstance(call, list) else [call]
        rows.append({"role": "assistant", "tool_calls": calls})
    return parse_messages(rows, where), {key}, ""


def _completion_shape(values: Mapping[str, Any], where: str) -> tuple[Any, set[str], str]:
    messages = (
        *_turns(values["prompt"], "user", where),
        *_turns(values["completion"], "assistant", where),
    )
    return messages, {"prompt", "completion"}, ""


def _kto_shape(values: Mapping[str, Any], where: str) -> tuple[Any, set[str], str]:
    if values["label"] not in (True, False, 0, 1):
        _refuse(f"`label` is {values['label']!r}, not true or false", where)
    messages, read, _ = _completion_shape(values, where)
    return messages, read | {"label"}, "" if values["label"] else "an undesirable answer"


def _preference_shape(values: Mapping[str, Any], where: str) -> tuple[Any, set[str], str]:
    chosen = _turns(values["chosen"], "assistant", where)
    read = {"chosen", "rejected"}
    asked = next((k for k in ("prompt", "question", "instruction") if k in values), "")
    if not asked:
        return chosen, read, ""
    prompt = _turns(values[asked], "user", where)
    if chosen[: len(prompt)] == prompt:  # the chosen conversation repeats its question
        prompt = ()
    return (*prompt, *chosen), read | {asked}, ""


def _alpaca_shape(values: Mapping[str, Any], where: str) -> tuple[Any, set[str], str]:
    question = _text(values["instruction"], "instruction", where)
    given = next((k for k in ("input", "context") if k in values), "input")
    answer = next((k for k in ("output", "response", "answer") if k in values), "output")
    if extra := _text(values.get(given, ""), given, where):
        question = f"{question}\n\n{extra}" if question else extra
    messages: list[Message] = []
    for pair in values.get("history") or ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            _refuse("`history` is not a list of [question, answer]", where)
        messages += _turns(pair[0], "user", where) + _turns(pair[1], "assistant", where)
    messages += _turns(question, "user", where)
    if answer in values:
        messages += _turns(values[answer], "assistant", where)
    return tuple(messages), {"instruction", given, answer, "history"}, ""


def _question_shape(values: Mapping[str, Any], where: str) -> tuple[Any, set[str], str]:
    asked = next(key for key in ("prompt", "question") if key in values)
    answered = [key for key in ("answer", "response", "output") if key in values]
    messages = _turns(values[asked], "user", where)
    read = {asked, *answered[:1]}
    thought = [k for k in ("reasoning_content", "reasoning", "thinking") if k in values]
    if answered and not isinstance(values[answered[0]], list):
        answer = {"role": "assistant", "content": values[answered[0]]}
        answer |= {k: values[k] for k in thought}
        messages += parse_messages([answer], where)
        read |= set(thought)
    elif answered:
        messages += _turns(values[answered[0]], "assistant", where)
    return messages, read, ""


_SHAPES: tuple[tuple[str, tuple[str, ...], _Shape], ...] = (
    ("messages", ("messages",), _messages_shape),
    ("sharegpt", ("conversations",), _sharegpt_shape),
    ("sharegpt", ("conversation",), _sharegpt_shape),
    ("preference", ("chosen",), _preference_shape),
    ("kto", ("prompt", "completion", "label"), _kto_shape),
    ("completion", ("prompt", "completion"), _completion_shape),
    ("alpaca", ("instruction",), _alpaca_shape),
    ("question", ("question",), _question_shape),
    ("prompt", ("prompt",), _question_shape),
)


# --- pieces ---


def _turns(value: Any, role: str, where: str) -> tuple[Message, ...]:
    """Return a text as one message of a role, or a list of messages as they are."""
    if isinstance(value, str):
        return parse_messages([{"role": role, "content": value}], where)
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        _refuse(f"the {role}'s turn is {type(value).__name__}, not a text or messages", where)
    return parse_messages(value, where)


def _with_system(
    messages: tuple[Message, ...], values: Mapping[str, Any], where: str
) -> tuple[Message, ...]:
    """Return the messages behind the row's own system text."""
    key = "system" if "system" in values else "system_prompt"
    system = _text(values.get(key, ""), key, where)
    if not system:
        return messages
    if messages and messages[0].role is Role.SYSTEM:
        if messages[0].text == system:
            return messages
        _refuse(f"`{key}` differs from the conversation's own system message", where)
    return (Message(Role.SYSTEM, (Text(system),)), *messages)


def _refuse_impossible(messages: tuple[Message, ...], where: str) -> None:
    if not any(m.role in (Role.USER, Role.TOOL) for m in messages):
        _refuse("the messages hold no user turn to answer", where)
    for k, message in enumerate(messages):
        if message.role is Role.SYSTEM and k:
            _refuse(f"message {k + 1} is a system message in the middle", where)
        if message.role is Role.TOOL and (not k or messages[k - 1].role is not Role.ASSISTANT):
            _refuse(f"message {k + 1} is a tool's result without a call before it", where)


def _json_value(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        _refuse(f"a function call is not JSON: {value[:40]!r}", where)


def _text(value: Any, key: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        _refuse(f"`{key}` is {type(value).__name__}, not a text", where)
    return _nfc(value)


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _refuse(reason: str, where: str) -> NoReturn:
    raise DataError(reason, where=where, remedy=_shapes_remedy())
