"""Kill a training run at named and random points and check that the student's bytes are equal.

    python bench/chaos_train.py [random kills] [seed] [part ...]        (make chaos)

A tiny recipe on the bundled saplings is captured once; every training run is its own process and
starts from that capture.

- points: SIGKILL at each of POINTS, then the same command again; the student's sha256 must be that
  of an uninterrupted run. Every injector leaves a note that it fired.
- random: SIGKILL at random moments until the run is complete.
- two: two processes. Their launcher is killed: no process may be left, and the same command must
  end with the bytes of two uninterrupted processes. A rank is stopped (SIGSTOP): the error must
  name it within 60 s.
- torchrun: PyTorch's launcher; the losses must be those of one process.

Parts: offline, on-policy, two, torchrun. Parts that are not named keep their figures. Writes
bench/results/chaos-train.json as it goes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from persea import storage as store  # noqa: E402
from tests.cli.test_cli import Started, enter, flowed, flowed_copy, start, warm  # noqa: E402
from tests.disks import Watched  # noqa: E402

MODES: dict[str, tuple[str, ...]] = {  # extra arguments of each mode
    "offline": (),
    "on-policy": (
        "--set",
        "training.on_policy={start_step: 2, share: 1.0, rollouts: 8, max_staleness_steps: 2, "
        "max_new_tokens: 16}",
    ),
}  # a round is two steps


@dataclass(frozen=True)
class Point:
    """Where to die: before or after the n-th operation of a kind on a file with this name
    suffix.
    """

    call: str
    name: str
    after: bool = False
    n: int = 1


POINTS = {
    "gradients are there, the step is not made": Point("clip", "", after=True, n=5),
    "the step is made, nothing is saved": Point("step", "", after=True, n=4),
    "the state's file is made": Point("create", "step-00000006.pt", after=True),
    "the state is half written": Point("write", "step-00000006.pt", n=2),
    "the state is written, not synced": Point("sync", "step-00000006.pt"),
    "the state is synced, not named": Point("replace", "step-00000006.pt"),
    "the state is named, its folder not synced": Point("replace", "step-00000006.pt", after=True),
    "its metrics are named": Point("replace", "step-00000006.jsonl", after=True),
    "metrics.jsonl has a new line, the checkpoint not": Point("sync", "metrics.jsonl", n=2),
    "the record is synced, not named": Point("replace", "step-00000006.json"),
    "the record is named, its folder not synced": Point(
        "replace", "step-00000006.json", after=True
    ),
    "an old record is removed, its state is not": Point("remove", "step-00000003.json", after=True),
    "the dataset is reported, the student is not saved": Point(
        "replace", "dataset.json", after=True
    ),
    "the student is saved, the stage's record is not": Point("create", "done.json"),
    "the stage's record is synced, not named": Point("replace", "done.json"),
}


def die(point: Point, note: Path) -> None:
    """Leave a note, then SIGKILL this process."""
    note.write_text(f"{point}")
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly(Watched):
    """A disk that kills its process at a point."""

    def __init__(self, point: Point, note: Path) -> None:
        self.point, self.note, self.seen = point, note, 0

    def _here(self, what: tuple[Any, ...]) -> bool:
        name = Path(str(what[1])).name.removeprefix(".").removesuffix(f".{os.getpid()}.tmp")
        return bool(what[0] == self.point.call and name == self.point.name)

    def step(self, *what: Any) -> None:
        self.seen += self._here(what)
        if self._here(what) and self.seen == self.point.n and not self.point.after:
            die(self.point, self.note)

    def done(self, *what: Any) -> None:
        if self._here(what) and self.seen == self.point.n and self.point.after:
            die(self.point, self.note)


def doomed(point: Point, note: Path, arguments: tuple[str, ...], folder: Path, log: Path) -> None:
    """Run the command line in a child process that dies at a point."""
    import torch

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        calls = [0]

        def call(*args: Any, **named: Any) -> Any:
            value = real(*args, **named)
            calls[0] += 1
            if calls[0] == point.n:
                die(point, note)
            return value

        return call

    if point.call == "clip":
        torch.nn.utils.clip_grad_norm_ = counted(torch.nn.utils.clip_grad_norm_)
    elif point.call == "step":
        torch.optim.AdamW.step = counted(torch.optim.AdamW.step)  # type: ignore[method-assign]
    else:
        store.DISK = Deadly(point, note)
    enter(arguments, folder, log)


def begin(place: Path, name: str) -> Path:
    """Return a folder with the recipe and its capture."""
    (place / name).mkdir()
    return flowed_copy(place / name, "check", "audition", "capture")


def arguments(mode: str, *more: str) -> tuple[str, ...]:
    return ("train", "tiny.yaml", "--out", "run", *MODES[mode], *more)


def finish(folder: Path, *command: str) -> str:
    """Train to the end; return the sha256 of the student's weights."""
    ended = start(*command, folder=folder).wait()
    if ended.code:
        raise SystemExit(f"training ended with {ended.code}: {ended.err[-2000:]}")
    return store.digest_file(folder / "run" / "train" / "student" / "model.safetensors")


