"""`persea serve`, a real process on a real socket: OpenAI's own client finds what it expects, and
nobody else finds a hole.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import torch
from transformers import AutoTokenizer

from persea.chat.messages import (
    Conversation,
    FinishReason,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
    ToolCall,
    ToolResult,
)
from persea.errors import DataError, RefusedError
from persea.models.loading import ModelSource, load_renderer
from persea.serve.limits import AccessLimitMiddleware, ServerLimits, is_loopback
from persea.serve.logprobs import build_completion_logprobs
from persea.serve.schema import ChatCompletionRequest
from persea.serve.server import build_app, load_served_model, resolve_api_key
from persea.serve.streaming import ServedModel, StreamingAnswerParser
from persea.tasks.generated import GENERATED_TASKS
from persea.tasks.task import Split
from persea.teachers.engines import Sampling
from tests.chat.families.test_published_templates import find_template
from tests.cli.test_cli import persea
from tests.conftest import Speaker
from tests.servers import Served, serving, start_serve
from tests.teachers.engines.test_transformers import NAMES, engine, opened

SAPLINGS = Path(__file__).resolve().parents[2] / "saplings"
ASKED = "How do you say three hundred in Vietnamese?"


def client(name: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{serving(name)}/v1", api_key="none", max_retries=0)


def post(url: str, path: str, **body: object) -> httpx2.Response:
    return httpx2.post(url + path, json=body, trust_env=False, timeout=60)


def said(
    name: str, question: str, effort: ThinkingEffort = ThinkingEffort.NONE, new: int = 96
) -> tuple[list[int], str, str]:
    """What the local engine says: ids, thought, words."""
    renderer, _ = opened(name)
    ids = (
        engine(name)
        .generate(
            [renderer.render_prompt(Conversation.from_question(question, effort=effort)).ids_T],
            renderer.stop_ids,
            new,
        )[0]
        .tolist()
    )
    parts, finish = renderer.parse(ids, effort)
    assert finish is FinishReason.STOP
    message = Conversation.from_question(question).with_answer(*parts).messages[-1]
    return ids, message.thinking, message.text


def sums() -> str:
    return (
        next(s for s in GENERATED_TASKS if s.name == "reasoning")
        .items(Split.TEST, 1, 0)[0]
        .prompt.conversation.messages[-1]
        .text
    )


def test_the_openai_client_gets_the_local_engines_words() -> None:
    one = client("qwen-sapling")
    assert [m.id for m in one.models.list()] == ["qwen-sapling"]
    ids, _, words = said("qwen-sapling", ASKED)
    whole = one.chat.completions.create(
        model="qwen-sapling", messages=[{"role": "user", "content": ASKED}]
    )
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (words, "stop")
    assert whole.usage and whole.usage.completion_tokens == len(ids)
    pieces = list(
        one.chat.completions.create(
            model="qwen-sapling",
            messages=[{"role": "user", "content": ASKED}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    told = [c.choices[0].delta.content for c in pieces if c.choices and c.choices[0].delta.content]
    assert "".join(told) == words
    assert told  # tokens that come fast share an event
    assert pieces[-1].usage and pieces[-1].usage.total_tokens == whole.usage.total_tokens
    text = one.completions.create(
        model="qwen-sapling", prompt="x = ", max_tokens=4, echo=True, logprobs=2
    )
    assert text.choices[0].text.startswith("x = ")
    logs = text.choices[0].logprobs
    assert (
        logs
        and logs.token_logprobs
        and len(logs.tokens or ()) == len(logs.token_logprobs)
        and logs.token_logprobs[0] is None
    )


def test_thoughts_come_apart_from_words_and_the_switch_is_obeyed() -> None:
    name, question = "gpt-oss-sapling", sums()
    _, thought, words = said(name, question, ThinkingEffort.HIGH)
    assert thought
    one = client(name)
    messages = [{"role": "user", "content": question}]
    whole = (
        one.chat.completions.create(model=name, messages=messages, reasoning_effort="high")
        .choices[0]
        .message
    )
    assert (whole.reasoning_content, whole.content) == (thought, words)
    seen: dict[str, list[str]] = {"reasoning_content": [], "content": []}
    for event in one.chat.completions.create(
        model=name, messages=messages, reasoning_effort="high", stream=True
    ):
        delta = event.choices[0].delta.model_dump()
        for key, pieces in seen.items():
            if delta.get(key):
                pieces.append(delta[key])
    assert {key: "".join(p) for key, p in seen.items()} == {
        "reasoning_content": thought,
        "content": words,
    }
    assert seen["reasoning_content"] and seen["content"]  # test_streaming: piece by piece
    for switch in (
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ):
        refused = post(
            serving(name), "/v1/chat/completions", model=name, messages=messages, **switch
        )
        assert refused.status_code == 400
        assert "always thinks" in refused.json()["error"]["message"]
    refused = post(
        serving("qwen-sapling"),
        "/v1/chat/completions",
        model="qwen-sapling",
        messages=messages,
        reasoning_effort="high",
        chat_template_kwargs={"enable_thinking": False},
    )
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "reasoning_effort")


@pytest.mark.parametrize("name", NAMES)
def test_half_characters_are_held_back_and_no_piece_is_told_twice(name: str) -> None:
    """Every token of an answer in many scripts goes through the reader, which tells whole
    characters alone.
    """
    renderer, _ = opened(name)
    text = "三百 ba trăm สามร้อย 👩‍👩‍👧 x = 1\n\n  if x:\n"
    for effort, parts in (
        (renderer.family.efforts[0], (Text(text),)),
        (renderer.family.efforts[-1], (Thinking("hm 三\nso"), Text(text))),
    ):
        answer = renderer.render(Conversation.from_question("q", effort=effort).with_answer(*parts))
        heard, pieces = (
            StreamingAnswerParser(renderer, effort, ()),
            {"reasoning_content": "", "content": ""},
        )
        count = 0
        for token in answer.ids_T[answer.loss_mask_T].tolist():
            for key, more in heard.add_token(token).items():
                assert "\ufffd" not in more
                pieces[key] += more
                count += 1
        more, calls, finish = heard.finish()
        read, _ = renderer.parse(answer.ids_T[answer.loss_mask_T].tolist(), effort)
        message = Conversation.from_question("q").with_answer(*read).messages[-1]
        assert (pieces["content"] + more.get("content", ""), calls, finish) == (
            message.text,
            (),
            FinishReason.STOP,
        )
        assert pieces["reasoning_content"] + more.get("reasoning_content", "") == message.thinking
        assert count > 5


def test_a_hybrid_students_thought_is_told_apart_also_where_its_markers_are_text(
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(SAPLINGS / "gemma-sapling", tmp_path / "maple"))
    (folder / "chat_template.jinja").write_text(
        "{%- for m in messages %}{{- '<start_of_turn>' + m['role'] + '\n' + m['content'] + "
        "'<end_of_turn>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<start_of_turn>assistant\n' }}{%- endif %}"
    )
    for source in (
        ModelSource(str(folder), family="generic", thinking=True),
        ModelSource(str(SAPLINGS / "llama-sapling"), thinking=True),
    ):
        renderer = load_renderer(source, "student")
        for parts in ((Thinking("a < b, 三 so"), Text("x = 1 <t")), (Text("<"),)):
            answer = renderer.render(
                Conversation.from_question("q", effort=ThinkingEffort.HIGH).with_answer(*parts)
            )
            heard, told = StreamingAnswerParser(renderer, ThinkingEffort.HIGH, ()), list[str]()
            for token in answer.ids_T[answer.loss_mask_T].tolist():
                told += heard.add_token(token)
            _, calls, finish = heard.finish()
            assert (heard.emitted, calls, finish) == (
                {
                    "reasoning_content": "a < b, 三 so" if len(parts) > 1 else "",
                    "content": parts[-1].text,
                },
                (),
                FinishReason.STOP,
            )
            assert len(parts) == 1 or told.count("reasoning_content") > 2


@pytest.mark.realdata
def test_calls_are_read_while_they_are_said(real_of: Callable[[str], Speaker]) -> None:
    """Llama's look like words until they end."""
    renderer = real_of("llama").renderer
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "q"}],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "add",
                    "description": "adds",
                    "parameters": {"type": "object"},
                },
            }
        ],
    }
    asked = ChatCompletionRequest.model_validate(body).to_conversation(renderer.family)
    call = ToolCall("add", '{"x": 1}')
    answer = renderer.render(asked.with_answer(call))
    heard = StreamingAnswerParser(renderer, asked.effort, asked.tools)
    assert not any(
        heard.add_token(t) for t in answer.ids_T[answer.loss_mask_T].tolist()
    )  # nothing of a call is told as words
    more, calls, finish = heard.finish()
    assert (more, calls, finish) == ({}, (call,), FinishReason.STOP)


