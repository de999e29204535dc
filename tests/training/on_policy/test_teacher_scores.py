"""What a teacher says of a student's own tokens: its own template's rows at the common boundaries,
and stretches between them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from persea.alignment.markers import align_marker_runs
from persea.alignment.spans import align
from persea.chat.messages import Conversation, Text, Thinking, ThinkingEffort
from persea.chat.renderer import ChatRenderer
from persea.distributions import DistributionKind, SparseDistributions
from persea.errors import RecipeError, TeacherError
from persea.losses import LMHead
from persea.tasks.generated import GENERATED_TASKS
from persea.tasks.task import Split
from persea.teachers.engines import Engine, EngineCapabilities, EngineFailure
from persea.teachers.engines.transformers import TransformersEngine
from persea.tokenization.tokens import RenderedTokens
from persea.training.on_policy.candidates import NO_TOKENS, candidates_from_hidden
from persea.training.on_policy.rollouts import Rollouts
from persea.training.on_policy.span_scores import (
    MULTI_TOKEN_SPANS,
    AlignedAnswer,
    TeacherSpanScores,
)
from persea.training.on_policy.teacher_scores import TeacherScorer
from tests.teachers.engines.test_transformers import opened
from tests.training.on_policy.test_rollouts import STUDENT, TERMS, bridge, pair

ANSWERS = ("two words and 1234 cats", "你好，世界", "def f(x):\n    return x")


def spoken(name: str, *answers: str) -> list[tuple[RenderedTokens, RenderedTokens]]:
    """Answers in the student's tokens and in the teacher's."""
    talks = [
        Conversation.from_question("question").with_answer(Text(a)) for a in answers or ANSWERS
    ]
    effort = pair(name).teacher.effort
    return [
        (opened(STUDENT)[0].render(t), opened(name)[0].render(replace(t, effort=effort)))
        for t in talks
    ]


def dense(name: str, tokens: RenderedTokens, voice: ChatRenderer) -> torch.Tensor:
    """The plain forward: log-probabilities of each learned token's row."""
    with torch.inference_mode():
        logits = opened(name)[1](input_ids=torch.from_numpy(tokens.ids_T)[None].long()).logits[
            0, :, : len(voice.vocabulary)
        ]
    return torch.log_softmax(logits.double(), -1)[np.flatnonzero(tokens.loss_mask_T) - 1]


