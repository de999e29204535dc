"""Engines behind servers: `persea serve` returns what the local engine does; malformed or failing
answers are never used.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import os
import random
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from email.utils import formatdate
from typing import Any

import numpy as np
import pytest
import torch

from persea.chat.messages import (
    Conversation,
    FinishReason,
    Message,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
    Tool,
    ToolCall,
    ToolResult,
)
from persea.data.prompts import Prompt
from persea.distributions import (
    LOGPROB_STEP_NATS,
    MASS_TOLERANCE,
    DistributionKind,
    SparseDistributions,
)
from persea.errors import MissingRequirementError, RecipeError, RefusedError, TeacherError
from persea.tasks.generated import GENERATED_TASKS
from persea.tasks.task import Split
from persea.teachers.engines import FULL_DISTRIBUTIONS, GREEDY, EngineFailure, Sampling
from persea.teachers.engines.chat_server import ChatServerEngine
from persea.teachers.engines.http_client import (
    MAX_RETRY_AFTER_S,
    HttpClient,
    Request,
    RetryPolicy,
    _parse_retry_after,
)
from persea.teachers.engines.response_validation import (
    MalformedResponseError,
    RawPromptLogprobs,
    RejectedRequestError,
    decode_candidate_logprobs,
    to_sparse_distributions,
)
from persea.teachers.engines.server import ServerFingerprint, resolve_served_model
from persea.teachers.engines.token_server import (
    HANDSHAKE_CONVERSATION,
    HANDSHAKE_TEXT,
    TokenServerEngine,
)
from persea.teachers.engines.vllm import VllmEngine, load_vllm_engine
from persea.teachers.engines.wire_formats import (
    COMPLETIONS_FORMAT,
    SGLANG_FORMAT,
    TOKENS_FORMAT,
    WireFormat,
)
from persea.teachers.teacher import Teacher
from tests.servers import Answer, Script, events, playing, serving
from tests.teachers.engines.test_transformers import NAMES, engine, opened

QWEN = "qwen-sapling"
QUICK = RetryPolicy(concurrency=4, max_attempts=6, stall_timeout_s=1.0, give_up_after_s=20.0)


async def no_sleep(seconds: float) -> None:
    await asyncio.sleep(0)


def endpoint(
    url: str,
    name: str,
    dialect: WireFormat = TOKENS_FORMAT,
    top: int = 5,
    manners: RetryPolicy = QUICK,
    key: str = "",
    sleep: Any = asyncio.sleep,
) -> TokenServerEngine:
    line = HttpClient(url, "far", manners, key, sleep=sleep)
    found = TokenServerEngine(line, opened(name)[0], dialect, resolve_served_model(line, ""), top)
    found.handshake()
    return found


def asked(name: str, n: int = 2) -> list[np.ndarray]:
    return [
        opened(name)[0].render_prompt(i.prompt.conversation).ids_T
        for skill in GENERATED_TASKS
        for i in skill.items(Split.TEST, n, 0)
        if not i.prompt.conversation.tools
        or opened(name)[0].family.is_tool_text_verbatim is not None
    ]


# --- against `persea serve` ---


@pytest.mark.parametrize("dialect", [TOKENS_FORMAT, COMPLETIONS_FORMAT], ids=lambda d: d.name)
@pytest.mark.parametrize("name", NAMES)
def test_a_server_gives_the_local_engines_tokens_and_log_probabilities(
    name: str, dialect: WireFormat
) -> None:
    renderer, _ = opened(name)
    far, here, top = (
        endpoint(serving(name), name, dialect, 20, replace(QUICK, stall_timeout_s=60)),
        engine(name),
        20,
    )
    assert (far.capabilities.kind, far.capabilities.num_top_logprobs) == (DistributionKind.TOPK, 20)
    prompts = asked(name, 1)
    answers = here.generate(prompts, renderer.stop_ids, 16)
    assert [a.tolist() for a in far.generate(prompts, renderer.stop_ids, 16)] == [
        a.tolist() for a in answers
    ]
    whole = [np.concatenate([p, a]) for p, a in zip(prompts, answers, strict=True)]
    learn = [np.arange(len(w)) >= len(p) for w, p in zip(whole, prompts, strict=True)]
    seen = 0
    for rows, full_NW, ids, learned in zip(
        far.compute_sparse_distributions(whole, learn),
        here.compute_logprobs(whole, learn),
        whole,
        learn,
        strict=True,
    ):
        assert isinstance(rows, SparseDistributions)
        full, row_M = full_NW.numpy(), np.repeat(np.arange(len(rows)), top)
        assert len(rows) == learned.sum()
        assert np.abs(np.log(rows.probs_M) - full[row_M, rows.ids_M]).max() <= 1e-4
        assert (
            np.abs(rows.target_logprob_N - full[np.arange(len(rows)), ids[learned]]).max() <= 1e-4
        )
        assert [set(ids) for ids in rows.ids_M.reshape(-1, top).tolist()] == [
            set(r) for r in np.argsort(-full, 1)[:, :top].tolist()
        ]
        seen += len(rows)
    assert seen > 10
    with pytest.raises(TeacherError, match="has no full distributions"):
        far.compute_logprobs(whole, learn)


def test_candidates_of_every_position() -> None:
    far, here = (
        endpoint(serving(QWEN), QWEN, manners=replace(QUICK, stall_timeout_s=60)),
        engine(QWEN),
    )
    ids = asked(QWEN, 1)[0]
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, len(opened(QWEN)[0].vocabulary), (len(ids) - 1, 7)).astype(np.int32)
    wanted[3, 4:] = -1
    (found,) = far.compute_candidate_logprobs([ids], [wanted])
    (full,) = here.compute_logprobs([ids], [np.arange(len(ids)) > 0])
    picked = np.take_along_axis(full.numpy(), np.maximum(wanted, 0).astype(np.int64), 1)
    assert isinstance(found, np.ndarray)
    assert np.abs(found - picked)[wanted >= 0].max() <= 1e-4
    assert (found[wanted < 0] == -np.inf).all()
    with pytest.raises(TeacherError, match="use `protocol: tokens`"):
        replace(far, wire_format=COMPLETIONS_FORMAT).compute_candidate_logprobs([ids], [wanted])


def test_a_chat_route_gives_the_local_engines_words_and_thoughts() -> None:
    name = "gpt-oss-sapling"
    renderer, _ = opened(name)
    talk = ChatServerEngine(
        HttpClient(serving(name), "far", replace(QUICK, stall_timeout_s=60)),
        name,
        GREEDY,
        send_effort=True,
        handshake_effort=ThinkingEffort.HIGH,
    )
    fingerprint = talk.handshake()
    assert (fingerprint.model, len(fingerprint.answers)) == (name, 3)
    far = Teacher("far", renderer, talk, ThinkingEffort.HIGH)
    here = Teacher("here", renderer, engine(name), ThinkingEffort.HIGH)
    prompts = [
        i.prompt
        for skill in GENERATED_TASKS
        if skill.name == "reasoning"
        for i in skill.items(Split.TEST, 4, 0)
    ]
    got, want = far.answer(prompts, 96), here.answer(prompts, 96)
    assert [
        (a.finish, a.conversation.messages[-1].thinking, a.text)
        for a in got
        if a.finish is FinishReason.STOP
    ] == [
        (a.finish, a.conversation.messages[-1].thinking, a.text)
        for a in want
        if a.finish is FinishReason.STOP
    ]
    assert [a.finish for a in got] == [a.finish for a in want]
    assert any(a.conversation.messages[-1].thinking for a in got)
    assert far.is_text_only
    assert not here.is_text_only
    with pytest.raises(TeacherError, match="no log-probabilities"):
        list(far.compute_target_logprobs([got[0].conversation]))
    (rows,) = talk.compute_sparse_distributions(
        [np.arange(5)], [np.array([False, True, True, False, True])]
    )
    assert isinstance(rows, SparseDistributions)
    assert (len(rows), rows.kind, np.isnan(rows.target_logprob_N).all()) == (
        3,
        DistributionKind.TEXT_ONLY,
        True,
    )


# --- a script of faults ---


class Truth:
    """What an honest server says, computed by the local engine."""

    def __init__(self, name: str = QWEN, served: str = "m") -> None:
        self.name, self.served = name, served
        self.answers: dict[str, Any] = {}

    def __call__(self, path: str, body: Any) -> Any:
        key = json.dumps([path, body], sort_keys=True)
        if key not in self.answers:
            self.answers[key] = self.say(path, body)
        return self.answers[key]

    def say(self, path: str, body: Any) -> Any:
        renderer, _ = opened(self.name)
        if path == "/v1/models":
            return {"data": [{"id": self.served}]}
        if path == "/v1/chat/completions":
            if not body["stream"]:
                return {
                    "model": self.served,
                    "choices": [{"message": {"content": "x"}, "finish_reason": "length"}],
                }
            return events(
                {"model": self.served, "choices": [{"delta": {"content": "an "}}]},
                {
                    "model": self.served,
                    "choices": [{"delta": {"content": "answer"}, "finish_reason": "stop"}],
                },
                {"model": self.served, "choices": [], "usage": {"total_tokens": 7}},
            )
        if path == "/v1/completions":
            return {"choices": [{"prompt_token_ids": renderer.vocabulary.encode(body["prompt"])}]}
        params, ids = body["sampling_params"], np.array(body["token_ids"], np.int32)
        if body.get("stream"):
            said = (
                engine(self.name)
                .generate([ids], params["stop_token_ids"], params["max_tokens"])[0]
                .tolist()
            )
            ended = "stop" if said[-1] in params["stop_token_ids"] else "length"
            return events(
                *(
                    {
                        "choices": [
                            {
                                "token_ids": [t],
                                "finish_reason": ended if k == len(said) - 1 else None,
                            }
                        ]
                    }
                    for k, t in enumerate(said)
                )
            )
        (rows,) = engine(self.name).compute_logprobs([ids], [np.arange(len(ids)) > 0])
        values, top = rows.topk(params["prompt_logprobs"])
        told: list[Any] = [None]
        for token, row, x, i in zip(
            ids[1:].tolist(), rows, values.tolist(), top.tolist(), strict=True
        ):
            told.append(
                {str(t): {"logprob": v} for t, v in zip(i, x, strict=True)}
                | {str(token): {"logprob": float(row[token])}}
            )
        return {
            "prompt_token_ids": ids.tolist(),
            "prompt_logprobs": told,
            "choices": [{"token_ids": [1]}],
        }


def is_work(path: str, body: Any) -> bool:
    return path == "/inference/v1/generate" and bool(body.get("stream"))


def test_with_a_fifth_of_faults_all_work_is_done_once() -> None:
    """500 prompts; a fifth of all requests ends in one of ten ways of failing. None is lost, none
    comes twice, each in its place.
    """
    truth, rng = Truth(), random.Random(0)
    prompts = asked(QWEN, 4)
    stops = opened(QWEN)[0].stop_ids
    good = [a.tolist() for a in engine(QWEN).generate(prompts, stops, 3)]
    faults = [
        Answer(b"busy", 503),
        Answer(b"<html>oops</html>", 200),
        Answer(b'{"error": {"message": "out of memory"}}', 200),
        Answer(b"x", 500),
        Answer(b"slow down", 429, (("retry-after", "0"),)),
        Answer(b'data: {"choices": [{"tok', 200),
        Answer(events(), 200),
        Answer(b"\xff\xfe", 200),
        Answer(b"half", 200, cut=True),
        Answer(events({"choices": [{"token_ids": [10**8], "finish_reason": "length"}]}), 200),
    ]
    played = 0

    def fault(n: int, path: str, body: Any) -> Any:
        nonlocal played
        if not is_work(path, body) or rng.random() > 0.2:
            return None
        played += 1
        return rng.choice(faults)

    with playing(Script(truth, fault)) as script:
        script.fault = lambda n, path, body: None
        far = endpoint(script.url, QWEN, sleep=no_sleep)
        script.asked.clear()
        script.fault = fault
        many = [prompts[k % len(prompts)] for k in range(500)]
        answers = far.generate(many, stops, 3)
        done = [k for k, a in enumerate(answers) if not isinstance(a, EngineFailure)]
        assert len(answers) == 500
        assert len(done) >= 495
        assert all(answers[k].tolist() == good[k % len(good)] for k in done)
        assert played > 80
        assert (
            sum(is_work(p, b) for _, p, b in script.asked) == len(done) + played
        )  # each fault cost one request, and no work was done twice


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "soon"}, None),
        ({}, None),
        ({"retry-after": "1e9"}, 1e9),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None),
        (
            {"retry-after": formatdate(5000, usegmt=True), "date": formatdate(4970, usegmt=True)},
            30.0,
        ),
        (
            {"retry-after": formatdate(4970, usegmt=True), "date": formatdate(5000, usegmt=True)},
            None,
        ),
        ({"retry-after": formatdate(5000, usegmt=True)}, None),
    ],
)
def test_retry_after_in_every_form(said: dict[str, str], seconds: float | None) -> None:
    """A date is read by the server's own clock, which may be wrong."""
    assert _parse_retry_after(said) == seconds


