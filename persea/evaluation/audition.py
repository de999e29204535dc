"""Audition: measure every teacher on every skill, and choose the teachers of each skill.

The result is the cast: for each skill, or language of a skill, the strongest teachers and their
shares of the prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from persea.chat.messages import FinishReason, ThinkingEffort
from persea.data.prompts import GOLDEN_RATIO_STEP, pick_by_share
from persea.errors import RefusedError
from persea.evaluation.gain import Gain, GainDecision
from persea.evaluation.racing import EffortComparison, StopReason, TaskRace, find_eliminated, mean
from persea.evaluation.text_contest import TextContest, TextScore
from persea.tasks.task import Score, score_results

MIN_TEACHING_SCORE = 1e-9  # a teacher with a score of 0 teaches nothing, also with min_score 0


@dataclass(frozen=True)
class PartDecision:
    """How the teachers of a part were chosen.

    Attributes:
        num_items_asked: Items that the best measured teacher answered.
        stop_reason: Why the race ended.
        eliminated: Teacher -> the teacher that beat it.
    """

    num_items_asked: int
    stop_reason: StopReason
    eliminated: Mapping[str, str]


@dataclass(frozen=True)
class Cast:
    """The teachers of each skill, and their shares of its prompts.

    Attributes:
        parts: Part -> ((teacher, share), ...); shares sum to 1. A part is a skill, or
            skill/language where one language is ranked differently.
        scores: Scores of all teachers.
        pinned: Skills whose teacher the recipe chooses.
        decisions: Part -> how it was decided; only measured skills.
        effort_comparisons: Teachers at other efforts, for information: prompts are asked at a
            teacher's own effort.
        gains: The best teacher of each part compared with the student's base.
        skipped: Parts that `without_gain: skip` leaves out of the distillation.
        text_scores: Bits per byte of the teachers of given texts.
        worse_on_texts: Part of given texts -> teacher -> the teacher that needs fewer bits.
    """

    parts: Mapping[str, tuple[tuple[str, float], ...]]
    scores: tuple[Score, ...]
    pinned: tuple[str, ...] = ()
    decisions: Mapping[str, PartDecision] = field(default_factory=dict)
    effort_comparisons: tuple[EffortComparison, ...] = ()
    gains: tuple[GainDecision, ...] = ()
    skipped: tuple[str, ...] = ()
    text_scores: tuple[TextScore, ...] = ()
    worse_on_texts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def part_of(self, skill: str, language: str) -> str:
        """Return the part that a prompt belongs to."""
        part = f"{skill}/{language}"
        return part if part in self.parts or part in self.skipped else skill

    def teacher_of(self, part: str, number: int) -> str:
        """Return the teacher of a part's prompt number; shares hold in any run of prompts."""
        return pick_by_share(self.parts[part], number, GOLDEN_RATIO_STEP)

    def with_text_contests(self, contests: Sequence[TextContest]) -> Cast:
        """Return the cast with the teachers of given texts."""
        parts, worse = dict(self.parts), dict(self.worse_on_texts)
        for contest in contests:
            for score in contest.scores:  # every language is a part of its own
                parts.pop(score.skill, None)
        for contest in contests:
            parts |= contest.parts
            worse |= contest.worse_than
        scores = tuple(s for contest in contests for s in contest.scores)
        return replace(
            self,
            parts=parts,
            text_scores=(*self.text_scores, *scores),
            worse_on_texts=worse,
        )

    def with_gains(self, gains: Sequence[GainDecision], skipped: Sequence[str] = ()) -> Cast:
        """Return the cast with the comparisons to the student's base, without skipped parts."""
        parts = {part: shares for part, shares in self.parts.items() if part not in skipped}
        return replace(self, parts=parts, gains=tuple(gains), skipped=tuple(skipped))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; keys are the field names."""
        return {
            "parts": {k: [list(p) for p in v] for k, v in self.parts.items()},
            "pinned": list(self.pinned),
            "decisions": {part: asdict(d) for part, d in self.decisions.items()},
            "scores": [s.to_json() for s in self.scores],
            "effort_comparisons": [asdict(c) for c in self.effort_comparisons],
            "gains": [g.to_json() for g in self.gains],
            "skipped": list(self.skipped),
            "text_scores": [s.to_json() for s in self.text_scores],
            "worse_on_texts": {k: dict(v) for k, v in self.worse_on_texts.items()},
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Cast:
        """Read the result of `to_json`; an old cast may have no decisions."""

        def read_score(s: Mapping[str, Any]) -> Score:
            return Score(**{**s, "effort": ThinkingEffort(s["effort"])})

        return Cast(
            {k: tuple((str(t), float(s)) for t, s in v) for k, v in value["parts"].items()},
            tuple(map(read_score, value["scores"])),
            tuple(value["pinned"]),
            {
                k: PartDecision(c["num_items_asked"], StopReason(c["stop_reason"]), c["eliminated"])
                for k, c in value.get("decisions", {}).items()
            },
            tuple(
                EffortComparison(
                    read_score(c["score"]), ThinkingEffort(c["own_effort"]), c["low"], c["high"]
                )
                for c in value.get("effort_comparisons", ())
            ),
            tuple(map(GainDecision.from_json, value.get("gains", ()))),
            tuple(value.get("skipped", ())),
            tuple(TextScore(**s) for s in value.get("text_scores", ())),
            value.get("worse_on_texts", {}),
        )


# --- choosing teachers ---


def race_scores(race: TaskRace, efforts: Mapping[str, ThinkingEffort]) -> Iterator[Score]:
    """Yield each teacher's score over all items and, with several languages, per language."""
    for name, results in race.results.items():
        for language in ("", *(race.languages if len(race.languages) > 1 else ())):
            score = score_results(name, race.skill, results, efforts[name], language)
            if score.n:
                yield score


