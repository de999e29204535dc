"""Recipes read data as people have it: tools, thoughts, several turns, mapped columns."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from persea import storage
from persea.chat.messages import Role, ToolCall
from persea.config.recipe import Recipe
from persea.errors import DataError, RefusedError
from persea.evaluation.audition import Cast
from persea.pipeline.audition_stage import with_only_able_teachers
from persea.pipeline.preflight import check_run
from persea.pipeline.run_context import RunContext
from persea.pipeline.stages import run_pipeline
from tests.data.test_rows import TIDE, TWO_TURNS

SAPLINGS = Path(__file__).resolve().parents[2] / "saplings"
CALL = {"id": "c1", "type": "function", "function": {"name": "get_tide", "arguments": "{}"}}
CHATS: list[dict[str, Any]] = [
    {"messages": TWO_TURNS, "source": "wiki"},
    {
        "tools": [TIDE],
        "messages": [
            {"role": "user", "content": "Tide at Oban?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "06:12"},
            {"role": "assistant", "content": "At 06:12."},
        ],
    },
    {"prompt": "Berita:", "completion": "Harga beras naik.", "label": True},
    {"prompt": "Berita:", "completion": "Harga turun.", "label": True},
    {"prompt": "Berita:", "completion": "Salah.", "label": False},
    {"prompt": "Warna?", "chosen": "Biru.", "rejected": "Tidak tahu."},
    {"messages": [{"role": "teacher", "content": "x"}]},
]


def context_of(
    folder: Path, teachers: list[dict[str, Any]] | None = None, **part: Any
) -> RunContext:
    content = {
        "student": {"model": str(SAPLINGS / "llama-sapling")},
        "teachers": teachers or [{"model": str(SAPLINGS / "qwen-sapling")}],
        "corpus": [{"skill": "languages", "near_duplicate_threshold": 1.0} | part],
        "capture": {"answers": "given"},
        "training": {"steps": 2, "batch_size": 4, "max_length": 256, "checkpoint_every": 2},
        "threads": 1,
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return RunContext(Recipe.from_yaml(path), folder / "run")


def write_chats(folder: Path) -> None:
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, CHATS)) + "\n")


def test_chats_with_tools_turns_and_pairs_are_captured_and_learned(tmp_path: Path) -> None:
    write_chats(tmp_path)
    context = context_of(tmp_path, file="chats.jsonl", learn_turns="all", on_malformed="quarantine")
    messages: list[str] = []
    for stage in ("capture", "train"):
        run_pipeline(context, lambda *a: messages.append(" ".join(map(str, a))), stage)
    prompts = context.corpus.prompts
    # two turns, a call and what follows its result, two of one prompt, the chosen one
    assert len(prompts) == 7
    (call,) = [p for p in prompts if any(isinstance(x, ToolCall) for x in p.given_parts)]
    assert call.conversation.tools[0].name == "get_tide"
    assert any(p.conversation.messages[-1].role is Role.TOOL for p in prompts)
    assert [p.answer for p in prompts if p.conversation.messages[0].text == "Berita:"] == [
        "Harga beras naik.",
        "Harga turun.",
    ]
    summary = storage.read_json(tmp_path / "run" / "capture" / "summary.json")
    assert summary["notes"] == [
        f"{tmp_path / 'chats.jsonl'}: 1 rows left out: an undesirable answer",
        f"{tmp_path / 'chats.jsonl'}: the chosen answer of 1 preference pairs is taken",
        f"{tmp_path / 'chats.jsonl'}: columns that change nothing, and were not read: `source`",
    ]
    lines = (tmp_path / "run" / "capture" / "quarantine.jsonl").read_text().splitlines()
    (aside,) = map(json.loads, lines)
    assert "role 'teacher'" in aside["reason"] and aside["location"].endswith(
        "chats.jsonl:7, message 1"
    )
    assert any("columns that change nothing" in m for m in messages)
    assert (tmp_path / "run" / "check" / "done.json").is_file()  # training starts with a check
    dataset = storage.read_json(tmp_path / "run" / "train" / "dataset.json")
    assert (dataset["examples"], dataset["skipped"]) == ({"qwen-sapling": 7}, {})


def test_the_last_turn_alone_is_learned_by_default(tmp_path: Path) -> None:
    write_chats(tmp_path)
    context = context_of(tmp_path, file="chats.jsonl", on_malformed="quarantine")
    assert len(context.corpus.prompts) == 5


def test_mapped_columns_of_a_folder_of_tables(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / "support.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["ticket", "query", "reply"], ["007", "Open?", "Yes,\nuntil six."]])
    context = context_of(tmp_path, file="data", columns={"prompt": "query", "answer": "reply"})
    (prompt,) = context.corpus.prompts
    assert (prompt.id, prompt.answer) == ("support.csv:2", "Yes,\nuntil six.")
    with pytest.raises(DataError, match="`columns:` maps 'question_text'"):
        _ = context_of(tmp_path, file="data", columns={"question_text": "query"}).corpus


def test_more_broken_rows_than_allowed_end_the_run(tmp_path: Path) -> None:
    write_chats(tmp_path)
    part = {"file": "chats.jsonl", "on_malformed": "quarantine", "max_malformed_share": 0.1}
    with pytest.raises(DataError, match="1 of 7 rows cannot be read"):
        _ = context_of(tmp_path, **part).corpus
    with pytest.raises(DataError, match="role 'teacher'"):
        _ = context_of(tmp_path, file="chats.jsonl").corpus


def test_a_teacher_without_tools_is_no_candidate_for_answers_with_calls(tmp_path: Path) -> None:
    """Gemma 3's template has no tools, so nobody can be compared with it on them."""
    two = [{"name": n, "model": str(SAPLINGS / f"{n}-sapling")} for n in ("qwen", "gemma")]
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps(CHATS[1]) + "\n")
    context = context_of(tmp_path, teachers=two, file="chats.jsonl", skill="tides")
    able, texts = context.text_contestants("tides")
    assert able == ("qwen",)
    assert [one.conversations[0].messages[-1].text for one in texts] == ["At 06:12."]
    assert with_only_able_teachers(context, Cast({}, ())).parts == {"tides": (("qwen", 1.0),)}


def test_answers_that_measure_nobody_are_refused_with_the_teacher_to_pin(tmp_path: Path) -> None:
    two = [{"name": n, "model": str(SAPLINGS / f"{n}-sapling")} for n in ("qwen", "gpt-oss")]
    chats = tmp_path / "calls.jsonl"
    chats.write_text(json.dumps({**CHATS[1], "messages": CHATS[1]["messages"][:2]}) + "\n")
    context = context_of(tmp_path, teachers=two, file="calls.jsonl", skill="tides")
    assert context.text_contestants("tides") == (("qwen", "gpt-oss"), [])
    # in the audition, and before any model is asked
    for refuse in (lambda c: with_only_able_teachers(c, Cast({}, ())), check_run):
        with pytest.raises(RefusedError, match="none has a text to measure them by") as caught:
            refuse(context)
        assert "`audition: {pinned: {tides: qwen}}`" in (caught.value.remedy or "")
