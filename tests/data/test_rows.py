"""Rows of data sets as people have them: read with all they say, or refused with a mapping that
then works.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from persea.chat.messages import Role, Text, Thinking, ToolCall, ToolResult
from persea.data.openai_messages import parse_tools, separate_thought
from persea.data.rows import parse_row
from persea.errors import DataError

TIDE = {
    "type": "function",
    "function": {
        "name": "get_tide",
        "description": "Next high tide",
        "parameters": {"type": "object", "properties": {"port": {"type": "string"}}},
    },
}


def said(row: dict[str, Any], **options: Any) -> list[tuple[str, str]]:
    """(role, text) of every message."""
    return [(m.role.value, m.text) for m in parse_row(row, "x:1", **options).conversation.messages]


TWO_TURNS = [
    {"role": "user", "content": "Name a river."},
    {"role": "assistant", "content": "The Tay."},
    {"role": "user", "content": "A longer one?"},
    {"role": "assistant", "content": "The Severn."},
]
QUESTION_AND_ANSWER = [("user", "2 + 2?"), ("assistant", "4")]


@pytest.mark.parametrize(
    ("shape", "row", "expected"),
    [
        ("messages", {"messages": [{"role": "user", "content": "a"}]}, [("user", "a")]),
        (  # UltraChat: the first question stands beside the messages
            "messages",
            {"prompt": "Name a river.", "prompt_id": "9f", "messages": TWO_TURNS},
            [(m["role"], m["content"]) for m in TWO_TURNS],
        ),
        (
            "sharegpt",
            {
                "system": "Be brief.",
                "conversations": [
                    {"from": "human", "value": "2 + 2?"},
                    {"from": "gpt", "value": "4"},
                ],
            },
            [("system", "Be brief."), *QUESTION_AND_ANSWER],
        ),
        ("completion", {"prompt": "2 + 2?", "completion": "4"}, QUESTION_AND_ANSWER),
        (
            "completion",
            {
                "prompt": [{"role": "user", "content": "2 + 2?"}],
                "completion": [{"role": "assistant", "content": "4"}],
            },
            QUESTION_AND_ANSWER,
        ),
        ("preference", {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, QUESTION_AND_ANSWER),
        (
            "preference",
            {
                "prompt": "2 + 2?",
                "chosen": [
                    {"role": "user", "content": "2 + 2?"},
                    {"role": "assistant", "content": "4"},
                ],
                "rejected": [{"role": "assistant", "content": "5"}],
            },
            QUESTION_AND_ANSWER,
        ),
        ("kto", {"prompt": "2 + 2?", "completion": "4", "label": True}, QUESTION_AND_ANSWER),
        ("alpaca", {"instruction": "2 + 2?", "input": "", "output": "4"}, QUESTION_AND_ANSWER),
        (
            "alpaca",
            {"instruction": "Add.", "input": "2, 2", "output": "4", "history": [["a", "b"]]},
            [("user", "a"), ("assistant", "b"), ("user", "Add.\n\n2, 2"), ("assistant", "4")],
        ),
        ("question", {"question": "2 + 2?", "answer": "4"}, QUESTION_AND_ANSWER),
        ("prompt", {"prompt": "2 + 2?", "response": "4"}, QUESTION_AND_ANSWER),
        ("prompt", {"prompt": "2 + 2?", "answer": None, "messages": None}, [("user", "2 + 2?")]),
        (
            "messages",
            {
                "messages": [
                    {"role": "developer", "content": "Be brief."},
                    {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]},
                    {"role": "assistant", "content": "4", "refusal": None},
                ]
            },
            [("system", "Be brief."), *QUESTION_AND_ANSWER],
        ),
    ],
)
def test_shapes_are_read(shape: str, row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    found = parse_row(row, "x:1")
    assert (found.shape, said(row), found.left_out) == (shape, expected, "")


def test_turns_are_learned_all_or_the_last() -> None:
    row = parse_row({"messages": TWO_TURNS}, "x:1")
    every, last = row.turns(last_only=False), row.turns(last_only=True)
    assert [(len(c.messages), answer) for c, answer in every] == [
        (1, (Text("The Tay."),)),
        (3, (Text("The Severn."),)),
    ]
    assert last == every[1:]
    open_question = parse_row({"messages": TWO_TURNS[:3]}, "x:1")
    assert [answer for _, answer in open_question.turns(last_only=True)] == [()]
    assert len(open_question.turns(last_only=False)) == 2


@pytest.mark.parametrize("arguments", ['{"port": "Oban"}', {"port": "Oban", "other_tools": None}])
@pytest.mark.parametrize("content", ["", None])
def test_calls_and_results_are_read(arguments: Any, content: str | None) -> None:
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "get_tide", "arguments": arguments},
    }
    row = parse_row(
        {
            "tools": [TIDE],
            "messages": [
                {"role": "user", "content": "Tide at Oban?"},
                {"role": "assistant", "content": content, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": "06:12"},
                {"role": "assistant", "content": "At 06:12."},
            ],
        },
        "x:1",
    )
    (tool,) = row.conversation.tools
    assert (tool.name, json.loads(tool.parameters)["type"]) == ("get_tide", "object")
    assert row.conversation.messages[1].parts == (ToolCall("get_tide", '{"port": "Oban"}'),)
    assert row.conversation.messages[2].parts == (ToolResult("get_tide", "06:12"),)
    assert [len(a) for _, a in row.turns(last_only=False)] == [1, 1]


def test_older_and_sharegpts_calls_are_read() -> None:
    old = parse_row(
        {
            "functions": [TIDE["function"]],
            "messages": [
                {"role": "user", "content": "Tide?"},
                {"role": "assistant", "function_call": {"name": "get_tide", "arguments": "{}"}},
                {"role": "function", "name": "get_tide", "content": "06:12"},
            ],
        },
        "x:1",
    )
    hermes = parse_row(
        {
            "tools": json.dumps([TIDE]),
            "conversations": [
                {"from": "human", "value": "Tide?"},
                {"from": "function_call", "value": '{"name": "get_tide", "arguments": {}}'},
                {"from": "observation", "value": "06:12"},
            ],
        },
        "x:1",
    )
    assert old.conversation == hermes.conversation
    assert old.conversation.messages[1].role is Role.ASSISTANT


@pytest.mark.parametrize(
    "message",
    [
        {"content": "<think>\nAdd.\n</think>\n\n4"},
        {"content": "Add.\n</think>\n\n4"},
        {"content": "4", "reasoning_content": "Add."},
        {"content": "4", "thinking": "Add.", "reasoning": None},
    ],
)
def test_a_thought_is_a_thought_and_never_letters(message: dict[str, Any]) -> None:
    row = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", **message}]}
    ((_, answer),) = parse_row(row, "x:1").turns(last_only=True)
    assert answer == (Thinking("Add."), Text("4"))


def test_thoughts_of_plain_columns_are_read() -> None:
    row = parse_row({"question": "2+2?", "answer": "4", "reasoning": "Add."}, "x:1")
    ((_, answer),) = row.turns(last_only=True)
    assert answer == (Thinking("Add."), Text("4"))


def test_a_refusal_of_openais_is_the_answer() -> None:
    message = {"role": "assistant", "content": None, "refusal": "I cannot."}
    ((_, answer),) = parse_row({"messages": [TWO_TURNS[0], message]}, "x:1").turns(last_only=True)
    assert answer == (Text("I cannot."),)


def test_a_turn_of_weight_0_is_read_and_not_learned() -> None:
    messages = [TWO_TURNS[0], {**TWO_TURNS[1], "weight": 0}, *TWO_TURNS[2:]]
    every = parse_row({"messages": messages}, "x:1").turns(last_only=False)
    assert [answer for _, answer in every] == [(Text("The Severn."),)]
    last = parse_row({"messages": [*TWO_TURNS[:3], {**TWO_TURNS[3], "weight": 0}]}, "x:1")
    assert [answer for _, answer in last.turns(last_only=True)] == [(Text("The Tay."),)]


def test_undesirable_answers_are_left_out_and_named() -> None:
    assert (
        parse_row({"prompt": "a", "completion": "b", "label": False}, "x:1").left_out
        == "an undesirable answer"
    )


def test_keys_that_change_nothing_are_named() -> None:
    row = parse_row({"prompt": "a", "source": "wiki", "score": 3, "id": "7"}, "x:1")
    assert row.unread_keys == ("score", "source")


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        (
            {"query": "2 + 2?", "reply": "4"},
            {"prompt": "query", "answer": "reply"},
            QUESTION_AND_ANSWER,
        ),
        (
            {"question": "2 + 2?", "answer": "short", "response": "4"},
            {"answer": "response"},  # the mapping of the refusal, pasted
            QUESTION_AND_ANSWER,
        ),
        ({"dialogue": TWO_TURNS[:2]}, {"messages": "dialogue"}, None),
        ({"prompt": "unused", "q": "2 + 2?"}, {"prompt": "q"}, [("user", "2 + 2?")]),
    ],
)
def test_other_names_are_mapped(
    row: dict[str, Any], columns: dict[str, str], expected: list[tuple[str, str]] | None
) -> None:
    found = said(row, columns=columns)
    assert expected is None or found == expected


@pytest.mark.parametrize(
    ("row", "why", "remedy"),
    [
        ({"prompt": "a", "answer": "b", "output": "c"}, "`output` changes what", "columns:"),
        ({"prompt": "other", "messages": TWO_TURNS}, "`prompt` changes what", "columns:"),
        ({"messages": TWO_TURNS, "answer": "x"}, "`answer` changes what", "columns:"),
        ({"text": "plain"}, "`text` alone", "`texts:`"),
        ({"query": "a", "reply": "b"}, "the row has `query`, `reply`: no known", "columns:"),
        ({"prompt": 3}, "the user's turn is int", "a line is"),
        (
            {"messages": [TWO_TURNS[0], {"role": "assistant", "content": "<tool_call>{}"}]},
            "a call is written in its text",
            '"tool_calls"',
        ),
        ({"instruction": "a", "demonstration": "b"}, "`demonstration` changes", "columns: {answer"),
        ({"question": "a", "context": "b"}, "`context` changes", "input: context}"),
        ({"prompt": "a", "image": "x.png"}, "`image`: persea teaches text only", "leave rows"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "a part of type 'image_url'",
            "leave rows",
        ),
        ({"messages": [{"role": "teacher", "content": "x"}]}, "has role 'teacher'", "a message is"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no user turn", "a line is"),
        ({"messages": []}, "list of messages is empty", "a message is"),
        (
            {"messages": [TWO_TURNS[0], {"role": "assistant", "content": "a <think>b</think>"}]},
            "is not at the beginning",
            "a message is",
        ),
        (
            {"messages": [TWO_TURNS[0], {"role": "assistant", "content": "<think>b"}]},
            "is not at the beginning",
            "a message is",
        ),
        (
            {"messages": [TWO_TURNS[0], {"role": "tool", "content": "x"}]},
            "a tool result without a call",
            "a message is",
        ),
        (
            {
                "messages": [
                    TWO_TURNS[0],
                    {"role": "assistant", "tool_calls": [{"function": {"name": "a b"}}]},
                ]
            },
            "'a b' is no name of a tool",
            "a message is",
        ),
        (
            {
                "messages": [
                    TWO_TURNS[0],
                    {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{a: 1}"}]},
                ]
            },
            "the arguments of its call of 'f' are no JSON object: '{a: 1}'",
            "a message is",
        ),
        (
            {"system": "x", "messages": [{"role": "system", "content": "y"}, TWO_TURNS[0]]},
            "differs from the conversation's own",
            "a line is",
        ),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "`label` is 'yes'", "a line is"),
        ([1], "a row is list", "a line is"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line(row: Any, why: str, remedy: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_row(row, "x.jsonl:7")
    assert why in caught.value.message
    assert caught.value.where.startswith("x.jsonl:7")
    assert remedy in (caught.value.remedy or "")


def test_a_mapping_of_a_missing_column_names_the_columns_there_are() -> None:
    with pytest.raises(DataError, match="no column `query`") as caught:
        parse_row({"q": "a", "r": "b"}, "x:1", {"prompt": "query"})
    assert "the row has q, r" in (caught.value.remedy or "")


def test_text_helpers() -> None:
    assert separate_thought("plain", "x") == ("", "plain")
    assert parse_tools(None, "x") == parse_tools("", "x") == ()
    with pytest.raises(DataError, match="not JSON"):
        parse_tools("{", "x")
    with pytest.raises(DataError, match="without a name"):
        parse_tools([{"type": "function"}], "x")
