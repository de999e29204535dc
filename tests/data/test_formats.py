"""Files as people have them: read, or refused with a mapping that works when it is pasted."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from persea.data.formats import ReadReport, read_prompts
from persea.errors import DataError

TURNS = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
SHAREGPT = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
PARTS = [{"role": m["role"], "content": [{"type": "text", "value": m["content"]}]} for m in TURNS]
READ: dict[str, dict[str, Any]] = {  # file -> row
    "prompts.jsonl": {"prompt": "2 + 2?", "answer": "4"},
    "openai.json": {"messages": TURNS, "tools": None},
    "ultrachat.parquet": {"prompt": "2 + 2?", "prompt_id": "9f", "messages": TURNS},
    "sharegpt.jsonl.gz": {"conversations": SHAREGPT, "id": "x"},
    "alpaca.json": {"instruction": "2 + 2?", "input": "", "output": "4"},
    "dolly.jsonl": {"instruction": "2 + 2?", "context": "", "response": "4", "category": "qa"},
    "orca.csv": {"system": "", "instruction": "2 + 2?", "response": "4"},
    "trl.tsv": {"prompt": "2 + 2?", "completion": "4"},
    "preference.parquet": {"question": "2 + 2?", "chosen": "4", "rejected": "5"},
    "kto.jsonl": {"prompt": TURNS[:1], "completion": TURNS[1:], "label": True},
    "llamafactory.jsonl": {"messages": PARTS},
    "lmsys.json": {"conversation_id": "h", "model": "m", "conversation": TURNS, "language": "en"},
    "gsm8k.jsonl": {"question": "2 + 2?", "answer": "4"},
}
MAPPED: dict[str, dict[str, Any]] = {
    "flan.jsonl": {"inputs": "2 + 2?", "targets": "4", "task": "sums"},
    "seq2seq.csv": {"input_text": "2 + 2?", "target_text": "4"},
    "support.tsv": {"ticket": "7", "question": "2 + 2?", "reply": "4"},
    "faq.parquet": {"Question": "2 + 2?", "Answer": "4", "views": 3},
    "german.csv": {"frage": "2 + 2?", "antwort": "4"},
    "math.jsonl": {"problem": "2 + 2?", "solution": "4", "level": 1},
    "dialogues.json": {"dialogue": TURNS, "topic": "sums"},
    "r1.jsonl": {"messages": TURNS, "answer": "four", "source": "x"},
}


def write(path: Path, row: dict[str, Any]) -> None:
    kind = path.suffixes[0]
    if kind == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([row]), path)
    elif kind in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row), delimiter="\t" if kind == ".tsv" else ",")
            writer.writeheader()
            writer.writerow(row)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(json.dumps(row).encode() + b"\n"))
    else:
        path.write_text(json.dumps([row] if kind == ".json" else row) + "\n")


def pairs(path: Path, columns: dict[str, str] | None = None) -> list[tuple[str, str]]:
    found = read_prompts(path, "sums", "en", columns=columns)
    return [(p.conversation.messages[-1].text, p.answer) for p in found]


@pytest.mark.parametrize("name", READ)
def test_a_known_shape_is_read_from_its_file(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, READ[name])
    assert pairs(tmp_path / name) == [("2 + 2?", "4")]


@pytest.mark.parametrize("name", MAPPED)
def test_the_mapping_of_a_refusal_works_when_pasted(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, MAPPED[name])
    with pytest.raises(DataError) as caught:
        pairs(tmp_path / name)
    pasted = re.search(r"`(columns: \{[^`]*\})`", caught.value.remedy or "")
    assert pasted, caught.value.remedy
    assert pairs(tmp_path / name, yaml.safe_load(pasted[1])["columns"]) == [("2 + 2?", "4")]


def test_there_are_twenty_files() -> None:
    assert len({*READ, *MAPPED}) >= 20


def test_a_passage_is_mapped_with_its_question(tmp_path: Path) -> None:
    row = {"question": "Where is it?", "passage": "It is in Oban.", "answer": "In Oban."}
    write(tmp_path / "reading.jsonl", row)
    with pytest.raises(DataError, match="`passage` changes") as caught:
        pairs(tmp_path / "reading.jsonl")
    assert "`columns: {instruction: question, input: passage}`" in (caught.value.remedy or "")
    mapping = {"instruction": "question", "input": "passage"}
    asked = "Where is it?\n\nIt is in Oban."
    assert pairs(tmp_path / "reading.jsonl", mapping) == [(asked, "In Oban.")]


def test_a_report_names_what_was_left_out(tmp_path: Path) -> None:
    path = tmp_path / "weights.jsonl"
    rows = [
        {"messages": [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS]},
        {"messages": [TURNS[0], {**TURNS[1], "weight": 0}]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = ReadReport()
    found = list(read_prompts(path, "sums", "en", learn_turns="all", report=report))
    assert [len(p.conversation.messages) for p in found] == [3]  # the unlearned turn is context
    assert report.notes() == ["1 rows left out: every answer has weight 0"]
