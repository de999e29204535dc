"""Decide whether a student may be made of its base, teachers and data, and what it then owes.

Pure: no files but the table, no network. An engineering reading, not legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import product
from typing import Any

from persea.licences.expression import licence_alternatives
from persea.licences.table import (
    Distillation,
    LicenceRow,
    Relation,
    Use,
    checkpoint_licences,
    find_licence,
    has_relation,
    host_licence,
    is_spdx_licence,
)

SEPARATE_AGREEMENT = "separate-agreement"
# kinds of duties that begin when somebody else receives the student
DUTIES_TO_OTHERS = ("attribution", "notice", "copy", "name")
NOT_STATED = ("", "unknown", "not known", "other", "see-lineage")
MAX_ALTERNATIVES = 256


class Outcome(StrEnum):
    """Result of the licence check, from the best to the worst."""

    OK = "ok"
    DUTIES = "ok with duties"
    ASK = "ask"
    REFUSED = "refused"


SEVERITY = {outcome: k for k, outcome in enumerate(Outcome)}


@dataclass(frozen=True)
class LicensedInput:
    """A model or a data set that a student is made of.

    Attributes:
        name: Its name in the recipe: "student" for the base, a teacher's name, "corpus.0".
        relation: How the student relates to it.
        statements: Licences that are stated for it, by the recipe and by its own files. Each may be
            an expression; all of them hold.
        known_as: Names by which the table of checkpoints may know it: hub id, folder, ancestors.
        host: Host name of the server that runs it; "" = none.
        is_random: Randomly initialised weights, which nobody licensed.
        is_own: Data of the user's own, unless a licence is stated.
    """

    name: str
    relation: Relation
    statements: tuple[str, ...] = ()
    known_as: tuple[str, ...] = ()
    host: str = ""
    is_random: bool = False
    is_own: bool = False


@dataclass(frozen=True)
class Release:
    """What becomes of the student.

    Attributes:
        use: Intended use.
        name: Name that the user gives it; "" = derived from `recipe_name`.
        licence: Licence that the user gives it; "" = the licences that go with it.
        recipe_name: Name of the recipe.
    """

    use: Use = Use.COMMERCIAL
    name: str = ""
    licence: str = ""
    recipe_name: str = "student"


@dataclass(frozen=True)
class Finding:
    """One reason of a verdict.

    Attributes:
        name: Name of the input, or "student".
        outcome: OK, ASK or REFUSED.
        text: The reason.
        remedy: What to change; "" if nothing.
    """

    name: str
    outcome: Outcome
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class OwedDuty:
    """A duty of the student's user, and the inputs that it comes from."""

    kind: str
    text: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class LicenceVerdict:
    """Whether a student may be made, why, and what it owes.

    Attributes:
        outcome: The worst outcome of the findings; DUTIES if all are OK and something is owed.
        use: Intended use.
        findings: One for each licence of each input, and for the student's name and licence.
        duties: The union of the duties.
        licences: Name of an input -> ids of its licences, as persea read them.
        student_name: The name that the student must or may carry.
        student_licence: Licence expression that the student is under; "" = any licence.
        with_weights: What goes with copies of the weights, because of the base.
        decisions: Name of an input -> decision of the recipe that answered a question.
    """

    outcome: Outcome
    use: Use
    findings: tuple[Finding, ...]
    duties: tuple[OwedDuty, ...]
    licences: Mapping[str, tuple[str, ...]]
    student_name: str
    student_licence: str
    with_weights: tuple[str, ...] = ()
    decisions: Mapping[str, str] = field(default_factory=dict)

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that stop a run, refusals first."""
        found = [f for f in self.findings if SEVERITY[f.outcome] >= SEVERITY[Outcome.ASK]]
        return tuple(sorted(found, key=lambda f: -SEVERITY[f.outcome]))

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as JSON."""
        return {
            "outcome": self.outcome.value,
            "use": self.use.value,
            "student_name": self.student_name,
            "student_licence": self.student_licence or "any",
            "licences": {name: list(ids) for name, ids in self.licences.items()},
            "findings": [
                {"name": f.name, "outcome": f.outcome.value, "text": f.text, "remedy": f.remedy}
                for f in self.findings
            ],
            "duties": [
                {"kind": d.kind, "text": d.text, "because_of": list(d.names)} for d in self.duties
            ],
            "with_weights": list(self.with_weights),
            "decisions": dict(self.decisions),
        }


