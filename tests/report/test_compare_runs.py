"""Two runs are paired on equal items, compared apart on others, and their recipes are compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from persea.errors import DataError
from persea.report.compare_runs import compare_runs
from persea.tasks.intervals import paired_difference_interval, unpaired_difference_interval
from tests.cli.test_cli import command
from tests.report.test_page import change, make_run, write


def answered(
    run: Path, said: dict[tuple[str, str], list[float]], first: int = 0, effort: str = "none"
) -> list[dict[str, Any]]:
    """The student's answers to numbered items of each skill and language."""
    return [
        {
            "id": f"{skill}/{language}/{k + first}",
            "model_name": "avocado",
            "skill": skill,
            "language": language,
            "effort": effort,
            "question": f"question {k + first}",
            "reference": "r",
            "answer": "a",
            "finish": "stop",
            "verdict": "right",
            "value": v,
        }
        for (skill, language), values in said.items()
        for k, v in enumerate(values)
    ]


def lines(run: Path, rows: list[dict[str, Any]]) -> Path:
    write(run / "evaluate" / "examples.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    return run


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    lines(
        a,
        answered(
            a, {("code", "en"): [1, 0] * 20, ("words", "th"): [1] * 15, ("words", "zh"): [0] * 15}
        ),
    )
    lines(
        b,
        answered(
            b,
            {
                ("code", "en"): [1, 1, 1, 0] * 10,
                ("words", "th"): [1] * 15,
                ("words", "zh"): [1] * 14 + [0],
            },
        ),
    )
    return a, b


def test_the_same_items_are_paired(runs: tuple[Path, Path]) -> None:
    told = compare_runs(*runs)
    x, y = [1, 0] * 20, [1, 1, 1, 0] * 10
    assert [(p.skill, p.language, p.num_pairs, p.outcome) for p in told.differences] == [
        ("code", "", 40, "better"),
        ("words", "", 30, "better"),
        ("words", "th", 15, "not distinguishable"),
        ("words", "zh", 15, "better"),
    ]
    assert (told.differences[0].a, told.differences[0].b, told.differences[0].difference) == (
        0.5,
        0.75,
        0.25,
    )
    assert (told.differences[0].low, told.differences[0].high) == paired_difference_interval(y, x)
    turned = compare_runs(*runs[::-1])
    assert [p.outcome for p in turned.differences] == [
        "worse",
        "worse",
        "not distinguishable",
        "worse",
    ]
    assert told.recipe_differences == {} and told.note().endswith("the recipes are equal")


def test_different_items_are_not_paired_and_the_note_mentions_it(runs: tuple[Path, Path]) -> None:
    a, b = runs
    x, y = [1.0, 0.0] * 20, [1.0] * 40
    lines(a, answered(a, {("code", "en"): x}))
    lines(b, answered(b, {("code", "en"): y}, first=100))
    (place,) = compare_runs(a, b).differences
    assert (place.num_pairs, place.difference, place.low, place.high) == (
        0,
        0.5,
        *unpaired_difference_interval(y, x),
    )
    assert "no common item on code" in compare_runs(a, b).note()
    lines(b, answered(b, {("code", "en"): y}, first=10))
    (place,) = compare_runs(a, b).differences
    assert (place.num_pairs, place.difference, place.b_n) == (30, 0.5, 40)
    assert "only some common items on code" in compare_runs(a, b).note()


def test_one_id_with_another_question_is_another_item(runs: tuple[Path, Path]) -> None:
    a, b = runs
    path = b / "evaluate" / "examples.jsonl"
    path.write_text(path.read_text().replace("question 3", "another 3"))
    assert compare_runs(a, b).differences[0].num_pairs == 40 - 11  # 3 and 30 to 39


def test_skills_of_one_run_only_are_listed(runs: tuple[Path, Path]) -> None:
    a, b = runs
    lines(
        b,
        answered(b, {("safety", "en"): [1.0] * 5, ("code", "en"): [1.0] * 5})
        + answered(b, {("code", "en"): [1.0] * 5}, effort="high"),
    )
    told = compare_runs(a, b)
    assert told.asked_in_one == {"words": "A", "safety": "B", "code at high": "B"}
    assert [(p.skill, p.effort) for p in told.differences] == [("code", "none")]
    assert "words: measured in A only; safety: measured in B only" in told.note()


def test_recipes_are_laid_side_by_side(runs: tuple[Path, Path]) -> None:
    a, b = runs
    write(
        b / "recipe.yaml",
        (a / "recipe.yaml")
        .read_text()
        .replace("steps: 600", "steps: 900")
        .replace(", effort: none", "")
        .replace("Qwen/Qwen3-8B", "Qwen/Qwen3-14B"),
    )
    assert compare_runs(a, b).recipe_differences == {
        "teachers.0.model": ("Qwen/Qwen3-8B", "Qwen/Qwen3-14B"),
        "teachers.2.effort": ("none", "(absent)"),
        "training.steps": (600, 900),
    }
    assert "the recipes are equal" not in compare_runs(a, b).note()


def test_a_table_and_json(runs: tuple[Path, Path], tmp_path: Path) -> None:
    write(
        runs[1] / "recipe.yaml",
        (runs[0] / "recipe.yaml").read_text().replace("steps: 600", "steps: 900"),
    )
    table = command("compare", "a", "b", folder=tmp_path)
    assert (table.code, table.err) == (0, "")
    rows = [line.split() for line in table.out.splitlines()]
    assert rows[0] == ["skill", "language", "A", "B", "B", "-", "A", "95", "%", "n", "B", "is"]
    assert [
        "code",
        "all",
        "0.500",
        "0.750",
        "+0.250",
        "+0.09",
        "to",
        "+0.38",
        "40",
        "better",
    ] in rows
    assert compare_runs(runs[0], runs[0]).table_rows()[0][1] == "all"
    both = [
        *answered(runs[0], {("code", "en"): [1.0, 0.0]}),
        *answered(runs[0], {("code", "en"): [1.0, 1.0]}, effort="high"),
    ]
    assert [r[1] for r in compare_runs(lines(runs[0], both), runs[0]).table_rows()[:2]] == [
        "all at none",
        "all at high",
    ]
    assert "training.steps: 600 -> 900" in table.out and ["bits/byte", "all"] in [
        r[:2] for r in rows
    ]
    lines(runs[0], answered(runs[0], {("code", "en"): [1, 0] * 20}))
    told = command("compare", "a", "b", "--json", folder=tmp_path)
    value = json.loads(told.out)
    assert value["differences"][0]["outcome"] == "better" and value["recipe_differences"] == {
        "training.steps": [600, 900]
    }
    assert set(value) == {
        "a",
        "b",
        "differences",
        "recipe_differences",
        "bits_per_byte",
        "asked_in_one",
    }


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda b: b.rename(b.with_name("gone")), "evaluation.json: not there"),
    "no evaluation": (
        lambda b: (b / "evaluate" / "evaluation.json").unlink(),
        "evaluation.json: not there",
    ),
    "no answers": (lambda b: lines(b, []), "examples.jsonl: holds no answer"),
    "no student": (
        lambda b: (b / "evaluate" / "examples.jsonl").write_text(
            (b / "evaluate" / "examples.jsonl").read_text().replace('"avocado"', '"qwen"')
        ),
        "holds no answer of its student",
    ),
    "half a line": (
        lambda b: (b / "evaluate" / "examples.jsonl").write_bytes(
            (b / "evaluate" / "examples.jsonl").read_bytes()[:-9]
        ),
        "not JSON",
    ),
    "no value": (
        lambda b: (b / "evaluate" / "examples.jsonl").write_text('{"id": "a"}\n'),
        "missing: another version of persea",
    ),
    "a value of 7": (
        lambda b: lines(b, answered(b, {("code", "en"): [7.0]})),
        "less than or equal to 1",
    ),
    "NaN": (lambda b: lines(b, answered(b, {("code", "en"): [float("nan")]})), "holds NaN"),
    "no recipe": (lambda b: (b / "recipe.yaml").unlink(), "recipe.yaml: cannot be read"),
    "broken recipe": (lambda b: write(b / "recipe.yaml", "a: [1"), "recipe.yaml: cannot be read"),
    "old evaluation": (
        lambda b: change(b / "evaluate" / "evaluation.json", lambda v: v.pop("compared")),
        "compared: missing: another version of persea",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_compared_is_refused_in_one_line(runs: tuple[Path, Path], case: str) -> None:
    spoil, words = BAD[case]
    spoil(runs[1])
    with pytest.raises(DataError) as refusal:
        compare_runs(*runs)
    assert (
        words in str(refusal.value)
        and "\n" not in str(refusal.value)
        and refusal.value.exit_code == 3
    )
