"""python -m bench.objectives STAGE... [--size xs] [--cache FOLDER] [--results FILE]."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.objectives import report as tables
from bench.objectives.arms import Arm, World, read, run_all, teachers_measured
from bench.objectives.chunks import CHUNKED
from bench.objectives.data import SCRIPTS
from bench.objectives.gradients import measured
from bench.objectives.models import SIZES
from bench.objectives.onpolicy import ON, More
from bench.objectives.onpolicy import run_all as gone_on
from bench.objectives.report import Line

RESULTS = Path(__file__).resolve().parent.parent / "results"
RATES, SHARES, SEEDS = (2e-3, 4e-3, 8e-3, 1.6e-2), (0.3, 0.5, 0.7, 0.9), (1, 2, 3)
MORE_RATES = {
    "text": (1e-3, 3e-3, 6e-3),
    "own": (3e-4, 1e-3, 3e-3),
}  # learning rates of a continued student
OURS = "sampled .01"  # persea's sampled distributions; baselines get whole ones
SEARCHED = ("events", "strict", "bpm", "chunk")
STAGES = (
    "teachers",
    "rates",
    "first",
    "shares",
    "again",
    "limited",
    "gradients",
    "sft",
    "rows",
    "long",
    "gold",
    "onpolicy",
)  # of size xs
INSIDE = "events + completion"
SCRIPT_METHODS = (
    "cross-entropy",
    "events",
    INSIDE,
    "strict everywhere",
    "events + masks",
    "events + masks + completion",
)
KINDS = (
    "full",
    "sampled .05",
    "sampled .2",
    "top-k 16",
    "top-k 4",
    "top-k 16 renormalised",
    "top-k 4 renormalised",
)


def rows_of(method: str) -> str:
    return (
        "none"
        if method in ("cross-entropy", "sft")
        else OURS
        if method.startswith("events")
        else "full"
    )


def best(world: World, results: Path, arms: Sequence[Arm]) -> Arm:
    """Return the arm with the fewest bits on dev."""
    lines = run_all(world, arms, results)
    return arms[min(range(len(arms)), key=lambda k: lines[k]["mean"])]


def rate(
    world: World, results: Path, method: str = "cross-entropy", rates: Sequence[float] = RATES
) -> float:
    if world.size.met:
        return rate(World(SIZES[world.size.of], world.folder), results)
    share = 0.7 if method == "events" else 0.0
    # The best rate of xs is .008, that of xs-wide .004 or .002 (.0007 apart): the widest, whose
    # runs take minutes, is searched at the two lowest only.
    rates = (
        rates[1:]
        if world.size.teaches is SCRIPTS
        else rates[:2]
        if world.size.name == "xs-wider"
        else rates
    )
    return best(
        world,
        results,
        [Arm(method, rows_of(method), share, r, "unlimited", 0, 0.5, "dev") for r in rates],
    ).rate


def share(world: World, results: Path, method: str) -> float:
    """Return the share found on dev.

    'strict everywhere' uses strict's share, all forms of events that of events, students of other
    sizes that of xs.
    """
    if world.size.of or world.size.teaches is SCRIPTS:
        of = world.size.of or "xs"
        return share(World(SIZES[of], world.folder.parent / of), results, method)
    method = (
        "strict"
        if method == "strict everywhere"
        else "events"
        if method.startswith("events")
        else method
    )
    if method in ("gold", "uld"):
        # A search costs too much: TRL's loops take a second per step, and sorting two vocabularies
        # takes six times as long as cross-entropy.
        return {"gold": 0.5, "uld": 0.3}[method]
    if method not in SEARCHED:
        return 0.0
    lr = rate(world, results)
    return best(
        world,
        results,
        [Arm(method, rows_of(method), s, lr, "unlimited", 0, 0.3, "dev") for s in SHARES],
    ).share


def arm(
    world: World,
    results: Path,
    method: str,
    seed: int,
    regime: str = "unlimited",
    length: float = 1.0,
    rows: str | None = None,
) -> Arm:
    return Arm(
        method,
        rows or rows_of(method),
        share(world, results, method),
        rate(world, results),
        regime,
        seed,
        length,
    )


def stage(name: str, world: World, results: Path, seeds: Sequence[int]) -> None:
    def go(
        method: str,
        seed: int,
        regime: str = "unlimited",
        length: float = 1.0,
        rows: str | None = None,
    ) -> None:
        run_all(world, [arm(world, results, method, seed, regime, length, rows)], results)

    if name == "teachers":
        world.grow()
        (results.parent / f"objectives_teachers_{world.size.name}.json").write_text(
            json.dumps(teachers_measured(world), indent=1) + "\n"
        )
    elif name == "rates":
        print(
            "learning rate:",
            rate(world, results),
            "for cross-entropy; for events",
            rate(world, results, "events", RATES[1:]),
            flush=True,
        )
    elif name == "first":
        for seed in seeds:
            for method in (
                "cross-entropy",
                "events",
                "strict",
                "bpm",
                "strict everywhere",
                "chunk",
                "uld",
            ):
                go(method, seed)
    elif name == "shares":
        # The searches are short; the best share at length 1 (dev is the curve's last point) may be
        # another one.
        others = (
            ("events", OURS, 0.9),
            ("events", "full", 0.7),
            ("events", "full", 0.9),
            ("events + masks", OURS, 0.9),
            ("strict everywhere", "full", 0.7),
        )
        for seed in seeds:
            for method, rows, value in others:
                run_all(
                    world,
                    [replace(arm(world, results, method, seed), rows=rows, share=value)],
                    results,
                )
    elif name == "again":
        for seed in seeds:
            for method in (
                "cross-entropy",
                "events",
                "events + masks",
                "events + masks + completion",
                "strict everywhere",
                "strict",
            ):
                go(method, seed)
    elif name == "limited":
        for seed in seeds:
            for method in (
                "cross-entropy",
                "events",
                "events + masks",
                "events + masks + completion",
                *CHUNKED,
            ):
                go(method, seed, "limited")
    elif name == "gradients":
        students = {"untrained": None} | {
            f"after {m}": arm(world, results, m, SEEDS[0]) for m in ("cross-entropy", "events")
        }
        (results.parent / f"objectives_gradients_{world.size.name}.json").write_text(
            json.dumps(measured(world, students), indent=1) + "\n"
        )
    elif name == "sft":
        for seed in seeds:
            go("sft", seed)
    elif name == "rows":
        for seed in seeds:
            for kind in KINDS:
                go("events", seed, rows=kind)
    elif name == "long":
        for seed in seeds:
            for regime, length in (
                ("unlimited", 2.0),
                ("unlimited", 4.0),
                ("unlimited", 6.0),
                ("limited", 2.0),
                ("limited", 4.0),
            ):
                go("cross-entropy", seed, regime, length)
            go("events", seed, length=2.0)
    elif name == "larger":
        for seed in seeds:
            for method in tables.LARGER:
                go(method, seed)
            for length in (2.0, 4.0):
                go("cross-entropy", seed, length=length)
    elif name == "gold":
        # TRL's loops take nearly a second per step: whole runs, and one as long as a search, which
        # its figures are shown beside.
        for seed in seeds:
            go("gold", seed)
        lr = rate(world, results)
        for method in ("gold", "cross-entropy"):
            run_all(
                world,
                [
                    Arm(
                        method,
                        rows_of(method),
                        share(world, results, method),
                        lr,
                        "unlimited",
                        0,
                        0.3,
                        "dev",
                    )
                ],
                results,
            )
    elif name == "scripts":  # --size scripts
        for seed in seeds:
            for method in SCRIPT_METHODS:
                go(method, seed)
        go("cross-entropy", SEEDS[0], length=2.0)
    elif name == "extension":
        # --size scripts-met, then its extended sizes: the same text for each, and the plain one
        # also with the CPU time of the extended.
        for seed in seeds:
            for method in (
                "cross-entropy",
                "events",
                *(
                    ()
                    if world.size.extended
                    else (INSIDE, "events + masks", "events + masks + completion")
                ),
            ):
                go(method, seed)
        go("cross-entropy", SEEDS[0], length=0.0)
        if not world.size.extended:
            go("cross-entropy", SEEDS[0], length=0.5)
    elif name == "onpolicy":  # its measures differ, so it has its own result file
        arm0, own = (
            arm(world, results, "events", 0),
            results.with_name(f"{results.stem}_onpolicy.jsonl"),
        )
        told_by = {
            "text": lambda line: line["mean"],
            "own": lambda line: line["taught"] - line["self"],
        }
        tops = {
            on: min(
                gone_on(world, arm0, [More(on, top, 0, "dev") for top in rates], own),
                key=told_by[on],
            )["rate"]
            for on, rates in MORE_RATES.items()
        }
        gone_on(
            world,
            arm0,
            [
                More(on, tops["text" if on in ("none", "text") else "own"], seed)
                for seed in seeds
                for on in ON
            ],
            own,
        )
    elif name == "report":
        report(list(read(results).values()), world.size.name)
    else:
        raise SystemExit(f"no stage {name}")


def report(lines: Sequence[Line], size: str) -> None:
    """Write the tables and charts of docs/results.md."""
    docs = RESULTS.parent.parent / "docs"
    shapes = {
        n: f"{s.student.layers} layers, width {s.student.hidden}"
        for n, s in SIZES.items()
        if size in (n, s.of)
    }
    found = tables.runs_by_label(lines, size=size, regime="unlimited", length=1.0)
    plain = found["cross-entropy"]

    def form(method: str) -> str:
        """Return the method's label with the share that has the most seeds."""
        return max(
            (n for n in found if n.startswith(f"{method}, {OURS}")), key=lambda n: len(found[n])
        )

    tables.write_tables(
        docs / "results.md",
        {
            "teachers": tables.teachers_table(
                json.loads((RESULTS / f"objectives_teachers_{size}.json").read_text())
            ),
            "unlimited": tables.main_table(lines, size, "unlimited"),
            "pairs": tables.pairwise_table(lines, size, form("events")),
            "masks": tables.pairwise_table(lines, size, form("events + masks")),
            "limited": tables.main_table(lines, size, "limited"),
            "shortcut": tables.equal_quality_table(lines, size),
            "gradients": tables.gradients_table(
                json.loads((RESULTS / f"objectives_gradients_{size}.json").read_text())
            ),
            "larger": tables.larger_table(lines, shapes),
            "scripts": tables.main_table(lines, "scripts", "unlimited"),
            "scripts-pairs": tables.pairwise_table(
                lines, "scripts", f"{tables.method_name(INSIDE)}, {OURS}"
            ),
            "scripts-teachers": tables.teachers_table(
                json.loads((RESULTS / "objectives_teachers_scripts.json").read_text())
            ),
            "scripts-searches": tables.searches_table(lines, "scripts"),
            "extension": tables.extension_table(
                lines, {n: str(s.extended) for n, s in SIZES.items() if s.met}
            ),
            "onpolicy": tables.onpolicy_table(
                [
                    x
                    for x in read(RESULTS / "objectives_onpolicy.jsonl").values()
                    if json.loads(x["key"])["size"] == size
                ]
            ),
            "searches": tables.searches_table(lines, size),
        },
    )
    gaps = [
        (
            name,
            *tables.compare_paired_results(
                own, [x for x in plain if x["seed"] in {y["seed"] for y in own}]
            )["mean"],
        )
        for name, own in found.items()
        if name != "cross-entropy"
    ]
    (docs / "img").mkdir(exist_ok=True)
    (docs / "img" / "objectives.svg").write_text(
        tables.dot_plot(
            "bits per byte minus cross-entropy (95 % over pages)", sorted(gaps, key=lambda g: g[1])
        )
    )
    others = {name for name in found if name.startswith("events, ") or "partial tokens" in name} - {
        form("events")
    }
    drawn = {
        name: own[0]["curve"]
        for name, own in found.items()
        if own[0]["seed"] == SEEDS[0] and name not in others
    }
    (docs / "img" / "objectives_curves.svg").write_text(
        tables.line_chart("dev bits per byte against tokens, seed 1, one schedule each", drawn)
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.objectives")
    parser.add_argument("stages", nargs="*", default=STAGES)
    parser.add_argument("--size", choices=SIZES, default="xs")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(os.environ.get("PERSEA_HOME", "~/.cache/persea")).expanduser() / "objectives",
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "objectives.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = World(SIZES[options.size], options.cache / (SIZES[options.size].of or options.size))
    for name in options.stages:
        stage(name, world, options.results, options.seeds)
    print(len(read(options.results)), "lines in", options.results)


if __name__ == "__main__":
    main()