def points(place: Path, mode: str, whole: str) -> dict[str, Any]:
    outcome: dict[str, Any] = {}
    for k, (name, point) in enumerate(POINTS.items()):
        folder, log = begin(place, f"{mode} {k}"), Path(tempfile.mkdtemp())
        note = folder / "fired"
        child = warm().Process(target=doomed, args=(point, note, arguments(mode), folder, log))
        child.start()
        child.join()
        fired = child.exitcode == -signal.SIGKILL and note.is_file()
        outcome[name] = {
            "fired": fired,
            "equal": fired and finish(folder, *arguments(mode)) == whole,
        }
        print(f"{mode} {k + 1}/{len(POINTS)} {name}: {outcome[name]}", flush=True)
        shutil.rmtree(folder)
    return outcome


def at_random(place: Path, mode: str, whole: str, kills: int, rng: random.Random) -> dict[str, Any]:
    folder, count, length = begin(place, f"{mode} random"), 0, 0.0
    clock = time.monotonic()
    running = start(*arguments(mode), folder=folder)
    running.signal_when(
        "train  12%", signal.SIGKILL
    )  # the first run shows how long the first step takes
    running.wait()
    count, length = 1, time.monotonic() - clock
    while count < kills:
        running = start(*arguments(mode), folder=folder)
        time.sleep(rng.uniform(0.3, 1.6) * length)
        if running.process.is_alive():
            running.process.kill()
        ended = running.wait()
        count += ended.code == -signal.SIGKILL
        if ended.code == 0:
            (folder / "run" / "train" / "done.json").unlink()
            for path in (folder / "run" / "train" / "checkpoints").glob("step-00000008.*"):
                path.unlink()
    return {"kills": count, "equal": finish(folder, *arguments(mode)) == whole}


def below(pid: int) -> list[int]:
    """Return the descendants of a process, from the parent ids in /proc."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, todo = [], [pid]
    while todo:
        mine = parents.get(todo.pop(), [])
        found += mine
        todo += mine
    return found


def until(running: Started, words: str) -> list[int]:
    """Wait for this text in the output; return the pids of the ranks in their start order."""
    end = time.monotonic() + 300
    while words not in running.err():
        if not running.process.is_alive() or time.monotonic() > end:
            raise SystemExit(f"{words!r} never appeared: {running.err()}")
        time.sleep(0.05)
    assert running.process.pid
    servers = [
        pid
        for pid in below(running.process.pid)
        if "forkserver" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    return sorted(pid for pid in servers if below(pid) == [] and pid != min(servers))


def two(place: Path, mode: str) -> dict[str, Any]:
    command = arguments(mode, "--procs", "2", "--set", "training.steps=160")
    whole = finish(begin(place, "two whole"), *command)
    folder = begin(place, "two killed")
    running = start(*command, folder=folder)
    ranks = until(running, "loss")
    running.process.kill()
    running.wait()
    time.sleep(5)
    left = [
        pid
        for pid in ranks
        if Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()
    ]
    running = start(*command, folder=folder)
    ranks = until(running, "loss")
    os.kill(ranks[1], signal.SIGSTOP)
    clock = time.monotonic()
    ended = running.wait()
    outcome = {
        "ranks": len(ranks),
        "orphans": len(left),
        "hung": {
            "seconds": round(time.monotonic() - clock, 1),
            "code": ended.code,
            "said": ended.err.splitlines()[-1].replace(f" on {socket.gethostname()}", ""),
        },
    }
    return outcome | {"equal": finish(folder, *command) == whole}


def torchrun(place: Path) -> dict[str, Any]:
    folder = begin(place, "torchrun")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "persea.cli",
        *arguments("offline"),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"torchrun ended with {done.returncode}: {done.stderr[-2000:]}")
    losses = [
        [
            json.loads(line)["loss"]
            for line in (f / "run" / "train" / "metrics.jsonl").read_text().splitlines()
        ]
        for f in (folder, flowed()[0])
    ]
    return {
        "losses": len(losses[0]),
        "largest difference": max(abs(a - b) / b for a, b in zip(*losses, strict=True)),
    }


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    rng = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    parts, where = (
        sys.argv[3:] or [*MODES, "two", "torchrun"],
        ROOT / "bench" / "results" / "chaos-train.json",
    )
    clock, result = (
        time.monotonic(),
        dict[str, Any](json.loads(where.read_text()) if sys.argv[3:] else {}),
    )

    def keep(**part: Any) -> None:
        nonlocal clock
        result.update(part, seconds=result.get("seconds", 0) + round(time.monotonic() - clock))
        clock = time.monotonic()
        where.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(part), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for mode in (m for m in MODES if m in parts):
            whole = finish(begin(place, f"{mode} whole"), *arguments(mode))
            keep(
                **{
                    mode: {
                        "uninterrupted": whole,
                        "points": points(place, mode, whole),
                        "random": at_random(place, mode, whole, kills, rng),
                    }
                }
            )
        if "two" in parts:
            keep(two=two(place, "offline"))
        if "torchrun" in parts:
            keep(torchrun=torchrun(place))
    alike = all(
        result[m]["random"]["equal"]
        and all(p["fired"] and p["equal"] for p in result[m]["points"].values())
        for m in MODES
    )
    both = result["two"]
    sys.exit(
        not (
            alike
            and both["equal"]
            and not both["orphans"]
            and both["hung"]["seconds"] <= 60
            and both["hung"]["code"] == 7
            and result["torchrun"]["largest difference"] < 1e-3
        )
    )


if __name__ == "__main__":
    main()
