"""Several servers of one teacher: spread by load, left while no token comes, one model in all."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest

from persea.config.model_sections import EndpointSection
from persea.errors import RefusedError, TeacherError
from persea.teachers.engines import EngineFailure
from persea.teachers.engines.chat_server import ChatServerEngine
from persea.teachers.engines.http_client import Request, RetryPolicy
from persea.teachers.engines.server_pool import ServerPool, handshake_all, open_pool
from persea.teachers.engines.token_server import TokenServerEngine
from persea.teachers.engines.wire_formats import TOKENS_FORMAT
from tests.servers import Answer, Script, playing
from tests.teachers.engines.test_token_server import QUICK, QWEN, Truth, asked, is_work
from tests.teachers.engines.test_transformers import engine, opened

PATIENT = replace(QUICK, stall_timeout_s=60.0, give_up_after_s=120.0)  # of a busy machine
TRUTH = Truth()  # its answers are computed once for all servers here
WARM: list[Any] = []
ALIVE = tuple((0.1, b": still here\n\n") for _ in range(80))  # 8 s without a token


@contextmanager
def servers(*scripts: Script, policy: RetryPolicy = PATIENT) -> Iterator[TokenServerEngine]:
    """Return an engine in front of running servers, after their handshakes.

    The policy holds when TRUTH has computed the answers of `generated`: from then on they are fast.
    """
    with ExitStack() as stack:
        urls = [stack.enter_context(playing(script)).url for script in scripts]
        far = pooled(urls)
        handshake_all(far)
        if not WARM:
            WARM.append(generated(far, 30))
        pool = pool_of(far)
        pool.retry_policy = policy
        for server in pool.servers:
            server.client.retry_policy = policy
            server.checker.retry_policy = replace(policy, max_attempts=2, max_total_tokens=0)
        for script in scripts:
            script.asked.clear()
        yield far


def pooled(urls: list[str], policy: RetryPolicy = PATIENT) -> TokenServerEngine:
    return TokenServerEngine(open_pool(urls, "far", policy), opened(QWEN)[0], TOKENS_FORMAT, "m", 5)


def pool_of(far: TokenServerEngine) -> ServerPool:
    assert isinstance(far.client, ServerPool)
    return far.client


def work_of(script: Script) -> int:
    return sum(is_work(path, body) for _, path, body in script.asked)


def generated(far: TokenServerEngine, n: int) -> list[Any]:
    prompts, stops = asked(QWEN, 2), opened(QWEN)[0].stop_ids
    answers = far.generate([prompts[k % len(prompts)] for k in range(n)], stops, 3)
    good = [a.tolist() for a in engine(QWEN).generate(prompts, stops, 3)]
    assert not any(isinstance(a, EngineFailure) for a in answers)
    assert [a.tolist() for a in answers] == [good[k % len(good)] for k in range(n)]
    return answers


def closed_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def shifted(path: str, body: Any) -> Any:
    """Answer as TRUTH, with log-probabilities of another model."""
    answer = TRUTH(path, body)
    if not isinstance(answer, dict) or "prompt_logprobs" not in answer:
        return answer
    lower = [
        place and {t: {"logprob": one["logprob"] - 0.5} for t, one in place.items()}
        for place in answer["prompt_logprobs"]
    ]
    return answer | {"prompt_logprobs": lower}


def test_requests_are_spread_and_come_back_in_order() -> None:
    one, two = Script(TRUTH), Script(TRUTH)
    with servers(one, two) as far:
        assert len(far.fingerprints) == 1
        generated(far, 30)
        assert work_of(one) + work_of(two) == 30
        assert min(work_of(one), work_of(two)) >= 8
        assert all((s.num_requests, s.num_tokens) == (0, 0) for s in pool_of(far).servers)
        rows = list(far.compute_sparse_distributions([asked(QWEN, 1)[0]], [asked(QWEN, 1)[0] > -1]))
        assert len(rows) == 1


def test_load_is_tokens_and_not_requests() -> None:
    """One long request weighs as much as many short ones."""

    def handler(path: str, body: Any) -> Any:
        if body == {"long": True}:
            return Answer(pieces=((0.3, b"{}"),))
        return {}

    one, two = Script(handler), Script(handler)
    with playing(one), playing(two):
        pool = open_pool([one.url, two.url], "far", replace(PATIENT, concurrency=8))
        long = Request("/x", {"long": True}, lambda said: 1, expected_tokens=1000)
        short = [Request("/x", {"n": k}, lambda said: 2, expected_tokens=10) for k in range(7)]
        assert pool.send_all([long, *short]) == [1] + [2] * 7
    assert (len(one.asked), len(two.asked)) == (1, 7)


def test_a_server_without_tokens_is_left_and_rejoins() -> None:
    """The second server answers its health route, but no token comes; then it works again."""
    sick = True

    def fault(n: int, path: str, body: Any) -> Any:
        return Answer(pieces=ALIVE) if sick and is_work(path, body) else None

    one, two = Script(TRUTH), Script(TRUTH)
    policy = replace(QUICK, stall_timeout_s=1.5, concurrency=2)
    with servers(one, two, policy=policy) as far:
        two.fault = fault
        generated(far, 12)
        left = pool_of(far).servers[1]
        assert left.left_because == "no token for 1.5 s"
        stalled = work_of(two)
        assert 2 <= stalled <= 4
        sick = False
        for _ in range(100):
            generated(far, 4)
            if work_of(two) > stalled and not left.left_because:
                break
        assert not left.left_because
        assert work_of(two) > stalled
    assert left.num_checks >= 1


def test_a_dead_server_costs_nothing_but_its_part() -> None:
    """One address never answers; one server goes away in the middle of the work."""
    one, two = Script(TRUTH), Script(TRUTH)
    with playing(one), ExitStack() as stack:
        stack.enter_context(playing(two))
        far = pooled([closed_port(), two.url, one.url])
        handshake_all(far)
        assert [bool(s.left_because) for s in pool_of(far).servers] == [True, False, False]
        assert far.fingerprints[0].model == "m"
        generated(far, 8)
        stack.close()
        generated(far, 8)
        assert [bool(s.left_because) for s in pool_of(far).servers] == [True, True, False]


def test_servers_of_different_models_are_refused() -> None:
    one, two = Script(TRUTH), Script(shifted)
    with playing(one), playing(two), pytest.raises(TeacherError) as caught:
        handshake_all(pooled([one.url, two.url]))
    assert str(caught.value) == (
        f"far, {two.url}: another model than at {one.url}: its log-probabilities moved by 0.50 "
        "nats -> start both with the same weights, precision and options, or delete one of `urls:`"
    )


def test_a_server_that_comes_back_with_another_model_ends_the_run() -> None:
    one, two = Script(TRUTH), Script(TRUTH)
    with servers(one, two) as far:
        pool = pool_of(far)
        pool.leave(pool.servers[1], "it was restarted")
        two.handler = shifted
        pool.servers[1].next_check_at = 0.0
        with pytest.raises(TeacherError, match="another model than at"):
            for _ in range(100):
                generated(far, 4)
        assert work_of(two) == 1  # the handshake's greedy answer; no work of the run


def test_nothing_answers() -> None:
    with pytest.raises(TeacherError, match=r"none of 2 servers answers: http.*urls:"):
        handshake_all(pooled([closed_port(), closed_port()]))
    policy = replace(QUICK, give_up_after_s=0.5, stall_timeout_s=0.3)
    one, two = Script(TRUTH), Script(TRUTH)
    with servers(one, two, policy=policy) as far:
        for script in (one, two):
            script.fault = lambda n, path, body: Answer(pieces=ALIVE)
        with pytest.raises(TeacherError, match=r"none of 2 servers answered for 0\.5 s: http"):
            far.generate(asked(QWEN, 1), opened(QWEN)[0].stop_ids, 3)


def test_faults_of_a_request_are_its_own() -> None:
    """A prompt that every server fails on is left out; both servers stay in use."""
    prompts, stops = asked(QWEN, 2), opened(QWEN)[0].stop_ids
    bad = prompts[3].tolist()

    def fault(n: int, path: str, body: Any) -> Any:
        return Answer(b"crash", 500) if is_work(path, body) and body["token_ids"] == bad else None

    one, two = Script(TRUTH, fault), Script(TRUTH, fault)
    with servers(one, two, policy=replace(PATIENT, max_attempts=2)) as far:
        answers = far.generate(prompts, stops, 2)
        failed = [k for k, a in enumerate(answers) if isinstance(a, EngineFailure)]
        assert failed == [3]
        assert "2 attempts failed, the last: status 500: crash" in answers[3].reason
        assert len(pool_of(far).in_use) == 2


def test_a_busy_server_waits_while_the_other_works() -> None:
    def busy(n: int, path: str, body: Any) -> Any:
        return Answer(b"", 429, (("retry-after", "60"),)) if is_work(path, body) else None

    one, two = Script(TRUTH), Script(TRUTH)
    with servers(one, two, policy=replace(PATIENT, concurrency=1)) as far:
        two.fault = busy
        generated(far, 6)
        assert work_of(two) == 1
        assert work_of(one) == 6
        assert len(pool_of(far).in_use) == 2


def test_a_budget_counts_the_tokens_of_all_servers() -> None:
    one, two = Script(TRUTH), Script(TRUTH)
    with servers(one, two, policy=replace(PATIENT, concurrency=1)) as far:
        before = far.client.num_tokens_used
        assert before > 0
        far.client.retry_policy = replace(PATIENT, concurrency=1, max_total_tokens=before + 300)
        with pytest.raises(RefusedError, match="the token budget is used up"):
            generated(far, 60)
        assert before + 300 <= far.client.num_tokens_used < before + 500
    assert work_of(one)
    assert work_of(two)


def test_chat_servers_pool_too() -> None:
    one, two = Script(TRUTH), Script(TRUTH)
    with playing(one), playing(two):
        far = ChatServerEngine(open_pool([one.url, two.url], "far", PATIENT), "m")
        handshake_all(far)
        assert far.handshake_fields["top_p"] == 1.0
        two.handler = lambda path, body: TRUTH(path, body).replace(b"answer", b"other answer")
        other = ChatServerEngine(open_pool([one.url, two.url], "far", PATIENT), "m")
        with pytest.raises(TeacherError, match="it answers a fixed question in other words"):
            handshake_all(other)


def test_addresses_of_an_endpoint() -> None:
    assert EndpointSection(url="http://a/v1").addresses == ("http://a",)
    assert EndpointSection(urls=("http://a/v1", "http://b/")).addresses == ("http://a", "http://b")
    for wrong in (
        {},
        {"url": "http://a", "urls": ("http://b",)},
        {"urls": ("http://a", "http://a/v1")},
    ):
        with pytest.raises(ValueError, match="contradiction"):
            EndpointSection.model_validate(wrong)
