"""Tools in every variant of every family: rendered as by transformers, parsed back, losses
refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from persea.chat.families import candidate_families
from persea.chat.families.gemma import GEMMA, GEMMA4
from persea.chat.families.gpt_oss import GPT_OSS, REASONING_EFFORT_NAMES
from persea.chat.families.llama import LLAMA
from persea.chat.families.qwen import QWEN, QWEN3_CODER, QWEN25, QWQ
from persea.chat.families.qwen35 import QWEN35_ALL_THOUGHTS
from persea.chat.family import Family
from persea.chat.messages import (
    PINNED_DATE,
    ContentPart,
    Conversation,
    FinishReason,
    Message,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
    Tool,
    ToolCall,
    ToolResult,
    canonical_json,
)
from persea.chat.renderer import ChatRenderer
from persea.chat.template import compile_template
from persea.errors import DataError
from persea.tokenization.tokens import RenderedTokens
from tests.chat.families.test_families import vocabulary
from tests.chat.test_renderer import FRAGMENTS, LOOK_ALIKES, generated, texts
from tests.conftest import Speaker

FORMS: dict[str, tuple[str, Family]] = {  # template -> tokenizer's family, form
    "qwen2.5": ("qwen", QWEN25),
    "qwq-32b": ("qwen", QWQ),
    "qwen3": ("qwen", QWEN),
    "qwen3-coder": ("qwen", QWEN3_CODER),
    "qwen3.5": ("qwen", QWEN35_ALL_THOUGHTS),
    "gemma3": ("gemma", GEMMA),
    "gpt-oss": ("gpt-oss", GPT_OSS),
    "llama3.1": ("llama", LLAMA),
    "llama3.2": ("llama", LLAMA),
    "llama3.3": ("llama", LLAMA),
}
WITH_TOOLS = tuple(name for name in FORMS if name != "gemma3")
SCHEMA = canonical_json(
    json.dumps(
        {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "where"},
                "days": {"type": "integer"},
                "sure": {"type": "boolean"},
                "list": {"type": "array", "items": {"type": "string"}},
                "more": {"type": "object"},
                "any": {"type": "string"},
            },
            "required": ["place"],
        }
    )
)
WEATHER = Tool("get_weather", "What the weather will be", SCHEMA)
CLOCK = Tool("clock", "What time it is", canonical_json('{"type": "object", "properties": {}}'))
CALL = ToolCall(
    "get_weather",
    '{"place": "Hà Nội", "days": 2, "sure": true, "list": ["a", "b\\n"], "more": {"x": 1.5}}',
)


@dataclass(frozen=True, repr=False)
class Form:
    """One template on its tokenizer, and transformers' tokenizer as the reference."""

    name: str
    renderer: ChatRenderer
    tokenizer: Any

    def __repr__(self) -> str:
        return f"Form({self.name})"

    def theirs(self, conversation: Conversation, generate: bool) -> list[int]:
        """Return transformers' rendering of the texts as they are given."""
        family, messages = self.renderer.family, []
        for k, m in enumerate(conversation.messages):
            message: dict[str, Any] = {"role": m.role.value, "content": m.text}
            if m.role is Role.TOOL:
                messages += [{"role": "tool", "name": p.name, "content": p.text} for p in m.parts]
                continue
            thinks = m.thinking and (
                conversation.effort is not ThinkingEffort.NONE or family is GPT_OSS
            )
            if family is QWQ and m.role is Role.ASSISTANT and k == len(conversation.messages) - 1:
                message["content"] = (
                    f"<think>\n{m.thinking}\n</think>\n\n{m.text}"
                    if thinks
                    else f"<think>\n</think>\n\n{m.text}"
                )
            elif family in (QWEN, QWEN35_ALL_THOUGHTS) and m.role is Role.ASSISTANT:
                message["reasoning_content"] = m.thinking if thinks else ""
            elif thinks and family is GPT_OSS:
                message["thinking"] = m.thinking
            if m.calls:
                message["tool_calls"] = [
                    {"function": {"name": c.name, "arguments": json.loads(c.arguments)}}
                    for c in m.calls
                ]
            messages.append(message)
        on = conversation.effort is not ThinkingEffort.NONE
        switches = (
            {"enable_thinking": on}
            if family is not GPT_OSS
            else {"reasoning_effort": REASONING_EFFORT_NAMES[conversation.effort]}
            | ({} if on else {"enable_thinking": False})
        )
        tools = [
            {
                "type": "function",
                "function": {
                    "name": t.name,
                    "description": t.description,
                    "parameters": json.loads(t.parameters),
                },
            }
            for t in conversation.tools
        ]
        today = {"date_string": PINNED_DATE.strftime("%d %b %Y")} if self.name == "llama3.2" else {}
        ids = self.tokenizer.apply_chat_template(
            messages,
            tools=tools or None,
            chat_template=self.renderer.template_text,
            add_generation_prompt=generate,
            tokenize=True,
            return_dict=False,
            **switches,
            **today,
        )
        assert isinstance(ids, list)
        return ids


