"""Held-out texts on the page and in the terminal: the verdict, a sentence a language, the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persea.errors import DataError
from persea.evaluation.text_report import TextReport
from persea.report.page import write_report
from persea.report.run_files import read_graded_answers
from persea.report.text_section import (
    end_bits_sentence,
    read_text_report,
    text_columns,
    text_rows,
    text_sentences,
    text_verdict,
)
from tests.evaluation.test_text_report import report
from tests.report.test_page import make_run


def named(found: TextReport) -> dict[str, Any]:
    """The result under the names of `make_run`."""
    text = json.dumps(found.to_json())
    for old, new in (("student", "avocado"), ("base", "llama-base"), ("a", "qwen"), ("b", "gemma")):
        text = text.replace(f'"{old}":', f'"{new}":').replace(f'"{old}"', f'"{new}"')
    text = text.replace('"avocado": "avocado"', '"student": "avocado"')
    value: dict[str, Any] = json.loads(
        text.replace('"llama-base": "llama-base"', '"base": "llama-base"')
    )
    value["reference_models"] = []
    return value


def write_texts(run: Path) -> None:
    (run / "evaluate" / "texts.json").write_text(json.dumps(named(report())))


def test_the_verdict_is_one_line() -> None:
    words = text_verdict(report(noise=0.02)).replace("\u00a0", " ")
    assert words.startswith("2 of 3 languages gained, ")
    assert " of the gap to a and b closed (" in words
    assert "; no significant change: en " in words
    assert "\n" not in words


def test_a_language_that_was_lost_is_named() -> None:
    found = report(noise=0.02)
    groups = []
    for g in found.groups:
        i = g.student_minus["base"]
        lost = replace(i, value=-i.value, low=-(i.high or 0), high=-(i.low or 0))
        groups.append(
            replace(
                g, student_minus={"base": lost}, gap_closed=None, no_gap_reason="a is not better"
            )
        )
    words = text_verdict(replace(found, groups=tuple(groups)))
    assert words.startswith("0 of 3 languages gained, no gap to close: a is not better; lost: id ")
    assert "lost: id +0.5" in words


def test_every_language_has_a_sentence_and_every_silence_a_reason() -> None:
    sentences = [s.replace("\u00a0", " ") for s in text_sentences(report(noise=0.02))]
    assert sentences[0].startswith("world, id: the student needs ")
    assert " fewer than its base [" in sentences[0]
    assert " of the gap to a closed (" in sentences[0]
    assert "not significantly different from its base" in sentences[2]
    assert sentences[3].startswith("world, all languages: ")
    assert sentences[4] == "api was not measured on texts: it has no bits."
    assert sentences[5].startswith("1 document left out for all models, such as th:99: gemma")
    assert "8.0 bits" in end_bits_sentence(report()).replace("\u00a0", " ")


def test_the_table_has_a_row_a_language() -> None:
    found = report()
    for best_only in (False, True):
        rows = text_rows(found, best_only)
        assert {len(row) for row in rows} == {len(text_columns(found, best_only))}
        assert [row[0] for row in rows] == ["id", "th", "en", "all languages"]
    assert text_columns(found)[1:6] == ("base", "student", "a", "b", "ref")
    assert text_rows(found)[0][3].endswith("*")
    assert text_rows(found, best_only=True)[1][3].endswith("\nb")


def test_page_card_and_json_hold_the_texts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    plain = write_report(run).read_text()
    assert "Held-out texts" not in plain
    write_texts(run)
    page = write_report(run).read_text()
    assert '<h2 id="texts">Held-out texts</h2>' in page
    assert '<p class="headline">Bits per byte on held-out texts: 2 of 3 languages gained' in page
    assert 'aria-labelledby="held-out-texts-t held-out-texts-d"' in page
    card = (run / "report" / "README.md").read_text()
    assert "## Held-out texts" in card and "| all languages |" in card
    summary = json.loads((run / "report" / "report.json").read_text())
    assert summary["texts"]["verdict"].startswith("2 of 3 languages gained")
    assert summary["skills"]  # the questions are still there


def test_a_run_without_questions_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = run / "evaluate" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    empty: dict[str, Any] = {"scores": [], "compared": [], "regressions": [], "bits_per_byte": {}}
    path.write_text(json.dumps(evaluation | empty))
    (run / "evaluate" / "examples.jsonl").write_text("")
    write_texts(run)
    page = write_report(run).read_text()
    assert "Held-out texts" in page
    assert "Scores by skill and model" not in page
    assert "Example" not in page.partition("<main>")[2].partition("Recipe")[0]


def test_runs_of_texts_alone_are_not_compared_by_answers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "evaluate" / "examples.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no answer"):
        read_graded_answers(run)
    write_texts(run)
    with pytest.raises(DataError, match="measured on held-out texts alone"):
        read_graded_answers(run)


def test_a_broken_result_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert read_text_report(run) is None
    value = named(report())
    value["groups"][0]["bits_per_byte"]["avocado"]["low"] = 9.0
    (run / "evaluate" / "texts.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match="not inside its interval"):
        read_text_report(run)
