"""Llama 3: headers and <|eot_id|>. The default student.

    <|begin_of_text|><|start_header_id|>user<|end_header_id|>

    Hello<|eot_id|><|start_header_id|>assistant<|end_header_id|>

    Hi!<|eot_id|>

No thinking: a thought in a conversation is dropped. Texts are trimmed by the template.
"""

from __future__ import annotations

from typing import Any

from persea.chat import Conversation, Effort, Family, Message, Part, Pieces, Text, Thinking, edit, text_of


def normalise(conversation: Conversation) -> Conversation:
    """Thoughts dropped, texts trimmed."""
    return edit(conversation, lambda k, m, p: "" if isinstance(p, Thinking) else p.text.strip())


def inputs(conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages as the template takes them; no switches."""
    return [message(m) for m in conversation.messages], {}


def message(m: Message) -> dict[str, Any]:
    return {"role": m.role.value, "content": m.text}


def parse(pieces: Pieces, effort: Effort) -> tuple[Part, ...] | None:
    """One text, no control token inside."""
    text = text_of(pieces)
    return None if text is None else (Text(text),)


LLAMA = Family(
    name="llama", licence="Llama Community License", signature="<|start_header_id|>", efforts=(Effort.NONE,),
    stops=("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"), normalise=normalise, inputs=inputs, parse=parse)
