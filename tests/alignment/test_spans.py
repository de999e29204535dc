"""Two renderings have a common boundary exactly where tokens begin at the same byte."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from persea.alignment.spans import (
    SupervisionKind,
    align,
    align_batch,
    aligned_spans,
    common_boundaries,
)
from persea.chat.messages import (
    ContentPart,
    Conversation,
    Message,
    Role,
    Text,
    Thinking,
    ThinkingEffort,
)
from persea.chat.renderer import ChatRenderer
from persea.errors import DataError
from persea.tokenization.tokens import RenderedTokens
from tests.conftest import FAMILIES, Speaker

FRAGMENTS = [
    "Hello",
    " world",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "1234",
    "x = [1]\n    y",
    "你好，世界",
    "三百四十二",
    "สวัสดี",
    "မင်္ဂလာပါ",
    "안녕",
    "こんにちは",
    "tiếng Việt",
    "👩‍👩‍👧",
    "é",
    "\u3000",
    "Answer: 7",
    "<|im_end|>",
    "<end_of_turn>",
]
# what stands between the last marker before a text and the text, in each family's own template
BEFORE_TEXT = {"llama": b"\n\n", "qwen": b"\n\n", "gemma": b"model\n", "gpt-oss": b""}
BEFORE_THOUGHT = {"llama": b"\n", "qwen": b"\n", "gpt-oss": b""}
LOREM = (
    "Từ ngày mai, 12345 con mèo   sẽ ngủ.\n\tdef f(x): return x ** 2\n\n三百四十二只猫。 "
    "สวัสดีชาวโลก မင်္ဂလာပါ 안녕하세요 セカイ 👩‍👩‍👧‍👦 isn't it?"
)

anything = st.text(
    st.characters(exclude_categories=["Cs", "Co"], exclude_characters="▁"), max_size=8
)
texts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), anything), max_size=6).map(
    lambda p: unicodedata.normalize("NFC", "".join(p))
)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """A question or two, and an answer, thought over or not."""
    thought = (Thinking(draw(texts)),) if draw(st.booleans()) else ()
    asked = Conversation.from_question(
        draw(texts),
        system=draw(texts),
        effort=draw(st.sampled_from((ThinkingEffort.NONE, ThinkingEffort.HIGH))),
    )
    if draw(st.booleans()):
        first = asked.with_answer(Text(draw(texts)))
        asked = replace(first, messages=(*first.messages, Message(Role.USER, (Text(draw(texts)),))))
    return asked.with_answer(*thought, Text(draw(texts)))


Places: TypeAlias = dict[
    tuple[str, int], tuple[int, int]
]  # ("byte" or "stop", place) -> (token, bytes of it)


class Renderers(dict[str, ChatRenderer]):
    """Family -> renderer; hypothesis prints its arguments, and a vocabulary is long."""

    def __repr__(self) -> str:
        return f"Renderers({', '.join(self)})"


@pytest.fixture(scope="module")
def renderers(tiny_of: Callable[[str], Speaker]) -> Renderers:
    return Renderers({family: tiny_of(family).renderer for family in FAMILIES})


# --- an oracle that reads ids and nothing else ---


def kept(family: str, conversation: Conversation) -> list[tuple[str, int, str]]:
    """Return (role, first content byte, content text) of each part, by the families' rules."""
    at, out = 0, []
    for message in conversation.messages:
        for part in message.parts:
            whole, who = part.text, "thought" if isinstance(part, Thinking) else message.role.value
            if who == "thought":
                left = {
                    "llama": whole.strip()
                    if conversation.effort is not ThinkingEffort.NONE
                    else "",
                    "qwen": whole.strip("\n")
                    if conversation.effort is not ThinkingEffort.NONE
                    else "",
                    "gpt-oss": whole,
                }.get(family, "")
            elif family == "llama" or (family == "gemma" and who != "system"):
                left = whole.strip()
            else:
                left = whole.lstrip("\n") if family == "qwen" and who == "assistant" else whole
            out.append((who, at + len(whole[: whole.find(left)].encode()), left))
            at += len(whole.encode()) + 1
    return out


