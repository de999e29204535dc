"""Kept evaluation answers are reused only by a persea that would give the same ones.

golden_answers.json holds what the bundled saplings answered at one ANSWERS_VERSION. Where this test
fails, raise
ANSWERS_VERSION in persea/evaluation/answering.py if the change is meant, and write the file anew:

    PERSEA_WRITE_GOLDEN=1 pytest tests/evaluation/test_answers_version.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from persea.chat.messages import Conversation, ThinkingEffort
from persea.evaluation.answering import (
    ANSWERS_VERSION,
    EvaluatedModel,
    answer_items,
    reference_bits,
)
from persea.storage import digest_json
from persea.tasks.generated import GENERATED_TASKS
from persea.tasks.task import Split
from tests.teachers.engines.test_transformers import NAMES
from tests.teachers.test_teacher import teacher

GOLDEN = Path(__file__).with_name("golden_answers.json")


def answers_of(name: str) -> dict[str, Any]:
    """What a sapling answers, by task; and its bits on the references, to a hundredth."""
    own = ThinkingEffort.LOW if name.startswith("gpt-oss") else ThinkingEffort.NONE
    model = EvaluatedModel(name, name, (own,), lambda: teacher(name), {"batch": 64})
    found: dict[str, Any] = {}
    for task in GENERATED_TASKS:
        items = task.items(Split.TEST, 4, 0)
        results, _ = answer_items(model, own, task, items, 60)
        bits, num_bytes = reference_bits(model, items)
        found[task.name] = {
            "answers": digest_json(
                [[r.item.prompt.id, Conversation((r.answer,)).to_json(), r.finish] for r in results]
            ),
            "bits": round(bits, 2),
            "bytes": num_bytes,
        }
    return found


def golden_problem(golden: dict[str, Any], version: int, found: dict[str, Any]) -> str:
    """Why the file and the answers do not fit, or ""."""
    same = all(
        golden["answers"][name][task]["answers"] == one["answers"]
        and golden["answers"][name][task]["bytes"] == one["bytes"]
        and abs(golden["answers"][name][task]["bits"] - one["bits"]) < 0.05
        for name, tasks in found.items()
        for task, one in tasks.items()
    )
    if golden["version"] == version:
        return "" if same else "answers changed: raise ANSWERS_VERSION and write the file anew"
    return "ANSWERS_VERSION changed: write the file anew"


def test_answers_change_only_with_their_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PERSEA_HOME", str(tmp_path))
    found = {name: answers_of(name) for name in NAMES}
    if os.environ.get("PERSEA_WRITE_GOLDEN"):
        golden = {"version": ANSWERS_VERSION, "answers": found}
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    assert not golden_problem(json.loads(GOLDEN.read_text()), ANSWERS_VERSION, found)


def test_a_changed_answer_is_noticed() -> None:
    golden = json.loads(GOLDEN.read_text())
    found = json.loads(json.dumps(golden["answers"]))
    assert not golden_problem(golden, golden["version"], found)
    found[NAMES[0]]["code"]["answers"] = "another"
    assert "raise ANSWERS_VERSION" in golden_problem(golden, golden["version"], found)
    assert "write the file anew" in golden_problem(golden, golden["version"] + 1, found)
