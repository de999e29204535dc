"""Measure the sandbox's overhead, and run every reference solution of MBPP against its own tests.

    PERSEA_DATA=... python bench/sandbox.py     (5 to 10 minutes on two cores; --mbpp 0: 10 seconds)

--mbpp 0 leaves out the references. overhead = median of 20 empty programs in the sandbox minus the
median of 20 empty programs of the same Python outside it; trial = a program and its tests, each in
its own sandbox. Goal: overhead at most .25 s. Writes bench/results/sandbox.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from persea.chat.messages import Message
from persea.tasks.benchmarks import find_benchmark
from persea.tasks.benchmarks.benchmark import BenchmarkSource
from persea.tasks.sandbox.run_tests import run_tests
from persea.tasks.sandbox.sandbox import open_sandbox

DATA = Path(os.environ.get("PERSEA_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def median(work: Callable[[], object], n: int = 20) -> float:
    seconds = []
    for _ in range(n):
        begin = time.monotonic()
        work()
        seconds.append(time.monotonic() - begin)
    return round(statistics.median(seconds), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mbpp", type=int, default=974, help="how many references to run")
    wanted = parser.parse_args().mbpp
    box = open_sandbox()
    bare = median(lambda: subprocess.run([box.python, "-I", "-S", "-c", ""], check=True))
    inside = median(lambda: box.run(""))
    trial = median(lambda: run_tests(box, "def f(x): return x", "assert f(1) == 1"))
    result: dict[str, object] = {
        "walls": box.isolation,
        "load": round(os.getloadavg()[0], 1),
        "bare_s": bare,
        "sandbox_s": inside,
        "overhead_s": round(inside - bare, 4),
        "trial_s": trial,
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