def places(renderer: ChatRenderer, tokens: RenderedTokens, conversation: Conversation) -> Places:
    """Return token index and byte count of the answer's tokens, found from the ids alone.

    Runs of bytes between control tokens are walked backwards from the last stop token: the text,
    and before it the thought.
    """
    family, pieces = renderer.family.name, [renderer.vocabulary.bytes_W[i] for i in tokens.ids_T]
    said_at = [(who, at, text.encode()) for who, at, text in kept(family, conversation)]
    parts = {who: (at, text) for who, at, text in said_at}  # the last of each
    stop = max(k for k, i in enumerate(tokens.ids_T) if i in renderer.stop_ids)
    turn_end = max((at + len(text) for _, at, text in said_at if text), default=0)
    out: Places = {("stop", turn_end): (stop, 0)}

    def run_before(end: int) -> int:
        while end and pieces[end - 1] is not None:
            end -= 1
        return end

    def lay(begin: int, end: int, scaffold: bytes, origin: int, said: bytes) -> None:
        assert b"".join(pieces[begin:end]).startswith(scaffold + said), (
            "the oracle has lost its way"
        )
        at = -len(scaffold)
        for k in range(begin, end):
            if 0 <= at < len(said):
                out["byte", origin + at] = (k, min(len(pieces[k]), len(said) - at))
            at += len(pieces[k])

    lay(run_before(stop), stop, BEFORE_TEXT[family], *parts["assistant"])
    if parts.get("thought", (0, b""))[1]:
        marker = renderer.vocabulary.control_token_ids[
            {"llama": "</think>", "qwen": "</think>", "gpt-oss": "<|end|>"}[family]
        ]
        end = max(k for k in range(stop) if tokens.ids_T[k] == marker)
        lay(run_before(end), end, BEFORE_THOUGHT[family], *parts["thought"])
    return out


def all_places(
    renderers: Renderers, conversation: Conversation
) -> tuple[dict[str, RenderedTokens], dict[str, Places]]:
    rendered = {name: renderer.render(conversation) for name, renderer in renderers.items()}
    return rendered, {
        name: places(renderer, rendered[name], conversation) for name, renderer in renderers.items()
    }


def pairs_of(student: RenderedTokens, teacher: RenderedTokens) -> list[tuple[int, int]]:
    both = common_boundaries(student, teacher)
    return list(zip(both.student_C.tolist(), both.teacher_C.tolist(), strict=True))


# --- properties ---


@given(conversation=conversations())
@example(
    conversation=Conversation.from_question("x").with_answer(Text("trailing  "))
)  # llama ends the turn where gpt-oss says two spaces
@example(
    conversation=Conversation.from_question("x", effort=ThinkingEffort.HIGH).with_answer(
        Thinking("a thought\n"), Text("\n\n text")
    )
)
@example(conversation=Conversation.from_question("x").with_answer(Text(" \n ")))
@example(
    conversation=Conversation.from_question("x", effort=ThinkingEffort.HIGH).with_answer(
        Thinking("thought"), Text("")
    )
)
@example(
    conversation=Conversation.from_question("x", effort=ThinkingEffort.HIGH).with_answer(
        Thinking(LOREM), Text(LOREM)
    )
)
def test_boundaries_are_the_common_starts(renderers: Renderers, conversation: Conversation):
    rendered, found = all_places(renderers, conversation)
    for s in FAMILIES:
        for t in FAMILIES:
            common = found[s].keys() & found[t].keys()
            assert pairs_of(rendered[s], rendered[t]) == sorted(
                (found[s][k][0], found[t][k][0]) for k in common
            )


def covered(found: Places, begin: int, end: int) -> list[tuple[str, int]]:
    """Return the answer's bytes that tokens [begin, end) cover, and "stop" for the stop token."""
    return sorted(
        b
        for (kind, at), (index, size) in found.items()
        if begin <= index < end
        for b in ([(kind, at)] if kind == "stop" else [("byte", at + k) for k in range(size)])
    )


