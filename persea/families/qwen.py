"""Qwen 3: ChatML; thinking on and off by the template's `enable_thinking`.

    <|im_start|>user
    Hello<|im_end|>
    <|im_start|>assistant
    <think>

    </think>

    Hi!<|im_end|>

An empty <think> block is how thinking is switched off; thoughts of earlier turns are dropped by the template.
"""

from __future__ import annotations

from typing import Any

from persea.chat import Conversation, Effort, Family, Message, Part, Pieces, Role, Text, Thinking, edit, text_of


def normalise(conversation: Conversation) -> Conversation:
    """Thoughts kept in the last turn only, and only when thinking is on; that turn loses newlines at its rims."""
    last = len(conversation.messages) - 1

    def change(k: int, m: Message, p: Part) -> str:
        if isinstance(p, Thinking):
            return p.text.strip("\n") if k == last and conversation.effort is not Effort.NONE else ""
        return p.text.lstrip("\n") if m.role is Role.ASSISTANT and k == last else p.text

    return edit(conversation, change)


def inputs(conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages with the thought beside the answer; the thinking switch."""
    messages = []
    for m in conversation.messages:
        messages.append({"role": m.role.value, "content": m.text})
        if m.role is Role.ASSISTANT:
            messages[-1]["reasoning_content"] = m.thinking
    return messages, {"enable_thinking": conversation.effort is not Effort.NONE}


def parse(pieces: Pieces, effort: Effort) -> tuple[Part, ...] | None:
    """[<think> thought </think>] answer."""
    if pieces and pieces[0] == "<think>":
        if "</think>" not in pieces:
            return None
        end = list(pieces).index("</think>")
        thought, answer = text_of(pieces[1:end]), text_of(pieces[end + 1:])
        if thought is None or answer is None:
            return None
        parts = (Thinking(thought.strip("\n")), Text(answer.lstrip("\n")))
        return parts if parts[0].text else parts[1:]
    answer = text_of(pieces)
    return None if answer is None else (Text(answer),)


QWEN = Family(
    name="qwen", licence="Apache-2.0", signature="<|im_start|>", efforts=(Effort.NONE, Effort.HIGH),
    stops=("<|im_end|>", "<|endoftext|>"), normalise=normalise, inputs=inputs, parse=parse)
