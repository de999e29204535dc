"""The routes of `persea serve`: OpenAI's chat and completions, vLLM's token route."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from persea.chat.messages import FinishReason
from persea.errors import (
    DataError,
    MissingRequirementError,
    PerseaError,
    RefusedError,
    TeacherError,
)
from persea.models.loading import load_model, load_renderer, resolve_model_source
from persea.serve.limits import (
    AccessLimitMiddleware,
    ServerLimits,
    error_body,
    is_loopback,
    make_timed_protocol,
)
from persea.serve.logprobs import (
    build_completion_logprobs,
    build_prompt_logprobs,
    encode_candidate_logprobs,
)
from persea.serve.schema import ChatCompletionRequest, CompletionRequest, TokenRequest
from persea.serve.streaming import ServedModel, StreamingAnswerParser, content_bytes
from persea.teachers.engines.transformers import TransformersEngine

OPENAI_FINISH_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.MALFORMED: "malformed",
}
DEFAULT_COMPLETION_TOKENS, DEFAULT_CHAT_TOKENS = (
    16,
    256,
)  # new tokens where a request names none: OpenAI's completions, and chat


def load_served_model(model: str, name: str = "") -> ServedModel:
    """A model folder or hub id, or a run folder: then its student. Raises DataError where there is neither."""
    folder, (source, today) = Path(model).expanduser(), resolve_model_source(model, "serve")
    voice = load_renderer(source, "serve", today)
    weights = load_model(source, voice, "serve")
    context = getattr(weights.config.get_text_config(), "max_position_embeddings", None) or 0
    return ServedModel(
        name or (folder.resolve().name if folder.is_dir() else model),
        voice,
        TransformersEngine(weights, len(voice.vocabulary)),
        context,
    )


def build_app(
    served_model: ServedModel, api_key: str, limits: ServerLimits
) -> AccessLimitMiddleware:
    """The application. key "" = asked from this machine alone."""
    app = FastAPI(title="persea serve", docs_url=None, redoc_url=None, openapi_url=None)

    async def invalid(request: Request, problem: Exception) -> Response:
        found = (
            problem.errors()[0]
            if isinstance(problem, RequestValidationError)
            else {"type": "", "loc": (), "msg": str(problem)}
        )
        where = ".".join(str(k) for k in found["loc"][1:])
        unread = found["type"] == "json_invalid" or not found["loc"][1:]
        status = 400 if unread else 422
        unknown = (
            f"unknown key, or one this server cannot obey: {where}"
            if found["type"] == "extra_forbidden"
            else f"{where}: {found['msg']}"
        )
        return JSONResponse(
            error_body(
                status,
                f"the body is not JSON of this route: {found['msg']}" if unread else unknown,
                where or None,
            ),
            status,
        )

    async def wrong(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, StarletteHTTPException)
        status = (
            problem.status_code
            if problem.status_code in (400, 404)
            else 404
            if problem.status_code == 405
            else 400
        )
        return JSONResponse(
            error_body(
                status,
                f"no such route: {request.method} {request.url.path}"
                if status == 404 and problem.detail in ("Not Found", "Method Not Allowed")
                else str(problem.detail),
            ),
            status,
        )

    async def refused(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, PerseaError)
        status = (
            500 if isinstance(problem, TeacherError) else 400
        )  # weights that give no numbers are no client's fault
        return JSONResponse(
            error_body(status, f"{problem.message} -> {problem.remedy}", problem.where or None),
            status,
        )

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(StarletteHTTPException, wrong)
    app.add_exception_handler(PerseaError, refused)
    register_routes(app, served_model, limits)
    return AccessLimitMiddleware(app, api_key, limits)


def register_routes(app: FastAPI, served_model: ServedModel, limits: ServerLimits) -> None:
    voice = served_model.renderer
    begun = int(time.time())

    def known(model: str | None) -> None:
        if model not in (None, served_model.name):
            raise HTTPException(
                404, f"no model {model[:100]!r} here; there is {served_model.name!r}"
            )

    def capped(top: int | None, key: str) -> int:
        if (top or 0) > limits.max_logprobs:
            raise DataError(
                f"{top} tokens a position are asked, at most {limits.max_logprobs} are named",
                where=key,
                remedy="ask for fewer",
            )
        return top or 0

    def head(kind: str, prefix: str) -> dict[str, Any]:
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": served_model.name,
        }

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [
                {
                    "id": served_model.name,
                    "object": "model",
                    "created": begun,
                    "owned_by": "persea",
                    "max_model_len": served_model.max_context_tokens or None,
                }
            ],
        }

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatCompletionRequest, request: Request) -> Response:
        known(asked.model)
        conversation = asked.to_conversation(voice.family)
        prompt = (await asyncio.to_thread(voice.render_prompt, conversation)).ids_T.tolist()
        most = served_model.resolve_max_new_tokens(
            prompt,
            asked.max_completion_tokens or asked.max_tokens,
            DEFAULT_CHAT_TOKENS,
            limits.max_new_tokens,
        )
        heard = StreamingAnswerParser(voice, conversation.effort, conversation.tools)
        steps = served_model.stream_tokens(prompt, voice.stop_ids, most, asked.sampling)

        def finish() -> tuple[dict[str, str], list[dict[str, Any]], str]:
            more, calls, how = heard.finish()
            spoken = [
                {
                    "id": f"call_{uuid.uuid4().hex[:24]}",
                    "type": "function",
                    "function": {"name": c.name, "arguments": c.arguments},
                }
                for c in calls
            ]
            return more, spoken, "tool_calls" if spoken else OPENAI_FINISH_REASONS[how]

        if asked.stream:
            top, usage = (
                head("chat.completion.chunk", "chatcmpl"),
                asked.stream_options is not None and asked.stream_options.include_usage,
            )

            async def events() -> AsyncGenerator[dict[str, Any], None]:
                yield top | {
                    "choices": [
                        {
                            "index": 0,
                            "delta": {"role": "assistant", "content": ""},
                            "finish_reason": None,
                        }
                    ]
                }
                async with aclosing(steps):
                    async for token in steps:
                        if delta := heard.add_token(token):
                            yield top | {
                                "choices": [{"index": 0, "delta": delta, "finish_reason": None}]
                            }
                more, calls, how = finish()
                last: dict[str, Any] = dict(more)
                if calls:
                    last["tool_calls"] = [call | {"index": k} for k, call in enumerate(calls)]
                yield top | {"choices": [{"index": 0, "delta": last, "finish_reason": how}]}
                if usage:
                    yield top | {"choices": [], "usage": _usage(len(prompt), len(heard.ids))}

            return _sse_response(events())
        async for token in _until_disconnected(steps, request):
            heard.add_token(token)
        _, calls, how = finish()
        message: dict[str, Any] = {
            "role": "assistant",
            "content": heard.emitted["content"] or (None if calls else ""),
        }
        if heard.emitted["reasoning_content"]:
            message["reasoning_content"] = heard.emitted["reasoning_content"]
        if calls:
            message["tool_calls"] = calls
        return JSONResponse(
            head("chat.completion", "chatcmpl")
            | {
                "choices": [
                    {"index": 0, "message": message, "finish_reason": how, "logprobs": None}
                ],
                "usage": _usage(len(prompt), len(heard.ids)),
            }
        )

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        known(asked.model)
        prompt = await asyncio.to_thread(served_model.encode_prompt, asked.prompt)
        top, prompt_top = (
            capped(asked.logprobs, "logprobs"),
            capped(asked.prompt_logprobs, "prompt_logprobs"),
        )
        most = served_model.resolve_max_new_tokens(
            prompt, asked.max_tokens, DEFAULT_COMPLETION_TOKENS, limits.max_new_tokens
        )
        stops = (*(() if asked.ignore_eos else voice.stop_ids), *(asked.stop_token_ids or ()))
        steps = served_model.stream_tokens(prompt, stops, most, asked.sampling)
        if asked.stream:
            if asked.echo or asked.logprobs is not None or asked.prompt_logprobs is not None:
                raise DataError(
                    "echo and log-probabilities do not come as a stream",
                    where="stream",
                    remedy="send stream: false",
                )
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return _sse_response(
                _completion_events(
                    head("text_completion", "cmpl"),
                    served_model,
                    steps,
                    stops,
                    prompt,
                    asked.return_token_ids,
                    usage,
                )
            )
        ids = [token async for token in _until_disconnected(steps, request)]
        whole = [*prompt, *ids]
        choice: dict[str, Any] = {
            "index": 0,
            "logprobs": None,
            "finish_reason": "stop" if ids and ids[-1] in stops else "length",
            "text": content_bytes(voice, whole if asked.echo else ids).decode(errors="replace"),
        }
        if asked.logprobs is not None or asked.prompt_logprobs is not None:
            rows = await served_model.compute_logprobs(whole)
            if asked.logprobs is not None:
                choice["logprobs"] = await asyncio.to_thread(
                    build_completion_logprobs,
                    voice,
                    whole,
                    rows,
                    top,
                    0 if asked.echo else len(prompt),
                    asked.return_tokens_as_token_ids,
                )
            if asked.prompt_logprobs is not None:
                choice["prompt_logprobs"] = await asyncio.to_thread(
                    build_prompt_logprobs, voice, prompt, rows[: len(prompt) - 1], prompt_top
                )
        if asked.return_token_ids:
            choice |= {"prompt_token_ids": prompt, "token_ids": ids}
        return JSONResponse(
            head("text_completion", "cmpl")
            | {"choices": [choice], "usage": _usage(len(prompt), len(ids))}
        )

    @app.post("/inference/v1/generate")
    async def generate(asked: TokenRequest, request: Request) -> Response:
        known(asked.model)
        prompt, params = served_model.encode_prompt(asked.token_ids), asked.sampling_params
        top = capped(params.prompt_logprobs, "sampling_params.prompt_logprobs")
        capped(
            max(map(len, params.prompt_logprob_token_ids or ()), default=0),
            "sampling_params.prompt_logprob_token_ids",
        )
        most = served_model.resolve_max_new_tokens(
            prompt, params.max_tokens, DEFAULT_COMPLETION_TOKENS, limits.max_new_tokens
        )
        stops = (*(() if params.ignore_eos else voice.stop_ids), *(params.stop_token_ids or ()))
        steps = served_model.stream_tokens(prompt, stops, most, params.sampling)
        about = {
            "request_id": asked.request_id or uuid.uuid4().hex,
            "model": served_model.name,
            "created": int(time.time()),
            "output_mode": "tokens",
        }
        scored = params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None
        if asked.stream:
            if scored:
                raise DataError(
                    "log-probabilities do not come as a stream",
                    where="stream",
                    remedy="send stream: false",
                )
            return _sse_response(
                _completion_events(about, served_model, steps, stops, prompt, True, True)
            )
        ids = [token async for token in _until_disconnected(steps, request)]
        about["choices"] = [
            {
                "index": 0,
                "token_ids": ids,
                "finish_reason": "stop" if ids and ids[-1] in stops else "length",
            }
        ]
        about["usage"] = _usage(len(prompt), len(ids))
        if scored:
            rows = await served_model.compute_logprobs(prompt)
            if params.prompt_logprobs is not None:
                about["prompt_logprobs"] = await asyncio.to_thread(
                    build_prompt_logprobs, voice, prompt, rows, top
                )
            if params.prompt_logprob_token_ids is not None:
                about["prompt_token_id_logprobs"] = encode_candidate_logprobs(
                    rows, params.prompt_logprob_token_ids, params.prompt_logprob_start or 0
                )
        if asked.return_token_ids:
            about["prompt_token_ids"] = prompt
        return JSONResponse(about)


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


async def _until_disconnected(
    token_stream: AsyncGenerator[int, None], request: Request
) -> AsyncGenerator[int, None]:
    """Tokens, for as long as somebody waits for them."""
    async with aclosing(token_stream):
        count = 0
        async for token in token_stream:
            yield token
            count += 1
            if count % 16 == 0 and await request.is_disconnected():
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
    """An answer's tokens and characters, one event a token; half a character waits for its other half."""
    ids: list[int] = []
    told = ""
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
                "text": text[len(told) :],
                "finish_reason": "stop" if token in stop_ids else None,
                "logprobs": None,
            }
            told = text
            if include_token_ids:
                choice["token_ids"] = [token]
            yield event_fields | {"choices": [choice]}
    if not ids or ids[-1] not in stop_ids:
        left = content_bytes(served_model.renderer, ids).decode(errors="replace")[len(told) :]
        yield event_fields | {
            "choices": [
                {"index": 0, "text": left, "finish_reason": "length", "logprobs": None}
                | ({"token_ids": []} if include_token_ids else {})
            ]
        }
    if include_usage:
        yield event_fields | {"choices": [], "usage": _usage(len(prompt), len(ids))}


