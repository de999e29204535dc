"""What a teacher says of a student's own tokens: its own template's rows at the common boundaries, and stretches between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_engines import opened
from test_rollouts import STUDENT, TERMS, bridge, pair

from persea.align import align
from persea.beside import Pair
from persea.chat import Conversation, Text, Tokens
from persea.engines import Abilities, Engine, Failed
from persea.errors import RecipeError, TeacherError
from persea.rollouts import Rollouts
from persea.rows import RowKind, Rows
from persea.voice import Voice

ANSWERS = ("two words and 1234 cats", "你好，世界", "def f(x):\n    return x")


def spoken(name: str, *answers: str) -> list[tuple[Tokens, Tokens]]:
    """Answers in the student's tokens and in the teacher's."""
    talks = [Conversation.ask("question").answered(Text(a)) for a in answers or ANSWERS]
    effort = pair(name).teacher.effort
    return [(opened(STUDENT)[0].render(t), opened(name)[0].render(replace(t, effort=effort))) for t in talks]


def dense(name: str, tokens: Tokens, voice: Voice) -> torch.Tensor:
    """The plain forward: log-probabilities of each learned token's row."""
    with torch.inference_mode():
        logits = opened(name)[1](input_ids=torch.from_numpy(tokens.ids_T)[None].long()).logits[0, :, :len(voice.vocabulary)]
    return torch.log_softmax(logits.double(), -1)[np.flatnonzero(tokens.learn_T) - 1]


@dataclass(frozen=True)
class InPieces:
    """An engine that hands over two rows at a time."""

    real: Engine

    def pieces(self, sequences: Sequence[np.ndarray], learn: Sequence[np.ndarray]) -> Iterator[tuple[int, torch.Tensor]]:
        for k, some in self.real.pieces(sequences, learn):
            for piece in torch.split(some, 2):
                yield k, piece


def cut(name: str) -> Pair:
    whole = pair(name)
    return Pair(replace(whole.teacher, engine=InPieces(whole.teacher.engine)), whole.bridge)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["qwen-sapling", "gpt-oss-sapling"])
def test_rows_are_the_teachers_own_at_every_common_boundary(name: str) -> None:
    some, voice = spoken(name), opened(name)[0]
    for found in (pair(name).rows(some), cut(name).rows(some)):
        want, first = [], 0
        for own, theirs in some:
            both = align([own], [theirs]).boundaries
            place, row = np.cumsum(own.learn_T) - 1, np.cumsum(theirs.learn_T) - 1
            rows = dense(name, theirs, voice)
            want += [(first + int(place[s]), rows[row[t]]) for s, t in zip(both.student_C, both.teacher_C, strict=True)]
            first += int(own.learn_T.sum())
        assert found.place_C.tolist() == [place for place, _ in want]
        assert torch.allclose(found.logprobs_CW.double(), torch.stack([row for _, row in want]), atol=1e-4)
        assert found.student_dead is not None and len(found.student_dead.row_D)


def test_a_position_where_no_event_is_left_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    some, here = spoken("qwen-sapling", ANSWERS[0]), pair("qwen-sapling")
    whole, mask, asked = here.rows(some), bridge("qwen-sapling").student_mask, list[int]()

    def gone(self: Pair, which: Any, context: int) -> np.ndarray:
        asked.extend([context] if which is mask else [])
        return np.arange(len(opened(STUDENT)[0].vocabulary)) if which is mask and context == asked[0] else np.empty(0, np.int64)

    monkeypatch.setattr(Pair, "gone", gone)
    less = here.rows(some)
    n = asked.count(asked[0])
    assert 0 < n < len(whole.place_C)
    assert len(less.place_C) == len(less.logprobs_CW) == len(whole.place_C) - n