@dataclass(frozen=True)
class InPieces:
    """An engine that hands over two rows at a time."""

    real: Engine
    capabilities = EngineCapabilities(DistributionKind.FULL)

    def iter_logprobs(
        self, sequences: Sequence[np.ndarray], learn: Sequence[np.ndarray]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        for k, some in self.real.iter_logprobs(sequences, learn):
            for piece in torch.split(some, 2):
                yield k, piece


def cut(name: str) -> TeacherScorer:
    whole = pair(name)
    return TeacherScorer(
        replace(whole.teacher, engine=InPieces(whole.teacher.engine)), whole.event_map
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["qwen-sapling", "gpt-oss-sapling"])
def test_rows_are_the_teachers_own_at_every_common_boundary(name: str) -> None:
    some, voice = spoken(name), opened(name)[0]
    for found in (pair(name).score_boundaries(some), cut(name).score_boundaries(some)):
        want, first = [], 0
        for own, theirs in some:
            both = align(own, theirs).boundaries
            place, row = np.cumsum(own.loss_mask_T) - 1, np.cumsum(theirs.loss_mask_T) - 1
            rows = dense(name, theirs, voice)
            free = [
                (s, t)
                for s, t in zip(both.student_C, both.teacher_C, strict=True)
                if not (marker(own, s - 1) or marker(theirs, t - 1))
            ]
            assert (
                len(free) < len(both.student_C) or name != "gpt-oss-sapling"
            )  # its channel says that text comes
            want += [(first + int(place[s]), rows[row[t]]) for s, t in free]
            first += int(own.loss_mask_T.sum())
        assert found.position_C.tolist() == [place for place, _ in want]
        assert torch.allclose(
            found.logprobs_CW.double(), torch.stack([row for _, row in want]), atol=1e-4
        )
        assert found.student_impossible_tokens is not None and len(
            found.student_impossible_tokens.row_D
        )


def test_a_position_where_no_event_is_left_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    some, here = spoken("qwen-sapling", ANSWERS[0]), pair("qwen-sapling")
    whole, mask, asked = (
        here.score_boundaries(some),
        bridge("qwen-sapling").student_mask,
        list[int](),
    )

    def gone(self: TeacherScorer, which: Any, context: int, likely: Any) -> np.ndarray:
        asked.extend([context] if which is mask else [])
        return (
            np.arange(len(opened(STUDENT)[0].vocabulary))
            if which is mask and context == asked[0]
            else np.empty(0, np.int64)
        )

    monkeypatch.setattr(TeacherScorer, "impossible_tokens", gone)
    less = here.score_boundaries(some)
    (own, theirs), mask = some[0], bridge("qwen-sapling").student_mask
    assert mask is not None
    n = int(
        (
            mask.other.supervised_context_ids(theirs, align(own, theirs).boundaries.teacher_C)
            == asked[0]
        ).sum()
    )  # no run of markers is in these words
    assert 0 < n < len(whole.position_C)
    assert len(less.position_C) == len(less.logprobs_CW) == len(whole.position_C) - n


@pytest.mark.parametrize("name", ["qwen-sapling", "gemma-sapling"])
def test_chunks_by_a_walk_over_the_spans(name: str) -> None:
    some, voice, lies = spoken(name), opened(name)[0], bridge(name)
    student, teacher = lies.student_mask, lies.teacher_mask
    assert student is not None and teacher is not None
    for found, dead in (pair(name).score_spans(some), cut(name).score_spans(some)):
        values, members, ends, begins, gone, first = [], [], [], [], set[tuple[int, int]](), 0
        for own, theirs in some:
            laid, rows = align(own, theirs), dense(name, theirs, voice)
            place, row = np.cumsum(own.loss_mask_T) - 1, np.cumsum(theirs.loss_mask_T) - 1
            boundary = dict(
                zip(
                    laid.boundaries.student_C.tolist(),
                    laid.boundaries.teacher_C.tolist(),
                    strict=True,
                )
            )

            def beta(
                s: int,
                boundary: Any = boundary,
                gone: Any = gone,
                first: Any = first,
                place: Any = place,
                theirs: Any = theirs,
                own: Any = own,
                rows: Any = rows,
                row: Any = row,
            ) -> float:
                t = np.array([boundary[s]])
                gone.update(
                    (first + int(place[s]), int(v))
                    for v in student.impossible_tokens(
                        int(student.other.supervised_context_ids(theirs, t)[0])
                    )
                )
                lost = teacher.impossible_tokens(
                    int(teacher.other.supervised_context_ids(own, np.array([s]))[0])
                )
                return float(torch.log1p(-rows[row[boundary[s]], lost].exp().sum()))

            for (s0, s1), (t0, t1) in zip(
                laid.spans.student_C2.tolist(), laid.spans.teacher_C2.tolist(), strict=True
            ):
                said = sum(float(rows[row[t], int(theirs.ids_T[t])]) for t in range(t0, t1))
                values.append(said - beta(s0) + (beta(s1) if s1 in boundary else 0))
                members.append([first + int(place[s]) for s in range(s0, s1)])
                begins.append(first + int(place[s0]))
                ends.append(first + int(place[s1]) if s1 in boundary else -1)
            first += int(own.loss_mask_T.sum())
        assert found.teacher_logprob_C.tolist() == pytest.approx(values, abs=1e-3)
        assert [found.position_P[found.span_P == k].tolist() for k in range(len(values))] == members
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
    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(DistributionKind.TOPK, self.top)

    def compute_sparse_distributions(
        self, sequences: Sequence[np.ndarray], learn: Sequence[np.ndarray]
    ) -> Iterator[SparseDistributions | EngineFailure]:
        for ids, wanted, logs_NW in zip(
            sequences, learn, self.real.compute_logprobs(sequences, learn), strict=True
        ):
            if self.fails:
                yield EngineFailure("500")
                continue
            order = np.sort(logs_NW.topk(self.top, -1).indices.numpy(), 1)
            real = logs_NW[range(len(logs_NW)), ids[wanted].astype(np.int64)].numpy()
            yield SparseDistributions(
                np.arange(len(order) + 1) * self.top,
                order.reshape(-1).astype(np.int32),
                np.exp(np.take_along_axis(logs_NW.numpy(), order, 1)).reshape(-1),
                real,
                DistributionKind.TOPK,
            )


def naming(name: str, top: int, fails: bool = False) -> TeacherScorer:
    whole = pair(name)
    return TeacherScorer(
        replace(whole.teacher, engine=Naming(whole.teacher.engine, top, fails)), whole.event_map
    )  # type: ignore[arg-type]


def test_a_server_that_names_tokens_can_teach_chunks() -> None:
    name = "qwen-sapling"
    some, (whole, dead) = spoken(name), pair(name).score_spans(spoken(name))
    every, same = naming(name, len(opened(name)[0].vocabulary)).score_spans(some)
    assert torch.allclose(every.teacher_logprob_C, whole.teacher_logprob_C, atol=1e-4)
    assert torch.equal(same.token_D, dead.token_D) and torch.equal(
        every.position_P, whole.position_P
    )
    few, _ = naming(name, 5).score_spans(some)
    assert torch.isfinite(few.teacher_logprob_C).all()
    assert (
        few.teacher_logprob_C - whole.teacher_logprob_C
    ).abs().max() < 0.5  # of what cannot stand only what is named is taken out
    with pytest.raises(TeacherError, match="could not be scored: 500"):
        naming(name, 5, fails=True).score_spans(some)


@pytest.mark.parametrize(
    ("kind", "objective", "why"),
    [
        (DistributionKind.TOPK, "events", "reverse KL over events needs whole distributions"),
        (DistributionKind.TEXT_ONLY, "span_likelihood", "only text"),
        (DistributionKind.TOPK, "span_likelihood", ""),
    ],
)
def test_a_teacher_that_knows_too_little_is_refused(
    kind: DistributionKind, objective: str, why: str
) -> None:
    engine = SimpleNamespace(capabilities=EngineCapabilities(kind, 5))
    pairs = {
        "far": TeacherScorer(
            replace(pair("qwen-sapling").teacher, engine=engine), bridge("qwen-sapling")
        )
    }  # type: ignore[arg-type]
    make = partial(
        Rollouts, None, (), pairs, TERMS.model_copy(update={"objective": objective}), 2, 0, 512
    )
    if why:
        with pytest.raises(RecipeError, match=why):
            make()
    else:
        assert make().state() == b""


# --- tokens without bytes ---


def marker(tokens: RenderedTokens, at: int) -> bool:
    return bool(tokens.loss_mask_T[at] and tokens.starts_T[at] < 0)


def structured(name: str) -> list[tuple[RenderedTokens, RenderedTokens]]:
    """A thought that ends with a full stop, one that does not, and a call of a tool: in the
    student's tokens and in the teacher's.
    """
    tools = next(skill for skill in GENERATED_TASKS if skill.name == "tools")
    asked = Conversation.from_question("2+3?", effort=ThinkingEffort.HIGH)
    talks = [
        asked.with_answer(Thinking("two and three."), Text("5")),
        asked.with_answer(Thinking("count"), Text("it is 5")),
        next(
            i.reference_conversation
            for i in tools.items(Split.TRAIN, 60, 0)
            if i.prompt.id.startswith("tools/timer/")
        ),
    ]
    return [(opened(STUDENT)[0].render(t), opened(name)[0].render(t)) for t in talks]


@pytest.mark.parametrize("name", ["qwen-sapling", "gpt-oss-sapling"])
def test_marks_by_a_walk(name: str) -> None:
    some, voice, lies = structured(name), opened(name)[0], bridge(name)
    student, teacher = lies.student_mask, lies.teacher_mask
    assert student is not None and teacher is not None
    values, members, gone, first = [], [], set[tuple[int, int]](), 0
    for own, theirs in some:
        rows, place, row = (
            dense(name, theirs, voice),
            np.cumsum(own.loss_mask_T) - 1,
            np.cumsum(theirs.loss_mask_T) - 1,
        )
        laid = pair(name)._align_answer(own, theirs, MULTI_TOKEN_SPANS)
        assert {tuple(x) for x in align_marker_runs(own, theirs)[0].tolist()} <= {
            tuple(x) for x in laid.student_span_X2.tolist()
        }
        for (s0, s1), (t0, t1) in zip(
            laid.student_span_X2.tolist(), laid.teacher_span_X2.tolist(), strict=True
        ):
            beta = []
            for s, t in ((s0, t0), (s1, t1)):
                gone.update(
                    (first + int(place[s]), int(v))
                    for v in student.impossible_tokens(
                        int(student.other.supervised_context_ids(theirs, np.array([t]))[0])
                    )
                )
                stands = np.setdiff1d(
                    np.arange(rows.shape[1]),
                    teacher.impossible_tokens(
                        int(teacher.other.supervised_context_ids(own, np.array([s]))[0])
                    ),
                )
                beta.append(
                    float(rows[row[t], stands].logsumexp(0)) if len(stands) < rows.shape[1] else 0.0
                )
            values.append(
                sum(float(rows[row[t], int(theirs.ids_T[t])]) for t in range(t0, t1))
                - beta[0]
                + beta[1]
            )
            members.append([first + int(place[s]) for s in range(s0, s1)])
        first += int(own.loss_mask_T.sum())
    for here in (pair(name), cut(name)):
        found = here.score_boundaries(some)
        assert found.marker_spans.teacher_logprob_C.tolist() == pytest.approx(values, abs=1e-3)
        assert [
            found.marker_spans.position_P[found.marker_spans.span_P == k].tolist()
            for k in range(len(values))
        ] == members
        assert (
            set(
                zip(
                    found.marker_impossible_tokens.row_D.tolist(),
                    found.marker_impossible_tokens.token_D.tolist(),
                    strict=True,
                )
            )
            == gone
        )
        whole, _ = here.score_spans(some)
        assert {tuple(m) for m in members} <= {
            tuple(whole.position_P[whole.span_P == k].tolist())
            for k in range(len(whole.teacher_logprob_C))
        }


def test_what_can_stand_is_summed_itself_and_where_nothing_is_known_to_nothing_is_learned() -> None:
    """1 - what cannot stand has no digits where the teacher is certain of it: its log was -inf, and
    the step was left out.
    """
    some = spoken("qwen-sapling", "two words")
    theirs, gone = some[0][1], np.array([1, 2])
    token, n = int(np.flatnonzero(theirs.loss_mask_T)[1]), int(theirs.loss_mask_T.sum())
    laid = AlignedAnswer(
        np.array([[0, token]]), np.array([[0, 7]]), *(np.empty((0, 2), np.int64) for _ in range(2))
    )
    knows: Any = SimpleNamespace(
        event_map=SimpleNamespace(teacher_mask=None),
        impossible_tokens=lambda mask, context, likely: gone if context == 7 else NO_TOKENS,
    )
    rows = torch.full((n, len(opened("qwen-sapling")[0].vocabulary)), -200.0)
    rows[1, [1, 3, 4]] = torch.tensor([0.0, -50.0, -50.0])
    said = TeacherSpanScores(knows, [theirs], [laid])
    said.add_logprobs(0, 0, rows, None)
    assert said.log_possible_mass[0] == {token: pytest.approx(-50 + np.log(2), abs=1e-12)}
    for lost, want in ((0.75, np.log(0.25)), (1.0002, -np.inf)):
        named = SparseDistributions(
            np.array([0, 0, 2, *[2] * (n - 2)]),
            np.array([1, 3], np.int32),
            np.array([lost, 0.0], np.float32),
            np.zeros(n, np.float32),
            DistributionKind.TOPK,
        )
        said.add_sparse(0, named)
        assert said.log_possible_mass[0] == {token: pytest.approx(want)}


@dataclass(frozen=True)
class Certain:
    """An engine whose server is certain, within its rounding, of what cannot stand: of the
    likeliest dead token, wherever there is one.
    """

    pair: TeacherScorer
    some: Sequence[tuple[RenderedTokens, RenderedTokens]]
    capabilities = EngineCapabilities(DistributionKind.TOPK, 1)

    def compute_sparse_distributions(
        self, sequences: Sequence[np.ndarray], learn: Sequence[np.ndarray]
    ) -> Iterator[SparseDistributions]:
        for own, theirs in self.some:
            at = align(own, theirs).boundaries
            contexts = self.pair._boundary_contexts(
                own, theirs, np.stack([at.student_C, at.teacher_C], 1)
            )[:, 1].tolist()
            dead = [
                self.pair.impossible_tokens(self.pair.event_map.teacher_mask, context, None)
                for context in contexts
            ]
            first_of = {
                t: int(one[0])
                for t, one in zip(at.teacher_C.tolist(), dead, strict=True)
                if one is not None and len(one)
            }
            learned = np.flatnonzero(theirs.loss_mask_T)
            ids = [first_of.get(t, int(theirs.ids_T[t])) for t in learned.tolist()]
            yield SparseDistributions(
                np.arange(len(ids) + 1),
                np.array(ids, np.int32),
                np.full(len(ids), 1.0002, np.float32),
                np.full(len(ids), -1, np.float32),
                DistributionKind.TOPK,
            )


def test_a_stretch_between_rims_that_nobody_can_say_is_left_out() -> None:
    here, some = pair("qwen-sapling"), spoken("qwen-sapling")
    certain = TeacherScorer(replace(here.teacher, engine=Certain(here, some)), here.event_map)
    whole, (less, dead) = here.score_spans(some)[0], certain.score_spans(some)
    assert 0 < len(less.teacher_logprob_C) < len(whole.teacher_logprob_C)
    assert torch.isfinite(less.teacher_logprob_C).all()
    assert less.span_P.unique().tolist() == list(range(len(less.teacher_logprob_C)))
    assert set(dead.row_D.tolist()) <= {*less.begin_C.tolist(), *less.end_C.tolist()}


@pytest.mark.parametrize("name", ["qwen-sapling", "gpt-oss-sapling"])
def test_what_cannot_stand_is_found_among_likely_tokens(name: str) -> None:
    """Rows, places and stretches as with every token asked; of what cannot stand, all that either
    side finds likely, and nothing else.
    """
    some, whole = spoken(name), pair(name)
    least, learned = 1e-3, sum(int(own.loss_mask_T.sum()) for own, _ in some)
    torch.manual_seed(0)
    logits = 3 * torch.randn(learned, len(opened(STUDENT)[0].vocabulary))
    found = candidates_from_hidden(
        logits, LMHead(torch.eye(logits.shape[1]), logits.shape[1]), least
    )
    want, few = (
        whole.score_boundaries(some),
        replace(whole, min_prob=least).score_boundaries(some, found),
    )
    assert few.position_C.tolist() == want.position_C.tolist() and torch.equal(
        few.logprobs_CW, want.logprobs_CW
    )
    assert (
        want.student_impossible_tokens
        and want.teacher_impossible_tokens
        and few.student_impossible_tokens
        and few.teacher_impossible_tokens
    )
    for every, some_of, sure in (
        (
            want.student_impossible_tokens,
            few.student_impossible_tokens,
            lambda c, i: i in found.at(int(want.position_C[c])),
        ),
        (
            want.teacher_impossible_tokens,
            few.teacher_impossible_tokens,
            lambda c, i: want.logprobs_CW[c, i] >= np.log(least),
        ),
    ):
        pairs = [
            list(zip(d.row_D.tolist(), d.token_D.tolist(), strict=True)) for d in (every, some_of)
        ]
        assert pairs[1] == [(c, i) for c, i in pairs[0] if sure(c, i)]
        assert len(pairs[1]) < len(pairs[0])
    assert few.student_impossible_tokens.row_D.numel() and [
        c.tolist() for c in (few.marker_spans.position_P, few.marker_spans.begin_C)
    ] == [c.tolist() for c in (want.marker_spans.position_P, want.marker_spans.begin_C)]


def test_where_all_that_is_likely_cannot_stand_nothing_is_learned() -> None:
    """What is left there is below what was asked: whether it can stand nobody knows, and it would
    be blown up to a whole distribution.
    """
    some, whole = spoken("qwen-sapling", ANSWERS[0]), pair("qwen-sapling")
    want = whole.score_boundaries(some)
    assert want.student_impossible_tokens is not None
    c = int(want.student_impossible_tokens.row_D[0])
    token = int(want.student_impossible_tokens.token_D[0])
    learned, size = int(some[0][0].loss_mask_T.sum()), len(opened(STUDENT)[0].vocabulary)
    logits = torch.zeros(learned, size)
    logits[int(want.position_C[c]), token] = 40.0
    few = replace(whole, min_prob=1e-4).score_boundaries(
        some, candidates_from_hidden(logits, LMHead(torch.eye(size), size))
    )
    assert few.position_C.tolist() == [p for k, p in enumerate(want.position_C.tolist()) if k != c]


def test_a_teacher_whose_head_is_elsewhere_gives_whole_rows() -> None:
    """Offloaded, its weight is here in a forward alone."""
    from accelerate import cpu_offload

    here, some = pair("qwen-sapling"), spoken("qwen-sapling", ANSWERS[0])
    model = copy.deepcopy(opened("qwen-sapling")[1])
    cpu_offload(model.get_output_embeddings())
    far = replace(
        here,
        teacher=replace(
            here.teacher,
            engine=TransformersEngine(model, len(opened("qwen-sapling")[0].vocabulary)),
        ),
    )
    assert model.get_output_embeddings().weight.is_meta
    want, found = here.score_boundaries(some), far.score_boundaries(some)
    assert isinstance(found.teacher_outputs, torch.Tensor) and not isinstance(
        want.teacher_outputs, torch.Tensor
    )
    assert found.position_C.tolist() == want.position_C.tolist() and torch.allclose(
        found.logprobs_CW, want.logprobs_CW, atol=1e-4
    )
