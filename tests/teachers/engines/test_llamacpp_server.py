"""llama.cpp's own route, played as b11549 behaves: one entry for a character of several tokens, no
entry for a lone first part of one, log-probabilities that a logit bias does not change.
"""

from __future__ import annotations

import functools
import json
import os
import time
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from persea.chat.messages import Conversation, Text
from persea.errors import TeacherError
from persea.models.loading import ModelSource, load_renderer
from persea.tasks.generated import find_generated_task
from persea.tasks.task import Split
from persea.teachers.engines import EngineFailure, Sampling
from persea.teachers.engines.http_client import HttpClient, Request
from persea.teachers.engines.llamacpp_server import FORCING_LOGIT_BIAS, LlamaCppEngine
from persea.teachers.engines.server import resolve_served_model
from tests.servers import Answer, Script, playing
from tests.teachers.engines.test_token_server import QUICK, no_sleep
from tests.teachers.engines.test_transformers import engine, opened

QWEN = "qwen-sapling"
TOP = 5
PATIENT = replace(QUICK, stall_timeout_s=60)


def is_whole(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return error.reason != "unexpected end of data"
    return True


def entries_of(prompt: list[int], ids: list[int], num_listed: int) -> list[dict[str, Any]]:
    """The entries of generated tokens, as llama.cpp joins them."""
    renderer, _ = opened(QWEN)
    whole = np.array([*prompt, *ids], np.int32)
    mask = np.arange(len(whole)) >= len(prompt)
    (rows,) = engine(QWEN).compute_logprobs([whole], [mask])
    entries, raw = [], b""
    for token, row in zip(ids, rows, strict=True):
        raw += renderer.vocabulary.bytes_W[token] or b""
        if not is_whole(raw):
            continue
        values, top = row.topk(num_listed)
        listed = [
            {"id": i, "logprob": x, "bytes": list(renderer.vocabulary.bytes_W[i] or b"")}
            for i, x in zip(top.tolist(), values.tolist(), strict=True)
        ]
        entries.append(
            {"id": token, "bytes": list(raw), "logprob": float(row[token]), "top_logprobs": listed}
        )
        raw = b""
    return entries


def llamacpp(path: str, body: Any) -> Any:
    return _llamacpp(path, json.dumps(body))


@functools.cache
def _llamacpp(path: str, text: str) -> Any:
    body = json.loads(text)
    renderer, _ = opened(QWEN)
    if path == "/v1/models":
        return {"data": [{"id": "m"}]}
    if path == "/tokenize":
        return {"tokens": renderer.vocabulary.encode(body["content"])}
    assert path == "/completion", path
    prompt, forced = body["prompt"], body.get("logit_bias")
    if forced:
        assert forced[0][1] == FORCING_LOGIT_BIAS
        ids = [forced[0][0]]
    else:
        (answer,) = engine(QWEN).generate(
            [np.array(prompt, np.int32)], renderer.stop_ids, body["n_predict"]
        )
        ids = answer.tolist()
    entries = entries_of(prompt, ids, body["n_probs"])
    stop_type = "eos" if ids[-1] in renderer.stop_ids else "limit"
    if not body["stream"]:
        return {"tokens": ids, "completion_probabilities": entries, "stop_type": stop_type}
    # Characters one by one, with the last token of each: b11549 leaves the others out. No [DONE].
    said, k, raw = [], 0, b""
    for token in ids:
        raw += renderer.vocabulary.bytes_W[token] or b""
        if is_whole(raw):
            event = {"tokens": [token], "completion_probabilities": [entries[k]], "stop": False}
            said.append(event)
            k, raw = k + 1, b""
    said.append({"tokens": [], "stop": True, "stop_type": stop_type})
    return b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in said)


def connected(script: Script, **settings: Any) -> LlamaCppEngine:
    client = HttpClient(script.url, "far", PATIENT, sleep=no_sleep)
    found = LlamaCppEngine(
        client, opened(QWEN)[0], resolve_served_model(client, ""), TOP, **settings
    )
    found.handshake()
    return found


def conversation(text: str) -> Any:
    question = Conversation.from_question("To Chinese: seventy-eight")
    return opened(QWEN)[0].render(question.with_answer(Text(text)))


