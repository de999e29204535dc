"""Tables from the result lines: bench/results/real.json, and Markdown for docs/results.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from bench.real.train import LATER

Line = Mapping[str, Any]
DRAWS = 2000
CROSS = "cross-entropy"
AS_DEAR = 1.15  # cross-entropy counts as equally dear up to this multiple of the CPU time
SETTINGS = (
    "method",
    "languages",
    "kilobytes",
    "passes",
    "rate",
    "share",
    "student",
    "more",
    "end",
    "arithmetic",
    "part",
    *LATER,
)


def group(line: Line) -> tuple[Any, ...]:
    """Return the settings of a run without its seed."""
    values = (line.get(name, LATER.get(name)) for name in SETTINGS)
    return tuple(tuple(v) if isinstance(v, list) else v for v in values)


def table(lines: Sequence[Line], blocks: Sequence[int]) -> np.ndarray:
    """Return (bits, bytes) by seed, language and block, [seeds, languages, blocks, 2]."""
    at = {block: k for k, block in enumerate(blocks)}
    lines = sorted(lines, key=lambda line: int(line["seed"]))
    out = np.zeros((len(lines), len(lines[0]["languages"]), len(blocks), 2))
    for s, line in enumerate(lines):
        for k, language in enumerate(lines[0]["languages"]):
            for block, found, _, size in line["measured"][language]["texts"]:
                out[s, k, at[block]] += (found, size)
    return out


def difference(left: Sequence[Line], right: Sequence[Line]) -> tuple[float, float, float]:
    """Return left minus right in bits per byte, the mean of the languages, with a 95 % interval.

    Paired bootstrap over blocks of text, the same blocks in every language, and over the seeds,
    which both sides share.
    """
    blocks = sorted(
        {
            text[0]
            for line in (*left, *right)
            for one in line["languages"]
            for text in line["measured"][one]["texts"]
        }
    )
    one, other = table(left, blocks), table(right, blocks)
    rng = np.random.default_rng(0)

    def bits(side: np.ndarray, seeds: np.ndarray, at: np.ndarray) -> float:
        sums = side[seeds][:, :, at].sum((0, 2))  # [languages, 2]
        return float((sums[:, 0] / np.maximum(sums[:, 1], 1)).mean())

    def minus(seeds: np.ndarray, at: np.ndarray) -> float:
        return bits(one, seeds, at) - bits(other, seeds, at)

    spread = [
        minus(rng.integers(0, len(one), len(one)), rng.integers(0, len(blocks), len(blocks)))
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(spread, [0.025, 0.975])
    found = minus(np.arange(len(one)), np.arange(len(blocks)))
    return round(found, 4), round(float(low), 4), round(float(high), 4)


def rows(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Return one row for each setting: means over its seeds, and what it gained.

    `gap` is the share of the difference between the student before training and the teacher.
    `beside_cross_entropy` compares with cross-entropy of the same student, text, passes and seeds;
    `reached_at` is the share of the steps after which dev has that run's last value.
    `equal_cpu` and `with_capture` compare with the best cross-entropy, of any student, that takes
    no more CPU time than the row's training, without and with the teacher's capture and targets.
    """
    groups: dict[tuple[Any, ...], list[Line]] = defaultdict(list)
    for line in lines:
        groups[group(line)].append(line)
    ends = {
        (line["method"], tuple(line["languages"]), line["part"]): line
        for line in lines
        if line["method"] in ("none", "teacher") and line["student"] == "plain"
    }
    out = []
    for settings, some in groups.items():
        value = dict(zip(SETTINGS, settings, strict=True))
        if value["method"] in ("none", "teacher") and value["student"] == "plain":
            continue
        row = value | {
            "seeds": sorted(line["seed"] for line in some),
            "mean": round(float(np.mean([line["mean"] for line in some])), 4),
            "half_range": round(float(np.ptp([line["mean"] for line in some])) / 2, 4),
            "steps": some[0].get("steps"),
            "tokens": some[0].get("tokens"),
            "cpu_seconds": round(float(np.mean([line.get("cpu_seconds", 0) for line in some]))),
            "languages_bits": {
                one: round(float(np.mean([x["measured"][one]["bits_per_byte"] for x in some])), 4)
                for one in value["languages"]
            },
        }
        where = (value["languages"], value["part"])
        if ("none", *where) in ends and ("teacher", *where) in ends:
            base, top = ends["none", *where], ends["teacher", *where]
            row["gap"] = round((base["mean"] - row["mean"]) / (base["mean"] - top["mean"]), 3)
            row["english_lost"] = round(
                float(np.mean([line["english"] for line in some])) - base["english"], 4
            )
        row["beside_cross_entropy"] = beside(value, some, groups)
        if row["beside_cross_entropy"] is not None:
            row["reached_at"] = reached(value, some, groups)
        trained = float(np.mean([line.get("cpu_seconds", 0) for line in some]))
        bills = {"equal_cpu": trained}
        if all("capture_seconds" in line for line in some):
            extra = some[-1]["capture_seconds"] + some[-1]["targets_seconds"]
            row["capture_seconds"] = round(extra)
            bills["with_capture"] = trained + extra
        if "bytes_each" in some[0]:
            row["bytes_each"] = round(some[0]["bytes_each"], 1)
        for name, bill in bills.items():
            found = beside_as_dear(value, some, groups, bill)
            row |= {name: found} if found else {}
        out.append(row)
    return sorted(out, key=lambda row: (row["part"], len(row["languages"]), row["mean"]))


