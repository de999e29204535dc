"""Suggest how the columns of a table map to persea's names, for the remedy of an error message."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Names that data sets have for a question and for its answer, the more specific ones first.
ASKED_NAMES = (
    "prompt question query instruction problem request user_message input_text source_text inputs "
    "input user human customer ask q text_in source"
).split()
ANSWERED_NAMES = (
    "answer response reply completion output solution assistant_message target_text output_text "
    "demonstration targets target outputs assistant bot gpt model agent a text_out gold expected"
).split()
# Columns that look like an answer or a text to answer from: one that nothing reads is refused.
ANSWER_LIKE = frozenset(
    "reply answers targets target_text output_text demonstration outputs".split()
)
CONTEXT_LIKE = frozenset("context passage document".split())


def suggest_columns(values: Mapping[str, Any]) -> str:
    """Return the mapping that reads a row, as it is written in a recipe.

    Args:
        values: The row, without what is null.

    Returns:
        Such as `columns: {prompt: query, answer: reply}`; "" where the names and types do not show
        it.

    Example:
        >>> suggest_columns({"query": "2 + 2?", "reply": "4", "id": 7})
        'columns: {prompt: query, answer: reply}'
    """
    for column, value in values.items():
        if keys := _keys_of_turns(value):
            name = "conversations" if "from" in keys else "messages"
            return written({name: column}) if column != name else ""
    texts = {k: v for k, v in values.items() if isinstance(v, str) and not _is_calls(v)}
    asked, answered = _named(texts, ASKED_NAMES), _named(texts, ANSWERED_NAMES)
    rest = [k for k in texts if k not in (asked, answered) and k.lower() not in ("id", "language")]
    if asked and not answered and len(texts) < len(values) and _has_calls(values):
        return ""  # the answers are calls, which no mapping of texts reads
    if asked and not answered and len(rest) == 1:
        answered = rest[0]
    if answered and not asked and len(rest) == 1:
        asked = rest[0]
    if not asked and not answered and len(rest) == 2:
        asked, answered = rest
    if not asked:
        return ""
    mapping = {"prompt": asked} | ({"answer": answered} if answered else {})
    return written({k: v for k, v in mapping.items() if k != v})


def written(mapping: Mapping[str, str]) -> str:
    """Return a mapping as it is written in a recipe; names that YAML would misread are quoted."""
    parts = (f"{name}: {_scalar(column)}" for name, column in mapping.items())
    return f"columns: {{{', '.join(parts)}}}"


def _scalar(column: str) -> str:
    words = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "~"}
    plain = column.replace("_", "a").replace("-", "a").isalnum() and not column[0].isdigit()
    is_plain = plain and column.isascii() and column.lower() not in words and column[0] != "-"
    return column if is_plain else json.dumps(column, ensure_ascii=False)


def _named(texts: Mapping[str, str], names: list[str]) -> str:
    by_name = {column.lower().replace(" ", "_"): column for column in texts}
    return next((by_name[name] for name in names if name in by_name), "")


def _keys_of_turns(value: Any) -> set[str]:
    """Return the keys of a list of turns, {role, content} or {from, value}; else nothing.

    A list without a turn of the user is somebody's answer, not a conversation.
    """
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        return set()
    roles = {turn.get("role", turn.get("from")) for turn in value}
    keys = set(value[0]) if roles & {"user", "human"} else set()
    return keys if {"role", "content"} <= keys or {"from", "value"} <= keys else set()


def _is_calls(text: str) -> bool:
    """Whether a text is the JSON of tools or of tool calls."""
    if text.lstrip()[:1] not in ("[", "{") or '"name"' not in text:
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _has_calls(values: Mapping[str, Any]) -> bool:
    return any(
        k.lower() in (*ANSWERED_NAMES, *ANSWER_LIKE) and isinstance(v, str) and _is_calls(v)
        for k, v in values.items()
    )
