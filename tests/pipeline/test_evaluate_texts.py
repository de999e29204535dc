"""Held-out texts in a run: every model is measured on them, and no training text holds one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persea.config.recipe import load_recipe
from persea.errors import RecipeError, RefusedError
from persea.pipeline import stages
from persea.pipeline.evaluate_texts import evaluate_texts
from persea.pipeline.run_context import RunContext
from persea.report.text_section import read_text_report, text_verdict
from persea.tasks.task import Split
from tests.cli.test_cli import SAPLINGS, recipe
from tests.pipeline.test_audition_stage import LLAMA, QWEN, documents


def held_out(folder: Path) -> list[dict[str, Any]]:
    """Documents in two languages, other than those of training."""
    (folder / "dev").mkdir()
    return documents(folder / "dev", ("id", "vi"), seed=6)


def context(folder: Path, **sections: Any) -> RunContext:
    plain = {"student": LLAMA, "teachers": [QWEN], "threads": 1, "audition": {"items": 4}}
    sections = plain | sections
    return RunContext(load_recipe(recipe(folder, **sections)), folder / "run")


def test_a_student_that_is_its_teacher_closed_the_gap(tmp_path: Path) -> None:
    """The trained student's folder holds the teacher's own weights."""
    run = context(
        tmp_path,
        corpus=documents(tmp_path, ("ja",)),
        audition={"pinned": {"world": "qwen-sapling"}, "compare_with_base": False},
        evaluation={"texts": held_out(tmp_path), "max_window_tokens": 24},
    )
    assert run.evaluated_tasks == ()  # of the generator's questions none is asked
    shutil.copytree(SAPLINGS / "llama-sapling", tmp_path / "run" / "train" / "student")
    told: list[str] = []
    load = lambda name: run.models.load_participant(name, 64)  # noqa: E731
    (tmp_path / "out").mkdir()
    found = evaluate_texts(run, tmp_path / "out", load, lambda share, text: told.append(text))
    assert [g.language for g in found.groups] == ["id", "vi", ""]
    for group in found.groups:
        difference = group.student_minus["base"]
        assert (difference.low, difference.value, difference.high) == (0.0, 0.0, 0.0)
        assert group.documents == (20 if not group.language else 10)
    assert found.windows > 20
    lines = (tmp_path / "out" / "texts.jsonl").read_text().splitlines()
    assert len(lines) == 20
    assert json.loads(lines[0])["bits"].keys() == {"student", "base", "qwen-sapling"}
    assert told[0] == "student 28 texts" or told[0].startswith("student ")
    assert "0 of 2 languages gained" in text_verdict(found)


def test_training_texts_that_hold_held_out_ones_are_left_out(tmp_path: Path) -> None:
    training = documents(tmp_path, ("id",))
    same = [{**training[0], "skill": "world"}]
    more = tmp_path / "more.jsonl"
    own = Path(training[0]["texts"]).read_text()
    more.write_text(own + '{"text": "Perahu kecil itu berlayar pelan ke pulau."}\n')
    training = [{**training[0], "texts": str(more)}]
    run = context(
        tmp_path,
        corpus=[*training, *documents(tmp_path, ("ko",))],
        audition={"pinned": {"world": "qwen-sapling"}},
        evaluation={"texts": same},
    )
    kept = [p for p in run.corpus.prompts if p.language == "id"]
    assert len(kept) == 1
    assert kept[0].conversation.messages[0].text.startswith("Perahu")
    removed = {r.reason.value for r in run.corpus.removed if r.prompt.language == "id"}
    assert removed <= {"test item", "holds a test item"}
    assert removed


def test_a_corpus_of_held_out_texts_alone_is_refused(tmp_path: Path) -> None:
    training = documents(tmp_path, ("id",))
    run = context(tmp_path, corpus=training, evaluation={"texts": training})
    with pytest.raises(
        RefusedError, match=r"corpus\.0: nothing is left to teach; left out: test item .10."
    ):
        assert run.corpus


def test_other_texts_are_another_evaluation(tmp_path: Path) -> None:
    run = context(tmp_path, evaluation={"texts": held_out(tmp_path)})
    before = run.held_out_texts_digest
    path = tmp_path / "dev" / "id.jsonl"
    path.write_text(path.read_text() + '{"text": "Satu lagi."}\n')
    again = RunContext(run.recipe, run.folder)
    assert again.held_out_texts_digest != before


def test_questions_can_be_switched_off_and_on(tmp_path: Path) -> None:
    evaluation: dict[str, Any] = {"texts": held_out(tmp_path), "items": 4}
    asked = context(tmp_path, evaluation=evaluation)
    assert [t.name for t in asked.evaluated_tasks] == ["languages", "code", "reasoning"]
    off = context(tmp_path, evaluation=evaluation | {"generated_tasks": False})
    assert off.held_out_items(Split.TEST) == []
    assert len(off.held_out_items(Split.AUDITION)) == 3
    texts_only = {
        "corpus": [{**d, "skill": "languages"} for d in documents(tmp_path)],
        "audition": {"pinned": {"languages": "qwen-sapling"}},
    }
    assert context(tmp_path, evaluation=evaluation, **texts_only).evaluated_tasks == ()
    on = context(tmp_path, evaluation=evaluation | {"generated_tasks": True}, **texts_only)
    assert [t.name for t in on.evaluated_tasks] == ["languages"]
    with pytest.raises(RecipeError, match="false, but there is nothing else to measure"):
        context(tmp_path, evaluation={"generated_tasks": False})


def test_a_texts_only_run_from_the_corpus_to_the_page(tmp_path: Path) -> None:
    run = context(
        tmp_path,
        corpus=documents(tmp_path, ("id",)),
        training={"steps": 2, "batch_size": 2, "warmup_steps": 0, "log_every": 1},
        evaluation={"texts": held_out(tmp_path)},
    )
    stages.run_pipeline(run, lambda stage, share, text: None)
    found = read_text_report(run.folder)
    assert found and found.student == "student"
    evaluation = json.loads((run.folder / "evaluate" / "evaluation.json").read_text())
    assert evaluation["scores"] == []
    page = (run.folder / "report" / "index.html").read_text()
    assert "Bits per byte on held-out texts: " in page
    assert "Scores by skill and model" not in page
    card = (run.folder / "report" / "README.md").read_text()
    assert "## Held-out texts" in card and "## Scores" not in card
    assert "language:\n- id\n- vi" in card
    assert replace(run)  # the context can be copied, as the command line does
