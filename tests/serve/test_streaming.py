"""The text of an answer does not depend on how many of its tokens come at once."""

from __future__ import annotations

from collections import Counter

import pytest

import persea
from persea.chat.messages import Conversation, Text, Thinking, ThinkingEffort
from persea.serve.streaming import StreamingAnswerParser


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "cut inside the thought"])
@pytest.mark.parametrize("name", ["gpt-oss", "qwen"])
def test_the_text_does_not_depend_on_how_many_tokens_come_at_once(name: str, whole: bool) -> None:
    renderer = persea.load_renderer(f"saplings/{name}-sapling")
    asked = Conversation.from_question("How many?", effort=ThinkingEffort.HIGH)
    answered = asked.with_answer(Thinking("Two and two and one."), Text("Five of them."))
    tokens = renderer.render(answered)
    ids = tokens.ids_T[tokens.loss_mask_T].tolist()
    if not whole:
        ids = [*ids[: len(ids) // 3], renderer.stop_ids[0]]
    said, pieces = set(), Counter[str]()
    for size in (1, 2, 3, 5, len(ids)):
        parser = StreamingAnswerParser(renderer, ThinkingEffort.HIGH, ())
        texts = {"reasoning_content": "", "content": ""}
        for begin in range(0, len(ids), size):
            for key, text in parser.add_tokens(ids[begin : begin + size]).items():
                texts[key] += text
                pieces[key] += size == 1
        last, calls, finish = parser.finish()
        for key, text in last.items():
            texts[key] += text
        assert parser.ids == ids and not calls
        said.add((*texts.values(), finish))
    assert len(said) == 1
    ((thinking, content, _),) = said
    assert thinking and bool(content) == whole
    assert not whole or min(pieces.values()) > 2  # thought aloud, not in one piece at its end