@pytest.mark.parametrize("name", ["qwen-sapling", "gemma-sapling"])
def test_chunks_by_a_walk_over_the_spans(name: str) -> None:
    some, voice, lies = spoken(name), opened(name)[0], bridge(name)
    student, teacher = lies.student_mask, lies.teacher_mask
    assert student is not None and teacher is not None
    for found, dead in (pair(name).chunks(some), cut(name).chunks(some)):
        values, members, ends, begins, gone, first = [], [], [], [], set[tuple[int, int]](), 0
        for own, theirs in some:
            laid, rows = align([own], [theirs]), dense(name, theirs, voice)
            place, row = np.cumsum(own.learn_T) - 1, np.cumsum(theirs.learn_T) - 1
            boundary = dict(zip(laid.boundaries.student_C.tolist(), laid.boundaries.teacher_C.tolist(), strict=True))

            def beta(s: int) -> float:
                t = np.array([boundary[s]])  # noqa: B023
                gone.update((first + int(place[s]), int(v)) for v in student.dead(int(student.keeper.inner(theirs, t)[0])))  # noqa: B023
                lost = teacher.dead(int(teacher.keeper.inner(own, np.array([s]))[0]))  # noqa: B023
                return float(torch.log1p(-rows[row[boundary[s]], lost].exp().sum()))  # noqa: B023

            for (s0, s1), (t0, t1) in zip(laid.spans.student_C2.tolist(), laid.spans.teacher_C2.tolist(), strict=True):
                said = sum(float(rows[row[t], int(theirs.ids_T[t])]) for t in range(t0, t1))
                values.append(said - beta(s0) + (beta(s1) if s1 in boundary else 0))
                members.append([first + int(place[s]) for s in range(s0, s1)])
                begins.append(first + int(place[s0]))
                ends.append(first + int(place[s1]) if s1 in boundary else -1)
            first += int(own.learn_T.sum())
        assert found.teacher_C.tolist() == pytest.approx(values, abs=1e-3)
        assert [found.position_P[found.chunk_P == k].tolist() for k in range(len(values))] == members
        assert (found.begin_C.tolist(), found.end_C.tolist()) == (begins, ends)
        assert set(zip(dead.row_D.tolist(), dead.token_D.tolist(), strict=True)) == gone
        assert len(dead.row_D) == len(gone)
        assert gone or name == "gemma-sapling", "something cannot stand"


@dataclass(frozen=True)
class Naming:
    """An engine that names the likeliest tokens, as a server does."""

    real: Engine
    top: int
    fails: bool = False

    @property
    def abilities(self) -> Abilities:
        return Abilities(RowKind.TOPK_REST, self.top)

    def named(self, sequences: Sequence[np.ndarray], learn: Sequence[np.ndarray]) -> Iterator[Rows | Failed]:
        for ids, wanted, logs_NW in zip(sequences, learn, self.real.score(sequences, learn), strict=True):
            if self.fails:
                yield Failed("500")
                continue
            order = np.sort(logs_NW.topk(self.top, -1).indices.numpy(), 1)
            real = logs_NW[range(len(logs_NW)), ids[wanted].astype(np.int64)].numpy()
            yield Rows(np.arange(len(order) + 1) * self.top, order.reshape(-1).astype(np.int32),
                       np.exp(np.take_along_axis(logs_NW.numpy(), order, 1)).reshape(-1), real, RowKind.TOPK_REST)


def naming(name: str, top: int, fails: bool = False) -> Pair:
    whole = pair(name)
    return Pair(replace(whole.teacher, engine=Naming(whole.teacher.engine, top, fails)), whole.bridge)  # type: ignore[arg-type]


def test_a_server_that_names_tokens_can_teach_chunks() -> None:
    name = "qwen-sapling"
    some, (whole, dead) = spoken(name), pair(name).chunks(spoken(name))
    every, same = naming(name, len(opened(name)[0].vocabulary)).chunks(some)
    assert torch.allclose(every.teacher_C, whole.teacher_C, atol=1e-4)
    assert torch.equal(same.token_D, dead.token_D) and torch.equal(every.position_P, whole.position_P)
    few, _ = naming(name, 5).chunks(some)
    assert torch.isfinite(few.teacher_C).all()
    assert (few.teacher_C - whole.teacher_C).abs().max() < 0.5  # of what cannot stand only what is named is taken out
    with pytest.raises(TeacherError, match="could not be scored: 500"):
        naming(name, 5, fails=True).chunks(some)


@pytest.mark.parametrize(("kind", "objective", "why"), [
    (RowKind.TOPK_REST, "events", "reverse KL over events needs whole ones"), (RowKind.WORDS, "chunk", "words alone"),
    (RowKind.TOPK_REST, "chunk", "")])
def test_a_teacher_that_knows_too_little_is_refused(kind: RowKind, objective: str, why: str) -> None:
    engine = SimpleNamespace(abilities=Abilities(kind, 5))
    pairs = {"far": Pair(replace(pair("qwen-sapling").teacher, engine=engine), bridge("qwen-sapling"))}  # type: ignore[arg-type]
    make = partial(Rollouts, None, (), pairs, TERMS.model_copy(update={"objective": objective}), 2, 0, 512)
    if why:
        with pytest.raises(RecipeError, match=why):
            make()
    else:
        assert make().state() == b""