def test_the_whole_pool_waits_as_long_as_it_is_told_and_no_longer_than_five_minutes() -> None:
    now, waits = [0.0], []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds
        await asyncio.sleep(0)

    def fault(n: int, path: str, body: Any) -> Any:
        return {
            1: Answer(b"", 429, (("retry-after", "7"),)),
            2: Answer(b"", 503, (("retry-after", "1e9"),)),
        }.get(n)

    with playing(Script(lambda path, body: {"ok": now[0]}, fault)) as script:
        line = HttpClient(
            script.url,
            "far",
            RetryPolicy(concurrency=1, give_up_after_s=1e6),
            clock=lambda: now[0],
            sleep=sleep,
        )
        assert line.send_all([Request("/x", {}, lambda said: said["ok"]) for _ in range(3)]) == [
            307.0,
            307.0,
            307.0,
        ]
        assert max(waits) == MAX_RETRY_AFTER_S == 300
        assert len(script.asked) == 5


def test_a_server_that_says_no_token_is_left_however_alive_it_looks() -> None:
    """Comments and empty events come all the time; a token comes only from the second attempt."""
    alive = tuple(
        (
            0.05,
            b": still here\n\n"
            if k % 2
            else b'data: {"choices": [{"delta": {"role": "assistant"}}], "model": "m"}\n\n',
        )
        for k in range(100)
    )

    def is_question(body: Any) -> bool:
        return bool(body) and body["messages"][-1]["content"] == "q"

    def fault(n: int, path: str, body: Any) -> Any:
        first = not any(is_question(b) for _, _, b in script.asked[:-1])
        return Answer(pieces=alive) if is_question(body) and first else None

    with playing(Script(Truth(), fault)) as script:
        talk = ChatServerEngine(
            HttpClient(script.url, "far", replace(QUICK, stall_timeout_s=0.5), sleep=no_sleep), "m"
        )
        talk.handshake()
        used = talk.client.num_tokens_used
        begin = time.monotonic()
        assert talk.chat([Conversation.from_question("q")], 5) == [
            ((Text("an answer"),), FinishReason.STOP)
        ]
        assert 0.5 <= time.monotonic() - begin < 2.5
        assert talk.client.num_tokens_used == used + 7 + 7  # the model is verified before it


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "the key is missing or wrong"), (403, "has no permission"), (404, "no such route")],
)
def test_what_no_repetition_mends_ends_at_once_and_never_shows_the_key(
    status: int, words: str
) -> None:
    with playing(
        Script(lambda path, body: Answer(b"you sent Bearer sk-very-secret", status))
    ) as script:
        line = HttpClient(script.url, "far", QUICK, "sk-very-secret")
        with pytest.raises(TeacherError, match=words) as caught:
            resolve_served_model(line, "")
        assert len(script.asked) == 1
        assert script.headers[b"authorization"] == b"Bearer sk-very-secret"
    assert "sk-very-secret" not in str(caught.value) + repr(line) + str(caught.value.__cause__)
    assert caught.value.exit_code == 5


