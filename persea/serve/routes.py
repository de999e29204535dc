"""The routes of `persea serve`: OpenAI's chat and completions, vLLM's token route."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from persea.chat.messages import FinishReason
from persea.errors import DataError
from persea.serve.limits import ServerLimits
from persea.serve.logprobs import (
    build_completion_logprobs,
    build_prompt_logprobs,
    encode_candidate_logprobs,
)
from persea.serve.schema import ChatCompletionRequest, CompletionRequest, TokenRequest
from persea.serve.streaming import ServedModel, StreamingAnswerParser, content_bytes

OPENAI_FINISH_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.MALFORMED: "malformed",
}
DEFAULT_COMPLETION_TOKENS = 16  # new tokens if a request has no limit, as at OpenAI
DEFAULT_CHAT_TOKENS = 256
TOKENS_PER_DISCONNECT_CHECK = 16


class Routes:
    """The handlers of all routes, for one model."""

    def __init__(self, served_model: ServedModel, limits: ServerLimits) -> None:
        self.served_model, self.renderer, self.limits = served_model, served_model.renderer, limits
        self.started_at = int(time.time())

    def register(self, app: FastAPI) -> None:
        """Add the routes to an application."""
        app.get("/health")(self.health)
        app.get("/v1/models")(self.models)
        app.post("/v1/chat/completions")(self.chat)
        app.post("/v1/completions")(self.completions)
        app.post("/inference/v1/generate")(self.generate)

    async def health(self) -> dict[str, str]:
        """Answer that the server runs."""
        return {"status": "ok"}

    async def models(self) -> dict[str, Any]:
        """List the one model."""
        return {
            "object": "list",
            "data": [
                {
                    "id": self.served_model.name,
                    "object": "model",
                    "created": self.started_at,
                    "owned_by": "persea",
                    "max_model_len": self.served_model.max_context_tokens or None,
                }
            ],
        }

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        self._refuse_other_model(body.model)
        if self.renderer.is_text:
            raise DataError(
                f"{self.served_model.name} has no chat template, so it cannot answer",
                where="/v1/chat/completions",
                remedy="let it continue a text: /v1/completions",
            )
        conversation = body.to_conversation(self.renderer.family)
        rendered = await asyncio.to_thread(self.renderer.render_prompt, conversation)
        prompt = rendered.ids_T.tolist()
        max_new_tokens = self.served_model.resolve_max_new_tokens(
            prompt,
            body.max_completion_tokens or body.max_tokens,
            DEFAULT_CHAT_TOKENS,
            self.limits.max_new_tokens,
        )
        parser = StreamingAnswerParser(self.renderer, conversation.effort, conversation.tools)
        tokens = self.served_model.stream_tokens(
            prompt, self.renderer.stop_ids, max_new_tokens, body.sampling
        )
        if body.stream:
            fields = self._response_fields("chat.completion.chunk", "chatcmpl")
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return _sse_response(_chat_events(fields, parser, tokens, len(prompt), include_usage))
        async for token in _until_disconnected(tokens, request):
            parser.add_token(token)
        _, calls, finish_reason = _finish_chat(parser)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": parser.emitted["content"] or (None if calls else ""),
        }
        if parser.emitted["reasoning_content"]:
            message["reasoning_content"] = parser.emitted["reasoning_content"]
        if calls:
            message["tool_calls"] = calls
        choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
        return JSONResponse(
            self._response_fields("chat.completion", "chatcmpl")
            | {"choices": [choice], "usage": _usage(len(prompt), len(parser.ids))}
        )

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue a text or token ids."""
        self._refuse_other_model(body.model)
        prompt = await asyncio.to_thread(self.served_model.encode_prompt, body.prompt)
        self._check_num_logprobs(body.logprobs, "logprobs")
        self._check_num_logprobs(body.prompt_logprobs, "prompt_logprobs")
        max_new_tokens = self.served_model.resolve_max_new_tokens(
            prompt, body.max_tokens, DEFAULT_COMPLETION_TOKENS, self.limits.max_new_tokens
        )
        stop_ids = self._stop_ids(body.ignore_eos, body.stop_token_ids)
        tokens = self.served_model.stream_tokens(prompt, stop_ids, max_new_tokens, body.sampling)
        if body.stream:
            if body.echo or body.logprobs is not None or body.prompt_logprobs is not None:
                raise DataError(
                    "echo and log-probabilities cannot be streamed",
                    where="stream",
                    remedy="send stream: false",
                )
            return _sse_response(
                _completion_events(
                    self._response_fields("text_completion", "cmpl"),
                    self.served_model,
                    tokens,
                    stop_ids,
                    prompt,
                    body.return_token_ids,
                    body.stream_options is not None and body.stream_options.include_usage,
                )
            )
        ids = [token async for token in _until_disconnected(tokens, request)]
        choice = await self._completion_choice(body, prompt, ids, stop_ids)
        return JSONResponse(
            self._response_fields("text_completion", "cmpl")
            | {"choices": [choice], "usage": _usage(len(prompt), len(ids))}
        )

    async def _completion_choice(
        self,
        body: CompletionRequest,
        prompt: list[int],
        ids: list[int],
        stop_ids: tuple[int, ...],
    ) -> dict[str, Any]:
        """Build the choice of a completion, with the log-probabilities that were requested."""
        all_ids = [*prompt, *ids]
        text = content_bytes(self.renderer, all_ids if body.echo else ids)
        choice: dict[str, Any] = {
            "index": 0,
            "logprobs": None,
            "finish_reason": "stop" if ids and ids[-1] in stop_ids else "length",
            "text": text.decode(errors="replace"),
        }
        if body.logprobs is not None or body.prompt_logprobs is not None:
            logprobs = await self.served_model.compute_logprobs(all_ids)
            if body.logprobs is not None:
                choice["logprobs"] = await asyncio.to_thread(
                    build_completion_logprobs,
                    self.renderer,
                    all_ids,
                    logprobs,
                    body.logprobs,
                    0 if body.echo else len(prompt),
                    body.return_tokens_as_token_ids,
                )
            if body.prompt_logprobs is not None:
                choice["prompt_logprobs"] = await asyncio.to_thread(
                    build_prompt_logprobs,
                    self.renderer,
                    prompt,
                    logprobs[: len(prompt) - 1],
                    body.prompt_logprobs,
                )
        if body.return_token_ids:
            choice |= {"prompt_token_ids": prompt, "token_ids": ids}
        return choice

    async def generate(self, body: TokenRequest, request: Request) -> Response:
        """Continue token ids, and score them: vLLM's token route."""
        self._refuse_other_model(body.model)
        params = body.sampling_params
        prompt = self.served_model.encode_prompt(body.token_ids)
        self._check_num_logprobs(params.prompt_logprobs, "sampling_params.prompt_logprobs")
        num_candidates = max(map(len, params.prompt_logprob_token_ids or ()), default=0)
        self._check_num_logprobs(num_candidates, "sampling_params.prompt_logprob_token_ids")
        max_new_tokens = self.served_model.resolve_max_new_tokens(
            prompt, params.max_tokens, DEFAULT_COMPLETION_TOKENS, self.limits.max_new_tokens
        )
        stop_ids = self._stop_ids(params.ignore_eos, params.stop_token_ids)
        tokens = self.served_model.stream_tokens(prompt, stop_ids, max_new_tokens, params.sampling)
        response = {
            "request_id": body.request_id or uuid.uuid4().hex,
            "model": self.served_model.name,
            "created": int(time.time()),
            "output_mode": "tokens",
        }
        has_logprobs = not (
            params.prompt_logprobs is None and params.prompt_logprob_token_ids is None
        )
        if body.stream:
            if has_logprobs:
                raise DataError(
                    "log-probabilities cannot be streamed",
                    where="stream",
                    remedy="send stream: false",
                )
            return _sse_response(
                _completion_events(
                    response, self.served_model, tokens, stop_ids, prompt, True, True
                )
            )
        ids = [token async for token in _until_disconnected(tokens, request)]
        finish_reason = "stop" if ids and ids[-1] in stop_ids else "length"
        response["choices"] = [{"index": 0, "token_ids": ids, "finish_reason": finish_reason}]
        response["usage"] = _usage(len(prompt), len(ids))
        if has_logprobs:
            logprobs = await self.served_model.compute_logprobs(prompt)
            if params.prompt_logprobs is not None:
                response["prompt_logprobs"] = await asyncio.to_thread(
                    build_prompt_logprobs, self.renderer, prompt, logprobs, params.prompt_logprobs
                )
            if params.prompt_logprob_token_ids is not None:
                response["prompt_token_id_logprobs"] = encode_candidate_logprobs(
                    logprobs, params.prompt_logprob_token_ids, params.prompt_logprob_start or 0
                )
        if body.return_token_ids:
            response["prompt_token_ids"] = prompt
        return JSONResponse(response)

    def _refuse_other_model(self, model: str | None) -> None:
        if model not in (None, self.served_model.name):
            raise HTTPException(
                404, f"no model {model[:100]!r} here; there is {self.served_model.name!r}"
            )

    def _check_num_logprobs(self, requested: int | None, key: str) -> None:
        if (requested or 0) > self.limits.max_logprobs:
            raise DataError(
                f"{requested} tokens per position were requested, "
                f"the limit is {self.limits.max_logprobs}",
                where=key,
                remedy="request fewer",
            )

    def _stop_ids(self, ignore_eos: bool, extra: Sequence[int] | None) -> tuple[int, ...]:
        return (*(() if ignore_eos else self.renderer.stop_ids), *(extra or ()))

    def _response_fields(self, kind: str, prefix: str) -> dict[str, Any]:
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.served_model.name,
        }


