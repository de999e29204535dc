"""Racing: rank teachers on a task with as few items as possible.

Teachers answer in rounds of a few items. A teacher that is worse than another with confidence is
eliminated; a race ends when one teacher is left or the items are used up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import zip_longest
from typing import TypeAlias

from persea.chat.messages import ThinkingEffort
from persea.tasks.intervals import CONFIDENCE_LEVEL, betting_wealth, paired_difference_interval
from persea.tasks.task import ItemResult, Score, Task, TaskItem, score_results

AuditionResultKey: TypeAlias = tuple[str, str, ThinkingEffort]  # teacher, skill, effort

# Ten wins of ten items settle five teachers (wealth 186 > 160); nine settle three (102 > 80).
FIRST_ROUND_ITEMS = 10
# A skill is not settled before: with fewer items a lead in one language is seldom visible.
MIN_ITEMS_PER_LANGUAGE = 4
ROUND_GROWTH = 0.5  # size of a round, as a share of all items asked before it
# alpha is split in two: sequential betting gets this share, the test at the last look the rest.
BETTING_ALPHA_SHARE = 0.5


class StopReason(StrEnum):
    """Why a race ended."""

    SETTLED = "settled"  # one teacher is left, and no other leads in any language
    BUDGET = "budget"  # all items were asked (`audition.items`)


@dataclass(frozen=True)
class RaceSettings:
    """When a race ends.

    Attributes:
        first_round: Items of the first round.
        min_items_per_language: Items of each language before a race may end.
        round_growth: Size of later rounds, as a share of the items asked before.
        confidence: Confidence with which the best teacher is not eliminated.
    """

    first_round: int = FIRST_ROUND_ITEMS
    min_items_per_language: int = MIN_ITEMS_PER_LANGUAGE
    round_growth: float = ROUND_GROWTH
    confidence: float = CONFIDENCE_LEVEL


DEFAULT_RACE_SETTINGS = RaceSettings()


@dataclass(frozen=True)
class EffortComparison:
    """A teacher at another effort than its own, on the same items.

    Attributes:
        score: Its score at the other effort.
        own_effort: The effort it is compared with.
        low: Lower end of the 95 % interval of the difference.
        high: Upper end of it.
    """

    score: Score
    own_effort: ThinkingEffort
    low: float
    high: float


def interleave_languages(items: Sequence[TaskItem], seed: int) -> tuple[TaskItem, ...]:
    """Shuffle items and alternate their languages, so that any prefix is a sample of the set."""
    drawn = sorted(items, key=lambda i: hashlib.sha256(f"{seed}/{i.prompt.id}".encode()).digest())
    by_language: dict[str, list[TaskItem]] = {}
    for item in drawn:
        by_language.setdefault(item.prompt.language, []).append(item)
    return tuple(i for block in zip_longest(*by_language.values()) for i in block if i is not None)


def round_bounds(
    num_languages: int, max_items: int, settings: RaceSettings = DEFAULT_RACE_SETTINGS
) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of each round; rounds grow, and hold each language equally often."""
    begin, end = 0, 0
    while end < max_items:
        step = max(settings.first_round, int(end * settings.round_growth))
        begin, end = end, min(max_items, end + step + -step % num_languages)
        yield begin, end


def find_eliminated(
    scores_by_teacher: Mapping[str, Sequence[float]],
    alpha: float,
    is_last_look: bool,
    eliminated: Mapping[str, str],
) -> dict[str, str]:
    """Find teachers that are worse than another one on the items both answered.

    The best of K teachers is eliminated with a probability of at most alpha, however often this is
    called. Half of alpha is for sequential betting, whose wealth must reach (K - 1) / (alpha / 2):
    Bonferroni over the K - 1 rivals, while repeated looks cost nothing (see `betting_wealth`). The
    other half is used once, at the last look, for the interval of the paired difference, which
    separates more teachers with the same items.

    Args:
        scores_by_teacher: Values in [0, 1] in item order.
        alpha: Allowed probability of eliminating the best teacher.
        is_last_look: Whether no more items will be asked.
        eliminated: Teachers eliminated before, with the teacher that beat each.

    Returns:
        `eliminated` with the new ones.
    """
    rivals = max(1, len(scores_by_teacher) - 1)
    min_wealth = rivals / (BETTING_ALPHA_SHARE * alpha)
    # Two one-sided tails: an interval at 1 - 2 * (alpha / 2) / rivals spends the other half.
    confidence = 1 - 2 * (1 - BETTING_ALPHA_SHARE) * alpha / rivals
    found = dict(eliminated)
    for name, scores in scores_by_teacher.items():
        for rival, rival_scores in scores_by_teacher.items():
            n = min(len(scores), len(rival_scores))
            if name == rival or n == 0 or {name, rival} & set(found):
                continue
            own, others = scores[:n], rival_scores[:n]
            wealth = betting_wealth([b - a for a, b in zip(own, others, strict=True)])[-1]
            if wealth >= min_wealth or (
                is_last_look and paired_difference_interval(others, own, confidence)[0] > 0
            ):
                found[name] = rival
    return found


