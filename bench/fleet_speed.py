"""python -m bench.fleet_speed: tokens per second of one worker and of two, capturing on two cores.

The quickstart's prompts, without those of reasoning, are captured in a process of its own, once by
that process alone and once by two worker processes, in interleaved pairs. For each:

- `capturing`: seconds by the clock from the start of the workers to the end of the stage;
- `stage`: of the whole stage, which first reads and plans the prompts in one process;
- the same in CPU seconds, from the kernel, as two cores that do nothing else would need them: those
  of the worker that uses most, or half of the sum of all processes if that is more. Other programs
  change them less than the clock.

The server that workers are forked from starts before the audition, as in `persea run`, and imports
beside it; its CPU seconds are told apart.

Both captures must have the same bytes. Writes bench/results/fleet_speed.json, with the load.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAPLINGS = ROOT / "saplings"
TICKS = os.sysconf("SC_CLK_TCK")
POLL_S = 0.2


def recipe(prompts_per_unit: int, share: int) -> dict[str, Any]:
    corpus = (("languages", 3600), ("code", 900), ("safety", 600), ("tools", 1200))
    return {
        "name": "speed",
        "threads": 1,
        "student": {"model": str(SAPLINGS / "llama-sapling"), "adapt": "full"},
        "teachers": [
            {"model": str(SAPLINGS / f"{name}-sapling")} for name in ("qwen", "gemma", "gpt-oss")
        ],
        "corpus": [{"skill": skill, "generate": count // share} for skill, count in corpus],
        "audition": {
            "pinned": {
                "languages": "qwen-sapling",
                "code": "gemma-sapling",
                "safety": "gemma-sapling",
                "tools": "gpt-oss-sapling",
            },
            "compare_with_base": False,
        },
        "capture": {
            "max_new_tokens": 64,
            "batch_size": prompts_per_unit,
            "prompts_per_unit": prompts_per_unit,
            "store": "captures",
        },
    }


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


class Meter:
    """Polls the CPU seconds of this process' descendants: workers are killed at the end."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.poll, daemon=True)
        self.thread.start()

    def poll(self) -> None:
        while not self.is_over.wait(POLL_S):
            for pid in descendants(os.getpid()):
                try:
                    self.seconds[pid] = cpu_seconds(pid)
                except OSError:
                    continue

    def stop(self) -> list[float]:
        self.is_over.set()
        self.thread.join()
        return sorted((round(s, 2) for s in self.seconds.values()), reverse=True)


def capture(path: Path, workers: int) -> dict[str, Any]:
    """Capture in this process, and return what it took."""
    from persea.config.recipe import load_recipe
    from persea.executors.ledger import read_ledger
    from persea.executors.local import start_fork_server
    from persea.pipeline.capture_dispatch import CaptureDispatch
    from persea.pipeline.run_context import RunContext
    from persea.pipeline.stages import run_pipeline
    from persea.storage import digest_path

    run = path.parent / "run"

    def context() -> RunContext:
        return RunContext(load_recipe(path, [f"executor.workers={workers}"]), run)

    opened: list[tuple[float, float]] = []
    real = CaptureDispatch._open_executor

    def open_executor(*arguments: Any) -> Any:
        opened.append((time.monotonic(), time.process_time()))
        return real(*arguments)

    CaptureDispatch._open_executor = open_executor  # type: ignore[assignment,method-assign]
    if workers > 1:
        start_fork_server()
    run_pipeline(context(), lambda *ignored: None, "audition")
    begin, meter = (time.monotonic(), time.process_time()), Meter()
    run_pipeline(context(), lambda *ignored: None, "capture")
    end = (time.monotonic(), time.process_time())
    children = meter.stop()
    of_workers = children[:workers] if workers > 1 else []
    before, own = opened[0][1] - begin[1], end[1] - opened[0][1]
    needed = max([*of_workers, (own + sum(of_workers)) / workers])
    sums = read_ledger(run)["capture"]
    return {
        "workers": workers,
        "units": sums.committed,
        "tokens": sums.tokens_kept,
        "clock_s": {
            "capturing": round(end[0] - opened[0][0], 1),
            "stage": round(end[0] - begin[0], 1),
        },
        "cpu_s": {"capturing": round(needed, 2), "stage": round(before + needed, 2)},
        "process_cpu_s": [round(before, 2), round(own, 2)],
        "worker_cpu_s": of_workers,
        "server_cpu_s": children[len(of_workers) :],
        "digest": digest_path(run / "capture" / "units"),
        "load": os.getloadavg()[0],
    }


def in_process_of_its_own(folder: Path, workers: int, options: argparse.Namespace) -> Any:
    folder.mkdir()
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe(options.prompts_per_unit, options.share)))
    command = [sys.executable, "-m", "bench.fleet_speed", "--one", str(path), str(workers)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fleet_speed")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--prompts-per-unit", type=int, default=64)
    parser.add_argument("--share", type=int, default=1, help="1/share of the quickstart's prompts")
    parser.add_argument("--one", nargs=2, metavar=("RECIPE", "WORKERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(capture(Path(options.one[0]), int(options.one[1]))))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["OMP_NUM_THREADS"] = "1"
    pairs = []
    with tempfile.TemporaryDirectory() as name:
        os.environ["PERSEA_HOME"] = f"{name}/home"
        for k in range(options.pairs):
            order = (1, 2) if k % 2 else (2, 1)
            found = {n: in_process_of_its_own(Path(name) / f"{k}-{n}", n, options) for n in order}
            pairs.append((found[1], found[2]))
    for one, two in pairs:
        assert one["digest"] == two["digest"], "the captures differ"
    ratios = {
        f"{clock}, {part}": [round(one[clock][part] / two[clock][part], 2) for one, two in pairs]
        for clock in ("clock_s", "cpu_s")
        for part in ("capturing", "stage")
    }
    result = {
        "cores": os.cpu_count(),
        "pairs": [list(pair) for pair in pairs],
        "speedup": {key: statistics.median(values) for key, values in ratios.items()},
        "speedups": ratios,
    }
    print(json.dumps(result["speedup"]))
    path = ROOT / "bench" / "results" / "fleet_speed.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
