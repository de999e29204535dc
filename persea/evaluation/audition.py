"""Cast: every teacher measured on every skill with as few questions as it takes; who teaches what, with what share, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from persea.chat.messages import ThinkingEffort
from persea.data.prompts import GOLDEN_RATIO_STEP, pick_by_share
from persea.errors import RefusedError
from persea.evaluation.racing import EffortComparison, StopReason, TaskRace, find_eliminated, mean
from persea.tasks.intervals import CONFIDENCE_LEVEL
from persea.tasks.task import Score, score_results


@dataclass(frozen=True)
class PartDecision:
    """How a part was decided: after how many questions, why then, and each teacher that was beaten with its winner."""

    num_items_asked: int
    stop_reason: StopReason
    eliminated: Mapping[str, str]


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
    decisions: Mapping[str, PartDecision] = field(default_factory=dict)
    effort_comparisons: tuple[EffortComparison, ...] = ()

    def part_of(self, skill: str, language: str) -> str:
        """The part a prompt belongs to."""
        part = f"{skill}/{language}"
        return part if part in self.parts else skill

    def teacher_of(self, part: str, number: int) -> str:
        """Who is asked the number-th prompt of a part: shares hold in every stretch of prompts, without chance."""
        return pick_by_share(self.parts[part], number, GOLDEN_RATIO_STEP)

    def to_json(self) -> dict[str, Any]:
        return {
            "parts": {k: [list(p) for p in v] for k, v in self.parts.items()},
            "pinned": list(self.pinned),
            "decisions": {part: asdict(c) for part, c in self.decisions.items()},
            "scores": [s.to_json() for s in self.scores],
            "effort_comparisons": [asdict(d) for d in self.effort_comparisons],
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Cast:
        def scored(s: Mapping[str, Any]) -> Score:
            return Score(**{**s, "effort": ThinkingEffort(s["effort"])})

        return Cast(
            {k: tuple((str(t), float(s)) for t, s in v) for k, v in value["parts"].items()},
            tuple(map(scored, value["scores"])),
            tuple(value["pinned"]),
            {
                k: PartDecision(c["num_items_asked"], StopReason(c["stop_reason"]), c["eliminated"])
                for k, c in value["decisions"].items()
            },
            tuple(
                EffortComparison(scored(d["score"]), ThinkingEffort(d["own"]), d["low"], d["high"])
                for d in value["effort_comparisons"]
            ),
        )


# --- who teaches ---


def race_scores(race: TaskRace, efforts: Mapping[str, ThinkingEffort]) -> Iterator[Score]:
    """Each teacher's score over all and, where there are several, per language."""
    for name, results in race.results.items():
        for language in ("", *(race.languages if len(race.languages) > 1 else ())):
            told = score_results(name, race.skill, results, efforts[name], language)
            if told.n:
                yield told


def build_cast(
    races: Sequence[TaskRace],
    efforts: Mapping[str, ThinkingEffort],
    pinned: Mapping[str, str],
    min_score: float,
    effort_comparisons: Sequence[EffortComparison] = (),
    taught_skills: Sequence[str] | None = None,
) -> Cast:
    """The strongest teacher of each skill, those that cannot be told from it sharing alike; or the one a person pinned.

    taught  the skills that prompts teach; others are measured and have no part. None = all
    A language becomes a part of its own where one of the skill's teachers is beaten in it with confidence (alpha shared among the
    languages). A teacher whose score is 0, or below the floor, teaches nothing.
    Raises Refused for a skill nobody is good enough at: copying the best of nothing teaches nothing.
    """
    parts: dict[str, tuple[tuple[str, float], ...]] = {}
    contests: dict[str, PartDecision] = {}
    for course in races:
        name, ended = course.skill, course.stop_reason or StopReason.BUDGET
        if taught_skills is not None and name not in taught_skills:
            continue
        contests[name] = PartDecision(
            max(map(len, course.scores.values())), ended, dict(course.eliminated)
        )
        if name in pinned:
            parts[name] = ((pinned[name], 1.0),)
            continue
        chosen = _eligible_teachers(course.scores, course.eliminated, min_score)
        if not chosen:
            raise _no_eligible_teacher_error(course, min_score)
        parts[name] = _equal_shares(chosen)
        for language in course.languages if len(course.languages) > 1 else ():
            values = {t: v for t, v in course.scores_in_language(language).items() if v}
            out = find_eliminated(
                values,
                (1 - CONFIDENCE_LEVEL) / len(course.languages),
                is_last_look=True,
                eliminated={},
            )
            best = _eligible_teachers(values, out, min_score)
            if best and set(chosen) & set(out):
                parts[f"{name}/{language}"] = _equal_shares(
                    [t for t in chosen if t in best] or best
                )
                contests[f"{name}/{language}"] = PartDecision(
                    max(map(len, values.values())), ended, out
                )
    return Cast(
        parts,
        tuple(s for c in races for s in race_scores(c, efforts)),
        tuple(c.skill for c in races if c.skill in pinned),
        contests,
        tuple(effort_comparisons),
    )


