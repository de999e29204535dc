"""Which runs, in which order: what decides most first, so that the bench can stop anywhere.

1. Searches on dev, one seed, two languages, 12 kB each.
2. The same on test with three seeds: cross-entropy, events, the best recipe, at about equal CPU.
3. Every other method on test, the same text and student.
4. Six languages, 100 kB each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bench.real.texts import LANGUAGES
from bench.real.train import Run

TWO = ("ind", "tha")
FULL = "events + masks + partial tokens"
LONGER, MEANS = "taught 3000 ridge", "taught 3000 means"
LONGEST = "taught 6000 ridge"  # of six languages
SEEDS = (1, 2, 3)
OTHERS = ("events", "events + masks", "strict", "strict everywhere", "bpm", "chunk", "uld", "gold")
ENGLISH_LOST = 0.02  # bits per byte
NONE = {"mean": 0.0}
SMOOTHED = "label smoothing .1"


def rates(results: Mapping[str, Any], runs: Sequence[Run]) -> float:
    """Return the learning rate of the run with the fewest bits, of those that have a line.

    Runs that cost more than ENGLISH_LOST in English count only if all do.
    """
    base = results.get(ends(TWO, 12, "dev")[0].key, {}).get("english", 0.0)
    done = [run for run in runs if run.key in results]
    kept = [run for run in done if results[run.key]["english"] - base <= ENGLISH_LOST]
    return min(kept or done or runs[:1], key=lambda run: results.get(run.key, NONE)["mean"]).rate


def ends(languages: tuple[str, ...], kilobytes: int, part: str) -> list[Run]:
    """Return the student before training and the teacher."""
    return [Run(m, languages, kilobytes, 0, 0.0, part=part) for m in ("none", "teacher")]


CE_LONGER = [Run("cross-entropy", TWO, 12, 2, rate, student=LONGER) for rate in (2e-4, 5e-4, 1e-3)]
FULL_LONGER = [Run(FULL, TWO, 12, 2, rate, student=LONGER) for rate in (2e-4, 5e-4, 1e-3)]
# 0.75 passes of the plain vocabulary take about the CPU time of two passes of the longer one
# with the teacher's capture, which costs about as much again
WITH_CAPTURE = 1.4
CE_PLAIN = [Run("cross-entropy", TWO, 12, 0.75, rate) for rate in (2e-4, 5e-4)]


def searches(results: Mapping[str, Any]) -> Iterator[Run]:
    """Settings, on dev."""
    yield from ends(TWO, 12, "dev")
    yield replace(CE_LONGER[0], student=MEANS)
    yield replace(FULL_LONGER[0], student=MEANS)
    yield CE_PLAIN[0]
    yield replace(FULL_LONGER[1], student=MEANS)
    yield FULL_LONGER[0]
    yield CE_PLAIN[1]


def later_searches(results: Mapping[str, Any]) -> Iterator[Run]:
    """More settings, on dev, beside the best rate so far."""
    rate = rates(results, FULL_LONGER)
    at = replace(FULL_LONGER[0], rate=rate)
    yield from (FULL_LONGER[1], CE_LONGER[0], CE_LONGER[1])
    yield replace(at, share=0.9)
    yield replace(at, share=0.5)
    yield replace(at, passes=4)
    yield replace(at, passes=1, more=12)
    yield replace(at, method=SMOOTHED)
    yield replace(at, end="teacher")
    yield replace(at, passes=8)
    yield replace(CE_LONGER[0], rate=rate, passes=8)
    yield replace(at, student="taught 1000 means")
    yield replace(at, student="taught 3000 both")
    yield replace(at, arithmetic="single")


def main_rows(results: Mapping[str, Any]) -> Iterator[Run]:
    """Cross-entropy, the longer vocabulary, and the best recipe: three seeds, on test."""
    yield from ends(TWO, 12, "test")
    ce, full, plain = (rates(results, some) for some in (CE_LONGER, FULL_LONGER, CE_PLAIN))
    for seed in SEEDS:
        for run, rate in (
            (CE_PLAIN[0], plain),
            (FULL_LONGER[0], full),
            (CE_LONGER[0], ce),
            (replace(CE_PLAIN[0], passes=WITH_CAPTURE), plain),
        ):
            yield replace(run, rate=rate, seed=seed, part="test")
    for seed in SEEDS:
        yield replace(CE_PLAIN[0], method=FULL, rate=plain, seed=seed, part="test")


def other_methods(results: Mapping[str, Any]) -> Iterator[Run]:
    """Every other method on the longer vocabulary."""
    rate = rates(results, FULL_LONGER)
    for seed in SEEDS:
        for method in OTHERS:
            yield replace(FULL_LONGER[0], method=method, rate=rate, seed=seed, part="test")


def six_languages(results: Mapping[str, Any]) -> Iterator[Run]:
    """100 kB of each of six languages."""
    yield from ends(LANGUAGES, 100, "test")
    rate = rates(results, FULL_LONGER)
    for seed in SEEDS:
        for method in (FULL, "cross-entropy", "strict everywhere", "gold", "uld"):
            yield Run(method, LANGUAGES, 100, 2, rate, seed, student=LONGEST, part="test")
        yield Run("cross-entropy", LANGUAGES, 100, 0.75, rate, seed, part="test")


def next_run(results: Mapping[str, Any]) -> Run | None:
    """Return the first run of the plan without a line."""
    for stage in (searches, main_rows, later_searches, other_methods, six_languages):
        for run in stage(results):
            if run.key not in results:
                return run
    return None