def build_cast(
    races: Sequence[TaskRace],
    efforts: Mapping[str, ThinkingEffort],
    pinned: Mapping[str, str],
    min_score: float,
    effort_comparisons: Sequence[EffortComparison] = (),
    taught_skills: Sequence[str] | None = None,
) -> Cast:
    """Choose the teachers of each skill: the strongest, in equal shares with all that tie with it.

    A language becomes a part of its own if one of the skill's teachers is beaten in it with
    confidence (alpha divided among the languages).

    Args:
        races: Finished races.
        efforts: Teacher -> effort it was measured at.
        pinned: Skill -> teacher that the recipe chooses.
        min_score: Lowest score of a teacher that teaches.
        effort_comparisons: See Cast.
        taught_skills: Skills with prompts; others are measured only. None = all.

    Raises:
        RefusedError: No teacher of a skill reaches `min_score`.
    """
    parts: dict[str, tuple[tuple[str, float], ...]] = {}
    decisions: dict[str, PartDecision] = {}
    for race in races:
        skill = race.skill
        if taught_skills is not None and skill not in taught_skills:
            continue
        stop_reason = race.stop_reason or StopReason.BUDGET
        num_asked = max(map(len, race.scores.values()))
        decisions[skill] = PartDecision(num_asked, stop_reason, dict(race.eliminated))
        if skill in pinned:
            parts[skill] = ((pinned[skill], 1.0),)
            continue
        chosen = _eligible_teachers(race.scores, race.eliminated, min_score)
        if not chosen:
            raise _no_eligible_teacher_error(race, min_score)
        parts[skill] = _equal_shares(chosen)
        for language in race.languages if len(race.languages) > 1 else ():
            scores = {t: v for t, v in race.scores_in_language(language).items() if v}
            alpha = (1 - race.settings.confidence) / len(race.languages)
            eliminated = find_eliminated(scores, alpha, is_last_look=True, eliminated={})
            best = _eligible_teachers(scores, eliminated, min_score)
            if best and set(chosen) & set(eliminated):
                part = f"{skill}/{language}"
                parts[part] = _equal_shares([t for t in chosen if t in best] or best)
                num_asked = max(map(len, scores.values()))
                decisions[part] = PartDecision(num_asked, stop_reason, eliminated)
    return Cast(
        parts,
        tuple(s for race in races for s in race_scores(race, efforts)),
        tuple(race.skill for race in races if race.skill in pinned),
        decisions,
        tuple(effort_comparisons),
    )


