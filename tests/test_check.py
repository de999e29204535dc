"""What a pairing is worth is counted right, and one that is worth nothing is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from conftest import FAMILIES, Speaker
from hypothesis import given
from hypothesis import strategies as st

from persea.bridge import Bridge, build
from persea.chat import Conversation, Effort, Text, Thinking
from persea.check import Pairing, check, refuse_below
from persea.errors import DataError, Refused
from persea.voice import Voice

FRAGMENTS = ["Hello", " two words", "\n", "1234", "你好，世界", "สวัสดี", "မင်္ဂလာပါ", "x = [1]", "  ", "👩‍👩‍👧"]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=5).map("".join)


class Pair(tuple[Voice, Voice, Bridge]):
    """Teacher, student, bridge; hypothesis prints its arguments, and a vocabulary is long."""

    def __repr__(self) -> str:
        return f"Pair({self[0].family.name}, {self[1].family.name})"


@pytest.fixture(scope="module")
def pair_of(tiny_of: Callable[[str], Speaker]) -> Callable[[str, str], Pair]:
    pairs: dict[tuple[str, str], Pair] = {}

    def of(teacher: str, student: str) -> Pair:
        if (teacher, student) not in pairs:
            t, s = tiny_of(teacher).voice, tiny_of(student).voice
            pairs[teacher, student] = Pair((t, s, build(t, s)))
        return pairs[teacher, student]

    return of


@pytest.fixture(scope="module", params=["qwen", "gemma", "gpt-oss"])
def to_llama(request: pytest.FixtureRequest, pair_of: Callable[[str, str], Pair]) -> Pair:
    return pair_of(request.param, "llama")


def answered(*said: str) -> list[Conversation]:
    return [Conversation.ask("Hi").answered(Text(text)) for text in said]


def pairing(pair: Pair, conversations: list[Conversation]) -> Pairing:
    teacher, student, bridge = pair
    return check("teacher", teacher, student, bridge, "languages", conversations)


@given(said=st.lists(texts, min_size=1, max_size=4))
def test_shares_are_counted_token_by_token(to_llama: Pair, said: list[str]):
    teacher, student, bridge = to_llama
    found = pairing(to_llama, answered(*said))
    learned = common = differ = spans = ones = 0
    for conversation in answered(*said):
        s, t = student.render(conversation), teacher.render(conversation)
        learned += int(s.learn_T.sum())
        # (begins, stops) -> token and end, by plain dictionaries
        at_s, at_t = ({(int(x.starts_T[k]), bool(x.starts_T[k] == x.ends_T[k])): (int(x.ids_T[k]), int(x.ends_T[k]))
                       for k in np.flatnonzero(x.learn_T) if x.starts_T[k] >= 0} for x in (s, t))
        both = sorted(at_s.keys() & at_t.keys())
        common += len(both)
        differ += sum(bridge.student_event_V[at_s[k][0]] != bridge.teacher_event_W[at_t[k][0]] for k in both)
        last = [max(v[1] for v in x.values()) for x in (at_s, at_t)]
        closed = both if last[0] == last[1] else both[:-1]  # a rim that one side trims: the span it stands in does not count
        spans += len(closed)
        ones += sum(at_s[k][1] == at_t[k][1] for k in closed)
    assert (found.teacher, found.skill, found.conversations, found.tokens) == ("teacher", "languages", len(said), learned)
    assert found.boundary == pytest.approx(common / learned)
    assert found.disagreement == pytest.approx(differ / max(1, common))
    assert found.one_to_one == pytest.approx(ones / max(1, spans))
    assert found.boundary + found.cross_entropy_only == pytest.approx(1)
    assert all(0 <= x <= 1 for x in (found.boundary, found.one_to_one, found.disagreement))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_voice_agrees_with_itself(pair_of: Callable[[str, str], Pair], family: str):
    pair = pair_of(family, family)
    conversations = answered("Hello, two words.", "你好，世界 1234", "မင်္ဂလာပါ", "")
    found = pairing(pair, conversations)
    assert found.one_to_one == 1
    assert found.disagreement == 0
    rendered = [pair[0].render(c) for c in conversations]
    markers = sum(int((r.learn_T & (r.starts_T < 0)).sum()) for r in rendered)  # gpt-oss writes its channel itself
    assert (markers > 0) == (family == "gpt-oss")
    assert found.boundary == pytest.approx(1 - markers / found.tokens)


def test_no_conversation_is_nothing(pair_of: Callable[[str, str], Pair]):
    found = pairing(pair_of("qwen", "llama"), [])
    assert (found.conversations, found.tokens, found.boundary, found.cross_entropy_only, found.disagreement) == (0, 0, 0, 1, 0)


def test_disagreement_is_seen(pair_of: Callable[[str, str], Pair]):
    """Half of the teacher's events moved to another number: the rows on them disagree, and nothing else changes."""
    teacher, student, bridge = pair_of("qwen", "llama")
    conversations = answered("Hello, two words.", "你好，世界 1234")
    before = pairing(Pair((teacher, student, bridge)), conversations)
    moved = np.where(np.arange(len(bridge.teacher_event_W)) % 2 == 0, bridge.teacher_event_W, (bridge.teacher_event_W + 1) % bridge.events)
    after = pairing(Pair((teacher, student, replace(bridge, teacher_event_W=moved.astype(np.int32)))), conversations)
    assert before.disagreement < 0.1
    assert 0.2 < after.disagreement < 0.8
    assert replace(after, disagreement=before.disagreement) == before


def test_a_dropped_thought_is_no_part_of_the_share(pair_of: Callable[[str, str], Pair]):
    """llama cannot think: its shares are those of the answer alone."""
    asked = Conversation.ask("Hi", effort=Effort.HIGH)
    with_thought = [asked.answered(Thinking("A greeting, I greet back."), Text("Hello there"))]
    found = pairing(pair_of("gpt-oss", "llama"), with_thought)
    assert found == pairing(pair_of("gpt-oss", "llama"), [asked.answered(Text("Hello there"))])
    assert found.boundary > 0.3


def test_to_json_is_json(pair_of: Callable[[str, str], Pair]):
    found = pairing(pair_of("gemma", "llama"), answered("Hello"))
    assert Pairing(**json.loads(json.dumps(found.to_json()))) == found


def test_bytes_that_cannot_be_located_are_refused(pair_of: Callable[[str, str], Pair]):
    with pytest.raises(DataError, match="does not give the text back"):
        pairing(pair_of("gemma", "llama"), answered("a literal ▁"))


def test_below_the_floor_is_refused(pair_of: Callable[[str, str], Pair]):
    good = pairing(pair_of("qwen", "llama"), answered("Hello, two words."))
    bad = replace(good, teacher="far-away", skill="code", boundary=0.29, cross_entropy_only=0.71)
    refuse_below([good, replace(bad, boundary=0.3)], 0.3)  # just on the floor stands
    refuse_below([], 1.0)
    with pytest.raises(Refused, match=r"29% of the student's tokens .* \(floor 30%\)") as caught:
        refuse_below([good, bad], 0.3)
    assert caught.value.exit_code == 4
    assert caught.value.where == "far-away -> student, code"
    assert "check.floor" in caught.value.remedy
