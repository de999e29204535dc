"""Contest: teachers asked in rounds of a few questions, until one is left of each skill or the questions are used up."""

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
FIRST_ROUND_ITEMS = 10  # questions of the first round: ten wins of ten settle five teachers (evidence 186 > 160), nine settle three (102 > 80)
MIN_ITEMS_PER_LANGUAGE = (
    4  # questions of each language before a skill is settled: what is ahead in fewer is seldom seen
)


class StopReason(StrEnum):
    """Why no more was asked about a skill."""

    SETTLED = "settled"  # one teacher is left, and no other is ahead of it in any language
    BUDGET = "budget"  # `audition.items` are asked


@dataclass(frozen=True)
class EffortComparison:
    """A teacher at another effort than its own, on the questions asked at its own; low to high: 95 % interval of the difference."""

    score: Score
    own_effort: ThinkingEffort
    low: float
    high: float


def interleave_languages(items: Sequence[TaskItem], seed: int) -> tuple[TaskItem, ...]:
    """Items in an order that chance decides, one of each language in turn as long as they last: any stretch is a sample of the set."""
    drawn = sorted(items, key=lambda i: hashlib.sha256(f"{seed}/{i.prompt.id}".encode()).digest())
    by_language: dict[str, list[TaskItem]] = {}
    for item in drawn:
        by_language.setdefault(item.prompt.language, []).append(item)
    return tuple(i for block in zip_longest(*by_language.values()) for i in block if i is not None)


