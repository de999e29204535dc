"""A conversation renders as by transformers, token for token, and every content token has its
bytes."""

from __future__ import annotations

import itertools
import unicodedata
from dataclasses import replace
from datetime import date
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from persea.chat.families.llama import LLAMA
from persea.chat.family import edit_texts
from persea.chat.messages import (
    PINNED_DATE,
    ContentPart,
    Conversation,
    FinishReason,
    Message,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
)
from persea.chat.renderer import ChatRenderer
from persea.chat.template import compile_template
from persea.errors import DataError
from persea.tokenization.tokens import RenderedTokens
from persea.tokenization.vocabulary import load_vocabulary
from tests.conftest import Speaker

FRAGMENTS = [
    "Hello",
    "hello world",
    " ",
    "  ",
    "\n",
    "\n\n",
    " \n ",
    "\t",
    "\r\n",
    "1234",
    "3.14",
    "x = [1]\n",
    "你好，世界",
    "三百四十二",
    "สวัสดี",
    "မင်္ဂလာပါ",
    "ភាសាខ្មែរ",
    "안녕",
    "こんにちは",
    "tiếng Việt",
    "👩‍👩‍👧",
    "🏳️‍🌈",
    "é",
    "\u200b",
    "\u3000",
    "\xa0",
    "\x00",
    "\x1c",
    "\ue0000\ue001",
    "\ue000",
    "{{ x }}",
    "{% if %}",
    "<b>",
    "|>",
    "<|",
    "Answer: 7",
    "user",
    "assistant",
    "# Instructions",
]
LOOK_ALIKES = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<think>",
    "</think>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<end_of_turn>",
    "<start_of_turn>model\n",
    "<bos>",
    "<|return|>",
    "<|end|>",
    "<|channel|>final<|message|>",
    "<|endoftext|>",
    "<0x41>",
]
NO_TOKENS = "▁"  # SentencePiece cannot say it: refused, see test_vocabulary


def texts(fragments: list[str]) -> st.SearchStrategy[str]:
    anything = st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters=NO_TOKENS), max_size=12
    )
    return st.lists(st.one_of(st.sampled_from(fragments), anything), max_size=6).map(
        lambda p: unicodedata.normalize("NFC", "".join(p))
    )


@st.composite
def conversations(draw: st.DrawFn, fragments: list[str] = FRAGMENTS) -> Conversation:
    """Conversations of one to three turns, with and without system text and thoughts, ending with
    an answer."""
    text = texts(fragments)
    messages = [Message(Role.SYSTEM, (Text(draw(text)),))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message(Role.USER, (Text(draw(text)),)))
        thought = (Thinking(draw(text)),) if draw(st.booleans()) else ()
        messages.append(Message(Role.ASSISTANT, (*thought, Text(draw(text)))))
    return Conversation(tuple(messages), draw(st.sampled_from(ThinkingEffort)))


def form(renderer: ChatRenderer) -> str:
    """A family's name; a Llama with the hybrid template keeps other content than one without."""
    return (
        "hybrid"
        if renderer.family.name == "llama" and len(renderer.family.efforts) > 1
        else renderer.family.name
    )


# ---- what transformers says ----------------------------------------------------------------------


def theirs(
    speaker: Speaker, conversation: Conversation, *, generate: bool, tokenize: bool = True
) -> Any:
    """Return transformers' rendering of the texts as they are given, without persea's
    normalisation."""
    family = form(speaker.renderer)
    switches: dict[str, Any] = {}
    if family == "hybrid":
        switches = {"reasoning_effort": conversation.effort.value}
    if family == "qwen":
        switches = {"enable_thinking": conversation.effort is not ThinkingEffort.NONE}
    if family == "gpt-oss":
        switches = (
            {"reasoning_effort": "low", "enable_thinking": False}
            if conversation.effort is ThinkingEffort.NONE
            else {"reasoning_effort": conversation.effort.value}
        )
    messages = []
    for m in conversation.messages:
        messages.append({"role": m.role.value, "content": m.text})
        # an answer at once has no thought, also where one stands in the conversation: gpt-oss alone
        # always thinks
        if m.thinking and (conversation.effort is not ThinkingEffort.NONE or family != "qwen"):
            messages[-1]["reasoning_content"] = m.thinking
    return speaker.tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=generate,
        tokenize=tokenize,
        **({"return_dict": False} if tokenize else {}),
        **switches,
    )


