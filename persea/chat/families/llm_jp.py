"""LLM-jp 4: gpt-oss's harmony format, with several calls in one turn.

    <|start|>assistant<|channel|>analysis<|message|>Two tools.<|end|>
    <|start|>assistant to=functions.f<|channel|>commentary <|constrain|> json<|message|>{}<|end|>
    <|start|>assistant to=functions.g<|channel|>commentary <|constrain|> json<|message|>{}<|call|>

LLM-jp 4.1 (`LLM_JP`) drops the thought before a call only once another question follows the final
answer; the template after it (`LLM_JP_LAST_THOUGHT`) has no thoughts but the last message's. With
both a finished conversation begins with the prompt that the model saw. The first LLM-jp 4 has
gpt-oss's own rules.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from persea.chat.families.gpt_oss import GPT_OSS, harmony_inputs, parse_harmony
from persea.chat.family import DecodedPieces, edit_texts
from persea.chat.messages import (
    ContentPart,
    Conversation,
    Message,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
    ToolCall,
)
from persea.errors import DataError


def normalise(conversation: Conversation) -> Conversation:
    """Keep thoughts of the last turn, and before calls that no earlier final answer follows."""
    messages = conversation.messages
    last = len(messages) - 1
    final = max(
        (k for k, m in enumerate(messages[:-1]) if m.role is Role.ASSISTANT and not m.calls),
        default=-1,
    )

    def change(k: int, m: Message, p: ContentPart) -> str:
        keeps = k > final if m.calls else k == last
        return "" if isinstance(p, Thinking) and not keeps else p.text

    return edit_texts(conversation, change)


def keep_last_thought(conversation: Conversation) -> Conversation:
    """Keep the thoughts of the last message alone."""
    last = len(conversation.messages) - 1

    def change(k: int, m: Message, p: ContentPart) -> str:
        return "" if isinstance(p, Thinking) and k != last else p.text

    return edit_texts(conversation, change)


def template_inputs(conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return messages, tools and the effort; refuse text in a turn with calls."""
    for k, m in enumerate(conversation.messages):
        if m.calls and m.text:
            raise DataError(
                f"message {k} has text and tool calls",
                where="llm-jp",
                remedy="the template writes the text as a thought; leave the conversation out",
            )
    return harmony_inputs(conversation)


def parse(pieces: DecodedPieces, effort: ThinkingEffort) -> tuple[ContentPart, ...] | None:
    """Parse thoughts and then the final channel, or one call after another."""
    parts = parse_harmony(pieces)
    if parts is None:
        return None
    begin = next((k for k, p in enumerate(parts) if not isinstance(p, Thinking)), len(parts))
    ends = parts[begin:]
    is_final = len(ends) == 1 and isinstance(ends[0], Text)
    has_calls = bool(ends) and all(isinstance(p, ToolCall) for p in ends)
    return parts if is_final or has_calls else None


LLM_JP = replace(
    GPT_OSS,
    name="llm-jp",
    template_signature="<|constrain|> json",
    normalise=normalise,
    template_inputs=template_inputs,
    parse=parse,
    random_config=None,
)
LLM_JP_LAST_THOUGHT = replace(LLM_JP, normalise=keep_last_thought, template_version="alpha_2.0")
