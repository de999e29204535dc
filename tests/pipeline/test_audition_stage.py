"""The audition as a stage: the student's base beside the teachers, questions and given texts, and
what the run does where no teacher is better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from persea.config.recipe import load_recipe
from persea.errors import RefusedError
from persea.pipeline import stages
from persea.pipeline.run_context import RunContext
from persea.tasks.generated.languages import LANGUAGES_TASK
from persea.tasks.task import Split
from tests.cli.test_cli import SAPLINGS, recipe

QWEN, GEMMA, LLAMA = ({"model": str(SAPLINGS / f"{n}-sapling")} for n in ("qwen", "gemma", "llama"))
# qwen knows languages and no code; gemma knows code and no languages
BOTH = [{"skill": "languages", "generate": 6}, {"skill": "code", "generate": 6}]


def context(folder: Path, **sections: Any) -> RunContext:
    base: dict[str, Any] = {"audition": {"items": 24}, "threads": 1}
    return RunContext(load_recipe(recipe(folder, **base | sections)), folder / "run")


def auditioned(folder: Path, **sections: Any) -> tuple[RunContext, list[str]]:
    found = context(folder, **sections)
    told: list[str] = []
    stages.run_pipeline(found, lambda stage, share, text: told.append(text), "audition")
    return context(folder, **sections), told


def documents(
    folder: Path, languages: tuple[str, ...] = ("id", "zh"), seed: int = 5
) -> list[dict[str, Any]]:
    """Files of texts that qwen's sapling was grown on the like of."""
    items = LANGUAGES_TASK.items(Split.TRAIN, 400, seed)
    parts = []
    for language in languages:
        texts = [i.reference for i in items if i.prompt.language == language][:30]
        path = folder / f"{language}.jsonl"
        path.write_text(
            "".join(json.dumps({"text": " ".join(texts[k::10])}) + "\n" for k in range(10))
        )
        parts.append({"texts": str(path), "skill": "world", "language": language})
    return parts


# --- a student that is better than its only teacher ---

BETTER_STUDENT: dict[str, Any] = {"student": QWEN, "teachers": [GEMMA], "corpus": BOTH}


def test_the_verdict_is_said_before_anything_is_captured(tmp_path: Path) -> None:
    run, told = auditioned(tmp_path, **BETTER_STUDENT)
    warnings = [t for t in told if t.startswith("warning: ")]
    assert len(warnings) == 1
    assert warnings[0].startswith(
        "warning: no teacher is better than the student on languages (gemma-sapling 0.0"
    )
    assert warnings[0].endswith(": do not distil it")
    assert {g.part: g.gain_kind for g in run.cast.gains} == {
        "languages": "worse",
        "code": "better",
    }
    assert set(run.cast.parts) == {"languages", "code"}  # warned, and taught all the same
    assert len(run.captured_corpus.prompts) == 12
    table = (tmp_path / "run" / "audition" / "table.md").read_text()
    assert warnings[0].removeprefix("warning: ") in table
    lines = (tmp_path / "run" / "audition" / "base.code.jsonl").read_text().splitlines()
    assert len(lines) >= 10


def test_skip_leaves_the_part_out_and_accounts_for_its_prompts(tmp_path: Path) -> None:
    sections = BETTER_STUDENT | {"audition": {"items": 24, "without_gain": "skip"}}
    run, told = auditioned(tmp_path, **sections)
    assert run.cast.skipped == ("languages",)
    assert [t for t in told if t.startswith("warning: ") and "left out" in t]
    assert {p.skill for p in run.captured_corpus.prompts} == {"code"}
    removed = [r for r in run.captured_corpus.removed if r.prompt.skill == "languages"]
    assert {r.reason.value for r in removed} == {"no teacher is better than the student"}
    assert len(removed) == 6
    assert {p.skill for u in run.capture_units for p in u.prompts} == {"code"}


def test_refuse_ends_the_run_without_a_cast_that_could_be_used(tmp_path: Path) -> None:
    sections = BETTER_STUDENT | {"audition": {"items": 24, "without_gain": "refuse"}}
    with pytest.raises(
        RefusedError, match=r"student on languages .* do not distil it -> add a bet"
    ):
        auditioned(tmp_path, **sections)
    folder = tmp_path / "run" / "audition"
    assert "do not distil it" in (folder / "table.md").read_text()
    assert not (folder / "cast.json").exists()
    assert not (folder / "done.json").exists()


def test_the_base_is_not_asked_where_the_recipe_says_so(tmp_path: Path) -> None:
    sections = BETTER_STUDENT | {"audition": {"items": 24, "compare_with_base": False}}
    run, told = auditioned(tmp_path, **sections)
    assert run.cast.gains == ()
    assert not any("base" in t for t in told)


# --- given texts ---


def test_the_teacher_of_texts_is_the_one_that_needs_the_fewest_bits(tmp_path: Path) -> None:
    run, told = auditioned(
        tmp_path,
        student=QWEN,
        teachers=[GEMMA, LLAMA],
        corpus=documents(tmp_path),
        evaluation={"texts": documents(tmp_path, ("vi",))},
    )
    assert run.cast.parts == {
        "world/id": (("llama-sapling", 1.0),),
        "world/zh": (("llama-sapling", 1.0),),
    }
    bits = {(s.model_name, s.language): s.bits_per_byte for s in run.cast.text_scores}
    for language in ("id", "zh"):
        assert bits["llama-sapling", language] < bits["gemma-sapling", language]
    assert [(g.part, g.unit, g.gain_kind) for g in run.cast.gains] == [
        (part, "bits per byte", "better") for part in run.cast.parts
    ]
    assert any(t.startswith("base world zh ") for t in told)
    assert {u.teacher for u in run.capture_units} == {"llama-sapling"}
    table = (tmp_path / "run" / "audition" / "table.md").read_text()
    assert "| world/id | gemma-sapling |" in table
    assert "worse than llama-sapling" in table


def test_texts_that_the_student_knows_better_are_not_distilled(tmp_path: Path) -> None:
    with pytest.raises(
        RefusedError, match=r"texts of world/id .*texts of world/zh .* nothing is l"
    ):
        auditioned(
            tmp_path,
            student=LLAMA,
            teachers=[GEMMA],
            corpus=documents(tmp_path),
            audition={"without_gain": "skip"},
            evaluation={"texts": documents(tmp_path, ("vi",))},
        )
