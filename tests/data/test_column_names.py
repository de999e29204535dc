"""The mapping that an error message proposes."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from persea.data.column_names import suggest_columns, written


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"query": "a", "reply": "b", "id": 7}, {"prompt": "query", "answer": "reply"}),
        ({"input": "a", "output": "b"}, {"prompt": "input", "answer": "output"}),
        ({"Question": "a", "Gold Text": "b"}, {"prompt": "Question", "answer": "Gold Text"}),
        ({"betreff": "a", "antwort": "b"}, {"prompt": "betreff", "answer": "antwort"}),
        ({"n": "a", "y": "b"}, {"prompt": "n", "answer": "y"}),
        ({"q": "a", "score": 3}, {"prompt": "q"}),
        ({"chat": [{"role": "user", "content": "a"}]}, {"messages": "chat"}),
        ({"dialog": [{"from": "human", "value": "a"}]}, {"conversations": "dialog"}),
        ({"rated": [{"role": "assistant", "content": "a"}], "n": 1}, None),
        ({"query": "a", "answers": '[{"name": "f", "arguments": {}}]', "tools": "[]"}, None),
        ({"a1": "x", "b1": "y", "c1": "z"}, None),
        ({"turns": ["a", "b"]}, None),
        ({}, None),
    ],
)
def test_names_and_types_show_the_mapping(row: dict[str, Any], mapping: dict[str, str] | None):
    found = suggest_columns(row)
    assert (yaml.safe_load(found) if found else None) == (mapping and {"columns": mapping})


@pytest.mark.parametrize(
    "column", ["on", "1st", "a b", "naïve", "-x", "", 'q"', "plain_1-a", "null"]
)
def test_yaml_reads_what_is_written(column: str):
    assert yaml.safe_load(written({"prompt": column})) == {"columns": {"prompt": column}}