def question_of(conversation: Conversation) -> Conversation:
    return replace(conversation, messages=conversation.messages[:-1])


def assume_no_look_alike(speaker: Speaker, conversation: Conversation) -> None:
    """Skip texts with control tokens, which transformers encodes as control tokens and persea as
    text.

    hypothesis tries those that occur in our sources.
    """
    assume(
        not any(
            name in p.text
            for p in conversation.parts()
            for name in speaker.renderer.vocabulary.control_token_ids
        )
    )


# ---- an oracle of our own ------------------------------------------------------------------------


def trimmed(
    family: str, m: Message, kind: type[ContentPart], whole: str, last: bool, effort: ThinkingEffort
) -> tuple[int, int]:
    """[begin, end) of the content that a family keeps of a message's joined texts or thoughts."""
    if kind is Thinking and family == "hybrid" and last and effort is not ThinkingEffort.NONE:
        return len(whole) - len(whole.lstrip()), len(whole.rstrip())
    if kind is Thinking and family == "qwen" and last and effort is not ThinkingEffort.NONE:
        return len(whole) - len(whole.lstrip("\n")), len(whole.rstrip("\n"))
    if kind is Thinking:
        return (0, len(whole)) if family == "gpt-oss" and last else (0, 0)
    if family in ("llama", "hybrid") or (family == "gemma" and m.role is not Role.SYSTEM):
        return len(whole) - len(whole.lstrip()), len(whole.rstrip())
    return (
        len(whole) - len(whole.lstrip("\n"))
        if family == "qwen" and m.role is Role.ASSISTANT and last
        else 0
    ), len(whole)


def shares(family: str, conversation: Conversation) -> list[tuple[int, str]]:
    """(first kept character, kept text) of each part, by a second implementation of the families'
    rules."""
    out = []
    for k, m in enumerate(conversation.messages):
        read = {Text: 0, Thinking: 0}
        for p in m.parts:
            whole = m.text if isinstance(p, Text) else m.thinking
            begin, end = trimmed(
                family, m, type(p), whole, k == len(conversation.messages) - 1, conversation.effort
            )
            first = min(max(begin - read[type(p)], 0), len(p.text))
            out.append((first, p.text[first : max(first, end - read[type(p)])]))
            read[type(p)] += len(p.text)
    return out


def retained_texts(family: str, conversation: Conversation) -> list[str]:
    return [text for _, text in shares(family, conversation)]


def places(family: str, conversation: Conversation) -> list[tuple[int, int]]:
    """[start, end) of each part's kept bytes in the content; empty parts have none."""
    at, out = 0, []
    for part, (first, text) in zip(conversation.parts(), shares(family, conversation), strict=True):
        start = at + len(part.text[:first].encode())
        if text:
            out.append((start, start + len(text.encode())))
        at += len(part.text.encode()) + 1
    return out


def content_bytes(conversation: Conversation) -> bytes:
    """The parts laid end to end with one unused byte between them; 0xff occurs in no UTF-8 text."""
    return b"\xff".join(p.text.encode() for p in conversation.parts())


