"""Plain texts from the recipe to the page: base teachers and students, mixed with prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from persea import storage
from persea.config.recipe import Recipe
from persea.errors import DataError, PerseaError, RecipeError
from persea.pipeline.plan import plan_run
from persea.pipeline.preflight import refuse_asking_text_models
from persea.pipeline.run_context import RunContext
from persea.pipeline.stages import run_pipeline
from persea.tasks.task import Split

SAPLINGS = Path(__file__).resolve().parents[2] / "saplings"
LINES = [f"Berita {k}: harga beras di pasar naik {k * 7} persen, kata menteri." for k in range(12)]
LONG = " ".join(LINES)
STEPS = {
    "training": {"steps": 2, "batch_size": 4, "max_length": 96, "checkpoint_every": 2},
    "check": {"measure_likelihood": False},
    "evaluation": {"items": 2, "max_new_tokens": 4},
    "threads": 1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template."""
    folder = tmp_path_factory.mktemp("models") / "qwen-base"
    shutil.copytree(SAPLINGS / "qwen-sapling", folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def write_texts(path: Path) -> Path:
    rows = [json.dumps({"text": line} if k % 2 else line) for k, line in enumerate(LINES)]
    path.write_text("\n".join([*rows, json.dumps({"text": LONG}), json.dumps(LINES[0])]) + "\n")
    return path


def context_of(folder: Path, teachers: list[dict[str, Any]], **changes: Any) -> RunContext:
    """A recipe whose corpus are the texts, unless it is changed."""
    write_texts(folder / "id.jsonl")
    content = {
        "student": {"model": str(SAPLINGS / "llama-sapling")},
        "teachers": teachers,
        "corpus": [{"texts": "id.jsonl", "skill": "languages", "language": "id"}],
        **STEPS,
        **changes,
    }
    content["corpus"] = [
        {"near_duplicate_threshold": 1.0, **part} if "texts" in part else part
        for part in content["corpus"]
    ]
    path = folder / "texts.yaml"
    path.write_text(yaml.safe_dump(content))
    return RunContext(Recipe.from_yaml(path), folder / "run")


def run(context: RunContext, only_stage: str = "") -> list[str]:
    messages: list[str] = []
    run_pipeline(context, lambda stage, share, text: messages.append(f"{stage} {text}"), only_stage)
    return messages


def test_a_base_teacher_and_a_chat_teacher_teach_one_student(base: Path, tmp_path: Path) -> None:
    teachers = [
        {"model": str(base), "name": "base-teacher"},
        {"model": str(SAPLINGS / "gemma-sapling"), "name": "chat"},
    ]
    corpus = [
        {"texts": "id.jsonl", "skill": "languages", "language": "id"},
        {"skill": "reasoning", "generate": 4},
    ]
    pinned = {"languages": "base-teacher", "reasoning": "chat"}
    context = context_of(
        tmp_path, teachers, corpus=corpus, audition={"pinned": pinned, "compare_with_base": False}
    )
    rows = plan_run(context).table_rows()
    assert ("", "", "1 left out: duplicate") in rows
    works = {stage: work for stage, _, work in rows}
    assert works["audition"] == "no question: each skill has one possible teacher"
    num_texts = len(context.corpus.prompts) - 4
    assert works["capture"].startswith(f"4 answers and {num_texts} given texts")
    run(context)
    folder = tmp_path / "run"
    summary = storage.read_json(folder / "capture" / "summary.json")
    assert summary["teachers"]["base-teacher"]["kept"] == num_texts
    assert summary["removed"] == {"duplicate": 1}
    dataset = storage.read_json(folder / "train" / "dataset.json")
    assert dataset["examples"]["base-teacher"] == num_texts
    assert not dataset["too_long"]
    evaluation = storage.read_json(folder / "evaluate" / "evaluation.json")
    assert evaluation["not_asked"] == ["base-teacher"]
    assert {s["skill"] for s in evaluation["scores"]} == {"reasoning"}
    assert {s["model_name"] for s in evaluation["scores"]} == {"student", "base", "chat"}
    assert "base-teacher" in evaluation["bits_per_byte"]
    report = storage.read_json(folder / "report" / "report.json")
    assert set(report["skills"]["reasoning"]["teachers"]) == {"chat"}
    check = storage.read_json(folder / "check" / "check.json")
    pairs = {(p["teacher"], p["skill"], p["language"]) for p in check["pairs"]}
    assert {p[1:] for p in pairs} >= {("languages", "id")}
    assert not {p[2] for p in pairs if p[1] == "languages"} - {"id"}  # no question of persea's own
    assert set(run(context)) == {
        f"{stage} up to date"
        for stage in ("check", "audition", "capture", "train", "evaluate", "lineage", "report")
    }


def test_a_chat_teacher_and_a_base_student_learn_texts(base: Path, tmp_path: Path) -> None:
    teachers = [{"model": str(SAPLINGS / "gemma-sapling"), "name": "chat"}]
    context = context_of(tmp_path, teachers, student={"model": str(base)})
    run(context)
    assert context.models.student_renderer.is_text
    assert context.evaluated_tasks == ()
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "Nothing was measured: name held-out texts of your own" in page
    assert not (tmp_path / "run" / "train" / "student" / "chat_template.jinja").exists()


def test_windows_hold_every_byte_of_the_corpus_once(base: Path, tmp_path: Path) -> None:
    context = context_of(tmp_path, [{"model": str(base), "name": "b"}])
    prompts = context.corpus.prompts
    by_document: dict[str, list[str]] = {}
    for prompt in prompts:
        text = prompt.conversation.messages[0].text
        by_document.setdefault(prompt.id.partition("@")[0], []).append(text)
        for renderer in (context.models.student_renderer, context.models.renderers["b"]):
            assert len(renderer.render(prompt.conversation)) <= 96
    assert ["".join(parts) for parts in by_document.values()] == [*LINES, LONG]
    assert len(by_document["id.jsonl:13"]) > 1
    windows = [p for p in prompts if p.id.startswith("id.jsonl:13@")]
    offsets = np.cumsum([0, *(len(w.encode()) for w in by_document["id.jsonl:13"])])
    assert [int(w.id.partition("@")[2]) for w in windows] == offsets[:-1].tolist()
    roles = [w.conversation.messages[0].role for w in windows]
    assert roles == ["document_part"] * (len(windows) - 1) + ["document"]


def test_capture_needs_no_audition_where_each_skill_has_one_teacher(
    base: Path, tmp_path: Path
) -> None:
    context = context_of(tmp_path, [{"model": str(base), "name": "b"}])
    run(context, "capture")
    assert not (tmp_path / "run" / "audition").exists()
    states = {s.stage: s.state for s in plan_run(context).stages}
    assert states["capture"] == "up to date"


def test_capture_before_the_audition_names_the_command(tmp_path: Path) -> None:
    two = [{"model": str(SAPLINGS / name)} for name in ("qwen-sapling", "gemma-sapling")]
    context = context_of(tmp_path, two)
    with pytest.raises(DataError, match="no teacher is chosen yet") as caught:
        run(context, "capture")
    assert f"persea audition {context.recipe.source_path}" in caught.value.remedy


GIVEN = {"answers": "given"}
PROMPTS = [{"file": "rows.jsonl", "skill": "languages", "language": "id"}]


def write_rows(folder: Path) -> None:
    rows = [{"prompt": "Berita:", "answer": line} for line in LINES]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows, rows[3]]))


