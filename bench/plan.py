"""python -m bench.plan RECIPE [--set KEY=VALUE] --out FOLDER: a plan against the run that follows.

Measures the models (`--calibrate`), plans, runs the stages, and compares CPU seconds and bytes with
the run's own records. The same command continues an interrupted run. Other programs on the
machine change the clock, and CPU seconds far less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persea.config.recipe import load_recipe
from persea.pipeline.calibrate import calibrate
from persea.pipeline.calibration import Calibration
from persea.pipeline.plan import RunPlan, plan_run
from persea.pipeline.preflight_data import folder_bytes
from persea.pipeline.run_context import RunContext
from persea.pipeline.stages import run_pipeline
from persea.pipeline.workload import context_shares

STAGES = ("audition", "capture", "train", "evaluate")


def planned_seconds(plan: RunPlan) -> dict[str, float]:
    """Return stage -> CPU seconds of its lines."""
    found: dict[str, float] = {}
    for line in plan.lines:
        found[line.stage] = found.get(line.stage, 0.0) + (line.cpu_seconds or 0.0)
    return found


def compare(before: Mapping[str, float], run: Path, disk: int) -> dict[str, Any]:
    """Return planned and measured seconds of each stage that has finished, and their ratio."""
    measured = {
        stage: json.loads((run / stage / "done.json").read_text())["cpu_seconds"]
        for stage in STAGES
        if (run / stage / "done.json").is_file()
    }
    rows = {
        stage: {
            "planned": round(before.get(stage, 0.0), 1),
            "measured": value,
        }
        for stage, value in measured.items()
    }
    total = {
        key: round(sum(row[key] for row in rows.values()), 1) for key in ("planned", "measured")
    }
    found = {
        "stages": rows,
        "total": total | {"ratio": round(total["planned"] / total["measured"], 3)},
    }
    if "train" in rows:
        kept = peak_bytes(run)
        found["disk"] = {"planned": disk, "measured": kept, "ratio": round(disk / kept, 3)}
    return found


def peak_bytes(run: Path) -> int:
    """Return the most bytes that a finished training had on the disk.

    A checkpoint is written before the oldest is deleted, and the student after the last of them.
    """
    kept = sum(folder_bytes(run / name) for name in ("capture", "examples", "train"))
    sizes: dict[int, int] = {}
    for path in (run / "train" / "checkpoints").glob("step-*"):
        step = int(path.name[5:13])
        sizes[step] = sizes.get(step, 0) + path.stat().st_size
    steps = sorted(sizes)
    was_deleted = len(steps) > 1 and steps[0] > steps[1] - steps[0]
    student = folder_bytes(run / "train" / "student")
    return max(kept, kept - student + sizes[steps[-1]]) if was_deleted else kept


def measure(
    recipe_path: Path, overrides: list[str], out: Path, kept: Path | None, only_compare: bool
) -> dict[str, Any]:
    """Calibrate, plan, run and compare."""

    def say(stage: str, fraction: float, message: str) -> None:
        print(f"{stage:>9} {fraction:4.0%} {message}", flush=True)

    def context() -> RunContext:
        return RunContext(load_recipe(recipe_path, overrides), out)

    run = context()
    if kept and kept.is_file():
        speeds = Calibration.from_json(json.loads(kept.read_text()))
    else:
        speeds = calibrate(run, context_shares(run), say)
        if kept:
            kept.write_text(json.dumps(speeds.to_json(), indent=1))
    planned = out.with_suffix(".plan.json")  # of the first call: what is done is not planned again
    if not planned.is_file():
        plan = plan_run(context(), calibration=speeds)
        value = {"seconds": planned_seconds(plan), "disk": sum(x.disk_bytes for x in plan.lines)}
        planned.write_text(json.dumps(value))
    value = json.loads(planned.read_text())
    for stage in () if only_compare else ("check", *STAGES):
        run_pipeline(context(), say, stage)
    return compare(value["seconds"], out, value["disk"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plan")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, help="file of speeds, read or written")
    parser.add_argument("--name", default="quickstart")
    parser.add_argument("--only-compare", action="store_true", help="with the finished stages")
    options = parser.parse_args()
    found = measure(
        options.recipe, options.overrides, options.out, options.calibration, options.only_compare
    )
    found |= {"overrides": options.overrides, "cores": os.cpu_count(), "cpu": platform.machine()}
    path = Path(__file__).with_name("results") / "plan.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(results | {options.name: found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