def check_places(
    renderer: ChatRenderer, conversation: Conversation, tokens: RenderedTokens
) -> None:
    """Check that each token has its content bytes and each kept byte exactly one token."""
    content, spans = content_bytes(conversation), places(form(renderer), conversation)
    covered = np.zeros(len(content) + 1, int)
    stops = 0
    for i, start, end, learn in zip(
        tokens.ids_T, tokens.starts_T, tokens.ends_T, tokens.loss_mask_T, strict=True
    ):
        piece = renderer.vocabulary.bytes_W[i]
        if piece is None:
            stops += int(end >= 0)
            if end >= 0:
                assert i in renderer.stop_ids
                assert learn
                assert start == end == (spans[-1][1] if spans else 0)
            else:
                assert start == -1
            continue
        if end < 0:
            assert start == -1
            continue
        if (
            b"\xff" in content[start:end] and start >= 0
        ):  # crosses from one part of a message into the next
            assert piece == content[start:end].replace(b"\xff", b"")
            covered[start:end] += np.frombuffer(content[start:end], np.uint8) != 0xFF
            continue
        # The token begins or ends in template text: its last bytes are the first of a part, or its
        # first bytes are the last of a part.
        if start < 0:
            part = max(a for a, _ in spans if a < end)
            start = part if content[part:end] in piece else part + int(np.argmin(covered[part:end]))
            assert piece.endswith(content[start:end]) or (
                end in [b for _, b in spans] and content[start:end] in piece
            )
            assert len(piece) > end - start
        else:
            assert piece == content[start:end]
        covered[start:end] += 1
    want = np.zeros(len(content) + 1, int)
    for a, b in spans:
        want[a:b] = 1
    assert (covered == want).all()
    assert stops == int(tokens.loss_mask_T.any())


def generated(tokens: RenderedTokens) -> list[int]:
    return tokens.ids_T[tokens.loss_mask_T].tolist()


# ---- properties ----------------------------------------------------------------------------------


def same_as_transformers(speaker: Speaker, conversation: Conversation) -> None:
    dated = speaker.today()
    assert dated.render(conversation).ids_T.tolist() == theirs(
        speaker, conversation, generate=False
    )
    assert dated.render_prompt(question_of(conversation)).ids_T.tolist() == theirs(
        speaker, question_of(conversation), generate=True
    )


@given(conversation=conversations())
def test_rendering_is_transformers_own(tiny: Speaker, conversation: Conversation):
    assume_no_look_alike(tiny, conversation)
    same_as_transformers(tiny, conversation)


@given(conversation=conversations(FRAGMENTS + LOOK_ALIKES))
def test_the_prompt_is_a_prefix(tiny: Speaker, conversation: Conversation):
    prompt, whole = (
        tiny.renderer.render_prompt(question_of(conversation)),
        tiny.renderer.render(conversation),
    )
    assert whole.ids_T[: len(prompt)].tolist() == prompt.ids_T.tolist()
    assert whole.ends_T[: len(prompt)].tolist() == prompt.ends_T.tolist()
    assert whole.starts_T[: len(prompt)].tolist() == prompt.starts_T.tolist()
    assert not prompt.loss_mask_T.any()
    assert not whole.loss_mask_T[: len(prompt)].any()
    assert whole.loss_mask_T[len(prompt)]


@given(conversation=conversations(FRAGMENTS + LOOK_ALIKES))
def test_every_content_token_has_its_byte_offsets(tiny: Speaker, conversation: Conversation):
    check_places(tiny.renderer, conversation, tiny.renderer.render(conversation))
    check_places(
        tiny.renderer,
        question_of(conversation),
        tiny.renderer.render_prompt(question_of(conversation)),
    )


@given(conversation=conversations())
def test_the_loss_mask_is_the_last_answer_and_its_stop_token(
    tiny: Speaker, conversation: Conversation
):
    assume_no_look_alike(tiny, conversation)
    whole = theirs(tiny, conversation, generate=False, tokenize=False)
    before = theirs(tiny, question_of(conversation), generate=True, tokenize=False)
    assert whole.startswith(before)
    stop = min(
        len(before) + whole[len(before) :].index(s) + len(s)
        for s in tiny.renderer.family.stop_tokens
        if s in whole[len(before) :]
    )
    tokens = tiny.renderer.render(conversation)
    pieces = [
        tiny.renderer.vocabulary.bytes_W[i] or tiny.renderer.vocabulary.control_names[i].encode()
        for i in tokens.ids_T
    ]
    assert (
        b"".join(p for p, learn in zip(pieces, tokens.loss_mask_T, strict=True) if learn)
        == whole[len(before) : stop].encode()
    )
    learned = np.flatnonzero(tokens.loss_mask_T)
    assert (np.diff(learned) == 1).all()
    assert tokens.ids_T[learned[-1]] in tiny.renderer.stop_ids


