"""Sentences of the report, computed from scores and their intervals. They claim no more than the
intervals support.
"""

from __future__ import annotations

from collections.abc import Sequence

from persea.report.run_files import EvaluationRecord
from persea.report.skill_comparison import (
    IntervalOrder,
    SkillComparison,
    difference_order,
    score_order,
)
from persea.report.text import (
    format_count,
    format_percent,
    format_signed,
    join_list,
    spell_count,
)

# With more skills or teachers than this, a sentence names the extremes instead of listing all.
MAX_LISTED = 4
ALL_SKILLS = "all"  # the key of the mean in bits_per_byte
MIN_LOST_BITS_PER_BYTE = 0.02  # smaller losses are not named


NOTHING_MEASURED = (
    "Nothing was measured: name held-out texts of your own under evaluation.texts in the recipe."
)


def headline(comparisons: Sequence[SkillComparison]) -> str:
    """Return one sentence: the retained shares of the best teacher's score, best first, the lowest
    named as such; where no teacher is right, the student's scores and its base's.
    """
    num_teachers = len(comparisons[0].teachers)
    retained = sorted(
        ((c.retained, c.skill) for c in comparisons if c.retained is not None), reverse=True
    )
    unscored = [c.skill for c in comparisons if c.retained is None]
    start = (
        f"One student, {spell_count(num_teachers)} teacher{'s' * (num_teachers > 1)}: the student"
    )
    nothing = f"no teacher answered anything right on {join_list(unscored)}" if unscored else ""
    if not retained:
        scores = [
            f"{format_percent(c.student.value)} of the questions on {c.skill} (its base model in "
            f"{format_percent(c.base.value)})"
            for c in sorted(comparisons, key=lambda c: -c.student.value)[:MAX_LISTED]
        ]
        return f"{start} is right in {join_list(scores)}; {nothing}."
    compared_score = "the best teacher's score" if num_teachers > 1 else "its teacher's score"
    shares = [f"{format_percent(share)} on {skill}" for share, skill in retained]
    (highest, first), (lowest, last) = retained[0], retained[-1]
    if len(retained) > MAX_LISTED:
        summary = (
            f"between {format_percent(lowest)} ({last}, its lowest) "
            f"and {format_percent(highest)} ({first}) of {compared_score} "
            f"on {spell_count(len(retained))} skills"
        )
    else:
        shares[0] = f"{format_percent(highest)} of {compared_score} on {first}"
        if len(retained) > 1:
            shares[-1] = f"{format_percent(lowest)} (its lowest) on {last}"
        summary = join_list(shares)
    return f"{start} retains {summary}{'; ' * bool(nothing)}{nothing}."


def claims(evaluation: EvaluationRecord, comparisons: Sequence[SkillComparison]) -> tuple[str, ...]:
    """Return the findings of an evaluation.

    They compare the student with the best teacher and with its base, and the teachers among
    themselves, and name failed graders.
    """
    versus_best = [(c.skill, difference_order(c.versus_best)) for c in comparisons]
    versus_base = [(c.skill, difference_order(c.versus_base)) for c in comparisons]
    sentences = [
        _comparison_sentence(versus_best, "the best teacher"),
        _comparison_sentence(versus_base, "its base model"),
        _regression_sentence(evaluation),
    ]
    if worse := _bits_sentence(evaluation):
        sentences.append(worse)
    scored = [c for c in comparisons if c.retained is not None]
    if scored and len(comparisons[0].teachers) > 1:
        sentences.append(_coverage_sentence(scored))
    num_errors = sum(s.grader_errors for s in evaluation.scores if not s.language)
    if num_errors:
        sentences.append(
            f"The grader failed on {format_count(num_errors)} answer{'s' * (num_errors > 1)}; "
            "each counts as wrong, with its reason in evaluate/examples.jsonl."
        )
    return tuple(sentences)


def _bits_sentence(evaluation: EvaluationRecord) -> str:
    """Return a sentence: where the student predicts reference answers worse than its base."""
    student = evaluation.bits_per_byte.get(evaluation.student, {})
    base = evaluation.bits_per_byte.get(evaluation.base, {})
    worse = sorted(
        (
            (student[skill] - base[skill], skill)
            for skill in student
            if skill in base and skill != ALL_SKILLS
        ),
        reverse=True,
    )
    listed = [
        f"{skill} ({base[skill]:.2f} to {student[skill]:.2f})"
        for lost, skill in worse
        if lost > MIN_LOST_BITS_PER_BYTE
    ]
    if not listed:
        return ""
    return (
        "The student predicts the reference answers worse than its base model does, in bits per "
        f"byte: {join_list(listed)}. A student that answers in its teachers' words can score "
        "higher and yet find the reference's words less likely."
    )


def _coverage_sentence(comparisons: Sequence[SkillComparison]) -> str:
    """Return a sentence: whether one teacher is among the best on every skill, of those on which
    some teacher is right.
    """
    worse_on = {
        t.model_name: [
            c.skill
            for c in comparisons
            if score_order(c.teachers[k], c.best_teacher) is IntervalOrder.BELOW
        ]
        for k, t in enumerate(comparisons[0].teachers)
    }
    skills = (
        f"all {spell_count(len(comparisons))} skills"
        if len(comparisons) > 1
        else comparisons[0].skill
    )
    covering = [name for name, worse in worse_on.items() if not worse]
    if covering:
        return (
            f"One teacher is among the best on {skills}, as far as the intervals show: "
            f"{join_list(covering, 'or')}."
        )
    are_many = len(worse_on) > MAX_LISTED
    named = sorted(worse_on, key=lambda name: len(worse_on[name]))[:1] if are_many else worse_on
    parts = "; ".join(f"{name} is below the best on {join_list(worse_on[name])}" for name in named)
    return f"No single teacher is among the best on {skills}: {'even ' * are_many}{parts}."


def _comparison_sentence(
    skill_orders: Sequence[tuple[str, IntervalOrder]], compared_to: str
) -> str:
    phrases = {
        IntervalOrder.ABOVE: "above",
        IntervalOrder.OVERLAPS: (
            "not distinguishable (the 95 % interval of the difference contains 0)"
        ),
        IntervalOrder.BELOW: "below",
    }
    groups = {order: [skill for skill, s in skill_orders if s is order] for order in phrases}
    parts = [
        f"{phrases[order]} on {join_list(skills)}" for order, skills in groups.items() if skills
    ]
    return f"Compared with {compared_to}, the student is {'; '.join(parts)}."


def _regression_sentence(evaluation: EvaluationRecord) -> str:
    num_compared = sum(p.other_model_name == evaluation.base for p in evaluation.compared)
    if not evaluation.regressions:
        return (
            "The student is nowhere significantly below its base model "
            f"({format_count(num_compared)} comparison{'s' * (num_compared != 1)}: each skill, "
            "language and thinking effort)."
        )
    several = len(evaluation.student_efforts) > 1
    losses = [
        f"{p.skill}{f' in {p.language}' if p.language else ''}"
        f"{f' at effort {p.effort}' if several else ''} ({format_signed(p.difference)} points, "
        f"95 % interval {format_signed(p.low)} to {format_signed(p.high)}, n {p.n})"
        for p in evaluation.regressions
    ]
    return f"Significantly below its base model: {join_list(losses)}."