def _no_eligible_teacher_error(race: TaskRace, min_score: float) -> RefusedError:
    best = max(race.scores, key=lambda t: mean(race.scores[t]))
    score = mean(race.scores[best])
    reason = (
        f"the best teacher of {race.skill}, {best}, scores {score:.2f}, "
        f"below the floor of {min_score:g}"
        if score
        else f"no teacher has a correct answer on {race.skill}"
    )
    results = race.results[best]
    num_cut = sum(r.finish is FinishReason.LENGTH for r in results)
    if results and 2 * num_cut >= len(results):
        return RefusedError(
            f"{num_cut} of {len(results)} answers of {best} on {race.skill} were cut off at "
            f"max_new_tokens ({reason})",
            where="audition",
            remedy="raise capture.max_new_tokens, or generation.max_new_tokens of the teacher",
        )
    return RefusedError(
        f"{reason} (n = {len(race.scores[best])})",
        where="audition",
        remedy=f"add a better teacher, leave {race.skill} out of the corpus, "
        f"or pin a teacher with audition.pinned.{race.skill}",
    )


def _eligible_teachers(
    scores_by_teacher: Mapping[str, Sequence[float]],
    eliminated: Mapping[str, str],
    min_score: float,
) -> list[str]:
    return [
        t
        for t, v in scores_by_teacher.items()
        if t not in eliminated and mean(v) >= max(min_score, MIN_TEACHING_SCORE)
    ]


def _equal_shares(teachers: Sequence[str]) -> tuple[tuple[str, float], ...]:
    return tuple((t, 1 / len(teachers)) for t in teachers)


# --- teachers that are not better than the student ---


def apply_gains(cast: Cast, gains: Sequence[GainDecision], without_gain: str) -> Cast:
    """Record how the best teachers compare with the student's base, and act on it.

    A part whose teacher the recipe pinned is reported only: the recipe wants that teacher.

    Args:
        cast: The cast.
        gains: One decision for each part that was measured.
        without_gain: For a part without a better teacher: "warn" keeps it, "skip" leaves it out of
            the distillation, "refuse" ends the run.

    Raises:
        RefusedError: A part has no better teacher and `without_gain` is "refuse"; or "skip" leaves
            nothing to distil.
    """
    lacking = [g for g in gains if g.gain_kind is not Gain.BETTER and not g.pinned]
    if lacking and without_gain == "refuse":
        raise RefusedError(
            "; ".join(g.sentence for g in lacking),
            where="audition",
            remedy="add a better teacher, leave the part out of the corpus, or write "
            "audition.without_gain: warn (teach it all the same) or skip (leave it out)",
        )
    skipped = tuple(g.part for g in lacking) if without_gain == "skip" else ()
    result = cast.with_gains(gains, skipped)
    if skipped and not result.parts:
        raise RefusedError(
            "; ".join(g.sentence for g in lacking),
            where="audition",
            remedy="nothing is left to distil: add a better teacher, or write "
            "audition.without_gain: warn",
        )
    return result


def gain_sentences(cast: Cast) -> list[str]:
    """Return a line for each part without a better teacher."""
    left_out = "; left out (audition.without_gain: skip)"
    return [
        g.sentence + (left_out if g.part in cast.skipped else "")
        for g in cast.gains
        if g.gain_kind is not Gain.BETTER
    ]


# --- tables ---


