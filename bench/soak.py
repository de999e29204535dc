"""Stress test for `persea serve`: malformed requests, slow clients, a thousand connections.

    python bench/soak.py [seconds]              (make soak)

One server of the Qwen sapling runs in its own process, on a real socket. At the same time: eight
clients send malformed requests (mutated JSON, wrong types, huge numbers, random bytes, wrong
headers), forty are slow (a header or a body byte by byte, streams that nobody reads), 1,000
connections are opened and held, and one client repeats a valid request and compares the answer.
Memory is the server's VmRSS after a warm-up of every route and at the end. Exits with 1 if the
server died, a valid request got another answer, a malformed request got a 5xx status, or memory
grew by more than a tenth. Writes bench/results/soak.json.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2

ROOT = Path(__file__).resolve().parent.parent
CHAT = {
    "model": "qwen-sapling",
    "messages": [{"role": "user", "content": "How do you say three hundred in Vietnamese?"}],
}
GOOD: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", CHAT),
    (
        "/v1/completions",
        {"model": "qwen-sapling", "prompt": "x = ", "max_tokens": 4, "logprobs": 5, "echo": True},
    ),
    (
        "/inference/v1/generate",
        {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 1, "prompt_logprobs": 5}},
    ),
)
ODD = (
    None,
    True,
    -1,
    0.5,
    1e308,
    10**30,
    "",
    "x" * 10_000,
    "\ud800",
    [],
    {},
    [[]],
    {"a": {"b": []}},
    "\0",
    "٣",
    -(10**6),
)


def start() -> tuple[subprocess.Popen[str], str]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    command = [
        sys.executable,
        "-m",
        "persea.cli",
        "serve",
        str(ROOT / "saplings" / "qwen-sapling"),
        "--port",
        "0",
        "--threads",
        "1",
        "--max-tokens",
        "64",
        "--seconds",
        "5",
    ]
    server = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=(ROOT / "bench" / "results" / ".soak.err").open("w"),
        text=True,
    )
    assert server.stdout
    return server, server.stdout.readline().rsplit(" ", 1)[1].strip()


def memory(process: int) -> int:
    """Return VmRSS in kB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def mutated(rng: random.Random) -> tuple[str, bytes, dict[str, str]]:
    """Return a request that is wrong in one of many ways (a few are valid by chance)."""
    path, body = rng.choice(GOOD)
    body = json.loads(json.dumps(body))
    way = rng.randrange(7)
    if way == 0:
        body[rng.choice(list(body))] = rng.choice(ODD)
    elif way == 1:
        body[f"k{rng.randrange(99)}"] = rng.choice(ODD)
    elif way == 2:
        del body[rng.choice(list(body))]
    elif way == 3:
        inner = body.get("sampling_params") or (body["messages"][0] if "messages" in body else body)
        inner[rng.choice([*inner, "n"])] = rng.choice(ODD)
    raw = json.dumps(body).encode()
    if way == 4:
        raw = raw[: rng.randrange(len(raw))]
    elif way == 5:
        raw = bytes(rng.randrange(256) for _ in range(rng.randrange(400)))
    elif way == 6:
        at = rng.randrange(len(raw))
        raw = raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
    return (
        rng.choice([path, path, path, "/v1/nowhere", "/"]),
        raw,
        {"content-type": rng.choice(["application/json"] * 4 + ["text/plain"])},
    )


async def malformed(url: str, seed: int, until: float, seen: Counter[str]) -> None:
    rng = random.Random(seed)
    async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=30) as client:
        while time.monotonic() < until:
            path, raw, headers = mutated(rng)
            try:
                answer = await client.request(
                    rng.choice(["POST"] * 9 + ["PUT"]), path, content=raw, headers=headers
                )
                seen[str(answer.status_code)] += 1
                if answer.status_code != 200 and "message" not in answer.json()["error"]:
                    seen["without a reason"] += 1
            except httpx2.TransportError as error:
                seen[type(error).__name__] += 1


