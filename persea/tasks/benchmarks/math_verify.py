"""math-verify in a process of its own: formulas are parsed under a time limit, by nobody who could hang the run.

math-verify refuses to watch its own time outside a main thread, and a formula can take for ever or all memory; so a worker reads pairs of
texts as JSON lines and says whether they are the same, and is killed when it does not say so in time.
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

COMPARISON_TIMEOUT_S, WORKER_START_TIMEOUT_S = (
    5.0,
    120.0,
)  # for one comparison; for the worker's start, which loads sympy (1 to 3 s on a quiet machine)
WORKER_SOURCE = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from math_verify import parse, verify
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    gold, answer = json.loads(line)
    try:
        said = "same" if verify(parse(gold, parsing_timeout=None), parse(answer, parsing_timeout=None), timeout_seconds=None) else "other"
    except (Exception, RecursionError, MemoryError) as error:
        said = "failed"
    print(json.dumps(said), flush=True)
"""


class Equivalence(StrEnum):
    SAME = "same"
    DIFFERENT = "other"
    FAILED = "failed"
    TIMEOUT = "timeout"


@dataclass(eq=False)
class MathVerifier:
    """One worker; started when first asked, started anew after it had to be killed."""

    worker: subprocess.Popen[bytes] | None = None

    def compare(
        self, gold: str, answer: str, timeout_s: float = COMPARISON_TIMEOUT_S
    ) -> Equivalence:
        """Whether two answers in LaTeX or plain words are the same value."""
        if self.worker is None or self.worker.poll() is not None:
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
        try:
            into = cast("IO[bytes]", self.worker.stdin)
            into.write(json.dumps([gold, answer]).encode() + b"\n")
            into.flush()
            told = self._read_reply(timeout_s)
        except OSError:
            told = "failed"
        if told in ("", "failed"):
            self.close()  # a worker that hung, or ran out of memory, answers nobody
        return Equivalence(told) if told else Equivalence.TIMEOUT

    def _read_reply(self, timeout_s: float) -> str:
        """The worker's next word; "" where it is late, "failed" where it is gone."""
        assert self.worker
        out = cast("IO[bytes]", self.worker.stdout)
        until, line = time.monotonic() + timeout_s, b""
        while not line.endswith(b"\n"):
            if not select.select([out], [], [], max(0.0, until - time.monotonic()))[0]:
                return ""
            more = out.read1(1024)  # type: ignore[attr-defined]
            if not more:
                return "failed"
            line += more
        return str(json.loads(line))

    def close(self) -> None:
        if self.worker:
            self.worker.kill()
            self.worker.communicate()
            self.worker = None


@cache
def math_verifier() -> MathVerifier:
    """This process' worker. It ends when its input does."""
    return MathVerifier()
