"""Measure the sandbox's overhead, and run every reference solution of MBPP against its own tests.

    PERSEA_DATA=... python bench/sandbox.py     (5 to 10 minutes on two cores; --mbpp 0: 10 seconds)

Every kind of walls that this machine has is measured, bubblewrap and persea's own; the references
run in the kind that persea takes. --mbpp 0 leaves them out. overhead = median of 20 empty programs
in the sandbox minus the median of 20 empty programs of the same Python outside it; trial = a
program and its tests, each in its own sandbox. Goal: overhead at most .25 s. Writes
bench/results/sandbox.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from persea.chat.messages import Message
from persea.errors import MissingRequirementError
from persea.tasks.benchmarks import find_benchmark
from persea.tasks.benchmarks.benchmark import BenchmarkSource
from persea.tasks.sandbox.run_tests import run_tests
from persea.tasks.sandbox.sandbox import Isolation, Sandbox, open_sandbox, verify_isolation

DATA = Path(os.environ.get("PERSEA_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def median(work: Callable[[], object], n: int = 20) -> float:
    seconds = []
    for _ in range(n):
        begin = time.monotonic()
        work()
        seconds.append(time.monotonic() - begin)
    return round(statistics.median(seconds), 4)


def cost(isolation: Isolation) -> dict[str, object]:
    """Return the seconds of one kind of walls, or why this machine lacks it.

    Bubblewrap's user may not look into root's home, where a Python of root's may be.
    """
    is_roots = isolation is Isolation.BUBBLEWRAP and os.geteuid() == 0
    box = Sandbox(isolation, os.path.realpath("/usr/bin/python3" if is_roots else sys.executable))
    try:
        verify_isolation(box)
    except MissingRequirementError as error:
        return {"missing": error.message}
    bare = median(lambda: subprocess.run([box.python, "-I", "-S", "-c", ""], check=True))
    inside = median(lambda: box.run(""))
    return {
        "bare_s": bare,
        "sandbox_s": inside,
        "overhead_s": round(inside - bare, 4),
        "trial_s": median(lambda: run_tests(box, "def f(x): return x", "assert f(1) == 1")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mbpp", type=int, default=974, help="how many references to run")
    wanted = parser.parse_args().mbpp
    chosen = open_sandbox()
    result: dict[str, object] = {
        "chosen": chosen.isolation.value,
        "load": round(os.getloadavg()[0], 1),
        "walls": {isolation.value: cost(isolation) for isolation in Isolation},
    }
    if wanted:
        mbpp = find_benchmark("mbpp")
        items = mbpp.load_items(BenchmarkSource(str(DATA / "eval" / "mbpp.jsonl"))).items[:wanted]
        grades = [
            (i.prompt.id, mbpp.grade_answer(i, Message.from_assistant(i.reference))) for i in items
        ]
        result |= {
            "references": len(grades),
            "right": sum(g.value == 1 for _, g in grades),
            "verdicts": Counter(g.verdict for _, g in grades),
            "not_right": {name: g.reason for name, g in grades if g.value < 1},
        }
    (Path(__file__).parent / "results" / "sandbox.json").write_text(
        json.dumps(result, indent=1) + "\n"
    )
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
