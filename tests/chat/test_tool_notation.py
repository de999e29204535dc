"""Calls of inferred families are parsed by declarative response templates."""

from __future__ import annotations

import pytest

from persea.chat.messages import Tool, ToolCall
from persea.chat.tool_notation import (
    JSON_CALLS,
    KEY_BY_KEY_CALLS,
    ToolNotation,
    find_notations,
)

JSON = ToolNotation("json", JSON_CALLS)
KEYS = ToolNotation("key by key", KEY_BY_KEY_CALLS)
CALL = ToolCall("f", '{"x": "ဘန်ကောက်", "n": 7}')
WRITTEN = '<tool_call>\n{"name": "f", "arguments": {"x": "ဘန်ကောက်", "n": 7}}\n</tool_call>'
BY_KEY = (
    "<tool_call>\n<function=f>\n<parameter=x>\nဘန်ကောက်\n</parameter>\n"
    "<parameter=n>\n7\n</parameter>\n</function>\n</tool_call>"
)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (WRITTEN, ("", (CALL,))),
        (f"{WRITTEN}\n{WRITTEN}", ("", (CALL, CALL))),
        (f"So:\n{WRITTEN}", ("So:", (CALL,))),
        ("Hi", ("Hi", ())),
        ("<tool_call>{</tool_call>", None),
        ('<tool_call>{"name": "f"}</tool_call>', None),
        ('<tool_call>{"name": "no name!", "arguments": {}}</tool_call>', None),
        ("<tool_call>[1]</tool_call>", None),
    ],
)
def test_calls_as_json(text: str, want: tuple[str, tuple[ToolCall, ...]] | None):
    assert JSON.parse(text) == want


def test_calls_key_by_key_get_the_declared_types():
    parsed = KEYS.parse(BY_KEY)
    assert parsed == ("", (ToolCall("f", '{"x": "ဘန်ကောက်", "n": "7"}'),))
    tool = Tool("f", "", '{"properties": {"x": {"type": "string"}, "n": {"type": "integer"}}}')
    assert KEYS.resolve(parsed[1], (tool,)) == (CALL,)
    assert JSON.resolve((CALL,), (tool,)) == (CALL,)


def test_notations_that_a_template_may_have():
    shipped = {"start_anchor": "x", "fields": {}}
    text = "{% for t in tools %}{% endfor %} tool_calls <tool_call>"
    assert find_notations(None, "{{ messages }} <tool_call>") == ()
    assert [n.name for n in find_notations(None, text)] == ["json"]
    assert [n.name for n in find_notations(None, text + "<function=")] == ["key by key"]
    assert [n.name for n in find_notations(shipped, text)] == ["response template", "json"]
    assert ToolNotation("broken", {"fields": 3}).parse(WRITTEN) is None
