"""Calls of unknown families are read by the grammar that probing finds."""

from __future__ import annotations

import pytest

from persea.chat.call_grammar import IDENTIFIER, NAME, NUMBER, CallGrammar, ValueForm
from persea.chat.messages import Tool, ToolCall

BARE = CallGrammar(
    head="<call>",
    text_head="\n<call>",
    first_key="\n<key>",
    empty=("\n</call>\n<call>", "\n</call>"),
    forms=(
        ValueForm(
            "</key>=<value>",
            True,
            "</value>\n<key>",
            "</value>\n</call>\n<call>",
            "</value>\n</call>",
        ),
    ),
)
PYTHON = CallGrammar(
    head="<start>[",
    text_head=None,
    first_key="(",
    empty=("(), ", "()]"),
    forms=(
        ValueForm("='", True, "', ", "'), ", "')]"),
        ValueForm("=", False, ", ", "), ", ")]"),
    ),
)
JSON = CallGrammar(
    head=f'<calls>[{{"id": "{IDENTIFIER}", "name": "',
    text_head=None,
    first_key="",
    empty=None,
    forms=(
        ValueForm(
            f'", "n": {NUMBER}, "arguments": ',
            False,
            None,
            f'}}, {{"id": "{IDENTIFIER}", "name": "',
            "}]</calls>",
        ),
    ),
)
TWICE = CallGrammar(
    head="to=",
    text_head=None,
    first_key=f":{NAME}<",
    empty=None,
    forms=(ValueForm(f":{NAME} ", False, None, None, "."),),
)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Hi", ("Hi", ())),
        ("<call>f\n</call>", ("", (ToolCall("f", "{}"),))),
        (
            "So:\n<call>f\n<key>x</key>=<value> 1\n</value>\n<key>y</key>=<value>é</value>\n</call>"
            "\n<call>g\n</call>\n",
            ("So:", (ToolCall("f", '{"x": " 1\\n", "y": "é"}'), ToolCall("g", "{}"))),
        ),
        ("<call>f\n<key>x</key>=<value>1", None),  # it does not end
        ("<call>f\n<key>x</key>=<value>1</value>\n</call>more", None),
        ("<call>no name!\n</call>", None),
        ("<call>f\n<key>x</key>=<value>1</value>\n<key>x</key>=<value>2</value>\n</call>", None),
    ],
)
def test_pairs_of_bare_values(text: str, want: tuple[str, tuple[ToolCall, ...]] | None):
    assert BARE.parse(text) == want


def test_bare_values_get_the_declared_types():
    parsed = BARE.parse("<call>f\n<key>x</key>=<value>7</value>\n</call>")
    assert parsed is not None and not BARE.has_typed_values
    tool = Tool("f", "", '{"properties": {"x": {"type": "string"}}}')
    assert BARE.resolve(parsed[1], (tool,)) == (ToolCall("f", '{"x": "7"}'),)
    assert BARE.resolve(parsed[1], ()) == (ToolCall("f", '{"x": 7}'),)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("<start>[f(), g(x='a, b', n=7)]", [("f", "{}"), ("g", '{"x": "a, b", "n": 7}')]),
        ('<start>[f(o={"a": [true, null, ")]"]}, x=\'\')]', None),
        ("<start>[f(b=True, c=None)]", [("f", '{"b": true, "c": null}')]),
        ("<start>[f(x='a'b')]", []),
        ("<start>[f(x=1, x=2)]", []),
    ],
)
def test_typed_pairs(text: str, want: list[tuple[str, str]] | None):
    want = [("f", '{"o": {"a": [true, null, ")]"]}, "x": ""}')] if want is None else want
    parsed = PYTHON.parse(text)
    assert PYTHON.has_typed_values
    assert parsed == (("", tuple(ToolCall(*c) for c in want)) if want else None)


def test_json_arguments_with_identifiers_and_counters():
    text = (
        '<calls>[{"id": "abc-1", "name": "f", "n": 0, "arguments": {"x": "}, {"}},\n'
        '{"id": "d", "name": "g", "n": 12, "arguments": {}}]</calls>'
    )
    assert JSON.parse(text) == ("", (ToolCall("f", '{"x": "}, {"}'), ToolCall("g", "{}")))
    assert JSON.parse(text.replace('"f", "n"', '"f", "m"')) is None
    assert JSON.parse(text.replace('{"x": "}, {"}', "[1]")) is None


def test_a_repeated_name_must_be_the_same():
    assert TWICE.parse('to=f:f {"x": 1}.') == ("", (ToolCall("f", '{"x": 1}'),))
    assert TWICE.parse('to=f:g {"x": 1}.') is None


def test_marks_and_markers():
    assert JSON.head_marker == '<calls>[{"id": "'
    assert PYTHON.forms[0].value_end == "'" and BARE.forms[0].value_end == "</value>\n<"
    assert (BARE.name, JSON.name) == ("pairs", "json calls")
    assert "</value>" in BARE.texts


def test_many_calls():
    text = "<call>" + "\n</call>\n<call>".join(
        f"f\n<key>k</key>=<value>{k}</value>" for k in range(5000)
    )
    parsed = BARE.parse(text + "\n</call>")
    assert parsed is not None and len(parsed[1]) == 5000
