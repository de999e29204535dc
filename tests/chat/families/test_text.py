"""A model without a chat template: prompt, line break, answer, end."""

from __future__ import annotations

from pathlib import Path

import pytest

from persea.chat.documents import NO_END_NOTE
from persea.chat.families.text import make_text_family
from persea.chat.messages import (
    Conversation,
    FinishReason,
    Message,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
)
from persea.chat.renderer import ChatRenderer
from persea.models.identity import model_warnings
from persea.models.loading import ModelSource, load_renderer
from tests.chat.families.test_generic import folder_of


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> ChatRenderer:
    folder = tmp_path_factory.mktemp("text") / "base"
    folder_of(folder, "", bos="<bos>", eos="<eos>", adds_bos=True)
    (folder / "chat_template.jinja").unlink()
    return load_renderer(ModelSource(str(folder)), "w")


def text_of(renderer: ChatRenderer, ids: list[int]) -> str:
    pieces = renderer.vocabulary.decode_pieces(ids)
    return "".join(p if isinstance(p, str) else p.decode() for p in pieces)


def test_prompt_line_break_answer_end(renderer: ChatRenderer):
    conversation = Conversation.from_question("2 + 3?", system="Sums").with_answer(Text("5"))
    tokens = renderer.render(conversation)
    ids = tokens.ids_T.tolist()
    assert text_of(renderer, ids) == "<bos>Sums\n2 + 3?\n5<eos>"
    learned = tokens.ids_T[tokens.loss_mask_T].tolist()
    assert text_of(renderer, learned) == "5<eos>"
    prompt = renderer.render_prompt(Conversation.from_question("2 + 3?", system="Sums"))
    assert ids[: len(prompt)] == prompt.ids_T.tolist()
    assert text_of(renderer, prompt.ids_T.tolist()) == "<bos>Sums\n2 + 3?\n"
    parts, finish = renderer.parse(learned, ThinkingEffort.NONE)
    assert parts == (Text("5"),)
    assert finish is FinishReason.STOP


def test_earlier_turns_are_lines_and_thoughts_are_left_out(renderer: ChatRenderer):
    earlier = Message(Role.ASSISTANT, (Thinking("hm"), Text("Yes.")))
    question = Message(Role.USER, (Text("Why?"),))
    conversation = Conversation((*Conversation.from_question("So?").messages, earlier, question))
    tokens = renderer.render(conversation.with_answer(Thinking("hm"), Text("So.")))
    assert text_of(renderer, tokens.ids_T.tolist()) == "<bos>So?\nYes.\nWhy?\nSo.<eos>"


def test_byte_offsets_are_those_of_every_family(renderer: ChatRenderer):
    conversation = Conversation.from_question("ab").with_answer(Text("cde"))
    tokens = renderer.render(conversation)
    learned = tokens.loss_mask_T
    assert tokens.starts_T[learned][0] == 3  # after "ab" and the byte between two parts
    assert tokens.ends_T[learned].tolist()[-2:] == [6, 6]


def test_a_model_whose_end_is_not_known_renders_texts_without_one(tmp_path: Path):
    folder_of(tmp_path, "", bos="<bos>", eos="<none>", adds_bos=True)
    (tmp_path / "chat_template.jinja").unlink()
    vocabulary = load_renderer(ModelSource(str(tmp_path)), "w").vocabulary
    family, template = make_text_family(vocabulary, {})
    assert family.stop_tokens == ()
    assert template([{"role": "user", "content": "x"}], add_generation_prompt=True) == "<bos>x\n"
    renderer = ChatRenderer(family, vocabulary, template, "")
    tokens = renderer.render(Conversation.from_question("x").with_answer(Text("y")))
    assert text_of(renderer, tokens.ids_T.tolist()) == "<bos>x\ny"
    assert renderer.document_tokens.note == NO_END_NOTE


def test_the_note_says_what_such_a_model_does(renderer: ChatRenderer, tmp_path: Path):
    folder_of(tmp_path, "", bos=None, eos="<|stop|>", config_eos=("<|stop|>",))
    (tmp_path / "chat_template.jinja").unlink()
    source = ModelSource(str(tmp_path))
    note = model_warnings(source, load_renderer(source, "w"), "w")
    assert "is not asked for answers" in note
    assert "a base model with a chat template" not in note