def formed(name: str, speaker: Speaker, data: Path) -> Form:
    text = (data / "templates" / f"{name}.jinja").read_text()
    special = {k: v for k, v in speaker.tokenizer.special_tokens_map.items() if isinstance(v, str)}
    today = (
        speaker.today().template_date if name == "gpt-oss" else PINNED_DATE
    )  # transformers can be told no other date than today
    renderer = replace(
        speaker.renderer,
        family=FORMS[name][1],
        template=compile_template(text, special, today, name),
        template_text=text,
        template_date=today,
    )
    return Form(name, renderer, speaker.tokenizer)


@pytest.fixture(scope="session")
def form_of(real_of: Callable[[str], Speaker], data: Path) -> Callable[[str], Form]:
    return cache(lambda name: formed(name, real_of(FORMS[name][0]), data))


def written(form: Form, conversation: Conversation) -> list[tuple[int, bytes]]:
    """Return (offset in the content, bytes) of each part that must have tokens."""
    retained, at, out = form.renderer.family.normalise(conversation), 0, []
    for whole, part in zip(conversation.parts(), retained.parts(), strict=True):
        bare = (
            isinstance(part, (Text, Thinking))
            or (
                isinstance(part, ToolCall)
                and form.renderer.family not in (QWEN35_ALL_THOUGHTS, QWEN3_CODER, GEMMA4)
            )
            or (
                isinstance(part, ToolResult)
                and (
                    form.renderer.family not in (LLAMA, GPT_OSS)
                    or json.dumps(part.text, ensure_ascii=False)[1:-1] == part.text
                )
            )
        )
        if part.text and bare:
            out.append(
                (at + len(whole.text[: whole.text.index(part.text)].encode()), part.text.encode())
            )
        at += len(whole.text.encode()) + 1
    return out


def check_bytes(form: Form, conversation: Conversation, tokens: RenderedTokens) -> None:
    """Check that exactly one token holds each byte of a written part, and no token any other
    byte."""
    parts = written(form, conversation)
    content = b"\xff".join(p.text.encode() for p in conversation.parts())
    covered = np.zeros(len(content) + 1, int)
    for i, start, end in zip(
        tokens.ids_T.tolist(), tokens.starts_T.tolist(), tokens.ends_T.tolist(), strict=True
    ):
        piece = form.renderer.vocabulary.bytes_W[i]
        if piece is None or end < 0:
            continue
        begun = start >= 0
        if not begun:  # it begins in the scaffolding, or ends there
            part = max(a for a, _ in parts if a < end)
            start = part if content[part:end] in piece else part + int(np.argmin(covered[part:end]))
        content_piece = content[start:end].replace(b"\xff", b"")
        assert (
            content_piece == piece
            if begun
            else content_piece in piece and len(content_piece) < len(piece)
        )
        assert begun or piece.endswith(content_piece) or end in [a + len(text) for a, text in parts]
        covered[start:end] += np.frombuffer(content[start:end], np.uint8) != 0xFF
    want = np.zeros(len(content) + 1, int)
    for at, text in parts:
        want[at : at + len(text)] = 1
    assert (covered == want).all()


def check(form: Form, conversation: Conversation, raw: bool = True) -> None:
    """Check the rendering against transformers, the byte offsets, and the parsed answer."""
    renderer = form.renderer
    given = conversation if raw else renderer.family.normalise(conversation)
    tokens, prompt = (
        renderer.render(conversation),
        renderer.render_prompt(replace(conversation, messages=conversation.messages[:-1])),
    )
    whole = form.theirs(given, False)
    assert tokens.ids_T.tolist() == whole
    assert prompt.ids_T.tolist() == form.theirs(replace(given, messages=given.messages[:-1]), True)
    check_bytes(form, conversation, tokens)
    read_back(renderer, conversation, tokens)


def read_back(renderer: ChatRenderer, conversation: Conversation, tokens: RenderedTokens) -> None:
    retained = tuple(
        p for p in renderer.family.normalise(conversation).messages[-1].parts if p.text
    )
    parts, finish = renderer.parse(generated(tokens), conversation.effort, conversation.tools)
    assert (tuple(p for p in parts if p.text), finish) == (retained, FinishReason.STOP)


def conversations(line: str, effort: ThinkingEffort, name: str) -> list[Conversation]:
    """Conversations with and without system text, tools, calls and results, and with empty
    parts."""
    user, say = Message(Role.USER, (Text(line),)), Message(Role.ASSISTANT, (Text(f"Yes: {line}"),))
    system, short = (
        Message(Role.SYSTEM, (Text(f"Be brief. {line}"),)),
        Message(Role.ASSISTANT, (Text(line[:5]),)),
    )
    # a form whose prompt opens <think> has no spelling for no thought where thinking is on
    thinks = Thinking(f"{line} So") if effort is not ThinkingEffort.NONE else Thinking("")
    think = Message(Role.ASSISTANT, (thinks, Text(f"({line})")))
    turns = [
        (user, say),
        (system, user, think),
        (system, user, say, user, think),
        (user, think, user, say, user, short),
        (Message(Role.SYSTEM, (Text(""),)), user, say),
        (Message(Role.USER, (Text(""),)), Message(Role.ASSISTANT, (thinks, Text("")))),
        (user, Message(Role.ASSISTANT, (Text(""),)), user, think),
    ]
    talk = [Conversation(t, effort) for t in turns]
    if name == "gemma3":
        return talk
    call = Message(Role.ASSISTANT, (thinks, CALL))
    result = Message(Role.TOOL, (ToolResult("get_weather", f"{line} 31°"),))
    quoted = Message(Role.TOOL, (ToolResult("get_weather", '{"degrees": "31"}\n' + line),))
    tools = (WEATHER, CLOCK)
    bare = Message(Role.ASSISTANT, (CALL,))
    turns = [
        (user, say),
        (system, user, think),
        (user, call),
        (system, user, say, user, call),
        (user, bare, result, think),
        (system, user, bare, quoted, say, user, think),
        (user, call, result, call, quoted, call),
    ]
    if name.startswith("q"):
        both = Message(
            Role.ASSISTANT, (thinks, Text(f"Let me see: {line}"), CALL, ToolCall("clock", "{}"))
        )
        turns += [
            (user, both),
            (user, both, Message(Role.TOOL, (*result.parts, ToolResult("clock", "7:15"))), think),
        ]
    return talk + [Conversation(t, effort, tools) for t in turns]


