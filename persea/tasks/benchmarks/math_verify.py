"""Compare formulas with math-verify, in a worker process with a time limit and a memory limit.

math-verify refuses to enforce its own time limit outside a main thread, and a formula can take for
ever or all memory. A worker therefore reads pairs of texts as JSON lines and replies whether they
are equal; a worker that is late is killed.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import IO, cast

from persea.errors import MissingRequirementError

COMPARISON_TIMEOUT_S = 5.0  # the default of `evaluation.grading.math_timeout_s`
WORKER_START_TIMEOUT_S = 120.0  # the worker loads sympy, which takes 1 to 3 s on an idle machine
WORKER_MEMORY_BYTES = 4 << 30
WORKER_SOURCE = f"""
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({WORKER_MEMORY_BYTES}, {WORKER_MEMORY_BYTES}))
from math_verify import parse, verify
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    gold, answer = json.loads(line)
    try:
        gold, answer = parse(gold, parsing_timeout=None), parse(answer, parsing_timeout=None)
        reply = "same" if verify(gold, answer, timeout_seconds=None) else "other"
    except (Exception, RecursionError, MemoryError) as error:
        reply = "failed"
    print(json.dumps(reply), flush=True)
"""


class Equivalence(StrEnum):
    """The outcome of comparing two formulas."""

    SAME = "same"
    DIFFERENT = "other"
    FAILED = "failed"  # math-verify raised, or ran out of memory
    TIMEOUT = "timeout"


@dataclass(eq=False)
class MathVerifier:
    """A worker process, started at the first comparison and again after it had to be killed."""

    worker: subprocess.Popen[bytes] | None = None

    def compare(
        self, gold: str, answer: str, timeout_s: float = COMPARISON_TIMEOUT_S
    ) -> Equivalence:
        """Compare two answers in LaTeX or plain text by value.

        Args:
            gold: The right answer.
            answer: The answer to grade.
            timeout_s: Seconds after which the comparison is given up.

        Returns:
            Whether the values are equal, or why that is unknown.

        Raises:
            MissingRequirementError: If math-verify does not start (exit 7).
        """
        if self.worker is None or self.worker.poll() is not None:
            self._start()
        worker = cast("subprocess.Popen[bytes]", self.worker)
        try:
            stdin = cast("IO[bytes]", worker.stdin)
            stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            stdin.flush()
            reply = self._read_reply(timeout_s)
        except OSError:
            reply = "failed"
        if reply in ("", "failed"):
            self.close()  # after a timeout or out of memory the worker is not used again
        return Equivalence(reply) if reply else Equivalence.TIMEOUT

    def _start(self) -> None:
        self.worker = subprocess.Popen(
            [sys.executable, "-c", WORKER_SOURCE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if self._read_reply(WORKER_START_TIMEOUT_S) != "ready":
            self.close()
            raise MissingRequirementError(
                "math-verify does not start",
                where="math-verify",
                remedy="pip install 'persea[eval]'",
            )

    def _read_reply(self, timeout_s: float) -> str:
        """Return the worker's next reply; "" if it is late, "failed" if the worker ended."""
        assert self.worker
        stdout = cast("IO[bytes]", self.worker.stdout)
        deadline, line = time.monotonic() + timeout_s, b""
        while not line.endswith(b"\n"):
            if not select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return ""
            more = stdout.read1(1024)  # type: ignore[attr-defined]
            if not more:
                return "failed"
            line += more
        return str(json.loads(line))

    def close(self) -> None:
        """Kill the worker, if one runs."""
        if self.worker:
            self.worker.kill()
            self.worker.communicate()
            self.worker = None


@cache
def math_verifier() -> MathVerifier:
    """Return the verifier of this process. Its worker ends when this process does."""
    return MathVerifier()