def cast_table(cast: Cast) -> list[tuple[str, ...]]:
    """Return table rows: part, teacher, score with interval, n, share of the prompts, reason."""
    rows: list[tuple[str, ...]] = []
    for part, shares in cast.parts.items():
        skill, _, language = part.partition("/")
        scores = [s for s in cast.scores if (s.skill, s.language) == (skill, language)]
        for score in sorted(scores, key=lambda s: -s.value):
            share = dict(shares).get(score.model_name, 0)
            rows.append(
                (
                    part,
                    score.model_name,
                    _format_score(score),
                    str(score.n),
                    f"{share:.0%}" if share else "-",
                    _cast_reason(cast, part, score.model_name, share),
                )
            )
        rows += _text_rows(cast, part, dict(shares))
    for c in cast.effort_comparisons:
        if c.low > 0 or c.high < 0:
            verdict = f"{'better' if c.low > 0 else 'worse'} than at {c.own_effort}"
        else:
            verdict = f"no significant difference to {c.own_effort} (n = {c.score.n})"
        rows.append(
            (
                c.score.skill,
                f"{c.score.model_name} at {c.score.effort}",
                _format_score(c.score),
                str(c.score.n),
                "-",
                verdict,
            )
        )
    return rows


def _text_rows(
    cast: Cast, part: str, share_by_teacher: Mapping[str, float]
) -> Iterator[tuple[str, ...]]:
    """Yield the rows of a part of given texts, the fewest bits per byte first."""
    skill, _, language = part.partition("/")
    scores = [
        s for s in cast.text_scores if s.skill == skill and (not language or s.language == language)
    ]
    for s in sorted(scores, key=lambda s: s.bits_per_byte):
        share = share_by_teacher.get(s.model_name, 0)
        interval = "" if s.low is None or s.high is None else f" ({s.low:.3f}-{s.high:.3f})"
        better = cast.worse_on_texts.get(part, {}).get(s.model_name)
        reason = "tied" if 0 < share < 1 else "strongest" if share else f"worse than {better}"
        if skill in cast.pinned:
            reason = "pinned" if share else "another is pinned"
        yield (
            part,
            s.model_name,
            f"{s.bits_per_byte:.3f} bits/byte{interval}",
            str(s.n),
            f"{share:.0%}" if share else "-",
            reason,
        )


def _format_score(score: Score) -> str:
    return f"{score.value:.2f} ({score.low:.2f}-{score.high:.2f})"


def _cast_reason(cast: Cast, part: str, teacher: str, share: float) -> str:
    """Return why a teacher teaches a part, or does not."""
    skill, _, language = part.partition("/")
    if skill in cast.pinned:
        return "pinned" if share else "another is pinned"
    if share:
        is_only = len({s.model_name for s in cast.scores if s.skill == skill}) == 1
        return "tied" if share < 1 else "only teacher" if is_only else "strongest"
    decision = cast.decisions.get(part)
    if decision and teacher in decision.eliminated:
        return f"worse than {decision.eliminated[teacher]}"
    if language and teacher in cast.decisions[skill].eliminated:
        return f"worse than {cast.decisions[skill].eliminated[teacher]} over all languages"
    return "below the floor" if decision else "not chosen"


CAST_TABLE_COLUMNS = ("part", "teacher", "score", "n", "share", "reason")


def cast_markdown(cast: Cast) -> str:
    """Return the table as Markdown, with the number of items each skill took."""
    lines = [
        " | ".join(("", *row, "")).strip()
        for row in (CAST_TABLE_COLUMNS, ("---",) * len(CAST_TABLE_COLUMNS), *cast_table(cast))
    ]
    counts = [
        f"- {part}: {d.num_items_asked} items, "
        f"{'settled' if d.stop_reason is StopReason.SETTLED else 'all items used'}"
        for part, d in cast.decisions.items()
        if "/" not in part
    ]
    gains = [f"- {g.sentence}" for g in cast.gains]
    return "\n".join(["# audition", "", *lines, "", *counts, *gains, ""])
