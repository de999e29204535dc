"""A teacher behind a chat route: conversations in, words out. Its distributions stay unknown, so it teaches by its words alone."""

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
from persea.errors import TeacherError
from persea.teachers.engines import GREEDY, EngineCapabilities, EngineFailure, Sampling
from persea.teachers.engines.http_client import HttpClient, Request
from persea.teachers.engines.response_validation import (
    MalformedResponseError,
    require_list,
    require_object,
)
from persea.teachers.engines.token_server import ServerFingerprint
from persea.teachers.engines.wire_formats import single_choice

FINISH_BY_SERVER_REASON = {
    "stop": FinishReason.STOP,
    "tool_calls": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "content_filter": FinishReason.REFUSED,
    "malformed": FinishReason.MALFORMED,
}


@dataclass(frozen=True, eq=False)
class ChatServerEngine:
    """See Talker and Namer (rows of kind WORDS).

    dial  whether the effort is sent as `reasoning_effort` and `chat_template_kwargs`; servers that know neither refuse them
    effort  the handshake's
    """

    client: HttpClient
    served_model_name: str
    sampling: Sampling = GREEDY
    send_effort: bool = False
    handshake_effort: ThinkingEffort = ThinkingEffort.NONE
    fingerprints: list[ServerFingerprint] = field(default_factory=list)

    @property
    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(DistributionKind.TEXT_ONLY)

    def handshake(self) -> ServerFingerprint:
        """The handshake: a word is said, and by whom. Raises TeacherError where none is."""
        found = self._compute_fingerprint()
        self.fingerprints.append(found)
        return found

    def verify_same_model(self) -> None:
        """Raises TeacherError where another model answers now."""
        self.fingerprints[0].refuse_other_model(
            self._compute_fingerprint(), f"{self.client.name}, {self.client.url}"
        )

    def _compute_fingerprint(self) -> ServerFingerprint:
        body = self._build_request_body(
            Conversation.from_question("Hi", effort=self.handshake_effort), 1
        ) | {"stream": False}
        try:
            return ServerFingerprint(
                self.client.send(Request("/v1/chat/completions", body, self._parse_model_name))
            )
        except TeacherError as error:
            raise TeacherError(
                f"the handshake failed: {error.message}",
                where=error.where,
                remedy="see docs/engines.md",
            ) from error

    def _parse_model_name(self, response: Any) -> str:
        model = require_object(response, "the answer").get("model")
        if not isinstance(model, str) or not model:
            raise MalformedResponseError("the answer does not say which model gave it")
        require_object(single_choice(response).get("message"), "message")
        return model

    def chat(
        self, conversations: Sequence[Conversation], max_new_tokens: int
    ) -> list[tuple[tuple[ContentPart, ...], FinishReason] | EngineFailure]:
        """See Talker."""
        if not conversations:
            return []
        breaks = self.client.num_lost_connections
        self.verify_same_model()
        jobs = [
            Request(
                "/v1/chat/completions",
                self._build_request_body(c, max_new_tokens)
                | {"stream": True, "stream_options": {"include_usage": True}},
                lambda events, c=c: self._parse_stream(events, c),
                _count_response_tokens,
                _event_has_content,
            )
            for c in conversations
        ]  # type: ignore[misc]
        answers = self.client.send_all(jobs)
        if self.client.num_lost_connections > breaks:
            self.verify_same_model()
        return [a if isinstance(a, EngineFailure) else a[:2] for a in answers]

    def _build_request_body(
        self, conversation: Conversation, max_new_tokens: int
    ) -> dict[str, Any]:
        messages = messages_to_dicts(conversation)
        for said in messages:
            for call in said.get("tool_calls", ()):  # templates take an object, this route its text
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

    def _parse_stream(
        self, events: list[Any], conversation: Conversation
    ) -> tuple[tuple[ContentPart, ...], FinishReason, int]:
        """The answer of a stream: thought, words and calls put together, how it ended, and the tokens it cost."""
        texts = {"reasoning_content": "", "content": ""}
        calls: dict[int, dict[str, str]] = {}
        ended, cost = "", 0
        for event in events:
            known = self.fingerprints[0].model if self.fingerprints else self.served_model_name
            if require_object(event, "an event").get("model") != known:
                raise MalformedResponseError(
                    f"an answer of {event.get('model')!r}, asked was {known!r}"
                )
            usage = event.get("usage")
            if isinstance(usage, dict) and type(usage.get("total_tokens")) is int:
                cost = usage["total_tokens"]
            told = single_choice(event)
            delta = require_object(told.get("delta") or {}, "delta")
            for key, other in (("reasoning_content", "reasoning"), ("content", "content")):
                more = delta.get(key) or delta.get(other) or ""
                if not isinstance(more, str):
                    raise MalformedResponseError(f"{key} is no text")
                texts[key] += more
            for call in require_list(delta.get("tool_calls") or [], "tool_calls"):
                _merge_tool_call_delta(calls, call)
            ended = ended or str(told.get("finish_reason") or "")
        if ended not in FINISH_BY_SERVER_REASON:
            raise MalformedResponseError(f"the answer ended with {ended or 'nothing'!r}")
        if self.client.retry_policy.max_total_tokens and not cost:
            raise MalformedResponseError(
                "the server does not say how many tokens it took, and its endpoint has a budget"
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
        read = tuple(
            ToolCall.from_generated(c["name"], c["arguments"] or "{}")
            for _, c in sorted(calls.items())
        )
        spoken = tuple(c for c in read if c is not None)
        finish = (
            FINISH_BY_SERVER_REASON[ended] if len(spoken) == len(read) else FinishReason.MALFORMED
        )
        return (*parts, *spoken) or (Text(""),), finish, cost

    def generate(
        self, prompts: Sequence[npt.NDArray[np.int32]], stop_ids: Sequence[int], max_new_tokens: int
    ) -> list[npt.NDArray[np.int32] | EngineFailure]:
        """Raises TeacherError: a chat route takes no token ids."""
        raise TeacherError(
            "a chat route takes no token ids", where=self.client.name, remedy="use `say`"
        )

    def compute_logprobs(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[Any]:
        """Raises TeacherError: a chat route tells no distribution of given words."""
        raise TeacherError(
            "log-probabilities are asked of a chat route, which has none of given words",
            where=self.client.name,
            remedy="use a server with prompt log-probabilities: docs/engines.md",
        )

    def compute_sparse_distributions(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[SparseDistributions | EngineFailure]:
        """See Namer."""
        yield from (text_only_distributions(int(learned.sum())) for learned in loss_masks)


def _event_has_content(event: Any) -> bool:
    """Whether an event brings some of the answer; a role alone, or a sign of life, is none."""
    delta = single_choice(event).get("delta")
    return isinstance(delta, dict) and any(
        delta.get(key) for key in ("content", "reasoning_content", "reasoning", "tool_calls")
    )


def _count_response_tokens(answer: tuple[tuple[ContentPart, ...], FinishReason, int]) -> int:
    return answer[2]


def _merge_tool_call_delta(calls_by_index: dict[int, dict[str, str]], delta: Any) -> None:
    """A piece of a call, by its index."""
    delta = require_object(delta, "a tool call")
    index, function = delta.get("index", 0), require_object(delta.get("function") or {}, "function")
    if type(index) is not int:
        raise MalformedResponseError("a tool call without its index")
    call = calls_by_index.setdefault(index, {"name": "", "arguments": ""})
    for key in call:
        more = function.get(key) or ""
        if not isinstance(more, str):
            raise MalformedResponseError(f"a tool call's {key} is no text")
        call[key] += more