def opens_without_thought(form: Form, conversation: Conversation) -> bool:
    """Whether Qwen 3.5 is asked to think and has no thought.

    Its template then writes two line breaks as one token, where its prompt has another token.
    """
    return (
        form.renderer.family is QWEN35_ALL_THOUGHTS
        and conversation.effort is not ThinkingEffort.NONE
        and not conversation.messages[-1].thinking
    )


def lines(data: Path) -> list[str]:
    return [
        p.read_text(encoding="utf-8").splitlines()[0]
        for p in sorted((data / "parallel").glob("ntrex.*.txt"))
    ]


@pytest.mark.realdata
@pytest.mark.parametrize("name", FORMS)
def test_every_template_in_fifteen_languages(form_of: Callable[[str], Form], data: Path, name: str):
    form, said = form_of(name), lines(data)
    assert len(said) == 15
    efforts = form.renderer.family.efforts
    for k, line in enumerate(said):
        for n, conversation in enumerate(
            conversations(" ".join(line.split()), efforts[k % len(efforts)], name)
        ):
            if (
                k >= 3 and n % 3 != k % 3
            ):  # all shapes in three languages, a third of them in the others
                continue
            if opens_without_thought(form, conversation):
                with pytest.raises(DataError, match="covers the end of the prompt"):
                    form.renderer.render(conversation)
            else:
                check(form, conversation)


# ---- properties ----------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn, fragments: list[str]) -> ToolCall:
    """A call whose values have the types that its tool declares."""
    if draw(st.integers(0, 3)) == 0:
        return ToolCall("clock", "{}")
    text = texts(fragments)
    number = st.one_of(
        st.integers(-(10**20), 10**20), st.floats(allow_nan=False, allow_infinity=False)
    )
    more = st.dictionaries(
        st.sampled_from(["x", "y z", "ключ"]),
        st.one_of(number, text, st.none(), st.booleans()),
        max_size=2,
    )
    values = draw(
        st.fixed_dictionaries(
            {"place": text},
            optional={
                "any": text,
                "days": st.integers(),
                "sure": st.booleans(),
                "list": st.lists(text, max_size=3),
                "more": more,
            },
        )
    )
    return ToolCall("get_weather", canonical_json(json.dumps(values)))


@st.composite
def tool_talks(draw: st.DrawFn, fragments: list[str], name: str) -> Conversation:
    """One to three turns of a question, up to two rounds of call and result, and an answer or a
    call."""
    text = texts([f for f in fragments if "channel" not in f] if name == "gpt-oss" else fragments)

    def thought() -> tuple[ContentPart, ...]:
        return (Thinking(draw(text)),) if draw(st.booleans()) else ()

    tools = name != "gemma3" and draw(st.integers(0, 4)) > 0
    messages = [Message(Role.SYSTEM, (Text(draw(text)),))] if draw(st.booleans()) else []
    turns = draw(st.integers(1, 3))
    for turn in range(turns):
        messages.append(Message(Role.USER, (Text(draw(text)),)))
        for _ in range(draw(st.integers(0, 2)) if tools else 0):
            some = draw(
                st.lists(calls(fragments), min_size=1, max_size=2 if name.startswith("q") else 1)
            )
            words = (Text(draw(text)),) if name.startswith("q") and draw(st.booleans()) else ()
            messages.append(Message(Role.ASSISTANT, (*thought(), *words, *some)))
            messages.append(Message(Role.TOOL, tuple(ToolResult(c.name, draw(text)) for c in some)))
        if tools and turn == turns - 1 and draw(st.booleans()):
            messages.append(Message(Role.ASSISTANT, (*thought(), draw(calls(fragments)))))
        else:
            messages.append(Message(Role.ASSISTANT, (*thought(), Text(draw(text)))))
    return Conversation(
        tuple(messages), draw(st.sampled_from(ThinkingEffort)), (WEATHER, CLOCK) if tools else ()
    )


