"""Qwen: ChatML in variants, distinguished by their templates (`Family.template_signature`).

    <|im_start|>user
    Hello<|im_end|>
    <|im_start|>assistant
    <think>

    </think>

    Hi!<|im_end|>

    qwen         Qwen3: an empty <think> block switches thinking off; thoughts before the last
                 question are dropped
    qwen2.5      no thinking
    qwen3-coder  no thinking; calls are written key by key
    qwq          the prompt opens <think>; the template takes the thought as part of the text and
                 drops earlier ones

Qwen 3.5 and later are in `qwen35.py`.

A call is {"name": "f", "arguments": {...}} between <tool_call> and </tool_call>; any number of
calls may follow the text. Key by key (`qwen_xml_tools.py`) a call has no byte offsets, because the
template does not write its JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from persea.chat.families.qwen_xml_tools import (
    parse_xml_call,
    refuse_ambiguous_calls,
    resolve_call_types,
)
from persea.chat.families.tool_format import (
    always_verbatim,
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
    replace_text,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LEADING_LINE_BREAK_PATTERN = re.compile(r"\A\s*[\r\n]")


def is_thinking_on(conversation: Conversation) -> bool:
    """Return whether the conversation asks for a thought."""
    return conversation.effort is not ThinkingEffort.NONE


def last_question_index(conversation: Conversation) -> int:
    """Return the index of the last user text that is no <tool_response>, as the templates find it.

    Without one it is the last message.
    """
    questions = [
        k
        for k, m in enumerate(conversation.messages)
        if m.role is Role.USER
        and not (m.text.startswith("<tool_response>") and m.text.endswith("</tool_response>"))
    ]
    return max(questions, default=len(conversation.messages) - 1)


def normalise(conversation: Conversation) -> Conversation:
    """Keep thoughts after the last question if thinking is on.

    A turn with a <think> block loses line breaks at its start and end.
    """
    last, last_question = len(conversation.messages) - 1, last_question_index(conversation)

    def change(k: int, m: Message, p: ContentPart) -> str:
        thought = (
            m.thinking.strip("\n") if k > last_question and is_thinking_on(conversation) else ""
        )
        if isinstance(p, Thinking):
            return thought
        return (
            p.text.lstrip("\n")
            if m.role is Role.ASSISTANT and k > last_question and (k == last or thought)
            else p.text
        )

    return edit_texts(conversation, change)


def template_inputs(conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return messages with the thought as `reasoning_content`, tools, and the thinking switch."""
    return messages_to_dicts(conversation, "reasoning_content"), {
        "enable_thinking": is_thinking_on(conversation)
    } | _tools_kwargs(conversation)


def _tools_kwargs(conversation: Conversation) -> dict[str, Any]:
    tools = tools_to_json_schema(conversation.tools)
    return {"tools": tools} if tools else {}


def parse(pieces: DecodedPieces, effort: ThinkingEffort) -> tuple[ContentPart, ...] | None:
    """Parse [<think> thought </think>] answer [calls]."""
    if pieces and pieces[0] == "<think>":
        return _parse_thought_and_answer(pieces[1:])
    return _parse_answer(pieces)


def _parse_thought_and_answer(pieces: DecodedPieces) -> tuple[ContentPart, ...] | None:
    if "</think>" not in pieces:
        return None
    end = list(pieces).index("</think>")
    thought, answer = pieces_to_text(pieces[:end]), _parse_answer(pieces[end + 1 :])
    if thought is None or answer is None:
        return None
    texts = tuple(Text(p.text.lstrip("\n")) if isinstance(p, Text) else p for p in answer)
    texts = tuple(p for p in texts if p.text) or texts[:1]
    return (Thinking(thought.strip("\n")), *texts) if thought.strip("\n") else texts


