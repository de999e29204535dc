"""Tables from the result lines: bench/results/real.json, and Markdown for docs/results.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

Line = Mapping[str, Any]
DRAWS = 2000
# CPU time of a plain run relative to a row's training, without and with the teacher's capture,
# which costs about as much as a training here
EQUAL_CPU = {"equal_cpu": (0.7, 1.5), "with_capture": (1.5, 2.2)}
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
)


def group(line: Line) -> tuple[Any, ...]:
    """Return the settings of a run without its seed."""
    return tuple(tuple(v) if isinstance(v := line[name], list) else v for name in SETTINGS)


def by_block(lines: Sequence[Line]) -> dict[str, dict[int, np.ndarray]]:
    """Return language -> block -> (bits, bytes), the bits as means over the seeds."""
    out: dict[str, dict[int, np.ndarray]] = {}
    for language in lines[0]["languages"]:
        blocks: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(2))
        for line in lines:
            for block, found, _, size in line["measured"][language]["texts"]:
                blocks[block] += np.array([found, size]) / len(lines)
        out[language] = dict(blocks)
    return out


def difference(left: Sequence[Line], right: Sequence[Line]) -> tuple[float, float, float]:
    """Return left minus right in bits per byte, the mean of the languages, with a 95 % interval.

    Paired bootstrap over blocks of text, the same blocks in every language.
    """
    a, b = by_block(left), by_block(right)
    blocks = sorted(set.union(*(set(x) for x in a.values())))
    zero = np.zeros(2)

    def table(side: dict[str, dict[int, np.ndarray]]) -> np.ndarray:
        return np.array([[own.get(k, zero) for k in blocks] for own in side.values()])

    one, other = table(a), table(b)  # [languages, blocks, 2]
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(blocks), (DRAWS, len(blocks)))

    def bits(side: np.ndarray, at: np.ndarray) -> np.ndarray:
        sums = side[:, at].sum(-2)  # [languages, (draws,) 2]
        return (sums[..., 0] / np.maximum(sums[..., 1], 1)).mean(0)

    everything = np.arange(len(blocks))
    found = float(bits(one, everything) - bits(other, everything))
    spread = bits(one, drawn) - bits(other, drawn)
    low, high = np.quantile(spread, [0.025, 0.975])
    return round(found, 4), round(float(low), 4), round(float(high), 4)


def rows(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Return one row for each setting: means over its seeds, and what it gained.

    `gap` is the share of the difference between the student before training and the teacher.
    `beside` compares with the plain cross-entropy that reads the same text with the same seeds.
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
        for name, (low, high) in EQUAL_CPU.items():
            found = beside_plain(value, some, groups, low, high)
            row |= {name: found} if found else {}
        out.append(row)
    return sorted(out, key=lambda row: (row["part"], len(row["languages"]), row["mean"]))


def beside(
    value: Mapping[str, Any],
    some: Sequence[Line],
    groups: Mapping[tuple[Any, ...], Sequence[Line]],
) -> list[float] | None:
    """Return the difference to cross-entropy with the same student, text, passes and seeds."""
    if value["method"] == "cross-entropy":
        return None
    for settings, others in groups.items():
        other = dict(zip(SETTINGS, settings, strict=True))
        same = all(
            other[k] == value[k] for k in SETTINGS if k not in ("method", "share", "end", "rate")
        )
        if other["method"] == "cross-entropy" and same:
            seeds = {x["seed"] for x in some} & {x["seed"] for x in others}
            if seeds:
                mine, theirs = ([x for x in side if x["seed"] in seeds] for side in (some, others))
                return list(difference(mine, theirs))
    return None


def beside_plain(
    value: Mapping[str, Any],
    some: Sequence[Line],
    groups: Mapping[tuple[Any, ...], Sequence[Line]],
    low: float,
    high: float,
) -> dict[str, Any]:
    """Compare with cross-entropy in the student's own vocabulary, at about equal CPU time.

    Of runs on the same text whose CPU time is `low` to `high` of the row's training, the
    best counts.
    `reached_at`: the share of the row's CPU time after which it has that run's last value on dev.
    """
    mine = float(np.mean([x.get("cpu_seconds", 0) for x in some]))
    others = []
    for settings, lines in groups.items():
        other = dict(zip(SETTINGS, settings, strict=True))
        same = all(other[k] == value[k] for k in ("languages", "kilobytes", "part"))
        theirs = float(np.mean([x.get("cpu_seconds", 0) for x in lines]))
        if (
            same
            and mine
            and (other["method"], other["student"]) == ("cross-entropy", "plain")
            and low <= theirs / mine < high
            and settings != tuple(value[k] for k in SETTINGS)
        ):
            others.append(lines)
    if not others or (value["method"], value["student"]) == ("cross-entropy", "plain"):
        return {}
    best = min(others, key=lambda lines: float(np.mean([x["mean"] for x in lines])))
    seeds = {x["seed"] for x in some} & {x["seed"] for x in best}
    if not seeds:
        return {}
    own, other_lines = ([x for x in side if x["seed"] in seeds] for side in (some, best))
    goal = float(np.mean([x["curve"][-1][-1] for x in other_lines]))
    reached = [reached_at(x, goal) for x in own]
    return {
        "minus_cross_entropy": [*difference(own, other_lines)],
        "plain_cpu_seconds": round(float(np.mean([x["cpu_seconds"] for x in other_lines]))),
        "reached_at": round(float(np.mean([x for x in reached if x])), 2) if all(reached) else None,
    }


def reached_at(line: Line, goal: float) -> float | None:
    """Return the share of the CPU time at which dev falls to a goal, by linear interpolation."""
    points = [(p[3], p[4]) for p in line["curve"]]
    for (a, high), (b, low) in pairwise(points):
        if points[0][1] <= goal:
            return float(points[0][0] / line["cpu_seconds"])
        if low <= goal <= high:
            part = (high - goal) / max(high - low, 1e-9)
            return float((a + part * (b - a)) / line["cpu_seconds"])
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
    return {"made_by": lines[-1]["made_by"], "ends": ends, "rows": rows(lines)}


def markdown(found: Mapping[str, Any], part: str) -> str:
    """Return a table for docs/results.md."""
    head = (
        "| method | student | rate | kB a language x passes | seeds | bits per byte "
        "| minus cross-entropy, same student (95 %) "
        "| minus cross-entropy, own vocabulary, equal CPU (95 %) | the same with the capture's CPU "
        "| reached at | gap closed "
        "| English lost | training CPU s |\n|" + " --- |" * 13 + "\n"
    )
    lines = []
    for row in found["rows"]:
        if row["part"] != part:
            continue
        gain = row["beside_cross_entropy"]
        plain, billed = (row.get(name, {}) for name in EQUAL_CPU)
        reached = plain.get("reached_at")
        lines.append(
            f"| {row['method']} | {row['student']} | {row['rate']:g} "
            f"| {row['kilobytes']} x {row['passes']:g}"
            f"{f' + {row_more}' if (row_more := row['more']) else ''} | {len(row['seeds'])} | "
            f"{row['mean']:.3f} | "
            f"{shown(gain)} | {shown(plain.get('minus_cross_entropy'))} | "
            f"{shown(billed.get('minus_cross_entropy'))} | "
            f"{'' if reached is None else f'{reached:.0%}'} | "
            f"{row.get('gap', 0):.0%} | {row.get('english_lost', 0):+.3f} | {row['cpu_seconds']} |"
        )
    return head + "\n".join(lines) + "\n"


def shown(gain: Sequence[float] | None) -> str:
    return "" if gain is None else f"{gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]"
