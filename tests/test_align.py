"""Two renderings of one conversation meet exactly where their tokens begin at the same byte, and nowhere else."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from conftest import FAMILIES, Speaker
from hypothesis import assume, example, given
from hypothesis import strategies as st

from persea.align import boundaries, spans
from persea.chat import Conversation, Effort, Part, Text, Thinking, Tokens, Voice

FRAGMENTS = ["Hello", " world", " ", "  ", "\n", "\n\n", "\t", "\r\n", "1234", "x = [1]\n    y", "你好，世界", "三百四十二", "สวัสดี", "မင်္ဂလာပါ",
             "안녕", "こんにちは", "tiếng Việt", "👩‍👩‍👧", "é", "\u3000", "Answer: 7", "<|im_end|>", "<end_of_turn>"]
# what stands between the last marker before a text and the text, in each family's own template
BEFORE_TEXT = {"llama": b"\n\n", "qwen": b"\n\n", "gemma": b"model\n", "gpt-oss": b""}
BEFORE_THOUGHT = {"qwen": b"\n", "gpt-oss": b""}
LOREM = ("Từ ngày mai, 12345 con mèo   sẽ ngủ.\n\tdef f(x): return x ** 2\n\n三百四十二只猫。 สวัสดีชาวโลก မင်္ဂလာပါ 안녕하세요 セカイ 👩‍👩‍👧‍👦 isn't it?")

anything = st.text(st.characters(exclude_categories=["Cs", "Co"], exclude_characters="▁"), max_size=8)
texts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), anything), max_size=6).map(lambda p: unicodedata.normalize("NFC", "".join(p)))


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """One question and an answer, thought over or not."""
    thought = (Thinking(draw(texts)),) if draw(st.booleans()) else ()
    question = Conversation.ask(draw(texts), system=draw(texts), effort=draw(st.sampled_from((Effort.NONE, Effort.HIGH))))
    return question.answered(*thought, Text(draw(texts)))


@pytest.fixture(scope="module")
def voices(tiny_of: Callable[[str], Speaker]) -> dict[str, Voice]:
    return {family: tiny_of(family).voice for family in FAMILIES}


# ---- an oracle that reads ids and nothing else ---------------------------------------------------------------------


def kept(family: str, conversation: Conversation) -> tuple[tuple[int, str], tuple[int, str]]:
    """(bytes trimmed from its front, what is left) of the last thought and of the last text; the families' rules, written down again."""
    text, thought = conversation.messages[-1].text, conversation.messages[-1].thinking
    left = text.strip() if family in ("llama", "gemma") else text.lstrip("\n") if family == "qwen" else text
    mind = {"qwen": thought.strip("\n") if conversation.effort is not Effort.NONE else "", "gpt-oss": thought}.get(family, "")
    return (len(thought[:thought.find(mind)].encode()), mind), (len(text[:text.find(left)].encode()), left)


def places(voice: Voice, tokens: Tokens, conversation: Conversation) -> dict[tuple[str, int], tuple[int, int]]:
    """(part, byte in it) where a token of the answer begins -> (its index, bytes of the part it covers), read off the ids.

    The runs of bytes between control tokens are walked backwards from the last stop token: the text, before it the thought.
    """
    family, pieces = voice.family.name, [voice.vocabulary.bytes_W[i] for i in tokens.ids_T]
    stop = max(k for k, i in enumerate(tokens.ids_T) if i in voice.stop_ids)
    (thought_front, thought), (text_front, text) = kept(family, conversation)
    out = {("stop", text_front + len(text.encode())): (stop, 0)}

    def run_before(end: int) -> int:
        while end and pieces[end - 1] is not None:
            end -= 1
        return end

    def lay(part: str, begin: int, end: int, scaffold: bytes, said: str, front: int) -> None:
        at, whole = 0, b"".join(pieces[begin:end])
        assert whole.startswith(scaffold + said.encode()), "the oracle has lost its way"
        for k in range(begin, end):
            if len(scaffold) <= at < len(scaffold) + len(said.encode()):
                out[part, front + at - len(scaffold)] = (k, min(len(pieces[k]), len(scaffold) + len(said.encode()) - at))
            at += len(pieces[k])

    begin = run_before(stop)
    lay("text", begin, stop, BEFORE_TEXT[family], text, text_front)
    if thought:
        marker = voice.vocabulary.control[{"qwen": "</think>", "gpt-oss": "<|end|>"}[family]]
        end = max(k for k in range(stop) if tokens.ids_T[k] == marker)
        lay("thought", run_before(end), end, BEFORE_THOUGHT[family], thought, thought_front)
    return out


