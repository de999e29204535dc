"""Compare any number of runs with the first: one table, CSV, JSON or a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from persea.report.compare_runs import (
    ABSENT,
    RunComparison,
    SkillDifference,
    compare_runs,
    flat_recipe,
)

CSV_COLUMNS = (
    "run",
    "skill",
    "language",
    "effort",
    "score",
    "n",
    "baseline",
    "baseline_score",
    "difference",
    "low",
    "high",
    "pairs",
    "outcome",
)
TEMPLATE = Path(__file__).with_name("compare.html.jinja")


@dataclass(frozen=True)
class RunsComparison:
    """Several runs, each compared with the first.

    Attributes:
        runs: The run folders.
        comparisons: The comparison of each run but the first with the first.
        recipe_values: Recipe key -> its value in each run, if they differ.
    """

    runs: tuple[str, ...]
    comparisons: tuple[RunComparison, ...]
    recipe_values: dict[str, tuple[Any, ...]]

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON."""
        return {
            "runs": list(self.runs),
            "comparisons": [c.to_json() for c in self.comparisons],
            "recipe_values": {k: list(v) for k, v in self.recipe_values.items()},
        }

    def to_csv(self) -> str:
        """Return one line for each run but the first, skill, language and effort."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for run, comparison in zip(self.runs[1:], self.comparisons, strict=True):
            for d in comparison.differences:
                writer.writerow(
                    [
                        run,
                        d.skill,
                        d.language,
                        d.effort.value,
                        d.b,
                        d.b_n,
                        self.runs[0],
                        d.a,
                        d.difference,
                        d.low,
                        d.high,
                        d.num_pairs,
                        d.outcome,
                    ]
                )
        return text.getvalue()

    def to_html(self) -> str:
        """Return a page without scripts and other files."""
        env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        rows = [
            {
                "name": " ".join(filter(None, key)),
                "cells": [
                    {"score": self._first_score(key), "change": "", "outcome": ""},
                    *(_html_cell(c) for c in found),
                ],
            }
            for key, found in self._by_skill()
        ]
        return env.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
            title=f"{len(self.runs)} runs compared",
            runs=self.runs,
            rows=rows,
            keys=list(self.recipe_values.items()),
        )

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return the columns and the rows of the table: a column for each run."""
        columns = ("skill", *self.runs)
        rows = [
            (
                " ".join(filter(None, key)),
                self._first_score(key),
                *(
                    "-" if d is None else f"{d.b:.3f} ({d.difference:+.3f}, {d.outcome})"
                    for d in found
                ),
            )
            for key, found in self._by_skill()
        ]
        return columns, rows

    def _by_skill(self) -> Iterator[tuple[tuple[str, ...], list[SkillDifference | None]]]:
        found = [{_key(d): d for d in comparison.differences} for comparison in self.comparisons]
        for key in dict.fromkeys(key for one in found for key in one):
            yield key, [one.get(key) for one in found]

    def _first_score(self, key: tuple[str, ...]) -> str:
        scores = (d.a for c in self.comparisons for d in c.differences if _key(d) == key)
        return f"{next(scores):.3f}"


def _key(d: SkillDifference) -> tuple[str, ...]:
    return d.skill, d.language, "" if d.effort == "none" else f"at {d.effort}"


def _html_cell(d: SkillDifference | None) -> dict[str, str]:
    if d is None:
        return {"score": "–", "change": "", "outcome": ""}
    outcome = d.outcome if d.outcome in ("better", "worse") else ""
    change = f"{d.difference:+.3f} ({d.low:+.2f} to {d.high:+.2f})"
    return {"score": f"{d.b:.3f}", "change": change, "outcome": outcome}


def compare_many_runs(folders: Sequence[Path]) -> RunsComparison:
    """Compare the students of run folders with that of the first folder.

    Args:
        folders: At least two run folders.

    Raises:
        DataError: If a folder holds no evaluation, or one of another version of persea.
    """
    recipes = [flat_recipe(folder) for folder in folders]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    values = {key: tuple(recipe.get(key, ABSENT) for recipe in recipes) for key in keys}
    return RunsComparison(
        tuple(map(str, folders)),
        tuple(compare_runs(folders[0], other) for other in folders[1:]),
        {key: found for key, found in values.items() if any(v != found[0] for v in found)},
    )
