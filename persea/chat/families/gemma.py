"""Gemma 3 and Gemma 4.

Gemma 3 has turns without a system role; the template writes the system text at the start of the
first user turn.

    <bos><start_of_turn>user
    Hello<end_of_turn>
    <start_of_turn>model
    Hi!<end_of_turn>

It has no thinking and no tools: its template drops them, so a conversation with tools is refused.
Texts are trimmed, except the system text, which the first templates of Gemma 3 take as a list of
content parts only (`GEMMA_TEXT_PARTS`).

Gemma 4 has other control tokens, a system turn, a thinking switch, and its own notation for tools.

    <bos><|turn>system
    <|think|>
    Be brief.<|tool>declaration:f{...}<tool|><turn|>
    <|turn>user
    Hello<turn|>
    <|turn>model
    <|channel>thought
    Why not?
    <channel|><|tool_call>call:f{x:1,y:<|"|>a<|"|>}<tool_call|><|tool_response>response:f{value:<|"|>42<|"|>}<tool_response|>Hi!<turn|>

A call and its result belong to one turn of the model, which ends a call with <|tool_response>.
Arguments are written key by key in sorted order: a call has no byte offsets, and `normalise_gemma4`
sorts it. The first templates keep a thought only in a turn with a call after the last question;
that of July 2026 (`GEMMA4_CURRENT`) keeps every thought after it, and opens a thought behind a
tool's result. Without thinking the prompt of some versions ends with an empty thought that their
finished conversations leave out: see `Family.prompt_only_suffix`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from persea.chat.families.llama import parse as parse_text
from persea.chat.families.tool_format import (
    messages_to_dicts,
    tools_to_json_schema,
    verbatim_except_calls,
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

GEMMA_QUOTE_TOKEN = '<|"|>'
GEMMA_CALL_PATTERN = re.compile(r"call:([^{]*)(\{.*\})", re.DOTALL)
GEMMA_KEY_PATTERN = re.compile(r'([{,])\s*([^{}\[\],:"]+?)\s*:')


def normalise(conversation: Conversation) -> Conversation:
    """Drop thoughts; trim texts except the system text."""

    def change(k: int, m: Message, p: ContentPart) -> str:
        if isinstance(p, Thinking):
            return ""
        return p.text if m.role is Role.SYSTEM else p.text.strip()

    return edit_texts(conversation, change)


def template_inputs(conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the messages; the template has no switches."""
    return messages_to_dicts(conversation), {}