def _finish_chat(
    parser: StreamingAnswerParser,
) -> tuple[dict[str, str], list[dict[str, Any]], str]:
    """Return the remaining text, the tool calls and the finish reason in OpenAI's form."""
    text, tool_calls, finish = parser.finish()
    calls = [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": c.name, "arguments": c.arguments},
        }
        for c in tool_calls
    ]
    return text, calls, "tool_calls" if calls else OPENAI_FINISH_REASONS[finish]


async def _chat_events(
    fields: dict[str, Any],
    parser: StreamingAnswerParser,
    tokens: AsyncGenerator[int, None],
    num_prompt_tokens: int,
    include_usage: bool,
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the events of a streamed chat answer."""

    def event(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return fields | {"choices": [choice]}

    yield event({"role": "assistant", "content": ""})
    async with aclosing(tokens):
        async for token in tokens:
            if delta := parser.add_token(token):
                yield event(dict(delta))
    text, calls, finish_reason = _finish_chat(parser)
    last: dict[str, Any] = dict(text)
    if calls:
        last["tool_calls"] = [call | {"index": k} for k, call in enumerate(calls)]
    yield event(last, finish_reason)
    if include_usage:
        yield fields | {"choices": [], "usage": _usage(num_prompt_tokens, len(parser.ids))}


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


async def _until_disconnected(
    token_stream: AsyncGenerator[int, None], request: Request
) -> AsyncGenerator[int, None]:
    """Yield tokens until the client disconnects."""
    async with aclosing(token_stream):
        count = 0
        async for token in token_stream:
            yield token
            count += 1
            if count % TOKENS_PER_DISCONNECT_CHECK == 0 and await request.is_disconnected():
                return


async def _completion_events(
    event_fields: dict[str, Any],
    served_model: ServedModel,
    token_stream: AsyncGenerator[int, None],
    stop_ids: tuple[int, ...],
    prompt: list[int],
    include_token_ids: bool,
    include_usage: bool,
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield one event per token; a part of a character waits until it is complete."""
    ids: list[int] = []
    sent = ""
    async with aclosing(token_stream):
        async for token in token_stream:
            ids.append(token)
            raw = content_bytes(served_model.renderer, ids)
            text = (
                raw.decode(errors="ignore")
                if _ends_inside_character(raw)
                else raw.decode(errors="replace")
            )
            choice: dict[str, Any] = {
                "index": 0,
                "text": text[len(sent) :],
                "finish_reason": "stop" if token in stop_ids else None,
                "logprobs": None,
            }
            sent = text
            if include_token_ids:
                choice["token_ids"] = [token]
            yield event_fields | {"choices": [choice]}
    if not ids or ids[-1] not in stop_ids:
        rest = content_bytes(served_model.renderer, ids).decode(errors="replace")[len(sent) :]
        yield event_fields | {
            "choices": [
                {"index": 0, "text": rest, "finish_reason": "length", "logprobs": None}
                | ({"token_ids": []} if include_token_ids else {})
            ]
        }
    if include_usage:
        yield event_fields | {"choices": [], "usage": _usage(len(prompt), len(ids))}


def _ends_inside_character(raw: bytes) -> bool:
    """Return whether the last character is incomplete."""
    try:
        raw.decode()
    except UnicodeDecodeError as problem:
        return problem.end == len(raw) and problem.reason == "unexpected end of data"
    return False


def _sse_response(events: AsyncGenerator[dict[str, Any], None]) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        async with aclosing(events):
            async for event in events:
                yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(
        lines(), media_type="text/event-stream", headers={"cache-control": "no-cache"}
    )
