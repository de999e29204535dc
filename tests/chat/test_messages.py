"""persea.chat.messages: what a conversation is, before any tokenizer sees it. Renderings are in test_voice.py."""

from __future__ import annotations

import json

from hypothesis import example, given

from persea.chat.messages import Conversation, Message, Role, Text, Thinking, ThinkingEffort
from tests.chat.test_renderer import FRAGMENTS, LOOK_ALIKES, ask, conversations


@given(conversation=conversations(FRAGMENTS + LOOK_ALIKES))
@example(conversation=Conversation(()))
def test_json_round_trip(conversation: Conversation):
    assert Conversation.from_json(json.loads(json.dumps(conversation.to_json()))) == conversation


# ---- single cases --------------------------------------------------------------------------------------------------


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
    """A byte-level model can say e + U+0301, and Qwen's tokenizer would not give it back."""
    assert ask("x", Thinking("o\u0308"), Text("e\u0301")).messages[-1].parts == (
        Thinking("ö"),
        Text("é"),
    )