@given(conversation=conversations(FRAGMENTS + LOOK_ALIKES))
def test_parse_gives_the_answer_back(tiny: Speaker, conversation: Conversation):
    parts, finish = tiny.renderer.parse(
        generated(tiny.renderer.render(conversation)), conversation.effort
    )
    answer = conversation.messages[-1].parts
    texts_kept = retained_texts(form(tiny.renderer), conversation)[-len(answer) :]
    want = [replace(p, text=t) for p, t in zip(answer, texts_kept, strict=True) if t]
    assert [p for p in parts if p.text] == want
    assert finish is FinishReason.STOP


@given(conversation=conversations(FRAGMENTS + LOOK_ALIKES))
def test_an_answer_cut_anywhere_has_length_as_finish_reason(
    tiny: Speaker, conversation: Conversation
):
    ids = generated(tiny.renderer.render(conversation))
    assert tiny.renderer.parse(ids, conversation.effort)[1] is not FinishReason.LENGTH
    for end in range(len(ids)):
        parts, finish = tiny.renderer.parse(ids[:end], conversation.effort)
        assert finish is FinishReason.LENGTH
        assert all(isinstance(p, (Text, Thinking)) for p in parts)


@given(data=st.data())
def test_parse_accepts_any_generated_ids(tiny: Speaker, data: st.DataObject):
    controls = sorted(tiny.renderer.vocabulary.control_token_ids.values())
    ids = data.draw(
        st.lists(
            st.one_of(st.integers(0, len(tiny.renderer.vocabulary) - 1), st.sampled_from(controls)),
            max_size=12,
        )
    )
    parts, finish = tiny.renderer.parse(ids, ThinkingEffort.HIGH)
    stopped = any(i in tiny.renderer.stop_ids for i in ids)
    assert finish in (
        (FinishReason.STOP, FinishReason.MALFORMED) if stopped else (FinishReason.LENGTH,)
    )
    assert finish is not FinishReason.MALFORMED or parts == ()
    assert all(unicodedata.normalize("NFC", p.text) is not None for p in parts)


@given(conversation=conversations(FRAGMENTS + LOOK_ALIKES))
def test_look_alikes_bring_no_control_token(tiny: Speaker, conversation: Conversation):
    """The template's control tokens are the same for every content."""

    def controls(c: Conversation) -> list[int]:
        return [
            i
            for i in tiny.renderer.render(c).ids_T.tolist()
            if tiny.renderer.vocabulary.bytes_W[i] is None
        ]

    retained = iter(retained_texts(form(tiny.renderer), conversation))
    plain = replace(
        conversation,
        messages=tuple(
            replace(m, parts=tuple(replace(p, text="x" if next(retained) else "") for p in m.parts))
            for m in conversation.messages
        ),
    )
    assert controls(conversation) == controls(plain)


def ask(
    question: str = "Hi", *parts: ContentPart, effort: ThinkingEffort = ThinkingEffort.NONE
) -> Conversation:
    return Conversation.from_question(question, effort=effort).with_answer(
        *(parts or (Text("Hello."),))
    )


def test_a_conversation_without_an_answer_is_not_rendered(tiny: Speaker):
    for conversation in (
        Conversation.from_question("Hi"),
        Conversation(()),
        Conversation.from_question("Hi", system="Be kind."),
    ):
        with pytest.raises(DataError, match="does not end with an answer"):
            tiny.renderer.render(conversation)


