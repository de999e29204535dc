"""The hybrid format: one thinking switch for any chat template.

With it one student thinks or answers at once.

    <|begin_of_text|><|start_header_id|>system<|end_header_id|>

    Reasoning: high<|eot_id|><|start_header_id|>user<|end_header_id|>

    2+3?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

    <think>
    Two and three.
    </think>

    5<|eot_id|>

The prompt always starts with the effort (none, low, medium, high); the model learns whether to open
a thought. The student's thoughts have this one format, whatever format a teacher uses. Only the
last answer keeps its thought, and only if the effort is not none.

A Llama tokenizer uses the bundled hybrid.jinja. Any other model without a switch keeps its own
template after HYBRID_PRELUDE, which puts the effort before the system text and the thought before
the answer. If the tokenizer has no token `<think>` it is written as text, and texts that could be
mistaken for it are refused.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib import resources
from typing import Any

from persea.chat.family import DecodedPieces, Family, edit_texts, pieces_to_text
from persea.chat.messages import (
    ContentPart,
    Conversation,
    Message,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
    Tool,
)
from persea.chat.template import ChatTemplate
from persea.errors import DataError
from persea.tokenization.vocabulary import Vocabulary

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
# The control tokens that hybrid.jinja writes besides the tokenizer's own BOS.
HYBRID_TEMPLATE_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# Put before a model's own template. Its text is saved with students and part of the renderer's
# digest, so its inner names stay.
HYBRID_PRELUDE = (
    "{%- set persea = namespace(said=[]) %}"
    "{%- set persea_head = 'Reasoning: ' + (reasoning_effort or 'none') %}"
    "{%- if not messages or messages[0]['role'] != 'system' %}"
    "{%- set persea.said = [{'role': 'system', 'content': persea_head}] %}"
    "{%- endif %}"
    "{%- for m in messages %}"
    "{%- if loop.first and m['role'] == 'system' %}"
    "{%- set persea.said = [dict(m, content=persea_head + ('\\n\\n' + m['content'] if "
    "m['content'] else ''))] %}"
    "{%- elif loop.last and m.get('reasoning_content') and reasoning_effort and "
    "reasoning_effort != 'none' and not add_generation_prompt %}"
    "{%- set persea.said = persea.said + [dict(m, content='<think>\\n' + "
    "m['reasoning_content'] + '\\n</think>\\n\\n' + m['content'], "
    "reasoning_content='')] %}"
    "{%- else %}"
    "{%- set persea.said = persea.said + [m] %}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- set messages = persea.said %}"
)


def can_use_hybrid_template(vocabulary: Vocabulary) -> bool:
    """Return whether the tokenizer has the control tokens of the bundled hybrid.jinja."""
    return all(token in vocabulary.control_token_ids for token in HYBRID_TEMPLATE_TOKENS)


def add_thinking_switch(template_text: str, vocabulary: Vocabulary) -> str:
    """Return the hybrid template for a model whose template has no thinking switch.

    It is the bundled hybrid.jinja if the tokenizer has its control tokens, else HYBRID_PRELUDE and
    the model's own template.
    """
    if can_use_hybrid_template(vocabulary):
        return (
            resources.files("persea.chat.families")
            .joinpath("hybrid.jinja")
            .read_text(encoding="utf-8")
        )
    return HYBRID_PRELUDE + template_text


def has_thinking_switch(template: ChatTemplate) -> bool:
    """Return whether a template has the hybrid format, found out by rendering.

    It must render four different prompts for the four efforts, and the thought of the last answer
    where the prompt ends.
    """
    question, answer, thought = (
        {"role": r, "content": f"\ue000{r}\ue001"} for r in ("user", "assistant", "thought")
    )
    try:
        prompts = [
            template(messages=[question], add_generation_prompt=True, reasoning_effort=e.value)
            for e in ThinkingEffort
        ]
        whole = template(
            messages=[question, answer | {"reasoning_content": thought["content"]}],
            add_generation_prompt=False,
            reasoning_effort=ThinkingEffort.HIGH.value,
        )
    except DataError:
        return False
    before = prompts[list(ThinkingEffort).index(ThinkingEffort.HIGH)]
    expected = f"{THINK_OPEN}\n{thought['content']}\n{THINK_CLOSE}\n\n{answer['content']}"
    return (
        len(set(prompts)) == len(prompts)
        and whole.startswith(before)
        and whole[len(before) :].lstrip().startswith(expected)
    )


def make_hybrid_family(family: Family, vocabulary: Vocabulary) -> Family:
    """Return a family without thinking adapted to a template in the hybrid format.

    Args:
        family: A family with a single effort.
        vocabulary: Decides whether `<think>` is a control token or plain text.
    """
    has_think_tokens = {THINK_OPEN, THINK_CLOSE} <= vocabulary.control_token_ids.keys()
    return replace(
        family,
        efforts=tuple(ThinkingEffort),
        has_hybrid_format=True,
        normalise=partial(_normalise, family),
        template_inputs=partial(_template_inputs, family, has_think_tokens),
        parse=partial(_parse, family, has_think_tokens),
        resolve_calls=partial(_resolve_calls, family),
        thought_ends=((THINK_CLOSE if has_think_tokens else THINK_CLOSE.encode(),),),
        text_thought_markers=("", "") if has_think_tokens else (THINK_OPEN, THINK_CLOSE),
    )


def _keeps_thought(conversation: Conversation, k: int) -> bool:
    """Return whether message k keeps its thought."""
    last = k == len(conversation.messages) - 1
    return (
        last
        and conversation.messages[k].role is Role.ASSISTANT
        and conversation.effort is not ThinkingEffort.NONE
    )


def _normalise(family: Family, conversation: Conversation) -> Conversation:
    """Normalise as the family does, then apply the rules for thoughts.

    The thought of the last answer is trimmed and the answer loses line breaks before it; every
    other thought is emptied.
    """

    def change(k: int, m: Message, p: ContentPart) -> str:
        edited = m.thinking.strip() if _keeps_thought(conversation, k) else ""
        if isinstance(p, Thinking):
            return edited
        return p.text.lstrip("\n") if edited and isinstance(p, Text) else p.text

    edited = edit_texts(conversation, change)
    normalised = family.normalise(edited)
    return replace(
        normalised,
        messages=tuple(
            replace(
                m,
                parts=tuple(
                    own if isinstance(own, Thinking) else p
                    for p, own in zip(m.parts, theirs.parts, strict=True)
                ),
            )
            for m, theirs in zip(normalised.messages, edited.messages, strict=True)
        ),
    )


def _template_inputs(
    family: Family, has_think_tokens: bool, conversation: Conversation
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the family's messages with the last thought, and the effort.

    Texts that could be parsed as the end of a thought are refused.
    """
    messages, switches = family.template_inputs(conversation)
    last = len(conversation.messages) - 1
    if conversation.messages and conversation.messages[last].role is Role.ASSISTANT:
        answer = conversation.messages[last]
        if not has_think_tokens and (
            THINK_CLOSE in answer.thinking or answer.text.lstrip().startswith(THINK_OPEN)
        ):
            raise DataError(
                "the answer contains "
                f"{THINK_CLOSE if THINK_CLOSE in answer.thinking else THINK_OPEN}, "
                "which is plain text for this tokenizer and looks like the end of a thought",
                where=family.name,
                remedy="leave the conversation out",
            )
        if answer.thinking and _keeps_thought(conversation, last):
            messages[-1]["reasoning_content"] = answer.thinking
    return messages, switches | {"reasoning_effort": conversation.effort.value}