def _parse_answer(pieces: DecodedPieces) -> tuple[ContentPart, ...] | None:
    """Parse text and any number of <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""
    first = list(pieces).index("<tool_call>") if "<tool_call>" in pieces else len(pieces)
    text = pieces_to_text(pieces[:first])
    if text is None or first == len(pieces):
        return None if text is None else (Text(text),)
    calls = _parse_calls(pieces[first:])
    text = text.removesuffix("\n")
    return None if calls is None else ((Text(text), *calls) if text else calls)


def _parse_calls(pieces: DecodedPieces) -> tuple[ContentPart, ...] | None:
    calls: list[ContentPart] = []
    rest = list(pieces)
    while rest:
        body = (
            rest[1]
            if len(rest) > 2 and (rest[0], rest[2]) == ("<tool_call>", "</tool_call>")
            else None
        )
        call = _parse_call(body.decode()) if isinstance(body, bytes) else None
        if call is None:
            return None
        calls.append(call)
        rest = rest[3:]
        if rest and isinstance(rest[0], bytes) and not rest[0].strip():
            rest = rest[1:]
    return tuple(calls)


def _parse_call(text: str) -> ToolCall | None:
    if text.strip().startswith("<function="):
        return parse_xml_call(text)
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if (
        not isinstance(parsed, dict)
        or set(parsed) != {"name", "arguments"}
        or not isinstance(parsed["arguments"], dict)
    ):
        return None
    return ToolCall.from_generated(parsed["name"], parsed["arguments"])


# --- Qwen 2.5 and Qwen3-Coder: no thinking ---


def _strip_leading_line_breaks(text: str) -> str:
    """Strip line breaks before the text: one token would cover them and the end of the prompt."""
    return LEADING_LINE_BREAK_PATTERN.sub("", text)


def normalise_qwen25(conversation: Conversation) -> Conversation:
    """Drop thoughts, and line breaks before the last answer."""
    last = len(conversation.messages) - 1

    def change(k: int, m: Message, p: ContentPart) -> str:
        if isinstance(p, Thinking):
            return ""
        return (
            _strip_leading_line_breaks(p.text) if k == last and m.role is Role.ASSISTANT else p.text
        )

    return edit_texts(conversation, change)


def template_inputs_qwen25(
    conversation: Conversation,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return messages and tools."""
    return messages_to_dicts(conversation), _tools_kwargs(conversation)


def parse_qwen25(pieces: DecodedPieces, effort: ThinkingEffort) -> tuple[ContentPart, ...] | None:
    """Parse answer [calls]."""
    return _parse_answer(pieces)


def normalise_coder(conversation: Conversation) -> Conversation:
    """Normalise as Qwen 2.5, and trim the text of turns with calls."""
    return edit_texts(
        normalise_qwen25(conversation), lambda k, m, p: p.text.strip() if m.calls else p.text
    )