async def slow(url: str, seed: int, until: float, seen: Counter[str]) -> None:
    """Heads and bodies byte by byte, and streams of which nothing is read."""
    rng = random.Random(seed)
    host, port = url.removeprefix("http://").split(":")
    raw = json.dumps(CHAT | {"stream": True}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    ).encode()
    while time.monotonic() < until:
        try:
            reader, writer = await asyncio.open_connection(host, int(port))
            if rng.random() < 0.3:
                writer.write(head + raw)  # the response is never read
                await asyncio.sleep(rng.uniform(1, 8))
            else:
                for byte in (head + raw)[rng.randrange(40) :]:
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0.05)
                    if reader.at_eof() or time.monotonic() > until:
                        break
            seen["slow"] += 1
            writer.close()
        except OSError:
            seen["slow, turned away"] += 1


async def idle(url: str, count: int, until: float, seen: Counter[str]) -> None:
    """Connections that are opened and say nothing; one that is closed is opened again."""
    host, port = url.removeprefix("http://").split(":")

    async def one() -> None:
        while time.monotonic() < until:
            try:
                reader, writer = await asyncio.open_connection(host, int(port))
                seen["connections"] += 1
                seen["open"] += 1
                seen["most open"] = max(seen["most open"], seen["open"])
                await asyncio.wait_for(reader.read(1000), max(0.1, until - time.monotonic()))
                writer.close()
            except TimeoutError:
                seen["kept to the end"] += 1
            except OSError:
                seen["turned away"] += 1
            seen["open"] -= 1

    await asyncio.gather(*(one() for _ in range(count)))


async def honest(url: str, want: str, until: float, seen: Counter[str]) -> None:
    async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
        while time.monotonic() < until:
            answer = await client.post("/v1/chat/completions", json=CHAT)
            if answer.status_code == 429:
                seen["asked to wait"] += 1
            else:
                right = (
                    answer.status_code == 200
                    and answer.json()["choices"][0]["message"]["content"] == want
                )
                seen["right" if right else "wrong"] += 1
            await asyncio.sleep(0.2)


async def storm(url: str, seconds: float, want: str) -> dict[str, Counter[str]]:
    until = time.monotonic() + seconds
    seen: dict[str, Counter[str]] = {
        name: Counter() for name in ("malformed", "slow", "connections", "honest")
    }
    await asyncio.gather(
        *(malformed(url, seed, until, seen["malformed"]) for seed in range(8)),
        *(slow(url, seed, until, seen["slow"]) for seed in range(40)),
        idle(url, 1000, until, seen["connections"]),
        honest(url, want, until, seen["honest"]),
    )
    return seen


def main() -> None:
    logging.getLogger("asyncio").setLevel(
        logging.ERROR
    )  # errors on closed connections are expected here
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    server, url = start()
    try:
        for _ in range(20):  # warm-up: every route, its errors, its streams
            for path, body in GOOD:
                response = httpx2.post(url + path, json=body, trust_env=False, timeout=60)
                httpx2.post(url + path, content=b"{", trust_env=False, timeout=60)
                if path == GOOD[0][0]:
                    assert response.status_code == 200, response.text
                    want = response.json()["choices"][0]["message"]["content"]
        asyncio.run(storm(url, 5, want))
        time.sleep(6)
        before = memory(server.pid)
        seen = asyncio.run(storm(url, seconds, want))
        time.sleep(6)
        alive = server.poll() is None
        after = memory(server.pid) if alive else 0
        last = httpx2.post(url + GOOD[0][0], json=CHAT, trust_env=False, timeout=60)
    finally:
        server.kill()
    crashes = (0 if alive else 1) + (ROOT / "bench" / "results" / ".soak.err").read_text().count(
        "Traceback"
    )
    (ROOT / "bench" / "results" / ".soak.err").unlink()
    fives = sum(n for status, n in seen["malformed"].items() if status.startswith("5"))
    result = {
        "seconds": seconds,
        "crashes": crashes,
        "rss_kb": [before, after],
        "growth": round(after / before - 1, 4),
        "malformed": dict(sorted(seen["malformed"].items())),
        "status_5xx": fives,
        "slow": dict(seen["slow"]),
        "connections": {k: v for k, v in seen["connections"].items() if k != "open"},
        "honest": dict(seen["honest"]),
        "right_afterwards": last.json()["choices"][0]["message"]["content"] == want,
    }
    (ROOT / "bench" / "results" / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(
        crashes > 0
        or fives > 0
        or result["growth"] > 0.1
        or seen["honest"]["wrong"] > 0
        or not result["right_afterwards"]
    )


if __name__ == "__main__":
    main()