def refused(form: Form, conversation: Conversation, error: DataError) -> bool:
    """Whether the refusal is one that a person would expect for this conversation."""
    turns = [p.text for m in conversation.messages for p in m.parts]
    controls = any(
        name in text.replace('\\\\"', '"')
        for text in turns
        for name in form.renderer.vocabulary.control_token_ids
    )
    if "is a control token of this tokenizer" in error.message:
        return controls
    if "covers the end of the prompt" in error.message:
        return (
            form.renderer.family is QWEN35_ALL_THOUGHTS
            and conversation.effort is not ThinkingEffort.NONE
        )
    if (
        "changes the content" in error.message
    ):  # QwQ's template looks for the thought's end in the text
        return form.renderer.family is QWQ and any("</think>" in text for text in turns)
    return (
        "are ambiguous" in error.message
        and form.renderer.family in (QWEN3_CODER, QWEN35_ALL_THOUGHTS)
        and any("parameter" in t for t in turns)
    )


@pytest.mark.realdata
@pytest.mark.parametrize("name", FORMS)
@given(data=st.data())
def test_renderings_with_tools_are_parsed_back(
    form_of: Callable[[str], Form], name: str, data: st.DataObject
):
    form = form_of(name)
    conversation = data.draw(tool_talks(FRAGMENTS + LOOK_ALIKES, name))
    retained = form.renderer.family.normalise(conversation)
    assert form.renderer.family.normalise(retained) == retained
    try:
        tokens = form.renderer.render(conversation)
    except DataError as error:
        assert refused(form, conversation, error), error
        return
    check_bytes(form, conversation, tokens)
    read_back(form.renderer, conversation, tokens)
    if not any(
        c in p.text
        for p in conversation.parts()
        for c in form.renderer.vocabulary.control_token_ids
    ):
        assert tokens.ids_T.tolist() == form.theirs(retained, False)


@pytest.mark.realdata
@pytest.mark.parametrize("name", WITH_TOOLS)
@pytest.mark.parametrize("effort", [ThinkingEffort.NONE, ThinkingEffort.HIGH])
def test_an_answer_cut_anywhere_is_never_a_call(
    form_of: Callable[[str], Form], name: str, effort: ThinkingEffort
):
    """A cut answer is LENGTH without a stop, and malformed or text with one; never an exception."""
    renderer = form_of(name).renderer
    question = Conversation.from_question("Hi", effort=effort)
    for parts in ((Thinking("So it is"), CALL), (Thinking("So it is"), Text("Hello there"))):
        conversation = replace(question.with_answer(*parts), tools=(WEATHER, CLOCK))
        ids = generated(renderer.render(conversation))
        assert renderer.parse(ids, effort, conversation.tools)[1] is FinishReason.STOP
        for end in range(len(ids)):
            for stop in ((), *((s,) for s in renderer.stop_ids)):
                found, finish = renderer.parse([*ids[:end], *stop], effort, conversation.tools)
                assert stop or finish is FinishReason.LENGTH
                assert (
                    not stop
                    or end == len(ids) - 1
                    or not any(isinstance(p, ToolCall) for p in found)
                )
                if stop and name == "gpt-oss":
                    told = b"".join(
                        p if isinstance(p, bytes) else p.encode()
                        for p in renderer.vocabulary.decode_pieces(ids[:end])
                    )
                    whole = b"<|channel|>final<|message|>" in told or end == len(ids) - 1
                    assert finish is (FinishReason.STOP if whole else FinishReason.MALFORMED)


@pytest.mark.realdata
@pytest.mark.parametrize("name", WITH_TOOLS)
@given(data=st.data())
def test_a_call_with_any_token_changed_is_no_exception(
    form_of: Callable[[str], Form], name: str, data: st.DataObject
):
    renderer = form_of(name).renderer
    conversation = replace(
        Conversation.from_question("Hi", effort=ThinkingEffort.HIGH).with_answer(
            Thinking("So"), CALL
        ),
        tools=(WEATHER,),
    )
    ids = generated(renderer.render(conversation))
    for _ in range(data.draw(st.integers(1, 3))):
        at, other = (
            data.draw(st.integers(0, len(ids) - 1)),
            data.draw(st.sampled_from([*ids, *renderer.vocabulary.control_token_ids.values()])),
        )
        ids[at : at + data.draw(st.integers(0, 1))] = [other]
    parts, finish = renderer.parse(
        [*ids, renderer.stop_ids[0]], ThinkingEffort.HIGH, conversation.tools
    )
    assert finish in (FinishReason.STOP, FinishReason.MALFORMED)
    assert finish is FinishReason.STOP or parts == ()


# ---- what no template may lose -------------------------------------------------------------------

ASKED = Message(Role.USER, (Text("Hi"),))
CALLED = Message(Role.ASSISTANT, (CALL,))
RESULT = Message(Role.TOOL, (ToolResult("get_weather", "31"),))


@pytest.mark.realdata
def test_gemma3_refuses_tools_and_does_not_lose_them(form_of: Callable[[str], Form]):
    for conversation in (
        Conversation((ASKED,), tools=(WEATHER,)),
        Conversation((ASKED, CALLED, RESULT)),
    ):
        with pytest.raises(DataError, match="template of this family drops tools"):
            form_of("gemma3").renderer.render_prompt(conversation)


