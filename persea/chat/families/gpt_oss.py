"""gpt-oss: the harmony format with channels (analysis, commentary, final) and reasoning effort.

    <|start|>user<|message|>Hello<|end|><|start|>assistant<|channel|>analysis<|message|>A
    greeting.<|end|> <|start|>assistant<|channel|>final<|message|>Hi!<|return|>

Its own template cannot switch thinking off: the effort "none" is rendered as "low", and
`enable_thinking` is false, which a template with a direct mode may read (the sapling's does).
The template drops the thoughts of earlier turns and writes today's date; persea pins the date
(`persea.chat.messages.PINNED_DATE`).

    <|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"x": 1}<|call|>
    <|start|>functions.f to=assistant<|channel|>commentary<|message|>"42"<|end|>

One call a turn, and no text in that turn. The thought before a call is kept until a final answer
follows; then the template drops it, so a finished conversation differs from the prompt that the
model saw when it called. Models also write <|channel|>commentary to=functions.f <|constrain|>json,
which is parsed but never rendered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from persea.chat.families.tool_format import (
    messages_to_dicts,
    tools_to_json_schema,
    verbatim_unless_escaped,
)
from persea.chat.family import DecodedPieces, Family, edit_texts, pieces_to_text
from persea.chat.messages import (
    ContentPart,
    Conversation,
    Message,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
    ToolCall,
    ToolResult,
)
from persea.errors import DataError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

REASONING_EFFORT_NAMES = {
    ThinkingEffort.NONE: "low",
    ThinkingEffort.LOW: "low",
    ThinkingEffort.MEDIUM: "medium",
    ThinkingEffort.HIGH: "high",
}
RECIPIENT_PATTERN = re.compile(r" to=functions\.(\S+)")


def normalise(conversation: Conversation) -> Conversation:
    """Keep thoughts of the last turn, and before calls that no final answer follows."""
    messages = conversation.messages
    final = max(
        (k for k, m in enumerate(messages) if m.role is Role.ASSISTANT and not m.calls), default=-1
    )

    def change(k: int, m: Message, p: ContentPart) -> str:
        keeps = k > final if m.calls else k == len(messages) - 1
        return "" if isinstance(p, Thinking) and not keeps else p.text

    return edit_texts(conversation, change)


def template_inputs(conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return messages with the thought as `thinking`, tools, and the effort.

    Conversations that the template would change are refused.
    """
    last_call = ""
    for k, m in enumerate(conversation.messages):
        if len(m.calls) > 1 or (m.calls and m.text):
            raise DataError(
                f"message {k} has {len(m.calls)} tool calls" + (" and text" if m.text else ""),
                where="gpt-oss",
                remedy="the template writes one call a turn and no text; "
                "leave the conversation out",
            )
        last_call = m.calls[0].name if m.calls else last_call
        for p in m.parts:
            if isinstance(p, ToolResult) and p.name != last_call:
                raise DataError(
                    f"message {k} is the result of {p.name}, "
                    f"but the last call is of {last_call or 'no tool'}",
                    where="gpt-oss",
                    remedy="the template names a result after the last call; "
                    "leave the conversation out",
                )
    return harmony_inputs(conversation)


def harmony_inputs(conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return messages with the thought as `thinking`, tools, and the effort."""
    messages = messages_to_dicts(conversation, "thinking")
    for message in messages:
        if not message.get("thinking", "x"):
            del message["thinking"]
    tools = tools_to_json_schema(conversation.tools)
    switch = {"enable_thinking": False} if conversation.effort is ThinkingEffort.NONE else {}
    return messages, {"reasoning_effort": REASONING_EFFORT_NAMES[conversation.effort]} | switch | (
        {"tools": tools} if tools else {}
    )


def parse(pieces: DecodedPieces, effort: ThinkingEffort) -> tuple[ContentPart, ...] | None:
    """Parse messages; the last one is the final channel or a call, all others are thoughts."""
    parts = parse_harmony(pieces)
    if parts is None:
        return None
    ends = [not isinstance(p, Thinking) for p in parts]
    return parts if ends and ends[-1] and sum(ends) == 1 else None


def parse_harmony(pieces: DecodedPieces) -> tuple[ContentPart, ...] | None:
    """Parse ([ to=NAME]<|channel|>NAME<|message|>TEXT) joined by <|end|><|start|>assistant."""
    parts: list[ContentPart] = []
    rest = list(pieces)
    while rest:
        end = rest.index("<|end|>") if "<|end|>" in rest else len(rest)
        part = _parse_message(rest[:end])
        if part is None:
            return None
        parts.append(part)
        rest = rest[end:]
        if rest:
            if (
                rest[:2] != ["<|end|>", "<|start|>"]
                or len(rest) < 4
                or not isinstance(rest[2], bytes)
                or not rest[2].startswith(b"assistant")
            ):
                return None
            role = rest[2].removeprefix(b"assistant")
            rest = [role, *rest[3:]] if role else rest[3:]
    return tuple(parts)


def _parse_message(pieces: DecodedPieces) -> ContentPart | None:
    """Parse one message after its <|start|>assistant."""
    if "<|message|>" not in pieces:
        return None
    cut = list(pieces).index("<|message|>")
    body = pieces_to_text(pieces[cut + 1 :])
    if body is None:
        return None
    if list(pieces[:cut]) == ["<|channel|>", b"analysis"]:
        return Thinking(body)
    if list(pieces[:cut]) == ["<|channel|>", b"final"]:
        return Text(body)
    head = "".join(
        p if isinstance(p, str) else p.decode() for p in pieces[:cut] if p != "<|constrain|>"
    )
    before, channel, behind = head.partition("<|channel|>commentary")
    recipient = RECIPIENT_PATTERN.fullmatch(before) if before else RECIPIENT_PATTERN.match(behind)
    if (
        not channel
        or recipient is None
        or (behind if before else behind[recipient.end() :]).strip() not in ("json", "")
    ):
        return None
    return ToolCall.from_generated(recipient[1], body)


def _random_config(common: dict[str, Any], sizes: Mapping[str, int]) -> PretrainedConfig:
    from transformers import GptOssConfig

    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    return GptOssConfig(
        intermediate_size=common["hidden_size"],
        num_local_experts=sizes.get("experts", 4),
        num_experts_per_tok=2,
        sliding_window=128,
        **(common | {"rope_parameters": rope}),
    )


GPT_OSS = Family(
    name="gpt-oss",
    signature_token="<|channel|>",
    efforts=(ThinkingEffort.LOW, ThinkingEffort.MEDIUM, ThinkingEffort.HIGH),
    stop_tokens=("<|return|>", "<|call|>"),
    normalise=normalise,
    template_inputs=template_inputs,
    parse=parse,
    is_tool_text_verbatim=verbatim_unless_escaped,
    thought_ends=(("<|end|>", "<|start|>", b"assistant", "<|channel|>", b"final", "<|message|>"),),
    random_config=_random_config,
)