def test_one_poisonous_prompt_is_set_aside_and_many_mean_a_broken_server() -> None:
    prompts = asked(QWEN, 8)
    stops = opened(QWEN)[0].stop_ids
    bad = prompts[5].tolist()

    def fault(n: int, path: str, body: Any) -> Any:
        return Answer(b"crash", 500) if is_work(path, body) and body["token_ids"] == bad else None

    with playing(Script(Truth(), fault)) as script:
        far = endpoint(script.url, QWEN, manners=replace(QUICK, max_attempts=3), sleep=no_sleep)
        answers = far.generate(prompts, stops, 2)
        assert [k for k, a in enumerate(answers) if isinstance(a, EngineFailure)] == [5]
        assert "3 attempts failed, the last: status 500: crash" in answers[5].reason
        assert sum(is_work(p, b) and b["token_ids"] == bad for _, p, b in script.asked) == 3
        script.fault = lambda n, path, body: (
            Answer(b"too long", 400) if is_work(path, body) else None
        )
        with pytest.raises(TeacherError, match=r"requests failed, the last: status 400: too long"):
            far.generate(prompts, stops, 2)


def test_a_dead_server_is_given_up_and_a_budget_ends_a_run() -> None:
    now = [0.0]

    async def sleep(seconds: float) -> None:
        now[0] += seconds
        await asyncio.sleep(0)

    line = HttpClient(
        "http://127.0.0.1:9",
        "far",
        RetryPolicy(give_up_after_s=30, max_attempts=50),
        clock=lambda: now[0],
        sleep=sleep,
    )
    with pytest.raises(TeacherError, match="no answer for 30 s: ConnectError") as caught:
        line.send(Request("/v1/models", None, lambda said: said))
    assert caught.value.exit_code == 5
    with playing(Script(Truth())) as script:
        far = endpoint(
            script.url, QWEN, manners=replace(QUICK, max_total_tokens=200, concurrency=1)
        )
        with pytest.raises(RefusedError, match="the token budget is used up"):
            far.generate(asked(QWEN, 8), opened(QWEN)[0].stop_ids, 4)


