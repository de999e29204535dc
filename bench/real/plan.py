"""Which runs, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bench.real.train import Run

TWO = ("ind", "tha")
FULL = "events + masks + partial tokens"


def best(results: Mapping[str, Any], runs: list[Run]) -> Run:
    """Return the run with the fewest bits; all must have a line."""
    return min(runs, key=lambda run: results[run.key]["mean"])


def screening(results: Mapping[str, Any]) -> Iterator[Run]:
    """Small runs on dev, one seed: 12 kB a language."""
    longer = "taught 3000 means"
    yield Run("none", TWO, 12, 0, 0.0)
    yield Run("teacher", TWO, 12, 0, 0.0)
    yield Run("cross-entropy", TWO, 12, 2, 2e-4, student=longer)
    yield Run(FULL, TWO, 12, 2, 2e-4, student=longer)
    yield Run("cross-entropy", TWO, 12, 0.75, 2e-4)  # about the CPU time of two passes above
    yield Run(FULL, TWO, 12, 2, 5e-4, student=longer)
    yield Run(FULL, TWO, 12, 2, 2e-4, student="taught 3000 ridge")
    yield Run(FULL, TWO, 12, 0.75, 2e-4)
    yield Run(FULL, TWO, 12, 2, 2e-4, student=longer, share=0.9)
    yield Run("cross-entropy", TWO, 12, 2, 5e-4, student=longer)
    yield Run(FULL, TWO, 12, 4, 2e-4, student=longer)
    yield Run(FULL, TWO, 12, 1, 2e-4, student=longer, more=12)
    yield Run("label smoothing .1", TWO, 12, 2, 2e-4, student=longer)
    yield Run(FULL, TWO, 12, 2, 2e-4, student=longer, end="teacher")
    yield Run("cross-entropy", TWO, 12, 2, 2e-4)


def next_run(results: Mapping[str, Any]) -> Run | None:
    """Return the first run of the plan without a line."""
    for run in screening(results):
        if run.key not in results:
            return run
    return None
