"""Contest: teachers asked in rounds of a few questions, until one is left of each skill or the questions are used up."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import zip_longest
from typing import TypeAlias

from persea.chat.messages import Effort
from persea.tasks.intervals import CONFIDENCE, evidence, of_difference
from persea.tasks.task import Item, Result, Score, Skill, score

Heard: TypeAlias = tuple[str, str, Effort]  # teacher, skill, effort
FIRST = 10  # questions of the first round: ten wins of ten settle five teachers (evidence 186 > 160), nine settle three (102 > 80)
SEEN = 4  # questions of each language before a skill is settled: what is ahead in fewer is seldom seen


class Ended(StrEnum):
    """Why no more was asked about a skill."""

    SETTLED = "settled"  # one teacher is left, and no other is ahead of it in any language
    BUDGET = "budget"  # `audition.items` are asked


@dataclass(frozen=True)
class Dial:
    """A teacher at another effort than its own, on the questions asked at its own; low to high: 95 % interval of the difference."""

    score: Score
    own: Effort
    low: float
    high: float


def in_blocks(items: Sequence[Item], seed: int) -> tuple[Item, ...]:
    """Items in an order that chance decides, one of each language in turn as long as they last: any stretch is a sample of the set."""
    drawn = sorted(items, key=lambda i: hashlib.sha256(f"{seed}/{i.prompt.id}".encode()).digest())
    by_language: dict[str, list[Item]] = {}
    for item in drawn:
        by_language.setdefault(item.prompt.language, []).append(item)
    return tuple(i for block in zip_longest(*by_language.values()) for i in block if i is not None)


def rounds(languages: int, most: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of each round of questions: whole blocks of languages, each round half as many as were asked before, `most` in all."""
    begin, end = 0, 0
    while end < most:
        step = max(FIRST, end // 2)
        begin, end = end, min(most, end + step + -step % languages)
        yield begin, end


def beaten(values: Mapping[str, Sequence[float]], alpha: float, last: bool, out: Mapping[str, str]) -> dict[str, str]:
    """Teacher -> who beats it: those that are out already, and each that one still in is better than on the items both answered.

    The best of K is in it with a chance of at most alpha, however often one looks. Half of alpha is betting's, whose evidence must reach
    K - 1 over that half (Bonferroni over the K - 1 rivals; looking often costs nothing, see `evidence`). The other half is spent once,
    at the `last` look, on the paired interval of the difference, which tells more apart from the same items.
    """
    rivals = max(1, len(values) - 1)
    found = dict(out)
    for one, mine in values.items():
        for other, its in values.items():
            n = min(len(mine), len(its))
            if one == other or n == 0 or {one, other} & set(found):
                continue
            if evidence([b - a for a, b in zip(mine[:n], its[:n], strict=True)])[-1] >= 2 * rivals / alpha or (
                    last and of_difference(its[:n], mine[:n], 1 - alpha / rivals)[0] > 0):
                found[one] = other
    return found


@dataclass
class Course:
    """One skill's audition while it runs: values by teacher in the order asked, and who is out."""

    skill: str
    items: tuple[Item, ...]
    values: dict[str, list[float]]
    results: dict[str, list[Result]]
    ended: Ended | None = None
    out: dict[str, str] = field(default_factory=dict)

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(sorted({i.prompt.language for i in self.items}))

    def of(self, language: str) -> dict[str, list[float]]:
        """Values by teacher of the items of one language."""
        return {name: [v for v, i in zip(values, self.items, strict=False) if i.prompt.language == language]
                for name, values in self.values.items()}

    def judge(self, asked: int) -> None:
        """Who is beaten by now, and whether more questions could tell more."""
        last = asked >= len(self.items)
        self.out = beaten(self.values, 1 - CONFIDENCE, last, self.out)
        left = [name for name in self.values if name not in self.out]
        told = [self.of(language) for language in self.languages]
        seen = all(min(len(mine[name]) for name in left) >= min(SEEN, _count(self.items, language))
                   for language, mine in zip(self.languages, told, strict=True))
        ahead = any(mean(mine[name]) > max(mean(mine[w]) for w in left) for mine in told for name in self.out if len(told) > 1)
        if len(left) == 1 and seen and not ahead:
            self.ended = Ended.SETTLED
        elif last:
            self.ended = Ended.BUDGET

    def hopeless(self, name: str) -> bool:
        """Beaten, and ahead in no language: asking it more changes nothing."""
        return name in self.out and all(mean(mine[name]) <= max(mean(v) for other, v in mine.items() if other not in self.out)
                                        for mine in map(self.of, self.languages))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _count(items: Sequence[Item], language: str) -> int:
    return sum(i.prompt.language == language for i in items)


def contest(teachers: Sequence[str], skills: Sequence[tuple[Skill, Sequence[Item]]], seed: int,
             ask: Callable[[str, Skill, Sequence[Item]], Sequence[Result]], done: Callable[[float, str], None] = lambda share, words: None
             ) -> tuple[Course, ...]:
    """Every teacher on every skill, in rounds of a few questions, until one teacher is left of each skill or its items are used up.

    ask  (teacher, skill, items) -> results; teachers come in turn and every second round backwards, so that weights are changed seldom
    """
    courses = [Course(skill.name, in_blocks(items, seed), {t: [] for t in teachers}, {t: [] for t in teachers}) for skill, items in skills]
    plans = [iter(rounds(max(1, len(c.languages)), len(c.items))) for c in courses]
    turn = 0
    while running := [k for k, c in enumerate(courses) if c.ended is None]:
        spans = {k: next(plans[k]) for k in running}
        for name in teachers[::-1] if turn % 2 else teachers:
            for k, (begin, end) in spans.items():
                course = courses[k]
                if len(course.values[name]) == begin and not course.hopeless(name):
                    results = ask(name, skills[k][0], course.items[begin:end])
                    course.results[name] += results
                    course.values[name] += [r.value for r in results]
                    done(sum(len(c.values[t]) for c in courses for t in teachers) / sum(len(c.items) * len(teachers) for c in courses),
                         f"{name} {course.skill} {mean(course.values[name]):.2f}")
        for k, (_, end) in spans.items():
            courses[k].judge(end)
        turn += 1
    return tuple(courses)


def at_efforts(courses: Sequence[Course], skills: Sequence[Skill], efforts: Mapping[str, Sequence[Effort]],
               ask: Callable[[str, Effort, Skill, Sequence[Item]], Sequence[Result]]) -> tuple[tuple[Dial, ...], dict[Heard, list[Result]]]:
    """Each teacher at its other efforts, on the questions it was asked at its own; and all that was said, by teacher, skill and effort."""
    dials: list[Dial] = []
    said: dict[Heard, list[Result]] = {}
    for course, skill in zip(courses, skills, strict=True):
        for name, results in course.results.items():
            own, *others = efforts[name]
            said[name, course.skill, own] = results
            for effort in others:
                mine = said[name, course.skill, effort] = list(ask(name, effort, skill, course.items[:len(results)]))
                dials.append(Dial(score(name, course.skill, mine, effort), own,
                                  *of_difference([r.value for r in mine], [r.value for r in results])))
    return tuple(dials), said
