"""Chat servers as real ones behave (vLLM 0.32, llama.cpp b11549, transformers serve 5.24, litellm
1.108): unasked thoughts, layout, streams without [DONE], sampling defaults, and who answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from persea.chat.messages import Conversation, FinishReason, Text, Thinking, ThinkingEffort
from persea.errors import TeacherError
from persea.teachers.engines import EngineFailure, Sampling
from persea.teachers.engines.chat_server import (
    HANDSHAKE_QUESTIONS,
    ChatServerEngine,
    _separate_thought,
)
from persea.teachers.engines.http_client import HttpClient
from persea.teachers.engines.server import ServerFingerprint
from tests.servers import Answer, Script, events, playing
from tests.teachers.engines.test_token_server import QUICK, no_sleep

QUESTION = Conversation.from_question("q")


def stream(*deltas: Any, model: str = "m", done: bool = True) -> bytes:
    """An answer as events: with [DONE], or closed after the finish reason."""
    said = [{"model": model, "choices": [{"delta": d, "finish_reason": None}]} for d in deltas]
    end = {"model": model, "choices": [{"delta": {}, "finish_reason": "stop"}]}
    whole = events(*said, end)
    return whole if done else whole.removesuffix(b"data: [DONE]\n\n")


def engine(script: Script, name: str = "m", **settings: Any) -> ChatServerEngine:
    return ChatServerEngine(HttpClient(script.url, "far", QUICK, sleep=no_sleep), name, **settings)


def talks(answer: Callable[[str, Any], Any]) -> Script:
    """A server with one model; (question, body) -> what it streams."""

    def handler(path: str, body: Any) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "m"}]}
        return answer(body["messages"][-1]["content"], body)

    return Script(handler)


def plain(question: str, body: Any) -> bytes:
    return stream({"content": f"An answer to {question}"})


# --- which model answers ---


def test_two_servers_of_one_name_are_told_apart_by_what_they_answer() -> None:
    with (
        playing(talks(plain)) as one,
        playing(talks(lambda q, body: stream({"content": f"Something else on {q}"}))) as other,
    ):
        first, again, second = (engine(s).handshake() for s in (one, one, other))
    assert first == again
    assert first.to_json() != second.to_json()
    with pytest.raises(TeacherError, match="it answers a fixed question in other words"):
        first.refuse_other_model(second, "far")
    assert ServerFingerprint.from_json(first.to_json()) == first


def test_a_model_that_changes_behind_the_same_name_is_noticed() -> None:
    changed = False

    def answer(question: str, body: Any) -> bytes:
        return stream({"content": "new" if changed else "old"})

    with playing(talks(answer)) as script:
        far = engine(script)
        far.handshake()
        assert far.chat([QUESTION], 5) == [((Text("old"),), FinishReason.STOP)]
        changed = True
        with pytest.raises(TeacherError, match="another model is there now"):
            far.chat([QUESTION], 5)


def test_a_server_that_answers_differently_each_time_is_identified_by_its_run_alone() -> None:
    count = 0

    def answer(question: str, body: Any) -> bytes:
        nonlocal count
        count += 1
        return stream({"content": f"answer {count}"})

    with playing(talks(answer)) as script:
        far = engine(script)
        first, second = far.handshake(), engine(script).handshake()
        assert first.answers == second.answers == ()
        assert first.nonce and first.nonce != second.nonce
        assert far.chat([QUESTION], 5)[0] != far.chat([QUESTION], 5)[0]  # and it is not refused


def test_a_name_that_the_server_ignores_is_refused() -> None:
    """llama.cpp answers to any name."""
    with (
        playing(talks(plain)) as script,
        pytest.raises(TeacherError, match="the server has m, not nope; m answered"),
    ):
        engine(script, "nope").handshake()

    def handler(path: str, body: Any) -> Any:  # a service without a list, and an alias
        return (
            Answer(b"no", 404)
            if path == "/v1/models"
            else stream({"content": "x"}, model="m-2026-01-01")
        )

    with playing(Script(handler)) as script:
        assert engine(script, "m").handshake().model == "m-2026-01-01"


# --- thoughts ---


@pytest.mark.parametrize(
    ("reasoning", "content", "thought", "text"),
    [
        ("\nhm\n", "\n\nyes", "hm", "yes"),
        ("", "<think>\nhm\n</think>\n\nyes", "hm", "yes"),
        ("", "hm\n</think>\n\nyes", "hm", "yes"),
        ("", "\n<think>hm", "hm", ""),
        ("", "[THINK]hm[/THINK]yes", "hm", "yes"),
        ("", "<think>\n\n</think>\n\nyes", "", "yes"),
        ("", "yes", "", "yes"),
        ("", "\n  indented", "", "\n  indented"),
        ("hm", "", "hm", ""),
    ],
)
def test_thought_and_text_come_apart_without_layout(
    reasoning: str, content: str, thought: str, text: str
) -> None:
    assert _separate_thought(reasoning, content) == (thought, text)


def hybrid(question: str, body: Any) -> bytes:
    """Qwen3 behind vLLM with a reasoning parser: it thinks unless it is told not to."""
    if body.get("chat_template_kwargs", {}).get("enable_thinking", True):
        return stream({"reasoning": "\nhm"}, {"reasoning": "\n"}, {"content": "\n\nyes"})
    return stream({"content": "yes"})


def test_thinking_that_nobody_asked_for_is_switched_off() -> None:
    with playing(talks(hybrid)) as script:
        far = engine(script)
        far.handshake()
        assert far.chat([QUESTION], 5) == [((Text("yes"),), FinishReason.STOP)]
    with playing(talks(hybrid)) as script:
        far = engine(script, send_effort=True, handshake_effort=ThinkingEffort.HIGH)
        far.handshake()
        asked = replace(QUESTION, effort=ThinkingEffort.HIGH)
        assert far.chat([asked], 5) == [((Thinking("hm"), Text("yes")), FinishReason.STOP)]


@pytest.mark.parametrize(
    "answer",
    [
        lambda q, body: stream({"reasoning_content": "hm"}, {"content": "yes"}),
        lambda q, body: stream({"content": "<think>\nhm\n</think>\n\nyes"}),
        lambda q, body: (
            Answer(b"unknown key", 400)
            if "chat_template_kwargs" in body
            else stream({"reasoning_content": "hm"}, {"content": "yes"})
        ),
    ],
)
def test_thinking_that_cannot_be_switched_off_is_refused(answer: Callable[[str, Any], Any]) -> None:
    with playing(talks(answer)) as script:
        with pytest.raises(TeacherError, match="the model thinks unasked: 'hm'") as caught:
            engine(script).handshake()
        assert "set the teacher's `effort:`" in str(caught.value)


def test_a_later_unasked_thought_costs_its_prompt_and_is_asked_once() -> None:
    def answer(question: str, body: Any) -> bytes:
        return plain(question, body) if question != "q" else stream({"content": "hm</think>yes"})

    with playing(talks(answer)) as script:
        far = engine(script)
        far.handshake()
        script.asked.clear()
        (failure,) = far.chat([QUESTION], 5)
        assert isinstance(failure, EngineFailure)
        assert failure.reason.startswith("the model thinks unasked")
        questions = [b["messages"][-1]["content"] for _, _, b in script.asked]
        assert questions == [HANDSHAKE_QUESTIONS[0], "q"]


# --- sampling ---


def test_neutral_values_are_sent_and_given_up_where_a_service_refuses_them() -> None:
    def strict(question: str, body: Any) -> Any:
        return Answer(b"top_k", 400) if "top_k" in body else plain(question, body)

    with playing(talks(plain)) as script:
        engine(script).handshake()
        last = script.asked[-1][2] if script.asked[-1][2] else script.asked[-2][2]
    assert {k: last[k] for k in ("top_p", "top_k", "min_p", "repetition_penalty")} == {
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    with playing(talks(strict)) as script:
        far = engine(script, sampling=Sampling(0.0, 1.0, 0))
        far.handshake()
        assert far.chat([QUESTION], 5) == [((Text("An answer to q"),), FinishReason.STOP)]
        assert "top_k" not in script.asked[-1][2] and script.asked[-1][2]["presence_penalty"] == 0
        assert far.client.num_failed_requests == 0


def test_a_server_that_never_samples_is_refused_where_draws_are_asked_for() -> None:
    """transformers serve without do_sample answers greedily at every temperature."""
    drawn = Sampling(0.7, 1.0, 3)
    with (
        playing(talks(plain)) as script,
        pytest.raises(
            TeacherError, match="4 draws at temperature 1 with different seeds are equal"
        ),
    ):
        engine(script, sampling=drawn).handshake()

    def draws(question: str, body: Any) -> bytes:
        return stream({"content": f"{question} {body.get('seed', '')}"})

    with playing(talks(draws)) as script:
        far = engine(script, sampling=drawn)
        far.handshake()
        assert far.chat([QUESTION], 5) == [((Text("q 3"),), FinishReason.STOP)]


# --- streams and failures ---


def test_a_stream_may_end_with_its_finish_reason_but_not_before() -> None:
    """transformers serve sends no [DONE]."""
    with playing(talks(lambda q, body: stream({"content": "yes"}, done=False))) as script:
        far = engine(script)
        far.handshake()
        assert far.chat([QUESTION], 5) == [((Text("yes"),), FinishReason.STOP)]
    cut = stream({"content": "yes"}).split(b"\n\n")[0] + b"\n\n"
    with (
        playing(talks(lambda q, body: cut)) as script,
        pytest.raises(TeacherError, match=r"ended without \[DONE\] or a finish reason"),
    ):
        engine(script).handshake()


def dripping(pause: float, count: int) -> Answer:
    one = b'data: {"model": "m", "choices": [{"delta": {"content": "x"}}]}\n\n'
    return Answer(pieces=((pause, one),) * count)


def test_an_answer_that_drips_for_ever_ends_at_its_limits() -> None:
    def answer(question: str, body: Any) -> Any:
        return (
            plain(question, body)
            if question in HANDSHAKE_QUESTIONS
            else dripping(0.0, 10_000)
            if question == "many"
            else dripping(0.1, 1000)
        )

    with playing(talks(answer)) as script:
        policy = replace(QUICK, max_answer_s=0.5, max_attempts=2)
        far = ChatServerEngine(HttpClient(script.url, "far", policy, sleep=no_sleep), "m")
        far.handshake()
        many, slow = far.chat([Conversation.from_question(q) for q in ("many", "slow")], 5)
    assert isinstance(many, EngineFailure) and "more than 104 tokens came" in many.reason
    assert isinstance(slow, EngineFailure) and "had no end after 0.5 s" in slow.reason


def test_an_error_event_of_the_request_is_asked_once_and_one_of_the_server_again() -> None:
    """vLLM's token route answers a prompt that is too long with status 200 and an error event."""
    broken = 2

    def answer(question: str, body: Any) -> bytes:
        nonlocal broken
        if question == "long":
            return events({"error": {"message": "the prompt is too long", "code": 400}})
        if question == "unlucky" and broken:
            broken -= 1
            return events({"error": {"message": "out of memory", "code": 500}})
        return plain(question, body)

    with playing(talks(answer)) as script:
        far = engine(script)
        far.handshake()
        script.asked.clear()
        long, unlucky = far.chat([Conversation.from_question(q) for q in ("long", "unlucky")], 5)
        asked = [b["messages"][-1]["content"] for _, _, b in script.asked]
    assert isinstance(long, EngineFailure) and "too long" in long.reason
    assert unlucky == ((Text("An answer to unlucky"),), FinishReason.STOP)
    assert (asked.count("long"), asked.count("unlucky")) == (1, 3)


