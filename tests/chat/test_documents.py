"""Plain text is rendered by each model's own rules, every byte of it once, without a template."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from persea.chat.documents import (
    DOCUMENT_END_TOKENS,
    NO_END_NOTE,
    NO_START_NOTE,
    DocumentTokens,
    find_document_end,
    make_document_tokens,
    render_document,
)
from persea.chat.messages import Conversation
from persea.chat.renderer import ChatRenderer
from persea.errors import DataError
from persea.models.loading import ModelSource, load_renderer
from tests.chat.families.test_generic import folder_of
from tests.conftest import Speaker

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A template text, the tokenizer's eos and bos, further control tokens, whether its post-processor
# writes the bos; then the tokens around a document.
MODELS = {
    # SmolLM2-Instruct: eos and bos are the marks of a turn; nothing is put before a text
    "smollm2": (CHATML, "<|im_end|>", "<|im_start|>", ("<|endoftext|>",), False),
    "gemma base": ("", "<eos>", "<bos>", (), True),
    "llama base": ("", "<|end_of_text|>", "<|begin_of_text|>", ("<|eot_id|>",), True),
    "gpt2": ("", "<|endoftext|>", "<|endoftext|>", (), False),
    "own name": ("", "<|the-end|>", None, (), False),
    "turn end only": (CHATML, "<|im_end|>", None, (), False),
}
AROUND = {
    "smollm2": ("<|endoftext|>", "<|endoftext|>"),
    "gemma base": ("<bos>", "<eos>"),
    "llama base": ("<|begin_of_text|>", "<|end_of_text|>"),
    "gpt2": ("<|endoftext|>", "<|endoftext|>"),
    "own name": ("<|the-end|>", "<|the-end|>"),
    "turn end only": (None, None),
}
TEXT = "Harga beras naik.\n\n  สวัสดี 你好 👩‍👩‍👧\tend "


def renderer_of(name: str, folder: Path) -> ChatRenderer:
    template, eos, bos, controls, adds_bos = MODELS[name]
    folder_of(folder, template, bos=bos, eos=eos, controls=controls, adds_bos=adds_bos)
    if not template:
        (folder / "chat_template.jinja").unlink()
    return load_renderer(ModelSource(str(folder)), "w")


@pytest.mark.parametrize("name", MODELS)
def test_tokens_around_a_document(name: str, tmp_path: Path):
    renderer = renderer_of(name, tmp_path)
    around = renderer.document_tokens
    names = renderer.vocabulary.control_names
    first = names[around.prefix_ids[0]] if around.prefix_ids else None
    end = None if around.end_id is None else names[around.end_id]
    assert (first, end) == AROUND[name]
    assert around.count == 2 * (end is not None)
    assert around.note == ("" if end else f"{NO_END_NOTE}; {NO_START_NOTE}")
    assert renderer.is_text == (not MODELS[name][0])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ends", [True, False])
def test_every_byte_of_a_document_is_learned_once(name: str, ends: bool, tmp_path: Path):
    renderer = renderer_of(name, tmp_path)
    conversation = Conversation.from_document(TEXT, ends=ends)
    tokens = renderer.render(conversation)
    around = renderer.document_tokens
    has_end = ends and around.end_id is not None
    before = len(around.prefix_ids)
    assert tokens.ids_T[:before].tolist() == list(around.prefix_ids)
    inner = tokens.ids_T[before : len(tokens) - has_end]
    assert renderer.vocabulary.decode(inner.tolist()).decode() == TEXT
    learned = tokens.loss_mask_T
    # nothing predicts a first token without a token before it
    assert learned.tolist() == [False] * max(1, before) + [True] * (len(tokens) - max(1, before))
    assert tokens.starts_T[:before].tolist() == tokens.ends_T[:before].tolist() == [-1] * before
    starts, ends_T = tokens.starts_T[before:], tokens.ends_T[before:]
    assert starts[0] == 0
    assert np.array_equal(starts[1:], ends_T[:-1])
    size = len(TEXT.encode())
    assert ends_T[-1] == size
    assert (starts[-1] == size) == has_end


def test_a_document_is_no_prompt(tiny: Speaker):
    with pytest.raises(DataError, match="a document is no prompt"):
        tiny.renderer.render_prompt(Conversation.from_document("x"))


def test_every_family_renders_documents(tiny: Speaker):
    renderer = tiny.renderer
    tokens = renderer.render(Conversation.from_document(TEXT))
    end = renderer.vocabulary.control_names[int(tokens.ids_T[-1])]
    assert end in DOCUMENT_END_TOKENS
    inner = [i for i in tokens.ids_T.tolist() if renderer.vocabulary.bytes_W[i] is not None]
    assert renderer.vocabulary.decode(inner).decode() == TEXT


def test_a_control_token_in_a_document_is_text(tiny: Speaker):
    renderer = tiny.renderer
    stop = renderer.family.stop_tokens[0]
    tokens = renderer.render(Conversation.from_document(f"a {stop} b"))
    assert renderer.stop_ids[0] not in tokens.ids_T[1:-1].tolist()


def test_the_declared_end_is_used_unless_it_ends_a_turn(tiny: Speaker):
    vocabulary = tiny.renderer.vocabulary
    some = next(iter(vocabulary.control_token_ids))
    assert find_document_end(vocabulary, {"eos_token": some}, ()) == some
    known = find_document_end(vocabulary, {}, ())
    assert known in DOCUMENT_END_TOKENS
    assert find_document_end(vocabulary, {"eos_token": known}, (known,)) == known
    assert find_document_end(vocabulary, {"eos_token": "<none>"}, ()) == known


def test_windows_have_the_start_and_no_end():
    renderer = load_renderer("saplings/qwen-sapling")
    around = renderer.document_tokens
    assert make_document_tokens(renderer.vocabulary, "") == DocumentTokens(
        (), None, f"{NO_END_NOTE}; {NO_START_NOTE}"
    )
    part, whole = (
        render_document(
            renderer.vocabulary,
            around,
            Conversation.from_document("one two", ends=ends).messages[0],
        )
        for ends in (False, True)
    )
    assert part.ids_T.tolist() == whole.ids_T.tolist()[:-1]
    assert whole.ids_T[-1] == around.end_id


def test_a_space_that_the_tokenizer_writes_is_no_byte_of_the_text(tmp_path: Path):
    """As Llama 2: `▁` before a text. The token that also covers it has no start."""
    folder_of(tmp_path, "", bos="<s>", eos="</s>", adds_bos=True)
    (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    path.write_text(json.dumps(spec))
    renderer = load_renderer(ModelSource(str(tmp_path)), "w")
    tokens = renderer.render(Conversation.from_document("Hello 1 + 1"))
    original = Tokenizer.from_file(str(path)).encode("Hello 1 + 1").ids
    assert tokens.ids_T.tolist() == [*original, renderer.document_tokens.end_id]
    assert tokens.starts_T[1] == -1
    assert tokens.ends_T[-1] == len("Hello 1 + 1")
