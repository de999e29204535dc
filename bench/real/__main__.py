"""python -m bench.real --models FOLDER --budget-minutes N: the next runs, by priority."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.real.plan import STAGES, next_run
from bench.real.report import markdown, summary
from bench.real.train import Run
from bench.real.world import World

RESULTS = Path(__file__).resolve().parent.parent / "results"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return result lines by key; the last line of a key counts."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {line["key"]: line for line in map(json.loads, lines)}


def made_by() -> dict[str, str]:
    """Return machine and versions."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {processor()}",
        "threads": str(torch.get_num_threads()),
        **{name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.is_file() else ())
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor()


def go(world: World, run: Run, results: Path) -> dict[str, Any]:
    """Run, append the line, print a summary."""
    begun = time.process_time()
    line = world.run(run)
    line |= {"cpu_seconds_all": round(time.process_time() - begun, 1), "made_by": made_by()}
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(
        f"{time.strftime('%H:%M')} {line['mean']:.4f} en {line['english']:.4f} "
        f"cpu {line.get('cpu_seconds', 0)} of {line['cpu_seconds_all']}  {run}",
        flush=True,
    )
    return line


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.real")
    parser.add_argument(
        "--models", type=Path, required=True, help="folder with gemma3-270m and smollm2"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(os.environ.get("PERSEA_HOME", "~/.cache/persea")).expanduser() / "real",
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "real.jsonl")
    parser.add_argument("--budget-minutes", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--stages", nargs="+", choices=tuple(STAGES), default=tuple(STAGES), help="in this order"
    )
    parser.add_argument(
        "--arithmetic",
        choices=("half", "single", "autocast"),
        default="half",
        help="single = float32: for a processor without bfloat16, on which half takes ten times as "
        "long; autocast = products in bfloat16, as persea trains where it can; their runs have "
        "lines of their own, the best settings are those of half",
    )
    parser.add_argument("--plan", action="store_true", help="print the next run only")
    parser.add_argument("--report", action="store_true", help="write the tables only")
    options = parser.parse_args()
    if options.report:
        found = summary(list(read(options.results).values()))
        options.results.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        for part in ("test", "dev"):
            print(f"\n{part}\n\n{markdown(found, part)}")
        return
    torch.set_num_threads(options.threads)
    world, begun = World(options.models, options.cache), time.monotonic()
    ran = False
    while (run := next_run(read(options.results), options.stages, options.arithmetic)) is not None:
        if options.plan or (ran and time.monotonic() - begun > 60 * options.budget_minutes):
            print("next:", run)
            return
        go(world, run, options.results)
        ran = True
    print("nothing left to run")


if __name__ == "__main__":
    main()
