"""What ordinary clients send to `persea serve`: OpenAI's own, lm-eval 0.4.13, vllm bench serve."""

from __future__ import annotations

from inspect import signature
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from persea.serve.streaming import cut_at_stop
from tests.servers import serving
from tests.teachers.engines.test_transformers import engine, opened

NAME = "llama-sapling"


def post(path: str, **body: Any) -> dict[str, Any]:
    answer = httpx2.post(
        serving(NAME) + path, json={"model": NAME} | body, trust_env=False, timeout=60
    )
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def client() -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{serving(NAME)}/v1", api_key="x", http_client=openai.DefaultHttpxClient()
    )


def test_the_openai_client_may_send_every_value_that_changes_nothing() -> None:
    messages: Any = [{"role": "user", "content": "To Vietnamese: seventy-eight"}]
    plain = client().chat.completions.create(model=NAME, messages=messages, max_tokens=8)
    neutral = client().chat.completions.create(
        model=NAME,
        messages=messages,
        max_tokens=8,
        stop=None,
        logprobs=False,
        response_format={"type": "text"},
        logit_bias={},
        metadata={"run": "1"},
        service_tier="auto",
        parallel_tool_calls=True,
        store=False,
        n=1,
        extra_body={"top_k": 0, "min_p": 0, "repetition_penalty": 1.0, "ignore_eos": False},
    )
    assert neutral.choices[0].message.content == plain.choices[0].message.content
    text = client().completions.create(model=NAME, prompt="a b", max_tokens=4)
    assert (
        client()
        .completions.create(
            model=NAME, prompt=["a b"], max_tokens=4, best_of=1, suffix="", stop=[], logit_bias={}
        )
        .choices[0]
        .text
        == text.choices[0].text
    )
    assert client().models.retrieve(NAME).id == NAME


# Every parameter of openai 3.57's `create` with a value that changes nothing.
NEUTRAL_OF_BOTH: dict[str, Any] = {
    "frequency_penalty": 0,
    "logit_bias": {},
    "max_tokens": 8,
    "n": 1,
    "presence_penalty": 0,
    "seed": 0,
    "stop": [],
    "stream": False,
    "stream_options": None,
    "temperature": 0,
    "top_p": 1,
    "user": "somebody",
}
NEUTRAL_OF_CHAT: dict[str, Any] = NEUTRAL_OF_BOTH | {
    "audio": None,
    "function_call": None,
    "functions": [],
    "logprobs": False,
    "max_completion_tokens": 8,
    "metadata": {},
    "modalities": ["text"],
    "moderation": None,
    "parallel_tool_calls": True,
    "prediction": None,
    "prompt_cache_key": "a",
    "prompt_cache_options": {},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "none",
    "response_format": {"type": "text"},
    "safety_identifier": "a",
    "service_tier": "auto",
    "store": False,
    "tool_choice": "none",
    "tools": [],
    "top_logprobs": 0,
    "verbosity": "medium",
    "web_search_options": None,
}
NEUTRAL_OF_COMPLETIONS = NEUTRAL_OF_BOTH | {
    "best_of": 1,
    "echo": False,
    "logprobs": None,
    "suffix": "",
}
GIVEN = {"messages", "model", "prompt", "extra_headers", "extra_query", "extra_body", "timeout"}
# What this server cannot obey is refused with its name.
IMPOSSIBLE: dict[str, Any] = {
    "audio": {"format": "wav", "voice": "alloy"},
    "frequency_penalty": 0.5,
    "functions": [{"name": "f"}],
    "logit_bias": {"5": 1.0},
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "a"},
    "tool_choice": "required",
    "verbosity": "low",
    "web_search_options": {},
}


def test_every_parameter_of_the_openai_client_is_obeyed_or_refused_by_name() -> None:
    chat, text = client().chat.completions.create, client().completions.create
    if openai.__version__.startswith("3.57."):  # others may have more
        assert set(signature(chat).parameters) - GIVEN == NEUTRAL_OF_CHAT.keys()
        assert set(signature(text).parameters) - GIVEN == NEUTRAL_OF_COMPLETIONS.keys()
    question: Any = {"model": NAME, "messages": [{"role": "user", "content": "To Vietnamese: two"}]}
    plain = chat(**question, max_tokens=8).choices[0].message.content
    for key, value in NEUTRAL_OF_CHAT.items():
        found: Any = chat(**question, **({"max_tokens": 8} | {key: value}))
        assert found.choices[0].message.content == plain, key
    every: Any = chat(**question, **NEUTRAL_OF_CHAT)
    assert every.choices[0].message.content == plain
    plain = text(model=NAME, prompt="a b", max_tokens=8).choices[0].text
    answer: Any = text(model=NAME, prompt="a b", **NEUTRAL_OF_COMPLETIONS)
    assert answer.choices[0].text == plain
    for key, value in IMPOSSIBLE.items():
        with pytest.raises(openai.UnprocessableEntityError, match=key):
            chat(**question, **{key: value})


