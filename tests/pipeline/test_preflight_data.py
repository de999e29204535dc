"""What a later stage would refuse is refused before a teacher is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from persea.config.recipe import load_recipe
from persea.errors import DataError, MissingRequirementError, RecipeError, RefusedError
from persea.pipeline.preflight import check_run
from persea.pipeline.preflight_data import missing_disk_bytes
from persea.pipeline.run_context import RunContext
from tests.cli.test_cli import SAPLINGS

LONG = "ten more words follow and follow and follow here again "


def context_of(folder: Path, rows: list[dict[str, Any]], **sections: Any) -> RunContext:
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "student": {"model": str(SAPLINGS / "llama-sapling")},
        "teachers": [{"model": str(SAPLINGS / "qwen-sapling")}],
        "corpus": [{"skill": "languages", "file": "mine.jsonl", "near_duplicate_threshold": 1.0}],
        "threads": 1,
        "audition": {"compare_with_base": False},
        **sections,
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(data))
    return RunContext(load_recipe(folder / "mine.yaml"), folder / "run")


SHORT = [{"prompt": "To English: satu"}, {"prompt": "To English: dua puluh"}]


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mine\.jsonl: no prompt to teach: the file is empty"):
        check_run(context_of(tmp_path, []))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    corpus = [{"skill": "languages", "file": "gone.jsonl"}]
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        check_run(context_of(tmp_path, [], corpus=corpus))


def test_a_given_answer_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no answer of its own"):
        check_run(context_of(tmp_path, SHORT, capture={"answers": "given"}))


def test_prompts_that_are_all_too_long_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": f"{k} {LONG * 9}"} for k in range(3)]
    with pytest.raises(RefusedError, match=r"3 of 3 prompts of languages .* training\.max_length"):
        check_run(context_of(tmp_path, rows, training={"max_length": 64}))
    (warning,) = check_run(context_of(tmp_path, [*rows, *SHORT], training={"max_length": 64}))
    assert "3 of 5 prompts of languages" in warning


def test_lora_targets_of_another_architecture_are_refused(tmp_path: Path) -> None:
    lora = {"targets": ["c_attn", "q_proj"]}
    student = {"model": str(SAPLINGS / "llama-sapling"), "adapt": "lora", "lora": lora}
    with pytest.raises(RecipeError, match=r"no matrix named c_attn -> it has down_proj, gate_proj"):
        check_run(context_of(tmp_path, SHORT, student=student))


def test_a_missing_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    endpoint = {"url": "http://127.0.0.1:9", "key_env": "MY_KEY"}
    teachers = [{"model": str(SAPLINGS / "qwen-sapling"), "endpoint": endpoint}]
    with pytest.raises(MissingRequirementError, match="the variable MY_KEY is not set"):
        check_run(context_of(tmp_path, SHORT, teachers=teachers))


def test_a_teacher_that_is_the_student_is_named(tmp_path: Path) -> None:
    teachers = [{"model": str(SAPLINGS / "llama-sapling"), "name": "same"}]
    (warning,) = check_run(context_of(tmp_path, SHORT, teachers=teachers))
    assert warning.startswith("same has the weights of the student")


def test_two_equal_teachers_are_named(tmp_path: Path) -> None:
    one = str(SAPLINGS / "qwen-sapling")
    teachers = [{"model": one}, {"model": one, "name": "again"}]
    pinned = {"pinned": {"languages": "again"}, "compare_with_base": False}
    (warning,) = check_run(context_of(tmp_path, SHORT, teachers=teachers, audition=pinned))
    assert warning == "again has the weights of qwen-sapling"


def test_a_finished_stage_needs_no_disk(tmp_path: Path) -> None:
    context = context_of(tmp_path, SHORT)
    before = missing_disk_bytes(context)
    (tmp_path / "run" / "train").mkdir(parents=True)
    (tmp_path / "run" / "train" / "done.json").write_text("{}")
    assert 0 < missing_disk_bytes(context) < before


def test_ray_is_missed_before_a_teacher_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persea.executors.ray_cluster.find_spec", lambda name: None)
    context = context_of(tmp_path, SHORT, executor={"kind": "ray"})
    with pytest.raises(MissingRequirementError, match=r"pip install 'persea\[ray\]'"):
        check_run(context)
    check_run(context, "train")
