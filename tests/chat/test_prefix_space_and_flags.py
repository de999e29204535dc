"""Prefix spaces and flags of control tokens: the ids are transformers' own, the bytes exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from persea.alignment.spans import align
from persea.chat.messages import Conversation, Text, ThinkingEffort
from persea.chat.renderer import ChatRenderer
from persea.errors import DataError
from persea.models.loading import load_renderer
from tests.tokenization.traits import (
    CONTROL,
    byte_level_bpe,
    save_model_folder,
    sentencepiece_bpe,
    unigram,
)

ROLES, ALL = CONTROL[3:6], CONTROL[3:]
KINDS: dict[str, tuple[Tokenizer, str]] = {
    "phi-3": (sentencepiece_bpe("prepend", rstrip=ALL), "phi3"),
    "phi-4-mini": (byte_level_bpe(rstrip=ALL), "phi3"),
    "roles swallow": (byte_level_bpe(rstrip=ROLES), "phi3"),
    "the end swallows both ways": (byte_level_bpe(rstrip=ALL, lstrip=ALL), "phi3"),
    "llama-2": (sentencepiece_bpe("prepend"), "llama2"),
    "llama-2, not legacy": (sentencepiece_bpe("metaspace first"), "llama2"),
    "zephyr": (sentencepiece_bpe("prepend"), "zephyr"),
    "converted": (sentencepiece_bpe("converted"), "bare"),
    "first": (sentencepiece_bpe("metaspace first"), "bare"),
    "first, no control token before": (sentencepiece_bpe("metaspace first"), "plain"),
    "always": (sentencepiece_bpe("metaspace always"), "bare"),
    "words": (sentencepiece_bpe("metaspace words"), "zephyr"),
    "byte-level prefix": (byte_level_bpe(prefix=True), "bare"),
    "byte-level prefix that is swallowed": (byte_level_bpe(prefix=True, rstrip=ALL), "phi3"),
    "unigram": (unigram("metaspace first"), "bare"),
    "unigram, legacy": (unigram("prepend", rstrip=ALL), "phi3"),
    "llm-jp": (unigram("beginning"), "bare"),
}
FRAGMENTS = [
    "hello",
    "world",
    " ",
    "\n",
    "  ",
    "\t",
    "你好",
    "ส",
    "👩‍👩‍👧",
    "the",
    ".",
    "\u3000x",
    "1",
]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=5).map("".join)


@pytest.fixture(scope="module", params=KINDS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ChatRenderer, Any]:
    """A renderer and transformers' tokenizer of the same folder."""
    tokenizer, template = KINDS[request.param]
    folder = save_model_folder(tokenizer, template, tmp_path_factory.mktemp("model"))
    return load_renderer(str(folder)), AutoTokenizer.from_pretrained(folder)


def of(kind: str, folder: Path) -> tuple[ChatRenderer, Any]:
    tokenizer, template = KINDS[kind]
    save_model_folder(tokenizer, template, folder)
    return load_renderer(str(folder)), AutoTokenizer.from_pretrained(folder)


def by_transformers(tokenizer: Any, conversation: Conversation, prompt: bool) -> list[int]:
    messages = [{"role": m.role.value, "content": m.text} for m in conversation.messages]
    ids = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=prompt, return_dict=False
    )
    return list(ids)


@settings(max_examples=25)
@given(question=texts, answer=texts)
def test_ids_are_transformers_and_bytes_are_exact(
    pair: tuple[ChatRenderer, Any], question: str, answer: str
):
    renderer, tokenizer = pair
    asked = Conversation.from_question(question)
    answered = asked.with_answer(Text(answer))
    prompt = renderer.render_prompt(asked)
    assert prompt.ids_T.tolist() == by_transformers(tokenizer, asked, prompt=True)
    try:
        whole = renderer.render(answered)
    except DataError as error:  # such as "\n\n" as one token over the end of the prompt
        assert "one token covers the end of the prompt" in error.message
        return
    assert whole.ids_T.tolist() == by_transformers(tokenizer, answered, prompt=False)
    assert whole.ids_T[: len(prompt)].tolist() == prompt.ids_T.tolist()
    check_bytes(renderer, answered, whole)
    # what is parsed renders to the same ids, and is the answer but for swallowed white space
    ids = whole.ids_T[whole.loss_mask_T].tolist()
    parts, _ = renderer.parse(ids, ThinkingEffort.NONE)
    assert parts[0].text.strip() == answer.strip()
    again = renderer.render(asked.with_answer(*parts))
    assert again.ids_T.tolist() == whole.ids_T.tolist()


def check_bytes(renderer: ChatRenderer, conversation: Conversation, tokens: Any) -> None:
    """Every token's bytes are the content's at its place; only white space has no token."""
    content = b"\xff".join(p.text.encode() for p in conversation.parts())
    covered = bytearray(len(content))
    for i, start, end in zip(
        tokens.ids_T.tolist(), tokens.starts_T.tolist(), tokens.ends_T.tolist(), strict=True
    ):
        raw = renderer.vocabulary.bytes_W[i]
        if start >= 0 and raw is not None:
            assert content[start:end] == raw
            covered[start:end] = b"\1" * len(raw)
        elif end >= 0 and raw is not None:  # it also covers template text or a prefix
            n = next(
                n for n in range(len(raw), -1, -1) if content[:end].endswith(raw[-n:] if n else b"")
            )
            assert 0 < n
            covered[max(0, end - n) : end] = b"\1" * min(n, end)
    rest = bytes(b for b, seen in zip(content, covered, strict=True) if not seen)
    assert not rest.replace(b"\xff", b"").decode().strip()


