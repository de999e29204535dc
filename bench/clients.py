"""Ordinary clients against `persea serve`: openai, litellm, lm-eval, vllm bench serve.

    make engines        runs this too
    python bench/clients.py ENVS        ENVS as in bench/engines.py

lm-eval (bench/lm_eval_client.py) compares log-likelihoods over `local-completions` with those of
its own `hf` backend, and answers over `local-chat-completions` with those of openai's client.

Result: bench/results/clients.json.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.real_servers import SAPLING, SERVERS, environment, free_port, running  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "clients.json"
CLIENTS = (
    "torch==2.13.0",
    "transformers==5.24.0",
    "lm-eval[api,hf]==0.4.13",
    "openai==3.57.0",
    "litellm==1.108.7",
)
BENCH_ROUTES = (("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions"))
NUM_BENCH_PROMPTS = 8


def clients_environment(folder: Path) -> Path:
    """Return the environment of the clients; it is made if it is not there."""
    env = folder / "clients"
    if not (env / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", env], check=True)
        for package in CLIENTS:
            subprocess.run([env / "bin/pip", "install", "-q", package], check=True)
        (env / "ready").write_text("")
    return env


def ask_by_libraries(env: Path, url: str, folder: Path) -> dict[str, Any]:
    """Run bench/lm_eval_client.py in the clients' environment."""
    out = folder / "clients.json"
    program = ROOT / "bench" / "lm_eval_client.py"
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENAI_API_KEY": "x"}
    variables |= {"HF_HOME": str(folder / "hub"), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    subprocess.run(
        [env / "bin/python", program, url, str(SAPLING), str(out)],
        check=True,
        env=variables,
        cwd=folder,
    )
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def bench_serve(vllm: Path, url: str, backend: str, route: str) -> dict[str, Any]:
    """Run `vllm bench serve`, and return how many of its requests succeeded."""
    options = ["--backend", backend, "--base-url", url, "--endpoint", route]
    options += ["--model", SAPLING.name, "--tokenizer", str(SAPLING), "--dataset-name", "random"]
    options += ["--random-input-len", "32", "--random-output-len", "16"]
    options += ["--num-prompts", str(NUM_BENCH_PROMPTS), "--disable-tqdm"]
    done = subprocess.run(
        [vllm / "bin/vllm", "bench", "serve", *options],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    numbers = {
        key: re.search(rf"{key}:\s+(\d+)", done.stdout)
        for key in ("Successful requests", "Failed requests", "Total generated tokens")
    }
    found = {k.lower().replace(" ", "_"): int(m[1]) for k, m in numbers.items() if m}
    return found | ({"error": done.stderr[-300:]} if done.returncode else {})


def main(arguments: list[str]) -> None:
    """Run all clients, and write the results."""
    envs = Path(arguments[0]).resolve()
    server = next(s for s in SERVERS if s.name == "persea serve")
    vllm = environment(next(s for s in SERVERS if s.name.startswith("vLLM")), envs)
    clients = clients_environment(envs)
    folder = envs / "work" / "clients"
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    with running(server, envs, folder, port):
        url = f"http://127.0.0.1:{port}"
        results = ask_by_libraries(clients, url, folder)
        results["date"] = time.strftime("%Y-%m-%d")
        write(results)
        for backend, route in BENCH_ROUTES:
            results[f"vllm bench serve 0.32.0, {route}"] = bench_serve(vllm, url, backend, route)
            write(results)
    print(json.dumps(results, ensure_ascii=False))


def write(results: dict[str, Any]) -> None:
    """Write the results so far."""
    RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
