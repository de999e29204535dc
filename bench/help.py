"""Time `persea --help`: wall seconds, best and median of 9 (make bench). Goal: below .5 s."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    seconds = []
    for _ in range(9):
        begin = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "persea.cli", "--help"], check=True, stdout=subprocess.DEVNULL
        )
        seconds.append(time.monotonic() - begin)
    result = {"best": round(min(seconds), 3), "median": round(statistics.median(seconds), 3)}
    (Path(__file__).parent / "results" / "help.json").write_text(json.dumps(result) + "\n")
    print("persea --help", result)


if __name__ == "__main__":
    main()
