"""The hybrid student: one switch before any chat template, so that one set of weights thinks or answers at once.

    <|begin_of_text|><|start_header_id|>system<|end_header_id|>

    Reasoning: high<|eot_id|><|start_header_id|>user<|end_header_id|>

    2+3?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

    <think>
    Two and three.
    </think>

    5<|eot_id|>

The head always tells the effort (none, low, medium, high); whether a thought is opened is the model's to learn. Whatever a teacher calls
its thoughts, the student's have this one form. A thought is kept in the last answer alone, and only where the effort is not none.

A Llama tokenizer speaks the bundled hybrid.jinja. Any other model without a switch keeps its own template behind PRELUDE, which puts the effort
before the system's text and the thought before the answer. Where `<think>` is no token of the tokenizer it is written as text, and
texts that could be taken for it are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import resources
from typing import Any

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
    Tool,
    edit_texts,
    pieces_to_text,
)
from persea.errors import DataError
from persea.tokenization.vocabulary import Vocabulary

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
LLAMA_CONTROL_TOKENS = (
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)  # what hybrid.jinja writes besides the tokenizer's own bos
HYBRID_PRELUDE = (
    "{%- set persea = namespace(said=[]) %}"
    "{%- set persea_head = 'Reasoning: ' + (reasoning_effort or 'none') %}"
    "{%- if not messages or messages[0]['role'] != 'system' %}"
    "{%- set persea.said = [{'role': 'system', 'content': persea_head}] %}"
    "{%- endif %}"
    "{%- for m in messages %}"
    "{%- if loop.first and m['role'] == 'system' %}"
    "{%- set persea.said = [dict(m, content=persea_head + ('\\n\\n' + m['content'] if m['content'] else ''))] %}"
    "{%- elif loop.last and m.get('reasoning_content') and reasoning_effort and reasoning_effort != 'none' and not add_generation_prompt %}"
    "{%- set persea.said = persea.said + [dict(m, content='<think>\\n' + m['reasoning_content'] + '\\n</think>\\n\\n' + m['content'], "
    "reasoning_content='')] %}"
    "{%- else %}"
    "{%- set persea.said = persea.said + [m] %}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- set messages = persea.said %}"
)

ChatTemplate = Callable[..., str]


def has_llama_control_tokens(vocabulary: Vocabulary) -> bool:
    """Whether the bundled hybrid.jinja can be said in this tokenizer's control tokens."""
    return all(token in vocabulary.control_token_ids for token in LLAMA_CONTROL_TOKENS)


def add_thinking_switch(template_text: str, vocabulary: Vocabulary) -> str:
    """The hybrid template for a model whose own has no switch: the bundled one for a Llama tokenizer, else its own behind PRELUDE."""
    if has_llama_control_tokens(vocabulary):
        return (
            resources.files("persea.chat.families")
            .joinpath("hybrid.jinja")
            .read_text(encoding="utf-8")
        )
    return HYBRID_PRELUDE + template_text


def has_thinking_switch(template: ChatTemplate) -> bool:
    """Whether a template tells all four efforts apart and writes a thought in the one form where its prompt ends; asked by rendering."""
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
    said = f"{THINK_OPEN}\n{thought['content']}\n{THINK_CLOSE}\n\n{answer['content']}"
    return (
        len(set(prompts)) == len(prompts)
        and whole.startswith(before)
        and whole[len(before) :].lstrip().startswith(said)
    )


def make_hybrid_family(family: Family, vocabulary: Vocabulary) -> Family:
    """A family without thinking as it speaks through a template that `has_switch`."""
    tokens = (
        THINK_OPEN in vocabulary.control_token_ids and THINK_CLOSE in vocabulary.control_token_ids
    )
    return replace(
        family,
        efforts=tuple(ThinkingEffort),
        normalise=partial(_normalise, family),
        template_inputs=partial(_template_inputs, family, tokens),
        parse=partial(_parse, family, tokens),
        resolve_calls=partial(_resolve_calls, family),
    )


def _keeps_thought(conversation: Conversation, k: int) -> bool:
    """Whether message k keeps its thought."""
    last = k == len(conversation.messages) - 1
    return (
        last
        and conversation.messages[k].role is Role.ASSISTANT
        and conversation.effort is not ThinkingEffort.NONE
    )


def _normalise(family: Family, conversation: Conversation) -> Conversation:
    """As the family keeps it; the last answer's thought trimmed, its words without newlines before them; every other thought emptied."""

    def change(k: int, m: Message, p: ContentPart) -> str:
        thought = m.thinking.strip() if _keeps_thought(conversation, k) else ""
        if isinstance(p, Thinking):
            return thought
        return p.text.lstrip("\n") if thought and isinstance(p, Text) else p.text

    thought = edit_texts(conversation, change)
    spoken = family.normalise(thought)
    return replace(
        spoken,
        messages=tuple(
            replace(
                m,
                parts=tuple(
                    own if isinstance(own, Thinking) else p
                    for p, own in zip(m.parts, mine.parts, strict=True)
                ),
            )
            for m, mine in zip(spoken.messages, thought.messages, strict=True)
        ),
    )


def _template_inputs(
    family: Family, has_think_tokens: bool, conversation: Conversation
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The family's messages, the last one with its thought; the effort by name. Refuses texts that would be read as a thought's ends."""
    messages, switches = family.template_inputs(conversation)
    last = len(conversation.messages) - 1
    if conversation.messages and conversation.messages[last].role is Role.ASSISTANT:
        said = conversation.messages[last]
        if not has_think_tokens and (
            THINK_CLOSE in said.thinking or said.text.lstrip().startswith(THINK_OPEN)
        ):
            raise DataError(
                f"the answer holds {THINK_CLOSE if THINK_CLOSE in said.thinking else THINK_OPEN}, which is text to this tokenizer: "
                "nothing would tell it from a thought's end",
                where=family.name,
                remedy="leave the conversation out",
            )
        if said.thinking and _keeps_thought(conversation, last):
            messages[-1]["reasoning_content"] = said.thinking
    return messages, switches | {"reasoning_effort": conversation.effort.value}


def _parse(
    family: Family, has_think_tokens: bool, pieces: DecodedPieces, effort: ThinkingEffort
) -> tuple[ContentPart, ...] | None:
    """[<think> thought </think>] and what the family takes for an answer; None for a thought that never ends."""
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
    """The same where the markers are text."""
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
    said = tuple(replace(p, text=p.text.lstrip("\n")) if isinstance(p, Text) else p for p in answer)
    return (Thinking(thought.strip()), *said) if thought.strip() else said


def _resolve_calls(
    family: Family, parts: tuple[ContentPart, ...], tools: tuple[Tool, ...]
) -> tuple[ContentPart, ...] | None:
    """Calls are read in the answer, not in the thought."""
    thoughts = tuple(p for p in parts if isinstance(p, Thinking))
    said = family.resolve_calls(parts[len(thoughts) :], tools)
    return None if said is None else (*thoughts, *said)