def all_places(voices: Mapping[str, Voice], conversation: Conversation) -> tuple[dict[str, Tokens], dict[str, dict[tuple[str, int], tuple[int, int]]]]:
    rendered = {name: voice.render(conversation) for name, voice in voices.items()}
    return rendered, {name: places(voice, rendered[name], conversation) for name, voice in voices.items()}


def pairs_of(student: Tokens, teacher: Tokens) -> list[tuple[int, int]]:
    both = boundaries(student, teacher)
    return list(zip(both.student_C.tolist(), both.teacher_C.tolist(), strict=True))


# ---- properties ----------------------------------------------------------------------------------------------------


@given(conversation=conversations())
@example(conversation=Conversation.ask("x").answered(Text("trailing  ")))  # llama ends the turn where gpt-oss says two spaces
@example(conversation=Conversation.ask("x", effort=Effort.HIGH).answered(Thinking("a thought\n"), Text("\n\n text")))
@example(conversation=Conversation.ask("x").answered(Text(" \n ")))
@example(conversation=Conversation.ask("x", effort=Effort.HIGH).answered(Thinking("thought"), Text("")))
@example(conversation=Conversation.ask("x", effort=Effort.HIGH).answered(Thinking(LOREM), Text(LOREM)))
def test_boundaries_are_the_common_starts(voices: dict[str, Voice], conversation: Conversation):
    rendered, found = all_places(voices, conversation)
    for s in FAMILIES:
        for t in FAMILIES:
            common = found[s].keys() & found[t].keys()
            assert pairs_of(rendered[s], rendered[t]) == sorted((found[s][k][0], found[t][k][0]) for k in common)


def covered(tokens: Tokens, found: Mapping[tuple[str, int], tuple[int, int]], begin: int, end: int) -> list[tuple[str, int]]:
    """The bytes of the answer that tokens [begin, end) cover, and "stop" where the stop token is among them."""
    out = []
    for (part, at), (index, size) in found.items():
        if begin <= index < end:
            out += [(part, at)] if part == "stop" else [(part, at + k) for k in range(size)]
    assert (tokens.starts_T[begin:end] >= 0).sum() == sum(begin <= index < end for index, _ in found.values())
    return sorted(out)


@given(conversation=conversations())
@example(conversation=Conversation.ask("x").answered(Text("trailing  ")))
@example(conversation=Conversation.ask("x", effort=Effort.HIGH).answered(Thinking("a thought\n"), Text("\n\n text")))
@example(conversation=Conversation.ask("x", effort=Effort.HIGH).answered(Thinking(LOREM), Text(LOREM)))
def test_spans_cover_the_same_bytes_and_tile(voices: dict[str, Voice], conversation: Conversation):
    rendered, found = all_places(voices, conversation)
    for s in FAMILIES:
        for t in FAMILIES:
            both, pieces = boundaries(rendered[s], rendered[t]), spans(rendered[s], rendered[t])
            assert pieces.student_C2.dtype == pieces.teacher_C2.dtype == np.int64
            assert set(pieces.student_C2[:, 0]) <= set(both.student_C)
            said: list[tuple[str, int]] = []
            for (a, b), (x, y) in zip(pieces.student_C2, pieces.teacher_C2, strict=True):
                assert a < b
                assert x < y
                mine = covered(rendered[s], found[s], a, b)
                assert mine == covered(rendered[t], found[t], x, y)
                assert mine
                said += mine
            assert len(said) == len(set(said)), "spans overlap"
            assert (pieces.student_C2[1:, 0] >= pieces.student_C2[:-1, 1]).all()
            assert (pieces.teacher_C2[1:, 0] >= pieces.teacher_C2[:-1, 1]).all()
            same = kept(s, conversation) == kept(t, conversation)
            if same and len(both.student_C):  # both families kept the same bytes: everything from the first boundary on
                first = found[s].keys() & found[t].keys()
                whole = covered(rendered[s], found[s], 0, len(rendered[s]))
                begin = min((0 if part == "thought" else 1, at) for part, at in first)
                assert set(said) == {k for k in whole if (0 if k[0] == "thought" else 1, k[1]) >= begin}
                assert len(pieces.student_C2) == len(both.student_C)


