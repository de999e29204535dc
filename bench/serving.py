"""How long a capture takes through servers, compared with the engine in the same process.

    make engines        runs this after bench/engines.py
    python bench/serving.py ENVS [NAME ...]     only some servers; ENVS as in bench/engines.py

300 questions go to one sapling: by the local engine, by `persea serve` and by the other servers
with `protocol: tokens`, 32 requests at once. The whole command `persea capture` is timed, and the
processor time of client and server is counted: on a machine with other work the wall clock says
little.

Result: bench/results/serving.json.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.real_servers import (  # noqa: E402
    SAPLING,
    SERVERS,
    environment,
    free_port,
    processor_seconds,
    running,
)

RESULTS = ROOT / "bench" / "results" / "serving.json"
LOCAL = "local engine"
CAPTURED_PROTOCOL = "tokens"
RECIPE = """
name: serving
threads: 1
student: {{model: {student}}}
teachers:
  - model: {model}
    name: teacher
    {endpoint}
corpus:
  - {{skill: languages, generate: 300}}
audition: {{pinned: {{languages: teacher}}}}
capture: {{max_new_tokens: 24, prompts_per_unit: 100}}
"""
ENDPOINT = (
    'endpoint: {{url: "http://127.0.0.1:{port}", protocol: tokens, concurrency: 32, '
    'served_model_name: "{served}"}}'
)


def measure_capture(folder: Path, endpoint: str, server_pid: int | None) -> dict[str, Any]:
    """Capture the questions once, in a run folder and a home of their own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(student=ROOT / "saplings" / "llama-sapling", model=SAPLING, endpoint=endpoint)
    )
    variables = os.environ | {"PERSEA_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "persea.cli", "capture", str(recipe), "--out"]
    before = os.times()
    server_before = processor_seconds(server_pid) if server_pid else 0.0
    begin = time.monotonic()
    subprocess.run([*command, str(folder / "run")], check=True, env=variables, capture_output=True)
    wall = time.monotonic() - begin
    after = os.times()
    summary = json.loads((folder / "run" / "capture" / "summary.json").read_text())
    return {
        "wall_s": round(wall, 1),
        "client_cpu_s": round(
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system,
            1,
        ),
        "server_cpu_s": round(processor_seconds(server_pid) - server_before, 1)
        if server_pid
        else 0.0,
        "answers": summary.get("answers", summary.get("kept")),
    }


def main(arguments: list[str]) -> None:
    """Measure the local engine and the servers that are named, or all, and write the results."""
    envs = Path(arguments[0]).resolve()
    every = [None, *(s for s in SERVERS if CAPTURED_PROTOCOL in s.protocols)]
    chosen = [
        s
        for s in every
        if not arguments[1:] or any(a in (s.name if s else LOCAL) for a in arguments[1:])
    ]
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for server in chosen:
        name = server.name if server else LOCAL
        folder = envs / "work" / "serving" / name.replace(" ", "-").lower()
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        context = (
            running(server, environment(server, envs), folder, port) if server else nullcontext()
        )
        with context as process:
            endpoint = ENDPOINT.format(port=port, served=server.served) if server else ""
            pid = process.pid if process else None
            found = measure_capture(folder / "capture", endpoint, pid)
        results[name] = found | {"date": time.strftime("%Y-%m-%d")}
        RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
        print(f"{name}: {json.dumps(results[name])}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
