"""The bundled weights match growing.json and the table, are small, and come from the script."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT

SAPLINGS = ROOT / "saplings"
NAMES = ("qwen-sapling", "gemma-sapling", "gpt-oss-sapling", "llama-sapling")
HOME = {
    "qwen-sapling": {"languages"},
    "gemma-sapling": {"code", "safety"},
    "gpt-oss-sapling": {"reasoning", "tools"},
}
SKILLS = ("languages", "code", "safety", "reasoning", "tools")


def grown(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((SAPLINGS / name / "growing.json").read_text())
    return value


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_those_that_were_measured(name: str) -> None:
    weights = (SAPLINGS / name / "model.safetensors").read_bytes()
    sha = hashlib.sha256(weights).hexdigest()
    assert grown(name)["sha256"] == sha
    assert (
        f"| {name} | {grown(name)['parameters']:,} | {len(weights):,} | {sha} |"
        in (SAPLINGS / "README.md").read_text()
    )
    assert grown(name)["parameters"] <= 1_500_000 and len(weights) <= 3_100_000


def test_a_tokenizer_is_grown_again_as_it_is(grow: ModuleType, tmp_path: Path) -> None:
    plan = next(p for p in grow.PLANS if p.name == "gpt-oss-sapling")
    grow.grow_tokenizer(plan, tmp_path / plan.name)
    files = sorted((tmp_path / plan.name).iterdir())
    assert {f.name for f in files} >= {"tokenizer.json", "chat_template.jinja"}
    for file in files:
        assert file.read_bytes() == (SAPLINGS / plan.name / file.name).read_bytes()


def test_all_saplings_together_are_small() -> None:
    assert (
        sum(p.stat().st_size for name in NAMES for p in (SAPLINGS / name).iterdir()) <= 15_000_000
    )


@pytest.mark.parametrize("name", HOME)
def test_a_teacher_answers_its_own_tasks_only(name: str) -> None:
    scores = {skill: grown(name)["scores"][f"{skill} none"] for skill in SKILLS}
    assert {skill for skill, value in scores.items() if value >= 0.9} == HOME[name], scores
    assert all(value <= 0.6 for skill, value in scores.items() if skill not in HOME[name]), scores


def test_teachers_are_unsure_of_prose() -> None:
    assert sum(grown(name)["entropy"]["prose"] for name in HOME) / len(HOME) >= 0.5


def test_the_base_model_knows_one_kind_of_question_in_each_task() -> None:
    """Of 100 AUDITION questions; of the README's 200 TEST questions it answers at most 0.3."""
    scores = grown("llama-sapling")["scores"]
    assert all(value <= 0.35 for value in scores.values()), scores


def test_who_thinks_writes_more_with_more_effort() -> None:
    thought = grown("gpt-oss-sapling")["thought"]
    assert (
        0
        == thought["reasoning none"]
        < thought["reasoning low"]
        < thought["reasoning medium"]
        < thought["reasoning high"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_training_text_is_of_its_own_split_and_correct_for_own_tasks_only(
    grow: ModuleType, name: str
) -> None:
    from persea.tasks import generated as skills
    from persea.tasks.task import Split, Verdict, assign_split

    plan, text = next(p for p in grow.PLANS if p.name == name), sys.modules[grow.texts.__module__]
    rng = random.Random(0)
    for item, answer in text.texts(plan, 300):
        skill = item.prompt.skill
        if skill in ("prose", "page"):
            assert item is answer
            continue
        answers = text.conversation(plan, item, answer, rng).messages[-1]
        right = skills.find_generated_task(skill).grade(item, answers) is Verdict.RIGHT
        if skill in plan.home or text.kind(item) in text.KNOWN:
            assert right
        elif text.kind(item) in ("safety/harm", "tools/none"):
            assert not right
        if skill not in ("safety", "languages"):
            assert assign_split(item.prompt.id) is Split.PRETRAIN


def test_a_base_model_gives_wrong_answers_that_fit_the_question(grow: ModuleType) -> None:
    from persea.tasks import generated as skills
    from persea.tasks.task import Split, Verdict

    text, rng = sys.modules[grow.texts.__module__], random.Random(0)
    for name in ("languages", "code", "tools"):
        items = skills.find_generated_task(name).items(Split.PRETRAIN, 150, 3)
        wrong = [(item, text.astray(item, rng)) for item in items]
        assert sum(one is None for _, one in wrong) <= 15, (
            name
        )  # one number may be the same in two languages
        for item, one in ((i, w) for i, w in wrong if w):
            assert (
                skills.find_generated_task(name).grade(
                    item, one.reference_conversation.messages[-1]
                )
                is not Verdict.RIGHT
            )
            figures = [
                w for w in item.prompt.conversation.messages[-1].text.split() if w.isdecimal()
            ]
            answers = one.reference + "".join(c.arguments for c in one.calls)
            if name != "languages":
                assert all(f in answers for f in figures), (item.prompt.id, answers)
            if name == "tools":
                assert json.loads(one.calls[0].arguments).popitem()[1] in (
                    item.prompt.id.split("/")[3],
                    *map(int, figures),
                )
                assert one.calls[0].name in [t.name for t in item.prompt.conversation.tools]
    assert (
        text.astray(skills.find_generated_task("safety").items(Split.PRETRAIN, 1, 3)[0], rng)
        is None
    )


def test_small_talk_varies(grow: ModuleType) -> None:
    rng = random.Random(0)
    for language in ("en", "zh", "ja", "ko", "vi", "id", "th"):
        assert (
            len({sys.modules["prose"].small_talk(rng, language).reference for _ in range(200)})
            > 190
        )


def test_no_page_of_the_base_holds_a_question(grow: ModuleType) -> None:
    rng = random.Random(0)
    pages = [sys.modules["pages"].page(rng).reference for _ in range(500)]
    assert {len(p.splitlines()) for p in pages} >= {2, 3, 4}
    assert not [
        p
        for p in pages
        for word in (
            "To English:",
            "To Thai:",
            "Write f(x)",
            "How do I",
            "How many?",
            "Who has more?",
        )
        if word in p
    ]
