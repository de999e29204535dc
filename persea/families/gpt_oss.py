"""gpt-oss: harmony. Channels (analysis, commentary, final) and reasoning effort low, medium, high.

    <|start|>user<|message|>Hello<|end|><|start|>assistant<|channel|>analysis<|message|>A greeting.<|end|>
    <|start|>assistant<|channel|>final<|message|>Hi!<|return|>

It cannot be told not to think: Effort.NONE is asked for as "low". Thoughts of earlier turns are dropped by the
template. The template writes today's date; persea pins it (`chat.PINNED_DATE`).
"""

from __future__ import annotations

from typing import Any

from persea.chat import Conversation, Effort, Family, Message, Part, Pieces, Role, Text, Thinking, edit, text_of

DIAL = {Effort.NONE: "low", Effort.LOW: "low", Effort.MEDIUM: "medium", Effort.HIGH: "high"}


def normalise(conversation: Conversation) -> Conversation:
    """Thoughts kept in the last turn only."""
    last = len(conversation.messages) - 1

    def change(k: int, m: Message, p: Part) -> str:
        return "" if isinstance(p, Thinking) and k != last else p.text

    return edit(conversation, change)


def inputs(conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages with the thought as `thinking`; the effort by name."""
    messages = []
    for m in conversation.messages:
        messages.append({"role": m.role.value, "content": m.text})
        if m.role is Role.ASSISTANT and m.thinking:
            messages[-1]["thinking"] = m.thinking
    return messages, {"reasoning_effort": DIAL[conversation.effort]}


def parse(pieces: Pieces, effort: Effort) -> tuple[Part, ...] | None:
    """(<|channel|>NAME<|message|>TEXT) joined by <|end|><|start|>assistant; one final channel, last."""
    parts: list[Part] = []
    rest = list(pieces)
    while rest:
        if len(rest) < 3 or rest[0] != "<|channel|>" or rest[2] != "<|message|>":
            return None
        channel = text_of(rest[1:2])
        end = rest.index("<|end|>") if "<|end|>" in rest else len(rest)
        text = text_of(rest[3:end])
        if text is None or channel not in ("analysis", "final"):
            return None
        parts.append(Thinking(text) if channel == "analysis" else Text(text))
        rest = rest[end:]
        if rest:
            if rest[:3] != ["<|end|>", "<|start|>", b"assistant"] or len(rest) == 3:
                return None
            rest = rest[3:]
    return tuple(parts) if parts and isinstance(parts[-1], Text) and sum(isinstance(p, Text) for p in parts) == 1 else None


GPT_OSS = Family(
    name="gpt-oss", licence="Apache-2.0", signature="<|channel|>", efforts=(Effort.LOW, Effort.MEDIUM, Effort.HIGH),
    stops=("<|return|>", "<|call|>"), normalise=normalise, inputs=inputs, parse=parse)