@given(conversation=conversations())
@example(conversation=Conversation.from_question("x").with_answer(Text("trailing  ")))
@example(
    conversation=Conversation.from_question("x", effort=ThinkingEffort.HIGH).with_answer(
        Thinking("a thought\n"), Text("\n\n text")
    )
)
@example(
    conversation=Conversation.from_question("x", effort=ThinkingEffort.HIGH).with_answer(
        Thinking(LOREM), Text(LOREM)
    )
)
def test_spans_cover_the_same_bytes_and_tile(renderers: Renderers, conversation: Conversation):
    rendered, found = all_places(renderers, conversation)
    for s in FAMILIES:
        for t in FAMILIES:
            both, pieces = (
                common_boundaries(rendered[s], rendered[t]),
                aligned_spans(rendered[s], rendered[t]),
            )
            assert pieces.student_C2.dtype == pieces.teacher_C2.dtype == np.int64
            assert set(pieces.student_C2[:, 0]) <= set(both.student_C)
            said: list[tuple[str, int]] = []
            for (a, b), (x, y) in zip(pieces.student_C2, pieces.teacher_C2, strict=True):
                mine = covered(found[s], a, b)
                assert mine
                assert mine == covered(found[t], x, y)
                said += mine
            assert len(said) == len(set(said)), "spans overlap"
            assert (pieces.student_C2[1:, 0] >= pieces.student_C2[:-1, 1]).all()
            assert (pieces.teacher_C2[1:, 0] >= pieces.teacher_C2[:-1, 1]).all()
            if kept(s, conversation) == kept(
                t, conversation
            ):  # everything from the first boundary on, without a hole
                begin = both.student_C[0]
                assert sorted(said) == covered(found[s], begin, len(rendered[s]))
                assert len(pieces.student_C2) == len(both.student_C)


@given(conversation=conversations())
def test_a_rendering_with_itself_agrees_everywhere(
    renderers: Renderers, conversation: Conversation
):
    for renderer in renderers.values():
        one, two = renderer.render(conversation), renderer.render(conversation)
        content = np.flatnonzero(one.loss_mask_T & (one.starts_T >= 0))
        both, pieces = common_boundaries(one, two), aligned_spans(one, two)
        assert both.student_C.tolist() == both.teacher_C.tolist() == content.tolist()
        assert (
            pieces.student_C2.tolist()
            == pieces.teacher_C2.tolist()
            == [[k, k + 1] for k in content]
        )
        assert pieces.num_one_to_one == len(content)


@given(conversation=conversations())
def test_exchanging_the_sides_exchanges_the_answer(
    renderers: Renderers, conversation: Conversation
):
    one, two = renderers["gemma"].render(conversation), renderers["qwen"].render(conversation)
    there, back = aligned_spans(one, two), aligned_spans(two, one)
    assert there.student_C2.tolist() == back.teacher_C2.tolist()
    assert there.teacher_C2.tolist() == back.student_C2.tolist()
    assert there.num_one_to_one == back.num_one_to_one
    assert pairs_of(one, two) == [(a, b) for b, a in pairs_of(two, one)]


@given(conversation=conversations())
def test_unsupervised_tokens_are_no_boundaries(renderers: Renderers, conversation: Conversation):
    question = Conversation(conversation.messages[:-1], conversation.effort)
    all_rendered = [renderer.render(conversation) for renderer in renderers.values()]
    prompts = [renderer.render_prompt(question) for renderer in renderers.values()]
    for rendered, prompt in zip(all_rendered, prompts, strict=True):
        for other in all_rendered:
            both = common_boundaries(rendered, other)
            assert rendered.loss_mask_T[both.student_C].all()
            assert not np.isin(both.student_C, np.flatnonzero(rendered.starts_T < 0)).any()
            assert len(common_boundaries(prompt, other).student_C) == 0
            assert len(aligned_spans(prompt, other).student_C2) == 0


# --- single cases ---


def answered(
    *parts: ContentPart, effort: ThinkingEffort = ThinkingEffort.NONE, question: str = "Hi"
) -> Conversation:
    return Conversation.from_question(question, effort=effort).with_answer(*parts)


def starts(tokens: RenderedTokens, both: np.ndarray) -> list[int]:
    return tokens.starts_T[both].tolist()


@pytest.mark.parametrize("student", FAMILIES)
@pytest.mark.parametrize("teacher", FAMILIES)
def test_stop_tokens_correspond(renderers: Renderers, student: str, teacher: str):
    s, t = (renderers[n].render(answered(Text("two words"))) for n in (student, teacher))
    a, b = pairs_of(s, t)[-1]
    assert s.ids_T[a] in renderers[student].stop_ids
    assert t.ids_T[b] in renderers[teacher].stop_ids
    assert aligned_spans(s, t).student_C2[-1].tolist() == [a, a + 1]
    assert aligned_spans(s, t).teacher_C2[-1].tolist() == [b, b + 1]


