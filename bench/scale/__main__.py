"""CPU seconds and peak memory at real size: this build, an earlier build, and bare PyTorch.

    python -m bench.scale --models DIR [--against TREE] [--rounds 5] [row ...]
    python -m bench.scale --report

DIR holds the models of `python -m bench.real_models DIR`; PERSEA_DATA the texts. TREE is a checkout
of an earlier build (`git worktree add TREE COMMIT`). A row is a file of this folder, named in its
list. Each arm of a row is a process of its own with one thread, which prepares once and then works
when it is told to: the arms take turns, so that a loaded machine slows all alike. CPU seconds are
medians over the rounds; a ratio is the median of the rounds' ratios with the smallest and the
largest. Peak memory is that of the arm's process after all rounds, and what its work adds to the
peak that loading left. Writes
bench/results/scale.json after each row; rows that are not named keep their figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.scale.rows import ROWS, Arm, Row

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "scale.json"
WORKER = Path(__file__).with_name("worker.py")


class Worker:
    """One arm in a process of its own."""

    def __init__(self, arm: Arm, tree: Path, models: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), arm.module, arm.name, str(models)],
            cwd=tree,  # what a build starts with `python -m` is its own
            env=environment | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended: exit {self.process.wait()}")
        return dict(json.loads(line))

    def work(self, number: int) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def arms_of(row: Row, against: Path | None) -> dict[str, tuple[Arm, Path]]:
    """Return title -> arm and the tree that it imports persea from."""
    arms = {arm.name: (arm, ROOT) for arm in row.arms}
    if against is not None:
        arms |= {f"{a.name}, before": (a, against) for a in row.arms if a.has_earlier_build}
    return arms


def measure(row: Row, against: Path | None, models: Path, rounds: int) -> dict[str, Any]:
    """Measure one row: the arms take turns."""
    arms = arms_of(row, against)
    found: dict[str, list[dict[str, Any]]] = {title: [] for title in arms}
    workers = {title: Worker(arm, tree, models) for title, (arm, tree) in arms.items()}
    for number in range(rounds + 1):  # the first warms caches and is dropped
        order = list(workers) if number % 2 else list(reversed(workers))
        for title in order:
            result = workers[title].work(number)
            if number:
                found[title].append(result)
    for worker in workers.values():
        worker.close()
    first = row.arms[0].name
    return {
        "what": row.what,
        "rounds": rounds,
        "arms": {
            title: {
                "cpu_s": round(statistics.median(r["cpu_s"] for r in some), 3),
                "ratio_to_this": interval(some, found[first]),
                "peak_mb": round(some[-1]["peak_mb"]),
                "work_adds_mb": round(some[-1]["peak_mb"] - some[-1]["before_mb"]),
                **some[-1]["figures"],
            }
            for title, some in found.items()
        },
    }


def interval(some: list[dict[str, Any]], this: list[dict[str, Any]]) -> list[float]:
    """Return the median, the smallest and the largest ratio of CPU seconds of the rounds."""
    ratios = [a["cpu_s"] / b["cpu_s"] for a, b in zip(some, this, strict=True)]
    return [round(f(ratios), 3) for f in (statistics.median, min, max)]


def markdown(rows: dict[str, Any]) -> str:
    """Return the table of docs/scale.md."""
    lines = ["| row | arm | CPU s | times persea's | peak MB |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        for title, arm in row["arms"].items():
            middle, low, high = arm["ratio_to_this"]
            ratio = "" if middle == low == high == 1 else f"{middle:.2f} ({low:.2f}-{high:.2f})"
            digits = 1 if arm["cpu_s"] >= 1 else 3
            seconds = f"{arm['cpu_s']:.{digits}f}"
            lines.append(f"| {name} | {title} | {seconds} | {ratio} | {arm['peak_mb']:,} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="what persea costs at real size")
    parser.add_argument("rows", nargs="*", choices=[[], *(row.name for row in ROWS)])
    parser.add_argument("--models", type=Path)
    parser.add_argument("--report", action="store_true", help="print the kept rows as a table only")
    parser.add_argument("--against", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": {}}
    if given.report:
        print(markdown(results["rows"]))
        return
    if given.models is None:
        parser.error("--models DIR is needed")
    results |= {
        "cpu": cpu_name(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers")},
    }
    for row in ROWS:
        if given.rows and row.name not in given.rows:
            continue
        results["rows"][row.name] = measure(row, given.against, given.models, given.rounds)
        print(json.dumps(results["rows"][row.name], indent=1), flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def cpu_name() -> str:
    """Return the processor's name and the instructions that torch uses of it."""
    import torch

    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