def _ends_inside_character(raw: bytes) -> bool:
    """Whether the last character may still become whole."""
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


def resolve_api_key(host: str, key_env: str) -> str:
    """The key that the environment holds, "" for none. Raises Refused for an address that others reach where none is set."""
    key = os.environ.get(key_env, "").strip()
    if not key and not is_loopback(host):
        raise RefusedError(
            f"{host} is reached from other machines, and {key_env} holds no key",
            where="serve",
            remedy=f"export {key_env}=..., or serve on 127.0.0.1",
        )
    return key


def run_server(
    served_model: ServedModel,
    host: str,
    port: int,
    api_key: str,
    limits: ServerLimits,
    on_ready: Callable[[str], None],
) -> None:
    """Answer until a signal comes. told: where it listens, once it does; port 0 = any free one. key: see `key_for`.

    Raises EnvironmentLacks where the address cannot be had.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as problem:
        raise MissingRequirementError(
            f"cannot listen on {host}:{port}: {problem.strerror}",
            where="serve",
            remedy="choose another --port",
        ) from problem
    config = uvicorn.Config(
        build_app(served_model, api_key, limits),
        http=make_timed_protocol(limits.io_timeout_s),
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=int(limits.io_timeout_s),
        h11_max_incomplete_event_size=1 << 16,
        backlog=2048,
        server_header=False,
    )
    on_ready(f"http://{host if ':' not in host else f'[{host}]'}:{listener.getsockname()[1]}")
    uvicorn.Server(config).run(sockets=[listener])
