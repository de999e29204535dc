"""gpt-oss: harmony. Channels (analysis, commentary, final) and reasoning effort low, medium, high.

    <|start|>user<|message|>Hello<|end|><|start|>assistant<|channel|>analysis<|message|>A greeting.<|end|>
    <|start|>assistant<|channel|>final<|message|>Hi!<|return|>

Its own template cannot tell it not to think: Effort.NONE is asked for as "low", and besides with `enable_thinking` false, which a template
that has a direct mode may read (the sapling's does). Thoughts of earlier turns are dropped by the
template. The template writes today's date; persea pins it (`chat.PINNED_DATE`).

    <|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"x": 1}<|call|>
    <|start|>functions.f to=assistant<|channel|>commentary<|message|>"42"<|end|>

One call a turn, no words beside it. The thought before a call is kept until a final answer follows: then the template drops it,
so that a finished conversation is not what the model saw while it called. Models also say
<|channel|>commentary to=functions.f <|constrain|>json: read, never written.
"""

from __future__ import annotations

import re
from typing import Any

from persea.chat.families.tool_format import (
    messages_to_dicts,
    tools_to_json_schema,
    verbatim_unless_escaped,
)
from persea.chat.messages import (
    ContentPart,
    Conversation,
    DecodedPieces,
    Family,
    Message,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
    ToolCall,
    ToolResult,
    edit_texts,
    pieces_to_text,
)
from persea.errors import DataError

REASONING_EFFORT_NAMES = {
    ThinkingEffort.NONE: "low",
    ThinkingEffort.LOW: "low",
    ThinkingEffort.MEDIUM: "medium",
    ThinkingEffort.HIGH: "high",
}
RECIPIENT_PATTERN = re.compile(r" to=functions\.(\S+)")


def normalise(conversation: Conversation) -> Conversation:
    """Thoughts kept in the last turn, and before calls that no final answer follows."""
    messages = conversation.messages
    final = max(
        (k for k, m in enumerate(messages) if m.role is Role.ASSISTANT and not m.calls), default=-1
    )

    def change(k: int, m: Message, p: ContentPart) -> str:
        keeps = k > final if m.calls else k == len(messages) - 1
        return "" if isinstance(p, Thinking) and not keeps else p.text

    return edit_texts(conversation, change)


def template_inputs(conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages with the thought as `thinking`; tools; the effort by name. Refuses what the template would lose."""
    called = ""
    for k, m in enumerate(conversation.messages):
        if len(m.calls) > 1 or (m.calls and m.text):
            raise DataError(
                f"message {k} has {len(m.calls)} tool calls"
                + (" and words beside them" if m.text else ""),
                where="gpt-oss",
                remedy="its template writes one call a turn and nothing beside it; leave the conversation out",
            )
        called = m.calls[0].name if m.calls else called
        for p in m.parts:
            if isinstance(p, ToolResult) and p.name != called:
                raise DataError(
                    f"message {k} is the result of {p.name}, but the last call is of {called or 'no tool'}",
                    where="gpt-oss",
                    remedy="its template names a result after the last call; leave the conversation out",
                )
    messages = messages_to_dicts(conversation, "thinking")
    for said in messages:
        if not said.get("thinking", "x"):
            del said["thinking"]
    tools = tools_to_json_schema(conversation.tools)
    direct = {"enable_thinking": False} if conversation.effort is ThinkingEffort.NONE else {}
    return messages, {"reasoning_effort": REASONING_EFFORT_NAMES[conversation.effort]} | direct | (
        {"tools": tools} if tools else {}
    )


def parse(pieces: DecodedPieces, effort: ThinkingEffort) -> tuple[ContentPart, ...] | None:
    """([ to=NAME]<|channel|>NAME<|message|>TEXT) joined by <|end|><|start|>assistant; one final channel or one call, last."""
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
    ends = [not isinstance(p, Thinking) for p in parts]
    return tuple(parts) if parts and ends[-1] and sum(ends) == 1 else None


def _parse_message(pieces: DecodedPieces) -> ContentPart | None:
    """One message behind its <|start|>assistant."""
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
    to = RECIPIENT_PATTERN.fullmatch(before) if before else RECIPIENT_PATTERN.match(behind)
    if (
        not channel
        or to is None
        or (behind if before else behind[to.end() :]).strip() not in ("json", "")
    ):
        return None
    return ToolCall.from_generated(to[1], body)


GPT_OSS = Family(
    name="gpt-oss",
    licence="Apache-2.0",
    signature_token="<|channel|>",
    efforts=(ThinkingEffort.LOW, ThinkingEffort.MEDIUM, ThinkingEffort.HIGH),
    stop_tokens=("<|return|>", "<|call|>"),
    normalise=normalise,
    template_inputs=template_inputs,
    parse=parse,
    is_tool_text_verbatim=verbatim_unless_escaped,
)
