"""Servers for tests on real sockets: `persea serve` in its own process, and a scripted faulty
server."""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx2
import uvicorn

from persea import cli
from tests.cli.test_cli import warm

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Served:
    url: str
    process: BaseProcess


def _enter(arguments: tuple[str, ...], log_path: str, variables: dict[str, str]) -> None:
    """Run the command line's entry point in the child, with its output in a file."""
    os.environ |= variables
    descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["persea", *arguments]
    cli.main()


def start_serve(model: Path, *options: str, **variables: str) -> Served:
    """Start `persea serve` on a free port in its own process; the caller ends it."""
    log_path = Path(tempfile.mkdtemp()) / "said"
    arguments = ("serve", str(model), "--port", "0", "--threads", "1", *options)
    process = warm().Process(target=_enter, args=(arguments, str(log_path), variables), daemon=True)
    process.start()
    until = time.monotonic() + 120
    while time.monotonic() < until:
        line = (
            next((row for row in log_path.read_text().splitlines() if " listens on " in row), "")
            if log_path.exists()
            else ""
        )
        if line:
            url = line.rsplit(" ", 1)[1]
            try:
                assert httpx2.get(f"{url}/health", trust_env=False).status_code == 200
                return Served(url, process)
            except httpx2.TransportError:
                pass
        assert process.is_alive(), log_path.read_text()
        time.sleep(0.05)
    raise RuntimeError("serve does not answer")


@functools.cache
def serving(name: str) -> str:
    """URL of a server of that sapling, one for each session of tests."""
    served = start_serve(ROOT / "saplings" / name)
    atexit.register(served.process.kill)
    return served.url


# --- faults ---------------------------------------------------------------------------------------

Scope = dict[str, Any]
Handler = Callable[[str, Any, "Script"], Any]  # (path, body) -> a JSON value, bytes, or an Answer


@dataclass
class Answer:
    """A response of the scripted server: bytes in pieces with pauses, then the end or a broken
    connection."""

    body: bytes = b""
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    pieces: tuple[tuple[float, bytes], ...] = ()
    cut: bool = False


@dataclass
class Script:
    """A scripted server. `asked` holds every request body in order, with its time.

    `fault(n, path, body)` comes before `handler` if it returns something.
    """

    handler: Callable[[str, Any], Any]
    fault: Callable[[int, str, Any], Any] = lambda n, path, body: None
    asked: list[tuple[float, str, Any]] = field(default_factory=list)
    url: str = ""

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        raw, more = b"", True
        while more:
            message = await receive()
            raw, more = raw + message.get("body", b""), message.get("more_body", False)
        body = json.loads(raw) if raw else None
        self.asked.append((time.monotonic(), scope["path"], body))
        self.headers = dict(scope["headers"])
        response = self.fault(len(self.asked), scope["path"], body)
        if response is None:
            response = self.handler(scope["path"], body)
        if not isinstance(response, Answer):
            response = Answer(
                response if isinstance(response, bytes) else json.dumps(response).encode()
            )
        headers = [
            (b"content-type", b"application/json"),
            *((k.encode(), v.encode()) for k, v in response.headers),
        ]
        pieces = response.pieces or ((0.0, response.body),)
        if response.cut:
            headers.append((b"content-length", str(sum(len(p) for _, p in pieces) + 100).encode()))
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        for pause, piece in pieces:
            await asyncio.sleep(pause)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if not response.cut:
            await send({"type": "http.response.body", "body": b""})


@contextmanager
def playing(script: Script) -> Iterator[Script]:
    """Serve the script on a real socket in a thread."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(
            script, log_level="critical", ws="none", lifespan="off", timeout_graceful_shutdown=0
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    script.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        while not server.started:
            time.sleep(0.005)
        yield script
    finally:
        server.should_exit = True
        thread.join(10)


def events(*values: Any) -> bytes:
    """Return all events of a stream."""
    return (
        b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in values) + b"data: [DONE]\n\n"
    )
