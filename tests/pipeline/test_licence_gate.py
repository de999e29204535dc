"""The licence check of a run: what is read of models, what is refused, and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from persea.config.recipe import Recipe, load_recipe
from persea.errors import DataError, RecipeError, RefusedError
from persea.licences.table import Relation
from persea.licences.verdict import Outcome
from persea.pipeline import licence_gate
from persea.pipeline.licence_gate import (
    copy_to_student,
    licence_verdict,
    licensed_inputs,
    refuse_unlicensed,
    write_notice,
)
from tests.cli.test_cli import SAPLINGS, TINY, persea
from tests.cli.test_cli import recipe as write_recipe

LINE = (
    "-> write its `licence:`, or add "
    '`licence_decisions: {stranger: "WHO decided WHAT, YYYY-MM-DD"}`'
)


def folder_model(folder: Path, card: str = "", config: dict[str, Any] | None = None) -> str:
    """A model's folder with a card and a configuration, and no licence unless the card has one."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "config.json").write_text(json.dumps(config or {}))
    if card:
        (folder / "README.md").write_text(f"---\n{card}\n---\n")
    return str(folder)


def loaded(folder: Path, teacher: dict[str, Any], **sections: Any) -> Recipe:
    page = TINY | {"teachers": [teacher], "audition": {}} | sections
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(page))
    return load_recipe(path)


