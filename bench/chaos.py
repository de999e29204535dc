"""Kill a run at random moments, restart it, and check that the student's bytes are the same.

    python bench/chaos.py [kills] [seed]        (make chaos)

One run of a small recipe on the bundled saplings is left alone. Another gets SIGKILL at random
moments, `kills` times, and is restarted each time. The sha256 of both students must be equal.
Writes bench/results/chaos.json.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "corpus.0.generate=160",
    "corpus.1.generate=80",
    "corpus.2.generate=80",
    "corpus.3.generate=80",
    "corpus.4.generate=80",
    "capture.prompts_per_unit=40",
    "audition.items=30",
    "evaluation.items=30",
    "training.steps=60",
    "training.checkpoint_every=7",
]


def start(out: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "persea.cli",
        "run",
        str(ROOT / "recipes" / "quickstart.yaml"),
        "--out",
        str(out),
    ]
    return subprocess.Popen(
        command + [part for change in SMALL for part in ("--set", change)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(out: Path) -> str:
    """Run to the end; return the sha256 of the student's weights."""
    run = start(out)
    _, stderr = run.communicate()
    if run.returncode != 0:
        raise SystemExit(f"the run failed with {run.returncode}: {stderr.decode()[-2000:]}")
    return hashlib.sha256(
        (out / "train" / "student" / "model.safetensors").read_bytes()
    ).hexdigest()


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 24
    rng = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        whole = finish(Path(folder) / "whole")
        length = time.monotonic() - begin
        killed, stages = Path(folder) / "killed", []
        while len(stages) < kills:
            run = start(killed)
            try:
                run.wait(timeout=rng.uniform(2.5, 2.5 + length / 2))
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGKILL)
            run.communicate()
            if (
                run.returncode == 0
            ):  # it finished before the kill: undo its last stages and continue
                for record in (
                    killed / "train" / "done.json",
                    killed / "evaluate" / "done.json",
                    killed / "report" / "done.json",
                ):
                    record.unlink(missing_ok=True)
                continue
            assert run.returncode == -signal.SIGKILL, run.returncode
            done = [p.parent.name for p in killed.glob("*/done.json")]
            stages.append(
                next(
                    (
                        s
                        for s in (
                            "check",
                            "audition",
                            "capture",
                            "train",
                            "evaluate",
                            "lineage",
                            "report",
                        )
                        if s not in done
                    ),
                    "report",
                )
            )
            print(f"kill {len(stages)}/{kills} in {stages[-1]}", flush=True)
        after = finish(killed)
    result = {
        "kills": kills,
        "in_stage": {s: stages.count(s) for s in dict.fromkeys(stages)},
        "uninterrupted": whole,
        "killed": after,
        "equal": whole == after,
        "seconds": round(time.monotonic() - begin),
    }
    (ROOT / "bench" / "results" / "chaos.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(not result["equal"])


if __name__ == "__main__":
    main()