def test_given_answers_of_one_prompt_all_stay(base: Path, tmp_path: Path) -> None:
    write_rows(tmp_path)
    corpus = [PROMPTS[0] | {"near_duplicate_threshold": 1.0}]
    teachers = [{"model": str(base), "name": "b"}]
    context = context_of(tmp_path, teachers, corpus=corpus, capture=GIVEN)
    assert len(context.corpus.prompts) == len(LINES)
    assert context.corpus.count_removed() == {"duplicate": 1}
    samples = context.check_samples
    assert [(s.skill, s.language, len(s.conversations)) for s in samples] == [
        ("languages", "id", len(LINES))
    ]
    asked = context_of(tmp_path, [{"model": str(SAPLINGS / "qwen-sapling")}], corpus=corpus)
    assert len(asked.corpus.prompts) == 1


def test_prompts_and_texts_of_one_skill_are_both_checked(tmp_path: Path) -> None:
    corpus = [
        {"texts": "id.jsonl", "skill": "languages", "language": "id"},
        {"skill": "languages", "generate": 4},
    ]
    context = context_of(tmp_path, [{"model": str(SAPLINGS / "qwen-sapling")}], corpus=corpus)
    samples = context.check_samples
    assert samples[0].is_documents
    assert len(samples) > 2
    assert {t.name for t, _ in context.held_out_items(Split.TEST)} == {"languages"}


