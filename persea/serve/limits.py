"""Access and limits of `persea serve`, checked before a request is parsed: key, body size,
timeouts, concurrency.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from uvicorn.protocols.http.h11_impl import H11Protocol

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

KEYLESS_PATHS = ("/health",)
ERROR_TYPES_BY_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
}


@dataclass(frozen=True)
class ServerLimits:
    """Limits of requests.

    Attributes:
        max_body_bytes: Bytes of one request body.
        io_timeout_s: Seconds for the head of a request, for its body, and for a client to read the
            next piece of an answer.
        max_concurrent_requests: Requests at once, including those that wait for the model; more get
            status 429.
        max_new_tokens: Generated tokens of one request.
        max_logprobs: Tokens listed per position.
    """

    max_body_bytes: int = 8 << 20
    io_timeout_s: float = 20.0
    max_concurrent_requests: int = 32
    max_new_tokens: int = 4096
    max_logprobs: int = 64


SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
# All bodies that are being read together have at most this many times the limit of one.
MAX_BUFFERED_BODIES = 8
RETRY_AFTER_HEADERS = ((b"retry-after", b"1"),)


def is_loopback(host: str) -> bool:
    """Return whether an address or Host header is this machine itself."""
    name = (
        host.rpartition(":")[0]
        if host.count(":") == 1
        else host.partition("]")[0].lstrip("[")
        if host.startswith("[")
        else host
    )
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    return {
        "error": {
            "message": message,
            "type": ERROR_TYPES_BY_STATUS[status],
            "param": param,
            "code": status,
        }
    }


async def send_error(
    send: Send, status: int, message: str, headers: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    """Send an error in OpenAI's form, and close the connection."""
    body = json.dumps(error_body(status, message)).encode()
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
                *headers,
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})


class AccessLimitMiddleware:
    """ASGI middleware that passes on complete requests of permitted clients.

    Without an API key, only this machine is permitted.
    """

    def __init__(self, app: App, api_key: str, limits: ServerLimits) -> None:
        self.app, self.api_key, self.limits = app, api_key.encode(), limits
        self.num_buffered_bytes = self.num_running_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._handle_request(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _handle_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if (
            scope["path"] not in KEYLESS_PATHS
            and self.api_key
            and not self._has_valid_key(headers.get(b"authorization", b""))
        ):
            await send_error(
                send,
                401,
                "the key is missing or wrong: send `Authorization: Bearer KEY`",
                ((b"www-authenticate", b"Bearer"),),
            )
            return
        if not self.api_key and not is_loopback(
            headers.get(b"host", b"localhost").decode("latin-1")
        ):
            # A web page whose domain name points here (DNS rebinding).
            await send_error(send, 403, "without a key this server only answers to localhost")
            return
        origin = headers.get(b"origin", b"http://localhost").decode("latin-1")
        if not self.api_key and not is_loopback(origin.partition("://")[2]):
            # A foreign web page may post here, even if it cannot read the answer.
            await send_error(send, 403, "without a key this server refuses other sites' pages")
            return
        # Read before it counts as running: a body that never arrives blocks no other request.
        body = await self._read_body(headers, receive, send)
        if body is None:
            return
        if (
            self.num_running_requests >= self.limits.max_concurrent_requests
            and scope["path"] not in KEYLESS_PATHS
        ):
            await send_error(
                send,
                429,
                f"{self.limits.max_concurrent_requests} requests are running",
                RETRY_AFTER_HEADERS,
            )
            return
        self.num_running_requests += 1
        try:
            await self.app(scope, _replay_body(body, receive), self._send_with_timeout(send))
        except TimeoutError:
            # The client reads too slowly; uvicorn closes the connection of an incomplete response.
            return
        finally:
            self.num_running_requests -= 1

    def _send_with_timeout(self, send: Send) -> Send:
        async def sent(message: MutableMapping[str, Any]) -> None:
            async with asyncio.timeout(self.limits.io_timeout_s):
                await send(message)

        return sent

    def _has_valid_key(self, header: bytes) -> bool:
        scheme, _, key = header.partition(b" ")
        return hmac.compare_digest(key.strip(), self.api_key) and scheme.lower() == b"bearer"

    async def _read_body(
        self, headers: MutableMapping[bytes, bytes], receive: Receive, send: Send
    ) -> bytes | None:
        """Read the whole body; None if it was refused or never arrived."""
        max_bytes = self.limits.max_body_bytes
        too_large = f"the body is too large: at most {max_bytes:,} bytes"
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > max_bytes:
            await send_error(send, 413, too_large)
            return None
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.limits.io_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    self.num_buffered_bytes += len(parts[-1])
                    if size > max_bytes:
                        await send_error(send, 413, too_large)
                        return None
                    # Checked for every piece: many incomplete bodies fill the memory too.
                    if self.num_buffered_bytes > MAX_BUFFERED_BODIES * max_bytes:
                        reason = (
                            f"{MAX_BUFFERED_BODIES * max_bytes:,} bytes of bodies are being read"
                        )
                        await send_error(send, 429, reason, RETRY_AFTER_HEADERS)
                        return None
                    if not message.get("more_body", False):
                        return await _refuse_half_characters(b"".join(parts), send)
        except TimeoutError:
            reason = f"the body did not arrive within {self.limits.io_timeout_s:g} s"
            await send_error(send, 408, reason)
            return None
        finally:
            self.num_buffered_bytes -= size


async def _refuse_half_characters(body: bytes, send: Send) -> bytes | None:
    """Return the body; None if a text in it holds half a surrogate pair, which has no bytes.

    Python reads such a text from JSON, and fails wherever the text is first encoded.
    """
    if SURROGATE_ESCAPE.search(body) is None:
        return body
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        await send_error(send, 422, "a text holds half a surrogate pair, which is no character")
        return None
    except (ValueError, RecursionError):
        pass  # not JSON: the application refuses it
    return body


def _replay_body(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that yields a body that was read before."""
    sent = False

    async def receive_again() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def make_timed_protocol(io_timeout_s: float) -> type[H11Protocol]:
    """Return uvicorn's protocol with a timeout: a head that is not complete after `io_timeout_s`
    gets 408.
    """

    class TimedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._start_timer()

        def data_received(self, data: bytes) -> None:
            if self._timer is None and (self.cycle is None or self.cycle.response_complete):
                self._start_timer()
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def _start_timer(self) -> None:
            self._timer = self.loop.call_later(io_timeout_s, self._close)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _close(self) -> None:
            self._timer = None
            if not self.transport.is_closing():
                self.transport.write(
                    b"HTTP/1.1 408 Request Timeout\r\n"
                    b"connection: close\r\ncontent-length: 0\r\n\r\n"
                )
                self.transport.close()

    return TimedProtocol
