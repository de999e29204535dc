"""The routes of `persea serve`: OpenAI's chat and completions, vLLM's token route."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from persea.chat.messages import FinishReason
from persea.errors import DataError
from persea.serve.limits import ServerLimits
from persea.serve.logprobs import (
    build_chat_logprobs,
    build_completion_logprobs,
    build_prompt_logprobs,
    encode_candidate_logprobs,
    format_token,
)
from persea.serve.schema import (
    MAX_CHOICES,
    ChatCompletionRequest,
    CompletionRequest,
    TokenizeRequest,
    TokenRequest,
)
from persea.serve.streaming import (
    ServedModel,
    StreamingAnswerParser,
    content_bytes,
    cut_at_stop,
)
from persea.teachers.engines import Sampling

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
        app.get("/v1/models/{name:path}")(self.model)
        app.post("/tokenize")(self.tokenize)
        app.post("/v1/chat/completions")(self.chat)
        app.post("/v1/completions")(self.completions)
        app.post("/inference/v1/generate")(self.generate)

    async def health(self) -> dict[str, str]:
        """Answer that the server runs."""
        return {"status": "ok"}

    async def models(self) -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [await self.model(self.served_model.name)]}

    async def model(self, name: str) -> dict[str, Any]:
        """Describe the model."""
        self._refuse_other_model(name)
        return {
            "id": self.served_model.name,
            "object": "model",
            "created": self.started_at,
            "owned_by": "persea",
            "max_model_len": self.served_model.max_context_tokens or None,
        }

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        """Return the token ids of a text."""
        self._refuse_other_model(body.model)
        ids = await asyncio.to_thread(self.served_model.encode_prompt, body.prompt)
        answer: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": self.served_model.max_context_tokens or None,
            "tokens": ids,
        }
        if body.return_token_strs:
            answer["token_strs"] = [format_token(self.renderer, i, False) for i in ids]
        return answer

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        self._refuse_other_model(body.model)
        conversation = body.to_conversation(self.renderer.family)
        rendered = await asyncio.to_thread(self.renderer.render_prompt, conversation)
        prompt = rendered.ids_T.tolist()
        max_new_tokens = self.served_model.resolve_max_new_tokens(
            prompt,
            body.max_completion_tokens or body.max_tokens,
            DEFAULT_CHAT_TOKENS,
            self.limits.max_new_tokens,
        )
        if body.top_logprobs and not body.logprobs:
            raise DataError(
                "top_logprobs without logprobs", where="top_logprobs", remedy="send logprobs: true"
            )
        self._check_num_logprobs(body.top_logprobs, "top_logprobs")
        samplings = _number_of_samples(body)
        if body.stream and (len(samplings) > 1 or body.logprobs):
            raise DataError(
                "several answers and log-probabilities cannot be streamed",
                where="stream",
                remedy="send stream: false",
            )
        choices, num_tokens = [], 0
        for k, sampling in enumerate(samplings):
            parser = StreamingAnswerParser(
                self.renderer, conversation.effort, conversation.tools, body.stop_texts
            )
            tokens = self.served_model.stream_tokens(
                prompt, self._stop_ids(body.ignore_eos, None), max_new_tokens, sampling
            )
            if body.stream:
                fields = self._response_fields("chat.completion.chunk", "chatcmpl")
                usage = body.stream_options is not None and body.stream_options.include_usage
                return _sse_response(_chat_events(fields, parser, tokens, len(prompt), usage))
            async with aclosing(_until_disconnected(tokens, request)) as generated:
                async for token in generated:
                    parser.add_token(token)
                    if parser.is_stopped:
                        break
            choices.append({"index": k} | await self._chat_choice(body, prompt, parser))
            num_tokens += len(parser.ids)
        return JSONResponse(
            self._response_fields("chat.completion", "chatcmpl")
            | {"choices": choices, "usage": _usage(len(prompt), num_tokens)}
        )

    async def _chat_choice(
        self, body: ChatCompletionRequest, prompt: list[int], parser: StreamingAnswerParser
    ) -> dict[str, Any]:
        """Build the choice of a finished answer, with log-probabilities if they were requested."""
        _, calls, finish_reason = _finish_chat(parser)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": parser.emitted["content"] or (None if calls else ""),
        }
        if parser.emitted["reasoning_content"]:
            message["reasoning_content"] = parser.emitted["reasoning_content"]
        if calls:
            message["tool_calls"] = calls
        choice = {"message": message, "finish_reason": finish_reason, "logprobs": None}
        if body.logprobs:
            rows = await self.served_model.compute_logprobs([*prompt, *parser.ids])
            choice["logprobs"] = {
                "content": await asyncio.to_thread(
                    build_chat_logprobs,
                    self.renderer,
                    parser.ids,
                    rows[len(prompt) - 1 :],
                    body.top_logprobs or 0,
                )
            }
        return choice

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue a text or token ids."""
        self._refuse_other_model(body.model)
        prompts = [
            await asyncio.to_thread(self.served_model.encode_prompt, p) for p in body.prompts
        ]
        self._check_num_logprobs(body.logprobs, "logprobs")
        self._check_num_logprobs(body.prompt_logprobs, "prompt_logprobs")
        limits = [
            self.served_model.resolve_max_new_tokens(
                prompt, body.max_tokens, DEFAULT_COMPLETION_TOKENS, self.limits.max_new_tokens
            )
            for prompt in prompts
        ]
        stop_ids = self._stop_ids(body.ignore_eos, body.stop_token_ids)
        jobs = [
            (*job, s) for job in zip(prompts, limits, strict=True) for s in _number_of_samples(body)
        ]
        if not 0 < len(jobs) <= MAX_CHOICES:
            raise DataError(
                f"{len(jobs)} answers were requested, 1 to {MAX_CHOICES} are possible",
                where="prompt",
                remedy="send several requests",
            )
        if body.stream:
            return self._stream_completion(body, jobs, stop_ids)
        choices, num_tokens = [], 0
        for k, (prompt, max_new_tokens, sampling) in enumerate(jobs):
            tokens = self.served_model.stream_tokens(prompt, stop_ids, max_new_tokens, sampling)
            ids: list[int] = []
            async with aclosing(_until_disconnected(tokens, request)) as generated:
                async for token in generated:
                    ids.append(token)
                    if body.stop_texts and self._has_stop_text(ids, body.stop_texts):
                        break
            choices.append(
                {"index": k} | await self._completion_choice(body, prompt, ids, stop_ids)
            )
            num_tokens += len(ids)
        return JSONResponse(
            self._response_fields("text_completion", "cmpl")
            | {"choices": choices, "usage": _usage(sum(map(len, prompts)), num_tokens)}
        )

    def _stream_completion(
        self,
        body: CompletionRequest,
        jobs: Sequence[tuple[list[int], int, Sampling]],
        stop_ids: tuple[int, ...],
    ) -> Response:
        """Stream the answer to a single prompt."""
        if body.echo or body.logprobs is not None or body.prompt_logprobs is not None:
            raise DataError(
                "echo and log-probabilities cannot be streamed",
                where="stream",
                remedy="send stream: false",
            )
        if len(jobs) > 1:
            raise DataError(
                "several answers cannot be streamed", where="stream", remedy="send stream: false"
            )
        prompt, max_new_tokens, sampling = jobs[0]
        return _sse_response(
            _completion_events(
                self._response_fields("text_completion", "cmpl"),
                self.served_model,
                self.served_model.stream_tokens(prompt, stop_ids, max_new_tokens, sampling),
                stop_ids,
                prompt,
                body.return_token_ids,
                body.stream_options is not None and body.stream_options.include_usage,
                body.stop_texts,
            )
        )

    def _has_stop_text(self, ids: Sequence[int], stop_texts: Sequence[str]) -> bool:
        text = content_bytes(self.renderer, ids).decode(errors="ignore")
        return cut_at_stop(text, stop_texts)[1]

    async def _completion_choice(
        self,
        body: CompletionRequest,
        prompt: list[int],
        ids: list[int],
        stop_ids: tuple[int, ...],
    ) -> dict[str, Any]:
        """Build the choice of a completion, with the log-probabilities that were requested."""
        all_ids = [*prompt, *ids]
        text, is_stopped = content_bytes(self.renderer, ids).decode(errors="replace"), False
        if body.stop_texts and self._has_stop_text(ids, body.stop_texts):
            text, is_stopped = cut_at_stop(text, body.stop_texts)
        if body.echo:
            text = (
                content_bytes(self.renderer, prompt).decode(errors="replace") + text
                if is_stopped
                else content_bytes(self.renderer, all_ids).decode(errors="replace")
            )
        has_ended = is_stopped or (bool(ids) and ids[-1] in stop_ids)
        choice: dict[str, Any] = {
            "logprobs": None,
            "finish_reason": "stop" if has_ended else "length",
            "text": text,
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


def _number_of_samples(body: ChatCompletionRequest | CompletionRequest) -> list[Sampling]:
    """Return the sampling settings of each of the `n` answers; their seeds differ."""
    return [replace(body.sampling, seed=body.sampling.seed + k) for k in range(body.n or 1)]


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
            if parser.is_stopped:
                break
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
    stop_texts: tuple[str, ...] = (),
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield one event per token; a part of a character waits until it is complete.

    So does the end of a text that may be the beginning of a stop text.
    """
    ids: list[int] = []
    sent, is_stopped = "", False
    async with aclosing(token_stream):
        async for token in token_stream:
            ids.append(token)
            raw = content_bytes(served_model.renderer, ids)
            text = (
                raw.decode(errors="ignore")
                if _ends_inside_character(raw)
                else raw.decode(errors="replace")
            )
            if token not in stop_ids:  # at the end, nothing is held back
                text, is_stopped = cut_at_stop(text, stop_texts)
            choice: dict[str, Any] = {
                "index": 0,
                "text": text[len(sent) :],
                "finish_reason": "stop" if token in stop_ids or is_stopped else None,
                "logprobs": None,
            }
            sent = text
            if include_token_ids:
                choice["token_ids"] = [token]
            yield event_fields | {"choices": [choice]}
            if is_stopped:
                break
    if not is_stopped and (not ids or ids[-1] not in stop_ids):
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