@pytest.mark.parametrize("name", ["quickstart", "mixed", "onpolicy", "real-vocabularies"])
def test_the_bundled_recipes_pass(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(SAPLINGS.parent / "recipes" / f"{name}.yaml")
    refuse_unlicensed(recipe, tmp_path)
    verdict = licence_verdict(recipe, None)
    assert (verdict.outcome, verdict.student_name) == (Outcome.OK, recipe.name)


def test_the_recipe_of_real_models_prints_its_verdict_and_the_name_of_its_student() -> None:
    recipe = SAPLINGS.parent / "recipes" / "avocado.yaml"
    ended = persea("validate", recipe, folder=SAPLINGS.parent)
    assert ended.code == 0
    assert (
        "licences: ok with duties, for commercial use; the student: Llama-avocado, under llama3.2 "
        "AND gemma" in ended.out
    )


@pytest.mark.parametrize(
    ("card", "config", "outcome", "ids"),
    [
        ("", {}, Outcome.ASK, ()),
        ("license: mit", {}, Outcome.OK, ("MIT",)),
        ("license: other\nlicense_name: qwen-research", {}, Outcome.REFUSED, ("qwen-research",)),
        (
            "license: mit\nbase_model: meta-llama/Meta-Llama-3-8B",
            {},
            Outcome.REFUSED,
            ("MIT", "llama-3"),
        ),
        (
            "license: apache-2.0",
            {"_name_or_path": "Qwen/Qwen2.5-3B"},
            Outcome.REFUSED,
            ("Apache-2.0", "qwen-research"),
        ),
        (
            "license: mit\nbase_model: [a/b, google/gemma-2-2b]",
            {},
            Outcome.DUTIES,
            ("MIT", "Gemma"),
        ),
    ],
)
def test_a_folder_states_its_licence_and_its_ancestors(
    card: str, config: dict[str, Any], outcome: Outcome, ids: tuple[str, ...], tmp_path: Path
) -> None:
    teacher = {"model": folder_model(tmp_path / "stranger", card, config)}
    for folder in (tmp_path, None):  # nothing but small local files is read
        verdict = licence_verdict(loaded(tmp_path, teacher), folder)
        assert (verdict.outcome, verdict.licences["stranger"]) == (outcome, ids)


def test_a_refused_run_captures_nothing_and_asks_no_teacher(tmp_path: Path) -> None:
    teachers = [{"model": t["model"], "name": Path(t["model"]).name} for t in TINY["teachers"]]
    teachers[1]["licence"] = "llama3"
    ended = persea("run", write_recipe(tmp_path, teachers=teachers), "--out", "r", folder=tmp_path)
    assert ended.code == 4
    assert "gemma-sapling: licence: no student may learn from it: Meta Llama 3 Community" in (
        ended.err
    )
    assert "Traceback" not in ended.err
    assert not [p for p in (tmp_path / "r").glob("*") if p.is_dir()]


def test_a_question_is_refused_with_the_line_that_answers_it(tmp_path: Path) -> None:
    teacher = {"model": folder_model(tmp_path / "stranger")}
    with pytest.raises(RefusedError) as refused:
        refuse_unlicensed(loaded(tmp_path, teacher), tmp_path)
    assert str(refused.value) == f"stranger: licence question: its licence is not known {LINE}"
    decided = {"stranger": "J. Doe: our own model, 2026-11-30"}
    recipe = loaded(tmp_path, teacher, licence_decisions=decided)
    refuse_unlicensed(recipe, tmp_path)
    verdict = write_notice(recipe, tmp_path, tmp_path)
    assert verdict.to_json()["decisions"] == decided
    assert "J. Doe: our own model, 2026-11-30" in (tmp_path / "NOTICE").read_text()
    refuse_unlicensed(loaded(tmp_path, teacher | {"licence": "MIT"}), tmp_path)


@pytest.mark.parametrize(
    ("decisions", "words"),
    [
        ({"nobody": "J. Doe, 2026-11-30"}, "no such model or data"),
        ({"stranger": "yes"}, "does not name the day of the decision"),
    ],
)
def test_a_decision_names_a_model_and_a_day(
    decisions: dict[str, str], words: str, tmp_path: Path
) -> None:
    teacher = {"model": folder_model(tmp_path / "stranger")}
    with pytest.raises(RecipeError, match=words):
        loaded(tmp_path, teacher, licence_decisions=decisions)


def test_no_teacher_has_the_name_of_the_student(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="student is the name of the student itself"):
        loaded(tmp_path, {"model": str(SAPLINGS / "qwen-sapling"), "name": "student"})


def test_a_service_that_forbids_it_is_refused_as_a_teacher_and_measured_as_a_reference(
    tmp_path: Path,
) -> None:
    service = {
        "model": "text_only",
        "name": "gpt",
        "endpoint": {"url": "https://api.openai.com/v1", "protocol": "chat"},
    }
    with pytest.raises(RefusedError, match="gpt: licence: no student may learn from it: OpenAI"):
        refuse_unlicensed(loaded(tmp_path, service), tmp_path)
    own = {"model": str(SAPLINGS / "qwen-sapling")}
    path = tmp_path / "tiny.yaml"
    path.write_text(
        yaml.safe_dump(TINY | {"teachers": [own, service | {"reference": True}], "audition": {}})
    )
    recipe = load_recipe(path)
    refuse_unlicensed(recipe, tmp_path)
    assert [i.relation for i in licensed_inputs(recipe, tmp_path)] == [
        Relation.BASE,
        Relation.TEACHER,
        Relation.REFERENCE,
    ]


def test_the_model_that_a_server_names_counts(tmp_path: Path) -> None:
    teacher = {
        "model": "text_only",
        "name": "proxy",
        "licence": "MIT",
        "endpoint": {"url": "http://127.0.0.1:1", "protocol": "chat"},
    }
    recipe = loaded(tmp_path, teacher)
    refuse_unlicensed(recipe, tmp_path)
    (tmp_path / "endpoints").mkdir()
    (tmp_path / "endpoints" / "proxy.json").write_text(json.dumps({"model": "gpt-5.2"}))
    with pytest.raises(RefusedError, match="proxy: licence: no student may learn from it"):
        refuse_unlicensed(recipe, tmp_path)


def test_a_hub_model_is_asked_once_and_only_for_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n")

    def download(source: Any, name: str) -> Path | None:
        asked.append(name)
        return tmp_path / name if (tmp_path / name).is_file() else None

    monkeypatch.setattr("persea.models.loading.download_hub_file", download)
    licence_gate._stated_on_hub.cache_clear()
    recipe = loaded(tmp_path, {"model": "someone/theirs"})
    assert licence_verdict(recipe, None).outcome is Outcome.ASK
    assert asked == []
    for _ in range(2):
        assert licence_verdict(recipe, tmp_path).licences["theirs"] == ("Gemma",)
    assert asked.count("config.json") == 1
    licence_gate._stated_on_hub.cache_clear()


def test_a_missing_folder_is_an_error_of_a_run_and_not_of_validate(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, {"model": "./nowhere"})
    assert licence_verdict(recipe, None).outcome is Outcome.ASK
    with pytest.raises(DataError, match="no model folder"):
        licence_verdict(recipe, tmp_path)


def test_a_file_of_prompts_has_a_licence_too(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hi"}\n')
    own = {"model": str(SAPLINGS / "qwen-sapling")}
    part = {"skill": "code", "file": "p.jsonl", "licence": "muse-spark-open"}
    verdict = licence_verdict(loaded(tmp_path, own, corpus=[part]), tmp_path)
    assert (verdict.outcome, verdict.student_licence) == (Outcome.DUTIES, "muse-spark-open")


def test_notice_and_card_go_to_the_student_and_are_read_from_there(tmp_path: Path) -> None:
    copy_to_student(tmp_path)  # nothing is there yet
    for folder in ("lineage", "train/student"):
        (tmp_path / folder).mkdir(parents=True)
    copy_to_student(tmp_path)
    (tmp_path / "lineage" / "NOTICE").write_text("one")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama3.2-and-gemma\n---\n"
    )
    student = tmp_path / "train" / "student"
    copy_to_student(tmp_path)
    assert (student / "NOTICE").read_text() == "one"
    (student / "model.safetensors").write_bytes(b"")
    verdict = licence_verdict(loaded(tmp_path, {"model": str(student), "name": "one"}), tmp_path)
    assert verdict.licences["one"] == ("llama-3.2", "Gemma")


def test_a_data_set_of_the_hub_is_under_what_its_card_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = tmp_path / "README.md"
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: str(card))
    own = {"model": str(SAPLINGS / "qwen-sapling")}
    recipe = loaded(tmp_path, own, corpus=[{"skill": "code", "hub": {"name": "a/b"}}])
    assert licence_verdict(recipe, None).outcome is Outcome.ASK
    for licence, outcome in (("mit", Outcome.OK), ("cc-by-nc-4.0", Outcome.ASK)):
        card.write_text(f"---\nlicense: {licence}\n---\n")
        licence_gate._stated_by_dataset.cache_clear()
        assert licence_verdict(recipe, tmp_path).outcome is outcome
    licence_gate._stated_by_dataset.cache_clear()
