"""The texts that a verdict is shown with: NOTICE, lines for people, and the table for the docs."""

from __future__ import annotations

from collections.abc import Sequence

from persea.licences.table import LicenceRow, LicenceTable, Relation
from persea.licences.verdict import LicenceVerdict, LicensedInput, Outcome

DISCLAIMER = "An engineering reading of the licences, not legal advice."


def notice_text(verdict: LicenceVerdict, inputs: Sequence[LicensedInput]) -> str:
    """Return the NOTICE file of a student: its parents, their notices, and its duties."""
    lines = [
        verdict.student_name,
        "",
        "This model was distilled with persea from other models.",
        "",
    ]
    for source in inputs:
        if source.relation is Relation.REFERENCE or source.is_random:
            continue
        model = source.known_as[0] if source.known_as else source.name
        licence = " AND ".join(verdict.licences[source.name]) or "licence not stated"
        lines.append(f"{source.relation.value}: {model} ({licence})")
    for kind, title in (("notice", "Notices"), ("attribution", "Attribution")):
        texts = [d.text for d in verdict.duties if d.kind == kind]
        if texts:
            lines += ["", f"{title}:", *(f"  {t}" for t in texts)]
    others = [d.text for d in verdict.duties if d.kind not in ("notice", "attribution")]
    if others:
        lines += ["", "Conditions:", *(f"  - {t}" for t in others)]
    if verdict.with_weights:
        lines += ["", "With copies of the weights go:", *(f"  - {t}" for t in verdict.with_weights)]
    if verdict.decisions:
        lines += ["", "Decisions:", *(f"  {n}: {text}" for n, text in verdict.decisions.items())]
    return "\n".join([*lines, "", DISCLAIMER, ""])


def verdict_lines(verdict: LicenceVerdict) -> list[str]:
    """Return a verdict for people, a line each: outcome, name and licence, problems, duties."""
    head = f"licences: {verdict.outcome.value}, for {verdict.use.value} use"
    if verdict.outcome in (Outcome.OK, Outcome.DUTIES):
        licence = f"under {verdict.student_licence}" if verdict.student_licence else "any licence"
        head += f"; the student: {verdict.student_name}, {licence}"
    problems = [f"  {f.outcome.value}: {f.name}: {f.text} -> {f.remedy}" for f in verdict.problems]
    duties = [f"  {d.kind}: {d.text} ({', '.join(d.names)})" for d in verdict.duties]
    decisions = [f"  decided: {name}: {text}" for name, text in verdict.decisions.items()]
    return [head, *problems, *duties, *decisions]


def licences_markdown(table: LicenceTable) -> str:
    """Return the tables of licences, checkpoints and servers as Markdown."""
    lines = ["| licence | learn from outputs | uses | duties | source |", "|---|---|---|---|---|"]
    lines += [_row_markdown(row) for row in table.licences]
    lines += ["", "| models | licences |", "|---|---|"]
    lines += [
        f"| `{_cell(row.pattern)}` | {', '.join(row.licences)} |" for row in table.checkpoints
    ]
    lines += ["", "| server | terms |", "|---|---|"]
    lines += [
        f"| `{f'{row.prefix}…' if row.prefix else '…'}{row.host}` | {row.licence} |"
        for row in table.hosts
    ]
    return "\n".join(lines) + "\n"


def _row_markdown(row: LicenceRow) -> str:
    uses = "all" if len(row.uses) == 4 else ", ".join(row.uses)
    duties = [f'name begins with "{row.name_prefix}"'] if row.name_prefix else []
    if row.carried:
        relations = "base or teacher" if len(row.carried) > 1 else row.carried[0]
        duties.append(f"the student stays under it (of a {relations})")
    duties += [d.text for d in row.duties]
    if row.not_in:
        duties.append(f"grants nothing in {', '.join(row.not_in)}")
    permits = row.distillation.value
    if row.except_bases:
        permits += f", except into {', '.join(row.except_bases)}"
    note = f"; {row.note}" if row.note else ""
    source = f"<{row.source}>" if row.source.startswith("http") else row.source
    digest = f", sha256 {row.sha256[:12]}" if row.sha256 else ""
    cells = (
        f"{row.title} (`{row.id}`)",
        permits + note,
        uses,
        "; ".join(duties) or "–",
        f"{source}, {row.read}, {row.confidence}{digest}",
    )
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
