"""The texts of a verdict: NOTICE, lines for people, the tables of the docs."""

from __future__ import annotations

from persea.licences.notice import DISCLAIMER, licences_markdown, notice_text, verdict_lines
from persea.licences.table import Relation, licence_table
from persea.licences.verdict import LicensedInput, resolve_licences

BASE = LicensedInput("student", Relation.BASE, (), ("meta-llama/Llama-3.2-3B",))
GEMMA = LicensedInput("gemma", Relation.TEACHER, ("gemma",), ("google/gemma-3-27b-it",))
YARD = LicensedInput("yard", Relation.REFERENCE, (), ("gpt-5",))
ASKED = LicensedInput("asked", Relation.TEACHER, (), ("x/y",))


def test_a_notice_names_the_parents_and_holds_the_required_sentences() -> None:
    inputs = (BASE, GEMMA, YARD, ASKED)
    verdict = resolve_licences(inputs, decisions={"asked": "J. Doe, 2026-11-30: ours"})
    text = notice_text(verdict, inputs)
    assert text.startswith("Llama-student\n")
    assert "base: meta-llama/Llama-3.2-3B (llama-3.2)\n" in text
    assert "teacher: google/gemma-3-27b-it (Gemma)\n" in text
    assert "gpt-5" not in text
    assert "  Gemma is provided under and subject to the Gemma Terms of Use found at" in text
    assert "  Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright ©" in text
    assert '  display "Built with Llama"' in text
    assert "  asked: J. Doe, 2026-11-30: ours\n" in text
    assert text.endswith(f"{DISCLAIMER}\n") and text.count(DISCLAIMER) == 1


def test_lines_show_name_and_licence_or_what_to_do() -> None:
    lines = verdict_lines(resolve_licences([BASE, GEMMA]))
    assert lines[0] == (
        "licences: ok with duties, for commercial use; the student: Llama-student, under "
        "llama3.2 AND gemma"
    )
    assert '  name: the student\'s name begins with "Llama" (student)' in lines
    asked = verdict_lines(resolve_licences([ASKED]))
    assert asked[0] == "licences: ask, for commercial use"
    assert asked[1].startswith("  ask: asked: its licence is not known -> write its `licence:`")


def test_the_tables_have_a_row_for_each_entry() -> None:
    text, table = licences_markdown(licence_table()), licence_table()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == len(table.licences) + len(table.checkpoints) + len(table.hosts) + 3
    assert "| Llama 2 Community License (`llama-2`) | no, except into llama-2;" in text
