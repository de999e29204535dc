"""Simulate how often the 95 % intervals of persea.tasks.intervals contain the truth.

    python bench/coverage.py [rounds]           (2,000 rounds: about two minutes)

The percentile bootstrap is shown beside them. Cases: proportions and graded scores (Beta
distributions; many zeros; many ones), for one mean and for two models on the same items (difference
and ratio). Where fewer than about 7 of the items distinguish two models, no interval can keep to
exactly 95 %: those cases are listed apart and must only not fall below it. Writes
bench/results/coverage.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from persea.tasks.intervals import mean_interval, paired_difference_interval, paired_ratio_interval

ROOT = Path(__file__).resolve().parent.parent
SIZES = (20, 50, 100, 200)
BOOTSTRAP, FEW, APART = 500, 300, 7
Draw = Callable[[np.random.Generator, int], np.ndarray]
GRADED: dict[str, tuple[Draw, float]] = {
    "beta(5,2)": (lambda rng, n: rng.beta(5, 2, n), 5 / 7),
    "beta(.5,2)": (lambda rng, n: rng.beta(0.5, 2, n), 0.2),
    "70 % zeros": (lambda rng, n: np.where(rng.random(n) < 0.7, 0, rng.beta(4, 2, n)), 0.2),
    "80 % ones": (lambda rng, n: np.where(rng.random(n) < 0.8, 1, rng.beta(2, 2, n)), 0.9),
}
SHARES = (0.1, 0.3, 0.5, 0.8)
TWINS = (
    (0.5, 0.7, 0.3),
    (0.8, 0.8, 0.5),
    (0.9, 0.95, 0.6),
    (0.2, 0.3, 0.2),
    (0.1, 0.9, 0.0),
    (0.97, 0.98, 0.5),
)


def bootstrap(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean."""
    means = values[rng.integers(0, len(values), (BOOTSTRAP, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def twins(rng: np.random.Generator, n: int, one: float, other: float, alike: float) -> np.ndarray:
    u = rng.random(n)
    v = np.where(rng.random(n) < alike, u, rng.random(n))
    return np.stack([u < one, v < other]).astype(float)


def held(intervals: Iterator[tuple[float, float]], truth: float, rounds: int) -> float:
    return round(sum(low <= truth <= high for low, high in intervals) / rounds, 4)


def means(rounds: int) -> Iterator[dict[str, Any]]:
    cases: dict[str, tuple[Draw, float]] = {
        f"share {p}": (lambda rng, n, p=p: (rng.random(n) < p) * 1.0, p) for p in SHARES
    }  # type: ignore[misc]
    for name, (draw, truth) in (cases | GRADED).items():
        for n in SIZES:
            rng = np.random.default_rng(n)
            drawn = [draw(rng, n) for _ in range(rounds)]
            few = drawn[:FEW]
            yield {
                "of": "mean",
                "case": name,
                "n": n,
                "persea": held((mean_interval(x) for x in drawn), truth, rounds),
                "bootstrap": held((bootstrap(x, rng) for x in few), truth, len(few)),
            }


def pairs(rounds: int) -> Iterator[dict[str, Any]]:
    cases: dict[str, tuple[Draw, float, float]] = {
        f"shares {a} and {b}, {c:.0%} alike": (
            lambda rng, n, a=a, b=b, c=c: twins(rng, n, a, b, c),
            a,
            b,
        )
        for a, b, c in TWINS
    }  # type: ignore[misc]
    for name, (draw, truth) in GRADED.items():
        cases[f"{name} and half of it"] = (
            lambda rng, n, draw=draw: np.stack(
                [x := draw(rng, n), 0.5 * x + 0.5 * rng.beta(4, 2, n)]
            ),
            truth,
            truth / 2 + 1 / 3,
        )  # type: ignore[misc]
    for name, (draw, one, other) in cases.items():
        for n in SIZES:
            rng = np.random.default_rng(n)
            drawn = [draw(rng, n) for _ in range(rounds)]
            apart = float(np.mean([(x != y).sum() for x, y in drawn]))
            few = drawn[:FEW]
            yield {
                "of": "difference",
                "case": name,
                "n": n,
                "apart": round(apart, 1),
                "persea": held(
                    (paired_difference_interval(x, y) for x, y in drawn), one - other, rounds
                ),
                "bootstrap": held((bootstrap(x - y, rng) for x, y in few), one - other, len(few)),
            }
            yield {
                "of": "ratio",
                "case": name,
                "n": n,
                "apart": round(apart, 1),
                "persea": held(
                    (paired_ratio_interval(x, y) for x, y in drawn), one / other, rounds
                ),
            }


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    rows = [*means(rounds), *pairs(rounds)]
    for row in rows:
        print(
            f"{row['of']:10} {row['case']:32} n {row['n']:3}  persea {row['persea']:.3f}  "
            f"bootstrap {row.get('bootstrap', float('nan')):.3f}"
        )
    usual = [r for r in rows if r.get("apart", APART) >= APART]
    inside = sum(0.93 <= r["persea"] <= 0.97 for r in usual)
    result = {
        "rounds": rounds,
        "usual": {
            "cases": len(usual),
            "from_93_to_97": inside,
            "least": min(r["persea"] for r in usual),
            "most": max(r["persea"] for r in usual),
            "bootstrap_least": min(r["bootstrap"] for r in usual if "bootstrap" in r),
        },
        "few_apart": {
            "cases": len(rows) - len(usual),
            "least": min((r["persea"] for r in rows if r not in usual), default=None),
        },
        "rows": rows,
    }
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1))
    (ROOT / "bench" / "results" / "coverage.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
