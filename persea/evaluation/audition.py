"""Cast: every teacher measured on every skill with as few questions as it takes; who teaches what, with what share, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from persea.chat.messages import Effort
from persea.data.prompts import GOLDEN, in_turn
from persea.errors import Refused
from persea.evaluation.racing import Course, Dial, Ended, beaten, mean
from persea.tasks.intervals import CONFIDENCE
from persea.tasks.task import Score, score


@dataclass(frozen=True)
class Decided:
    """How a part was decided: after how many questions, why then, and each teacher that was beaten with its winner."""

    asked: int
    ended: Ended
    beaten: Mapping[str, str]


@dataclass(frozen=True)
class Cast:
    """Who teaches what.

    parts     skill, or skill/language where the ranking of a language differs -> ((teacher, share), ...); shares sum to 1
    scores    the measurement behind it
    pinned    skills a person cast in the recipe, not the measurement
    contests  part -> how it was decided; none of a skill that was not measured
    dials     teachers at other efforts; they decide nothing, since prompts are asked at a teacher's own
    """

    parts: Mapping[str, tuple[tuple[str, float], ...]]
    scores: tuple[Score, ...]
    pinned: tuple[str, ...] = ()
    contests: Mapping[str, Decided] = field(default_factory=dict)
    dials: tuple[Dial, ...] = ()

    def part_of(self, skill: str, language: str) -> str:
        """The part a prompt belongs to."""
        part = f"{skill}/{language}"
        return part if part in self.parts else skill

    def teacher_of(self, part: str, number: int) -> str:
        """Who is asked the number-th prompt of a part: shares hold in every stretch of prompts, without chance."""
        return in_turn(self.parts[part], number, GOLDEN)

    def to_json(self) -> dict[str, Any]:
        return {"parts": {k: [list(p) for p in v] for k, v in self.parts.items()}, "pinned": list(self.pinned),
                "contests": {part: asdict(c) for part, c in self.contests.items()}, "scores": [s.to_json() for s in self.scores],
                "dials": [asdict(d) for d in self.dials]}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Cast:
        def scored(s: Mapping[str, Any]) -> Score:
            return Score(**{**s, "effort": Effort(s["effort"])})

        return Cast({k: tuple((str(t), float(s)) for t, s in v) for k, v in value["parts"].items()},
                    tuple(map(scored, value["scores"])), tuple(value["pinned"]),
                    {k: Decided(c["asked"], Ended(c["ended"]), c["beaten"]) for k, c in value.get("contests", {}).items()},
                    tuple(Dial(scored(d["score"]), Effort(d["own"]), d["low"], d["high"]) for d in value.get("dials", ())))


# --- who teaches ---


def scores(course: Course, efforts: Mapping[str, Effort]) -> Iterator[Score]:
    """Each teacher's score over all and, where there are several, per language."""
    for name, results in course.results.items():
        for language in ("", *(course.languages if len(course.languages) > 1 else ())):
            told = score(name, course.skill, results, efforts[name], language)
            if told.n:
                yield told


def cast(courses: Sequence[Course], efforts: Mapping[str, Effort], pinned: Mapping[str, str], floor: float, dials: Sequence[Dial] = (),
         taught: Sequence[str] | None = None) -> Cast:
    """The strongest teacher of each skill, those that cannot be told from it sharing alike; or the one a person pinned.

    taught  the skills that prompts teach; others are measured and have no part. None = all
    A language becomes a part of its own where one of the skill's teachers is beaten in it with confidence (alpha shared among the
    languages). A teacher whose score is 0, or below the floor, teaches nothing.
    Raises Refused for a skill nobody is good enough at: copying the best of nothing teaches nothing.
    """
    parts: dict[str, tuple[tuple[str, float], ...]] = {}
    contests: dict[str, Decided] = {}
    for course in courses:
        name, ended = course.skill, course.ended or Ended.BUDGET
        if taught is not None and name not in taught:
            continue
        contests[name] = Decided(max(map(len, course.values.values())), ended, dict(course.out))
        if name in pinned:
            parts[name] = ((pinned[name], 1.0),)
            continue
        chosen = _able(course.values, course.out, floor)
        if not chosen:
            raise _nobody(course, floor)
        parts[name] = _shared(chosen)
        for language in course.languages if len(course.languages) > 1 else ():
            values = {t: v for t, v in course.of(language).items() if v}
            out = beaten(values, (1 - CONFIDENCE) / len(course.languages), last=True, out={})
            best = _able(values, out, floor)
            if best and set(chosen) & set(out):
                parts[f"{name}/{language}"] = _shared([t for t in chosen if t in best] or best)
                contests[f"{name}/{language}"] = Decided(max(map(len, values.values())), ended, out)
    return Cast(parts, tuple(s for c in courses for s in scores(c, efforts)), tuple(c.skill for c in courses if c.skill in pinned), contests,
                tuple(dials))


