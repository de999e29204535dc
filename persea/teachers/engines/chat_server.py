"""Engine for chat routes: conversations in, text out. There are no distributions, so such a teacher
teaches by its text alone.

The handshake asks fixed questions as capture asks prompts: streamed, greedily. It finds out which
sampling fields the server takes, switches off thinking that the recipe does not ask for, and keeps
the digests of the answers, which identify the model.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

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
from persea.storage import digest_json
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
    RejectedRequestError,
    require_list,
    require_object,
)
from persea.teachers.engines.server import (
    HANDSHAKE_TOKENS,
    ServerEngine,
    ServerFingerprint,
    list_served_models,
    resolve_served_model,
)
from persea.teachers.engines.wire_formats import single_choice

FINISH_BY_SERVER_REASON = {
    "stop": FinishReason.STOP,
    "tool_calls": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "content_filter": FinishReason.REFUSED,
    "malformed": FinishReason.MALFORMED,
}
CHAT_PATH = "/v1/chat/completions"
# Parts, how the answer ended, tokens used, name of the model that answered.
_ChatAnswer: TypeAlias = "tuple[tuple[ContentPart, ...], FinishReason, int, str]"
# Questions whose greedy answers identify a model. The first one is asked again before each batch.
HANDSHAKE_QUESTIONS = (
    "Count from one to five in French.",
    "Name the largest ocean, and say why it is called so.",
    "Write a Python function that returns the sum of a list.",
)
# Sampling fields that change nothing, most first: servers apply the defaults of the model's
# generation_config.json (vLLM) or their own (llama.cpp: min_p .05, top_k 40) to fields that are not
# sent, and some refuse those that they do not know. The handshake takes the first set that passes.
NEUTRAL_SAMPLING_FIELDS: tuple[Mapping[str, Any], ...] = (
    {
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    },
    {"top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    {},
)
# Marks around a thought that a server without a reasoning parser leaves in the text.
TEXT_THOUGHT_MARKS = (
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought", "<channel|>"),
)
UNASKED_THOUGHT = "the model thinks unasked"
THINKING_REMEDY = (
    "set the teacher's `effort:` to the effort it thinks at, or switch thinking off at the server"
)


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
        handshake_fields: Fields of every request that the handshake found out.
    """

    client: HttpClient
    served_model_name: str
    sampling: Sampling = GREEDY
    send_effort: bool = False
    handshake_effort: ThinkingEffort = ThinkingEffort.NONE
    fingerprints: list[ServerFingerprint] = field(default_factory=list)
    max_fingerprint_drift: float = 0.0  # fingerprints of this route have no log-probabilities
    handshake_fields: dict[str, Any] = field(default_factory=dict)

    @property
    def capabilities(self) -> EngineCapabilities:
        """Capabilities of this engine."""
        return EngineCapabilities(DistributionKind.TEXT_ONLY, takes_token_ids=False)

    def handshake(self) -> ServerFingerprint:
        """Find out what the server takes, and record its fingerprint.

        Raises:
            TeacherError: The server refuses the questions, thinks unasked, or does not sample where
                a temperature is asked for.
        """
        self.handshake_fields.clear()
        self._choose_sampling_fields()
        if self.handshake_effort is ThinkingEffort.NONE:
            self._switch_off_thinking()
        if self.sampling.temperature:
            draws = self.handshake_samplings(self.sampling)
            requests = [self._handshake_request(HANDSHAKE_QUESTIONS[1], s) for s in draws]
            self.refuse_equal_draws([a[:2] for a in self._send_questions(requests)])
        questions = [self._handshake_request(q) for q in HANDSHAKE_QUESTIONS]
        first, second = self._send_questions(questions), self._send_questions(questions)
        model = first[0][3]
        self._refuse_unknown_model(model)
        fingerprint = ServerFingerprint(model, nonce=uuid.uuid4().hex)
        if [a[:2] for a in first] == [a[:2] for a in second]:
            fingerprint = ServerFingerprint(model, answers=tuple(map(_digest_answer, first)))
        self.fingerprints.append(fingerprint)
        return fingerprint

    def compute_fingerprint(self) -> ServerFingerprint:
        """Ask the first question of the handshake again."""
        expected = self.fingerprints[0].answers[:1] if self.fingerprints else ()
        for _ in range(3):  # a server that computes other requests too may round differently once
            request = self._handshake_request(HANDSHAKE_QUESTIONS[0])
            (answer,) = self._send_questions([request])
            fingerprint = ServerFingerprint(answer[3], answers=(_digest_answer(answer),))
            if fingerprint.answers == expected:
                break
        return fingerprint

    def _choose_sampling_fields(self) -> None:
        """Take the largest set of neutral sampling fields that the server accepts."""
        failure = ""
        for fields in NEUTRAL_SAMPLING_FIELDS:
            self.handshake_fields.update(fields)
            answer = self.client.probe(self._handshake_request(HANDSHAKE_QUESTIONS[0]))
            if not isinstance(answer, EngineFailure) or answer.reason.startswith(UNASKED_THOUGHT):
                return
            self.handshake_fields.clear()
            failure = answer.reason
            if not failure.startswith(("status 400", "status 422")):
                break
        self.refuse_handshake(f"the handshake failed: {failure}", "see docs/engines.md")

    def _switch_off_thinking(self) -> None:
        """Switch off thinking at the server if it thinks unasked.

        Raises:
            TeacherError: It still thinks.
        """
        first = self.client.probe(self._handshake_request(HANDSHAKE_QUESTIONS[0]))
        if not isinstance(first, EngineFailure):
            return
        if first.reason.startswith(UNASKED_THOUGHT):
            self.handshake_fields["chat_template_kwargs"] = {"enable_thinking": False}
            again = self.client.probe(self._handshake_request(HANDSHAKE_QUESTIONS[0]))
            if not isinstance(again, EngineFailure):
                return
        self.refuse_handshake(f"the handshake failed: {first.reason}", THINKING_REMEDY)

    def _handshake_request(
        self, question: str, sampling: Sampling = GREEDY
    ) -> Request[_ChatAnswer]:
        conversation = Conversation.from_question(question, effort=self.handshake_effort)
        return replace(self, sampling=sampling)._build_request(
            conversation, HANDSHAKE_TOKENS, any_model=True
        )

    def _send_questions(self, requests: Sequence[Request[_ChatAnswer]]) -> list[_ChatAnswer]:
        return self.send_handshakes(requests, "see docs/engines.md")

    def _refuse_unknown_model(self, answering_model: str) -> None:
        """Check a name that the server may ignore: llama.cpp takes any name.

        Services without a list of models, and aliases that are listed, pass.
        """
        if answering_model == self.served_model_name:
            return
        try:
            models = list_served_models(self.client)
        except TeacherError:  # no such list: only the answer names a model
            return
        if models and self.served_model_name not in models:
            self.refuse_handshake(
                f"the server has {', '.join(models[:5])}, not {self.served_model_name}; "
                f"{answering_model} answered",
                "name one of them as `served_model_name:` of the endpoint",
            )

    def chat(
        self, conversations: Sequence[Conversation], max_new_tokens: int
    ) -> list[tuple[tuple[ContentPart, ...], FinishReason] | EngineFailure]:
        """Answer one conversation each. See Engine."""
        answers = self.send_verified(
            [self._build_request(c, max_new_tokens) for c in conversations]
        )
        return [a if isinstance(a, EngineFailure) else a[:2] for a in answers]

    def _build_request(
        self, conversation: Conversation, max_new_tokens: int, any_model: bool = False
    ) -> Request[_ChatAnswer]:
        """Build a streamed request; its answer is (parts, finish reason, tokens used, model)."""
        return Request(
            CHAT_PATH,
            self._build_request_body(conversation, max_new_tokens)
            | {"stream": True, "stream_options": {"include_usage": True}},
            lambda events: self._parse_stream(events, conversation.effort, any_model),
            _count_response_tokens,
            _event_has_content,
            _event_is_final,
            8 * max_new_tokens + 64,  # some services send a token in several events
            max_new_tokens,
        )

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
            **self.handshake_fields,
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
        self, events: list[Any], effort: ThinkingEffort, any_model: bool = False
    ) -> _ChatAnswer:
        """Join the events of a stream: content parts, finish reason, tokens used, model.

        Args:
            events: The events.
            effort: Thinking effort of the question. At NONE a thought is refused: the student
                would learn an answer that follows from a thought it does not see.
            any_model: Whether the first event decides which model answers, as in a handshake.
        """
        expected_model = self.fingerprints[0].model if self.fingerprints else self.served_model_name
        texts = {"reasoning_content": "", "content": ""}
        calls: dict[int, dict[str, str]] = {}
        finish_reason, num_tokens = "", 0
        for k, event in enumerate(events):
            model = require_object(event, "an event").get("model")
            if any_model and k == 0 and isinstance(model, str) and model:
                expected_model = model
            if model != expected_model:
                raise MalformedResponseError(
                    f"{model!r} answered, {expected_model!r} was requested"
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
        if FINISH_BY_SERVER_REASON[finish_reason] is FinishReason.MALFORMED:  # `persea serve`
            texts["content"] = texts["content"].removesuffix("\ufffd")
        if "\ufffd" in texts["content"] + texts["reasoning_content"]:
            raise RejectedRequestError(
                "half characters: the model wrote bytes that are no text, or the server decodes "
                "token by token"
            )
        thinking, text = _separate_thought(texts["reasoning_content"], texts["content"])
        if thinking and effort is ThinkingEffort.NONE:
            raise RejectedRequestError(
                f"{UNASKED_THOUGHT}: {thinking[:40]!r}... came at effort none"
            )
        parts = tuple(make(t) for make, t in ((Thinking, thinking), (Text, text)) if t)
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
        return (*parts, *tool_calls) or (Text(""),), finish, num_tokens, expected_model

    def compute_sparse_distributions(
        self,
        sequences: Sequence[npt.NDArray[np.int32]],
        loss_masks: Sequence[npt.NDArray[np.bool_]],
    ) -> Iterator[SparseDistributions | EngineFailure]:
        """Return rows of kind TEXT_ONLY: the route scores no given text. See Engine."""
        yield from (text_only_distributions(int(mask_T.sum())) for mask_T in loss_masks)


def _separate_thought(reasoning: str, content: str) -> tuple[str, str]:
    """Return (thought, text) without the line breaks that the template puts around them.

    A server without a reasoning parser leaves the thought in the text. Where its template opens the
    thought in the prompt, only the closing mark is there.
    """
    if not reasoning:
        for opening, closing in TEXT_THOUGHT_MARKS:
            start = content.lstrip().removeprefix(opening)
            is_open = len(start) < len(content.lstrip())
            if is_open or closing in content:
                reasoning, _, content = start.partition(closing)
                break
    thought = reasoning.strip("\n")
    return thought, content.lstrip("\n") if reasoning else content


def _digest_answer(answer: _ChatAnswer) -> str:
    """Return the digest of what a model wrote."""
    parts = [[type(part).__name__, str(part)] for part in answer[0]]
    return digest_json([parts, answer[1].value])[:16]


def _event_is_final(event: Any) -> bool:
    return bool(single_choice(event).get("finish_reason"))


def _event_has_content(event: Any) -> bool:
    """Whether an event holds a part of the answer; a role or a keep-alive does not count."""
    delta = single_choice(event).get("delta")
    return isinstance(delta, dict) and any(
        delta.get(key) for key in ("content", "reasoning_content", "reasoning", "tool_calls")
    )


def _count_response_tokens(answer: _ChatAnswer) -> int:
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
