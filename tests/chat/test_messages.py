"""Conversations before any tokenizer sees them. Renderings are tested in test_renderer.py."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given

from persea.chat.messages import (
    Conversation,
    Message,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
    ToolCall,
)
from persea.errors import DataError
from tests.chat.test_renderer import FRAGMENTS, LOOK_ALIKES, ask, conversations


@given(conversation=conversations(FRAGMENTS + LOOK_ALIKES))
@example(conversation=Conversation(()))
def test_json_round_trip(conversation: Conversation):
    assert Conversation.from_json(json.loads(json.dumps(conversation.to_json()))) == conversation


# ---- single cases --------------------------------------------------------------------------------


def test_text_and_thinking_of_a_message():
    message = Message(Role.ASSISTANT, (Thinking("a"), Text("b"), Thinking("c"), Text("d")))
    assert (message.text, message.thinking) == ("bd", "ac")


def test_ask_normalises_once():
    conversation = Conversation.from_question(
        "e\u0301", system="o\u0308", effort=ThinkingEffort.LOW
    )
    assert [(m.role, m.text) for m in conversation.messages] == [
        (Role.SYSTEM, "ö"),
        (Role.USER, "é"),
    ]
    assert conversation.effort is ThinkingEffort.LOW
    assert [m.role for m in Conversation.from_question("x").messages] == [Role.USER]


def test_answers_are_normalised_too():
    """A byte-level model can generate e + U+0301, which Qwen's tokenizer would not reproduce."""
    assert ask("x", Thinking("o\u0308"), Text("e\u0301")).messages[-1].parts == (
        Thinking("ö"),
        Text("é"),
    )


def test_argument_names_that_become_equal_are_refused():
    """NFC must not drop an argument silently."""
    call = ToolCall("f", '{"é": 1, "e\u0301": 2}')
    with pytest.raises(DataError, match=r"arguments of tool f cannot be normalised.*two keys"):
        Conversation.from_question("x").with_answer(call)
    assert ToolCall.from_generated("f", call.arguments) is None
    nested = ToolCall("f", '{"a": {"é": 1}, "b": {"e\u0301": 2}}')
    (part,) = Conversation.from_question("x").with_answer(nested).messages[-1].parts
    assert part == ToolCall("f", '{"a": {"é": 1}, "b": {"é": 2}}')


def test_an_answer_may_be_a_plain_text() -> None:
    question = Conversation.from_question("Hi")
    assert question.with_answer("o\u0308") == question.with_answer(Text("o\u0308"))
    assert question.with_answer("o\u0308").messages[-1].text == "\u00f6"