def resolve_licences(
    inputs: Sequence[LicensedInput],
    release: Release | None = None,
    decisions: Mapping[str, str] | None = None,
) -> LicenceVerdict:
    """Return the verdict on a student.

    Args:
        inputs: The base, the teachers, the reference models and the data.
        release: What becomes of the student.
        decisions: Name of an input -> who decided what, when. A decision answers a question (ASK);
            it does not lift a refusal.

    Example:
        >>> base = LicensedInput("student", Relation.BASE, ("Apache-2.0",))
        >>> teacher = LicensedInput("teacher", Relation.TEACHER, ("llama3.1",))
        >>> verdict = resolve_licences([base, teacher], Release(recipe_name="avocado"))
        >>> verdict.outcome.value, verdict.student_name
        ('ok with duties', 'Llama-avocado')
    """
    release, decisions = release or Release(), decisions or {}
    base_ids = {
        row.id
        for source in inputs
        if source.relation is Relation.BASE
        for alternative in _alternatives(source)
        for row in map(find_licence, alternative)
        if row is not None
    }
    judged = [_judge(source, release, base_ids, decisions) for source in inputs]
    findings = [f for one in judged for f in one.findings]
    rules = [
        (source, row)
        for source, one in zip(inputs, judged, strict=True)
        if source.relation is not Relation.REFERENCE
        for row in one.rows
    ]
    name, name_findings, name_duties = _student_name(rules, release)
    licence, licence_findings = _student_licence(rules, release)
    findings += [*name_findings, *licence_findings]
    duties = [*name_duties, *_owed_duties(rules, release)]
    outcome = max((f.outcome for f in findings), key=SEVERITY.__getitem__, default=Outcome.OK)
    if outcome is Outcome.OK and duties:
        outcome = Outcome.DUTIES
    return LicenceVerdict(
        outcome,
        release.use,
        tuple(findings),
        tuple(duties),
        {s.name: one.licence_ids for s, one in zip(inputs, judged, strict=True)},
        name,
        licence,
        tuple(
            dict.fromkeys(
                text
                for source, row in rules
                if source.relation is Relation.BASE
                for text in row.with_weights
            )
        ),
        {s.name: decisions[s.name] for s in inputs if s.name in decisions},
    )


# --- one input ---


@dataclass(frozen=True)
class _Judged:
    licence_ids: tuple[str, ...]
    rows: tuple[LicenceRow, ...]
    findings: tuple[Finding, ...]

    def cost(self) -> tuple[int, int]:
        """The worst outcome, and the number of duties: what an alternative costs."""
        worst = max((SEVERITY[f.outcome] for f in self.findings), default=0)
        return worst, sum(len(row.duties) + len(row.carried) for row in self.rows)


def _alternatives(source: LicensedInput) -> tuple[tuple[str, ...], ...]:
    """Return the alternatives of an input's licences; the names of one alternative all hold."""
    statements = [s for s in source.statements if s.strip().lower() not in NOT_STATED]
    agreed = [
        s
        for s in statements
        if (row := find_licence(s)) is not None and row.id == SEPARATE_AGREEMENT
    ]
    if agreed:
        return ((SEPARATE_AGREEMENT,),)
    fixed = checkpoint_licences(source.known_as)
    hosted = host_licence(source.host)
    always = (*fixed, *([hosted] if hosted else []))
    stated = [licence_alternatives(s) for s in statements]
    if not stated and not fixed:
        always = ("", *always)
    found: dict[tuple[str, ...], None] = {}
    for chosen in product(*stated):
        names = [*(n for alternative in chosen for n in alternative), *always]
        ids = dict.fromkeys(row.id if (row := find_licence(n)) else n for n in names)
        found[tuple(ids)] = None
        if len(found) >= MAX_ALTERNATIVES:
            break
    return tuple(found)


def _judge(
    source: LicensedInput, release: Release, base_ids: set[str], decisions: Mapping[str, str]
) -> _Judged:
    """Judge an input by the best of its alternatives."""
    if source.is_random:
        return _Judged((), (), (Finding(source.name, Outcome.OK, "random weights"),))
    alternatives = _alternatives(source)
    if source.relation is Relation.REFERENCE:
        finding = Finding(
            source.name, Outcome.OK, "a reference model: measured, never learned from"
        )
        return _Judged(alternatives[0], (), (finding,))
    judged = [
        _Judged(
            tuple(name for name in names if name),
            tuple(row for row in map(find_licence, names) if row is not None),
            tuple(_judge_licence(name, source, release, base_ids, decisions) for name in names),
        )
        for names in alternatives
    ]
    return min(judged, key=_Judged.cost)


def _judge_licence(
    name: str,
    source: LicensedInput,
    release: Release,
    base_ids: set[str],
    decisions: Mapping[str, str],
) -> Finding:
    row = find_licence(name)
    if row is None:
        return _judge_unknown(name, source, decisions)
    text = f"{row.title}{f': {row.note}' if row.note else ''}"
    if release.use not in row.uses:
        allowed = " and ".join(use.value for use in row.uses)
        return Finding(
            source.name,
            Outcome.REFUSED,
            f"the {row.title} allows {allowed} use only, the recipe's is {release.use.value}",
            f"choose another model, or write `release: {{use: {row.uses[0].value}}}` if that is "
            "all you do with the student",
        )
    is_base = source.relation is Relation.BASE
    if row.distillation is Distillation.NO and not is_base:
        if not base_ids & set(row.except_bases):
            return Finding(
                source.name,
                Outcome.REFUSED,
                f"no student may learn from it: {text} ({row.source})",
                "choose another teacher, or write `reference: true` to measure it alone",
            )
        return Finding(source.name, Outcome.OK, f"{text}; the base is one of these")
    if row.not_in:
        places = ", ".join(row.not_in)
        return _ask(source, f"the {row.title} grants nothing in {places}", decisions)
    if row.distillation is Distillation.UNKNOWN:
        return _ask(source, f"whether a student may learn from it is not known: {text}", decisions)
    if row.distillation is Distillation.SILENT and not is_base:
        text = f"{text}; no clause on learning from outputs"
    return Finding(source.name, Outcome.OK, text)


