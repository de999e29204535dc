"""Qwen 3.5, 3.6 and 3.8 keep thoughts and name efforts as their templates do; so does Gemma 4."""

from __future__ import annotations

import pytest

from persea.chat.families.gemma import GEMMA4, GEMMA4_CURRENT
from persea.chat.families.qwen35 import QWEN35, QWEN35_ALL_THOUGHTS, QWEN38
from persea.chat.family import Family
from persea.chat.messages import (
    Conversation,
    Message,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
    ToolCall,
    ToolResult,
)

CALL = ToolCall("clock", "{}")


def two_turns(effort: ThinkingEffort = ThinkingEffort.HIGH) -> Conversation:
    """Two questions, the second with a call and its result; white space around every text."""
    return Conversation(
        (
            Message(Role.USER, (Text(" q1 "),)),
            Message(Role.ASSISTANT, (Thinking(" t1 "), Text(" a1 "))),
            Message(Role.USER, (Text(" q2 "),)),
            Message(Role.ASSISTANT, (Thinking(" t2 "), CALL)),
            Message(Role.TOOL, (ToolResult("clock", "noon"),)),
            Message(Role.ASSISTANT, (Thinking(" t3 "), Text(" a3 "))),
        ),
        effort,
    )


@pytest.mark.parametrize(
    ("family", "want"),
    [
        (QWEN35, ["", "t2", "t3"]),
        (QWEN35_ALL_THOUGHTS, [" t1 ", " t2 ", "t3"]),
        (QWEN38, ["t1", "t2", "t3"]),
        (GEMMA4, ["", " t2 ", ""]),
        (GEMMA4_CURRENT, ["", " t2 ", " t3 "]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_thoughts_that_each_template_keeps(family: Family, want: list[str]):
    retained = family.normalise(two_turns()).messages
    assert [m.thinking for m in retained if m.role is Role.ASSISTANT] == want
    assert [m.text for m in retained if m.role is Role.USER] == ["q1", "q2"]
    off = family.normalise(two_turns(ThinkingEffort.NONE))
    assert not any(m.thinking for m in off.messages)


def test_efforts_of_qwen38():
    assert QWEN38.efforts == tuple(ThinkingEffort)
    names = {e: QWEN38.template_inputs(two_turns(e))[1] for e in ThinkingEffort}
    assert {e.value: k.get("reasoning_effort") for e, k in names.items()} == {
        "none": None,
        "low": "low",
        "medium": "medium",
        "high": "xhigh",
    }
    assert [k["enable_thinking"] for k in names.values()] == [False, True, True, True]
    assert QWEN35.efforts == (ThinkingEffort.NONE, ThinkingEffort.HIGH)


def test_a_thought_that_gemmas_prompt_has_opened():
    """Behind a tool's result the current template opens the thought."""
    pieces = (b"It is noon.\n", "<channel|>", b"Noon.")
    want = (Thinking("It is noon."), Text("Noon."))
    assert GEMMA4_CURRENT.parse(pieces, ThinkingEffort.HIGH) == want
    assert GEMMA4_CURRENT.parse(pieces, ThinkingEffort.NONE) is None
    assert GEMMA4_CURRENT.parse((b"Noon.",), ThinkingEffort.HIGH) == (Text("Noon."),)