def test_a_rstrip_token_swallows_the_line_break_of_the_template(tmp_path: Path):
    renderer, tokenizer = of("phi-4-mini", tmp_path)
    tokens = renderer.render_prompt(Conversation.from_question("hello there"))
    names = tokenizer.convert_ids_to_tokens(tokens.ids_T.tolist())
    assert names == ["<|user|>", "hello", "Ġthere", "<|end|>", "<|assistant|>"]


def test_white_space_of_the_content_that_a_token_swallows_has_no_token(tmp_path: Path):
    renderer, _ = of("phi-4-mini", tmp_path)
    plain, padded = (
        renderer.render(Conversation.from_question("hello").with_answer(Text(text)))
        for text in ("hello", "\n hello")
    )
    assert plain.ids_T.tolist() == padded.ids_T.tolist()
    answer = padded.loss_mask_T & (padded.starts_T < padded.ends_T)
    assert (padded.starts_T[answer] - plain.starts_T[answer] == 2).all()


def test_the_space_before_a_text_belongs_to_no_byte(tmp_path: Path):
    renderer, tokenizer = of("phi-3", tmp_path)
    tokens = renderer.render(Conversation.from_question("hello").with_answer(Text("7 hello")))
    answer = tokens.loss_mask_T
    names = tokenizer.convert_ids_to_tokens(tokens.ids_T[answer].tolist())
    assert names[0] == "▁", "a token of the space alone is a marker"
    assert tokens.starts_T[answer][0] == tokens.ends_T[answer][0] == -1
    begin = len("hello") + 1
    assert tokens.starts_T[answer][1] == begin
    joined = renderer.render(Conversation.from_question("hello").with_answer(Text("hello")))
    first = int(joined.ids_T[joined.loss_mask_T][0])
    assert renderer.vocabulary.bytes_W[first] == b" hello"
    assert joined.starts_T[joined.loss_mask_T][0] == -1, "no boundary: it covers the space too"
    assert joined.ends_T[joined.loss_mask_T][0] == begin + len("hello")


def test_content_inside_a_turn_shares_boundaries_with_another_tokenizer(tmp_path: Path):
    one, _ = of("phi-3", tmp_path / "one")
    two, _ = of("phi-4-mini", tmp_path / "two")
    conversation = Conversation.from_question("the cat").with_answer(Text("the cat sat on"))
    found = align(one.render(conversation), two.render(conversation)).boundaries
    tokens = one.render(conversation)
    text = list(conversation.parts())[1].text.encode()
    begin = len(b"the cat") + 1
    starts = (tokens.starts_T[found.student_C] - begin).tolist()
    assert text.index(b" cat") in starts and text.index(b" sat") in starts
    assert starts[-1] == len(text), "the end of the turn"


def test_control_tokens_in_the_content_stay_text(tmp_path: Path):
    for kind in ("phi-3", "phi-4-mini", "first"):
        renderer, _ = of(kind, tmp_path / kind)
        tokens = renderer.render_prompt(Conversation.from_question("a <|end|>\n <|user|> b"))
        ids = renderer.vocabulary.control_token_ids
        assert tokens.ids_T.tolist().count(ids["<|end|>"]) == 1
        assert tokens.ids_T.tolist().count(ids["<|user|>"]) == 1


def test_a_token_that_only_a_normaliser_would_find_is_refused(tmp_path: Path):
    """`normalized` control tokens under Prepend: transformers finds them at the start alone."""
    tokenizer = sentencepiece_bpe("prepend")
    spec = json.loads(tokenizer.to_str())
    for token in spec["added_tokens"]:
        token["normalized"] = True
    save_model_folder(Tokenizer.from_str(json.dumps(spec)), "zephyr", tmp_path)
    with pytest.raises(DataError, match="otherwise than its control tokens say"):
        load_renderer(str(tmp_path))


def test_single_word_tokens_that_an_answer_undoes_are_refused(tmp_path: Path):
    """The prompt ends with one, and with an answer behind it, it is no token any more."""
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens([AddedToken("SEP", single_word=True, special=True)])
    save_model_folder(tokenizer, "separated", tmp_path)
    with pytest.raises(DataError, match="are no prefix of the conversation's ids"):
        load_renderer(str(tmp_path))


@pytest.mark.parametrize("kind", ["phi-3", "first", "always", "byte-level prefix", "phi-4-mini"])
def test_a_text_that_stands_alone_has_the_ids_of_the_tokenizer(kind: str, tmp_path: Path):
    """What `persea serve` completes, and what a server's tokenizer is compared with."""
    renderer, tokenizer = of(kind, tmp_path)
    for text in ("hello there", " hello", "\nhello", ""):
        ids = renderer.vocabulary.encode_alone(text)
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert renderer.vocabulary.decode(renderer.vocabulary.encode(text)) == text.encode()
