"""Engine for chat routes: conversations in, text out. There are no distributions, so such a teacher
teaches by its text alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from persea.chat.families.tool_format import messages_to_dicts, tools_to_json_schema
from persea.chat.messages import (
    ContentPart,
    Conversation,
    FinishReason,
    Text,
    Thinking,
    ThinkingEffort,
    ToolCall,
)
from persea.distributions import DistributionKind, SparseDistributions, text_only_distributions
from persea.teachers.engines import (
    GREEDY,
    EngineCapabilities,
    EngineFailure,
    EngineOptions,
    Sampling,
)
from persea.teachers.engines.http_client import HttpClient, Request
from persea.teachers.engines.response_validation import (
    MalformedResponseError,
    require_list,
    require_object,
)
from persea.teachers.engines.server import ServerEngine, ServerFingerprint, resolve_served_model
from persea.teachers.engines.wire_formats import single_choice

FINISH_BY_SERVER_REASON = {
    "stop": FinishReason.STOP,
    "tool_calls": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "content_filter": FinishReason.REFUSED,
    "malformed": FinishReason.MALFORMED,
}
CHAT_PATH = "/v1/chat/completions"


@dataclass(frozen=True, eq=False)
class ChatServerEngine(ServerEngine):
    """A server with OpenAI's chat route.

    Attributes:
        client: Connection to the server.
        served_model_name: Name of the model at the server.
        sampling: How answers are drawn.
        send_effort: Whether the thinking effort is sent, as `reasoning_effort` and
            `chat_template_kwargs`. Servers that know neither key refuse the request.
        handshake_effort: Thinking effort of the handshake.
        fingerprints: See ServerEngine.
    """

    client: HttpClient
    served_model_name: str
    sampling: Sampling = GREEDY
    send_effort: bool = False
    handshake_effort: ThinkingEffort = ThinkingEffort.NONE
    fingerprints: list[ServerFingerprint] = field(default_factory=list)
    max_fingerprint_drift: float = 0.0  # fingerprints of this route have no log-probabilities

    @property
    def capabilities(self) -> EngineCapabilities:
        """Capabilities of this engine."""
        return EngineCapabilities(DistributionKind.TEXT_ONLY, takes_token_ids=False)

    def compute_fingerprint(self) -> ServerFingerprint:
        """Generate one token, and return the name of the model that did."""
        question = Conversation.from_question("Hi", effort=self.handshake_effort)
        body = self._build_request_body(question, 1) | {"stream": False}
        request = Request(CHAT_PATH, body, _parse_model_name)
        return ServerFingerprint(self.send_handshake(request, "see docs/engines.md"))

    def chat(
        self, conversations: Sequence[Conversation], max_new_tokens: int
    ) -> list[tuple[tuple[ContentPart, ...], FinishReason] | EngineFailure]:
        """Answer one conversation each. See Engine."""
        requests = [
            Request(
                CHAT_PATH,
                self._build_request_body(conversation, max_new_tokens)
                | {"stream": True, "stream_options": {"include_usage": True}},
                self._parse_stream,
                _count_response_tokens,
                _event_has_content,
            )
            for conversation in conversations
        ]
        answers = self.send_verified(requests)
        return [a if isinstance(a, EngineFailure) else a[:2] for a in answers]

    def _build_request_body(
        self, conversation: Conversation, max_new_tokens: int
    ) -> dict[str, Any]:
        messages = messages_to_dicts(conversation)
        for message in messages:
            for call in message.get("tool_calls", ()):  # templates take an object, this route text
                call["function"]["arguments"] = json.dumps(
                    call["function"]["arguments"], ensure_ascii=False
                )
        body: dict[str, Any] = {
            "model": self.served_model_name,
            "messages": messages,
            "max_tokens": max_new_tokens,
            "temperature": self.sampling.temperature,
        }
        if self.sampling.temperature:
            body |= {"top_p": self.sampling.top_p, "seed": self.sampling.seed}
        if conversation.tools:
            body["tools"] = tools_to_json_schema(conversation.tools)
        if self.send_effort:
            body["chat_template_kwargs"] = {
                "enable_thinking": conversation.effort is not ThinkingEffort.NONE
            }
            if conversation.effort is not ThinkingEffort.NONE:
                body["reasoning_effort"] = conversation.effort.value
        return body

    def _parse_stream(self, events: list[Any]) -> tuple[tuple[ContentPart, ...], FinishReason, int]:
        """Join the events of a stream: content parts, finish reason, tokens used."""
        expected_model = self.fingerprints[0].model if self.fingerprints else self.served_model_name
        texts = {"reasoning_content": "", "content": ""}
        calls: dict[int, dict[str, str]] = {}
        finish_reason, num_tokens = "", 0
        for event in events:
            if require_object(event, "an event").get("model") != expected_model:
                raise MalformedResponseError(
                    f"{event.get('model')!r} answered, {expected_model!r} was requested"
                )
            usage = event.get("usage")
            if isinstance(usage, dict) and type(usage.get("total_tokens")) is int:
                num_tokens = usage["total_tokens"]
            choice = single_choice(event)
            _merge_delta(texts, calls, require_object(choice.get("delta") or {}, "delta"))
            finish_reason = finish_reason or str(choice.get("finish_reason") or "")
        if finish_reason not in FINISH_BY_SERVER_REASON:
            raise MalformedResponseError(f"unknown finish reason {finish_reason or None!r}")
        if self.client.retry_policy.max_total_tokens and not num_tokens:
            raise MalformedResponseError(
                "the server does not report how many tokens it used, and its endpoint has a budget"
            )
        if "\ufffd" in texts["content"] + texts["reasoning_content"]:
            raise MalformedResponseError(
                "half characters: the server decodes token by token, and bytes are lost"
            )
        parts = tuple(
            make(texts[key])
            for key, make in (("reasoning_content", Thinking), ("content", Text))
            if texts[key]
        )
        parsed = [
            ToolCall.from_generated(c["name"], c["arguments"] or "{}")
            for _, c in sorted(calls.items())
        ]
        tool_calls = tuple(c for c in parsed if c is not None)
        finish = (
            FINISH_BY_SERVER_REASON[finish_reason]
            if len(tool_calls) == len(parsed)
            else FinishReason.MALFORMED
        )
        return (*parts, *tool_calls) or (Text(""),), finish, num_tokens

    def compute_sparse_distributions(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[SparseDistributions | EngineFailure]:
        """Return rows of kind TEXT_ONLY: the route scores no given text. See Engine."""
        yield from (text_only_distributions(int(mask_T.sum())) for mask_T in loss_masks)


def _parse_model_name(response: Any) -> str:
    model = require_object(response, "the answer").get("model")
    if not isinstance(model, str) or not model:
        raise MalformedResponseError("the answer does not name the model that generated it")
    require_object(single_choice(response).get("message"), "message")
    return model


def _event_has_content(event: Any) -> bool:
    """Whether an event holds a part of the answer; a role or a keep-alive does not count."""
    delta = single_choice(event).get("delta")
    return isinstance(delta, dict) and any(
        delta.get(key) for key in ("content", "reasoning_content", "reasoning", "tool_calls")
    )


def _count_response_tokens(answer: tuple[tuple[ContentPart, ...], FinishReason, int]) -> int:
    return answer[2]


def _merge_delta(
    texts: dict[str, str], calls: dict[int, dict[str, str]], delta: dict[str, Any]
) -> None:
    """Add an event's delta to the collected texts and tool calls."""
    for key, alias in (("reasoning_content", "reasoning"), ("content", "content")):
        text = delta.get(key) or delta.get(alias) or ""
        if not isinstance(text, str):
            raise MalformedResponseError(f"{key} is not a string")
        texts[key] += text
    for call in require_list(delta.get("tool_calls") or [], "tool_calls"):
        _merge_tool_call_delta(calls, call)


def _merge_tool_call_delta(calls_by_index: dict[int, dict[str, str]], delta: Any) -> None:
    """Add a piece of a tool call to the call with its index."""
    delta = require_object(delta, "a tool call")
    index, function = delta.get("index", 0), require_object(delta.get("function") or {}, "function")
    if type(index) is not int:
        raise MalformedResponseError("a tool call without its index")
    call = calls_by_index.setdefault(index, {"name": "", "arguments": ""})
    for key in call:
        text = function.get(key) or ""
        if not isinstance(text, str):
            raise MalformedResponseError(f"the {key} of a tool call is not a string")
        call[key] += text


def open_engine(name: str, options: EngineOptions) -> ChatServerEngine:
    """Connect to a chat route. See EngineSpec.

    With a given model name the list of models is not requested: many services have none.
    """
    assert options.client is not None
    return ChatServerEngine(
        options.client,
        options.served_model_name or resolve_served_model(options.client, ""),
        options.sampling,
        options.send_effort,
        options.handshake_effort,
    )
