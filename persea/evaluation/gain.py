"""Is any teacher better than the student already is? The student's base takes part in the audition,
on the same questions or texts, as a contestant that cannot be chosen.

Distillation cannot teach what the teacher cannot do: where no teacher is better than the base with
confidence, the answers would cost money and teach nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from persea.evaluation.racing import (
    BETTING_ALPHA_SHARE,
    TaskRace,
    mean,
    round_bounds,
)
from persea.tasks.intervals import betting_wealth, paired_difference_interval
from persea.tasks.task import ItemResult, TaskItem


class Gain(StrEnum):
    """Whether a part has a teacher to learn from."""

    BETTER = "better"  # a teacher is better than the base, with confidence
    UNDECIDED = "undecided"  # no teacher is better with confidence, and the base is not either
    WORSE = "worse"  # the base is better than every teacher, with confidence


SCORE_UNIT, BITS_UNIT = "score", "bits per byte"


@dataclass(frozen=True)
class GainDecision:
    """The best teacher of a part compared with the student's base.

    Attributes:
        part: Skill, or skill/language.
        teacher: The best teacher.
        teacher_value: Its score, or its bits per byte.
        base_value: The base's, on the same items or texts.
        gain: How much better the teacher is; positive is better in either unit.
        low: Lower end of the interval of `gain`; None for a single text.
        high: Upper end of it.
        n: Items or texts.
        gain_kind: The decision.
        unit: SCORE_UNIT or BITS_UNIT.
        pinned: Whether the recipe chose the teacher.
    """

    part: str
    teacher: str
    teacher_value: float
    base_value: float
    gain: float
    low: float | None
    high: float | None
    n: int
    gain_kind: Gain
    unit: str = SCORE_UNIT
    pinned: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; keys are the field names."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> GainDecision:
        """Read the result of `to_json`."""
        return GainDecision(**{**value, "gain_kind": Gain(value["gain_kind"])})

    @property
    def sentence(self) -> str:
        """One line that names the part, both values, and what to do."""
        bits = self.unit == BITS_UNIT
        places, kind = (3, "texts") if bits else (2, "questions")
        interval = ""
        if self.low is not None and self.high is not None:
            interval = f" [{self.low:+.{places}f}, {self.high:+.{places}f}]"
        values = (
            f"{self.teacher} {self.teacher_value:.{places}f}, student {self.base_value:.{places}f}"
            f"{' bits per byte' if bits else ''}; gain {self.gain:+.{places}f}{interval}, "
            f"{self.n} {kind}"
        )
        where = f"{'the texts of ' if bits else ''}{self.part}"
        if self.gain_kind is Gain.BETTER:
            return f"{self.teacher} is better than the student on {where} ({values})"
        chosen = " (pinned)" if self.pinned else ""
        sentence = f"no teacher{chosen} is better than the student on {where}"
        if self.gain_kind is Gain.WORSE:
            return f"{sentence} ({values}): do not distil it"
        more = "audition.items asks more"
        return f"{sentence} with confidence ({values}): do not distil it, or find out: {more}"


def decide_gain(
    differences: Sequence[float],
    values: tuple[Sequence[float], Sequence[float]],
    num_teachers: int,
    is_last_look: bool,
    confidence: float,
) -> Gain | None:
    """Decide whether a teacher is better than the base, after a round of items.

    A teacher that is not better is called better with a probability of at most 1 - confidence,
    among all teachers together and however often this is called (see `find_eliminated`).

    Args:
        differences: Teacher minus base, in the order in which the items were asked.
        values: (teacher's values, base's values).
        num_teachers: Teachers that the best one was chosen from.
        is_last_look: Whether no more items will be asked.
        confidence: Confidence of the decision.

    Returns:
        The decision; None if more items may decide.
    """
    alpha = (1 - confidence) / num_teachers
    min_wealth = 1 / (BETTING_ALPHA_SHARE * alpha)
    if betting_wealth(differences)[-1] >= min_wealth:
        return Gain.BETTER
    if betting_wealth([-d for d in differences])[-1] >= min_wealth:
        return Gain.WORSE
    if not is_last_look:
        return None
    low, high = paired_difference_interval(*values, 1 - 2 * (1 - BETTING_ALPHA_SHARE) * alpha)
    if low > 0:
        return Gain.BETTER
    return Gain.WORSE if high < 0 else Gain.UNDECIDED


def compare_with_base(
    race: TaskRace,
    part: str,
    teachers: Sequence[str],
    answer_fn: Callable[[str, Sequence[TaskItem]], Sequence[ItemResult]],
    base: str,
    pinned: bool = False,
) -> GainDecision:
    """Compare the best teacher of a part with the student's base, in rounds as the race.

    Args:
        race: The finished race of the skill.
        part: The skill, or skill/language for the items of one language.
        teachers: Teachers that were chosen for the part. The one with the highest score is
            compared.
        answer_fn: (model, items) -> graded answers of the items that the model has not answered.
        base: Name of the base.
        pinned: Whether the recipe chose the teacher.
    """
    language = part.partition("/")[2]
    items = [i for i in race.items if not language or i.prompt.language == language]
    known = {
        name: dict(zip([i.prompt.id for i in race.items], race.scores[name], strict=False))
        for name in teachers
    } | {base: {}}
    teacher = max(
        teachers,
        key=lambda t: mean([known[t][i.prompt.id] for i in items if i.prompt.id in known[t]]),
    )

    def values(name: str, asked: Sequence[TaskItem]) -> list[float]:
        missing = [i for i in asked if i.prompt.id not in known[name]]
        if missing:
            for item, result in zip(missing, answer_fn(name, missing), strict=True):
                known[name][item.prompt.id] = result.value
        return [known[name][i.prompt.id] for i in asked]

    confidence = race.settings.confidence
    num_languages = len({i.prompt.language for i in items})
    for _, end in round_bounds(num_languages, len(items), race.settings):
        mine, others = values(teacher, items[:end]), values(base, items[:end])
        differences = [a - b for a, b in zip(mine, others, strict=True)]
        decision = decide_gain(
            differences, (mine, others), len(race.scores), end == len(items), confidence
        )
        if decision is not None:
            break
    assert decision is not None  # the last round decides
    low, high = paired_difference_interval(mine, others, confidence)
    return GainDecision(
        part,
        teacher,
        mean(mine),
        mean(others),
        mean(differences),
        low,
        high,
        len(mine),
        decision,
        pinned=pinned,
    )