@pytest.mark.parametrize(
    ("changes", "message", "remedy"),
    [
        (
            {"corpus": [{"skill": "languages", "generate": 2}]},
            "b has no chat template, so it cannot answer the prompts of languages",
            "`texts:`",
        ),
        (
            {"teachers": 2, "corpus": [{"skill": "code", "generate": 2}]},
            "b has no chat template, so an audition cannot ask it",
            "pinned",
        ),
        ({"student": {}, "corpus": PROMPTS, "capture": GIVEN}, "cannot learn the conv", "family"),
        (
            {"training": {"batch_size": 4, "on_policy": {"start_step": 1, "rollouts": 4}}},
            "the corpus has texts only",
            "add prompts",
        ),
        (
            {"evaluation": {"judge": "judge"}, "teachers": 3},
            "judge has no chat template, so it cannot judge",
            "a model with a chat template",
        ),
    ],
)
def test_a_base_model_is_not_asked(
    base: Path, tmp_path: Path, changes: dict[str, Any], message: str, remedy: str
) -> None:
    teachers = [{"model": str(base), "name": "b"}]
    if changes.get("teachers") == 2:
        teachers.append({"model": str(SAPLINGS / "gemma-sapling"), "name": "chat"})
    if changes.get("teachers") == 3:
        teachers.append({"model": str(base), "name": "judge", "reference": True})
    write_rows(tmp_path)
    settings = {k: v for k, v in changes.items() if k != "teachers"}
    if "student" in settings:
        settings["student"] = {"model": str(base)}
    context = context_of(tmp_path, teachers, **settings)
    for refuse in (lambda: refuse_asking_text_models(context), lambda: plan_run(context)):
        with pytest.raises(PerseaError, match=message) as caught:
            refuse()
        assert remedy in caught.value.remedy
        assert "\n" not in str(caught.value)


def test_a_base_student_learns_prompts_as_text_where_the_recipe_says_so(
    base: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path)
    teachers = [{"model": str(SAPLINGS / "gemma-sapling"), "name": "chat"}]
    named = {"model": str(base), "family": "text"}
    context = context_of(tmp_path, teachers, corpus=PROMPTS, capture=GIVEN, student=named)
    refuse_asking_text_models(context)
    template = str(SAPLINGS / "qwen-sapling" / "chat_template.jinja")
    named = {"model": str(base), "chat_template": template}
    context = context_of(tmp_path, teachers, corpus=PROMPTS, capture=GIVEN, student=named)
    refuse_asking_text_models(context)
    assert context.models.student_renderer.family.name == "qwen"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("{texts: a.jsonl, skill: code, generate: 3}", "both `generate` and `texts`"),
        ("{texts: a.jsonl, skill: code, effort_shares: {none: 1}}", "nobody answers"),
        ("{generate: 3, skill: code, column: body}", "given, but no `texts`"),
    ],
)
def test_contradictions_of_texts(tmp_path: Path, part: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"student: {{model: a/b}}\nteachers: [{{model: c/d}}]\ncorpus: [{part}]\n")
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(path)
