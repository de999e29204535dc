"""Debian's Chromium, headless, controlled by its debugging pipe.

A page is opened at a given width, light or dark, on screen or on paper.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = (
    shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
    or ""
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--force-color-profile=srgb",
)
needed = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium here; on Debian: apt install chromium"
)


@dataclass
class Browser:
    """One open page. `events` are the browser's messages."""

    send: int
    receive: int
    number: int = 0
    session: str = ""
    rest: bytes = b""
    events: list[dict[str, Any]] = field(default_factory=list)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self.send, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._next()
            if reply.get("id") == self.number:
                assert "error" not in reply, reply
                result: dict[str, Any] = reply["result"]
                return result
            self.events.append(reply)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            some = os.read(self.receive, 1 << 20)
            assert some, "the browser ended"
            self.rest += some
        line, _, self.rest = self.rest.partition(b"\0")
        data: dict[str, Any] = json.loads(line)
        return data

    def open(self, page: Path, width: int = 1200, dark: bool = False, paper: bool = False) -> None:
        """Load a page and wait until it does not change any more."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            media="print" if paper else "screen",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._next())

    def asked(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get(
            "value"
        )

    def picture(self, to: Path) -> bytes:
        """Return the whole page as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        data = self.call(
            "Page.captureScreenshot",
            format="png",
            captureBeyondViewport=True,
            clip={
                "x": 0,
                "y": 0,
                "width": size["width"],
                "height": min(size["height"], 16000),
                "scale": 1,
            },
        )["data"]
        to.write_bytes(base64.b64decode(data))
        return to.read_bytes()

    def printed(self, to: Path) -> bytes:
        """Return the whole page as a PDF on A4."""
        to.write_bytes(
            base64.b64decode(
                self.call(
                    "Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69
                )["data"]
            )
        )
        return to.read_bytes()

    def complaints(self) -> list[str]:
        """Return all console messages and exceptions."""
        messages = {
            "Log.entryAdded": "entry",
            "Runtime.consoleAPICalled": "args",
            "Runtime.exceptionThrown": "exceptionDetails",
        }
        return [
            json.dumps(e["params"][messages[e["method"]]])
            for e in self.events
            if e.get("method") in messages
        ]

    def requests(self) -> list[str]:
        return [
            e["params"]["request"]["url"]
            for e in self.events
            if e.get("method") == "Network.requestWillBeSent"
        ]


@contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser with its own profile, which is deleted at the end."""
    (its_in, mine_out), (mine_in, its_out) = os.pipe(), os.pipe()
    low, high = (
        fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (its_in, its_out)
    )  # away from 3 and 4, where the browser looks for them

    def wire() -> None:
        os.dup2(low, 3)
        os.dup2(high, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=wire,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (its_in, its_out, low, high):
            os.close(fd)
        one = Browser(mine_out, mine_in)
        try:
            target = one.call("Target.createTarget", url="about:blank")["targetId"]
            one.session = one.call("Target.attachToTarget", targetId=target, flatten=True)[
                "sessionId"
            ]
            for domain in ("Page", "Runtime", "Log", "Network"):
                one.call(f"{domain}.enable")
            one.events.clear()
            yield one
        finally:
            process.kill()
            process.wait(20)
            os.close(mine_out)
            os.close(mine_in)
