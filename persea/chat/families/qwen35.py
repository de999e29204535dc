"""Qwen 3.5, 3.6 and 3.8: ChatML whose prompt opens the thought, and calls written key by key.

    <|im_start|>user
    Hello<|im_end|>
    <|im_start|>assistant
    <think>
    A greeting.
    </think>

    Hi!<|im_end|>

    qwen3.5   Qwen 3.5 and 3.6: thoughts before the last question are dropped
    qwen3.5   templates without that rule, version "all thoughts": every thought is kept
    qwen3.8   every thought is kept; the efforts low, medium and high ("xhigh" in the template) are
              sentences of the system text

Texts, also of tools, and thoughts are trimmed. At the effort none the prompt has an empty thought.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from persea.chat.families.qwen import (
    QWEN,
    THINKING_ON_OFF,
    is_thinking_on,
    last_question_index,
    parse_opened_thought,
    template_inputs,
)
from persea.chat.families.qwen_xml_tools import refuse_ambiguous_calls, resolve_call_types
from persea.chat.families.tool_format import verbatim_except_calls
from persea.chat.family import DecodedPieces, edit_texts
from persea.chat.messages import (
    ContentPart,
    Conversation,
    Message,
    Text,
    Thinking,
    ThinkingEffort,
    replace_text,
)

QWEN38_EFFORT_NAMES = {
    ThinkingEffort.LOW: "low",
    ThinkingEffort.MEDIUM: "medium",
    ThinkingEffort.HIGH: "xhigh",
}


def normalise(conversation: Conversation) -> Conversation:
    """Trim texts, also of tools; keep trimmed thoughts after the last question."""
    last_question = last_question_index(conversation)

    def change(k: int, m: Message, p: ContentPart) -> str:
        is_dropped = k <= last_question or not is_thinking_on(conversation)
        return "" if isinstance(p, Thinking) and is_dropped else p.text.strip()

    return edit_texts(conversation, change)


def normalise_all_thoughts(conversation: Conversation) -> Conversation:
    """Trim texts, also of tools; keep every trimmed thought."""

    def change(k: int, m: Message, p: ContentPart) -> str:
        is_dropped = isinstance(p, Thinking) and not is_thinking_on(conversation)
        return "" if is_dropped else p.text.strip()

    return edit_texts(conversation, change)


def normalise_untrimmed_thoughts(conversation: Conversation) -> Conversation:
    """Trim texts; keep every thought, and trim that of the last answer.

    White space around it would share a token with the prompt.
    """
    last = len(conversation.messages) - 1

    def change(k: int, m: Message, p: ContentPart) -> str:
        if isinstance(p, Thinking) and not is_thinking_on(conversation):
            return ""
        return p.text if isinstance(p, Thinking) and k != last else p.text.strip()

    return edit_texts(conversation, change)


def template_inputs_qwen35(
    conversation: Conversation,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the inputs of Qwen3; refuse a call that cannot be parsed back."""
    refuse_ambiguous_calls(conversation, "qwen3.5")
    return template_inputs(conversation)


def template_inputs_qwen38(
    conversation: Conversation,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the inputs of Qwen 3.5 and the effort."""
    messages, kwargs = template_inputs_qwen35(conversation)
    name = QWEN38_EFFORT_NAMES.get(conversation.effort)
    return messages, kwargs | ({"reasoning_effort": name} if name else {})


def parse(pieces: DecodedPieces, effort: ThinkingEffort) -> tuple[ContentPart, ...] | None:
    """Parse thought </think> answer [calls], trimmed.

    Without thinking the prompt has closed the block.
    """
    parts = parse_opened_thought(pieces, effort)
    if parts is None:
        return None
    trimmed = tuple(
        replace_text(p, p.text.strip()) if isinstance(p, (Text, Thinking)) else p for p in parts
    )
    return tuple(p for p in trimmed if p.text) or (Text(""),)


QWEN35 = replace(
    QWEN,
    name="qwen3.5",
    efforts=THINKING_ON_OFF,
    normalise=normalise,
    template_inputs=template_inputs_qwen35,
    parse=parse,
    template_signature="<parameter=example_parameter_2>\\n"
    "This is the value for the second parameter",
    is_tool_text_verbatim=verbatim_except_calls,
    resolve_calls=resolve_call_types,
    template_version="last question",
    random_config=None,
)
QWEN35_ALL_THOUGHTS = replace(
    QWEN35, normalise=normalise_untrimmed_thoughts, template_version="all thoughts"
)
QWEN38 = replace(
    QWEN35,
    name="qwen3.8",
    efforts=tuple(ThinkingEffort),
    normalise=normalise_all_thoughts,
    template_inputs=template_inputs_qwen38,
    template_signature="Reasoning effort is set to xhigh. Please think carefully through the task, "
    "validate key assumptions",
    template_version="",
)