@pytest.mark.parametrize("family", ["qwen", "gpt-oss"])
def test_a_template_without_tools_is_detected(tiny_of: Callable[[str], Speaker], family: str):
    """A sapling's template has tools; the same template without its lines about tools has none."""
    renderer = tiny_of(family).renderer
    text = re.sub(
        r"\{%- if tools %}.*?\n\{%- endif %}\n",
        "",
        renderer.template_text,
        count=1,
        flags=re.DOTALL,
    )
    text = text.replace("'tool_calls'", "'no_calls'")
    bare = replace(
        renderer,
        template=compile_template(text, dict(renderer.special_tokens), PINNED_DATE, family),
        template_text=text,
    )
    for conversation in (
        Conversation((ASKED,), tools=(WEATHER,)),
        Conversation((ASKED, CALLED, ASKED)),
    ):
        renderer.render_prompt(conversation)
        with pytest.raises(DataError, match=r"drops tools|changes the content"):
            bare.render_prompt(conversation)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        ("llama3.1", (ASKED, Message(Role.ASSISTANT, (CALL, CALL))), "2 tool calls"),
        ("llama3.1", (ASKED, Message(Role.ASSISTANT, (Text("So"), CALL))), "1 tool calls and text"),
        (
            "llama3.1",
            (ASKED, Message(Role.ASSISTANT, (Text('{"name": "f", "parameters": {}}'),))),
            "reads as a tool call",
        ),
        (
            "llama3.1",
            (Message(Role.ASSISTANT, (Text("Hi"),)), ASKED),
            "does not begin with a question",
        ),
        ("gpt-oss", (ASKED, Message(Role.ASSISTANT, (CALL, CALL))), "2 tool calls"),
        ("gpt-oss", (ASKED, Message(Role.ASSISTANT, (Text("So"), CALL))), "1 tool calls and text"),
        (
            "gpt-oss",
            (ASKED, CALLED, Message(Role.TOOL, (ToolResult("clock", "7"),))),
            "the last call is of get_weather",
        ),
        ("gpt-oss", (ASKED, RESULT), "the last call is of no tool"),
        (
            "qwen3.5",
            (ASKED, Message(Role.ASSISTANT, (ToolCall("f", '{"x": "1"}'),))),
            "are ambiguous",
        ),
        (
            "qwen3-coder",
            (ASKED, Message(Role.ASSISTANT, (ToolCall("f", '{"x": "a\\n</parameter>\\n"}'),))),
            "are ambiguous",
        ),
        (
            "qwen3.5",
            (ASKED, Message(Role.ASSISTANT, (ToolCall("clock", '{"x": "<|im_end|>"}'),))),
            "is a control token",
        ),
        (
            "gpt-oss",
            (ASKED, CALLED, Message(Role.TOOL, (ToolResult("get_weather", '"<|return|>"'),))),
            "is a control token",
        ),
        (
            "qwen3",
            (ASKED, Message(Role.ASSISTANT, (CALL, Text("words behind")))),
            "mixes parts that do not belong",
        ),
        (
            "qwen3",
            (ASKED, CALLED, Message(Role.TOOL, (Text("31"),))),
            "mixes parts that do not belong",
        ),
        (
            "qwen3",
            (ASKED, Message(Role.USER, (ToolResult("get_weather", "31"),))),
            "mixes parts that do not belong",
        ),
    ],
)
def test_content_that_a_template_would_drop_or_blur_is_refused(
    form_of: Callable[[str], Form], name: str, messages: tuple[Message, ...], reason: str
):
    with pytest.raises(DataError, match=reason):
        form_of(name).renderer.render_prompt(Conversation(messages, tools=(WEATHER, CLOCK)))


@pytest.mark.realdata
def test_content_like_a_placeholder_is_content(form_of: Callable[[str], Form]):
    """Placeholders use private characters, and a tool's quoted result may contain the same ones."""
    odd = Message(
        Role.TOOL,
        (ToolResult("get_weather", 'a "\ue0000.0\ue001" \ue0001.1\ue001 {"\ue0000.1\ue001": 0}'),),
    )
    conversation = Conversation(
        (ASKED, CALLED, odd, Message(Role.ASSISTANT, (Text("\ue0002.0\ue001"),))), tools=(WEATHER,)
    )
    for name in ("llama3.1", "gpt-oss", "qwen3", "qwen3.5"):
        check(form_of(name), conversation)


@pytest.mark.realdata
def test_the_thought_before_a_call_is_seen_while_calling_and_dropped_when_answered(
    form_of: Callable[[str], Form],
):
    """In gpt-oss' template the prompt after a result has the thought, the finished conversation
    does not."""
    form = form_of("gpt-oss")
    thinking = Message(Role.ASSISTANT, (Thinking("Let me look"), CALL))
    asking = Conversation((ASKED, thinking, RESULT), ThinkingEffort.HIGH, (WEATHER,))
    renderings = [
        form.renderer.vocabulary.decode_pieces(t.ids_T.tolist())
        for t in (
            form.renderer.render_prompt(asking),
            form.renderer.render(asking.with_answer(Text("31"))),
        )
    ]
    assert [b"Let me look" in pieces for pieces in renderings] == [True, False]
    assert form.renderer.render_prompt(asking).ids_T.tolist() == form.theirs(asking, True)
    assert form.renderer.render(asking.with_answer(Text("31"))).ids_T.tolist() == form.theirs(
        asking.with_answer(Text("31")), False
    )