def _nobody(course: Course, floor: float) -> Refused:
    best = max(course.values, key=lambda t: mean(course.values[t]))
    told = (f"the best teacher of {course.skill}, {best}, has {mean(course.values[best]):.2f}, below the floor of {floor:g}"
            if mean(course.values[best]) else f"no teacher has a right answer on {course.skill}")
    return Refused(f"{told} (n = {len(course.values[best])})", where="audition",
                   remedy=f"add a teacher who can, leave {course.skill} out of the corpus, or pin one with audition.pinned.{course.skill}")


def _able(values: Mapping[str, Sequence[float]], out: Mapping[str, str], floor: float) -> list[str]:
    return [t for t, v in values.items() if t not in out and mean(v) >= max(floor, 1e-9)]


def _shared(teachers: Sequence[str]) -> tuple[tuple[str, float], ...]:
    return tuple((t, 1 / len(teachers)) for t in teachers)


# --- what a person sees ---


def table(cast: Cast) -> list[tuple[str, ...]]:
    """Rows for a person: part, teacher, score with interval and n, share of the part's prompts, and why."""
    rows: list[tuple[str, ...]] = []
    for part, shares in cast.parts.items():
        skill, _, language = part.partition("/")
        contest = cast.contests.get(part)
        for s in sorted((s for s in cast.scores if (s.skill, s.language) == (skill, language)), key=lambda s: -s.value):
            share = dict(shares).get(s.speaker, 0)
            by = contest.beaten.get(s.speaker) if contest else None
            over_all = cast.contests[skill].beaten.get(s.speaker) if language else None
            if skill in cast.pinned:
                why = "pinned" if share else "another is pinned"
            else:
                below = f"below {by}" if by else f"below {over_all} in all" if over_all else "below the floor" if contest else "not chosen"
                why = ("tied" if share < 1 else "strongest") if share else below
            rows.append((part, s.speaker, f"{s.value:.2f} ({s.low:.2f}-{s.high:.2f})", str(s.n), f"{share:.0%}" if share else "-", why))
    for d in cast.dials:
        word = "better" if d.low > 0 else "worse" if d.high < 0 else "not told apart from it"
        rows.append((d.score.skill, f"{d.score.speaker} at {d.score.effort}", f"{d.score.value:.2f} ({d.score.low:.2f}-{d.score.high:.2f})",
                     str(d.score.n), "-", f"{word} than at {d.own}" if d.low > 0 or d.high < 0 else f"as at {d.own}, as far as {d.score.n} tell"))
    return rows


COLUMNS = ("part", "teacher", "score", "n", "share", "why")


def markdown(cast: Cast) -> str:
    """The table as Markdown, and how many questions it took."""
    lines = [" | ".join(("", *row, "")).strip() for row in (COLUMNS, ("---",) * len(COLUMNS), *table(cast))]
    took = [f"- {part}: {c.asked} questions, {'settled' if c.ended is Ended.SETTLED else 'all there were for it'}"
            for part, c in cast.contests.items() if "/" not in part]
    return "\n".join(["# audition", "", *lines, "", *took, ""])