def test_messages_become_a_conversation() -> None:
    family = opened("qwen-sapling")[0].family
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "e\u0301"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    found = ChatCompletionRequest.model_validate(
        {"model": "m", "messages": messages}
    ).to_conversation(family)
    assert [m.role for m in found.messages] == [Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL]
    assert found.messages[1].text == "é"
    assert found.messages[2].parts == (Thinking("hm"), ToolCall("f", '{"a": 1}'))
    assert found.messages[3].parts == (ToolResult("f", "42"),)
    messages[2] = {"role": "assistant", "content": "<think>hm</think>a <think> mark"}
    messages[3:] = [{"role": "assistant", "content": "<think>hm</think>4", "reasoning": None}]
    messages.append({"role": "user", "content": "<think>"})
    nulls = {"enum": ["a", None], "default": None}
    tools = [{"type": "function", "function": {"name": "f", "parameters": nulls}}]
    found = ChatCompletionRequest.model_validate(
        {"model": "m", "messages": messages, "tools": tools}
    ).to_conversation(family)
    assert found.messages[2].parts == (Text("<think>hm</think>a <think> mark"),)
    assert found.messages[3].parts == (Thinking("hm"), Text("4"))
    assert json.loads(found.tools[0].parameters) == nulls
    for parameters in (
        {"x": float("nan")},
        {"x": "half \ud83d"},
    ):  # both are JSON to Python, and to nobody else
        tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
        with pytest.raises(DataError, match="not plain JSON"):
            ChatCompletionRequest.model_validate(
                {"model": "m", "messages": messages[:2], "tools": tools}
            ).to_conversation(family)
    with pytest.raises(DataError, match="has no low effort -> one of none, high"):
        ChatCompletionRequest.model_validate(
            {"model": "m", "messages": messages[:2], "reasoning_effort": "low"}
        ).to_conversation(family)
    with pytest.raises(DataError, match="does not think"):
        ChatCompletionRequest.model_validate(
            {"model": "m", "messages": messages[:2], "reasoning_effort": "high"}
        ).to_conversation(opened("gemma-sapling")[0].family)
    for broken, why in (
        ([{"role": "tool", "tool_call_id": "9", "content": "x"}], "a tool result without a call"),
        ([{"role": "user", "content": "x", "reasoning_content": "y"}], "only the assistant"),
        ([{"role": "assistant", "content": "x"}], "assistant's own"),
    ):
        with pytest.raises(DataError, match=why):
            ChatCompletionRequest.model_validate(
                {"model": "m", "messages": broken}
            ).to_conversation(family)


