"""How soon `persea run` with real models ends after SIGTERM, in each of its stages.

    python -m bench.real.stops FOLDER [--stops 24] [--more]

FOLDER holds what `make real` prepares there. Each start goes on where the last one was stopped;
SIGTERM comes a random time after the start. Writes bench/results/real_stops.json: seconds until the
process is gone, exit code, stage; ends with 1 if one took longer than LIMIT_S or had another code
than 143. With --more the stops of the file stay, since late stages need further calls.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.real.__main__ import RESULTS, made_by

LIMIT_S = 10.0
EXIT_CODE = 128 + signal.SIGTERM
WAIT_S = (2.0, 75.0)  # after the start: the first stages take seconds, the later ones minutes


def stop_once(folder: Path, wait_s: float, log: Path) -> dict[str, Any] | None:
    """Start or resume the run, stop it after some seconds; None = it was finished before."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "persea.cli", "run", str(folder / "real.yaml")),
                *("--out", str(folder / "stopped")),
            ],
            stdout=subprocess.DEVNULL,
            stderr=file,
        )
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            pass
        else:
            if process.returncode:
                raise SystemExit(f"the run ended with {process.returncode}: {log.read_text()}")
            return None
        said = [line for line in log.read_text().splitlines() if line.strip()]
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    return {
        "after_s": round(wait_s, 1),
        "seconds": round(time.monotonic() - begun, 2),
        "code": code,
        "stage": said[-1].split()[0] if said else "start",
        "line": " ".join(said[-1].split()) if said else "",
        "last_words": log.read_text().splitlines()[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.real.stops")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stops", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", action="store_true", help="add to the stops of the file")
    options = parser.parse_args()
    path, rng = RESULTS / "real_stops.json", random.Random(options.seed)
    stops: list[dict[str, Any]] = json.loads(path.read_text())["stops"] if options.more else []
    for _ in range(options.stops):
        found = stop_once(options.folder, rng.uniform(*WAIT_S), options.folder / "stopped.log")
        if found is None:
            print("the run is finished")
            break
        stops.append(found)
        print(json.dumps(found), flush=True)
    worst = max(one["seconds"] for one in stops)
    result = {"worst_s": worst, "limit_s": LIMIT_S, "stops": stops, "made_by": made_by()}
    path.write_text(json.dumps(result, indent=1) + "\n")
    if worst > LIMIT_S or any(one["code"] != EXIT_CODE for one in stops):
        raise SystemExit(f"the slowest took {worst} s")


if __name__ == "__main__":
    main()