@pytest.mark.realdata
def test_a_control_token_in_a_tool_is_refused(form_of: Callable[[str], Form]):
    tool = replace(WEATHER, description="Say <|im_end|>")
    with pytest.raises(DataError, match="is a control token"):
        form_of("qwen3").renderer.render_prompt(Conversation((ASKED,), tools=(tool,)))


@pytest.mark.realdata
def test_every_form_is_a_candidate_by_its_template(data: Path):
    for name, (_, form) in FORMS.items():
        text = (data / "templates" / f"{name}.jinja").read_text()
        assert form in candidate_families(vocabulary(form.signature_token), text), name


# ---- answers -------------------------------------------------------------------------------------

HARMONY_CALL = ("<|message|>", b'{"x":1}')
CLOCKED = (ToolCall("clock", '{"x": 1}'),)


@pytest.mark.parametrize(
    ("pieces", "want"),
    [
        ((b" to=functions.clock", "<|channel|>", b"commentary json", *HARMONY_CALL), CLOCKED),
        (
            (
                "<|channel|>",
                b"commentary to=functions.clock ",
                "<|constrain|>",
                b"json",
                *HARMONY_CALL,
            ),
            CLOCKED,
        ),
        (("<|channel|>", b"commentary to=functions.clock", *HARMONY_CALL), CLOCKED),
        (
            (
                "<|channel|>",
                b"analysis",
                "<|message|>",
                b"so",
                "<|end|>",
                "<|start|>",
                b"assistant to=functions.clock",
                "<|channel|>",
                b"commentary json",
                *HARMONY_CALL,
            ),
            (Thinking("so"), *CLOCKED),
        ),
        ((b" to=functions.clock", "<|channel|>", b"final", *HARMONY_CALL), None),
        ((b" to=clock", "<|channel|>", b"commentary json", *HARMONY_CALL), None),
        ((b" to=functions.clock", "<|channel|>", b"commentary json", "<|message|>", b"[1]"), None),
        (
            (
                b" to=functions.clock",
                "<|channel|>",
                b"commentary json",
                "<|message|>",
                b'{"x": NaN}',
            ),
            None,
        ),
        (
            (
                b" to=functions.clock",
                "<|channel|>",
                b"commentary json",
                "<|message|>",
                b"{" * 100_000,
            ),
            None,
        ),
        ((b" to=functions.cl\xc3\xb6ck", "<|channel|>", b"commentary json", *HARMONY_CALL), None),
        (("<|channel|>", b"commentary", *HARMONY_CALL), None),
    ],
)
def test_harmony_calls(pieces: tuple[str | bytes, ...], want: tuple[ContentPart, ...] | None):
    assert GPT_OSS.parse(pieces, ThinkingEffort.HIGH) == want


@pytest.mark.parametrize(
    ("body", "want"),
    [
        (b'\n{"name": "clock", "arguments": {"x":1}}\n', CLOCKED),
        (b'{"name": "clock", "arguments": {"x": 1}}', CLOCKED),
        (b'{"name": "clock"}', None),
        (b'{"name": 7, "arguments": {}}', None),
        (b'{"name": "clock", "arguments": "{}"}', None),
        (b'{"name": "clock", "arguments": {"x": "\\ud800"}}', None),
        (b"[]", None),
        (b"", None),
        (b"{", None),
    ],
)
def test_qwen_calls(body: bytes, want: tuple[ContentPart, ...] | None):
    for family in (QWEN, QWEN25):
        assert family.parse(("<tool_call>", body, "</tool_call>"), ThinkingEffort.NONE) == want
        assert family.parse(
            (b"So\n", "<tool_call>", body, "</tool_call>"), ThinkingEffort.NONE
        ) == (want and (Text("So"), *want))
        assert family.parse(
            ("<tool_call>", body, "</tool_call>", b"\n", "<tool_call>", body, "</tool_call>"),
            ThinkingEffort.NONE,
        ) == (want and want * 2)
    for pieces in (
        ("<tool_call>", body),
        ("<tool_call>", body, "</tool_call>", b"words"),
        ("<tool_call>", "</tool_call>"),
    ):
        assert QWEN.parse(pieces, ThinkingEffort.NONE) is None


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ('{"name": "clock", "parameters": {"x": 1}}', CLOCKED),
        (' {"parameters":{"x":1},"name":"clock"}\n', CLOCKED),
        ('{"name": "Ada", "age": 36}', (Text('{"name": "Ada", "age": 36}'),)),
        ("Hi", (Text("Hi"),)),
        ("{x}", (Text("{x}"),)),
        ('{"name": "clock", "param', None),
        ('{"name": "clock", "parameters": 7}', None),
        ('{"name": "a b", "parameters": {}}', None),
    ],
)
def test_llama_calls_only_where_tools_were_declared(
    text: str, want: tuple[ContentPart, ...] | None
):
    assert LLAMA.resolve_calls((Text(text),), (CLOCK,)) == want
    assert LLAMA.resolve_calls((Text(text),), ()) == (Text(text),)