def inside(speaker: Any, path: str, **body: object) -> httpx2.Response:
    """An answer of the application in this process."""

    async def ask() -> httpx2.Response:
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app=build_app(speaker, "", ServerLimits())),
            base_url="http://localhost",
        ) as one:
            return await one.post(path, json={"model": speaker.name} | body)

    return asyncio.run(ask())


def test_a_thought_without_an_answer_is_malformed_and_nobody_makes_one_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    renderer, _ = opened("gpt-oss-sapling")
    names = {text: i for i, text in renderer.vocabulary.control_names.items()}
    ids = [
        names["<|channel|>"],
        *renderer.vocabulary.encode("analysis"),
        names["<|message|>"],
        *renderer.vocabulary.encode("hm"),
        names["<|return|>"],
    ]

    async def says(*asked: object) -> AsyncGenerator[list[int], None]:
        yield ids[:2]
        yield ids[2:]

    monkeypatch.setattr(ServedModel, "stream_tokens", says)
    speaker = load_served_model(str(SAPLINGS / "gpt-oss-sapling"))
    body = {"messages": [{"role": "user", "content": "q"}], "reasoning_effort": "high"}
    answer = inside(speaker, "/v1/chat/completions", **body).json()
    assert (answer["choices"][0]["finish_reason"], answer["choices"][0]["message"]["content"]) == (
        "malformed",
        "\ufffd",
    )
    assert answer["usage"]["completion_tokens"] == len(ids)
    # A proxy may make "stop" of the finish reason: the text shows it, too.
    streamed = inside(speaker, "/v1/chat/completions", **body, stream=True).text
    assert '{"content": "\ufffd"}, "finish_reason": "malformed"' in streamed


