"""A capture on a real Ray cluster of two nodes whose parts are killed has a local one's bytes.

    python bench/chaos_ray.py [CASE ...] [--out bench/results/chaos_ray.json]

Needs `pip install 'persea[ray]'`. Cases, each with 12 units of two bundled teachers:

- node: a node is killed in the middle of the capture, and another one joins.
- straggler: a worker is stopped (SIGSTOP); its unit is executed a second time.
- driver: persea itself is killed, and run again.
- rollouts: a training on the student's own answers, which workers sample; a node is killed.

Every case asserts that its fault happened, that units and commit records (or the student's weights)
are those of one process, that each unit was committed once, and that planned = committed +
quarantined + pending in the ledger. About 5 minutes of CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - by default 15: too slow beside others
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
SAPLINGS = ROOT / "saplings"
RECIPE: dict[str, Any] = {
    "name": "chaos",
    "threads": 1,
    "student": {"model": str(SAPLINGS / "llama-sapling")},
    "teachers": [
        {"model": str(SAPLINGS / "qwen-sapling")},
        {"model": str(SAPLINGS / "gemma-sapling")},
    ],
    "corpus": [{"skill": "languages", "generate": 48}, {"skill": "code", "generate": 24}],
    "audition": {
        "pinned": {"languages": "qwen-sapling", "code": "gemma-sapling"},
        "compare_with_base": False,
    },
    "capture": {"max_new_tokens": 32, "prompts_per_unit": 6, "batch_size": 6},
    "training": {
        "steps": 7,
        "batch_size": 4,
        "warmup_steps": 1,
        "on_policy": {
            "start_step": 1,
            "share": 1.0,
            "rollouts": 8,
            "rollouts_per_unit": 2,
            "max_staleness_steps": 2,
            "max_new_tokens": 16,
        },
    },
}


def ports(n: int) -> list[int]:
    """Free ports. Ray waits 15 s for the agents of a node to choose theirs, too short on a busy
    machine; with given ports it does not wait.
    """
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    found = [s.getsockname()[1] for s in sockets]
    for one in sockets:
        one.close()
    return found


def node_options(cpus: int) -> dict[str, Any]:
    agent, export, listen, environment = ports(4)
    return {
        "num_cpus": cpus,
        "object_store_memory": 100 << 20,
        "metrics_agent_port": agent,
        "metrics_export_port": export,
        "dashboard_agent_listen_port": listen,
        "runtime_env_agent_port": environment,
    }


def tree(capture: Path) -> dict[str, bytes]:
    return {
        f"{kind}/{p.name}": p.read_bytes()
        for kind in ("units", "commits")
        for p in (capture / kind).iterdir()
    }


def ledger_lines(run: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(x) for x in (run / "ledger.jsonl").read_bytes().split(b"\n")[:-1]]
    except FileNotFoundError:
        return []


def num_committed(run: Path, stage: str = "capture") -> int:
    return sum((x["event"], x["stage"]) == ("committed", stage) for x in ledger_lines(run))


def summary(sums: Any) -> dict[str, Any]:
    return {
        "units": sums.committed,
        "attempts": sums.num_attempts,
        "lost": sums.num_lost,
        "cancelled_or_failed": sums.num_failed,
        "duplicates": sums.num_duplicates,
        "tokens_kept": sums.tokens_kept,
        "tokens_paid": sums.tokens_paid,
        "attempts_with_unknown_tokens": sums.num_unknown,
    }


class Chaos:
    """A cluster of two nodes, a recipe, and the cache that one process makes of it."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        self.folder = folder
        self.cluster = Cluster(
            initialize_head=True, head_node_args=node_options(1) | {"include_dashboard": False}
        )
        self.node = self.cluster.add_node(**node_options(1))
        self.reference = self.capture("local", ["executor.workers=1"], lambda run: None)

    def recipe(self, name: str) -> Path:
        path = self.folder / name / "chaos.yaml"
        path.parent.mkdir()
        store = {"store": str(self.folder / name / "store")}
        recipe = RECIPE | {"capture": RECIPE["capture"] | store}
        path.write_text(yaml.safe_dump(recipe))
        return path

    @property
    def on_ray(self) -> list[str]:
        return [
            "executor.kind=ray",
            f"executor.address={self.cluster.address}",
            "executor.min_timeout_s=20",
        ]

    def capture(
        self, name: str, overrides: list[str], at_step: Callable[[Path], None]
    ) -> dict[str, bytes]:
        from persea.config.recipe import load_recipe
        from persea.pipeline.run_context import RunContext
        from persea.pipeline.stages import run_pipeline

        path = self.recipe(name)
        run = path.parent / "run"
        context = RunContext(load_recipe(path, overrides), run)
        run_pipeline(context, lambda *ignored: None, "audition")
        run_pipeline(context, lambda *ignored: at_step(run), "capture")
        return tree(run / "capture")

    def node_killed(self) -> dict[str, Any]:
        killed: list[int] = []

        def kill(run: Path) -> None:
            if not killed and num_committed(run) >= 2:
                killed.append(num_committed(run))
                self.cluster.remove_node(self.node, allow_graceful=False)
                self.node = self.cluster.add_node(**node_options(1))

        cache = self.capture("node", self.on_ray, kill)
        assert killed, "the node was not killed"
        return self.account("node", cache) | {"killed_after_units": killed[0]}

    def worker_stopped(self) -> dict[str, Any]:
        import psutil

        stopped: list[int] = []

        def stop(run: Path) -> None:
            if stopped or num_committed(run) < 4:
                return
            for process in psutil.process_iter(["cmdline"]):
                if "ray::ActorWorker" in " ".join(process.info["cmdline"] or ()):
                    stopped.append(process.pid)
                    os.kill(process.pid, signal.SIGSTOP)
                    return

        cache = self.capture("straggler", self.on_ray, stop)
        assert stopped, "no worker was stopped"
        found = self.account("straggler", cache)
        assert found["attempts"] > found["units"], found
        return found

    def driver_killed(self) -> dict[str, Any]:
        path = self.recipe("driver")
        run = path.parent / "run"
        command = [sys.executable, "-m", "persea.cli"]
        sets = [x for override in self.on_ray for x in ("--set", override)]
        options = [str(path), "--out", str(run), *sets]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([*command, "audition", *options], check=True, env=environment)
        driver = subprocess.Popen([*command, "capture", *options], env=environment)
        while num_committed(run) < 3:
            assert driver.poll() is None, "the driver ended before it was killed"
            time.sleep(0.05)
        driver.kill()
        driver.wait()
        before = num_committed(run)
        assert 3 <= before < 12, before
        subprocess.run([*command, "capture", *options], check=True, env=environment)
        return self.account("driver", tree(run / "capture")) | {"killed_after_units": before}

    def rollouts_sampled(self) -> dict[str, Any]:
        """Train on the cluster and in one process, from the same capture."""
        from persea.config.recipe import load_recipe
        from persea.executors.ledger import read_ledger
        from persea.pipeline.run_context import RunContext
        from persea.pipeline.stages import run_pipeline

        path, killed = self.folder / "local" / "chaos.yaml", list[int]()

        def kill(run: Path) -> None:
            if not killed and num_committed(run, "train") >= 5:
                killed.append(num_committed(run, "train"))
                self.cluster.remove_node(self.node, allow_graceful=False)
                self.node = self.cluster.add_node(**node_options(1))

        students = []
        for name, overrides in (("alone", ["executor.workers=1"]), ("fleet", self.on_ray)):
            run = self.folder / name
            shutil.copytree(self.folder / "local" / "run", run)
            context = RunContext(load_recipe(path, overrides), run)
            for stage in ("check", "train"):
                run_pipeline(context, lambda *ignored, run=run: kill(run), stage)
            students.append((run / "train" / "student" / "model.safetensors").read_bytes())
        assert killed, "the node was not killed"
        assert students[0] == students[1], "the students differ"
        assert "train" not in read_ledger(self.folder / "alone")
        sums = read_ledger(run)["train"]
        assert sums.planned == sums.committed == 12, sums
        commits = Counter(
            x["unit"]
            for x in ledger_lines(run)
            if (x["event"], x["stage"]) == ("committed", "train")
        )
        assert set(commits.values()) == {1}, commits
        assert sums.num_attempts == 12 + sums.num_duplicates + sums.num_failed + sums.num_lost
        return summary(sums) | {"student_equal_local": True, "killed_after_units": killed[0]}

    def account(self, name: str, cache: dict[str, bytes]) -> dict[str, Any]:
        from persea.executors.ledger import read_ledger

        assert cache == self.reference, "the caches differ"
        run = self.folder / name / "run"
        sums, local = read_ledger(run)["capture"], read_ledger(self.folder / "local" / "run")
        assert sums.planned == sums.committed + len(sums.quarantined) + sums.pending
        assert (sums.committed, sums.pending, sums.running) == (12, 0, {})
        assert sums.tokens_kept == local["capture"].tokens_kept
        commits = Counter(
            line["unit"]
            for line in ledger_lines(run)
            if line["event"] in ("committed", "reused") and line.get("unit")
        )
        assert set(commits.values()) == {1}, commits
        assert not (run / ".attempts").exists()
        ended = sums.committed + sums.num_duplicates + sums.num_failed + sums.num_lost
        reused = sum(line["event"] == "reused" for line in ledger_lines(run))
        assert sums.num_attempts == ended - reused, sums
        return summary(sums) | {"bytes_equal_local": True}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=["node", "straggler", "driver", "rollouts"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PERSEA_HOME"] = f"{folder}/home"
        chaos = Chaos(Path(folder))
        cases = {
            "node": chaos.node_killed,
            "straggler": chaos.worker_stopped,
            "driver": chaos.driver_killed,
            "rollouts": chaos.rollouts_sampled,
        }
        results = {}
        try:
            for name in options.cases:
                results[name] = cases[name]()
                print(name, json.dumps(results[name]), flush=True)
        finally:
            import ray

            ray.shutdown()
            chaos.cluster.shutdown()
    if options.out:  # cases that were not asked for stay
        kept = json.loads(options.out.read_text()) if options.out.is_file() else {}
        options.out.write_text(json.dumps(kept | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
