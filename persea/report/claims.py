"""Sentences that are computed: what a run's numbers and their intervals allow to say, and no more."""

from __future__ import annotations

from collections.abc import Sequence

from persea.report import svg as charts
from persea.report.run_files import Evaluated, Row, Standing, standing, stands


def headline(found: Sequence[Row]) -> str:
    """One sentence: what is kept, best first, the lowest named as such."""
    teachers = len(found[0].teachers)
    kept = sorted(((r.retained, r.skill) for r in found if r.retained is not None), reverse=True)
    told = [f"{charts.percent(share)} on {skill}" for share, skill in kept]
    whose = "the best teacher" if teachers > 1 else "its teacher"
    silent = [r.skill for r in found if r.retained is None]
    nothing = f"on {charts.listed(silent)} no teacher had one right answer" if silent else ""
    start = f"One student, {charts.number(teachers)} teacher{'s' * (teachers > 1)}: "
    if not kept:
        return f"{start}{nothing}, so there was nothing to keep."
    if len(kept) > 4:
        (most, first), (least, last) = kept[0], kept[-1]
        lowest, highest = f"{charts.percent(least)} ({last}, its lowest)", f"{charts.percent(most)} ({first})"
        what = f"between {lowest} and {highest} of {whose} on {charts.number(len(kept))} skills"
    else:
        told[0] = f"{charts.percent(kept[0][0])} of {whose} on {kept[0][1]}"
        if len(kept) > 1:
            told[-1] = f"{charts.percent(kept[-1][0])}, its lowest, on {kept[-1][1]}"
        what = charts.listed(told)
    return f"{start}it keeps {what}{'; ' * bool(nothing)}{nothing}."


def findings(evaluated: Evaluated, found: Sequence[Row]) -> tuple[str, ...]:
    """What the intervals allow to say: of the student beside the best teacher and its own base, of the teachers among themselves."""
    said = [_beside([(r.skill, stands(r.beside_best)) for r in found], "the best teacher"),
            _beside([(r.skill, stands(r.beside_base)) for r in found], "its own base"), _lost(evaluated)]
    short = {t.speaker: [r.skill for r in found if standing(r.teachers[k], r.best) is Standing.BELOW]
             for k, t in enumerate(found[0].teachers)}
    skills = f"all {charts.number(len(found))} skills" if len(found) > 1 else found[0].skill
    alone = [name for name, below in short.items() if not below]
    if len(short) > 1 and not alone:
        told = sorted(short, key=lambda name: len(short[name]))[:1] if len(short) > 4 else list(short)
        lacks = "; ".join(f"{name} is below the best on {charts.listed(short[name])}" for name in told)
        said.append(f"No single teacher covers {skills}: {'even ' * (len(short) > 4)}{lacks}.")
    elif len(short) > 1:
        said.append(f"One teacher covers {skills}, as far as the intervals tell: {charts.listed(alone, 'or')}.")
    broken = sum(s.failed for s in evaluated.scores if not s.language)
    if broken:
        said.append(f"Graders broke on {charts.count(broken)} answer{'s' * (broken > 1)}; each counts as wrong and is named in examples.jsonl.")
    return tuple(said)


def _beside(told: Sequence[tuple[str, Standing]], whom: str) -> str:
    words = {Standing.ABOVE: "above", Standing.OVERLAPS: "not distinguishable (the 95 % interval of the difference holds 0)",
             Standing.BELOW: "below"}
    groups = {which: [skill for skill, s in told if s is which] for which in words}
    parts = [f"{words[which]} on {charts.listed(skills)}" for which, skills in groups.items() if skills]
    return f"Against {whom}, the student is {'; '.join(parts)}."


def _lost(evaluated: Evaluated) -> str:
    tested = charts.count(sum(p.other == evaluated.base for p in evaluated.compared))
    if not evaluated.regressions:
        return f"Nowhere is it below its own base with confidence ({tested} places looked at: each skill, language and effort)."
    lost = [f"{p.skill}{f' in {p.language}' if p.language else ''}{f' at effort {p.effort}' if len(evaluated.efforts) > 1 else ''} "
            f"({charts.signed(p.difference)}, from {charts.signed(p.low)} to {charts.signed(p.high)}, n {p.n})" for p in evaluated.regressions]
    return f"Below its own base with confidence: {charts.listed(lost)}."
