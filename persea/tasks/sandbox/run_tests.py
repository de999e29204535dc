"""Run a program against tests, each in a sandbox of its own. The process of the tests alone gives
the verdict.
"""

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

from persea.tasks.sandbox.harness import PROGRAM_ENDED_MESSAGE, execute_tests, serve_program
from persea.tasks.sandbox.sandbox import ExitKind, RunResult, Sandbox, SandboxLimits

HARNESS_SCRIPT = Path(__file__).with_name("harness.py")
MAX_VERDICT_BYTES = 65536
MAX_SHOWN_BYTES = 200  # of the end of a program's output, in a reason


class ProgramOutcome(StrEnum):
    """How the tests of a program ended."""

    PASSED = "passed"
    WRONG = "wrong"  # an assertion of the tests failed
    RAISED = "raised"  # the program raised, or a test on a value of the program
    TIMEOUT = "timeout"
    NO_VERDICT = "broken"  # the process of the tests did not finish


@dataclass(frozen=True)
class ProgramTestResult:
    """Outcome of the tests, a reason for people, and the duration in seconds."""

    outcome: ProgramOutcome
    reason: str
    duration_s: float


def run_tests(
    sandbox: Sandbox, program: str, tests: str, names: Sequence[str] = ()
) -> ProgramTestResult:
    """Run tests on the functions of a program.

    Only the process of the tests holds the nonce and the pipe of the verdict.

    Args:
        sandbox: A sandbox that passed its self-test.
        program: Source of the program.
        tests: Source of the tests. Names that they use and do not define belong to the program.
        names: More names that belong to the program, even if they are builtins.

    Returns:
        The outcome.

    Raises:
        MissingRequirementError: If a sandbox could not be built (exit 7).
    """
    tests_end, program_end = socket.socketpair()
    read_fd, write_fd = os.pipe()
    harness, nonce = HARNESS_SCRIPT.read_text(encoding="utf-8"), secrets.token_hex(16)
    with tests_end, program_end:
        try:
            program_run = sandbox.start(
                f"{harness}\n{serve_program.__name__}(3, {program!r})\n", [program_end.fileno()]
            )
        except BaseException:
            os.close(read_fd)
            os.close(write_fd)
            raise
        try:
            arguments = f"3, 4, {nonce!r}, {tests!r}, {list(names)!r}"
            tests_run = sandbox.start(
                f"{harness}\n{execute_tests.__name__}({arguments})\n",
                [tests_end.fileno(), write_fd],
            )
        except BaseException:
            os.close(read_fd)
            program_run.finish(stop=True)
            raise
        finally:
            os.close(write_fd)
    with os.fdopen(read_fd, "rb") as pipe:
        try:
            tests_result = tests_run.finish()
            verdict = pipe.read(MAX_VERDICT_BYTES)
        finally:
            program_result = program_run.finish(stop=True)
    return _read_verdict(verdict, nonce, program_result, tests_result, sandbox.limits)


def _read_verdict(
    verdict: bytes,
    nonce: str,
    program_result: RunResult,
    tests_result: RunResult,
    limits: SandboxLimits,
) -> ProgramTestResult:
    try:
        found, outcome, reason = json.loads(verdict)
        trusted = found == nonce
    except ValueError:
        trusted = False
    is_late = (
        program_result.exit_kind is ExitKind.EXIT
        and -program_result.exit_code in (signal.SIGXCPU, signal.SIGKILL)
    ) or ExitKind.TIMEOUT in (program_result.exit_kind, tests_result.exit_kind)
    duration_s = tests_result.duration_s
    if trusted and not (is_late and PROGRAM_ENDED_MESSAGE in reason):
        if PROGRAM_ENDED_MESSAGE in reason:
            reason += f"; its last output: {_end_of(program_result.output)}"
        return ProgramTestResult(ProgramOutcome(outcome), reason, duration_s)
    if is_late:
        message = f"no result in {limits.cpu_s} s of CPU time or {limits.wall_s:g} s of wall time"
        return ProgramTestResult(ProgramOutcome.TIMEOUT, message, duration_s)
    message = f"exit {tests_result.exit_code}: {_end_of(tests_result.output)}"
    return ProgramTestResult(ProgramOutcome.NO_VERDICT, message, duration_s)


def _end_of(output: bytes) -> str:
    return output[-MAX_SHOWN_BYTES:].decode(errors="replace")