@given(conversation=conversations())
def test_a_voice_with_itself_agrees_everywhere(voices: dict[str, Voice], conversation: Conversation):
    for voice in voices.values():
        one, two = voice.render(conversation), voice.render(conversation)
        content = np.flatnonzero(one.learn_T & (one.starts_T >= 0))
        both, pieces = boundaries(one, two), spans(one, two)
        assert both.student_C.tolist() == both.teacher_C.tolist() == content.tolist()
        assert pieces.student_C2.tolist() == pieces.teacher_C2.tolist() == [[k, k + 1] for k in content]
        assert pieces.one_to_one == len(content)


@given(conversation=conversations())
def test_exchanging_the_sides_exchanges_the_answer(voices: dict[str, Voice], conversation: Conversation):
    one, two = voices["gemma"].render(conversation), voices["qwen"].render(conversation)
    there, back = spans(one, two), spans(two, one)
    assert there.student_C2.tolist() == back.teacher_C2.tolist()
    assert there.teacher_C2.tolist() == back.student_C2.tolist()
    assert there.one_to_one == back.one_to_one
    assert pairs_of(one, two) == [(a, b) for b, a in pairs_of(two, one)]


@given(conversation=conversations())
def test_what_is_not_learned_is_no_boundary(voices: dict[str, Voice], conversation: Conversation):
    for voice in voices.values():
        rendered = voice.render(conversation)
        for other in voices.values():
            both = boundaries(rendered, other.render(conversation))
            assert rendered.learn_T[both.student_C].all()
            assert not np.isin(both.student_C, np.flatnonzero(rendered.starts_T < 0)).any()
            prompt = voice.prompt(Conversation(conversation.messages[:-1], conversation.effort))
            assert len(boundaries(prompt, other.render(conversation)).student_C) == 0
            assert len(spans(prompt, other.render(conversation)).student_C2) == 0


# ---- single cases --------------------------------------------------------------------------------------------------


def answered(*parts: Part, effort: Effort = Effort.NONE, question: str = "Hi") -> Conversation:
    return Conversation.ask(question, effort=effort).answered(*parts)


def starts(tokens: Tokens, both: np.ndarray) -> list[int]:
    return tokens.starts_T[both].tolist()


@pytest.mark.parametrize("student", FAMILIES)
@pytest.mark.parametrize("teacher", FAMILIES)
def test_the_stop_tokens_meet(voices: dict[str, Voice], student: str, teacher: str):
    s, t = (voices[n].render(answered(Text("two words"))) for n in (student, teacher))
    a, b = pairs_of(s, t)[-1]
    assert s.ids_T[a] in voices[student].stop_ids
    assert t.ids_T[b] in voices[teacher].stop_ids
    assert spans(s, t).student_C2[-1].tolist() == [a, a + 1]
    assert spans(s, t).teacher_C2[-1].tolist() == [b, b + 1]


def test_a_stop_never_meets_a_word(voices: dict[str, Voice]):
    """llama trims the answer and stops where gpt-oss still says two spaces: one place, two different things."""
    s, t = voices["llama"].render(answered(Text("Hi  "))), voices["gpt-oss"].render(answered(Text("Hi  ")))
    stop = int(np.flatnonzero(s.learn_T)[-1])
    assert s.starts_T[stop] in t.starts_T[t.learn_T], "the case is not there any more"
    assert stop not in boundaries(s, t).student_C
    assert stop not in [k for a, b in spans(s, t).student_C2.tolist() for k in range(a, b)]


