"""The section about thinking modes shows the measured counts and claims nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persea.chat.messages import ThinkingEffort
from persea.errors import DataError
from persea.evaluation.thinking_modes import (
    EffortResult,
    Proportion,
    ThinkingLength,
    ThinkingModesReport,
)
from persea.report import thinking_section as hybrid_page
from persea.tasks.task import Score


def mode(effort: ThinkingEffort, tokens: float, strays: int = 0, **languages: int) -> EffortResult:
    thoughts = 0 if effort is ThinkingEffort.NONE else 18
    return EffortResult(
        "reasoning",
        effort,
        Score("student", "reasoning", "", effort, 0.9, 20, 0.7, 0.97),
        Proportion.of(strays, 20),
        ThinkingLength(thoughts, tokens, tokens, 3 * tokens, 3 * tokens, 2 if thoughts else 0),
        languages,
        Proportion.of(0, sum(languages.values())),
    )


FOUND = ThinkingModesReport(
    "student",
    (
        mode(ThinkingEffort.NONE, 0),
        mode(ThinkingEffort.LOW, 4.5, 1, en=12, undetermined=40, zh=3, ja=1),
        mode(ThinkingEffort.HIGH, 12),
    ),
    Proportion.of(0, 320),
    Proportion.of(1, 40),
    {"reasoning": True},
)


def kept(folder: Path, told: Any) -> Path:
    (folder / "evaluate").mkdir(exist_ok=True)
    (folder / "evaluate" / "modes.json").write_text(
        told if isinstance(told, str) else json.dumps(told)
    )
    return folder


def test_a_written_report_is_read_back(tmp_path: Path) -> None:
    assert hybrid_page.read_thinking_modes(tmp_path) is None
    assert hybrid_page.read_thinking_modes(kept(tmp_path, FOUND.to_json())) == FOUND


def broken(**changes: Any) -> dict[str, Any]:
    return FOUND.to_json() | changes


@pytest.mark.parametrize(
    ("told", "what"),
    [
        ("{", "Invalid JSON"),
        (broken(modes=3), "modes"),
        (
            broken(unasked_thinking={"count": 9, "n": 3, "low": 0, "high": 1}),
            "larger than the number of answers",
        ),
        (
            broken(unasked_thinking={"count": 1, "n": 3, "low": 0, "high": 2}),
            "larger than the number of answers",
        ),
        ({}, "student"),
    ],
    ids=str,
)
def test_a_broken_file_is_refused(tmp_path: Path, told: Any, what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        hybrid_page.read_thinking_modes(kept(tmp_path, told))
    assert "run the recipe again into this folder" in caught.value.remedy


def test_one_row_for_each_mode() -> None:
    assert hybrid_page.thinking_rows(FOUND) == [
        ("reasoning", "none", "0.90 (0.70-0.97)", "0 of 20", "-", "-", "-"),
        (
            "reasoning",
            "low",
            "0.90 (0.70-0.97)",
            "1 of 20",
            "4.5 (2 cut)",
            "13.5",
            "12 en, 3 zh, 1 ja, 1 more",
        ),
        ("reasoning", "high", "0.90 (0.70-0.97)", "0 of 20", "12.0 (2 cut)", "36.0", "-"),
    ]
    assert all(
        len(row) == len(hybrid_page.THINKING_COLUMNS) for row in hybrid_page.thinking_rows(FOUND)
    )


def test_sentences_report_the_counts() -> None:
    unasked, unthinking, rising = hybrid_page.thinking_sentences(FOUND)
    assert (
        unasked
        == "Unasked thinking: with thinking off, the student thought in 0 of 320 answers (95 % "
        "interval 0.0 to 1.2 %)."
    )
    assert unthinking.startswith(
        "Missing thinking: with thinking on, the student did not think in 1 of 40 answers"
    )
    assert (
        rising
        == "reasoning: thinking gets longer with more effort (mean tokens: low 4.5, high 12.0)."
    )
    other = replace(
        FOUND, length_increases={"reasoning": False}, unasked_thinking=Proportion.of(0, 0)
    )
    assert [s.split(":")[1][:30] for s in hybrid_page.thinking_sentences(other)][
        1
    ] == " thinking does not get longer "
    assert len(hybrid_page.thinking_sentences(other)) == 2
    none = replace(
        FOUND,
        modes=(*FOUND.modes[:2], replace(FOUND.modes[2], length=ThinkingLength(0, 0, 0, 0, 0, 5))),
        length_increases={"reasoning": False},
    )
    assert "high: none finished" in hybrid_page.thinking_sentences(none)[-1]
    assert hybrid_page.thinking_rows(none)[2][4] == "- (5 cut)"


def test_the_section_is_html_and_escaped() -> None:
    assert str(hybrid_page.render_thinking_section(None)) == ""
    odd = replace(FOUND, modes=(replace(FOUND.modes[0], skill="<b>"),))
    page = str(hybrid_page.render_thinking_section(odd))
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert page.count("<tr>") == 2