def test_weights_that_give_no_numbers_are_not_the_clients_fault() -> None:
    speaker = load_served_model(str(SAPLINGS / "llama-sapling"))
    with torch.no_grad():
        speaker.engine.model.get_input_embeddings().weight.fill_(float("nan"))
    answer = inside(speaker, "/v1/completions", prompt="x")
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "not finite" in answer.json()["error"]["message"]


@pytest.mark.realdata
@pytest.mark.parametrize("template", ["qwen3.5", "qwen3_5_think"])
def test_a_second_turn_behind_a_thought_is_answered(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    """Qwen 3.5's own template drops the earlier thought; the fork of PERSEA_DATA keeps it."""
    folder = Path(shutil.copytree(SAPLINGS / "qwen-sapling", tmp_path / template))
    text = find_template(data, template).read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    speaker = load_served_model(str(folder))
    assert speaker.renderer.family.name == "qwen3.5"
    question = Conversation.from_question("2 + 3?", effort=ThinkingEffort.HIGH)
    answer = speaker.renderer.render(question.with_answer(Thinking("hm"), Text("Five.")))
    prompts: list[list[int]] = []

    async def says(model: ServedModel, prompt: Any, *rest: Any) -> AsyncGenerator[list[int], None]:
        prompts.append(list(prompt))
        yield answer.ids_T[answer.loss_mask_T].tolist()

    monkeypatch.setattr(ServedModel, "stream_tokens", says)
    messages: list[dict[str, Any]] = []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("2 + 3?", "And 4?", "And 5?"):
        messages.append({"role": "user", "content": text})
        response = inside(
            speaker, "/v1/chat/completions", messages=messages, reasoning_effort="high"
        )
        assert response.status_code == 200, response.text
        expected = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=True, return_dict=False
        )
        assert prompts[-1] == expected
        told = response.json()["choices"][0]["message"]
        assert (told["reasoning_content"], told["content"]) == ("hm", "Five.")
        messages.append({key: told[key] for key in ("role", "content", "reasoning_content")})
    assert ("hm" in tokenizer.decode(prompts[-1])) == (template == "qwen3.5")


# --- log-probabilities ---


def test_candidates_come_as_an_array_with_padding() -> None:
    renderer, _ = opened("gemma-sapling")
    ids = renderer.render_prompt(Conversation.from_question("Hi")).ids_T
    (rows,) = engine("gemma-sapling").compute_logprobs([ids], [np.arange(len(ids)) > 0])
    answer = post(
        serving("gemma-sapling"),
        "/inference/v1/generate",
        token_ids=ids.tolist(),
        return_token_ids=True,
        sampling_params={
            "max_tokens": 1,
            "prompt_logprob_token_ids": [[5, 6], [7, -1]],
            "prompt_logprob_start": 2,
        },
    ).json()
    array = np.load(io.BytesIO(base64.b64decode(answer["prompt_token_id_logprobs"])))
    assert array.shape == (2, 2) and array.dtype == np.float32
    assert np.allclose(array[[0, 0, 1], [0, 1, 0]], [rows[2, 5], rows[2, 6], rows[3, 7]], atol=1e-4)
    assert array[1, 1] == -np.inf
    assert answer["prompt_token_ids"] == ids.tolist()


