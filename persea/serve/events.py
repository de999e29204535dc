"""The events of streamed answers, in the formats of OpenAI's and vLLM's routes."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from persea.chat.messages import FinishReason
from persea.serve.streaming import (
    ServedModel,
    StreamingAnswerParser,
    content_bytes,
    cut_at_stop,
)

OPENAI_FINISH_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.MALFORMED: "malformed",
}
TOKENS_PER_DISCONNECT_CHECK = 16


def finish_chat(
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


async def chat_events(
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
    text, calls, finish_reason = finish_chat(parser)
    last: dict[str, Any] = dict(text)
    if calls:
        last["tool_calls"] = [call | {"index": k} for k, call in enumerate(calls)]
    yield event(last, finish_reason)
    if include_usage:
        yield fields | {"choices": [], "usage": token_usage(num_prompt_tokens, len(parser.ids))}


def token_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return OpenAI's count of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


async def until_disconnected(
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


async def completion_events(
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
        yield event_fields | {"choices": [], "usage": token_usage(len(prompt), len(ids))}


def _ends_inside_character(raw: bytes) -> bool:
    """Return whether the last character is incomplete."""
    try:
        raw.decode()
    except UnicodeDecodeError as problem:
        return problem.end == len(raw) and problem.reason == "unexpected end of data"
    return False


def sse_response(events: AsyncGenerator[dict[str, Any], None]) -> StreamingResponse:
    """Return a server-sent stream of events that ends with [DONE]."""

    async def lines() -> AsyncIterator[str]:
        async with aclosing(events):
            async for event in events:
                yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(
        lines(), media_type="text/event-stream", headers={"cache-control": "no-cache"}
    )
