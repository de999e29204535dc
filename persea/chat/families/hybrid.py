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

from persea.chat.messages import Conversation, Effort, Family, Message, Part, Pieces, Role, Text, Thinking, Tool, edit, text_of
from persea.errors import DataError
from persea.tokenization.vocabulary import Vocabulary

OPEN, CLOSE = "<think>", "</think>"
LLAMA_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")  # what hybrid.jinja writes besides the tokenizer's own bos
PRELUDE = (
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
    "{%- set messages = persea.said %}")

Template = Callable[..., str]


def speaks_llama(vocabulary: Vocabulary) -> bool:
    """Whether the bundled hybrid.jinja can be said in this tokenizer's control tokens."""
    return all(token in vocabulary.control for token in LLAMA_TOKENS)


def switched(template_text: str, vocabulary: Vocabulary) -> str:
    """The hybrid template for a model whose own has no switch: the bundled one for a Llama tokenizer, else its own behind PRELUDE."""
    if speaks_llama(vocabulary):
        return resources.files("persea.chat.families").joinpath("hybrid.jinja").read_text(encoding="utf-8")
    return PRELUDE + template_text


def has_switch(template: Template) -> bool:
    """Whether a template tells all four efforts apart and writes a thought in the one form where its prompt ends; asked by rendering."""
    question, answer, thought = ({"role": r, "content": f"\ue000{r}\ue001"} for r in ("user", "assistant", "thought"))
    try:
        prompts = [template(messages=[question], add_generation_prompt=True, reasoning_effort=e.value) for e in Effort]
        whole = template(messages=[question, answer | {"reasoning_content": thought["content"]}], add_generation_prompt=False,
                         reasoning_effort=Effort.HIGH.value)
    except DataError:
        return False
    before = prompts[list(Effort).index(Effort.HIGH)]
    said = f"{OPEN}\n{thought['content']}\n{CLOSE}\n\n{answer['content']}"
    return len(set(prompts)) == len(prompts) and whole.startswith(before) and whole[len(before):].lstrip().startswith(said)


def hybrid(family: Family, vocabulary: Vocabulary) -> Family:
    """A family without thinking as it speaks through a template that `has_switch`."""
    tokens = OPEN in vocabulary.control and CLOSE in vocabulary.control
    return replace(family, efforts=tuple(Effort), normalise=partial(_normalise, family), inputs=partial(_inputs, family, tokens),
                   parse=partial(_parse, family, tokens), recall=partial(_recall, family))


def _thinks(conversation: Conversation, k: int) -> bool:
    """Whether message k keeps its thought."""
    last = k == len(conversation.messages) - 1
    return last and conversation.messages[k].role is Role.ASSISTANT and conversation.effort is not Effort.NONE


def _normalise(family: Family, conversation: Conversation) -> Conversation:
    """As the family keeps it; the last answer's thought trimmed, its words without newlines before them; every other thought emptied."""
    def change(k: int, m: Message, p: Part) -> str:
        thought = m.thinking.strip() if _thinks(conversation, k) else ""
        if isinstance(p, Thinking):
            return thought
        return p.text.lstrip("\n") if thought and isinstance(p, Text) else p.text

    thought = edit(conversation, change)
    spoken = family.normalise(thought)
    return replace(spoken, messages=tuple(
        replace(m, parts=tuple(own if isinstance(own, Thinking) else p for p, own in zip(m.parts, mine.parts, strict=True)))
        for m, mine in zip(spoken.messages, thought.messages, strict=True)))


def _inputs(family: Family, tokens: bool, conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The family's messages, the last one with its thought; the effort by name. Refuses texts that would be read as a thought's ends."""
    messages, switches = family.inputs(conversation)
    last = len(conversation.messages) - 1
    if conversation.messages and conversation.messages[last].role is Role.ASSISTANT:
        said = conversation.messages[last]
        if not tokens and (CLOSE in said.thinking or said.text.lstrip().startswith(OPEN)):
            raise DataError(f"the answer holds {CLOSE if CLOSE in said.thinking else OPEN}, which is text to this tokenizer: "
                            "nothing would tell it from a thought's end", where=family.name, remedy="leave the conversation out")
        if said.thinking and _thinks(conversation, last):
            messages[-1]["reasoning_content"] = said.thinking
    return messages, switches | {"reasoning_effort": conversation.effort.value}


def _parse(family: Family, tokens: bool, pieces: Pieces, effort: Effort) -> tuple[Part, ...] | None:
    """[<think> thought </think>] and what the family takes for an answer; None for a thought that never ends."""
    if not tokens:
        return _split(family.parse(pieces, effort))
    rest = list(pieces[1:] if pieces and isinstance(pieces[0], bytes) and not pieces[0].strip() else pieces)
    if rest[:1] != [OPEN]:
        return family.parse(pieces, effort)
    if CLOSE not in rest:
        return None
    end = rest.index(CLOSE)
    thought, answer = text_of(rest[1:end]), family.parse(rest[end + 1:], effort)
    return None if thought is None or answer is None else _joined(thought, answer)


def _split(said: tuple[Part, ...] | None) -> tuple[Part, ...] | None:
    """The same where the markers are text."""
    first = said[0] if said else None
    if said is None or not isinstance(first, Text) or not first.text.lstrip().startswith(OPEN):
        return said
    thought, closed, answer = first.text.lstrip().removeprefix(OPEN).partition(CLOSE)
    return _joined(thought, (Text(answer), *said[1:])) if closed else None


def _joined(thought: str, answer: tuple[Part, ...]) -> tuple[Part, ...]:
    said = tuple(replace(p, text=p.text.lstrip("\n")) if isinstance(p, Text) else p for p in answer)
    return (Thinking(thought.strip()), *said) if thought.strip() else said


def _recall(family: Family, parts: tuple[Part, ...], tools: tuple[Tool, ...]) -> tuple[Part, ...] | None:
    """Calls are read in the answer, not in the thought."""
    thoughts = tuple(p for p in parts if isinstance(p, Thinking))
    said = family.recall(parts[len(thoughts):], tools)
    return None if said is None else (*thoughts, *said)