def test_a_stop_token_never_corresponds_to_text(renderers: Renderers):
    """llama trims the answer and stops where gpt-oss still has two spaces."""
    s, t = (
        renderers["llama"].render(answered(Text("Hi  "))),
        renderers["gpt-oss"].render(answered(Text("Hi  "))),
    )
    stop = int(np.flatnonzero(s.loss_mask_T)[-1])
    assert s.starts_T[stop] in t.starts_T[t.loss_mask_T], "the case is not there any more"
    assert stop not in common_boundaries(s, t).student_C
    assert stop not in [k for a, b in aligned_spans(s, t).student_C2.tolist() for k in range(a, b)]


def test_a_beginning_of_text_token_on_one_side_moves_nothing(renderers: Renderers):
    conversation = answered(Text(LOREM))
    s, t = renderers["llama"].render(conversation), renderers["qwen"].render(conversation)
    assert s.ids_T[0] == renderers["llama"].vocabulary.control_token_ids["<|begin_of_text|>"]
    assert t.ids_T[0] == renderers["qwen"].vocabulary.control_token_ids["<|im_start|>"]
    without = RenderedTokens(s.ids_T[1:], s.starts_T[1:], s.ends_T[1:], s.loss_mask_T[1:])
    assert len(pairs_of(s, t)) > 40
    assert pairs_of(s, t) == [(a + 1, b) for a, b in pairs_of(without, t)]


def test_boundaries_inside_a_character(renderers: Renderers):
    """With byte fallback on both sides, boundaries lie between the bytes of one character."""
    text = "မြန်မာ ខ្មែរ 𓀀"
    conversation = answered(Text(text), question="")
    characters = set(np.cumsum([0] + [len(c.encode()) for c in text]).tolist())
    for s, t in (("gemma", "llama"), ("llama", "gemma"), ("qwen", "gemma")):
        one, two = renderers[s].render(conversation), renderers[t].render(conversation)
        origin = int(one.starts_T[one.loss_mask_T & (one.starts_T >= 0)][0])
        at = {k - origin for k in starts(one, common_boundaries(one, two).student_C)}
        assert at - characters, "no boundary inside a character"
        assert len(at) > len(characters)


@pytest.mark.parametrize("teacher", ["gpt-oss", "qwen"])
def test_a_thought_the_student_drops_is_not_aligned_and_the_text_is(
    renderers: Renderers, teacher: str
):
    thought, text = "He says hello. I say it back.", "Hello, hello world 三百"
    conversation = answered(Thinking(thought), Text(text), effort=ThinkingEffort.HIGH)
    s, t = renderers["gemma"].render(conversation), renderers[teacher].render(conversation)
    text_at = len(b"Hi") + 1 + len(thought.encode()) + 1
    both = common_boundaries(s, t)
    assert starts(t, both.teacher_C)[0] == text_at
    assert (t.loss_mask_T & (t.starts_T >= 0) & (t.starts_T < text_at)).sum() > 5, (
        "the teacher learns its thought"
    )
    without = answered(Text(text))
    plain_s, plain_t = renderers["gemma"].render(without), renderers[teacher].render(without)
    moved = len(thought.encode()) + 1
    assert starts(s, both.student_C) == [
        k + moved for k in starts(plain_s, common_boundaries(plain_s, plain_t).student_C)
    ]
    assert aligned_spans(s, t).num_one_to_one == aligned_spans(plain_s, plain_t).num_one_to_one


@pytest.mark.parametrize(
    ("student", "teacher"), [("qwen", "gpt-oss"), ("llama", "qwen"), ("llama", "gpt-oss")]
)
def test_two_that_think_are_aligned_in_the_thought_too(
    renderers: Renderers, student: str, teacher: str
):
    conversation = answered(
        Thinking("one two three"), Text("one two three"), effort=ThinkingEffort.HIGH
    )
    s, t = renderers[student].render(conversation), renderers[teacher].render(conversation)
    at = starts(s, common_boundaries(s, t).student_C)
    text_at = len("Hi") + 1 + len("one two three") + 1
    in_thought, in_text = (
        [k - 3 for k in at if k < text_at],
        [k - text_at for k in at if k >= text_at],
    )
    assert in_thought == in_text[:-1], "the text has the stop token besides"
    assert len(in_thought) > 1


