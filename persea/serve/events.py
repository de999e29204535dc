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
from persea.serve.streaming import CompletionText, StreamingAnswerParser

REPLACEMENT_CHARACTER = "\ufffd"
OPENAI_FINISH_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.MALFORMED: "malformed",
}


def finish_chat(
    parser: StreamingAnswerParser,
) -> tuple[dict[str, str], list[dict[str, Any]], str]:
    """Return the remaining text, the tool calls and the finish reason in OpenAI's form.

    A malformed answer ends with U+FFFD, as other servers write bytes that are no text: proxies
    replace finish reasons that they do not know by "stop" (litellm 1.108).
    """
    text, tool_calls, finish = parser.finish()
    if finish is FinishReason.MALFORMED:
        text = text | {"content": text.get("content", "") + REPLACEMENT_CHARACTER}
        parser.emitted["content"] += REPLACEMENT_CHARACTER
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
    token_stream: AsyncGenerator[list[int], None],
    num_prompt_tokens: int,
    include_usage: bool,
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the events of a streamed chat answer."""

    def event(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return fields | {"choices": [choice]}

    yield event({"role": "assistant", "content": ""})
    async with aclosing(token_stream):
        async for tokens in token_stream:
            for field, new_text in parser.add_tokens(tokens).items():
                yield event({field: new_text})
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
    token_stream: AsyncGenerator[list[int], None], request: Request
) -> AsyncGenerator[list[int], None]:
    """Yield tokens until the client disconnects."""
    async with aclosing(token_stream):
        async for tokens in token_stream:
            yield tokens
            if await request.is_disconnected():
                return


async def completion_events(
    event_fields: dict[str, Any],
    text: CompletionText,
    token_stream: AsyncGenerator[list[int], None],
    stop_ids: tuple[int, ...],
    num_prompt_tokens: int,
    include_token_ids: bool,
    include_usage: bool,
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield an event for the tokens that come together."""

    def event(new_text: str, ids: list[int], finish_reason: str | None) -> dict[str, Any]:
        choice = {
            "index": 0,
            "text": new_text,
            "finish_reason": finish_reason,
            "logprobs": None,
        }
        return event_fields | {
            "choices": [choice | ({"token_ids": ids} if include_token_ids else {})]
        }

    has_ended = False
    async with aclosing(token_stream):
        async for tokens in token_stream:
            num_sent = len(text.ids)
            new = text.add_tokens(tokens)
            has_ended = text.is_stopped or text.ids[-1] in stop_ids
            if has_ended:
                new += text.finish()
            yield event(new, text.ids[num_sent:], "stop" if has_ended else None)
            if has_ended:
                break
    if not has_ended:
        yield event(text.finish(), [], "length")
    if include_usage:
        yield event_fields | {
            "choices": [],
            "usage": token_usage(num_prompt_tokens, len(text.ids)),
        }


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
