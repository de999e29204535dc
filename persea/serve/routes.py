"""The routes of `persea serve`: OpenAI's chat and completions, vLLM's token route."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from persea.chat.messages import Conversation
from persea.errors import DataError
from persea.serve.constrained import JsonConstraint
from persea.serve.events import (
    chat_events,
    completion_events,
    finish_chat,
    sse_response,
    token_usage,
    until_disconnected,
)
from persea.serve.limits import ServerLimits
from persea.serve.logprobs import (
    build_chat_logprobs,
    build_completion_logprobs,
    build_prompt_logprobs,
    encode_candidate_logprobs,
    format_token,
)
from persea.serve.scheduler import run_together
from persea.serve.schema import (
    MAX_CHOICES,
    ChatCompletionRequest,
    CompletionRequest,
    TokenizeRequest,
    TokenRequest,
)
from persea.serve.streaming import (
    CompletionText,
    ServedModel,
    StreamingAnswerParser,
    content_bytes,
)
from persea.teachers.engines import Sampling

DEFAULT_COMPLETION_TOKENS = 16  # new tokens if a request has no limit, as at OpenAI
DEFAULT_CHAT_TOKENS = 256


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
        ids = await self.served_model.encode_text(body.prompt)
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
        if self.renderer.is_text:
            raise DataError(
                f"{self.served_model.name} has no chat template, so it cannot answer",
                where="/v1/chat/completions",
                remedy="let it continue a text: /v1/completions",
            )
        conversation = body.to_conversation(self.renderer.family)
        prompt = await self.served_model.render_conversation(conversation)
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
        parsers = [
            StreamingAnswerParser(
                self.renderer, conversation.effort, conversation.tools, body.stop_texts
            )
            for _ in samplings
        ]
        stop_ids = self._stop_ids(body.ignore_eos, None)
        streams = [
            self.served_model.stream_tokens(
                prompt,
                stop_ids,
                max_new_tokens,
                sampling,
                await self._constraint(body, conversation),
            )
            for sampling in samplings
        ]
        if body.stream:
            fields = self._response_fields("chat.completion.chunk", "chatcmpl")
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return sse_response(
                chat_events(fields, parsers[0], streams[0], len(prompt), include_usage)
            )
        found = await run_together(
            self._chat_choice(body, prompt, *pair, request)
            for pair in zip(parsers, streams, strict=True)
        )
        choices = [{"index": k} | choice for k, choice in enumerate(found)]
        usage = token_usage(len(prompt), sum(len(parser.ids) for parser in parsers))
        return JSONResponse(
            self._response_fields("chat.completion", "chatcmpl")
            | {"choices": choices, "usage": usage}
        )

    async def _constraint(
        self, body: ChatCompletionRequest, conversation: Conversation
    ) -> JsonConstraint | None:
        """Return the constraint of an answer; None for text."""
        schema = body.response_format.answer_schema if body.response_format else None
        if schema is None:
            return None
        return await asyncio.to_thread(self.served_model.constraints.make, schema, conversation)

    async def _chat_choice(
        self,
        body: ChatCompletionRequest,
        prompt: list[int],
        parser: StreamingAnswerParser,
        token_stream: AsyncGenerator[list[int], None],
        request: Request,
    ) -> dict[str, Any]:
        """Generate a whole answer, with log-probabilities if they were requested."""
        async with aclosing(until_disconnected(token_stream, request)) as generated:
            async for tokens in generated:
                if body.stop_texts:
                    parser.add_tokens(tokens)
                else:
                    parser.ids += tokens
                if parser.is_stopped:
                    break
        _, calls, finish_reason = finish_chat(parser)
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
        prompts = [await self.served_model.encode_text(p) for p in body.prompts]
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
        found = await run_together(
            self._completion_choice(body, *job, stop_ids, request) for job in jobs
        )
        choices = [{"index": k} | choice for k, (choice, _) in enumerate(found)]
        num_tokens = sum(count for _, count in found)
        return JSONResponse(
            self._response_fields("text_completion", "cmpl")
            | {"choices": choices, "usage": token_usage(sum(map(len, prompts)), num_tokens)}
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
        return sse_response(
            completion_events(
                self._response_fields("text_completion", "cmpl"),
                CompletionText(self.renderer, body.stop_texts),
                self.served_model.stream_tokens(prompt, stop_ids, max_new_tokens, sampling),
                stop_ids,
                len(prompt),
                body.return_token_ids,
                body.stream_options is not None and body.stream_options.include_usage,
            )
        )

    async def _completion_choice(
        self,
        body: CompletionRequest,
        prompt: list[int],
        max_new_tokens: int,
        sampling: Sampling,
        stop_ids: tuple[int, ...],
        request: Request,
    ) -> tuple[dict[str, Any], int]:
        """Generate a whole completion, with the log-probabilities that were requested.

        Returns:
            The choice, and its number of tokens.
        """
        stream = self.served_model.stream_tokens(prompt, stop_ids, max_new_tokens, sampling)
        completion = CompletionText(self.renderer, body.stop_texts)
        text = CompletionText(self.renderer).add_tokens(prompt) if body.echo else ""
        async with aclosing(until_disconnected(stream, request)) as generated:
            async for tokens in generated:
                text += completion.add_tokens(tokens)
                if completion.is_stopped:
                    break
        text, ids = text + completion.finish(), completion.ids
        all_ids = [*prompt, *ids]
        if body.echo and not completion.is_stopped:  # a character may begin in the prompt
            text = content_bytes(self.renderer, all_ids).decode(errors="replace")
        has_ended = completion.is_stopped or (bool(ids) and ids[-1] in stop_ids)
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
        return choice, len(ids)

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
            return sse_response(
                completion_events(
                    response,
                    CompletionText(self.renderer),
                    tokens,
                    stop_ids,
                    len(prompt),
                    True,
                    True,
                )
            )
        ids = [i async for new in until_disconnected(tokens, request) for i in new]
        finish_reason = "stop" if ids and ids[-1] in stop_ids else "length"
        response["choices"] = [{"index": 0, "token_ids": ids, "finish_reason": finish_reason}]
        response["usage"] = token_usage(len(prompt), len(ids))
        if has_logprobs:
            logprobs = await self.served_model.compute_logprobs(prompt)
            if params.prompt_logprobs is not None:
                response["prompt_logprobs"] = await asyncio.to_thread(
                    build_prompt_logprobs,
                    self.renderer,
                    prompt,
                    logprobs,
                    params.prompt_logprobs,
                    params.detokenize,
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

    def _stop_ids(self, ignore_eos: bool | None, extra: Sequence[int] | None) -> tuple[int, ...]:
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