def template_inputs_coder(
    conversation: Conversation,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return messages and tools; refuse a call that cannot be parsed back."""
    refuse_ambiguous_calls(conversation, "qwen3-coder")
    return template_inputs_qwen25(conversation)


def parse_coder(pieces: DecodedPieces, effort: ThinkingEffort) -> tuple[ContentPart, ...] | None:
    """Parse answer [calls]; the text before calls is trimmed."""
    return _trim_text_before_calls(_parse_answer(pieces))


def _trim_text_before_calls(parts: Sequence[ContentPart] | None) -> tuple[ContentPart, ...] | None:
    """Trim the text of an answer with calls."""
    if parts is None or not any(isinstance(p, ToolCall) for p in parts):
        return None if parts is None else tuple(parts)
    trimmed = [Text(p.text.strip()) if isinstance(p, Text) else p for p in parts]
    return tuple(p for p in trimmed if p.text)


# --- QwQ: the prompt opens <think> ---


def parse_opened_thought(
    pieces: DecodedPieces, effort: ThinkingEffort
) -> tuple[ContentPart, ...] | None:
    """Parse thought </think> answer [calls]; without thinking the prompt has closed the block."""
    if pieces and pieces[0] == "<think>":  # some servers repeat the opening of the prompt
        pieces = pieces[1:]
    if "</think>" in pieces:
        return _parse_thought_and_answer(pieces)
    return _parse_answer(pieces) if effort is ThinkingEffort.NONE else None


def normalise_qwq(conversation: Conversation) -> Conversation:
    """Keep the last turn's thought if thinking is on; answers lose line breaks before them."""
    last = len(conversation.messages) - 1

    def change(k: int, m: Message, p: ContentPart) -> str:
        if isinstance(p, Thinking):
            return p.text.strip() if k == last and is_thinking_on(conversation) else ""
        return p.text.lstrip("\n") if m.role is Role.ASSISTANT else p.text

    return edit_texts(conversation, change)


def template_inputs_qwq(conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return messages with the last thought in the text, tools, and the thinking switch.

    Only some of its templates have the switch.
    """
    messages = messages_to_dicts(conversation)
    if conversation.messages and conversation.messages[-1].role is Role.ASSISTANT:
        last = conversation.messages[-1]
        thought = f"{last.thinking}\n" if last.thinking else ""
        messages[-1]["content"] = f"<think>\n{thought}</think>\n\n{last.text}"
    return messages, {"enable_thinking": is_thinking_on(conversation)} | _tools_kwargs(conversation)


def parse_qwq(pieces: DecodedPieces, effort: ThinkingEffort) -> tuple[ContentPart, ...] | None:
    """Parse thought </think> answer [calls]; without thinking the prompt has closed the block."""
    parts = parse_opened_thought(pieces, effort)
    if parts is None:
        return None
    trimmed = [
        replace_text(p, p.text.strip() if isinstance(p, Thinking) else p.text.lstrip("\n"))
        if not isinstance(p, ToolCall)
        else p
        for p in parts
    ]
    return tuple(p for p in trimmed if p.text) or (Text(""),)


def _random_config(common: dict[str, Any], sizes: Mapping[str, int]) -> PretrainedConfig:
    from transformers import Qwen3Config

    return Qwen3Config(intermediate_size=3 * common["hidden_size"], **common)


QWEN_STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
QWEN_THOUGHT_ENDS = (("</think>",),)
# In Qwen3's tokenizer.json these are added tokens that are not special.
QWEN_CONTROL_MARKERS = ("</?think>", "</?tool_call>", "</?tool_response>")
THINKING_ON_OFF = (ThinkingEffort.NONE, ThinkingEffort.HIGH)
THINKING_OFF_ONLY = (ThinkingEffort.NONE,)
QWEN = Family(
    name="qwen",
    signature_token="<|im_start|>",
    efforts=THINKING_ON_OFF,
    control_markers=QWEN_CONTROL_MARKERS,
    thought_ends=QWEN_THOUGHT_ENDS,
    stop_tokens=QWEN_STOP_TOKENS,
    normalise=normalise,
    template_inputs=template_inputs,
    parse=parse,
    template_signature="enable_thinking is defined and",
    is_tool_text_verbatim=always_verbatim,
    random_config=_random_config,
)
QWEN25 = Family(
    name="qwen2.5",
    signature_token="<|im_start|>",
    efforts=THINKING_OFF_ONLY,
    control_markers=QWEN_CONTROL_MARKERS,
    stop_tokens=QWEN_STOP_TOKENS,
    normalise=normalise_qwen25,
    template_inputs=template_inputs_qwen25,
    parse=parse_qwen25,
    template_signature='or (message.role == "assistant" and not message.tool_calls)',
    is_tool_text_verbatim=always_verbatim,
)
QWEN3_CODER = Family(
    name="qwen3-coder",
    signature_token="<|im_start|>",
    efforts=THINKING_OFF_ONLY,
    control_markers=QWEN_CONTROL_MARKERS,
    stop_tokens=QWEN_STOP_TOKENS,
    normalise=normalise_coder,
    template_inputs=template_inputs_coder,
    parse=parse_coder,
    template_signature="<parameter=example_parameter_1>\\nvalue_1\\n</parameter>",
    is_tool_text_verbatim=verbatim_except_calls,
    resolve_calls=resolve_call_types,
)
QWQ = Family(
    name="qwq",
    signature_token="<|im_start|>",
    efforts=THINKING_ON_OFF,
    control_markers=QWEN_CONTROL_MARKERS,
    thought_ends=QWEN_THOUGHT_ENDS,
    stop_tokens=QWEN_STOP_TOKENS,
    normalise=normalise_qwq,
    template_inputs=template_inputs_qwq,
    parse=parse_qwq,
    template_signature='elif message.role == "assistant" and not message.tool_calls',
    is_tool_text_verbatim=always_verbatim,
)
