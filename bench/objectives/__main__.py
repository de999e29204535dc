"""python -m bench.objectives STAGE... [--size xs] [--cache FOLDER] [--results FILE]: see the package's docstring."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.objectives.arms import Arm, World, read, run_all, teachers_measured
from bench.objectives.models import SIZES

RESULTS = Path(__file__).resolve().parent.parent / "results"
RATES, SHARES, SEEDS = (2e-3, 4e-3, 8e-3), (0.3, 0.5, 0.7, 0.9), (1, 2, 3)
ROWS = {"events": "sampled .01"}  # what persea keeps of a teacher; baselines see whole rows
SEARCHED = ("events", "strict", "strict everywhere", "uld", "bpm", "chunk")
KINDS = ("full", "sampled .05", "sampled .2", "top-k 16", "top-k 4", "top-k 16 renormalised", "top-k 4 renormalised")


def rows_of(method: str) -> str:
    return "none" if method in ("cross-entropy", "sft") else ROWS.get(method, "full")


def best(world: World, results: Path, arms: Sequence[Arm]) -> Arm:
    """The arm with the fewest bits on dev."""
    lines = run_all(world, arms, results)
    return arms[min(range(len(arms)), key=lambda k: lines[k]["mean"])]


def rate(world: World, results: Path, method: str = "cross-entropy") -> float:
    return best(world, results, [Arm(method, rows_of(method), 0.7 if method == "events" else 0.0, r, "unlimited", 0, 0.5, "dev") for r in RATES]).rate


def share(world: World, results: Path, method: str) -> float:
    if method not in SEARCHED:
        return 0.0
    lr = rate(world, results)
    return best(world, results, [Arm(method, rows_of(method), s, lr, "unlimited", 0, 0.5, "dev") for s in SHARES]).share


def arm(world: World, results: Path, method: str, seed: int, regime: str = "unlimited", length: float = 1.0, rows: str | None = None) -> Arm:
    return Arm(method, rows or rows_of(method), share(world, results, method), rate(world, results), regime, seed, length)


def stage(name: str, world: World, results: Path) -> None:
    def go(method: str, seed: int, regime: str = "unlimited", length: float = 1.0, rows: str | None = None) -> None:
        run_all(world, [arm(world, results, method, seed, regime, length, rows)], results)

    if name == "teachers":
        world.grow()
        (RESULTS / f"objectives_teachers_{world.size.name}.json").write_text(json.dumps(teachers_measured(world), indent=1) + "\n")
    elif name == "rates":
        print("learning rate:", {m: rate(world, results, m) for m in ("cross-entropy", "events")}, flush=True)
    elif name == "first":
        for seed in SEEDS:
            for method in ("cross-entropy", "events", "strict", "strict everywhere", "bpm", "uld", "chunk"):
                go(method, seed)
    elif name == "limited":
        for seed in SEEDS:
            for method in ("cross-entropy", "events"):
                go(method, seed, "limited")
    elif name == "sft":
        for seed in SEEDS:
            go("sft", seed)
    elif name == "rows":
        for kind in KINDS:
            go("events", SEEDS[0], rows=kind)
    elif name == "long":
        for length in (2.0, 4.0):
            for regime in ("unlimited", "limited"):
                go("cross-entropy", SEEDS[0], regime, length)
    else:
        raise SystemExit(f"no stage {name}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.objectives")
    parser.add_argument("stages", nargs="*", default=["teachers", "rates", "first", "limited", "sft", "rows", "long"])
    parser.add_argument("--size", choices=SIZES, default="xs")
    parser.add_argument("--cache", type=Path, default=Path(os.environ.get("PERSEA_HOME", "~/.cache/persea")).expanduser() / "objectives")
    parser.add_argument("--results", type=Path, default=RESULTS / "objectives.jsonl")
    said = parser.parse_args()
    torch.set_num_threads(1)
    world = World(SIZES[said.size], said.cache / said.size)
    for name in said.stages:
        stage(name, world, said.results)
    print(len(read(said.results)), "lines in", said.results)


if __name__ == "__main__":
    main()
