"""Each family is detected, normalises conversations, and parses answers."""

from __future__ import annotations

import itertools
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from persea.chat import families
from persea.chat.families.gemma import GEMMA
from persea.chat.families.gpt_oss import GPT_OSS, REASONING_EFFORT_NAMES
from persea.chat.families.llama import LLAMA
from persea.chat.families.qwen import QWEN
from persea.chat.family import DecodedPieces
from persea.chat.messages import (
    ContentPart,
    Conversation,
    FinishReason,
    Message,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
)
from persea.errors import DataError
from persea.tokenization.vocabulary import Vocabulary, load_vocabulary
from tests.chat.test_renderer import (
    FRAGMENTS,
    LOOK_ALIKES,
    assume_no_look_alike,
    check_places,
    conversations,
    generated,
    same_as_transformers,
)
from tests.conftest import FAMILIES, Speaker

FOUR = (LLAMA, QWEN, GEMMA, GPT_OSS)  # those whose tokenizers and saplings are at hand
TEMPLATES = {
    "qwen2.5": "qwen2.5",
    "qwq-32b": "qwq",
    "qwen3": "qwen",
    "qwen3-coder": "qwen3-coder",
    "qwen3.5": "qwen3.5",
    "gemma2": "gemma",
    "gemma3": "gemma",
    "gemma4": "gemma-4",
    "gemma4-interleaved": "gemma-4",
    "gpt-oss": "gpt-oss",
    "llama3.1": "llama",
    "llama3.2": "llama",
    "llama3.3": "llama",
    "smollm3": None,
    "apertus": None,
    "deepseek-v3.1": None,
    "glm-4.6": None,
}


