"""Functions that families share, and the rule that family facts are in the families only."""

from __future__ import annotations

import re
from pathlib import Path

import persea
from persea.chat.families import CONTROL_MARKERS, FAMILIES
from persea.chat.family import edit_texts, pieces_to_text
from persea.chat.messages import Conversation, Message, Role, Text, Thinking, ToolResult
from persea.tokenization.vocabulary import load_vocabulary
from tests.tokenization.test_vocabulary import byte_level


def test_a_message_is_edited_as_one_text_and_each_part_keeps_its_share() -> None:
    parts = (Text(" a"), Thinking(" t "), Text("b "), ToolResult("f", " r "))
    conversation = Conversation((Message(Role.USER, parts),))
    (message,) = edit_texts(conversation, lambda k, m, p: p.text.strip()).messages
    assert message.parts == (Text("a"), Thinking("t"), Text("b"), ToolResult("f", "r"))
    (message,) = edit_texts(conversation, lambda k, m, p: "").messages
    assert [p.text for p in message.parts] == ["", "", "", ""]


def test_pieces_with_a_control_token_are_no_text() -> None:
    assert pieces_to_text((b"a", b"b")) == "ab"
    assert pieces_to_text((b"a", "<|im_end|>")) is None


def test_markers_of_all_families_are_control_tokens() -> None:
    """An added token that its tokenizer does not declare special is text without these markers."""
    names = ("<think>", "</tool_call>", "<unused7>", "<mask>", "<｜User｜>", "plain")
    tokenizer = byte_level()
    tokenizer.add_tokens(list(names))
    with_markers = load_vocabulary(tokenizer, "markers", CONTROL_MARKERS)
    assert set(with_markers.control_token_ids) >= set(names) - {"plain"}
    assert "plain" not in with_markers.control_token_ids
    without = load_vocabulary(tokenizer, "none").control_token_ids
    assert set(names) & set(without) == {"<｜User｜>"}


def test_thinking_families_can_end_a_thought() -> None:
    for family in FAMILIES:
        assert bool(family.thought_ends) == (len(family.efforts) > 1), family.name


def test_no_other_module_names_a_family() -> None:
    """A new family is one file, one line in FAMILIES and one test."""
    names = "|".join(re.escape(f.name) for f in FAMILIES)
    package = Path(persea.__file__).parent
    for folder in ("tokenization", "serve", "models"):
        for path in (package / folder).glob("*.py"):
            if path.name.startswith("gguf_"):  # llama.cpp's names of architectures
                continue
            code = re.sub(r'"""[\s\S]*?"""|#.*', "", path.read_text(encoding="utf-8"))
            assert not re.search(rf"[\"'](?:{names})[\"']", code), path.name
