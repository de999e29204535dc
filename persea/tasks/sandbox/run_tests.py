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

from persea.tasks.sandbox.harness import PROGRAM_ENDED_MESSAGE
from persea.tasks.sandbox.sandbox import ExitKind, Sandbox

HARNESS_SCRIPT = Path(__file__).with_name("harness.py")
MAX_VERDICT_BYTES = 65536  # bytes of a verdict


class ProgramOutcome(StrEnum):
    PASSED = "passed"
    WRONG = "wrong"  # a test does not hold
    RAISED = "raised"  # the program, or a test with what it answered, raised
    TIMEOUT = "timeout"
    NO_VERDICT = "broken"  # the tests' side did not come to its end: no verdict


@dataclass(frozen=True)
class ProgramTestResult:
    outcome: ProgramOutcome
    reason: str
    duration_s: float


def run_tests(
    sandbox: Sandbox, program: str, tests: str, names: Sequence[str] = ()
) -> ProgramTestResult:
    """Run a program's functions on tests. A name that tests use and do not define is the program's; so are `names`, Python's own or not.

    The tests' side alone holds the nonce and the pipe it is written to. Raises EnvironmentLacks where the walls do not stand.
    """
    here, there = socket.socketpair()
    read, write = os.pipe()
    inside, nonce = HARNESS_SCRIPT.read_text(encoding="utf-8"), secrets.token_hex(16)
    with here, there:
        answering = sandbox.start(f"{inside}\nserve(3, {program!r})\n", [there.fileno()])
        try:
            asking = sandbox.start(
                f"{inside}\nexamine(3, 4, {nonce!r}, {tests!r}, {list(names)!r})\n",
                [here.fileno(), write],
            )
        except BaseException:
            os.close(read)
            answering.finish()
            raise
        finally:
            os.close(write)
    with os.fdopen(read, "rb") as pipe:
        try:
            ended = asking.finish()
            told = pipe.read(MAX_VERDICT_BYTES)
        finally:
            answered = answering.finish(stop=True)
    try:
        found, outcome, why = json.loads(told)
        trusted = found == nonce
    except ValueError:
        trusted = False
    late = (
        answered.exit_kind is ExitKind.EXIT
        and -answered.exit_code in (signal.SIGXCPU, signal.SIGKILL)
    ) or ExitKind.TIMEOUT in (answered.exit_kind, ended.exit_kind)
    if trusted and not (late and PROGRAM_ENDED_MESSAGE in why):
        said = (
            f"; its last words: {answered.output[-200:].decode(errors='replace')}"
            if PROGRAM_ENDED_MESSAGE in why
            else ""
        )
        return ProgramTestResult(ProgramOutcome(outcome), why + said, ended.duration_s)
    if late:
        limits = sandbox.limits
        return ProgramTestResult(
            ProgramOutcome.TIMEOUT,
            f"no answer in {limits.cpu_s} s of computing or {limits.wall_s:g} s in all",
            ended.duration_s,
        )
    return ProgramTestResult(
        ProgramOutcome.NO_VERDICT,
        f"exit {ended.exit_code}: {ended.output[-200:].decode(errors='replace')}",
        ended.duration_s,
    )