def test_an_empty_answer_has_its_stop_alone(renderers: Renderers):
    for s in FAMILIES:
        for t in FAMILIES:
            one, two = (
                renderers[s].render(answered(Text(""))),
                renderers[t].render(answered(Text(""))),
            )
            assert len(pairs_of(one, two)) == 1
            assert aligned_spans(one, two).num_one_to_one == 1


@given(text=texts)
@example(text=LOREM)
def test_spans_are_as_fine_as_the_boundaries_allow(renderers: Renderers, text: str):
    """No boundary lies inside a span."""
    conversation = answered(Text(text))
    s, t = renderers["gemma"].render(conversation), renderers["llama"].render(conversation)
    firsts = set(common_boundaries(s, t).student_C.tolist())
    for a, b in aligned_spans(s, t).student_C2.tolist():
        assert a in firsts
        assert not firsts & set(range(a + 1, b))


# --- whole batches ---


@given(said=st.lists(conversations(), max_size=5))
@example(
    said=[
        Conversation.from_question("x").with_answer(Text(text))
        for text in ("trailing  ", "", LOREM)
    ]
)
@example(said=[])
def test_a_batch_equals_its_conversations(renderers: Renderers, said: list[Conversation]):
    for s, t in (("llama", "gemma"), ("gemma", "qwen"), ("qwen", "gpt-oss")):
        ones, twos = ([renderers[n].render(c) for c in said] for n in (s, t))
        whole = align_batch(ones, twos)
        assert whole.student_offsets_B1.tolist() == np.cumsum([0, *map(len, ones)]).tolist()
        single = [align(one, two) for one, two in zip(ones, twos, strict=True)]
        for side in ("student", "teacher"):
            first = getattr(whole, f"{side}_offsets_B1")[:-1]
            for what, name in (
                ("boundaries", f"{side}_C"),
                ("spans", f"{side}_C2"),
                ("partial_tokens", f"{side}_I"),
            ):
                want = [
                    getattr(getattr(one, what), name) + k
                    for one, k in zip(single, first, strict=True)
                ]
                assert (
                    getattr(getattr(whole, what), name).tolist()
                    == np.concatenate([getattr(getattr(whole, what), name)[:0], *want]).tolist()
                )
        for of in (
            lambda a: a.partial_tokens.prefix_len_I,
            lambda a: a.partial_tokens.at_common_boundary_I,
            lambda a: a.supervision_S,
        ):
            assert of(whole).tolist() == [k for one in single for k in of(one).tolist()]


@given(conversation=conversations())
@example(
    conversation=Conversation.from_question("x", effort=ThinkingEffort.HIGH).with_answer(
        Thinking(LOREM), Text(LOREM)
    )
)
@example(
    conversation=Conversation.from_question("x", effort=ThinkingEffort.HIGH).with_answer(
        Thinking("a thought\n"), Text("\n\n text")
    )
)
def test_every_supervised_token_has_one_kind(renderers: Renderers, conversation: Conversation):
    """Judged token by token, by plain loops over the two renderings."""
    rendered = {name: renderer.render(conversation) for name, renderer in renderers.items()}
    for s, one in rendered.items():
        for t, two in rendered.items():
            found = align(one, two)
            covers = {
                k: (int(two.starts_T[k]), int(two.ends_T[k]))
                for k in np.flatnonzero(two.loss_mask_T)
                if two.starts_T[k] >= 0
            }
            met = dict(
                zip(
                    found.boundaries.student_C.tolist(),
                    found.boundaries.teacher_C.tolist(),
                    strict=True,
                )
            )
            in_span = {k for a, b in found.spans.student_C2.tolist() for k in range(a, b)}
            inside = dict(
                zip(
                    found.partial_tokens.student_I.tolist(),
                    zip(
                        found.partial_tokens.teacher_I.tolist(),
                        found.partial_tokens.prefix_len_I.tolist(),
                        strict=True,
                    ),
                    strict=True,
                )
            )
            for k in range(len(one)):
                if not one.loss_mask_T[k]:
                    assert found.supervision_S[k] == -1
                    continue
                place = int(one.starts_T[k])
                over = [
                    j for j, (a, b) in covers.items() if a < place < b and place < one.ends_T[k]
                ]
                assert k in met or (inside.get(k, (None,))[0] == (over[0] if over else None)), (
                    s,
                    t,
                )
                if k in met:
                    want = SupervisionKind.EVENT
                elif over and over[0] in met.values():
                    want = SupervisionKind.PARTIAL_TOKEN
                    assert inside[k] == (over[0], place - covers[over[0]][0])
                else:
                    want = SupervisionKind.SPAN if k in in_span else SupervisionKind.TEXT
                assert found.supervision_S[k] == want, (s, t, k)


