"""Who may ask, and how much: the key, the size of a body, the time it may take, how many requests at once; before any of it is read."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from uvicorn.protocols.http.h11_impl import H11Protocol

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

KEYLESS_PATHS = ("/health",)  # routes without a key
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
    """The most that is allowed.

    body      bytes of one request; all bodies being read at once have BODIES times as many
    seconds   for a request's head, for its body, and for a client to take the next piece of an answer
    at_once   requests answered at once, those that wait for the model included; more get 429
    tokens    new ones of one request
    logprobs  tokens named at a position
    """

    max_body_bytes: int = 8 << 20
    io_timeout_s: float = 20.0
    max_concurrent_requests: int = 32
    max_new_tokens: int = 4096
    max_logprobs: int = 64


MAX_BUFFERED_BODIES = 8
RETRY_AFTER_HEADERS = ((b"retry-after", b"1"),)


def is_loopback(host: str) -> bool:
    """Whether an address, or a Host header, is this machine's own."""
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
    """An error in OpenAI's shape."""
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
    """ASGI: lets through whole requests of those who may ask. key "" = this machine's own, and nobody else."""

    def __init__(self, app: App, api_key: str, limits: ServerLimits) -> None:
        self.app, self.api_key, self.limits = app, api_key.encode(), limits
        self.num_buffered_bytes = self.num_running_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
            await send_error(
                send, 403, "without a key this server answers as localhost alone"
            )  # a page of elsewhere whose name points here
            return
        origin = headers.get(b"origin", b"http://localhost").decode("latin-1")
        if not self.api_key and not is_loopback(origin.partition("://")[2]):
            await send_error(
                send, 403, "without a key this server answers no page of elsewhere"
            )  # which may post here, if not read what comes of it
            return
        body = await self._read_body(
            headers, receive, send
        )  # before it counts as one: a body that never comes holds nobody up
        if body is None:
            return
        if (
            self.num_running_requests >= self.limits.max_concurrent_requests
            and scope["path"] not in KEYLESS_PATHS
        ):
            await send_error(
                send,
                429,
                f"{self.limits.max_concurrent_requests} requests are being answered",
                RETRY_AFTER_HEADERS,
            )
            return
        self.num_running_requests += 1
        try:
            await self.app(scope, _replay_body(body, receive), self._send_with_timeout(send))
        except TimeoutError:  # the client reads too slowly: uvicorn ends the connection where a response ends before its end
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
        """The whole body; None where it was refused, or never came."""
        said = headers.get(b"content-length", b"0")
        if said.isdigit() and int(said) > self.limits.max_body_bytes:
            await send_error(
                send, 413, f"the body is too large: at most {self.limits.max_body_bytes:,} bytes"
            )
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
                    if size > self.limits.max_body_bytes:
                        await send_error(
                            send,
                            413,
                            f"the body is too large: at most {self.limits.max_body_bytes:,} bytes",
                        )
                        return None
                    if (
                        self.num_buffered_bytes > MAX_BUFFERED_BODIES * self.limits.max_body_bytes
                    ):  # asked at every piece: many small beginnings are a flood too
                        await send_error(
                            send,
                            429,
                            f"{MAX_BUFFERED_BODIES * self.limits.max_body_bytes:,} bytes of bodies are being read",
                            RETRY_AFTER_HEADERS,
                        )
                        return None
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            await send_error(
                send, 408, f"the body did not come within {self.limits.io_timeout_s:g} s"
            )
            return None
        finally:
            self.num_buffered_bytes -= size


def _replay_body(body: bytes, receive: Receive) -> Receive:
    told = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def make_timed_protocol(io_timeout_s: float) -> type[H11Protocol]:
    """Uvicorn's protocol with an end to its patience: a head that has not come after so many seconds ends the connection with 408."""

    class Patient(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            if self._timer is None and (self.cycle is None or self.cycle.response_complete):
                self._wait()
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._rest()

        def connection_lost(self, exc: Exception | None) -> None:
            self._rest()
            super().connection_lost(exc)

        def _wait(self) -> None:
            self._timer = self.loop.call_later(io_timeout_s, self._end)

        def _rest(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _end(self) -> None:
            self._timer = None
            if not self.transport.is_closing():
                self.transport.write(
                    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
                )
                self.transport.close()

    return Patient