@dataclass
class TaskRace:
    """The state of the race on one skill.

    Attributes:
        skill: Name of the skill.
        items: Items in the order asked.
        scores: Teacher -> values in item order.
        results: Teacher -> graded answers in item order.
        stop_reason: Why it ended; None while it runs.
        eliminated: Teacher -> the teacher that beat it.
        settings: When it ends.
    """

    skill: str
    items: tuple[TaskItem, ...]
    scores: dict[str, list[float]]
    results: dict[str, list[ItemResult]]
    stop_reason: StopReason | None = None
    eliminated: dict[str, str] = field(default_factory=dict)
    settings: RaceSettings = DEFAULT_RACE_SETTINGS

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages of the items, sorted."""
        return tuple(sorted({i.prompt.language for i in self.items}))

    def scores_in_language(self, language: str) -> dict[str, list[float]]:
        """Return teacher -> values of the items of one language."""
        return {
            name: [
                v for v, i in zip(values, self.items, strict=False) if i.prompt.language == language
            ]
            for name, values in self.scores.items()
        }

    def update_eliminated(self, num_items_asked: int) -> None:
        """Eliminate teachers after a round, and end the race if more items would not help."""
        is_last = num_items_asked >= len(self.items)
        alpha = 1 - self.settings.confidence
        self.eliminated = find_eliminated(self.scores, alpha, is_last, self.eliminated)
        left = [name for name in self.scores if name not in self.eliminated]
        by_language = [self.scores_in_language(language) for language in self.languages]
        enough_items = all(
            min(len(scores[name]) for name in left)
            >= min(
                self.settings.min_items_per_language,
                _count_items_in_language(self.items, language),
            )
            for language, scores in zip(self.languages, by_language, strict=True)
        )
        eliminated_leads = any(
            mean(scores[name]) > max(mean(scores[other]) for other in left)
            for scores in by_language
            for name in self.eliminated
            if len(by_language) > 1
        )
        if len(left) == 1 and enough_items and not eliminated_leads:
            self.stop_reason = StopReason.SETTLED
        elif is_last:
            self.stop_reason = StopReason.BUDGET

    def is_eliminated_everywhere(self, name: str) -> bool:
        """Return whether a teacher is eliminated and leads in no language."""
        return name in self.eliminated and all(
            mean(scores[name])
            <= max(mean(v) for other, v in scores.items() if other not in self.eliminated)
            for scores in map(self.scores_in_language, self.languages)
        )


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def _count_items_in_language(items: Sequence[TaskItem], language: str) -> int:
    return sum(i.prompt.language == language for i in items)


def race_teachers(
    teachers: Sequence[str],
    tasks: Sequence[tuple[Task, Sequence[TaskItem]]],
    seed: int,
    answer_fn: Callable[[str, Task, Sequence[TaskItem]], Sequence[ItemResult]],
    progress: Callable[[float, str], None] = lambda share, text: None,
    settings: RaceSettings = DEFAULT_RACE_SETTINGS,
) -> tuple[TaskRace, ...]:
    """Race teachers on every task.

    Args:
        teachers: Names. Their order is reversed in every second round, so that weights are loaded
            less often.
        tasks: Tasks with their items.
        seed: Seed of the item order.
        answer_fn: (teacher, task, items) -> graded answers.
        progress: Called with (share of all items asked, text).
        settings: When a race ends.

    Returns:
        One finished race per task.
    """
    races = [
        TaskRace(
            task.name,
            interleave_languages(items, seed),
            {t: [] for t in teachers},
            {t: [] for t in teachers},
            settings=settings,
        )
        for task, items in tasks
    ]
    rounds = [iter(round_bounds(max(1, len(r.languages)), len(r.items), settings)) for r in races]
    num_items = sum(len(r.items) * len(teachers) for r in races)
    turn = 0
    while running := [k for k, race in enumerate(races) if race.stop_reason is None]:
        bounds = {k: next(rounds[k]) for k in running}
        for name in teachers[::-1] if turn % 2 else teachers:
            for k, (begin, end) in bounds.items():
                race = races[k]
                if len(race.scores[name]) == begin and not race.is_eliminated_everywhere(name):
                    results = answer_fn(name, tasks[k][0], race.items[begin:end])
                    race.results[name] += results
                    race.scores[name] += [r.value for r in results]
                    num_asked = sum(len(r.scores[t]) for r in races for t in teachers)
                    progress(
                        num_asked / num_items,
                        f"{name} {race.skill} {mean(race.scores[name]):.2f}",
                    )
        for k, (_, end) in bounds.items():
            races[k].update_eliminated(end)
        turn += 1
    return tuple(races)


def compare_efforts(
    races: Sequence[TaskRace],
    tasks: Sequence[Task],
    efforts: Mapping[str, Sequence[ThinkingEffort]],
    answer_fn: Callable[[str, ThinkingEffort, Task, Sequence[TaskItem]], Sequence[ItemResult]],
) -> tuple[tuple[EffortComparison, ...], dict[AuditionResultKey, list[ItemResult]]]:
    """Measure each teacher at its other efforts, on the items it answered at its own.

    Args:
        races: Finished races.
        tasks: Their tasks, in the same order.
        efforts: Teacher -> efforts, its own first.
        answer_fn: (teacher, effort, task, items) -> graded answers.

    Returns:
        The comparisons, and all graded answers by (teacher, skill, effort).
    """
    comparisons: list[EffortComparison] = []
    by_key: dict[AuditionResultKey, list[ItemResult]] = {}
    for race, task in zip(races, tasks, strict=True):
        for name, own_results in race.results.items():
            own_effort, *other_efforts = efforts[name]
            by_key[name, race.skill, own_effort] = own_results
            for effort in other_efforts:
                results = list(answer_fn(name, effort, task, race.items[: len(own_results)]))
                by_key[name, race.skill, effort] = results
                low, high = paired_difference_interval(
                    [r.value for r in results], [r.value for r in own_results]
                )
                score = score_results(name, race.skill, results, effort)
                comparisons.append(EffortComparison(score, own_effort, low, high))
    return tuple(comparisons), by_key
