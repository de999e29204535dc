"""How time and memory grow: with prompts, answers, units, positions, teachers, processes ...

    python -m bench.growth [name ...]          (make bench-growth, about 10 minutes)

Every point is a process of its own with one thread. Writes bench/results/growth.json after each
row: CPU seconds, megabytes, and the exponent b of size^b, fitted by least squares.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from bench.growth.measure import ROOT, exponent, measure_apart, measure_here
from bench.growth.rows import ROWS
from bench.real.__main__ import made_by

RESULTS = ROOT / "bench" / "results" / "growth.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.growth")
    parser.add_argument("names", nargs="*", help="rows to measure; none = all")
    parser.add_argument("--one", nargs=3, metavar=("NAME", "SIZE", "FOLDER"), help="one point")
    arguments = parser.parse_args()
    by_name = {row.name: row for row in ROWS}
    if arguments.one:
        name, size, folder = arguments.one
        print(json.dumps(measure_here(by_name[name], int(size), Path(folder))))
        return
    result: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": {}}
    for name in arguments.names or by_name:
        row = by_name[name]
        if row.needs_data and "PERSEA_DATA" not in os.environ:
            print(f"{name}: left out, it needs PERSEA_DATA")
            continue
        points = []
        for size in row.sizes:
            with tempfile.TemporaryDirectory() as folder:
                points.append(measure_apart(name, size, Path(folder)))
            print(f"{name:40} {row.axis} {points[-1]}", flush=True)
        result["rows"][name] = {
            "axis": row.axis,
            "points": points,
            "exponent_cpu": exponent(points, "cpu_s", row.fit_from),
            "exponent_mb": exponent(points, "mb", row.fit_from),
            "made_by": made_by(),
        }
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name:40} exponent {result['rows'][name]['exponent_cpu']}", flush=True)


if __name__ == "__main__":
    main()
