"""Answers that must follow a JSON schema do, whatever the model would have said."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from persea.chat.messages import Conversation
from persea.errors import DataError, MissingRequirementError
from persea.models.loading import ModelSource, load_renderer
from persea.serve.constrained import ConstraintFactory
from persea.serve.limits import ServerLimits
from persea.serve.server import build_app, load_served_model

SAPLINGS = Path(__file__).resolve().parents[2] / "saplings"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oban", "Đà Nẵng"]}, "tide": {"type": "boolean"}},
    "required": ["city", "tide"],
    "additionalProperties": False,
}
has_llguidance = pytest.mark.skipif(
    find_spec("llguidance") is None, reason="needs llguidance: pip install 'persea[serve]'"
)


def factory(family: str) -> ConstraintFactory:
    return ConstraintFactory(load_renderer(ModelSource(str(SAPLINGS / f"{family}-sapling")), "x"))


@pytest.fixture(scope="module", params=["qwen", "gemma"])
def client(request: pytest.FixtureRequest) -> TestClient:
    served = load_served_model(str(SAPLINGS / f"{request.param}-sapling"))
    return TestClient(build_app(served, "", ServerLimits()), base_url="http://localhost")


def ask(client: TestClient, form: dict[str, Any], **more: Any) -> Any:
    name = client.get("/v1/models").json()["data"][0]["id"]
    messages = [{"role": "user", "content": "Tide?"}]
    body = {"model": name, "messages": messages, "max_tokens": 80, **more}
    return client.post("/v1/chat/completions", json=body | {"response_format": form})


@has_llguidance
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_follow_the_schema(client: TestClient, temperature: float) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "tide", "schema": SCHEMA}}
    for seed in range(3):
        answer = ask(client, form, temperature=temperature, seed=seed).json()
        value = json.loads(answer["choices"][0]["message"]["content"])
        assert value.keys() == {"city", "tide"} and value["city"] in ("Oban", "Đà Nẵng")
        assert isinstance(value["tide"], bool)
        assert answer["choices"][0]["finish_reason"] == "stop"


@has_llguidance
def test_a_free_answer_beside_it_is_not_changed(client: TestClient) -> None:
    options = {"max_tokens": 20, "temperature": 0}
    plain = ask(client, {"type": "text"}, **options).json()["choices"]
    constrained = ask(client, {"type": "json_object"}, **options).json()["choices"]
    again = ask(client, {"type": "text"}, **options).json()["choices"]
    assert plain[0]["message"] == again[0]["message"] != constrained[0]["message"]


@has_llguidance
def test_bad_schemas_and_models_that_begin_otherwise_are_refused(client: TestClient) -> None:
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    answer = ask(client, bad)
    assert answer.status_code == 400 and "no schema" in answer.text
    assert ask(client, {"type": "json_schema"}).status_code == 400
    with pytest.raises(DataError, match="begin with control tokens"):
        factory("gpt-oss").make(SCHEMA, Conversation.from_question("Tide?"))


@pytest.mark.skipif(find_spec("llguidance") is not None, reason="it is installed")
def test_without_llguidance_the_package_is_named() -> None:
    with pytest.raises(MissingRequirementError, match="llguidance"):
        factory("qwen").make(SCHEMA, Conversation.from_question("Tide?"))