def test_starts_and_ends_of_a_conversation_written_out(tiny_of):
    renderer = tiny_of("llama").renderer
    conversation = Conversation.from_question("  ab ", system="s").with_answer(Text(" cd\n"))
    tokens = renderer.render(conversation)
    bytes_at = {
        (int(a), int(b)): renderer.vocabulary.bytes_W[i]
        for i, a, b in zip(tokens.ids_T, tokens.starts_T, tokens.ends_T, strict=True)
        if b >= 0 and renderer.vocabulary.bytes_W[i] is not None
    }
    # s | free | 2 spaces, ab, 1 space | free | 1 space, cd, newline
    assert bytes_at[0, 1] == b"s"
    assert b"".join(bytes_at[k] for k in sorted(bytes_at) if 4 <= k[0] < 6) == b"ab"
    assert b"".join(bytes_at[k] for k in sorted(bytes_at) if k[0] >= 9) == b"cd"
    assert {k[0] for k in bytes_at} <= {0, 4, 5, 9, 10}
    last = int(np.flatnonzero(tokens.loss_mask_T)[-1])
    assert (tokens.starts_T[last], tokens.ends_T[last]) == (11, 11)
    assert tokens.ids_T[last] == renderer.vocabulary.control_token_ids["<|eot_id|>"]


def test_decomposed_text_reaches_no_token(tiny_of):
    decomposed = Conversation(
        (Message(Role.USER, (Text("x"),)), Message(Role.ASSISTANT, (Text("e\u0301"),)))
    )
    with pytest.raises(DataError, match="NFC"):
        tiny_of("qwen").renderer.render(decomposed)


def test_content_the_template_rewrites_is_refused(tiny_of):
    """Parts in an order that the template does not have: the thought after the text."""
    with pytest.raises(DataError, match="changes the content of message parts"):
        tiny_of("gpt-oss").renderer.render(
            ask("Hi", Text("words"), Thinking("thought"), effort=ThinkingEffort.HIGH)
        )


def _with_template(speaker: Speaker, text: str) -> ChatRenderer:
    return replace(
        speaker.renderer,
        template=compile_template(text, {"bos_token": ""}, PINNED_DATE, "test"),
        template_text=text,
    )


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for m in messages %}{{ m['content'] | upper }}<|eot_id|>{% endfor %}",
            "changes the content",
        ),
        (
            "{% for m in messages %}{{ m['content'] + m['content'] }}<|eot_id|>{% endfor %}",
            "changes the content",
        ),
        ("{{ messages[-1]['content'] }}<|eot_id|>", "changes the content"),
        (
            "{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}{% if "
            "add_generation_prompt %}<|start_header_id|>{% endif %}",
            "where the generation",
        ),
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "does not end the assistant's turn",
        ),
    ],
)
def test_templates_that_cannot_be_trained_with_are_refused(tiny_of, template: str, reason: str):
    with pytest.raises(DataError, match=reason):
        _with_template(tiny_of("llama"), template).render(ask())