def test_a_server_that_restarts_is_waited_for_and_no_attempt_is_used_up() -> None:
    down = 0

    def answer(question: str, body: Any) -> Any:
        nonlocal down
        if question == "q" and down < 30:
            down += 1
            return Answer(b"loading", 503)
        return plain(question, body)

    now = [0.0]

    async def sleep(seconds: float) -> None:
        now[0] += seconds
        await no_sleep(seconds)

    policy = replace(QUICK, max_attempts=2, give_up_after_s=2000.0)
    with playing(talks(answer)) as script:
        client = HttpClient(script.url, "far", policy, clock=lambda: now[0], sleep=sleep)
        far = ChatServerEngine(client, "m")
        far.handshake()
        assert far.chat([QUESTION], 5) == [((Text("An answer to q"),), FinishReason.STOP)]
        assert down == 30
        assert now[0] > 500  # seconds of waiting, by a clock of the test
        down = -(10**9)
        client.retry_policy = replace(policy, give_up_after_s=100.0)
        with pytest.raises(TeacherError, match="no answer for 100 s: status 503"):
            far.chat([QUESTION], 5)


def test_a_switched_off_token_route_is_named() -> None:
    body = b'{"detail": "Scale-out endpoints are disabled. Restart with --enable-scale-out"}'
    with playing(talks(lambda q, b: Answer(body, 403))) as script:
        with pytest.raises(TeacherError, match="token route is switched off") as caught:
            engine(script).handshake()
        assert "--enable-scale-out" in (caught.value.remedy or "")