def test_prompts_come_as_lists_of_token_ids_and_every_token_is_scored() -> None:
    """lm-eval's local-completions asks so, and cuts the last entry, the generated one, itself."""
    ids = opened(NAME)[0].vocabulary.encode("To Vietnamese: seventy-eight")
    answer = post(
        "/v1/completions",
        prompt=[ids, ids[:5]],
        max_tokens=1,
        temperature=0,
        logprobs=1,
        echo=True,
        seed=1234,
    )
    first, second = answer["choices"]
    assert (first["index"], second["index"]) == (0, 1)
    assert len(first["logprobs"]["tokens"]) == len(ids) + 1
    assert len(second["logprobs"]["tokens"]) == 6
    sequence = np.array(ids, np.int32)
    (rows,) = engine(NAME).compute_logprobs([sequence], [np.arange(len(ids)) > 0])
    expected = [float(row[i]) for row, i in zip(rows, ids[1:], strict=True)]
    assert first["logprobs"]["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-4)
    assert answer["usage"] == {
        "prompt_tokens": len(ids) + 5,
        "completion_tokens": 2,
        "total_tokens": len(ids) + 7,
    }


def test_tokens_are_named_by_text_only_where_the_client_wants_text() -> None:
    """vLLM 0.32 does so: `detokenize: false` leaves `decoded_token` null."""
    ids = opened(NAME)[0].vocabulary.encode("To Vietnamese")
    found = [
        post(
            "/inference/v1/generate",
            token_ids=ids,
            sampling_params={"max_tokens": 1, "prompt_logprobs": 2} | settings,
        )["prompt_logprobs"][1]
        for settings in ({}, {"detokenize": False})
    ]
    assert all(isinstance(entry["decoded_token"], str) for entry in found[0].values())
    assert found[1] == {i: e | {"decoded_token": None} for i, e in found[0].items()}


def test_an_answer_ends_before_a_stop_text_streamed_or_not() -> None:
    whole = post("/v1/completions", prompt="To Vietnamese: seventy-eight", max_tokens=24)
    text = whole["choices"][0]["text"]
    stop = text[4:7]
    assert len(stop) == 3
    cut = post("/v1/completions", prompt="To Vietnamese: seventy-eight", max_tokens=24, stop=stop)
    assert (cut["choices"][0]["text"], cut["choices"][0]["finish_reason"]) == (
        text[: text.index(stop)],
        "stop",
    )
    assert cut["usage"]["completion_tokens"] < whole["usage"]["completion_tokens"]
    streamed = client().completions.create(
        model=NAME, prompt="To Vietnamese: seventy-eight", max_tokens=24, stop=[stop], stream=True
    )
    pieces = [event.choices[0] for event in streamed]
    assert "".join(p.text for p in pieces) == text[: text.index(stop)]
    assert [p.finish_reason for p in pieces if p.finish_reason] == ["stop"]
    messages: Any = [{"role": "user", "content": "To Vietnamese: seventy-eight"}]
    said = client().chat.completions.create(model=NAME, messages=messages, max_tokens=24)
    answer = said.choices[0].message.content or ""
    stop = answer[3:5]
    for stream in (False, True):
        found: Any = client().chat.completions.create(
            model=NAME, messages=messages, max_tokens=24, stop=[stop, "§"], stream=stream
        )
        words = (
            "".join(e.choices[0].delta.content or "" for e in found)
            if stream
            else found.choices[0].message.content
        )
        assert (
            words == answer[: answer.index(stop)].rstrip() or words == answer[: answer.index(stop)]
        )


def test_several_answers_are_drawn_with_different_seeds() -> None:
    answer = post("/v1/completions", prompt="a", max_tokens=8, n=3, temperature=1.5, seed=7)
    texts = [c["text"] for c in answer["choices"]]
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert len(set(texts)) > 1
    second = post("/v1/completions", prompt="a", max_tokens=8, temperature=1.5, seed=8)
    assert texts[1] == second["choices"][0]["text"]


def test_a_chat_answer_comes_with_log_probabilities() -> None:
    messages = [{"role": "user", "content": "To Vietnamese: seventy-eight"}]
    answer = post(
        "/v1/chat/completions", messages=messages, max_tokens=6, logprobs=True, top_logprobs=2
    )
    (choice,) = answer["choices"]
    entries = choice["logprobs"]["content"]
    assert len(entries) == answer["usage"]["completion_tokens"]
    for entry in entries:  # greedy: the token itself is the most likely one
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert entry["logprob"] == pytest.approx(entry["top_logprobs"][0]["logprob"])
        assert len(entry["top_logprobs"]) == 2
    raw = b"".join(bytes(e["bytes"]) for e in entries)
    assert choice["message"]["content"] in raw.decode(errors="replace")


def test_a_text_is_tokenized_on_request() -> None:
    ids = opened(NAME)[0].vocabulary.encode("To Vietnamese")
    answer = post("/tokenize", prompt="To Vietnamese", return_token_strs=True)
    assert (answer["tokens"], answer["count"]) == (ids, len(ids))
    assert "".join(answer["token_strs"]) == "To Vietnamese"


@pytest.mark.parametrize(
    ("text", "stop_texts", "found"),
    [
        ("one. two", ("x", "."), ("one", True)),
        ("one\n", ("\n\n",), ("one", False)),
        ("one\n\ntwo", ("\n\n",), ("one", True)),
        ("aab", ("aac",), ("aab", False)),
        ("xaa", ("aac",), ("x", False)),
        ("aab", ("b", "ab"), ("a", True)),
        ("one", (), ("one", False)),
        ("", ("x",), ("", False)),
    ],
)
def test_a_stop_text_is_found_and_its_beginning_is_held_back(
    text: str, stop_texts: tuple[str, ...], found: tuple[str, bool]
) -> None:
    assert cut_at_stop(text, stop_texts) == found