# --- servers that lie ---


def lying(change: Callable[[str, Any, Any], Any]) -> Script:
    """An honest server, but for one change of its answers: (path, asked, said) -> said."""
    truth = Truth()

    def say(path: str, body: Any) -> Any:
        said = truth(path, body)
        return change(path, body, said if isinstance(said, bytes) else deepcopy(said))

    return Script(say)


def scored(change: Callable[[dict[str, Any]], Any]) -> Callable[[str, Any, Any], Any]:
    """A change of what is said of a scored prompt."""

    def changed(path: str, body: Any, said: Any) -> Any:
        if path == "/inference/v1/generate" and not body.get("stream"):
            result = change(said)
            return said if result is None else result
        return said

    return changed


def drop(said: dict[str, Any]) -> None:
    said["prompt_logprobs"] = None


def fewer(said: dict[str, Any]) -> None:
    said["prompt_logprobs"].pop()


def narrow(said: dict[str, Any]) -> None:
    place, own = said["prompt_logprobs"][-3], str(said["prompt_token_ids"][-3])
    said["prompt_logprobs"][-3] = {own: place[own]}


def by_text(said: dict[str, Any]) -> None:
    said["prompt_logprobs"][-1] = {"\ufffd": {"logprob": -1.0}}


def positive(said: dict[str, Any]) -> None:
    next(iter(said["prompt_logprobs"][-3].values()))["logprob"] = 0.5


def other_ids(said: dict[str, Any]) -> None:
    said["prompt_token_ids"][0] += 1


