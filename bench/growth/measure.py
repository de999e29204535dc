"""One measurement: CPU seconds and memory of some work at some size, in a process of its own."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# prepares a size in a folder; returns the work to be timed, which may return further figures
Prepare = Callable[[int, Path], Callable[[], dict[str, Any] | None]]


@dataclass(frozen=True)
class Row:
    """A line of the table: some work against one size.

    Attributes:
        name: name of the row.
        axis: what the size counts.
        sizes: sizes to measure, rising.
        prepare: prepares a size.
        needs_data: whether the real tokenizers of PERSEA_DATA are needed.
        fit_from: smallest size that counts for the exponent: below it a fixed part dominates.
    """

    name: str
    axis: str
    sizes: tuple[int, ...]
    prepare: Prepare
    needs_data: bool = False
    fit_from: int = 0


def resident_mb() -> float:
    """Return the resident memory of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def peak_mb() -> float:
    """Return the peak of this process alone, in MB; ru_maxrss is inherited through an exec."""
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return int(status.split()[0]) * 1024 / 1e6


def measure_here(row: Row, size: int, folder: Path) -> dict[str, Any]:
    """Prepare a size, then time its work; memory is the peak above the state before it (Linux)."""
    work = row.prepare(size, folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, begun = resident_mb(), time.process_time()
    more = work() or {}
    seconds = time.process_time() - begun
    return {
        "size": size,
        "cpu_s": round(seconds, 4),
        "mb": round(max(0.0, peak_mb() - before), 1),
        **more,
    }


def measure_apart(name: str, size: int, folder: Path) -> dict[str, Any]:
    """Measure in a fresh process with one thread."""
    out = subprocess.run(
        [sys.executable, "-m", "bench.growth", "--one", name, str(size), str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def exponent(points: Sequence[dict[str, Any]], key: str, fit_from: int) -> float | None:
    """Return b of the least-squares fit value = a * size^b; None with fewer than two points."""
    logs = [
        (math.log(p["size"]), math.log(p[key]))
        for p in points
        if p["size"] >= fit_from and p[key] > 0
    ]
    if len(logs) < 2:
        return None
    mean_x = sum(x for x, _ in logs) / len(logs)
    mean_y = sum(y for _, y in logs) / len(logs)
    over = sum((x - mean_x) ** 2 for x, _ in logs)
    return round(sum((x - mean_x) * (y - mean_y) for x, y in logs) / over, 2)
