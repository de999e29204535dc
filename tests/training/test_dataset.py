"""Batches say of every learned token who taught it and where its distribution stands, the same
whoever asks, and when.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import persea.training.dataset as dataset_module
import persea.training.example as example_module
from persea.alignment.event_map import EventMap, build_event_map
from persea.alignment.spans import common_boundaries
from persea.alignment.token_order import UNRESTRICTED_CONTEXT
from persea.cache.unit import CachedAnswer
from persea.chat.messages import Conversation, FinishReason, Text, Thinking, ThinkingEffort
from persea.chat.renderer import ChatRenderer
from persea.distributions import SparseDistributions
from persea.errors import DataError
from persea.losses import event_kl_loss
from persea.teachers.teacher import Answer
from persea.training.dataset import Batch, DistillDataset, build_dataset
from persea.training.example import Example, build_example
from persea.training.loss_balancing import Group
from tests.conftest import FAMILIES, Speaker

render_answer = example_module.render_answer
TEXTS = [
    "Hello",
    " two words",
    "\n",
    "1234 cats",
    "你好，世界",
    "สวัสดีชาวโลก",
    "မင်္ဂလာပါ",
    "def f(x):\n    return x",
    "tiếng Việt",
    "👩‍👩‍👧",
    "isn't",
    "  ",
]
TEACHERS = ("qwen", "gemma", "gpt-oss")
texts = st.lists(st.sampled_from(TEXTS), min_size=1, max_size=5).map("".join)


class Voices(dict[str, ChatRenderer]):
    """Family -> voice; hypothesis prints its arguments, and a vocabulary is long."""

    def __repr__(self) -> str:
        return f"Voices({', '.join(self)})"


@pytest.fixture(scope="module")
def voices(tiny_of: Callable[[str], Speaker]) -> Voices:
    return Voices({family: tiny_of(family).renderer for family in FAMILIES})


@pytest.fixture(scope="module")
def bridges(voices: Voices) -> dict[str, EventMap]:
    return {name: build_event_map(voices[name], voices["llama"]) for name in TEACHERS}


def captured(
    voice: ChatRenderer, name: str, number: int, conversation: Conversation
) -> CachedAnswer:
    """A capture whose rows can be told apart: row n of it holds 0 to 3 entries, the first of
    probability (number + n/1000)/1000.
    """
    tokens = voice.render(conversation)
    rng = np.random.default_rng(number)
    sizes = rng.integers(0, 4, int(tokens.loss_mask_T.sum()))
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    probs = [
        (number + n / 1000) / 1000 + 0.1 * k for n, size in enumerate(sizes) for k in range(size)
    ]
    rows = SparseDistributions(
        offsets,
        rng.integers(0, len(voice.vocabulary), offsets[-1]).astype(np.int32),
        np.array(probs, np.float32),
        np.full(len(sizes), np.nan, np.float32),
    )
    return CachedAnswer(
        Answer(f"p{number}", name, "languages", "", conversation, FinishReason.STOP), tokens, rows
    )


def asked(text: str, thought: str = "", number: int = 0) -> Conversation:
    conversation = Conversation.from_question(
        f"question {number}", effort=ThinkingEffort.HIGH if thought else ThinkingEffort.NONE
    )
    return conversation.with_answer(*((Thinking(thought),) if thought else ()), Text(text))


def captures_of(voices: Voices, n: int) -> list[CachedAnswer]:
    """n captures of three teachers, one conversation each, no two alike."""
    out = []
    for k in range(n):
        name = TEACHERS[k % 3]
        thought = "He asks." if k % 4 == 2 and name != "gemma" else ""
        text = TEXTS[k % len(TEXTS)] + TEXTS[(k * 5 + 1) % len(TEXTS)] + f"x{k}"
        out.append(captured(voices[name], name, k, asked(text, thought, k)))
    return out


class Held(tuple[CachedAnswer, ...]):
    """Captures in memory, in an order as a cache has one."""

    __slots__ = ()

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(len(self))


def one(captures: Iterable[CachedAnswer]) -> list[tuple[Held, float]]:
    """A single cache."""
    return [(Held(captures), 1.0)]


def lessons_of(feed: DistillDataset) -> list[Example]:
    """All of them, cache by cache, in the order of the captures."""
    return [
        feed.example_of(reader, k) for reader in feed.mixture.readers for k in range(len(reader))
    ]


def flow(
    voices: Voices,
    bridges: dict[str, EventMap],
    n: int = 7,
    size: int = 3,
    seed: int = 0,
    max_length: int = 512,
) -> DistillDataset:
    return build_dataset(
        one(captures_of(voices, n)),
        voices["llama"],
        bridges,
        batch_size=size,
        seed=seed,
        max_length=max_length,
    )


def same(one: Batch, two: Batch) -> bool:
    def tensors(b: Batch) -> list[torch.Tensor]:
        return [
            b.ids_BS,
            b.mask_BS,
            b.row_N,
            b.position_N,
            b.labels_N,
            *(x for t in b.targets for x in (t.row_M, t.probs_M, t.entry_G, t.token_G)),
        ]

    return (
        one.tokens_by_group == two.tokens_by_group
        and len(one.targets) == len(two.targets)
        and all(
            a.dtype == b.dtype and torch.equal(a, b)
            for a, b in zip(tensors(one), tensors(two), strict=True)
        )
    )


def lessons_in(feed: DistillDataset, batch: Batch) -> list[int]:
    """Which lessons a batch holds, read off its ids: no two lessons are alike."""
    lessons = lessons_of(feed)
    of_ids = {tuple(lesson.tokens.ids_T.tolist()): k for k, lesson in enumerate(lessons)}
    assert len(of_ids) == len(lessons)
    return [
        of_ids[tuple(ids[: int(mask.sum())].tolist())]
        for ids, mask in zip(batch.ids_BS, batch.mask_BS, strict=True)
    ]


# ---- order ---------------------------------------------------------------------------------------


def test_a_batch_is_the_same_whoever_asks_and_when(voices: Voices, bridges: dict[str, EventMap]):
    one, two = flow(voices, bridges), flow(voices, bridges)
    forwards = {k: one.batch(k) for k in range(9)}
    for k in (8, 3, 3, 0, 7):
        assert same(two.batch(k), forwards[k])
    assert not same(one.batch(0), one.batch(1))
    other = flow(voices, bridges, seed=1)
    assert [lessons_in(other, other.batch(k)) for k in range(5)] != [
        lessons_in(one, forwards[k]) for k in range(5)
    ]


@pytest.mark.parametrize(("n", "size"), [(7, 3), (6, 3), (5, 5), (3, 8), (1, 2), (9, 1)])
def test_every_lesson_once_an_epoch(
    voices: Voices, bridges: dict[str, EventMap], n: int, size: int
):
    feed = flow(voices, bridges, n, size)
    order = [k for step in range(-(-4 * n // size)) for k in lessons_in(feed, feed.batch(step))][
        : 4 * n
    ]
    epochs = [order[begin : begin + n] for begin in range(0, 4 * n, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n >= 5:
        assert len({tuple(epoch) for epoch in epochs}) > 1, "each epoch in an order of its own"


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_parts_of_a_batch_are_together_the_batch(
    voices: Voices, bridges: dict[str, EventMap], parts: int
):
    feed = flow(voices, bridges, 9, 4)
    for step in range(3):
        some = [feed.batch(step, part, parts) for part in range(parts)]
        assert [k for batch in some for k in lessons_in(feed, batch)] == lessons_in(
            feed, feed.batch(step)
        )
        assert sum(len(batch.labels_N) for batch in some) == len(feed.batch(step).labels_N)
        assert all(len(batch.group_B) == len(batch.ids_BS) > 0 for batch in some)


def test_what_is_set_aside_is_never_learned(voices: Voices, bridges: dict[str, EventMap]):
    feed = flow(voices, bridges, 9, 2)
    learned, held = feed.train_test_split(0.4)
    assert (len(learned), len(held)) == (5, 4)
    ids = [
        sorted(said.tokens.ids_T.tobytes() for said in lessons_of(some))
        for some in (feed, learned, held)
    ]
    assert sorted(ids[1] + ids[2]) == ids[0]
    assert [said.tokens.ids_T.tobytes() for said in lessons_of(feed.train_test_split(0.4)[1])] == [
        said.tokens.ids_T.tobytes() for said in lessons_of(held)
    ]
    with pytest.raises(
        DataError,
        match=r"training\.validation_share: 9 examples are too few to hold out 8 and train on",
    ):
        flow(voices, bridges, 9, 8).train_test_split(0.1)


def test_too_long_answers_are_counted_and_left_out(voices: Voices, bridges: dict[str, EventMap]):
    whole = flow(voices, bridges, 9)
    assert (
        whole.stats.too_long,
        sum(whole.stats.examples.values()),
        sum(whole.stats.skipped.values()),
    ) == (0, 9, 0)
    lengths = sorted(len(lesson.tokens) for lesson in lessons_of(whole))
    limit = lengths[4]
    feed = flow(voices, bridges, 9, max_length=limit)
    kept = [len(lesson.tokens) for lesson in lessons_of(feed)]
    assert (
        len(kept) == sum(feed.stats.examples.values()) == sum(length <= limit for length in lengths)
    )
    assert max(kept) == limit, "a lesson of just the limit stays, whole"
    assert feed.stats.too_long == sum(feed.stats.skipped.values()) == 9 - len(kept) > 0
    with pytest.raises(
        DataError,
        match=f"no answer is left: 9 have more than {lengths[0] - 1} tokens, 0 cannot be written",
    ) as caught:
        flow(voices, bridges, 9, max_length=lengths[0] - 1)
    assert "training.max_length" in caught.value.remedy
    with pytest.raises(DataError, match="no answer is left: 0 have"):
        flow(voices, bridges, 0)


def test_modes_and_thoughts_that_are_not_learned_are_counted(
    voices: Voices, bridges: dict[str, EventMap]
):
    modes = (None, ThinkingEffort.NONE, ThinkingEffort.HIGH, ThinkingEffort.HIGH, None)
    thoughts = ("", "hm, so.", "hm, so.", "hm, so.", "hm, so.")
    made = [
        captured(voices["gpt-oss"], "gpt-oss", k, asked(f"x{k}", thought, k))
        for k, thought in enumerate(thoughts)
    ]
    made = [
        replace(c, answer=replace(c.answer, effort=mode))
        for c, mode in zip(made, modes, strict=True)
    ]
    told = build_dataset(
        one(made), voices["llama"], bridges, batch_size=1, seed=0, max_length=512
    ).stats.to_json()
    assert (told["efforts"], told["thinking_dropped"]) == ({"none": 3, "high": 2}, 2)


def test_an_answer_the_student_cannot_say_is_left_out_with_its_reason(voices: Voices):
    bridges = {"llama": build_event_map(voices["llama"], voices["gemma"])}
    captures = [
        captured(
            voices["llama"], "llama", k, Conversation.from_question(f"q{k}").with_answer(Text(text))
        )
        for k, text in enumerate(("a b", "a\u2581b"))
    ]
    feed = build_dataset(
        one(captures), voices["gemma"], bridges, batch_size=1, seed=0, max_length=512
    )
    told = feed.stats
    assert (len(lessons_of(feed)), told.unrenderable, told.examples, told.skipped) == (
        1,
        1,
        {"llama": 1},
        {"llama": 1},
    )
    assert (
        captures[1].answer.prompt_id in told.reasons[0]
        and "does not reproduce the text" in told.reasons[0]
    )
    with pytest.raises(DataError, match="1 cannot be written"):
        build_dataset(
            one(captures[1:]), voices["gemma"], bridges, batch_size=1, seed=0, max_length=512
        )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda rows: replace(rows, probs_M=np.full_like(rows.probs_M, np.nan)),
            "a teacher's probability is nan",
        ),
        (lambda rows: replace(rows, probs_M=rows.probs_M + 5), "a teacher's probability is 5"),
        (lambda rows: replace(rows, ids_M=rows.ids_M + 100_000), "is outside the vocabulary"),
    ],
)
def test_a_broken_row_is_refused_and_not_left_out(
    voices: Voices,
    bridges: dict[str, EventMap],
    change: Callable[[SparseDistributions], SparseDistributions],
    reason: str,
):
    captures = captures_of(voices, 3)
    assert len(captures[1].distributions.ids_M)
    captures[1] = replace(captures[1], distributions=change(captures[1].distributions))
    with pytest.raises(DataError, match=reason):
        build_dataset(one(captures), voices["llama"], bridges, batch_size=1, seed=0, max_length=512)


def test_caches_are_mixed_by_share_and_each_is_read_epoch_after_epoch(
    voices: Voices, bridges: dict[str, EventMap]
):
    """What is left out of a cache changes nothing of its share; a cache of which nothing is left
    has none.
    """
    captures = captures_of(voices, 12)
    parts = [Held(c for c in captures if c.answer.teacher == name) for name in TEACHERS]
    feed = build_dataset(
        list(zip(parts, (60, 30, 10), strict=True)),
        voices["llama"],
        bridges,
        batch_size=5,
        seed=0,
        max_length=512,
    )
    assert feed.stats.examples == dict.fromkeys(TEACHERS, 4)
    drawn = [feed.example(k) for k in range(200)]
    counts = Counter(d.teacher for d in drawn)
    assert all(abs(counts[name] - n) <= 1 for name, n in zip(TEACHERS, (120, 60, 20), strict=True))
    for name in TEACHERS:
        mine = [d.tokens.ids_T.tobytes() for d in drawn if d.teacher == name]
        epochs = [mine[k : k + 4] for k in range(0, len(mine) - 3, 4)]
        assert all(set(epoch) == set(epochs[0]) and len(set(epoch)) == 4 for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1
    long = [replace(c, answer=replace(c.answer, conversation=asked("x " * 600))) for c in parts[0]]
    left = build_dataset(
        [(Held(long), 60), (parts[1], 30)],
        voices["llama"],
        bridges,
        batch_size=5,
        seed=0,
        max_length=512,
    )
    assert {left.example(k).teacher for k in range(20)} == {"gemma"}
    assert (left.stats.skipped, left.stats.too_long) == ({"qwen": 4}, 4)


def test_parts_of_a_batch_are_the_batch(voices: Voices, bridges: dict[str, EventMap]):
    feed = flow(voices, bridges, 7, size=5)
    whole = feed.batch(2)
    assert whole.group_B == tuple(
        Group(feed.example(10 + k).teacher, feed.example(10 + k).skill) for k in range(5)
    )
    for parts in (1, 2, 3, 5):
        some = [feed.batch(2, part, parts) for part in range(parts)]
        assert [group for one in some for group in one.group_B] == list(whole.group_B)
        assert torch.equal(torch.cat([one.labels_N for one in some]), whole.labels_N)


def test_a_share_of_the_lessons_is_held_out_in_whole_batches(
    voices: Voices, bridges: dict[str, EventMap]
):
    captures = captures_of(voices, 12)
    caches = [
        (Held(c for c in captures if c.answer.teacher == name), share)
        for name, share in zip(TEACHERS, (60, 30, 10), strict=True)
    ]
    feed = build_dataset(caches, voices["llama"], bridges, batch_size=2, seed=1, max_length=512)
    learned, held = feed.train_test_split(0.3)
    ids = [{one.tokens.ids_T.tobytes() for one in lessons_of(side)} for side in (learned, held)]
    assert (len(feed), len(learned), len(held)) == (12, 8, 4)
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 12
    assert {learned.example(k).tokens.ids_T.tobytes() for k in range(100)} == ids[0]
    assert {held.example(k).tokens.ids_T.tobytes() for k in range(12)} == ids[1]
    assert [one.tokens.ids_T.tobytes() for one in lessons_of(feed.train_test_split(0.3)[1])] == [
        one.tokens.ids_T.tobytes() for one in lessons_of(held)
    ]
    with pytest.raises(DataError, match="12 examples are too few to hold out 12"):
        feed.train_test_split(0.95)


def test_only_the_last_lessons_are_kept_and_what_is_made_anew_is_the_same(
    voices: Voices, bridges: dict[str, EventMap], monkeypatch: pytest.MonkeyPatch
):
    whole = flow(voices, bridges, 9)
    before = [whole.batch(k) for k in range(6)]
    assert len(whole._example_cache) == 9
    made: list[str] = []
    monkeypatch.setattr(
        example_module,
        "render_answer",
        lambda answer, renderer: (
            made.append(answer.answer.prompt_id) or render_answer(answer, renderer)
        ),
    )
    weights = [dataset_module._cache_cost(x) for x in lessons_of(whole)]
    monkeypatch.setattr(dataset_module, "EXAMPLE_CACHE_TOKENS", sum(sorted(weights)[-3:]))
    few = flow(voices, bridges, 9)
    made.clear()
    for k in range(6):
        assert same(few.batch(k), before[k])
        assert (
            few._cache_tokens
            == sum(map(dataset_module._cache_cost, few._example_cache.values()))
            <= dataset_module.EXAMPLE_CACHE_TOKENS
        )
    assert len(made) > 9, "some were made twice"


# ---- one lesson ----------------------------------------------------------------------------------


@given(
    text=texts,
    thought=st.sampled_from(["", "He says hello.", "三百四十二 x"]),
    teacher=st.sampled_from(TEACHERS),
)
def test_a_lesson_has_each_boundarys_row(
    voices: Voices, bridges: dict[str, EventMap], text: str, thought: str, teacher: str
):
    """Entry by entry, by a walk over the boundaries; masks drop just what their own definition
    drops.
    """
    capture = captured(voices[teacher], teacher, 0, asked(text, thought))
    bridge = bridges[teacher]
    said = build_example(capture, voices["llama"], bridge)
    assert (
        said.tokens.ids_T.tolist()
        == voices["llama"]
        .render(replace(asked(text, thought), effort=ThinkingEffort.NONE))
        .ids_T.tolist()
    )
    assert (said.teacher, said.skill, said.language) == (teacher, "languages", "")
    learned_S, learned_T = (
        np.flatnonzero(x.loss_mask_T).tolist() for x in (said.tokens, capture.tokens)
    )
    both = common_boundaries(said.tokens, capture.tokens)
    plain, masked, exceptions = (
        Counter[tuple[int, int, float]](),
        Counter[tuple[int, int, float]](),
        0,
    )
    for at_s, at_t in zip(both.student_C.tolist(), both.teacher_C.tolist(), strict=True):
        rows, row = capture.distributions, learned_T.index(at_t)
        contexts = [
            UNRESTRICTED_CONTEXT
            if at - 1 not in learned
            else int(mask.other.context_ids(tokens.ids_T, [at])[0])
            for mask, tokens, at, learned in (
                (bridge.teacher_mask, said.tokens, at_s, learned_S),
                (bridge.student_mask, capture.tokens, at_t, learned_T),
            )
        ]
        dead_W, dead_V = (
            set(bridge.teacher_mask.impossible_tokens(contexts[0]).tolist()),
            set(bridge.student_mask.impossible_tokens(contexts[1]).tolist()),
        )
        for m in range(rows.offsets_N1[row], rows.offsets_N1[row + 1]):
            event = int(bridge.teacher_event_W[rows.ids_M[m]])
            entry = (learned_S.index(at_s), event, float(rows.probs_M[m]))
            members = set(np.flatnonzero(bridge.student_event_V == event).tolist())
            plain[entry] += event >= 0
            if event >= 0 and int(rows.ids_M[m]) not in dead_W and members - dead_V:
                masked[entry] += 1
                exceptions += len(members & dead_V)
    assert (
        Counter(
            zip(
                said.targets.row_M.tolist(),
                said.targets.event_M.tolist(),
                said.targets.probs_M.tolist(),
                strict=True,
            )
        )
        == masked
    )
    assert len(said.targets.impossible_token_D) == exceptions
    unmasked = build_example(
        capture, voices["llama"], replace(bridge, teacher_mask=None, student_mask=None)
    ).targets
    assert (
        Counter(
            zip(
                unmasked.row_M.tolist(),
                unmasked.event_M.tolist(),
                unmasked.probs_M.tolist(),
                strict=True,
            )
        )
        == +plain
    )
    assert not len(unmasked.impossible_token_D)
    # what is told of it
    (row,) = build_dataset(
        one([capture]), voices["llama"], bridges, batch_size=1, seed=0, max_length=9999
    ).stats.to_json()["supervision"]
    assert (row["teacher"], row["language"], row["tokens"]) == (teacher, "", len(learned_S))
    assert row["event"] == pytest.approx(len(both.student_C) / len(learned_S), abs=1e-4)
    assert row["event"] + row["partial_token"] + row["span"] + row["text"] == pytest.approx(
        1, abs=3e-4
    )
    whole = sum(
        float(rows.probs_M[m])
        for at in both.teacher_C.tolist()
        for m in range(*rows.offsets_N1[learned_T.index(at) :][:2].tolist())
    )
    assert row["mass_retained"] == (
        pytest.approx(sum(p * k for (_, _, p), k in masked.items()) / whole, abs=1e-4)
        if whole
        else None
    )


def test_a_thinking_teachers_lesson_answers_at_once(voices: Voices):
    """Effort.NONE in the student's own template, whatever the teacher's effort was."""
    with_thought = asked("yes", "Shall I?")
    said = build_example(
        captured(voices["gpt-oss"], "gpt-oss", 0, with_thought),
        voices["qwen"],
        build_event_map(voices["gpt-oss"], voices["qwen"]),
    )
    assert (
        said.tokens.ids_T.tolist()
        == voices["qwen"].render(replace(with_thought, effort=ThinkingEffort.NONE)).ids_T.tolist()
    )
    assert said.tokens.ids_T.tolist() != voices["qwen"].render(with_thought).ids_T.tolist()


@pytest.mark.parametrize("teacher", ["qwen", "gpt-oss"])
@pytest.mark.parametrize("mode", ThinkingEffort)
def test_a_lesson_is_learned_in_the_mode_it_was_asked_in(
    voices: Voices, bridges: dict[str, EventMap], teacher: str, mode: ThinkingEffort
):
    """The thought has rows of its own, and goes where the mode is to answer at once."""
    talk = asked("It is 1234 cats", "He asks about cats.")
    capture = captured(
        voices[teacher],
        teacher,
        0,
        replace(talk, effort=mode if mode is not ThinkingEffort.NONE else ThinkingEffort.LOW),
    )
    learned = build_example(
        replace(capture, answer=replace(capture.answer, effort=mode)),
        voices["llama"],
        bridges[teacher],
    )
    want = voices["llama"].render(replace(talk, effort=mode))
    assert learned.tokens.ids_T.tolist() == want.ids_T.tolist()
    think = voices["llama"].vocabulary.control_token_ids["<think>"]
    assert (think in learned.tokens.ids_T) is (mode is not ThinkingEffort.NONE)
    begin = len(b"question 0") + 1
    thought = {
        n
        for n, k in enumerate(want.starts_T[want.loss_mask_T].tolist())
        if begin <= k < begin + len(b"He asks about cats.")
    }
    assert bool(thought & set(learned.targets.row_M.tolist())) is (mode is not ThinkingEffort.NONE)


# ---- one batch -----------------------------------------------------------------------------------


@given(
    chosen=st.lists(
        st.tuples(st.sampled_from(TEACHERS), texts, st.booleans()), min_size=1, max_size=5
    ),
    size=st.integers(1, 6),
)
def test_a_batch_against_an_oracle(
    voices: Voices, bridges: dict[str, EventMap], chosen: list[tuple[str, str, bool]], size: int
):
    bridges = {
        name: replace(bridge, teacher_mask=None, student_mask=None)
        for name, bridge in bridges.items()
    }
    made = [
        captured(
            voices[name],
            name,
            k,
            asked(text + str(k), "a thought" if thinks and name != "gemma" else "", k),
        )
        for k, (name, text, thinks) in enumerate(chosen)
    ]
    feed = build_dataset(
        one(made), voices["llama"], bridges, batch_size=size, seed=3, max_length=10_000
    )
    batch, lessons = feed.batch(1), lessons_of(feed)
    held = lessons_in(feed, batch)
    assert len(held) == size
    # every learned position, in order, by a walk over conversations and tokens
    rendered = [lessons[k].tokens for k in held]
    want = [
        (b, s - 1, int(tokens.ids_T[s]))
        for b, tokens in enumerate(rendered)
        for s in np.flatnonzero(tokens.loss_mask_T)
    ]
    got = list(
        zip(batch.row_N.tolist(), batch.position_N.tolist(), batch.labels_N.tolist(), strict=True)
    )
    assert got == want
    assert torch.equal(batch.ids_BS[batch.row_N, batch.position_N + 1], batch.labels_N)
    assert (batch.mask_BS[batch.row_N, batch.position_N + 1] == 1).all()
    assert batch.ids_BS.shape[1] == max(len(lessons[k].tokens) for k in held)
    assert all(
        x.dtype == torch.int64
        for x in (batch.ids_BS, batch.mask_BS, batch.row_N, batch.position_N, batch.labels_N)
    )
    for b, k in enumerate(held):
        length = len(lessons[k].tokens)
        assert batch.mask_BS[b].tolist() == [1] * length + [0] * (batch.ids_BS.shape[1] - length)
    # what the teachers say, by bytes: the row of the teacher's token that begins where the learned
    # token begins
    said: Counter[tuple[str, int, int, float]] = Counter()
    for n, (b, at, _) in enumerate(want):
        capture, tokens = made[held[b]], lessons[held[b]].tokens
        begins = int(tokens.starts_T[at + 1])
        stops = tokens.starts_T[at + 1] == tokens.ends_T[at + 1]
        for row, token in enumerate(np.flatnonzero(capture.tokens.loss_mask_T)):
            if (
                begins >= 0
                and capture.tokens.starts_T[token] == begins
                and stops == (capture.tokens.ends_T[token] == begins)
            ):
                for m in range(
                    capture.distributions.offsets_N1[row], capture.distributions.offsets_N1[row + 1]
                ):
                    said[
                        capture.answer.teacher,
                        n,
                        int(capture.distributions.ids_M[m]),
                        float(capture.distributions.probs_M[m]),
                    ] += 1
    names = list(dict.fromkeys(made[k].answer.teacher for k in held))
    found = Counter[tuple[str, int, tuple[int, ...], float]]()
    for name, t in zip(names, batch.targets, strict=True):
        for m, (n, p) in enumerate(zip(t.row_M.tolist(), t.probs_M.tolist(), strict=True)):
            found[name, n, tuple(t.token_G[t.entry_G == m].tolist()), p] += 1
    want_said = Counter[tuple[str, int, tuple[int, ...], float]]()
    for (name, n, i, p), times in said.items():
        event = bridges[name].teacher_event_W[i]
        if event >= 0:
            want_said[
                name, n, tuple(np.flatnonzero(bridges[name].student_event_V == event).tolist()), p
            ] += times
    assert found == want_said
    for t in batch.targets:
        assert (t.row_M.dtype, t.probs_M.dtype, t.entry_G.dtype, t.token_G.dtype) == (
            torch.int64,
            torch.float32,
            torch.int64,
            torch.int64,
        )
    # shares
    share = Counter[Group]()
    for k in held:
        share[Group(made[k].answer.teacher, made[k].answer.skill)] += int(
            lessons[k].tokens.loss_mask_T.sum()
        )
    assert dict(batch.tokens_by_group) == dict(share)
    assert sum(batch.tokens_by_group.values()) == len(batch.labels_N)


def test_a_batch_of_one_teacher_is_taught_by_one(voices: Voices, bridges: dict[str, EventMap]):
    made = [c for c in captures_of(voices, 6) if c.answer.teacher == "gemma"]
    batch = build_dataset(
        one(made), voices["llama"], bridges, batch_size=2, seed=0, max_length=512
    ).batch(0)
    assert len(batch.targets) == 1
    assert batch.targets[0].vocab_size == len(bridges["gemma"].student_event_V)
    assert {group.teacher for group in batch.tokens_by_group} == {"gemma"}
    assert sum(batch.tokens_by_group.values()) == len(batch.labels_N)


def test_an_answer_that_shares_no_boundary_still_teaches_its_words(
    voices: Voices, bridges: dict[str, EventMap]
):
    """No row arrives, cross-entropy stays: an empty answer's stop is the only common boundary, and
    here its row is empty.
    """
    capture = captured(voices["qwen"], "qwen", 1, asked(""))
    learned = int(capture.tokens.loss_mask_T.sum())
    capture = replace(
        capture,
        distributions=SparseDistributions(
            np.zeros(learned + 1, np.int64),
            np.empty(0, np.int32),
            np.empty(0, np.float32),
            np.full(learned, np.nan, np.float32),
        ),
    )
    batch = build_dataset(
        one([capture]), voices["llama"], bridges, batch_size=1, seed=0, max_length=512
    ).batch(0)
    assert len(batch.targets[0].row_M) == 0
    logits = torch.zeros(len(batch.labels_N), len(voices["llama"].vocabulary))
    out = event_kl_loss(logits, batch.labels_N, batch.targets, 0.7)
    assert out.loss.item() == pytest.approx(np.log(logits.shape[1]), rel=1e-6)


def test_a_batch_feeds_the_objective(voices: Voices, bridges: dict[str, EventMap]):
    """A teacher sure of its own words: at the boundaries the loss pulls towards the realised
    tokens' events.
    """
    conversation = asked("two and 1234 cats")
    tokens = voices["qwen"].render(conversation)
    ids = tokens.ids_T[tokens.loss_mask_T].astype(np.int32)
    rows = SparseDistributions(
        np.arange(len(ids) + 1), ids, np.ones(len(ids), np.float32), np.zeros(len(ids), np.float32)
    )
    capture = CachedAnswer(
        Answer("p", "qwen", "languages", "", conversation, FinishReason.STOP), tokens, rows
    )
    batch = build_dataset(
        one([capture]), voices["llama"], bridges, batch_size=1, seed=0, max_length=512
    ).batch(0)
    logits = torch.full((len(batch.labels_N), len(voices["llama"].vocabulary)), -20.0)
    logits[torch.arange(len(batch.labels_N)), batch.labels_N] = 20.0
    assert len(batch.targets[0].row_M) == len(batch.labels_N), (
        "every position of this text is a common boundary"
    )
    assert event_kl_loss(logits, batch.labels_N, batch.targets, 1.0).loss.item() < 1e-3


# ---- a torch dataset -----------------------------------------------------------------------------


def test_it_is_a_dataset_for_a_data_loader(
    voices: Voices, bridges: dict[str, EventMap], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Indices in the order of the answers; padded labels are ignored; teachers give the maps."""
    monkeypatch.setenv("PERSEA_HOME", str(tmp_path))
    captures = captures_of(voices, 7)
    dataset = DistillDataset(
        Held(captures), student=voices["llama"], teachers={name: voices[name] for name in TEACHERS}
    )
    assert len(dataset) == 7
    assert [dataset[k].tokens.ids_T.tolist() for k in range(7)] == [
        build_example(c, voices["llama"], bridges[c.answer.teacher]).tokens.ids_T.tolist()
        for c in captures
    ]
    assert dataset[-1] is dataset[6]
    for index in (7, -8):
        with pytest.raises(IndexError, match=f"example {index} of 7"):
            dataset[index]
    loader = torch.utils.data.DataLoader(dataset, batch_size=3, collate_fn=dataset.collate_fn)
    seen = 0
    for inputs in loader:
        batch = inputs["batch"]
        examples = [dataset[seen + k] for k in range(len(batch.ids_BS))]
        assert same(batch, dataset_module.collate(examples, bridges))
        labels_BS = torch.full_like(batch.ids_BS, -100)
        for b, example in enumerate(examples):
            supervised = np.flatnonzero(example.tokens.loss_mask_T)
            labels_BS[b, supervised] = torch.from_numpy(example.tokens.ids_T[supervised]).long()
        assert torch.equal(inputs["labels"], labels_BS)
        assert torch.equal(inputs["input_ids"], batch.ids_BS)
        assert torch.equal(inputs["attention_mask"], batch.mask_BS)
        rows = [dataset.to_hf_dataset()[seen + k] for k in range(len(examples))]
        assert same(dataset.collate_fn(rows)["batch"], batch)
        assert same(batch.to("cpu"), batch)
        seen += len(examples)
    assert seen == 7
    listed = DistillDataset(captures, student=voices["llama"], event_maps=bridges, seed=4)
    shared = DistillDataset(one(captures), student=voices["llama"], event_maps=bridges, seed=4)
    assert same(listed.batch(0), shared.batch(0))


def test_a_teacher_without_tokenizer_is_an_error(
    voices: Voices, bridges: dict[str, EventMap]
) -> None:
    with pytest.raises(DataError, match=r"answers of qwen, .* -> pass teachers=\{'qwen'"):
        DistillDataset(
            captures_of(voices, 3),
            student=voices["llama"],
            event_maps={"gemma": bridges["gemma"]},
        )


def test_a_teacher_without_a_supervised_token_has_shares_of_zero() -> None:
    """The shares were 0 / 0 = NaN, which no JSON reader takes."""
    none = np.zeros(example_module.NUM_COUNTS)
    stats = dataset_module.DatasetStats({"t": 1}, {}, 0, 0, (), {("t", ""): none}, {}, 0)
    (row,) = json.loads(json.dumps(stats.to_json(), allow_nan=False))["supervision"]
    assert (row["tokens"], row["event"], row["text"], row["mass_retained"]) == (0, 0, 0, None)