def test_given_texts_and_half_characters_are_scored_as_the_local_engine_does() -> None:
    tokens = [conversation("七十八 👩‍👧"), conversation("seventy-eight")]
    vocabulary = opened(QWEN)[0].vocabulary
    parts = [
        not is_whole(vocabulary.bytes_W[i] or b"") for t in tokens for i in t.ids_T[t.loss_mask_T]
    ]
    assert any(parts) and not all(parts)
    sequences, masks = [t.ids_T for t in tokens], [t.loss_mask_T for t in tokens]
    with playing(Script(llamacpp)) as script:
        far = connected(script)
        scored = list(far.compute_sparse_distributions(sequences, masks))
    local = engine(QWEN).compute_logprobs(sequences, masks)
    for row, full, ids_T, mask_T in zip(scored, local, sequences, masks, strict=True):
        assert not isinstance(row, EngineFailure)
        full_NW = full.numpy()
        expected_N = full_NW[np.arange(len(full_NW)), ids_T[mask_T]]
        assert np.abs(row.target_logprob_N - expected_N).max() < 1e-4
        ids_NK = row.ids_M.reshape(-1, TOP)
        best_NK = np.sort(np.argsort(-full_NW, 1)[:, :TOP], 1)
        assert (ids_NK == best_NK).all()


def test_own_answers_are_scored_without_another_request() -> None:
    renderer, _ = opened(QWEN)
    prompt = renderer.render_prompt(Conversation.from_question("To Chinese: seventy-eight")).ids_T
    with playing(Script(llamacpp)) as script:
        far = connected(script)
        (answer,) = far.generate([prompt], renderer.stop_ids, 12)
        (expected,) = engine(QWEN).generate([prompt], renderer.stop_ids, 12)
        assert not isinstance(answer, EngineFailure)
        assert answer.tolist() == expected.tolist()
        whole = np.concatenate([prompt, answer])
        mask = np.arange(len(whole)) >= len(prompt)
        script.asked.clear()
        (row,) = far.compute_sparse_distributions([whole], [mask])
        asked = [b for _, path, b in script.asked if path == "/completion"]
    pieces = [renderer.vocabulary.bytes_W[i] or b"" for i in answer]
    fingerprint = len(conversation("x").ids_T)  # scores of the handshake's conversation
    own = [b for b in asked if b["prompt"][: len(prompt)] == prompt.tolist()]
    assert len(own) <= 4 * sum(not is_whole(p) for p in pieces)
    assert fingerprint and not isinstance(row, EngineFailure)
    (full,) = engine(QWEN).compute_logprobs([whole], [mask])
    expected_N = full.numpy()[np.arange(len(full)), answer]
    assert np.abs(row.target_logprob_N - expected_N).max() < 1e-4


def test_tokens_that_a_stream_leaves_out_are_asked_for_again() -> None:
    """An answer whose character has two tokens, whole and cut within the character."""
    renderer, _ = opened(QWEN)
    item = next(
        i
        for i in find_generated_task("languages").items(Split.TEST, 400, 0)
        if i.prompt.id == "languages/quantity/zh/from-english/50-house"
    )
    prompt = renderer.render_prompt(item.prompt.conversation).ids_T
    (expected,) = engine(QWEN).generate([prompt], renderer.stop_ids, 12)
    pieces = [renderer.vocabulary.bytes_W[i] or b"" for i in expected]
    half = next(k for k, p in enumerate(pieces) if not is_whole(p))
    with playing(Script(llamacpp)) as script:
        far = connected(script)
        for new in (12, half + 1):
            script.asked.clear()
            (answer,) = far.generate([prompt], renderer.stop_ids, new)
            assert not isinstance(answer, EngineFailure)
            assert answer.tolist() == expected[:new].tolist()
            own = [b for _, _, b in script.asked if b and b.get("prompt") == prompt.tolist()]
            assert [b["stream"] for b in own] == [True, False]


def test_an_answer_that_is_not_streamed_may_be_silent_as_long_as_its_tokens() -> None:
    """Without a token the watchdog ends an attempt: here after .2 s for each token to come."""

    def slow(path: str, body: Any) -> Any:
        time.sleep(0.6)
        return {"tokens": [1]}

    with playing(Script(slow)) as script:
        policy = replace(QUICK, stall_timeout_s=0.2, max_attempts=1)
        client = HttpClient(script.url, "far", policy, sleep=no_sleep)
        asked = Request("/completion", {"n_predict": 50}, lambda whole: whole["tokens"])
        (stalled,) = client.send_all([asked])
        assert isinstance(stalled, EngineFailure) and "for 0.2 s" in stalled.reason
        assert client.send_all([replace(asked, num_silent_tokens=50)]) == [[1]]
        far = LlamaCppEngine(client, opened(QWEN)[0], "m", TOP)
        again = far._generate_request(np.array([5], np.int32), 50, stream=False)
        assert again.num_silent_tokens == 50