def test_all_four_kinds_occur(renderers: Renderers):
    conversation = answered(Thinking("one two"), Text(LOREM), effort=ThinkingEffort.HIGH)
    ways = {
        way
        for s in FAMILIES
        for t in FAMILIES
        for way in align_batch(
            [renderers[s].render(conversation)], [renderers[t].render(conversation)]
        ).supervision_S
    }
    assert ways == {-1, *SupervisionKind}


def test_nothing_is_aligned_if_the_other_side_has_no_supervised_token(renderers: Renderers):
    s, t = (
        renderers["llama"].render(answered(Text("Hi"))),
        renderers["qwen"].render_prompt(Conversation.from_question("Hi")),
    )
    found = align(s, t)
    assert set(found.supervision_S[s.loss_mask_T]) == {SupervisionKind.TEXT}
    assert (
        len(found.boundaries.student_C)
        == len(found.spans.teacher_C2)
        == len(found.partial_tokens.prefix_len_I)
        == 0
    )


def test_inputs_that_are_not_renderings_are_refused(renderers: Renderers):
    s = renderers["llama"].render(answered(Text(LOREM)))
    with pytest.raises(DataError, match="2 renderings of the student against 1"):
        align_batch([s, s], [s])
    learned = np.flatnonzero(s.loss_mask_T)
    for k, j in ((learned[3], learned[2]), (learned[2], learned[3])):
        starts = s.starts_T.copy()
        starts[k] = starts[j]
        with pytest.raises(DataError, match="begin at the same byte"):
            align_batch([RenderedTokens(s.ids_T, starts, s.ends_T, s.loss_mask_T)], [s])


# --- strings that break others ---

HARD = {
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈👍🏽 🇻🇳",
    "burmese": "မြန်မာစာ၊ မင်္ဂလာပါ",
    "khmer": "ភាសាខ្មែរ​សួស្តី",
    "zwj": "क्‍ष a‍b ‌",
    "crlf": "a\r\n\r\nb\r\rc \r\n",
    "digits": "1 12 123 1234 12345678901234567890 3.14159 ๑๒๓ １２３",
    "bom": "\ufeffBOM \ufeff twice",
    "spaces": "a b  c   d    e\t\tf \t g\u3000h\u00a0i" + " " * 40 + "j",
    "code": "def f(x):\n        if x:\n\t\treturn {'a': [1,  2]}\n\n\n    # end",
    "look-alikes": "<|im_end|> <end_of_turn> <|eot_id|><think></think> <0x0A> [INST] <bos> Ġ Ċ",
    "contractions": "I'LL don't they've 'tis I'm o'clock",
    "decomposed": "Tie\u0302\u0301ng Vie\u0323\u0302t e\u0301 n\u0303",
    "replacement": "\ufffd\ufffd \x00\x01\x7f",
    "marks": "\u0301 \u1037 \u0e49",
}


def check_bytes(
    conversation: Conversation,
    one: RenderedTokens,
    two: RenderedTokens,
    renderers: tuple[ChatRenderer, ChatRenderer],
) -> None:
    """Every span covers the same bytes on both sides, and these are the bytes its tokens have."""
    content = b"\xff".join(p.text.encode() for p in conversation.parts())
    found = aligned_spans(one, two)
    for ranges in zip(found.student_C2.tolist(), found.teacher_C2.tolist(), strict=True):
        places = []
        for tokens, renderer, (a, b) in zip((one, two), renderers, ranges, strict=True):
            covered: list[int] = []
            for k in range(a, b):
                begin, end = int(tokens.starts_T[k]), int(tokens.ends_T[k])
                if 0 <= begin < end:
                    assert (renderer.vocabulary.bytes_W[tokens.ids_T[k]] or b"").startswith(
                        content[begin:end]
                    )
                    covered += range(begin, end)
                elif begin >= 0:
                    covered.append(-1)
            places.append(covered)
        assert places[0] == places[1]