def test_streamed_tokens_are_those_of_the_engine_and_drawn_ones_repeat() -> None:
    renderer, _ = opened("qwen-sapling")
    prompt = renderer.render_prompt(Conversation.from_question(ASKED)).ids_T
    assert (
        list(engine("qwen-sapling").stream(prompt, renderer.stop_ids, 20, Sampling()))
        == said("qwen-sapling", ASKED)[0]
    )
    body = {
        "model": "qwen-sapling",
        "prompt": prompt.tolist(),
        "max_tokens": 12,
        "ignore_eos": True,
        "temperature": 2.0,
        "return_token_ids": True,
    }
    drawn = [
        post(serving("qwen-sapling"), "/v1/completions", **body, seed=seed).json()["choices"][0][
            "token_ids"
        ]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    narrow = post(serving("qwen-sapling"), "/v1/completions", **body, seed=1, top_p=1e-9).json()[
        "choices"
    ][0]["token_ids"]
    assert narrow == list(
        engine("qwen-sapling").stream(prompt, (), 12, Sampling())
    )  # the fewest likeliest are one


def test_offsets_count_whole_characters_and_no_markers() -> None:
    """Half characters and control tokens are spelled in `tokens`, and are not in the text."""
    renderer, _ = opened("qwen-sapling")
    ids = [
        *renderer.vocabulary.encode("a 𓀀 b"),
        renderer.stop_ids[0],
        *renderer.vocabulary.encode("c"),
    ]
    rows = torch.log_softmax(
        torch.randn(
            len(ids) - 1, len(renderer.vocabulary), generator=torch.Generator().manual_seed(0)
        ),
        -1,
    )
    found = build_completion_logprobs(renderer, ids, rows, 0, 0, False)
    assert any(token.startswith("bytes:") for token in found["tokens"])
    text = "a 𓀀 bc"
    whole = [
        (token, at)
        for token, at in zip(found["tokens"], found["text_offset"], strict=True)
        if token in text
    ]
    assert len(whole) > 2
    assert all(text[at:].startswith(token) for token, at in whole)


# --- who may ask, and how much ---


@pytest.fixture(scope="module")
def strict() -> Iterator[Served]:
    """A server with a key and small caps."""
    served = start_serve(
        SAPLINGS / "llama-sapling",
        "--host",
        "127.0.0.1",
        "--max-body",
        "1",
        "--max-tokens",
        "64",
        "--max-logprobs",
        "5",
        "--concurrency",
        "2",
        "--seconds",
        "1",
        PERSEA_SERVE_KEY="a-secret",
    )
    yield served
    served.process.terminate()
    served.process.join(20)
    assert served.process.exitcode in (0, -15, 143)


HEAD = {"authorization": "Bearer a-secret"}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/completions", b"{", 400, "not JSON"),
        ("/v1/completions", b"[" * 100_000, 400, ""),
        (
            "/v1/completions",
            b'{"model": "llama-sapling", "prompt": "x", "max_tokens": NaN}',
            422,
            "max_tokens",
        ),
        (
            "/v1/completions",
            {"model": "llama-sapling", "prompt": "x", "best_of": 3},
            422,
            "best_of",
        ),
        ("/v1/completions", {"model": "llama-sapling", "prompt": "x", "n": 65}, 422, "n"),
        (
            "/v1/completions",
            {"model": "llama-sapling", "prompt": ["x", "y"], "n": 40},
            400,
            "80 answers were requested",
        ),
        ("/v1/completions", {"model": "llama-sapling", "prompt": "x", "stop": [""]}, 422, "stop"),
        (
            "/v1/chat/completions",
            {
                "model": "llama-sapling",
                "messages": [{"role": "user", "content": "x"}],
                "response_format": {"type": "xml"},
            },
            422,
            "response_format",
        ),
        (
            "/v1/chat/completions",
            {
                "model": "llama-sapling",
                "messages": [{"role": "user", "content": "x"}],
                "top_logprobs": 2,
            },
            400,
            "send logprobs: true",
        ),
        ("/v1/models/other", None, 404, "no model 'other'"),
        (
            "/v1/completions",
            {"model": "llama-sapling", "prompt": [1, 10_000_000]},
            400,
            "outside the vocabulary",
        ),
        ("/v1/completions", {"model": "llama-sapling", "prompt": []}, 400, "empty"),
        (
            "/v1/completions",
            {"model": "llama-sapling", "prompt": "x", "logprobs": 6},
            400,
            "the limit is 5",
        ),
        (
            "/v1/completions",
            {"model": "llama-sapling", "prompt": "x", "max_tokens": 65},
            400,
            "the limit is 64",
        ),
        (
            "/v1/completions",
            {"model": "llama-sapling", "prompt": [5] * 1024, "max_tokens": 1},
            400,
            "model's 1,024 positions",
        ),
        (
            "/v1/completions",
            {"model": "llama-sapling", "prompt": "x", "stream": True, "logprobs": 1},
            400,
            "stream",
        ),
        ("/v1/completions", {"model": "other", "prompt": "x"}, 404, "no model 'other'"),
        (
            "/inference/v1/generate",
            {"token_ids": [5, 6], "sampling_params": {"prompt_logprob_token_ids": [[1], [2]]}},
            400,
            "rows of candidates",
        ),
        (
            "/inference/v1/generate",
            {"token_ids": [5, 6], "sampling_params": {"prompt_logprob_token_ids": [[1] * 6]}},
            400,
            "the limit is 5",
        ),
        ("/v1/chat/completions", {"model": "llama-sapling", "messages": []}, 422, "messages"),
        (
            "/v1/chat/completions",
            {
                "model": "llama-sapling",
                "messages": [{"role": "user", "content": "x"}],
                "tools": [{"type": "function", "function": {"name": "my tool", "parameters": {}}}],
            },
            400,
            "is not a valid tool name",
        ),
        ("/v1/embeddings", {}, 404, "no such route"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_with_the_reason(
    strict: Served, path: str, body: object, status: int, words: str
) -> None:
    sent = {"content": body} if isinstance(body, bytes) else {"json": body} if body else {}
    answer = httpx2.request(
        "GET" if body is None else "POST",
        strict.url + path,
        headers=HEAD | {"content-type": "application/json"},
        trust_env=False,
        timeout=30,
        **sent,
    )
    found = answer.json()["error"]
    assert (answer.status_code, found["code"]) == (status, status)
    assert words in found["message"] + str(found["param"])


def test_a_request_that_names_no_length_gets_what_is_allowed(strict: Served) -> None:
    answer = httpx2.post(
        f"{strict.url}/v1/chat/completions",
        headers=HEAD,
        trust_env=False,
        timeout=60,
        json={"model": "llama-sapling", "messages": [{"role": "user", "content": "x"}]},
    )
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] <= 64


def test_without_the_key_nothing_but_health_is_answered(strict: Served) -> None:
    assert httpx2.get(f"{strict.url}/health", trust_env=False).status_code == 200
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic a-secret"},
        {"authorization": "a-secret"},
    ):
        for path in ("/v1/models", "/v1/chat/completions", "/nowhere"):
            answer = httpx2.get(strict.url + path, headers=headers, trust_env=False)
            assert (answer.status_code, answer.json()["error"]["type"]) == (
                401,
                "authentication_error",
            )
    assert httpx2.get(f"{strict.url}/v1/models", headers=HEAD, trust_env=False).status_code == 200


def test_bodies_are_capped_in_size_and_time(strict: Served) -> None:
    big = b"x" * (2 << 20)
    assert (
        httpx2.post(
            f"{strict.url}/v1/completions", content=big, headers=HEAD, trust_env=False
        ).status_code
        == 413
    )
    said = httpx2.post(
        f"{strict.url}/v1/completions",
        content=iter([big[:600_000]] * 3),
        headers=HEAD,
        trust_env=False,
    )  # no content-length
    assert said.status_code == 413
    host, port = strict.url.removeprefix("http://").split(":")
    for sent in (
        b"",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer a-secret\r\n"
        b"content-length: 50\r\n\r\n{",
    ):
        begin = time.monotonic()
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(sent)
            answer = b""
            while piece := slow.recv(4096):
                answer += piece
        assert answer.startswith(b"HTTP/1.1 408"), sent
        assert time.monotonic() - begin < 5


def test_more_requests_than_are_answered_get_429_and_a_slow_reader_is_left() -> None:
    """The guard alone, around an application that answers when it is told to."""

    async def play() -> list[list[Any]]:
        go = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            assert (await receive())["body"] == b"whole"
            await go.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def ask(
            guard: AccessLimitMiddleware, *bodies: bytes, stuck: bool = False
        ) -> list[Any]:
            parts, sent = list(bodies), list[Any]()

            async def receive() -> Any:
                if not parts:
                    await asyncio.sleep(60)
                return {
                    "type": "http.request",
                    "body": parts.pop(0),
                    "more_body": bool(parts) or len(bodies) == 1,
                }

            async def send(message: Any) -> None:
                if stuck:
                    await asyncio.sleep(60)
                sent.append(message)

            await guard({"type": "http", "path": "/x", "headers": []}, receive, send)
            return sent

        guard = AccessLimitMiddleware(
            app, "", ServerLimits(io_timeout_s=0.3, max_concurrent_requests=2)
        )
        slow = [
            asyncio.create_task(ask(guard, b"half")) for _ in range(5)
        ]  # bodies that never come hold nobody up
        held = [
            asyncio.create_task(ask(guard, b"who", b"le")),
            asyncio.create_task(ask(guard, b"who", b"le", stuck=True)),
        ]
        await asyncio.sleep(0.05)
        turned_away = await ask(guard, b"whole", b"")
        go.set()
        told = [*await asyncio.gather(*held), turned_away, *await asyncio.gather(*slow)]
        assert (guard.num_running_requests, guard.num_buffered_bytes) == (0, 0)
        return told

    kept, stuck, turned_away, *slow = asyncio.run(play())
    assert [m["status"] for m in kept] == [200]
    assert stuck == []  # left after 0.3 s, the place free again
    assert turned_away[0]["status"] == 429
    assert (b"retry-after", b"1") in turned_away[0]["headers"]
    assert [s[0]["status"] for s in slow] == [408] * 5


def test_many_bodies_that_were_begun_are_capped_together() -> None:
    """Each below the cap of one, all begun when nothing was read yet."""

    async def play() -> list[Any]:
        guard, sent = (
            AccessLimitMiddleware(None, "", ServerLimits(max_body_bytes=10, io_timeout_s=0.2)),
            list[Any](),
        )  # type: ignore[arg-type]

        async def ask() -> None:
            parts = [b"x" * 9]

            async def receive() -> Any:
                await asyncio.sleep(0 if parts else 60)
                return {"type": "http.request", "body": parts.pop(), "more_body": True}

            async def send(message: Any) -> None:
                sent.append(message)

            await guard({"type": "http", "path": "/x", "headers": []}, receive, send)

        await asyncio.gather(*(ask() for _ in range(20)))
        assert guard.num_buffered_bytes == 0
        return sent

    starts = [m for m in asyncio.run(play()) if "status" in m]
    refused = [m for m in starts if m["status"] == 429]
    assert (len(starts), len(refused)) == (20, 12)  # 8 of 9 bytes fit into 80
    assert all((b"retry-after", b"1") in m["headers"] for m in refused)


def test_without_a_key_only_this_machine_is_answered() -> None:
    url = serving("qwen-sapling")
    for origin, status in (
        ("https://evil.example", 403),
        ("null", 403),
        ("http://localhost:3000", 200),
        ("http://127.0.0.1", 200),
    ):
        assert (
            httpx2.get(f"{url}/v1/models", headers={"origin": origin}, trust_env=False).status_code
            == status
        )
    assert (
        httpx2.get(
            f"{url}/v1/models", headers={"host": "evil.example"}, trust_env=False
        ).status_code
        == 403
    )
    loopback = ("localhost", "localhost:80", "127.0.0.1", "127.8.1.1:80", "[::1]:80", "::1")
    assert [is_loopback(h) for h in loopback] == [True] * 6
    assert not any(
        is_loopback(h)
        for h in ("0.0.0.0", "10.0.0.1:80", "evil.example", "localhost.evil.example", "::", "")
    )


def test_other_addresses_need_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PERSEA_SERVE_KEY", raising=False)
    with pytest.raises(RefusedError, match="PERSEA_SERVE_KEY is not set") as caught:
        resolve_api_key("0.0.0.0", "PERSEA_SERVE_KEY")
    assert caught.value.exit_code == 4
    assert resolve_api_key("127.0.0.1", "PERSEA_SERVE_KEY") == ""
    monkeypatch.setenv("PERSEA_SERVE_KEY", " \n")
    with pytest.raises(RefusedError):
        resolve_api_key("::", "PERSEA_SERVE_KEY")
    monkeypatch.setenv("PERSEA_SERVE_KEY", "a-secret\n")  # as a file ends
    assert resolve_api_key("0.0.0.0", "PERSEA_SERVE_KEY") == "a-secret"
    ended = persea(
        "serve",
        tmp_path / "nowhere",
        "--host",
        "0.0.0.0",
        "--key-env",
        "NO_SUCH_KEY",
        folder=tmp_path,
    )
    assert (ended.code, "NO_SUCH_KEY is not set" in ended.err) == (
        4,
        True,
    )  # told before the model is looked for


def test_a_run_folder_is_its_student(tmp_path: Path) -> None:
    (tmp_path / "run" / "train").mkdir(parents=True)
    (tmp_path / "run" / "train" / "student").symlink_to(SAPLINGS / "llama-sapling")
    speaker = load_served_model(str(tmp_path / "run"))
    assert (speaker.name, speaker.renderer.family.name, speaker.max_context_tokens) == (
        "run",
        "llama",
        1024,
    )
    assert build_app(speaker, "", ServerLimits())
    with pytest.raises(DataError, match="no model folder"):
        load_served_model(str(tmp_path / "nothing"))