@pytest.mark.parametrize(
    ("spelled", "value"),
    [
        ("2", 2),
        ("x", "x"),
        ("NaN", "NaN"),
        ("1e999", "1e999"),
        ("True", True),
        ("None", None),
        ("", ""),
    ],
)
def test_a_bare_value_gets_its_type(spelled: str, value: object):
    spelled_call = (
        f"<function=get_weather>\n<parameter=place>\n{spelled}\n</parameter>\n"
        f"<parameter=days>\n{spelled}\n</parameter>\n</function>"
    )
    read = QWEN35_ALL_THOUGHTS.parse(
        ("<tool_call>", spelled_call.encode(), "</tool_call>"), ThinkingEffort.NONE
    )
    assert read is not None
    typed = QWEN35_ALL_THOUGHTS.resolve_calls(read, (WEATHER,))
    assert typed is not None
    assert json.loads(typed[0].text) == {"place": spelled, "days": value}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"a":1}',
        '{"a": 1e999}',
        '{"a": "\\u00e9"}',
        '{"a": 1, "a": 1}',
        "{" * 100_000,
    ],
)
def test_json_in_another_spelling_is_refused(text: str):
    with pytest.raises(DataError, match="JSON of tool"):
        ToolCall("f", text)
    with pytest.raises(DataError, match="JSON of tool"):
        Tool("f", "", text)


@pytest.mark.parametrize("name", ["", "a b", "<|im_end|>", "é", "x" * 65, 'a"'])
def test_a_name_no_template_could_hold_is_refused(name: str):
    for make in (
        lambda: ToolCall(name, "{}"),
        lambda: ToolResult(name, ""),
        lambda: Tool(name, "", "{}"),
    ):
        with pytest.raises(DataError, match="is not a valid tool name"):
            make()
    assert ToolCall.from_generated(name, "{}") is None


@given(conversation=tool_talks(FRAGMENTS + LOOK_ALIKES, "qwen3"))
def test_json_round_trip_with_tools(conversation: Conversation):
    assert Conversation.from_json(json.loads(json.dumps(conversation.to_json()))) == conversation


def test_records_from_before_tools_are_read_and_written_as_they_were():
    record = {
        "effort": "none",
        "messages": [{"role": "user", "parts": [{"kind": "text", "text": "Hi"}]}],
    }
    assert Conversation.from_json(record).to_json() == record


def test_a_decomposed_call_is_composed():
    composed = (
        Conversation.from_question("x")
        .with_answer(ToolCall("f", '{"e\u0301": "o\u0308"}'))
        .messages[-1]
        .parts
    )
    assert composed == (ToolCall("f", '{"é": "ö"}'),)


# ---- Gemma 4: its tokenizer is not at hand, so a tiny one with its control tokens ----------------

CONTROLS4 = (
    "<bos>",
    "<eos>",
    "<|turn>",
    "<turn|>",
    "<|think|>",
    "<|channel>",
    "<channel|>",
    "<|tool>",
    "<tool|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
    "<|image|>",
)


@pytest.fixture(scope="session")
def gemma4(data: Path) -> Form:
    from transformers import PreTrainedTokenizerFast

    text = (data / "templates" / "gemma4.jinja").read_text()
    words = vocabulary(*CONTROLS4)
    judge = Tokenizer.from_str(words.backend.to_str())
    judge.encode_special_tokens = False
    renderer = ChatRenderer(
        GEMMA4, words, compile_template(text, {"bos_token": "<bos>"}, PINNED_DATE, "gemma4"), text
    )
    return Form(
        "gemma4",
        renderer,
        PreTrainedTokenizerFast(tokenizer_object=judge, bos_token="<bos>", eos_token="<eos>"),
    )


def theirs4(form: Form, conversation: Conversation, generate: bool) -> str:
    """Return transformers' rendering of the conversation as text."""
    messages: list[dict[str, Any]] = []
    for m in conversation.messages:
        if m.role is Role.TOOL:
            messages += [
                {"role": "tool", "name": p.name, "tool_call_id": p.name, "content": p.text}
                for p in m.parts
            ]
            continue
        messages.append(
            {
                "role": m.role.value,
                "content": m.text,
                "reasoning_content": m.thinking
                if conversation.effort is not ThinkingEffort.NONE
                else "",
            }
        )
        if m.calls:
            messages[-1]["tool_calls"] = [
                {"id": c.name, "function": {"name": c.name, "arguments": json.loads(c.arguments)}}
                for c in m.calls
            ]
    tools = [
        {
            "type": "function",
            "function": {
                "name": t.name,
                "description": t.description,
                "parameters": json.loads(t.parameters),
            },
        }
        for t in conversation.tools
    ]
    text = form.tokenizer.apply_chat_template(
        messages,
        tools=tools or None,
        chat_template=form.renderer.template_text,
        add_generation_prompt=generate,
        tokenize=False,
        enable_thinking=conversation.effort is not ThinkingEffort.NONE,
    )
    assert isinstance(text, str)
    return text