def vocabulary(*controls: str) -> Vocabulary:
    """A byte-level vocabulary with these control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.train_from_iterator(
        ["a b"],
        trainers.BpeTrainer(
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    tokenizer.add_special_tokens([AddedToken(c, special=True) for c in controls])
    return load_vocabulary(tokenizer, "odd/model")


# ---- which family --------------------------------------------------------------------------------


def test_every_family_is_listed_and_found_by_name():
    assert set(FAMILIES) <= {f.name for f in families.FAMILIES}
    assert len({(f.name, f.template_version) for f in families.FAMILIES}) == len(families.FAMILIES)
    assert [families.get_family(name) for name in FAMILIES] == [LLAMA, QWEN, GEMMA, GPT_OSS]


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(DataError, match="unknown family 'mistral'") as caught:
        families.get_family("mistral")
    assert all(name in caught.value.remedy for name in FAMILIES)


def test_generations_of_one_template_share_a_name():
    qwen35 = families.get_families("qwen3.5")
    assert [f.template_version for f in qwen35] == ["last question", "all thoughts"]
    assert families.get_family("qwen3.5") is qwen35[0]


def test_each_tiny_vocabulary_is_recognised(tiny: Speaker):
    found = families.candidate_families(tiny.renderer.vocabulary, tiny.renderer.template_text)
    assert tiny.renderer.family.name in [f.name for f in found]
    assert tiny.folder.name == f"{tiny.renderer.family.name}-sapling"


@pytest.mark.parametrize("controls", [(), ("<s>", "</s>"), ("<|im_end|>", "<|eot_id|>")])
def test_without_a_signature_token_there_is_no_candidate(controls: tuple[str, ...]):
    assert families.candidate_families(vocabulary(*controls), "") == ()


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda f: f.name + f.template_version)
def test_signature_token_and_template_signature_make_a_candidate(family):
    found = families.candidate_families(
        vocabulary(family.signature_token), family.template_signature
    )
    assert family in found
    lengths = [len(f.template_signature) for f in found]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.realdata
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_real_template_has_its_candidate(data: Path, template: str):
    text = (data / "templates" / f"{template}.jinja").read_text()
    found = families.candidate_families(
        vocabulary(*{f.signature_token for f in families.FAMILIES if f.signature_token in text}),
        text,
    )
    assert (found[0].name if found else None) == TEMPLATES[template]


# ---- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FOUR, ids=FAMILIES)
@given(conversation=conversations(FRAGMENTS + LOOK_ALIKES))
def test_normalising_twice_is_normalising_once(family, conversation: Conversation):
    once = family.normalise(conversation)
    assert family.normalise(once) == once
    assert [m.role for m in once.messages] == [m.role for m in conversation.messages]
    assert [[type(p) for p in m.parts] for m in once.messages] == [
        [type(p) for p in m.parts] for m in conversation.messages
    ]
    assert once.effort is conversation.effort
    assert all(
        short.text in whole.text
        for short, whole in zip(once.parts(), conversation.parts(), strict=True)
    )


def two_turns(effort: ThinkingEffort) -> Conversation:
    return Conversation(
        (
            Message(Role.SYSTEM, (Text(" rules \n"),)),
            Message(Role.USER, (Text(" q1 "),)),
            Message(Role.ASSISTANT, (Thinking("\nt1\n"), Text("\n a1 \n"))),
            Message(Role.USER, (Text("\nq2"),)),
            Message(Role.ASSISTANT, (Thinking("\n t2 \n"), Text("\n a2 \n"))),
        ),
        effort,
    )


@pytest.mark.parametrize(
    ("family", "effort", "want"),
    [
        (LLAMA, ThinkingEffort.HIGH, ["rules", "q1", "", "a1", "q2", "", "a2"]),
        (GEMMA, ThinkingEffort.HIGH, [" rules \n", "q1", "", "a1", "q2", "", "a2"]),
        (QWEN, ThinkingEffort.NONE, [" rules \n", " q1 ", "", "\n a1 \n", "\nq2", "", " a2 \n"]),
        (QWEN, ThinkingEffort.LOW, [" rules \n", " q1 ", "", "\n a1 \n", "\nq2", " t2 ", " a2 \n"]),
        (
            GPT_OSS,
            ThinkingEffort.NONE,
            [" rules \n", " q1 ", "", "\n a1 \n", "\nq2", "\n t2 \n", "\n a2 \n"],
        ),
    ],
)
def test_content_that_each_family_keeps(family, effort: ThinkingEffort, want: list[str]):
    assert [p.text for p in family.normalise(two_turns(effort)).parts()] == want


def test_the_dial_of_each_family():
    switches = {f.name: [f.template_inputs(two_turns(e))[1] for e in ThinkingEffort] for f in FOUR}
    assert switches == {
        "llama": [{}] * 4,
        "gemma": [{}] * 4,
        "qwen": [{"enable_thinking": e is not ThinkingEffort.NONE} for e in ThinkingEffort],
        "gpt-oss": [
            {"reasoning_effort": e} | ({"enable_thinking": False} if k == 0 else {})
            for k, e in enumerate(("low", "low", "medium", "high"))
        ],
    }
    assert set(REASONING_EFFORT_NAMES) == set(ThinkingEffort)
    for switch in switches["gpt-oss"]:
        switch.pop(
            "enable_thinking", None
        )  # of its own template, which has no direct mode, nothing reads it
    for f in FOUR:  # `efforts` are those the switches can tell apart
        assert len(f.efforts) == len({json.dumps(s) for s in switches[f.name]})
        assert len({json.dumps(f.template_inputs(two_turns(e))[1]) for e in f.efforts}) == len(
            f.efforts
        )


# ---- what is an answer ---------------------------------------------------------------------------

HARMONY: DecodedPieces = (
    "<|channel|>",
    b"analysis",
    "<|message|>",
    b"so",
    "<|end|>",
    "<|start|>",
    b"assistant",
    "<|channel|>",
    b"final",
    "<|message|>",
    b"Hi",
)


def harmony(pieces: DecodedPieces) -> tuple[ContentPart, ...] | None:
    return GPT_OSS.parse(pieces, ThinkingEffort.HIGH)


def test_harmony_well_formed():
    assert harmony(HARMONY) == (Thinking("so"), Text("Hi"))
    assert harmony(HARMONY[7:]) == (Text("Hi"),)
    assert harmony(HARMONY[:7] + HARMONY) == (Thinking("so"), Thinking("so"), Text("Hi"))
    assert harmony(HARMONY[:10]) == (Thinking("so"), Text(""))  # an empty answer is an answer
    assert harmony(HARMONY[:3] + HARMONY[4:]) == (Thinking(""), Text("Hi"))


@pytest.mark.parametrize("gone", [k for k in range(len(HARMONY)) if k not in (3, 10)])
def test_harmony_with_any_piece_missing_is_malformed(gone: int):
    assert harmony(HARMONY[:gone] + HARMONY[gone + 1 :]) is None


@pytest.mark.parametrize("at", range(len(HARMONY)))
@pytest.mark.parametrize(
    "other", ["<|call|>", "<|startoftext|>", b"commentary", b"json", "<|channel|>"]
)
def test_harmony_with_any_piece_replaced_is_malformed(at: int, other: str | bytes):
    if HARMONY[at] == other or (at in (3, 10) and isinstance(other, bytes)):
        assert (
            harmony((*HARMONY[:at], other, *HARMONY[at + 1 :])) is not None
        )  # the same piece, or another text
    else:
        assert harmony((*HARMONY[:at], other, *HARMONY[at + 1 :])) is None


@pytest.mark.parametrize(
    "pieces",
    [
        (),
        (b"Hi",),
        (b"so", *HARMONY),
        HARMONY[:4],
        HARMONY[:5],
        HARMONY[:7],
        HARMONY[:8],
        HARMONY[:9],
        (
            *HARMONY,
            "<|end|>",
            "<|start|>",
            b"assistant",
        ),  # promises another message and does not give it
        (*HARMONY, "<|end|>"),
        (*HARMONY, "<|end|>", "<|start|>", b"assistant", *HARMONY[7:]),  # two answers
        (
            *HARMONY,
            "<|end|>",
            "<|start|>",
            b"assistant",
            *HARMONY[:4],
        ),  # a thought after the answer
        (*HARMONY[:5], *HARMONY[7:]),  # no <|start|>assistant between
        (*HARMONY[:5], "<|start|>", b"user", *HARMONY[7:]),
        (*HARMONY[:5], "<|start|>", b"assistant to=functions.f", *HARMONY[7:]),
        ("<|channel|>", b"commentary", "<|message|>", b"{}"),
        ("<|channel|>", b"final ", "<|message|>", b"Hi"),
        ("<|channel|>", b"final", b"<|message|>", b"Hi"),
    ],
)
def test_harmony_malformed(pieces: DecodedPieces):
    assert harmony(pieces) is None


@pytest.mark.parametrize(
    ("pieces", "want"),
    [
        ((b"Hi",), (Text("Hi"),)),
        ((), (Text(""),)),
        (("<think>", b"\n\n", "</think>", b"\n\nHi"), (Text("Hi"),)),
        (("<think>", b"\nso\n", "</think>", b"\n\nHi"), (Thinking("so"), Text("Hi"))),
        (("<think>", b"\n so \n\n", "</think>", b"Hi\n"), (Thinking(" so "), Text("Hi\n"))),
        (("<think>", "</think>"), (Text(""),)),
        (("<think>", b"so", "</think>"), (Thinking("so"), Text(""))),
        (("<think>", b"so"), None),  # never stopped thinking
        (("</think>", b"Hi"), None),
        ((b"so", "</think>", b"Hi"), None),
        ((b"first", "<think>", b"so", "</think>", b"Hi"), None),
        (("<think>", b"so", "<think>", b"so", "</think>", b"Hi"), None),
        (("<think>", b"so", "</think>", b"Hi", "</think>"), None),
        (("<think>", b"so", "</think>", b"Hi", "<|im_start|>", b"user"), None),
        ((b"Hi", "<|im_start|>"), None),
        ((b"Hi", "<hole 7>"), None),
    ],
)
def test_qwen_answers(pieces: DecodedPieces, want: tuple[ContentPart, ...] | None):
    assert QWEN.parse(pieces, ThinkingEffort.HIGH) == want


@pytest.mark.parametrize("family", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_plain_answers(family):
    assert family.parse((b"Hi",), ThinkingEffort.NONE) == (Text("Hi"),)
    assert family.parse((), ThinkingEffort.NONE) == (Text(""),)
    for control in ("<bos>", family.signature_token, "<hole 7>"):
        assert family.parse((b"Hi", control, b"!"), ThinkingEffort.NONE) is None


@pytest.mark.parametrize("family", FOUR, ids=FAMILIES)
def test_no_family_takes_its_own_opening_for_an_answer(family):
    assert family.parse((family.signature_token, b"user"), ThinkingEffort.NONE) is None


# ---- the real tokenizers with the real templates -------------------------------------------------

SAID = {
    "en": (
        "Be brief.\n",
        "What is 12 * 345?\n\n  def f(x):\n\treturn x",
        "4140.",
        "It is 12*345 = 4140.",
    ),
    "zh": ("你是一位助手。", "三百四十二只猫，多少条腿？", "一千三百六十八条。", "342×4=1368。"),
    "th": ("ตอบสั้น ๆ", "สวัสดีชาวโลก สามร้อยสี่สิบสอง", "สวัสดี", "คิดก่อน"),
    "my": ("အတိုချုံးဖြေပါ။", "မင်္ဂလာပါ ကမ္ဘာလောက", "မင်္ဂလာပါ။", "စဉ်းစားသည်။"),
    "emoji": ("👩‍👩‍👧‍👦", " 🏳️‍🌈 <b>1,234.5</b> |> <| ", "👍🏽 é ∑", "🤔\u200b"),
}
GRID = list(itertools.product(SAID, (False, True), (1, 2, 3), (False, True), ThinkingEffort))


def from_grid(
    language: str, with_system: bool, turns: int, thinks: bool, effort: ThinkingEffort
) -> Conversation:
    system, question, answer, thought = (unicodedata.normalize("NFC", t) for t in SAID[language])
    messages = [Message(Role.SYSTEM, (Text(system),))] if with_system else []
    for k in range(turns):
        messages.append(Message(Role.USER, (Text(f"{question} ({k})"),)))
        messages.append(
            Message(
                Role.ASSISTANT, (*((Thinking(thought),) if thinks else ()), Text(f" {answer} {k} "))
            )
        )
    return Conversation(tuple(messages), effort)


@pytest.mark.realdata
@pytest.mark.parametrize("language", SAID)
def test_real_renderings_equal_transformers(real: Speaker, language: str):
    for case in GRID:
        if case[0] == language:
            conversation = from_grid(*case)
            same_as_transformers(real, conversation)
            tokens = real.renderer.render(conversation)
            check_places(real.renderer, conversation, tokens)
            parts, finish = real.renderer.parse(generated(tokens), conversation.effort)
            retained = real.renderer.family.normalise(conversation).messages[-1].parts
            assert (parts, finish) == (tuple(p for p in retained if p.text), FinishReason.STOP)


@pytest.mark.realdata
@pytest.mark.parametrize("fragment", ["tricky", "look-alikes"])
def test_real_renderings_of_tricky_text(real: Speaker, fragment: str):
    """Every fragment at once and one by one, as question and as answer."""
    fragments = (
        FRAGMENTS if fragment == "tricky" else [s for s in LOOK_ALIKES if "channel" not in s]
    )
    for text in [*fragments, "".join(fragments), " ".join(fragments)]:
        text = unicodedata.normalize("NFC", text)
        conversation = Conversation.from_question(text, system=text or "x").with_answer(
            Text(f"a{text}")
        )
        check_places(real.renderer, conversation, real.renderer.render(conversation))
        if fragment == "tricky":
            same_as_transformers(real, conversation)
        parts, finish = real.renderer.parse(
            generated(real.renderer.render(conversation)), ThinkingEffort.NONE
        )
        assert (parts, finish) == (
            (real.renderer.family.normalise(conversation).messages[-1].parts[-1],),
            FinishReason.STOP,
        )


@pytest.mark.realdata
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40))
def test_real_renderings_of_any_text(real: Speaker, text: str):
    text = unicodedata.normalize("NFC", text)
    conversation = Conversation.from_question(text).with_answer(Text(f"a{text}"))
    assume_no_look_alike(real, conversation)
    same_as_transformers(real, conversation)
    check_places(real.renderer, conversation, real.renderer.render(conversation))


@pytest.mark.realdata
def test_real_gpt_oss_refuses_channels_inside_an_answer(real_of):
    with pytest.raises(DataError, match="You have passed a message containing"):
        real_of("gpt-oss").renderer.render(
            Conversation.from_question("Hi").with_answer(Text("<|channel|>final<|message|>Hi"))
        )


@pytest.mark.realdata
def test_real_gemma_refuses_turns_that_do_not_alternate(real_of):
    twice = Conversation(tuple(Message(Role.USER, (Text(t),)) for t in "ab"))
    with pytest.raises(DataError, match="roles must alternate"):
        real_of("gemma").renderer.render_prompt(twice)


@pytest.mark.realdata
@pytest.mark.parametrize("family", ["llama", "gpt-oss"])
def test_real_prompts_do_not_change_at_midnight(real_of, family: str):
    renderer = real_of(family).renderer
    prompt = renderer.vocabulary.decode_pieces(
        renderer.render_prompt(Conversation.from_question("Hi")).ids_T.tolist()
    )
    assert any(b"2025-01-01" in p or b"01 Jan 2025" in p for p in prompt if isinstance(p, bytes))


@pytest.mark.realdata
def test_real_qwen_keeps_the_newlines_before_an_earlier_answer(real_of):
    two_turns = Conversation.from_question("q1").with_answer(Text("\nfirst"))
    two_turns = Conversation(
        (
            *two_turns.messages,
            *Conversation.from_question("q2").with_answer(Text("second")).messages,
        )
    )
    same_as_transformers(real_of("qwen"), two_turns)
