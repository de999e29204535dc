"""Tripwires of on-policy training: stop a student whose own answers collapse.

On its own answers a student can fall into short, endless or repeated answers within a few dozen
steps, while the loss falls. Each wire compares the latest on-policy steps with the run's own first
ones, so that no limit depends on the model, the prompts or the length of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from persea.config.schema import OnPolicySection

LENGTH, ENDED, ENTROPY = "rollout_tokens", "rollout_ended", "rollout_entropy"
# Below, a mean of the first steps is no reference: a student that never ends an answer cannot end
# half as many.
MIN_REFERENCES = {LENGTH: 1.0, ENDED: 0.05, ENTROPY: 0.01}
PHRASES = {
    LENGTH: "the mean length of the student's answers",
    ENDED: "the share of the student's answers that end",
    ENTROPY: "the entropy of the student's answers",
}


@dataclass(frozen=True)
class TripwireVerdict:
    """What the tripwires say after a step.

    Attributes:
        is_suspect: Whether the step itself is beyond a limit: its weights are no good checkpoint.
        problem: What the latest steps together are, where they are beyond a limit; "" if they are
            not.
    """

    is_suspect: bool = False
    problem: str = ""


FINE = TripwireVerdict()


@dataclass
class Tripwires:
    """Compares the latest on-policy steps with the first ones.

    Attributes:
        config: The recipe's section `training.on_policy`.
        first: Metrics of the first `tripwire_steps` on-policy steps.
        latest: Metrics of the latest ones after them, at most as many.
    """

    config: OnPolicySection
    first: list[dict[str, float]] = field(default_factory=list)
    latest: list[dict[str, float]] = field(default_factory=list)

    def observe(self, terms: Mapping[str, float]) -> TripwireVerdict:
        """Take the metrics of a step; those of other steps than on-policy ones say nothing.

        Args:
            terms: Metrics of the whole step, over all processes.
        """
        steps = self.config.tripwire_steps
        if not steps or LENGTH not in terms:
            return FINE
        values = {name: terms[name] for name in PHRASES if name in terms}
        if len(self.first) < steps:
            self.first.append(values)
            return FINE
        self.latest = [*self.latest, values][-steps:]
        problem = self._find_problem(self.latest) if len(self.latest) == steps else ""
        return TripwireVerdict(bool(self._find_problem([values])), problem)

    def _find_problem(self, steps: list[dict[str, float]]) -> str:
        limits = {
            LENGTH: (self.config.min_length_ratio, self.config.max_length_ratio),
            ENDED: (self.config.min_ended_ratio, math.inf),
            ENTROPY: (self.config.min_entropy_ratio, self.config.max_entropy_ratio),
        }
        for name, (low, high) in limits.items():
            reference, now = _mean(self.first, name), _mean(steps, name)
            if reference is None or now is None or reference < MIN_REFERENCES[name]:
                continue
            ratio = now / reference
            if not low <= ratio <= high:
                limit = f"at least {low:g}" if ratio < low else f"at most {high:g}"
                return (
                    f"{PHRASES[name]} is {ratio:.2f} of that of the first on-policy steps "
                    f"({now:.3g} after {reference:.3g}; {limit})"
                )
        return ""

    def to_json(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"first": self.first, "latest": self.latest}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `to_json`; {} = before the first on-policy step."""
        self.first, self.latest = list(state.get("first", [])), list(state.get("latest", []))


def _mean(steps: list[dict[str, float]], name: str) -> float | None:
    """Return the mean over the steps that have the metric; None if none has."""
    values = [step[name] for step in steps if name in step]
    return sum(values) / len(values) if values else None