def check4(form: Form, conversation: Conversation) -> None:
    """Check that the rendering is the template's prompt and the rest of the template's
    rendering."""
    question = replace(conversation, messages=conversation.messages[:-1])
    prompt, whole = theirs4(form, question, True), theirs4(form, conversation, False)
    answer_text = whole.removeprefix(
        prompt.removesuffix(
            GEMMA4.prompt_only_suffix if conversation.effort is ThinkingEffort.NONE else ""
        )
    )
    assert len(answer_text) < len(whole)
    tokens = form.renderer.render(conversation)
    assert form.renderer.render_prompt(question).ids_T.tolist() == form.tokenizer.encode(
        prompt, add_special_tokens=False
    )
    assert tokens.ids_T.tolist() == form.tokenizer.encode(
        prompt + answer_text, add_special_tokens=False
    )
    check_bytes(form, conversation, tokens)
    read_back(form.renderer, conversation, tokens)


def talks4(line: str, effort: ThinkingEffort) -> list[Conversation]:
    return [
        replace(
            c,
            messages=tuple(
                replace(m, parts=tuple(p for p in m.parts if not (m.calls and isinstance(p, Text))))
                for m in c.messages
            ),
        )
        for c in conversations(line, effort, "qwen")
    ]


@pytest.mark.realdata
@pytest.mark.parametrize("effort", GEMMA4.efforts)
def test_gemma4_by_its_template(gemma4: Form, data: Path, effort: ThinkingEffort):
    for line in lines(data)[:4]:
        for conversation in talks4(line, effort):
            check4(gemma4, conversation)


@pytest.mark.realdata
@given(conversation=tool_talks(FRAGMENTS, "gemma-4"))
def test_gemma4_renderings_are_parsed_back(gemma4: Form, conversation: Conversation):
    assume(not any(name in p.text for p in conversation.parts() for name in CONTROLS4))
    try:
        check4(gemma4, conversation)
    except DataError as error:
        assert "are ambiguous" in error.message


def test_content_that_gemma4_keeps():
    parts = (Thinking(" why "), ToolCall("f", '{"b": {"z": 1, "A": 2}, "a": "x"}'))
    conversation = Conversation(
        (
            ASKED,
            Message(Role.ASSISTANT, parts),
            RESULT,
            Message(Role.ASSISTANT, (Thinking("so"), Text(" Hi\n"))),
        ),
        ThinkingEffort.HIGH,
    )
    retained = GEMMA4.normalise(conversation)
    assert retained.messages[1].parts == (
        Thinking(" why "),
        ToolCall("f", '{"a": "x", "b": {"A": 2, "z": 1}}'),
    )
    assert retained.messages[3].parts == (Thinking(""), Text("Hi"))
    assert (
        GEMMA4.normalise(replace(conversation, effort=ThinkingEffort.NONE)).messages[1].thinking
        == ""
    )


Q = '<|"|>'


@pytest.mark.parametrize(
    ("pieces", "want"),
    [
        ((b"Hi ",), (Text("Hi"),)),
        ((), (Text(""),)),
        (("<|channel>", b"thought\nso\n", "<channel|>", b"Hi"), (Thinking("so"), Text("Hi"))),
        (("<|channel>", b"thought\n", "<channel|>", b"Hi"), (Text("Hi"),)),
        (("<|channel>", b"thought\nso"), None),
        (("<|channel>", b"other\nso", "<channel|>"), None),
        ((b"Hi", "<|turn>"), None),
        (("<|tool_call>", b"call:clock{x:1}", "<tool_call|>"), CLOCKED),
        (
            (
                "<|tool_call>",
                b"call:f{a:[",
                Q,
                b"x,{y:",
                Q,
                b",",
                Q,
                Q,
                b"],b:{c:true,d:None}}",
                "<tool_call|>",
            ),
            (ToolCall("f", '{"a": ["x,{y:", ""], "b": {"c": true, "d": null}}'),),
        ),
        (("<|tool_call>", b"call:clock{x:1}"), None),
        (("<|tool_call>", b"call:f{x:", Q, b"a}", "<tool_call|>"), None),
        (("<|tool_call>", b'call:f{x:"a"}', "<tool_call|>"), None),
        (("<|tool_call>", b"f{}", "<tool_call|>"), None),
        (("<|tool_call>", b"call:f{", Q, b"x", Q, b":1}", "<tool_call|>"), None),  # a quoted key
        (("<|tool_call>", b"call:f{", Q, b"x", Q, b" :1}", "<tool_call|>"), None),
        (("<|tool_call>", b"call:f{x}", "<tool_call|>"), None),
        (("<|tool_call>", "<tool_call|>"), None),
        (("<|tool_call>", b"call:f{}", "<tool_call|>", b"words"), None),
        ((b"words", "<|tool_call>", b"call:f{}", "<tool_call|>"), None),
        (("<|tool_call>", b"call:f{x:" + b"[" * 100_000, "<tool_call|>"), None),
    ],
)
def test_gemma4_answers(pieces: tuple[str | bytes, ...], want: tuple[ContentPart, ...] | None):
    assert GEMMA4.parse(pieces, ThinkingEffort.HIGH) == want


@pytest.mark.realdata
def test_gemma4_refuses_text_beside_a_call(gemma4: Form):
    with pytest.raises(DataError, match="has text and tool calls"):
        gemma4.renderer.render(
            Conversation((ASKED, Message(Role.ASSISTANT, (Text("So"), CALL))), tools=(WEATHER,))
        )
