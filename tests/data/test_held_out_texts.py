"""Held-out documents: read, named, and kept out of the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from persea.chat.messages import Conversation
from persea.data.held_out_texts import read_held_out_texts
from persea.data.prompts import Prompt, RemovalReason, build_corpus
from persea.errors import DataError

STORY = (
    "The harbour was empty in the morning and the boats had left before the fog came down over "
    "the town and its two churches."
)


def test_documents_have_the_names_of_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "id.dev.jsonl"
    path.write_text('{"text": "Selamat pagi."}\n{"text": "  "}\n\n{"text": "e\u0301"}\n')
    found = read_held_out_texts(path, "languages", "id", "evaluation.texts.0")
    assert [(t.id, t.text, t.num_bytes) for t in found] == [
        ("id.dev.jsonl:1", "Selamat pagi.", 13),
        ("id.dev.jsonl:4", "\u00e9", 2),
    ]
    assert {(t.skill, t.language) for t in found} == {("languages", "id")}
    path.write_text(json.dumps({"body": "Apa kabar?"}))
    assert read_held_out_texts(path, "x", "id", "", column="body")[0].text == "Apa kabar?"


@pytest.mark.parametrize(
    ("content", "words"),
    [('{"text": ""}\n', "no text in the file"), ('{"title": "x"}\n', "no text under 'text'")],
)
def test_a_file_without_texts_is_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "dev.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=words):
        read_held_out_texts(path, "x", "", "evaluation.texts.0")


def test_training_texts_that_hold_a_held_out_one_are_left_out() -> None:
    given = {
        "same": STORY.upper(),
        "quotes": "He wrote: " + STORY[10:100] + " That was all.",
        "short": "Good  morning.",
        "other": "Nothing of it stands here, and the sea is calm, as it was all the summer long.",
    }
    documents = [Prompt(k, Conversation.from_document(v), "x", "en") for k, v in given.items()]
    answers = [
        Prompt(f"{k} answer", Conversation.from_question(f"Say {k}"), "x", "en", v)
        for k, v in given.items()
    ]
    held_out = [("dev:1", STORY), ("dev:2", "good morning.")]
    corpus = build_corpus([documents, answers], [], (), held_out_texts=held_out)
    assert [p.id for p in corpus.prompts] == ["other", "other answer"]
    assert {r.prompt.id: (r.reason, r.matched_id) for r in corpus.removed} == {
        name + kind: found
        for kind in ("", " answer")
        for name, found in (
            ("same", (RemovalReason.TEST_ITEM, "dev:1")),
            ("quotes", (RemovalReason.CONTAMINATED, "dev:1")),
            ("short", (RemovalReason.TEST_ITEM, "dev:2")),
        )
    }
    assert len(build_corpus([documents, answers], []).prompts) == 8
