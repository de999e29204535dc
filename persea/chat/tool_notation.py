"""Tool calls of inferred families, parsed by transformers' declarative response templates.

A model's tokenizer may ship a `response_template`. Where it ships none, two notations that many
models share are tried, then the one that probing finds (`persea.chat.call_probing`); the proof by
rendering (`persea.chat.probing`) decides whether one is the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from persea.chat.families.qwen_xml_tools import resolve_call_types
from persea.chat.family import keep_calls_as_parsed
from persea.chat.messages import ContentPart, Tool, ToolCall

# <tool_call>{"name": "f", "arguments": {...}}</tool_call>, as in Hermes and Qwen
JSON_CALLS = {
    "start_anchor": "\0",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}
# <tool_call><function=f><parameter=x>1</parameter></function></tool_call>, as in Qwen3-Coder
KEY_BY_KEY_CALLS = {
    "start_anchor": "\0",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>",
            },
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
        "content": {"content": "text"},
    },
}


@dataclass(frozen=True)
class ToolNotation:
    """How a model writes tool calls.

    Attributes:
        name: Part of the digest of renderings.
        response_template: As `transformers.utils.chat_parsing` takes it.
    """

    name: str
    response_template: Mapping[str, Any]

    @property
    def texts(self) -> str:
        """All literal texts, in which control tokens are looked for."""
        return str(self.response_template)

    @property
    def has_typed_values(self) -> bool:
        """Whether the notation itself tells numbers from texts."""
        fields = self.response_template.get("fields")
        field = fields.get("tool_calls") if isinstance(fields, Mapping) else None
        return isinstance(field, Mapping) and field.get("content") == "json"

    def parse(self, text: str) -> tuple[str, tuple[ToolCall, ...]] | None:
        """Return (the text before the calls, the calls); None if a call is malformed."""
        from transformers.utils.chat_parsing import parse_response

        try:
            parsed = parse_response(text, dict(self.response_template), prefix="")
            calls = tuple(
                ToolCall.from_generated(c["function"]["name"], c["function"]["arguments"])
                for c in parsed.get("tool_calls") or ()
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        content = parsed.get("content") or ""
        found = tuple(c for c in calls if c is not None)
        if len(found) < len(calls) or not isinstance(content, str):
            return None
        return content, found

    def resolve(
        self, parts: tuple[ContentPart, ...], tools: tuple[Tool, ...]
    ) -> tuple[ContentPart, ...] | None:
        """Return `Family.resolve_calls`: give values without types those that the tools declare."""
        if self.has_typed_values:
            return keep_calls_as_parsed(parts, tools)
        return resolve_call_types(parts, tools)


def find_notations(response_template: object, template_text: str) -> tuple[ToolNotation, ...]:
    """Return the notations that a model may have; none for a template without tools.

    Args:
        response_template: What the tokenizer ships; None for nothing.
        template_text: The source of the chat template.
    """
    if "tools" not in template_text or "tool_calls" not in template_text:
        return ()
    found = []
    if isinstance(response_template, Mapping):
        found.append(ToolNotation("response template", response_template))
    if "<tool_call>" in template_text:
        is_key_by_key = "<function=" in template_text
        found.append(
            ToolNotation("key by key", KEY_BY_KEY_CALLS)
            if is_key_by_key
            else ToolNotation("json", JSON_CALLS)
        )
    return tuple(found)