def template_inputs_of_parts(
    conversation: Conversation,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the messages, with the system text as a list of content parts."""
    messages, switches = template_inputs(conversation)
    for message in messages:
        if message["role"] == Role.SYSTEM.value:
            message["content"] = [{"type": "text", "text": message["content"]}]
    return messages, switches


def parse(pieces: DecodedPieces, effort: ThinkingEffort) -> tuple[ContentPart, ...] | None:
    """Parse one text without control tokens."""
    return parse_text(pieces, effort)


def normalise_gemma4(conversation: Conversation, only_before_calls: bool = True) -> Conversation:
    """Trim texts, sort arguments, and drop most thoughts.

    Thoughts are kept after the last question if thinking is on.

    Args:
        conversation: The conversation to normalise.
        only_before_calls: Keep them in turns with calls only.
    """
    last_question = max(
        (k for k, m in enumerate(conversation.messages) if m.role is Role.USER), default=-1
    )

    def change(k: int, m: Message, p: ContentPart) -> str:
        if isinstance(p, Thinking):
            return (
                p.text
                if (m.calls or not only_before_calls)
                and k > last_question
                and conversation.effort is not ThinkingEffort.NONE
                else ""
            )
        return p.text if isinstance(p, ToolResult) else p.text.strip()

    edited = edit_texts(conversation, change)
    return replace(
        edited,
        messages=tuple(
            replace(
                m,
                parts=tuple(_sort_arguments(p) if isinstance(p, ToolCall) else p for p in m.parts),
            )
            for m in edited.messages
        ),
    )


def _sort_arguments(call: ToolCall) -> ToolCall:
    def order(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: order(value[k]) for k in sorted(value, key=str.lower)}
        return [order(v) for v in value] if isinstance(value, list) else value

    return replace(
        call, arguments=json.dumps(order(json.loads(call.arguments)), ensure_ascii=False)
    )


def template_inputs_gemma4(
    conversation: Conversation,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return messages, tools and the thinking switch.

    Text in a turn with a call and arguments that cannot be parsed back are refused.
    """
    for k, m in enumerate(conversation.messages):
        if m.calls and m.text:
            raise DataError(
                f"message {k} has text and tool calls",
                where="gemma-4",
                remedy="the template writes the text after the results; leave the conversation out",
            )
        for call in m.calls:
            if (
                _parse_call(
                    [p if p == GEMMA_QUOTE_TOKEN else p.encode() for p in _write_call(call)]
                )
                != call
            ):
                raise DataError(
                    f"the arguments of {call.name} in message {k} are ambiguous in this notation",
                    where="gemma-4",
                    remedy="use plain keys, and numbers and text as values; "
                    "or leave the conversation out",
                )
    tools = tools_to_json_schema(conversation.tools)
    return messages_to_dicts(conversation, "reasoning_content"), {
        "enable_thinking": conversation.effort is not ThinkingEffort.NONE
    } | ({"tools": tools} if tools else {})


def _write_call(call: ToolCall) -> Iterator[str]:
    """Yield a call as the template writes it: quote tokens and the text between them."""

    def write(value: Any) -> str:
        if isinstance(value, str):
            return "\0Q" + value + "\0Q"
        if isinstance(value, dict):
            return "{" + ",".join(f"{k}:{write(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ",".join(map(write, value)) + "]"
        return str(value).lower() if isinstance(value, bool) else str(value)

    pieces = f"call:{call.name}{write(json.loads(call.arguments))}".split("\0Q")
    for k, piece in enumerate(pieces):
        if k:
            yield GEMMA_QUOTE_TOKEN
        if piece:
            yield piece


def parse_gemma4(pieces: DecodedPieces, effort: ThinkingEffort) -> tuple[ContentPart, ...] | None:
    """Parse [<|channel> thought <channel|>] and a text or calls.

    Behind a tool's result the current template opens the thought in the prompt.
    """
    parts: list[ContentPart] = []
    rest = list(pieces)
    if "<|channel>" not in rest and "<channel|>" in rest and effort is not ThinkingEffort.NONE:
        rest = ["<|channel>", b"thought\n", *rest]
    if rest[:1] == ["<|channel>"]:
        if "<channel|>" not in rest:
            return None
        end = rest.index("<channel|>")
        thought = pieces_to_text(rest[1:end])
        if thought is None or not thought.startswith("thought\n"):
            return None
        thought = thought.removeprefix("thought\n").removesuffix("\n")
        parts, rest = [Thinking(thought)] if thought else [], rest[end + 1 :]
    if "<|tool_call>" not in rest:
        text = pieces_to_text(rest)
        return None if text is None else (*parts, Text(text.strip()))
    if rest[0] != "<|tool_call>":
        return None
    while rest:
        if rest[0] != "<|tool_call>" or "<tool_call|>" not in rest:
            return None
        end = rest.index("<tool_call|>")
        call = _parse_call(rest[1:end])
        if call is None:
            return None
        parts.append(call)
        rest = rest[end + 1 :]
    return tuple(parts)


def _parse_call(pieces: Sequence[str | bytes]) -> ToolCall | None:
    """Parse call:NAME{key:value,...} with texts between quote tokens; None if it is malformed.

    The call is made into JSON with a number in place of each text; then the texts are put in.
    """
    segments = [b""]
    for p in pieces:
        if p == GEMMA_QUOTE_TOKEN:
            segments.append(b"")
        elif isinstance(p, str):
            return None
        else:
            segments[-1] += p
    bare, texts = [s.decode() for s in segments[::2]], [s.decode() for s in segments[1::2]]
    if len(bare) != len(texts) + 1 or any('"' in b or "\\" in b for b in bare):
        return None
    if any(b.lstrip().startswith(":") for b in bare[1:]):  # a quoted key, which is malformed
        return None
    call = GEMMA_CALL_PATTERN.fullmatch(
        bare[0] + "".join(f'"{k}"{b}' for k, b in enumerate(bare[1:]))
    )

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: fill(v) for k, v in value.items()}
        if isinstance(value, list):
            return [fill(v) for v in value]
        return texts[int(value)] if isinstance(value, str) else value

    try:
        return (
            ToolCall.from_generated(
                call[1],
                fill(
                    json.loads(
                        GEMMA_KEY_PATTERN.sub(r'\1"\2":', re.sub(r"\bNone\b", "null", call[2]))
                    )
                ),
            )
            if call
            else None
        )
    except (ValueError, RecursionError):
        return None


def _random_config(common: dict[str, Any], sizes: Mapping[str, int]) -> PretrainedConfig:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        intermediate_size=3 * common["hidden_size"],
        sliding_window=128,
        query_pre_attn_scalar=common["head_dim"],
        **common,
    )


GEMMA = Family(
    name="gemma",
    signature_token="<start_of_turn>",
    efforts=(ThinkingEffort.NONE,),
    stop_tokens=("<end_of_turn>", "<eos>"),
    normalise=normalise,
    template_inputs=template_inputs,
    parse=parse,
    control_markers=(
        r"<(?:start|end)_of_turn>",
        r"<unused\d+>",  # 6,242 of them in Gemma 3
        r"\[multimodal\]",
        "<mask>",
    ),
    random_config=_random_config,
)
GEMMA_TEXT_PARTS = replace(
    GEMMA, template_inputs=template_inputs_of_parts, template_version="text parts"
)

GEMMA4 = Family(
    name="gemma-4",
    signature_token="<|turn>",
    efforts=(ThinkingEffort.NONE, ThinkingEffort.HIGH),
    stop_tokens=("<turn|>", "<|tool_response>", "<eos>"),
    normalise=normalise_gemma4,
    template_inputs=template_inputs_gemma4,
    parse=parse_gemma4,
    prompt_only_suffix="<|channel>thought\n<channel|>",
    is_tool_text_verbatim=verbatim_except_calls,
    thought_ends=(("<channel|>",),),
)
GEMMA4_CURRENT = replace(
    GEMMA4,
    normalise=partial(normalise_gemma4, only_before_calls=False),
    template_version="2026-07",
)