def _judge_unknown(name: str, source: LicensedInput, decisions: Mapping[str, str]) -> Finding:
    if name == "unknown":
        return _ask(source, f"the terms of the server {source.host} are not known", decisions)
    if not name and source.is_own:
        return Finding(source.name, Outcome.OK, "no licence stated: taken for your own data")
    if not name:
        return _ask(source, "its licence is not known", decisions, "write its `licence:`, or ")
    known = "SPDX knows it, " if is_spdx_licence(name) else ""
    return _ask(source, f"{name!r} is not in persea's table ({known}docs/licences.md)", decisions)


def _ask(
    source: LicensedInput, question: str, decisions: Mapping[str, str], remedy: str = ""
) -> Finding:
    decision = decisions.get(source.name)
    if decision:
        return Finding(source.name, Outcome.OK, f"{question}; decided: {decision}")
    return Finding(
        source.name,
        Outcome.ASK,
        question,
        f'{remedy}add `licence_decisions: {{{source.name}: "WHO decided WHAT, YYYY-MM-DD"}}`',
    )


# --- the student ---


def _applies(release: Release) -> bool:
    """Return whether the rules for a student that others receive apply."""
    return release.use.reaches_others or bool(release.name or release.licence)


def _student_name(
    rules: Sequence[tuple[LicensedInput, LicenceRow]], release: Release
) -> tuple[str, list[Finding], list[OwedDuty]]:
    """Return the student's name, what is wrong with it, and the duty that it keeps."""
    name = release.name or release.recipe_name
    owners: dict[str, dict[str, None]] = {}
    for source, row in rules:
        if row.name_prefix and has_relation(row.name_roles, source.relation):
            owners.setdefault(row.name_prefix, {})[source.name] = None
    if not owners or not _applies(release):
        return name, [], []
    prefix = max(owners, key=len)
    names = tuple(dict.fromkeys(n for found in owners.values() for n in found))
    if not all(prefix.startswith(other) for other in owners):
        quoted = " and ".join(f'"{p}"' for p in owners)
        problem = Finding(
            "student",
            Outcome.REFUSED,
            f"its name would have to begin with {quoted} at once, because of {', '.join(names)}",
            "leave one of these models out",
        )
        return name, [problem], []
    duty = OwedDuty("name", f'the student\'s name begins with "{prefix}"', names)
    if re.sub(r"[\s_-]+", " ", name).startswith(prefix):
        return name, [], [duty]
    prefixed = f"{prefix.replace(' ', '-')}-{name}"
    if not release.name:
        return prefixed, [], [duty]
    problem = Finding(
        "student",
        Outcome.REFUSED,
        f'its name {name!r} must begin with "{prefix}", because of {", ".join(names)}',
        f"write `release: {{name: {prefixed}}}`",
    )
    return name, [problem], [duty]


def _student_licence(
    rules: Sequence[tuple[LicensedInput, LicenceRow]], release: Release
) -> tuple[str, list[Finding]]:
    """Return the licence expression of the student, and what is wrong with the given one."""
    if not _applies(release):
        return release.licence, []
    carried: dict[str, dict[str, None]] = {}
    labels: dict[str, str] = {}
    for source, row in rules:
        if has_relation(row.carried, source.relation):
            carried.setdefault(row.id, {})[source.name] = None
            labels[row.id] = row.hub or row.id
    if not release.licence:
        return " AND ".join(labels.values()), []
    findings = []
    for alternative in licence_alternatives(release.licence):
        given = {known.id if (known := find_licence(n)) else n for n in alternative}
        for missing in (row_id for row_id in carried if row_id not in given):
            whole = " AND ".join(dict.fromkeys([release.licence, *labels.values()]))
            findings.append(
                Finding(
                    "student",
                    Outcome.REFUSED,
                    f"it may not be released under {' AND '.join(alternative)} alone: "
                    f"{labels[missing]} goes with it, because of {', '.join(carried[missing])}",
                    f'write `release: {{licence: "{whole}"}}`, delete `licence:`, or leave '
                    f"{', '.join(carried[missing])} out",
                )
            )
    return release.licence, findings


def _owed_duties(
    rules: Sequence[tuple[LicensedInput, LicenceRow]], release: Release
) -> list[OwedDuty]:
    owed: dict[tuple[str, str], dict[str, None]] = {}
    for source, row in rules:
        for duty in row.duties:
            is_due = duty.kind not in DUTIES_TO_OTHERS or _applies(release)
            if is_due and has_relation(duty.roles, source.relation):
                owed.setdefault((duty.kind, duty.text), {})[source.name] = None
    return [OwedDuty(kind, text, tuple(names)) for (kind, text), names in owed.items()]
