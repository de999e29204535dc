"""Handshakes with recorded behaviour of real servers: what is refused names what helps."""

from __future__ import annotations

import math
import ssl
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from persea.errors import TeacherError
from persea.models.loading import ModelSource
from persea.teachers.engines import EngineOptions, vllm
from persea.teachers.engines.http_client import HttpClient
from tests.saplings.test_saplings import SAPLINGS
from tests.servers import Answer, Script, events, playing
from tests.teachers.engines.test_token_server import QUICK, QWEN, Truth, endpoint, no_sleep
from tests.teachers.engines.test_transformers import opened

# What vLLM 0.32 answers, status 400.
TOO_MANY = "Requested prompt logprobs of 64, which is greater than max allowed: 20"
TOO_LONG = (
    "This model's maximum context length is 16 tokens. However, you requested 1 output tokens and "
    "your prompt contains at least 16 input tokens"
)


def refused(script: Script) -> str:
    with playing(script), pytest.raises(TeacherError, match="the handshake failed") as caught:
        endpoint(script.url, QWEN, manners=replace(QUICK, max_attempts=2), sleep=no_sleep)
    return str(caught.value)


@pytest.mark.parametrize(
    ("message", "remedy"), [(TOO_MANY, "--max-logprobs"), (TOO_LONG, "--max-model-len")]
)
def test_an_option_that_vllm_lacks_is_named(message: str, remedy: str) -> None:
    truth = Truth()

    def says(path: str, body: Any) -> Any:
        if path == "/inference/v1/generate":
            error = f'{{"error": {{"message": "{message}", "code": 400}}}}'
            return Answer(error.encode(), 400)
        return truth(path, body)

    told = refused(Script(says))
    assert message[:40] in told and remedy in told
    assert told.count("->") == 1


def test_certificates_are_read_once_and_only_where_they_are_checked() -> None:
    https, http = (HttpClient(f"{scheme}://x", "far") for scheme in ("HTTPS", "http"))
    assert https._ssl_context.verify_mode == ssl.CERT_REQUIRED and https._ssl_context.check_hostname
    assert https._ssl_context is https._ssl_context
    assert https._ssl_context.cert_store_stats()["x509_ca"] > 0
    assert http._ssl_context.cert_store_stats()["x509_ca"] == 0
    bare = HttpClient("x:8000", "far")  # no scheme: checked, whatever becomes of it
    assert bare._ssl_context.verify_mode == ssl.CERT_REQUIRED


def test_processed_log_probabilities_name_the_mode() -> None:
    """With --logprobs-mode processed_logprobs, top_k leaves -inf, which vLLM writes as -9999."""
    truth = Truth()

    def says(path: str, body: Any) -> Any:
        said = truth(path, body)
        if path == "/inference/v1/generate" and not body.get("stream"):
            cut = {k: dict(v, logprob=-9999.0) for k, v in said["prompt_logprobs"][-1].items()}
            return said | {"prompt_logprobs": [*said["prompt_logprobs"][:-1], cut]}
        return said

    assert "--logprobs-mode raw_logprobs" in refused(Script(says))


UNIFORM = -math.log(1600)  # of the Qwen sapling's vocabulary


def test_a_model_without_its_head_is_refused() -> None:
    """As vLLM 0.32 serves a gpt-oss model with tied embeddings: all logits are equal."""
    truth = Truth()

    def says(path: str, body: Any) -> Any:
        said = truth(path, body)
        if path != "/inference/v1/generate" or body.get("stream"):
            return said
        flat = [
            p and {i: e | {"logprob": UNIFORM} for i, e in p.items()}
            for p in said["prompt_logprobs"]
        ]
        return said | {"prompt_logprobs": flat}

    with playing(Script(says)) as script, pytest.raises(TeacherError, match="same probability"):
        endpoint(script.url, QWEN, manners=QUICK, sleep=no_sleep)


@pytest.mark.parametrize(("logprob", "is_refused"), [(UNIFORM, True), (UNIFORM + 1.0, False)])
def test_vllm_in_this_process_is_tried_when_it_is_opened(
    monkeypatch: pytest.MonkeyPatch, logprob: float, is_refused: bool
) -> None:
    class Llm:
        def __init__(self, **settings: Any) -> None: ...

        def generate(self, prompts: Any, params: Any, use_tqdm: bool) -> list[Any]:
            (ids,) = (p["prompt_token_ids"] for p in prompts)
            entry = SimpleNamespace(logprob=logprob)
            rows = [None, *({i: entry} for i in ids[1:])]
            return [SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=rows)]

    monkeypatch.setattr(vllm, "find_spec", lambda name: True)
    library = SimpleNamespace(LLM=Llm, SamplingParams=lambda **k: k)
    monkeypatch.setattr(vllm, "import_module", lambda name: library)
    source = ModelSource(str(SAPLINGS / QWEN))
    options = EngineOptions("far", opened(QWEN)[0], source=source)
    if is_refused:
        with pytest.raises(TeacherError, match=r"far: .*same probability"):
            vllm.open_engine("vllm", options)
    else:
        assert vllm.open_engine("vllm", options).num_top_logprobs == options.num_top_logprobs


def test_a_proxy_that_drops_ids_from_streams_fails_the_handshake() -> None:
    """litellm 1.108 does so, and passes everything else on."""
    truth = Truth()

    def says(path: str, body: Any) -> Any:
        if path == "/inference/v1/generate" and body.get("stream"):
            return events(
                {"choices": [{"text": "a", "finish_reason": None}]},
                {"choices": [{"text": "", "finish_reason": "stop"}]},
            )
        return truth(path, body)

    assert "0 tokens with finish reason 'stop'" in refused(Script(says))