def _parse(
    family: Family, has_think_tokens: bool, pieces: DecodedPieces, effort: ThinkingEffort
) -> tuple[ContentPart, ...] | None:
    """Parse [<think> thought </think>] answer; None for a thought that does not end."""
    if not has_think_tokens:
        return _split_thought(family.parse(pieces, effort))
    rest = list(
        pieces[1:] if pieces and isinstance(pieces[0], bytes) and not pieces[0].strip() else pieces
    )
    if rest[:1] != [THINK_OPEN]:
        return family.parse(pieces, effort)
    if THINK_CLOSE not in rest:
        return None
    end = rest.index(THINK_CLOSE)
    thought, answer = pieces_to_text(rest[1:end]), family.parse(rest[end + 1 :], effort)
    return None if thought is None or answer is None else _join_thought(thought, answer)


def _split_thought(parts: tuple[ContentPart, ...] | None) -> tuple[ContentPart, ...] | None:
    """Split a thought off the text where the markers are plain text."""
    first = parts[0] if parts else None
    if (
        parts is None
        or not isinstance(first, Text)
        or not first.text.lstrip().startswith(THINK_OPEN)
    ):
        return parts
    thought, closed, answer = first.text.lstrip().removeprefix(THINK_OPEN).partition(THINK_CLOSE)
    return _join_thought(thought, (Text(answer), *parts[1:])) if closed else None


def _join_thought(thought: str, answer: tuple[ContentPart, ...]) -> tuple[ContentPart, ...]:
    texts = tuple(
        replace(p, text=p.text.lstrip("\n")) if isinstance(p, Text) else p for p in answer
    )
    return (Thinking(thought.strip()), *texts) if thought.strip() else texts


def _resolve_calls(
    family: Family, parts: tuple[ContentPart, ...], tools: tuple[Tool, ...]
) -> tuple[ContentPart, ...] | None:
    """Resolve calls in the answer, not in the thought."""
    thoughts = tuple(p for p in parts if isinstance(p, Thinking))
    resolved = family.resolve_calls(parts[len(thoughts) :], tools)
    return None if resolved is None else (*thoughts, *resolved)