def test_neutral_samplers_are_sent_and_a_server_that_penalises_is_refused() -> None:
    def penalised(path: str, body: Any) -> Any:
        if path == "/completion" and body["stream"] and not body.get("logit_bias"):
            assert (body["top_k"], body["min_p"], body["repeat_penalty"]) == (0, 0.0, 1.0)
            ids = opened(QWEN)[0].vocabulary.encode("zebra")[:1] * body["n_predict"]
            event = {
                "tokens": ids,
                "completion_probabilities": entries_of(body["prompt"], ids, TOP),
            }
            last = {"tokens": [], "stop": True, "stop_type": "limit"}
            return b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in (event, last))
        return llamacpp(path, body)

    with (
        playing(Script(penalised)) as script,
        pytest.raises(TeacherError, match="the server changes how tokens are drawn"),
    ):
        connected(script)
    with (
        playing(Script(llamacpp)) as script,
        pytest.raises(TeacherError, match="the server does not sample"),
    ):
        connected(script, sampling=Sampling(0.7, 1.0, 1))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda said: said | {"completion_probabilities": None}, "log-probabilities are missing"),
        (lambda said: said | {"tokens": [7]}, "was forced"),
        (lambda said: said | {"truncated": True}, "left out a part of the prompt"),
        (lambda said: said | {"tokens": None}, "tokens is missing"),
    ],
)
def test_malformed_scores_are_refused(spoil: Any, why: str) -> None:
    def handler(path: str, body: Any) -> Any:
        said = deepcopy(llamacpp(path, body))
        return spoil(said) if path == "/completion" and not body["stream"] else said

    with playing(Script(handler)) as script, pytest.raises(TeacherError, match=why):
        connected(script)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"logprob": None}, "is not a log-probability"),
        ({"top_logprobs": []}, "no tokens are listed"),
        ({"bytes": [999]}, "are no bytes"),
        ({"bytes": ["x"]}, "are no bytes"),
    ],
)
def test_malformed_answers_are_refused_in_the_handshake(entry: dict[str, Any], why: str) -> None:
    def handler(path: str, body: Any) -> Any:
        said = llamacpp(path, body)
        if path != "/completion" or not body["stream"]:
            return said
        lines = [json.loads(line[6:]) for line in said.split(b"\n\n") if line]
        spoilt = next(e for e in lines if e.get("completion_probabilities"))
        spoilt["completion_probabilities"][0] |= entry
        return b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in lines)

    with playing(Script(handler)) as script, pytest.raises(TeacherError, match=why):
        connected(script)


def test_another_tokenizer_is_refused() -> None:
    def handler(path: str, body: Any) -> Any:
        return {"tokens": [1, 2, 3]} if path == "/tokenize" else llamacpp(path, body)

    with (
        playing(Script(handler)) as script,
        pytest.raises(TeacherError, match=r"the server tokenizes .* to \[1, 2, 3\]"),
    ):
        connected(script)


def test_a_prompt_that_is_too_long_fails_alone() -> None:
    def handler(path: str, body: Any) -> Any:
        if path == "/completion" and len(body["prompt"]) > 60:
            return Answer(b'{"error": {"code": 400, "message": "exceed_context_size"}}', 400)
        return llamacpp(path, body)

    renderer, _ = opened(QWEN)
    short, long = (
        renderer.render_prompt(Conversation.from_question(q)).ids_T for q in ("a", "a b " * 60)
    )
    with playing(Script(handler)) as script:
        far = connected(script)
        good, bad = far.generate([short, long], renderer.stop_ids, 4)
    assert not isinstance(good, EngineFailure)
    assert isinstance(bad, EngineFailure) and "exceed_context_size" in bad.reason


def test_a_real_server_passes_the_handshake() -> None:
    """PERSEA_LLAMACPP_URL: a llama.cpp server of the model whose folder PERSEA_SERVED names."""
    url, model = os.environ.get("PERSEA_LLAMACPP_URL"), os.environ.get("PERSEA_SERVED")
    if not url or not model:
        pytest.skip("no real server: set PERSEA_LLAMACPP_URL and PERSEA_SERVED (its model)")
    client = HttpClient(url, "far")
    renderer = load_renderer(ModelSource(model), "served")
    far = LlamaCppEngine(client, renderer, resolve_served_model(client, ""), 20)
    far.handshake()
    tokens = renderer.render(Conversation.from_question("Thai?").with_answer(Text("สวัสดี 你好")))
    (row,) = far.compute_sparse_distributions([tokens.ids_T], [tokens.loss_mask_T])
    assert not isinstance(row, EngineFailure)