def same_cross_entropy(
    value: Mapping[str, Any], groups: Mapping[tuple[Any, ...], Sequence[Line]]
) -> Sequence[Line]:
    """Return cross-entropy with the same student, text and passes; of several rates the best."""
    free = ("method", "share", "end", "rate", "new_rows", "temperature", "entries")
    found = [
        lines
        for settings, lines in groups.items()
        if (other := dict(zip(SETTINGS, settings, strict=True)))["method"] == CROSS
        and all(other[k] == value[k] for k in SETTINGS if k not in free)
    ]
    return min(found, key=lambda lines: float(np.mean([x["mean"] for x in lines])), default=())


def shared_seeds(
    left: Sequence[Line], right: Sequence[Line]
) -> tuple[Sequence[Line], Sequence[Line]]:
    """Return both sides' runs of the seeds that both have."""
    seeds = {x["seed"] for x in left} & {x["seed"] for x in right}
    mine, theirs = ([x for x in side if x["seed"] in seeds] for side in (left, right))
    return mine, theirs


def beside(
    value: Mapping[str, Any],
    some: Sequence[Line],
    groups: Mapping[tuple[Any, ...], Sequence[Line]],
) -> list[float] | None:
    """Return the difference to cross-entropy with the same student, text, passes and seeds."""
    mine, theirs = shared_seeds(some, same_cross_entropy(value, groups))
    return None if value["method"] == CROSS or not mine else list(difference(mine, theirs))


def beside_as_dear(
    value: Mapping[str, Any],
    some: Sequence[Line],
    groups: Mapping[tuple[Any, ...], Sequence[Line]],
    bill: float,
) -> dict[str, Any]:
    """Compare with the best cross-entropy on the same text that takes no more CPU time."""
    others = []
    for settings, lines in groups.items():
        other = dict(zip(SETTINGS, settings, strict=True))
        keys = ("languages", "kilobytes", "part", "replay", "arithmetic")
        same = all(other[k] == value[k] for k in keys)
        kind = (other["method"], other["student"].split()[0] == "pruned")
        mine, _ = shared_seeds(some, lines)
        theirs = float(np.mean([x.get("cpu_seconds", 0) for x in lines]))
        is_as_dear = 0 < theirs <= AS_DEAR * bill
        if same and kind == (CROSS, value["student"].split()[0] == "pruned") and mine:
            others += [lines] if is_as_dear else []
    if not others or value["method"] == CROSS:
        return {}
    # the more seeds both share the better, then the fewer bits
    best = min(
        others,
        key=lambda lines: (
            -len(shared_seeds(some, lines)[0]),
            float(np.mean([x["mean"] for x in lines])),
        ),
    )
    mine, theirs = shared_seeds(some, best)
    return {
        "minus_cross_entropy": list(difference(mine, theirs)),
        "bill": round(bill),
        "its_cpu_seconds": round(float(np.mean([x["cpu_seconds"] for x in theirs]))),
        "its_student": theirs[0]["student"],
        "its_passes": theirs[0]["passes"],
        "seeds": len(mine),
    }