def error_body(said: dict[str, Any]) -> Any:
    return {"error": {"message": "CUDA out of memory"}}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (drop, "prompt_logprobs is missing"),
        (fewer, "log-probabilities for"),
        (narrow, "tokens are listed, 5 were requested"),
        (by_text, "text loses half characters"),
        (positive, "is above 0"),
        (other_ids, "the answer is about token"),
        (error_body, "an error instead of an answer: 'CUDA out of memory'"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_handshake_refuses_a_server_with_the_reason(
    change: Callable[[dict[str, Any]], Any], why: str
) -> None:
    with playing(lying(scored(change))) as script:
        with pytest.raises(TeacherError, match="the handshake failed") as caught:
            endpoint(script.url, QWEN, manners=replace(QUICK, max_attempts=2), sleep=no_sleep)
        assert why in str(caught.value)
        assert caught.value.exit_code == 5


def test_scores_that_change_and_greedy_answers_that_are_not_the_likeliest_are_refused() -> None:
    """A prefix cache with stale values (vLLM); penalties of the model's generation_config.json."""
    num_scored = [0]

    def stale(said: dict[str, Any]) -> None:
        num_scored[0] += 1
        for entries in said["prompt_logprobs"][1:] if num_scored[0] > 1 else ():
            for value in entries.values():
                value["logprob"] -= 0.5

    def penalised(path: str, body: Any, said: Any) -> Any:
        if not is_work(path, body):
            return said
        first, *others = opened(QWEN)[0].vocabulary.encode("zebra zebra")
        choice = {"token_ids": [first, *others], "finish_reason": "length"}
        return events({"choices": [choice]})

    for change, why in (
        (scored(stale), "scored again, differs by 0.50 nats"),
        (penalised, "the server changes how tokens are drawn"),
    ):
        with playing(lying(change)) as script, pytest.raises(TeacherError, match=why):
            endpoint(script.url, QWEN, manners=replace(QUICK, max_attempts=2), sleep=no_sleep)


def test_another_tokenizer_or_no_single_model_is_refused() -> None:
    def respell(path: str, body: Any, said: Any) -> Any:
        return {"choices": [{"prompt_token_ids": [1, 2, 3]}]} if path == "/v1/completions" else said

    with (
        playing(lying(respell)) as script,
        pytest.raises(TeacherError, match=r"the server tokenizes .* to \[1, 2, 3\]"),
    ):
        endpoint(script.url, QWEN)
    with playing(Script(lambda path, body: {"data": [{"id": "a"}, {"id": "b"}]})) as script:
        with pytest.raises(TeacherError, match="the server has a, b -> name one of them"):
            resolve_served_model(HttpClient(script.url, "far"), "")
        with pytest.raises(TeacherError, match="not c"):
            resolve_served_model(HttpClient(script.url, "far"), "c")
        assert resolve_served_model(HttpClient(script.url, "far"), "b") == "b"


def test_another_model_half_way_is_refused() -> None:
    """A connection breaks; whoever answers then has other weights."""
    changed = False

    def swap(path: str, body: Any, said: Any) -> Any:
        if changed and path == "/inference/v1/generate" and not body.get("stream"):
            for place in said["prompt_logprobs"][1:]:
                for one in place.values():
                    one["logprob"] -= 0.5
        return said

    def fault(n: int, path: str, body: Any) -> Any:
        nonlocal changed
        if is_work(path, body) and not changed:
            changed = True
            return Answer(b"half", cut=True)
        return None

    script = lying(swap)
    script.fault = fault
    with playing(script):
        far = endpoint(script.url, QWEN, sleep=no_sleep)
        with pytest.raises(
            TeacherError,
            match=r"another model is there now: its log-probabilities moved by 0\.50 nats",
        ):
            far.generate(asked(QWEN, 1), opened(QWEN)[0].stop_ids, 2)
        assert changed
    one = ServerFingerprint("m", (-1.0, -2.0))
    assert ServerFingerprint.from_json(json.loads(json.dumps(one.to_json()))) == one
    one.refuse_other_model(ServerFingerprint("m", (-1.05, -1.95)), "x")
    for other in (
        ServerFingerprint("n", (-1.0, -2.0)),
        ServerFingerprint("m", (-1.0,)),
        ServerFingerprint("m", (-1.0, -3.0)),
    ):
        with pytest.raises(TeacherError, match="another model"):
            one.refuse_other_model(other, "x")


def test_an_answer_without_its_end_or_past_its_length_is_no_answer() -> None:
    far = TokenServerEngine(HttpClient("http://x", "far"), opened(QWEN)[0], TOKENS_FORMAT, "m", 5)

    def said(*ids: int, ended: str) -> list[Any]:
        return [
            {"choices": [{"token_ids": [i], "finish_reason": ended if k == len(ids) - 1 else None}]}
            for k, i in enumerate(ids)
        ]

    assert far._parse_generated_ids(said(5, 6, 2, ended="stop"), (2,), 3).tolist() == [5, 6, 2]
    assert far._parse_generated_ids(said(5, 6, ended="length"), (2,), 2).tolist() == [5, 6]
    for events_, most in (
        (said(5, 6, ended="stop"), 3),
        (said(5, 2, 6, ended="length"), 3),
        (said(5, 6, 7, ended="length"), 2),
        (said(5, ended="abort"), 3),
        (said(5, 10**6, ended="length"), 3),
        ([], 3),
    ):
        with pytest.raises(MalformedResponseError):
            far._parse_generated_ids(events_, (2,), most)


# --- ten thousand malformed rows ---


def honest(
    rng: random.Random, n: int, top: int, width: int
) -> tuple[np.ndarray, RawPromptLogprobs]:
    """Positions of a made-up distribution each: ids, their log-probabilities, the likeliest."""
    ids = [rng.randrange(width) for _ in range(n)]
    positions = RawPromptLogprobs(list(ids), [None], [[]])
    for token in ids[1:]:
        weights = [rng.random() ** 4 for _ in range(width)]
        logs = [math.log(w / sum(weights)) for w in weights]
        likeliest = sorted(range(width), key=lambda i: -logs[i])[:top]
        positions.target_logprobs.append(logs[token])
        positions.top_logprobs.append([(i, logs[i]) for i in likeliest])
    return np.array(ids, np.int32), positions


def spoil(rng: random.Random, ids: np.ndarray, p: RawPromptLogprobs, width: int) -> str:
    """Make one position impossible in one of many ways, and return which."""
    t = rng.randrange(1, len(ids))
    k = rng.randrange(len(p.top_logprobs[t]))
    bad_log = rng.choice(
        [float("nan"), float("inf"), float("-inf"), 0.7, 1e-3, -9999.0, None, "-1.0", True, [], {}]
    )
    bad_id = rng.choice([-1, width, width + 10**6, 2**40, 1.0, "3", None, True, [3]])

    def put(values: list[Any]) -> Callable[[], None]:
        return lambda: p.top_logprobs.__setitem__(t, values)

    ways: dict[str, Callable[[], Any]] = {
        "realised": lambda: p.target_logprobs.__setitem__(t, bad_log),
        "value": lambda: p.top_logprobs[t].__setitem__(k, (p.top_logprobs[t][k][0], bad_log)),
        "id": lambda: p.top_logprobs[t].__setitem__(k, (bad_id, p.top_logprobs[t][k][1])),
        "echo": lambda: p.ids.__setitem__(t, int(p.ids[t]) + rng.choice([-1, 1])),
        "echo kind": lambda: p.ids.__setitem__(
            t, rng.choice([str(p.ids[t]), float(p.ids[t]), None, True])
        ),
        "fewer ids": p.ids.pop,
        "fewer logs": p.target_logprobs.pop,
        "fewer heads": p.top_logprobs.pop,
        "more": lambda: p.target_logprobs.append(-1.0),
        "fewer named": put(p.top_logprobs[t][1:]),
        "none named": put([]),
        "twice": put([p.top_logprobs[t][0], *p.top_logprobs[t][:-1]]),
        "order": put(p.top_logprobs[t][::-1]),
        "mass": put([(i, -0.1) for i, _ in p.top_logprobs[t]]),
        "disagree": lambda: p.target_logprobs.__setitem__(
            t,
            p.top_logprobs[t][0][1] + 0.01
            if p.ids[t] != p.top_logprobs[t][0][0]
            else p.top_logprobs[t][0][1] - 0.1,
        ),
    }
    way = rng.choice(list(ways))
    ways[way]()
    return way


def test_of_ten_thousand_malformed_rows_none_is_taken() -> None:
    rng = random.Random(0)
    width, top, ways = 24, 6, set()
    for _ in range(10_000):
        ids, positions = honest(rng, 3, top, width)
        learn = np.array([False, True, True])
        way = spoil(rng, ids, positions, width)
        ways.add(way)
        with pytest.raises(MalformedResponseError):
            to_sparse_distributions(positions, ids, learn, top, width)
            pytest.fail(f"{way}: {positions}")
    assert len(ways) == 15
    for _ in range(200):  # and of honest ones all
        ids, positions = honest(rng, 4, top, width)
        rows = to_sparse_distributions(
            positions, ids, np.array([False, True, False, True]), top, width
        )
        assert len(rows) == 2
        assert np.allclose(
            rows.target_logprob_N,
            [positions.target_logprobs[1], positions.target_logprobs[3]],
            atol=1e-6,
        )


def test_a_row_that_passes_one_a_little_still_fits_the_cache() -> None:
    """A server of half precision: the codec's rounding may not carry its mass past what training
    takes.
    """
    logs = [math.log(0.6) + 8e-4, math.log(0.3) + 8e-4, math.log(0.1) + 8e-4]
    rows = to_sparse_distributions(
        RawPromptLogprobs(
            [0, 1], [None, logs[1]], [[], [(0, logs[0]), (1, logs[1]), (2, logs[2])]]
        ),
        np.array([0, 1], np.int32),
        np.array([False, True]),
        3,
        8,
    )
    assert 1 - 3 * LOGPROB_STEP_NATS < rows.probs_M.sum() <= 1 + MASS_TOLERANCE
    bins = np.log(rows.probs_M.astype(np.float64)) / -LOGPROB_STEP_NATS
    assert np.allclose(bins, np.rint(bins), atol=1e-3)  # on the codec's grid already


# --- other servers' shapes ---


def test_sglang_streams_all_ids_or_the_new_ones() -> None:
    def event(ids: list[int], count: int, reason: Any = None) -> dict[str, Any]:
        return {
            "output_ids": ids,
            "meta_info": {"completion_tokens": count, "finish_reason": reason},
        }

    end = {"type": "stop", "matched": 2}
    assert SGLANG_FORMAT.join_event_token_ids(
        [event([5], 1), event([5, 6], 2), event([5, 6, 2], 3, end)]
    ) == [5, 6, 2]
    assert SGLANG_FORMAT.join_event_token_ids(
        [event([5], 1), event([6], 2), event([2], 3, end)]
    ) == [5, 6, 2]
    assert (
        SGLANG_FORMAT.parse_finish_reason(event([2], 3, end)),
        SGLANG_FORMAT.parse_finish_reason(event([2], 3)),
    ) == ("stop", "")
    with pytest.raises(MalformedResponseError, match="the server counts 4"):
        SGLANG_FORMAT.join_event_token_ids([event([5], 1), event([6], 4, end)])
    positions = SGLANG_FORMAT.parse_logprobs_response(
        {
            "meta_info": {
                "input_token_logprobs": [[None, 7, None], [-1.0, 8, None]],
                "input_top_logprobs": [None, [[-0.5, 9, None], [-1.0, 8, None]]],
            }
        },
        [7, 8],
        [False, True],
    )
    rows = to_sparse_distributions(
        positions, np.array([7, 8], np.int32), np.array([False, True]), 2, 10
    )
    assert rows.ids_M.tolist() == [8, 9]
    assert SGLANG_FORMAT.build_generate_request("m", [1], [2], 3, Sampling(0.5, 0.9, 4))[
        "sampling_params"
    ] == {
        "max_new_tokens": 3,
        "stop_token_ids": [2],
        "skip_special_tokens": False,
        "temperature": 0.5,
        "top_p": 0.9,
        "sampling_seed": 4,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def test_an_openai_server_that_names_tokens_by_text_is_refused() -> None:
    said = {
        "choices": [
            {
                "logprobs": {
                    "tokens": ["\ufffd", " a"],
                    "token_logprobs": [None, -1.0],
                    "top_logprobs": [None, {" a": -1.0}],
                }
            }
        ]
    }
    with pytest.raises(MalformedResponseError, match="text loses half characters"):
        COMPLETIONS_FORMAT.parse_logprobs_response(said, [1, 2], [False, True])
    with pytest.raises(MalformedResponseError, match="dropped the log-probabilities"):
        COMPLETIONS_FORMAT.parse_logprobs_response(
            {"choices": [{"text": "x"}]}, [1, 2], [False, True]
        )


def test_a_chat_answer_is_put_together_and_half_characters_are_refused() -> None:
    talk = ChatServerEngine(
        HttpClient("http://x", "far"), "m", fingerprints=[ServerFingerprint("m")]
    )

    def read(*deltas: Any, ended: str = "stop", model: str = "m") -> Any:
        said = [{"model": model, "choices": [{"delta": d, "finish_reason": None}]} for d in deltas]
        return talk._parse_stream(
            [*said, {"model": model, "choices": [{"delta": {}, "finish_reason": ended}]}],
            ThinkingEffort.HIGH,
        )[:2]

    assert read({"reasoning_content": "h"}, {"reasoning": "m"}, {"content": "yes"}) == (
        (Thinking("hm"), Text("yes")),
        FinishReason.STOP,
    )
    calls = (
        [{"index": 0, "id": "1", "function": {"name": "f", "arguments": '{"a"'}}],
        [{"index": 0, "function": {"arguments": ": 1}"}}],
    )
    assert read(*({"tool_calls": c} for c in calls), ended="tool_calls") == (
        (ToolCall("f", '{"a": 1}'),),
        FinishReason.STOP,
    )
    assert read({"tool_calls": calls[0]}, ended="tool_calls") == (
        (Text(""),),
        FinishReason.MALFORMED,
    )
    assert read({"content": "long"}, ended="length")[1] is FinishReason.LENGTH
    malformed = read({"content": "x"}, {"content": "\ufffd"}, ended="malformed")
    assert malformed == ((Text("x"),), FinishReason.MALFORMED)
    with pytest.raises(RejectedRequestError, match="half characters"):
        read({"content": "x\ufffd"})
    for broken in (
        lambda: read({"content": "x"}, model="n"),
        lambda: read({"content": "x"}, ended="odd"),
        lambda: read({"content": 3}),
        lambda: read({"tool_calls": [{"index": "0"}]}),
    ):
        with pytest.raises(MalformedResponseError):
            broken()


def test_a_conversation_with_tools_goes_out_in_openais_shape() -> None:
    talk = ChatServerEngine(
        HttpClient("http://x", "far"), "m", Sampling(0.7, 0.9, 3), send_effort=True
    )
    call = Message(Role.ASSISTANT, (Thinking("hidden"), ToolCall("f", '{"a": 1}')))
    body = talk._build_request_body(
        Conversation(
            (
                *Conversation.from_question("q").messages,
                call,
                Message(Role.TOOL, (ToolResult("f", "42"),)),
            ),
            ThinkingEffort.LOW,
            (Tool("f", "d", "{}"),),
        ),
        9,
    )
    assert json.loads(body["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"a": 1}
    assert "hidden" not in json.dumps(body)
    assert body["messages"][2] == {
        "role": "tool",
        "name": "f",
        "tool_call_id": "f",
        "content": "42",
    }
    assert (
        body["max_tokens"],
        body["temperature"],
        body["top_p"],
        body["seed"],
        body["reasoning_effort"],
    ) == (9, 0.7, 0.9, 3, "low")
    assert body["chat_template_kwargs"] == {"enable_thinking": True}
    assert body["tools"][0]["function"]["name"] == "f"


def test_an_array_of_candidates_is_looked_at() -> None:
    def spelled(values: Any) -> str:
        file = io.BytesIO()
        np.save(file, values)
        return base64.b64encode(file.getvalue()).decode()

    padded = np.array([[False, True]])
    assert decode_candidate_logprobs(
        spelled(np.array([[-1.0, -np.inf]], np.float32)), (1, 2), padded
    ).tolist() == [[-1.0, -math.inf]]
    for bad in (
        None,
        "!",
        spelled(np.array([[-1.0]], np.float32)),
        spelled(np.array([[np.nan, 0.0]])),
        spelled(np.array([[0.5, 0.0]])),
        spelled(np.array([["a", "b"]])),
        spelled(np.array([[-9999.0, 0.0]])),
        base64.b64encode(b"\x93NUMPY").decode(),
    ):
        with pytest.raises(MalformedResponseError):
            decode_candidate_logprobs(bad, (1, 2), padded)


# --- vLLM in this process ---


def test_vllm_is_missing_here_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persea.teachers.engines.vllm.find_spec", lambda name: None)
    with pytest.raises(MissingRequirementError, match="vLLM is not installed") as caught:
        load_vllm_engine("m", "", 10, GREEDY)
    assert caught.value.exit_code == 7


def test_vllms_answers_become_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for vLLM's classes: what is asked of them, and how what they say is read."""
    from types import SimpleNamespace as Thing

    seen: list[Any] = []

    class Llm:
        def __init__(self, **settings: Any) -> None:
            seen.append(settings)

        def generate(self, prompts: Any, params: Any, use_tqdm: bool) -> list[Any]:
            seen.append((prompts, params))
            if any(len(p["prompt_token_ids"]) > 8 for p in prompts):
                raise ValueError("the prompt is longer than the model's context")
            logs = [None, {8: Thing(logprob=-1.0), 9: Thing(logprob=-0.5)}]
            return [
                Thing(
                    outputs=[Thing(token_ids=[4, 2])],
                    prompt_token_ids=p["prompt_token_ids"],
                    prompt_logprobs=logs,
                )
                for p in prompts
            ]

    monkeypatch.setattr("persea.teachers.engines.vllm.find_spec", lambda name: True)
    monkeypatch.setattr(
        "persea.teachers.engines.vllm.import_module",
        lambda name: Thing(LLM=Llm, SamplingParams=lambda **k: k),
    )
    far = load_vllm_engine("m", "", 10, GREEDY, num_top_logprobs=2)
    assert isinstance(far, VllmEngine)
    assert (seen[0]["logprobs_mode"], seen[0]["enable_prefix_caching"]) == ("raw_logprobs", False)
    assert [a.tolist() for a in far.generate([np.array([7], np.int32)], (2,), 5)] == [[4, 2]]
    assert seen[1][1]["stop_token_ids"] == [2]
    good, bad = far.compute_sparse_distributions(
        [np.array([7, 8], np.int32), np.array([7, 7], np.int32)], [np.array([False, True])] * 2
    )
    assert isinstance(good, SparseDistributions)
    assert good.ids_M.tolist() == [8, 9]
    assert isinstance(bad, EngineFailure)  # the realised token is not among what was told
    short, long = far.generate([np.array([7], np.int32), np.zeros(9, np.int32)], (2,), 5)
    assert short.tolist() == [4, 2]
    assert long == EngineFailure(
        "vLLM refuses the prompt: the prompt is longer than the model's context"
    )
    load_vllm_engine("m", "", 10, GREEDY, engine_options={"dtype": "float32", "max_logprobs": 5})
    assert (seen[-1]["dtype"], seen[-1]["max_logprobs"]) == ("float32", 5)
    with pytest.raises(RecipeError, match="0 tokens per position"):
        load_vllm_engine("m", "", 10, GREEDY, engine_options={"max_logprobs": 0})
    with pytest.raises(RecipeError, match="persea itself sets model"):
        load_vllm_engine("m", "", 10, GREEDY, engine_options={"model": "n"})


def test_vllm_lists_the_whole_vocabulary_of_every_position() -> None:
    """As vLLM 0.32 does with `flat_logprobs`: lists for all positions, the token itself first."""
    from types import SimpleNamespace as Thing

    rows = torch.log_softmax(torch.tensor([[1.0, 0.0, 2.0, -9.0], [0.5, 1.5, 0.0, -9.0]]), -1)

    class Llm:
        def generate(self, prompts: Any, params: Any, use_tqdm: bool) -> list[Any]:
            assert (params["prompt_logprobs"], params["flat_logprobs"]) == (-1, True)
            ids, logs, starts, ends = [], [], [0], [0]
            for own, row in zip([2, 1], rows.tolist(), strict=True):
                starts.append(len(ids))
                order = [own, *sorted(range(4), key=lambda i, row=row: -row[i])]
                ids += order
                logs += [row[i] for i in order]
                ends.append(len(ids))
            if params["max_tokens"] != 1 or len(prompts[0]["prompt_token_ids"]) > 3:
                raise ValueError("too long")
            flat = Thing(token_ids=ids, logprobs=logs, start_indices=starts, end_indices=ends)
            return [Thing(prompt_logprobs=flat)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "persea.teachers.engines.vllm.import_module",
            lambda name: Thing(SamplingParams=lambda **k: k),
        )
        far = VllmEngine(Llm(), 3, -1)  # the fourth column is padding of the embedding matrix
        assert far.capabilities.has_full_distributions
        ids_T = np.array([0, 2, 1], np.int32)
        (found,) = far.compute_logprobs([ids_T], [np.array([False, True, True])])
        assert torch.allclose(found, torch.log_softmax(rows[:, :3], -1), atol=1e-6)
        (found,) = far.compute_logprobs([ids_T], [np.array([False, False, True])])
        assert torch.allclose(found, torch.log_softmax(rows[1:, :3], -1), atol=1e-6)
        with pytest.raises(TeacherError, match="too long"):
            list(far.compute_logprobs([np.zeros(5, np.int32)], [np.arange(5) > 0]))
        with pytest.raises(TeacherError, match="did not list the whole vocabulary"):
            list(VllmEngine(Llm(), 9, -1).compute_logprobs([ids_T], [np.arange(3) > 0]))


def test_vllms_tensors_are_kept_before_it_makes_python_numbers_of_them() -> None:
    """As vLLM 0.32's front end gets them: rows [T - 1, W + 1], the token itself first."""
    from types import SimpleNamespace as Thing

    rows = torch.log_softmax(torch.tensor([[1.0, 0.0, 2.0, -9.0], [0.5, 1.5, 0.0, -9.0]]), -1)

    class Processor:
        def _update_prompt_logprobs(self, tensors: Any) -> None:
            raise AssertionError("Python numbers were made")

    usual = Processor._update_prompt_logprobs

    class Llm:
        fails = False

        def generate(self, prompts: Any, params: Any, use_tqdm: bool) -> list[Any]:
            assert params["prompt_logprobs"] == -1
            if self.fails:
                raise ValueError("too long")
            for own, row in zip([2, 1], rows, strict=True):  # one chunk of the prompt each
                order = row.argsort(descending=True)
                ids = torch.cat([torch.tensor([own]), order])[None]
                logprobs = torch.cat([row[own, None], row[order]])[None]
                part = Thing(logprob_token_ids=ids, logprobs=logprobs)
                Processor()._update_prompt_logprobs(part)
            return [Thing(prompt_logprobs=[None])]

    modules = {
        "vllm": Thing(SamplingParams=lambda **k: k),
        "vllm.v1.engine.logprobs": Thing(LogprobsProcessor=Processor),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("persea.teachers.engines.vllm.import_module", modules.__getitem__)
        llm = Llm()
        far = VllmEngine(llm, 3, -1)
        ids_T = np.array([0, 2, 1], np.int32)
        for mask in ([False, True, True], [False, False, True]):
            (found,) = far.compute_logprobs([ids_T], [np.array(mask)])
            assert torch.allclose(found, torch.log_softmax(rows[-sum(mask) :, :3], -1), atol=1e-6)
            assert Processor._update_prompt_logprobs is usual
        with pytest.raises(TeacherError, match="returned no distribution"):
            list(far.compute_logprobs([np.zeros(5, np.int32)], [np.arange(5) > 0]))
        llm.fails = True
        with pytest.raises(TeacherError, match="too long"):
            list(far.compute_logprobs([ids_T], [np.arange(3) > 0]))
        assert Processor._update_prompt_logprobs is usual


# --- real servers, where somebody has them ---


@pytest.mark.parametrize(
    ("variable", "dialect"),
    [
        ("PERSEA_VLLM_URL", TOKENS_FORMAT),
        ("PERSEA_VLLM_URL", COMPLETIONS_FORMAT),
        ("PERSEA_SGLANG_URL", SGLANG_FORMAT),
    ],
)
def test_a_real_server_passes_the_handshake(variable: str, dialect: WireFormat) -> None:
    """PERSEA_VLLM_URL or PERSEA_SGLANG_URL: a server of the model whose folder or hub id
    PERSEA_SERVED names.
    """
    url, model = os.environ.get(variable), os.environ.get("PERSEA_SERVED")
    if not url or not model:
        pytest.skip(f"no real server: set {variable} and PERSEA_SERVED (the model it runs)")
    from persea.models.loading import ModelSource, load_renderer

    line = HttpClient(url, "far", RetryPolicy())
    far = TokenServerEngine(
        line,
        load_renderer(ModelSource(model), "served"),
        dialect,
        resolve_served_model(line, ""),
        5,
    )
    assert far.handshake().handshake_logprobs
    answers = far.generate(
        [far.renderer.render_prompt(HANDSHAKE_CONVERSATION).ids_T], far.renderer.stop_ids, 16
    )
    assert not isinstance(answers[0], EngineFailure)


def test_a_real_llama_cpp_has_words_alone() -> None:
    url = os.environ.get("PERSEA_LLAMACPP_URL")
    if not url:
        pytest.skip("no real server: set PERSEA_LLAMACPP_URL to a llama-server")
    line = HttpClient(url, "far", RetryPolicy())
    talk = ChatServerEngine(line, resolve_served_model(line, ""))
    talk.handshake()
    assert talk.chat([Conversation.from_question("Say yes.")], 16)
    assert HANDSHAKE_TEXT


def test_a_refused_prompt_is_an_answer_that_says_why() -> None:
    class Refusing:
        capabilities = FULL_DISTRIBUTIONS

        def generate(self, prompts: Any, stop_ids: Any, most: int) -> list[Any]:
            return [EngineFailure("too long for the server") for _ in prompts]

    teacher = Teacher("far", opened(QWEN)[0], Refusing(), max_answer_tokens=3)  # type: ignore[arg-type]
    (answer,) = teacher.answer([Prompt("p", Conversation.from_question("q"), "code", "en")], 9)
    assert (answer.finish, answer.failure_reason, answer.effort) == (
        FinishReason.REFUSED,
        "too long for the server",
        None,
    )


def test_a_server_is_asked_inside_a_running_event_loop() -> None:
    """A notebook's cells run inside one."""
    url = serving(QWEN)

    async def cell() -> list[Any]:
        line = HttpClient(url, "far", QUICK)
        found = endpoint(url, QWEN)
        return [resolve_served_model(line, ""), *found.generate(asked(QWEN)[:2], (0,), 3)]

    name, *answers = asyncio.run(cell())
    assert name == QWEN and len(answers) == 2
    assert not any(isinstance(a, EngineFailure) for a in answers)


def test_limits_of_failures_and_of_drift_are_settings() -> None:
    one = ServerFingerprint("m", (-1.0, -2.0))
    other = ServerFingerprint("m", (-1.1, -2.1))
    one.refuse_other_model(other, "far", 0.2)
    with pytest.raises(TeacherError, match=r"moved by 0\.10 nats"):
        one.refuse_other_model(other, "far", 0.05)
    patient = HttpClient("http://x", "far", replace(QUICK, max_failed_share=1.0))
    for _ in range(40):
        assert isinstance(patient._record_failure("no"), EngineFailure)
