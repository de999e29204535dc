"""One arm of one row: prepares, then works whenever a number comes in, and prints what it cost."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(module: str, arm: str, models: Path) -> None:
    answers = os.dup(1)  # libraries print to the other one
    os.dup2(2, 1)
    spec = importlib.util.spec_from_file_location(
        module, Path(__file__).with_name(f"row_{module}.py")
    )
    assert spec and spec.loader
    row = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(row)
    with tempfile.TemporaryDirectory() as folder:
        work = row.prepare(arm, models, Path(folder))
        before = peak_mb()
        os.write(answers, b"{}\n")
        for line in sys.stdin:
            began = time.process_time()
            figures = work(int(line))
            result = {
                "cpu_s": time.process_time() - began,
                "peak_mb": peak_mb(),
                "before_mb": before,
                "figures": figures,
            }
            os.write(answers, json.dumps(result).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
