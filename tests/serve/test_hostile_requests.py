"""Requests that are too long, or hold half a character, are refused before they cost anything."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from tests.servers import serving

HALF = "\\ud800"
BODIES = {
    "message": '{"messages": [{"role": "user", "content": "a%sb"}]}',
    "role": '{"messages": [{"role": "us%ser", "content": "a"}]}',
    "key": '{"messages": [{"role": "user", "content": "a", "x%s": 1}]}',
    "system message": '{"messages": [{"role": "system", "content": "%s"}, {"role": "user", '
    '"content": "a"}]}',
    "part": '{"messages": [{"role": "user", "content": [{"type": "text", "text": "%s"}]}]}',
    "tool's name": '{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": '
    '"function", "function": {"name": "%s", "parameters": {}}}]}',
    "tool's description": '{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": '
    '"function", "function": {"name": "f", "description": "%s", "parameters": {}}}]}',
    "tool's parameters": '{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": '
    '"function", "function": {"name": "f", "parameters": {"a%s": 1}}}]}',
    "call": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": '
    '[{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{%s}"}}]}, '
    '{"role": "tool", "tool_call_id": "1", "content": "a"}]}',
    "model": '{"model": "%s", "messages": [{"role": "user", "content": "a"}]}',
    "stop": '{"stop": ["%s"], "messages": [{"role": "user", "content": "a"}]}',
    "user": '{"user": "%s", "messages": [{"role": "user", "content": "a"}]}',
}


def send(path: str, body: str) -> httpx2.Response:
    return httpx2.post(
        serving("qwen-sapling") + path,
        content=body.encode(),
        headers={"content-type": "application/json"},
        trust_env=False,
        timeout=60,
    )


@pytest.mark.parametrize("place", BODIES)
def test_half_a_character_is_refused_everywhere(place: str) -> None:
    for half in (HALF, "\\uDFFF", "\\udc00\\ud83d"):
        answer = send("/v1/chat/completions", BODIES[place].replace("%s", half))
        assert answer.status_code == 422, answer.text
        assert "half a surrogate pair" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_half_a_character_is_refused_in_texts(path: str) -> None:
    assert send(path, '{"prompt": "a%sb"}'.replace("%s", HALF)).status_code == 422


def test_a_whole_pair_is_a_character() -> None:
    answer = send("/tokenize", '{"prompt": "\\ud83d\\ude00"}')
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "a " * 2_000_000}),
        ("/v1/completions", {"prompt": "a " * 2_000_000}),
        ("/v1/completions", {"prompt": ["a", "a " * 2_000_000]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a " * 2_000_000}]}),
    ],
)
def test_a_long_prompt_is_refused_by_its_bytes(path: str, body: dict[str, Any]) -> None:
    answer = send(path, json.dumps(body | {"model": "qwen-sapling"}))
    assert answer.status_code in (400, 413, 422), answer.text
    assert "bytes; at most" in answer.json()["error"]["message"]
