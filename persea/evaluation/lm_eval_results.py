"""Read results files of lm-evaluation-harness for the report page.

The layout of `results_*.json` of version 0.4:

    {"results": {task: {"alias": ..., "acc,none": ..., "acc_stderr,none": ...}},
     "n-samples": {task: {"original": ..., "effective": ...}},
     "higher_is_better": {task: {metric: bool}}}

Other keys are ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persea.errors import DataError
from persea.storage import read_input_bytes
from persea.tasks.intervals import Z95, wilson_interval


@dataclass(frozen=True)
class LmEvalResult:
    """One number of lm-eval.

    Attributes:
        model_name: The evaluated model.
        task: Name of the task.
        metric: Name of the metric, with its filter in parentheses.
        value: The number.
        stderr: Standard error; None if lm-eval gives none.
        n: Number of samples; 0 if not recorded.
        higher_is_better: Direction of the metric; True where the file does not list it, as for
            lm-eval's own tables.
    """

    model_name: str
    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval by the standard error; None if lm-eval gives none.

        Of a mean of values in [0, 1] it is Wilson's, with the number of samples at which a share
        would have this standard error; it is not empty where all answers are right or all wrong.
        """
        if self.stderr is None:
            return None
        if not (self.n and 0 <= self.value <= 1 and self.higher_is_better):
            return self.value - Z95 * self.stderr, self.value + Z95 * self.stderr
        variance = self.stderr**2
        n = min(self.value * (1 - self.value) / variance, self.n) if variance else self.n
        return wilson_interval(self.value * n, n)


def read_lm_eval_results(model_name: str, path: Path) -> tuple[LmEvalResult, ...]:
    """Read all numbers of one results file.

    Raises:
        DataError: The file is missing, is not written by lm-eval, or has no number.
    """
    remedy = "give the results_*.json that lm_eval --output_path wrote (docs/evaluate.md)"
    try:
        found = json.loads(read_input_bytes(path))
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror}", where=str(path), remedy=remedy
        ) from error
    except ValueError as error:
        raise DataError(f"not JSON: {error}", where=str(path), remedy=remedy) from error
    results = found.get("results") if isinstance(found, dict) else None
    if not isinstance(results, dict):
        raise DataError("has no `results`: not a file of lm-eval", where=str(path), remedy=remedy)
    try:
        numbers = tuple(_iter_results(model_name, found, results))
    except (TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"not in lm-eval's format: {error}", where=str(path), remedy=remedy
        ) from error
    if not numbers:
        raise DataError("contains no number", where=str(path), remedy=remedy)
    return numbers


def _iter_results(
    model_name: str, found: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]
) -> Iterator[LmEvalResult]:
    for task, values in results.items():
        n = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        better = found.get("higher_is_better", {}).get(task, {})
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr"):  # alias, sample counts, errors
                continue
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not math.isfinite(value)
            ):
                raise ValueError(f"{task}: {key} is {value!r}, not a number")
            error = values.get(f"{metric}_stderr,{filtered}")
            yield LmEvalResult(
                model_name,
                str(values.get("alias") or task).strip(" -"),
                metric if filtered == "none" else f"{metric} ({filtered})",
                float(value),
                _finite_or_none(error),
                int(n),
                better.get(metric) is not False,
            )


def _finite_or_none(value: Any) -> float | None:
    """Return a number; None for lm-eval's "N/A"."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
