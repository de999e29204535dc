"""Gemma 3: turns without a system role; the template writes system text at the head of the first user turn.

    <bos><start_of_turn>user
    Hello<end_of_turn>
    <start_of_turn>model
    Hi!<end_of_turn>

No thinking and no tools. Texts are trimmed; the system text is not.
"""

from __future__ import annotations

from typing import Any

from persea.chat import Conversation, Effort, Family, Message, Part, Pieces, Role, Thinking, edit
from persea.families.llama import message
from persea.families.llama import parse as parse_text


def normalise(conversation: Conversation) -> Conversation:
    """Thoughts dropped; texts trimmed, but the system text."""
    def change(k: int, m: Message, p: Part) -> str:
        if isinstance(p, Thinking):
            return ""
        return p.text if m.role is Role.SYSTEM else p.text.strip()

    return edit(conversation, change)


def inputs(conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages as the template takes them; no switches."""
    return [message(m) for m in conversation.messages], {}


def parse(pieces: Pieces, effort: Effort) -> tuple[Part, ...] | None:
    """One text, no control token inside."""
    return parse_text(pieces, effort)


GEMMA = Family(
    name="gemma", licence="Gemma Terms of Use", signature="<start_of_turn>", efforts=(Effort.NONE,),
    stops=("<end_of_turn>", "<eos>"), normalise=normalise, inputs=inputs, parse=parse)