def _no_eligible_teacher_error(race: TaskRace, min_score: float) -> RefusedError:
    best = max(race.scores, key=lambda t: mean(race.scores[t]))
    told = (
        f"the best teacher of {race.skill}, {best}, has {mean(race.scores[best]):.2f}, below the floor of {min_score:g}"
        if mean(race.scores[best])
        else f"no teacher has a right answer on {race.skill}"
    )
    return RefusedError(
        f"{told} (n = {len(race.scores[best])})",
        where="audition",
        remedy=f"add a teacher who can, leave {race.skill} out of the corpus, or pin one with audition.pinned.{race.skill}",
    )


def _eligible_teachers(
    scores_by_teacher: Mapping[str, Sequence[float]],
    eliminated: Mapping[str, str],
    min_score: float,
) -> list[str]:
    return [
        t
        for t, v in scores_by_teacher.items()
        if t not in eliminated and mean(v) >= max(min_score, 1e-9)
    ]


def _equal_shares(teachers: Sequence[str]) -> tuple[tuple[str, float], ...]:
    return tuple((t, 1 / len(teachers)) for t in teachers)


# --- what a person sees ---


def cast_table(cast: Cast) -> list[tuple[str, ...]]:
    """Rows for a person: part, teacher, score with interval and n, share of the part's prompts, and why."""
    rows: list[tuple[str, ...]] = []
    for part, shares in cast.parts.items():
        skill, _, language = part.partition("/")
        contest = cast.decisions.get(part)
        for s in sorted(
            (s for s in cast.scores if (s.skill, s.language) == (skill, language)),
            key=lambda s: -s.value,
        ):
            share = dict(shares).get(s.model_name, 0)
            by = contest.eliminated.get(s.model_name) if contest else None
            over_all = cast.decisions[skill].eliminated.get(s.model_name) if language else None
            if skill in cast.pinned:
                why = "pinned" if share else "another is pinned"
            else:
                below = (
                    f"below {by}"
                    if by
                    else f"below {over_all} in all"
                    if over_all
                    else "below the floor"
                    if contest
                    else "not chosen"
                )
                why = ("tied" if share < 1 else "strongest") if share else below
            rows.append(
                (
                    part,
                    s.model_name,
                    f"{s.value:.2f} ({s.low:.2f}-{s.high:.2f})",
                    str(s.n),
                    f"{share:.0%}" if share else "-",
                    why,
                )
            )
    for d in cast.effort_comparisons:
        word = "better" if d.low > 0 else "worse" if d.high < 0 else "not told apart from it"
        rows.append(
            (
                d.score.skill,
                f"{d.score.model_name} at {d.score.effort}",
                f"{d.score.value:.2f} ({d.score.low:.2f}-{d.score.high:.2f})",
                str(d.score.n),
                "-",
                f"{word} than at {d.own_effort}"
                if d.low > 0 or d.high < 0
                else f"as at {d.own_effort}, as far as {d.score.n} tell",
            )
        )
    return rows


CAST_TABLE_COLUMNS = ("part", "teacher", "score", "n", "share", "why")


def cast_markdown(cast: Cast) -> str:
    """The table as Markdown, and how many questions it took."""
    lines = [
        " | ".join(("", *row, "")).strip()
        for row in (CAST_TABLE_COLUMNS, ("---",) * len(CAST_TABLE_COLUMNS), *cast_table(cast))
    ]
    took = [
        f"- {part}: {c.num_items_asked} questions, {'settled' if c.stop_reason is StopReason.SETTLED else 'all there were for it'}"
        for part, c in cast.decisions.items()
        if "/" not in part
    ]
    return "\n".join(["# audition", "", *lines, "", *took, ""])
