"""A program against its tests: each in a sandbox of its own, and the verdict from the side the program has no part in."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from persea.tasks.sandbox.harness import GONE
from persea.tasks.sandbox.sandbox import End, Sandbox

TEXT = Path(__file__).with_name("harness.py")
MOST = 65536  # bytes of a verdict


class Outcome(StrEnum):
    PASSED = "passed"
    WRONG = "wrong"  # a test does not hold
    RAISED = "raised"  # the program, or a test with what it answered, raised
    TIMEOUT = "timeout"
    BROKEN = "broken"  # the tests' side did not come to its end: no verdict


@dataclass(frozen=True)
class Trial:
    outcome: Outcome
    why: str
    seconds: float


def attempt(sandbox: Sandbox, program: str, tests: str, names: Sequence[str] = ()) -> Trial:
    """Run a program's functions on tests. A name that tests use and do not define is the program's; so are `names`, Python's own or not.

    The tests' side alone holds the nonce and the pipe it is written to. Raises EnvironmentLacks where the walls do not stand.
    """
    here, there = socket.socketpair()
    read, write = os.pipe()
    inside, nonce = TEXT.read_text(encoding="utf-8"), secrets.token_hex(16)
    with here, there:
        answering = sandbox.start(f"{inside}\nserve(3, {program!r})\n", [there.fileno()])
        try:
            asking = sandbox.start(f"{inside}\nexamine(3, 4, {nonce!r}, {tests!r}, {list(names)!r})\n", [here.fileno(), write])
        except BaseException:
            os.close(read)
            answering.finish()
            raise
        finally:
            os.close(write)
    with os.fdopen(read, "rb") as pipe:
        try:
            ended = asking.finish()
            told = pipe.read(MOST)
        finally:
            answered = answering.finish(stop=True)
    try:
        found, outcome, why = json.loads(told)
        trusted = found == nonce
    except ValueError:
        trusted = False
    late = (answered.end is End.EXIT and -answered.code in (signal.SIGXCPU, signal.SIGKILL)) or End.TIMEOUT in (answered.end, ended.end)
    if trusted and not (late and GONE in why):
        said = f"; its last words: {answered.output[-200:].decode(errors='replace')}" if GONE in why else ""
        return Trial(Outcome(outcome), why + said, ended.seconds)
    if late:
        limits = sandbox.limits
        return Trial(Outcome.TIMEOUT, f"no answer in {limits.cpu} s of computing or {limits.wall:g} s in all", ended.seconds)
    return Trial(Outcome.BROKEN, f"exit {ended.code}: {ended.output[-200:].decode(errors='replace')}", ended.seconds)
