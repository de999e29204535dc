"""Sentences that are computed: what a run's numbers and their intervals allow to say, and no more."""

from __future__ import annotations

from collections.abc import Sequence

from persea.report import svg as charts
from persea.report.run_files import (
    EvaluationRecord,
    IntervalOrder,
    SkillComparison,
    difference_order,
    score_order,
)


def headline(comparisons: Sequence[SkillComparison]) -> str:
    """One sentence: what is kept, best first, the lowest named as such."""
    teachers = len(comparisons[0].teachers)
    kept = sorted(
        ((r.retained, r.skill) for r in comparisons if r.retained is not None), reverse=True
    )
    told = [f"{charts.format_percent(share)} on {skill}" for share, skill in kept]
    whose = "the best teacher" if teachers > 1 else "its teacher"
    silent = [r.skill for r in comparisons if r.retained is None]
    nothing = f"on {charts.join_list(silent)} no teacher had one right answer" if silent else ""
    start = f"One student, {charts.spell_count(teachers)} teacher{'s' * (teachers > 1)}: "
    if not kept:
        return f"{start}{nothing}, so there was nothing to keep."
    if len(kept) > 4:
        (most, first), (least, last) = kept[0], kept[-1]
        lowest, highest = (
            f"{charts.format_percent(least)} ({last}, its lowest)",
            f"{charts.format_percent(most)} ({first})",
        )
        what = (
            f"between {lowest} and {highest} of {whose} on {charts.spell_count(len(kept))} skills"
        )
    else:
        told[0] = f"{charts.format_percent(kept[0][0])} of {whose} on {kept[0][1]}"
        if len(kept) > 1:
            told[-1] = f"{charts.format_percent(kept[-1][0])}, its lowest, on {kept[-1][1]}"
        what = charts.join_list(told)
    return f"{start}it keeps {what}{'; ' * bool(nothing)}{nothing}."


def claims(evaluation: EvaluationRecord, comparisons: Sequence[SkillComparison]) -> tuple[str, ...]:
    """What the intervals allow to say: of the student beside the best teacher and its own base, of the teachers among themselves."""
    said = [
        _comparison_sentence(
            [(r.skill, difference_order(r.versus_best)) for r in comparisons], "the best teacher"
        ),
        _comparison_sentence(
            [(r.skill, difference_order(r.versus_base)) for r in comparisons], "its own base"
        ),
        _regression_sentence(evaluation),
    ]
    short = {
        t.model_name: [
            r.skill
            for r in comparisons
            if score_order(r.teachers[k], r.best_teacher) is IntervalOrder.BELOW
        ]
        for k, t in enumerate(comparisons[0].teachers)
    }
    skills = (
        f"all {charts.spell_count(len(comparisons))} skills"
        if len(comparisons) > 1
        else comparisons[0].skill
    )
    alone = [name for name, below in short.items() if not below]
    if len(short) > 1 and not alone:
        told = (
            sorted(short, key=lambda name: len(short[name]))[:1] if len(short) > 4 else list(short)
        )
        lacks = "; ".join(
            f"{name} is below the best on {charts.join_list(short[name])}" for name in told
        )
        said.append(f"No single teacher covers {skills}: {'even ' * (len(short) > 4)}{lacks}.")
    elif len(short) > 1:
        said.append(
            f"One teacher covers {skills}, as far as the intervals tell: {charts.join_list(alone, 'or')}."
        )
    broken = sum(s.grader_errors for s in evaluation.scores if not s.language)
    if broken:
        said.append(
            f"Graders broke on {charts.format_count(broken)} answer{'s' * (broken > 1)}; each counts as wrong and is named in examples.jsonl."
        )
    return tuple(said)


def _comparison_sentence(
    skill_orders: Sequence[tuple[str, IntervalOrder]], compared_to: str
) -> str:
    words = {
        IntervalOrder.ABOVE: "above",
        IntervalOrder.OVERLAPS: "not distinguishable (the 95 % interval of the difference holds 0)",
        IntervalOrder.BELOW: "below",
    }
    groups = {which: [skill for skill, s in skill_orders if s is which] for which in words}
    parts = [
        f"{words[which]} on {charts.join_list(skills)}"
        for which, skills in groups.items()
        if skills
    ]
    return f"Against {compared_to}, the student is {'; '.join(parts)}."


def _regression_sentence(evaluation: EvaluationRecord) -> str:
    tested = charts.format_count(
        sum(p.other_model_name == evaluation.base for p in evaluation.compared)
    )
    if not evaluation.regressions:
        return f"Nowhere is it below its own base with confidence ({tested} places looked at: each skill, language and effort)."
    lost = [
        f"{p.skill}{f' in {p.language}' if p.language else ''}{f' at effort {p.effort}' if len(evaluation.student_efforts) > 1 else ''} "
        f"({charts.format_signed(p.difference)}, from {charts.format_signed(p.low)} to {charts.format_signed(p.high)}, n {p.n})"
        for p in evaluation.regressions
    ]
    return f"Below its own base with confidence: {charts.join_list(lost)}."