def round_bounds(num_languages: int, max_items: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of each round of questions: whole blocks of languages, each round half as many as were asked before, `most` in all."""
    begin, end = 0, 0
    while end < max_items:
        step = max(FIRST_ROUND_ITEMS, end // 2)
        begin, end = end, min(max_items, end + step + -step % num_languages)
        yield begin, end


def find_eliminated(
    scores_by_teacher: Mapping[str, Sequence[float]],
    alpha: float,
    is_last_look: bool,
    eliminated: Mapping[str, str],
) -> dict[str, str]:
    """Teacher -> who beats it: those that are out already, and each that one still in is better than on the items both answered.

    The best of K is in it with a chance of at most alpha, however often one looks. Half of alpha is betting's, whose evidence must reach
    K - 1 over that half (Bonferroni over the K - 1 rivals; looking often costs nothing, see `evidence`). The other half is spent once,
    at the `last` look, on the paired interval of the difference, which tells more apart from the same items.
    """
    rivals = max(1, len(scores_by_teacher) - 1)
    found = dict(eliminated)
    for one, mine in scores_by_teacher.items():
        for other, its in scores_by_teacher.items():
            n = min(len(mine), len(its))
            if one == other or n == 0 or {one, other} & set(found):
                continue
            if betting_wealth([b - a for a, b in zip(mine[:n], its[:n], strict=True)])[
                -1
            ] >= 2 * rivals / alpha or (
                is_last_look
                and paired_difference_interval(its[:n], mine[:n], 1 - alpha / rivals)[0] > 0
            ):
                found[one] = other
    return found


@dataclass
class TaskRace:
    """One skill's audition while it runs: values by teacher in the order asked, and who is out."""

    skill: str
    items: tuple[TaskItem, ...]
    scores: dict[str, list[float]]
    results: dict[str, list[ItemResult]]
    stop_reason: StopReason | None = None
    eliminated: dict[str, str] = field(default_factory=dict)

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(sorted({i.prompt.language for i in self.items}))

    def scores_in_language(self, language: str) -> dict[str, list[float]]:
        """Values by teacher of the items of one language."""
        return {
            name: [
                v for v, i in zip(values, self.items, strict=False) if i.prompt.language == language
            ]
            for name, values in self.scores.items()
        }

    def update_eliminated(self, num_items_asked: int) -> None:
        """Who is beaten by now, and whether more questions could tell more."""
        last = num_items_asked >= len(self.items)
        self.eliminated = find_eliminated(self.scores, 1 - CONFIDENCE_LEVEL, last, self.eliminated)
        left = [name for name in self.scores if name not in self.eliminated]
        told = [self.scores_in_language(language) for language in self.languages]
        seen = all(
            min(len(mine[name]) for name in left)
            >= min(MIN_ITEMS_PER_LANGUAGE, _count_items_in_language(self.items, language))
            for language, mine in zip(self.languages, told, strict=True)
        )
        ahead = any(
            mean(mine[name]) > max(mean(mine[w]) for w in left)
            for mine in told
            for name in self.eliminated
            if len(told) > 1
        )
        if len(left) == 1 and seen and not ahead:
            self.stop_reason = StopReason.SETTLED
        elif last:
            self.stop_reason = StopReason.BUDGET

    def is_eliminated_everywhere(self, name: str) -> bool:
        """Beaten, and ahead in no language: asking it more changes nothing."""
        return name in self.eliminated and all(
            mean(mine[name])
            <= max(mean(v) for other, v in mine.items() if other not in self.eliminated)
            for mine in map(self.scores_in_language, self.languages)
        )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _count_items_in_language(items: Sequence[TaskItem], language: str) -> int:
    return sum(i.prompt.language == language for i in items)


def race_teachers(
    teachers: Sequence[str],
    tasks: Sequence[tuple[Task, Sequence[TaskItem]]],
    seed: int,
    answer_fn: Callable[[str, Task, Sequence[TaskItem]], Sequence[ItemResult]],
    progress: Callable[[float, str], None] = lambda share, words: None,
) -> tuple[TaskRace, ...]:
    """Every teacher on every skill, in rounds of a few questions, until one teacher is left of each skill or its items are used up.

    ask  (teacher, skill, items) -> results; teachers come in turn and every second round backwards, so that weights are changed seldom
    """
    courses = [
        TaskRace(
            skill.name,
            interleave_languages(items, seed),
            {t: [] for t in teachers},
            {t: [] for t in teachers},
        )
        for skill, items in tasks
    ]
    plans = [iter(round_bounds(max(1, len(c.languages)), len(c.items))) for c in courses]
    turn = 0
    while running := [k for k, c in enumerate(courses) if c.stop_reason is None]:
        spans = {k: next(plans[k]) for k in running}
        for name in teachers[::-1] if turn % 2 else teachers:
            for k, (begin, end) in spans.items():
                course = courses[k]
                if len(course.scores[name]) == begin and not course.is_eliminated_everywhere(name):
                    results = answer_fn(name, tasks[k][0], course.items[begin:end])
                    course.results[name] += results
                    course.scores[name] += [r.value for r in results]
                    progress(
                        sum(len(c.scores[t]) for c in courses for t in teachers)
                        / sum(len(c.items) * len(teachers) for c in courses),
                        f"{name} {course.skill} {mean(course.scores[name]):.2f}",
                    )
        for k, (_, end) in spans.items():
            courses[k].update_eliminated(end)
        turn += 1
    return tuple(courses)


def compare_efforts(
    races: Sequence[TaskRace],
    tasks: Sequence[Task],
    efforts: Mapping[str, Sequence[ThinkingEffort]],
    answer_fn: Callable[[str, ThinkingEffort, Task, Sequence[TaskItem]], Sequence[ItemResult]],
) -> tuple[tuple[EffortComparison, ...], dict[AuditionResultKey, list[ItemResult]]]:
    """Each teacher at its other efforts, on the questions it was asked at its own; and all that was said, by teacher, skill and effort."""
    dials: list[EffortComparison] = []
    said: dict[AuditionResultKey, list[ItemResult]] = {}
    for course, skill in zip(races, tasks, strict=True):
        for name, results in course.results.items():
            own, *others = efforts[name]
            said[name, course.skill, own] = results
            for effort in others:
                mine = said[name, course.skill, effort] = list(
                    answer_fn(name, effort, skill, course.items[: len(results)])
                )
                dials.append(
                    EffortComparison(
                        score_results(name, course.skill, mine, effort),
                        own,
                        *paired_difference_interval(
                            [r.value for r in mine], [r.value for r in results]
                        ),
                    )
                )
    return tuple(dials), said