def check_all(
    renderers: Renderers, conversation: Conversation, cut: tuple[int, int] = (0, 0)
) -> None:
    rendered = {name: renderer.render(conversation) for name, renderer in renderers.items()}
    for s, one in rendered.items():
        for t, two in rendered.items():
            shorter = [
                RenderedTokens(
                    *(
                        getattr(x, f)[: max(0, len(x) - n)]
                        for f in ("ids_T", "starts_T", "ends_T", "loss_mask_T")
                    )
                )
                for x, n in zip((one, two), cut, strict=True)
            ]
            check_bytes(conversation, shorter[0], shorter[1], (renderers[s], renderers[t]))


@pytest.mark.parametrize("name", HARD)
def test_hard_strings_cover_the_same_bytes(renderers: Renderers, name: str):
    check_all(renderers, answered(Text(HARD[name])))
    one, two = (renderers[n].render(answered(Text(HARD[name]))) for n in ("llama", "gemma"))
    assert len(aligned_spans(one, two).student_C2) > 1, (
        "the last is the stop, and there must be another"
    )


@given(conversation=conversations(), cut=st.tuples(st.integers(0, 12), st.integers(0, 12)))
@example(conversation=Conversation.from_question("x").with_answer(Text(HARD["emoji"])), cut=(2, 0))
@example(conversation=Conversation.from_question("x").with_answer(Text("Hi")), cut=(1, 0))
def test_a_length_limit_cuts_either_side_anywhere(
    renderers: Renderers, conversation: Conversation, cut: tuple[int, int]
):
    check_all(renderers, conversation, cut)


def test_a_cut_inside_a_character_loses_the_last_span_alone(renderers: Renderers):
    """The student's rendering ends inside an emoji: that span has no common end."""
    conversation = answered(Text("Hello there 👩 x"))
    one, two = renderers["llama"].render(conversation), renderers["gemma"].render(conversation)
    whole = aligned_spans(one, two).student_C2.tolist()
    at = len("Hi") + 1 + len("Hello there ")
    inside = [k for k in np.flatnonzero(one.loss_mask_T) if at < one.starts_T[k] < at + 4]
    assert inside, "the case is not there any more"
    for k in inside:
        shorter = RenderedTokens(
            one.ids_T[:k], one.starts_T[:k], one.ends_T[:k], one.loss_mask_T[:k]
        )
        kept = aligned_spans(shorter, two).student_C2.tolist()
        assert kept == [x for x in whole if x[1] <= k][: len(kept)]
        assert len([x for x in whole if x[1] <= k]) - len(kept) <= 1


# --- the real tokenizers ---


@pytest.fixture(scope="module")
def real_renderers(real_of: Callable[[str], Speaker]) -> Renderers:
    return Renderers({family: real_of(family).renderer for family in FAMILIES})


@pytest.mark.realdata
@given(conversation=conversations(), cut=st.tuples(st.integers(0, 6), st.integers(0, 6)))
@example(
    conversation=Conversation.from_question("x", effort=ThinkingEffort.HIGH).with_answer(
        Thinking(LOREM), Text(LOREM)
    ),
    cut=(0, 0),
)
def test_real_spans_cover_the_same_bytes(
    real_renderers: Renderers, conversation: Conversation, cut: tuple[int, int]
):
    check_all(real_renderers, conversation)
    check_all(real_renderers, conversation, cut)


@pytest.mark.realdata
@pytest.mark.parametrize("name", HARD)
def test_real_hard_strings_cover_the_same_bytes(real_renderers: Renderers, name: str):
    check_all(real_renderers, answered(Text(HARD[name])))


@pytest.mark.realdata
def test_real_lines_of_every_language_cover_the_same_bytes(data: Path, real_renderers: Renderers):
    for file in sorted((data / "parallel").glob("ntrex.*.txt")):
        lines = [
            unicodedata.normalize("NFC", line)
            for line in file.read_text(encoding="utf-8").split("\n")[:6]
            if "▁" not in line
        ]
        check_all(real_renderers, answered(Text("\n".join(lines))))