def reached(
    value: Mapping[str, Any],
    some: Sequence[Line],
    groups: Mapping[tuple[Any, ...], Sequence[Line]],
) -> float | None:
    """Return the mean share of the steps after which the runs are as good as cross-entropy."""
    mine, theirs = shared_seeds(some, same_cross_entropy(value, groups))
    goals = {x["seed"]: last_on_dev(x) for x in theirs}
    found = [reached_at(x, goals[x["seed"]]) for x in mine]
    return round(float(np.mean([x for x in found if x])), 2) if found and all(found) else None


def last_on_dev(line: Line) -> float:
    return float(line["mean"] if line["part"] == "dev" else line["curve"][-1][-1])


def reached_at(line: Line, goal: float) -> float | None:
    """Return the share of the steps at which dev falls to a goal, by linear interpolation."""
    points = [(p[0], p[4]) for p in line["curve"]]
    if line["part"] == "dev":
        points.append((line["steps"], line["mean"]))
    if points[0][1] <= goal:
        return float(points[0][0] / line["steps"])
    for (a, high), (b, low) in pairwise(points):
        if low <= goal <= high:
            part = (high - goal) / max(high - low, 1e-9)
            return float((a + part * (b - a)) / line["steps"])
    return None


def summary(lines: Sequence[Line]) -> dict[str, Any]:
    """Return the content of bench/results/real.json."""
    ends = {
        f"{line['method']} {' '.join(line['languages'])} {line['part']}": {
            one: found["bits_per_byte"] for one, found in line["measured"].items()
        }
        for line in lines
        if line["method"] in ("none", "teacher") and line["student"] == "plain"
    }
    machines = sorted({line["made_by"]["machine"] for line in lines})
    return {
        "made_by": lines[-1]["made_by"] | {"machine": "; ".join(machines)},
        "ends": ends,
        "rows": rows(lines),
    }


def markdown(found: Mapping[str, Any], part: str) -> str:
    """Return a table for docs/results.md."""
    head = (
        "| loss | student | settings | seeds | bits per byte "
        "| minus cross-entropy, same student | minus cross-entropy, equal CPU "
        "| gap closed | English | CPU s |\n|" + " --- |" * 10 + "\n"
    )
    lines = []
    for row in found["rows"]:
        if row["part"] != part:
            continue
        billed = row.get("with_capture", {})
        cost = f"{row['cpu_seconds']}"
        if "capture_seconds" in row:
            cost += f" + {row['capture_seconds']}"
        lines.append(
            f"| {row['method']} | {row['student']} | {others(row)} | {len(row['seeds'])} "
            f"| {row['mean']:.3f} | {shown(row['beside_cross_entropy'])} "
            f"| {shown(billed.get('minus_cross_entropy'))} "
            f"| {row.get('gap', 0):.0%} | {row.get('english_lost', 0):+.3f} | {cost} |"
        )
    return head + "\n".join(lines) + "\n"


def others(row: Mapping[str, Any]) -> str:
    """Return the settings of a row that are not at rest."""
    rest = {"share": 0.7, "end": "text", "arithmetic": "half", **LATER}
    more = f" + {row['more']} kB of Gemma's" if row["more"] else ""
    out = [f"{row['kilobytes']} kB x {row['passes']:g}{more}", f"rate {row['rate']:g}"]
    for name, usual in rest.items():
        if row[name] != usual:
            out.append(f"{name.replace('_', ' ')} {row[name]}")
    return ", ".join(out)


def shown(gain: Sequence[float] | None) -> str:
    return "" if gain is None else f"{gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]"
