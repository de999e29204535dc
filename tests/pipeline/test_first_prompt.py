"""The first prompt in every format: all text is shown, and the learned tokens are marked."""

from __future__ import annotations

from pathlib import Path

import pytest

from persea.chat.messages import Conversation
from persea.data.prompts import Prompt
from persea.models.loading import ModelSource, load_renderer
from persea.pipeline.first_prompt import MAX_PIECE_CHARS, PLACEHOLDER, render_for

SAPLINGS = Path(__file__).resolve().parents[2] / "saplings"
NAMES = ("llama-sapling", "qwen-sapling", "gemma-sapling", "gpt-oss-sapling")
RENDERERS = {n: load_renderer(ModelSource(str(SAPLINGS / n))) for n in NAMES}


def prompt(text: str, answer: str = "") -> Prompt:
    return Prompt("p", Conversation.from_question(text), "code", "en", answer)


@pytest.mark.parametrize("name", NAMES)
def test_the_marked_tokens_are_those_of_the_answer(name: str) -> None:
    (shown,) = render_for(prompt("Kapan? 何時?", "Besok ☀"), {name: RENDERERS[name]})
    learned = "".join(text for text, is_learned in shown.pieces if is_learned)
    rest = "".join(text for text, is_learned in shown.pieces if not is_learned)
    assert "Besok ☀" in learned
    assert "何時?" in rest
    assert "Besok" not in rest
    assert shown.family == RENDERERS[name].family.name
    value = shown.to_json()
    assert {"text": learned, "learned": True} in value["pieces"]
    assert value["tokens"] == shown.tokens > 0
    plain = "\n".join(shown.lines(colour=False))
    assert plain.count("⟦") == plain.count("⟧") == 1
    assert "\033" not in plain


def test_a_prompt_without_an_answer_gets_a_placeholder() -> None:
    for shown in render_for(prompt("2 + 2?"), RENDERERS):
        assert PLACEHOLDER in "".join(text for text, learned in shown.pieces if learned)


def test_a_long_prompt_is_shortened_on_a_terminal_and_whole_in_json() -> None:
    (shown,) = render_for(prompt("word " * 2000), {"qwen-sapling": RENDERERS["qwen-sapling"]})
    assert sum(len(line) for line in shown.lines(colour=True)) < 3 * MAX_PIECE_CHARS
    assert sum(len(piece["text"]) for piece in shown.to_json()["pieces"]) > 9000


def test_control_characters_reach_no_terminal() -> None:
    (shown,) = render_for(prompt("a\x1b[2Jb\x07"), {"qwen-sapling": RENDERERS["qwen-sapling"]})
    assert "\x1b[2J" not in "".join(shown.lines(colour=True))
    assert "\x07" not in "".join(shown.lines(colour=True))