def test_tokens_across_the_edges_of_the_content():
    """Tokens that begin or end in template text, and control tokens after the stop token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<|eot_id|>", "<|end_of_text|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["Q:é", "é.", "é;", "A:é"] * 50, trainer)
    text = (
        "{% for m in messages %}{{ 'Q:' if m['role'] == 'user' else 'A:' }}{{ m['content'] | "
        "trim }}"
        "{{ '.' if m['role'] == 'user' else ';' }}"
        "{% if m['role'] == 'assistant' %}<|eot_id|><|end_of_text|>{% endif %}{% endfor %}"
    )
    renderer = ChatRenderer(
        LLAMA,
        load_vocabulary(tokenizer, "rims"),
        compile_template(text, {}, PINNED_DATE, "rims"),
        text,
    )
    conversation = Conversation.from_question(" élan é").with_answer(Text("éa\n"))
    tokens = renderer.render(conversation)
    pieces = [renderer.vocabulary.bytes_W[i] for i in tokens.ids_T]
    where = dict(
        zip(pieces, zip(tokens.starts_T.tolist(), tokens.ends_T.tolist(), strict=True), strict=True)
    )
    crossing = {piece: where[piece] for piece in (b"Q:\xc3\xa9", b"\xc3\xa9.")}
    assert crossing == {b"Q:\xc3\xa9": (-1, 3), b"\xc3\xa9.": (-1, 9)}
    assert (pieces[-2:], tokens.starts_T[-2:].tolist(), tokens.loss_mask_T[-2:].tolist()) == (
        [None, None],
        [13, -1],
        [True, False],
    )
    check_places(renderer, conversation, tokens)


def test_malformed_utf8_is_malformed_and_not_an_error(tiny: Speaker):
    vocabulary = tiny.renderer.vocabulary
    half = next(i for i, b in enumerate(vocabulary.bytes_W) if b == "é".encode()[:1])
    assert tiny.renderer.parse([half, tiny.renderer.stop_ids[0]], ThinkingEffort.NONE) == (
        (),
        FinishReason.MALFORMED,
    )
    assert tiny.renderer.parse([half], ThinkingEffort.NONE) == ((), FinishReason.LENGTH)


def test_ids_of_another_tokenizer_are_no_answer(tiny: Speaker):
    with pytest.raises(DataError, match="outside the vocabulary"):
        tiny.renderer.parse(
            [len(tiny.renderer.vocabulary), tiny.renderer.stop_ids[0]], ThinkingEffort.NONE
        )


def test_every_spelling_of_the_stop_ends_the_answer(tiny: Speaker):
    renderer = tiny.renderer
    assert len(renderer.stop_ids) >= 2
    body = generated(renderer.render(ask()))[:-1]
    for stop in renderer.stop_ids:
        assert renderer.parse([*body, stop, *body], ThinkingEffort.NONE)[1] is FinishReason.STOP


def test_the_digest_changes_with_all_it_depends_on(tiny_of):
    llama, qwen = tiny_of("llama").renderer, tiny_of("qwen").renderer
    changed = (
        replace(llama, template_date=date(2025, 1, 2)),
        replace(llama, template_text="x"),
        replace(llama, family=qwen.family),
        replace(llama, vocabulary=qwen.vocabulary),
        replace(llama, special_tokens={"bos_token": "<s>"}),
    )
    assert len({llama.digest, *(v.digest for v in changed)}) == 6
    assert replace(llama).digest == llama.digest


def test_two_texts_in_one_message_are_one_text(tiny: Speaker):
    """Streams and tools return an answer in pieces; a template sees their concatenation."""
    for texts, whole in (
        (("one ", "two\n", "\nthree"), "one two\n\nthree"),
        (("\n", "\n a", "", "b \n", "\n"), None),
        (("\n", ""), None),
    ):
        conversation = Conversation.from_question("Hi").with_answer(*map(Text, texts))
        same_as_transformers(tiny, conversation)
        check_places(tiny.renderer, conversation, tiny.renderer.render(conversation))
        if whole is not None:
            assert tiny.renderer.parse(
                generated(tiny.renderer.render(conversation)), ThinkingEffort.NONE
            ) == ((Text(whole),), FinishReason.STOP)


def test_two_thoughts_in_one_message_are_one_thought(tiny: Speaker):
    """gpt-oss may think in several analysis messages; another family must not join their lines."""
    same_as_transformers(
        tiny,
        ask("Hi", Thinking("one\n"), Thinking("two\n"), Text("\nyes"), effort=ThinkingEffort.HIGH),
    )


def test_a_family_may_trim_and_drop_but_not_rewrite_content(tiny_of):
    renderer = tiny_of("llama").renderer
    shouting = replace(
        renderer,
        family=replace(
            renderer.family, normalise=lambda c: edit_texts(c, lambda k, m, p: p.text.upper())
        ),
    )
    with pytest.raises(DataError, match="rewritten, not trimmed"):
        shouting.render(ask())


WHITE = " \n\t\r\x0b\x0c\u3000\xa0\u2028\x85"


@pytest.mark.realdata
def test_no_white_space_glues_a_real_answer_to_its_prompt(real: Speaker):
    """No token may cover the end of the prompt and the start of an answer that begins with white
    space."""
    for white in itertools.chain.from_iterable(itertools.product(WHITE, repeat=n) for n in (1, 2)):
        conversation = ask("Hi", Text("".join(white) + "x"))
        prompt, whole = (
            real.renderer.render_prompt(question_of(conversation)),
            real.renderer.render(conversation),
        )
        assert whole.ids_T[: len(prompt)].tolist() == prompt.ids_T.tolist(), white
        assert not whole.loss_mask_T[: len(prompt)].any()
        assert whole.loss_mask_T[len(prompt)]