def test_a_beginning_of_text_token_on_one_side_moves_nothing(voices: dict[str, Voice]):
    conversation = answered(Text(LOREM))
    s, t = voices["llama"].render(conversation), voices["qwen"].render(conversation)
    assert s.ids_T[0] == voices["llama"].vocabulary.control["<|begin_of_text|>"]
    assert t.ids_T[0] == voices["qwen"].vocabulary.control["<|im_start|>"]
    without = Tokens(s.ids_T[1:], s.starts_T[1:], s.ends_T[1:], s.learn_T[1:])
    assert len(pairs_of(s, t)) > 40
    assert pairs_of(s, t) == [(a + 1, b) for a, b in pairs_of(without, t)]


def test_boundaries_inside_a_character(voices: dict[str, Voice]):
    """Neither knows these scripts: the student's bytes and the teacher's byte fallback meet between the bytes of one character."""
    text = "မြန်မာ ខ្មែរ 𓀀"
    conversation = answered(Text(text), question="")
    characters = set(np.cumsum([0] + [len(c.encode()) for c in text]).tolist())
    for s, t in (("gemma", "llama"), ("llama", "gemma"), ("qwen", "gemma")):
        one, two = voices[s].render(conversation), voices[t].render(conversation)
        origin = int(one.starts_T[one.learn_T & (one.starts_T >= 0)][0])
        at = {k - origin for k in starts(one, boundaries(one, two).student_C)}
        assert at - characters, "no boundary inside a character"
        assert len(at) > len(characters)


@pytest.mark.parametrize("teacher", ["gpt-oss", "qwen"])
def test_a_thought_the_student_drops_is_not_aligned_and_the_text_is(voices: dict[str, Voice], teacher: str):
    thought, text = "He says hello. I say it back.", "Hello, hello world 三百"
    conversation = answered(Thinking(thought), Text(text), effort=Effort.HIGH)
    s, t = voices["llama"].render(conversation), voices[teacher].render(conversation)
    text_at = len("Hi".encode()) + 1 + len(thought.encode()) + 1
    both = boundaries(s, t)
    assert starts(t, both.teacher_C)[0] == text_at
    assert (t.learn_T & (t.starts_T >= 0) & (t.starts_T < text_at)).sum() > 5, "the teacher learns its thought"
    without = answered(Text(text))
    plain_s, plain_t = voices["llama"].render(without), voices[teacher].render(without)
    moved = len(thought.encode()) + 1
    assert starts(s, both.student_C) == [k + moved for k in starts(plain_s, boundaries(plain_s, plain_t).student_C)]
    assert spans(s, t).one_to_one == spans(plain_s, plain_t).one_to_one


def test_two_that_think_are_aligned_in_the_thought_too(voices: dict[str, Voice]):
    conversation = answered(Thinking("one two three"), Text("one two three"), effort=Effort.HIGH)
    s, t = voices["qwen"].render(conversation), voices["gpt-oss"].render(conversation)
    at = starts(s, boundaries(s, t).student_C)
    text_at = len("Hi") + 1 + len("one two three") + 1
    in_thought, in_text = [k - 3 for k in at if k < text_at], [k - text_at for k in at if k >= text_at]
    assert in_thought == in_text[:-1], "the text has the stop token besides"
    assert len(in_thought) > 1


def test_an_empty_answer_has_its_stop_alone(voices: dict[str, Voice]):
    for s in FAMILIES:
        for t in FAMILIES:
            one, two = voices[s].render(answered(Text(""))), voices[t].render(answered(Text("")))
            assert len(pairs_of(one, two)) == 1
            assert spans(one, two).one_to_one == 1


@given(text=texts, cut=st.integers(0, 30))
def test_spans_are_as_fine_as_the_boundaries_allow(voices: dict[str, Voice], text: str, cut: int):
    """No boundary lies inside a span."""
    assume(text.strip())
    conversation = answered(Text(text))
    s, t = voices["gemma"].render(conversation), voices["llama"].render(conversation)
    firsts = set(boundaries(s, t).student_C.tolist())
    for a, b in spans(s, t).student_C2.tolist():
        assert a in firsts
        assert not firsts & set(range(a + 1, b))
