"""The student's own answers: its own tokens over the right bytes, exact reverse KL beside each
teacher, the same whoever resumes.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persea.alignment.event_map import EventMap, build_event_map
from persea.alignment.markers import align_marker_runs
from persea.chat.messages import Conversation, FinishReason, Text, Thinking, ThinkingEffort
from persea.chat.renderer import ChatRenderer
from persea.config.schema import OnPolicySection
from persea.errors import DataError, RefusedError
from persea.losses import Divergence, event_divergence_loss, span_likelihood_loss
from persea.models.loading import ModelSource
from persea.tasks.generated import GENERATED_TASKS
from persea.tasks.task import Split
from persea.teachers.teacher import Teacher
from persea.training.loss_balancing import Group
from persea.training.on_policy import rollouts
from persea.training.on_policy.rollout_answers import (
    RolloutAnswer,
    RolloutPrompt,
    has_repetition_loop,
    parse_rollout,
    place_sampled_tokens,
)
from persea.training.on_policy.rollouts import Rollouts
from persea.training.on_policy.sampling import (
    SampledAnswers,
    SamplingUnit,
    sample_unit,
    split_batch,
)
from persea.training.on_policy.teacher_scores import TeacherScorer
from persea.training.student import StudentModel
from tests.conftest import Speaker
from tests.teachers.engines.test_transformers import NAMES, engine, opened

TERMS = OnPolicySection(
    start_step=2, share=0.5, rollouts=4, max_staleness_steps=2, max_new_tokens=24
)
STUDENT = "llama-sapling"
BRIDGES: dict[str, EventMap] = {}


def bridge(name: str) -> EventMap:
    if name not in BRIDGES:
        BRIDGES[name] = build_event_map(opened(name)[0], opened(STUDENT)[0])
    return BRIDGES[name]


def pair(name: str) -> TeacherScorer:
    return TeacherScorer(
        Teacher(
            name,
            opened(name)[0],
            engine(name),
            ThinkingEffort.LOW if "oss" in name else ThinkingEffort.NONE,
        ),
        bridge(name),
    )


def student() -> StudentModel:
    voice, model = opened(STUDENT)
    return StudentModel(copy.deepcopy(model), voice, ModelSource(STUDENT))


def source(
    *names: str,
    terms: OnPolicySection = TERMS,
    size: int = 2,
    seed: int = 3,
    of: StudentModel | None = None,
) -> Rollouts:
    """Prompts of three skills, taught by the named ones in turn; a call of a tool has no bytes to
    meet at in some families.
    """
    prompts = [
        i.prompt
        for skill in GENERATED_TASKS
        if skill.name in ("languages", "code", "reasoning")
        for i in skill.items(Split.TRAIN, 4, 0)
    ]
    tasks = tuple(RolloutPrompt(p, names[k % len(names)]) for k, p in enumerate(prompts))
    return Rollouts(
        of or student(), tasks, {name: pair(name) for name in names}, terms, size, seed, 512
    )


# --- the student's own tokens ---


def respelt(voice: ChatRenderer, text: str, cuts: list[int]) -> list[int]:
    """The text encoded piece by piece: the same bytes in other tokens."""
    edges = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    return [
        i
        for a, b in pairwise(edges)
        for i in next(iter(voice.vocabulary.encode_batch([text[a:b]])))
    ]


@given(
    text=st.sampled_from(
        ["two words and 1234 cats", "你好，世界", "def f(x):\n    return x", "isn't it"]
    ),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_a_spelling_of_its_own_lies_over_the_same_bytes(
    tiny_of: Callable[[str], Speaker], text: str, cuts: list[int]
) -> None:
    voice = tiny_of("llama").renderer
    asked = Conversation.from_question("question")
    prompt, whole = voice.render_prompt(asked), voice.render(asked.with_answer(Text(text)))
    ids = np.array([*respelt(voice, text, cuts), voice.stop_ids[0]], np.int32)
    own = place_sampled_tokens(voice, asked.with_answer(Text(text)), prompt, ids)
    assert own is not None
    assert own.ids_T.tolist() == [*prompt.ids_T.tolist(), *ids.tolist()]
    assert np.flatnonzero(own.loss_mask_T).tolist() == list(range(len(prompt), len(own)))
    first, last = (
        whole.starts_T[len(prompt)],
        whole.ends_T[
            len(whole)
            - 1
            - (
                len(whole)
                - len(prompt)
                - 1
                - np.flatnonzero(np.isin(whole.ids_T[len(prompt) :], voice.stop_ids))[0]
            )
        ],
    )
    body = slice(len(prompt), len(own) - 1)
    assert (
        own.starts_T[body][0] == first
        and own.ends_T[body][-1] == last == own.starts_T[-1] == own.ends_T[-1]
    )
    assert (own.starts_T[body][1:] == own.ends_T[body][:-1]).all()
    assert (
        own.ends_T[body] - own.starts_T[body] == voice.vocabulary.lengths_W[own.ids_T[body]]
    ).all()
    meant = np.array(respelt(voice, text, []), np.int32)
    canon = place_sampled_tokens(
        voice,
        asked.with_answer(Text(text)),
        prompt,
        np.append(meant, voice.stop_ids[0]).astype(np.int32),
    )
    assert canon is not None
    for name in ("ids_T", "starts_T", "ends_T", "loss_mask_T"):
        assert np.array_equal(getattr(canon, name), getattr(whole, name)[: len(canon)])


def test_what_cannot_be_placed_is_not_guessed(tiny_of: Callable[[str], Speaker]) -> None:
    voice = tiny_of("llama").renderer
    asked = Conversation.from_question("question")
    other = np.array([*respelt(voice, "other words", []), voice.stop_ids[0]], np.int32)
    assert (
        place_sampled_tokens(
            voice, asked.with_answer(Text("two words")), voice.render_prompt(asked), other
        )
        is None
    )
    assert (
        place_sampled_tokens(
            voice,
            asked.with_answer(Text("two words")),
            voice.render_prompt(Conversation.from_question("another")),
            other,
        )
        is None
    )


@given(
    st.lists(st.integers(0, 5), max_size=40),
    st.lists(st.integers(0, 5), min_size=1, max_size=64),
    st.integers(0, 8),
)
def test_a_loop_is_a_stretch_said_four_times(
    before: list[int], stretch: list[int], times: int
) -> None:
    ids = before + stretch * times
    assert has_repetition_loop(ids) == has_repetition_loop([*ids, 9]) or has_repetition_loop(
        [*ids, 9]
    )  # a stop token behind it hides no loop
    if times >= 4 and len(stretch) * times >= 12:
        assert has_repetition_loop(ids)

    def looped(tail: list[int]) -> bool:
        """By definition."""
        return any(
            n * p <= len(tail)
            and n * p >= 12
            and tail[len(tail) - n * p :] == tail[len(tail) - p :] * n
            for p in range(1, 65)
            for n in range(4, len(tail) // p + 1)
        )

    assert (looped(ids) or looped(ids[:-1])) <= has_repetition_loop(ids)
    if len(ids) < 12:
        assert not has_repetition_loop(ids)


def test_an_ordinary_answer_is_no_loop() -> None:
    for text in ("ha ha ha", "1111 + 1111 = 2222", "the cat and the dog and the cow and the cat"):
        assert not has_repetition_loop(list(text.encode()))
    assert has_repetition_loop(list(b"no " * 10))


@pytest.mark.parametrize(
    ("ids", "terms", "why"),
    [
        ([], TERMS, "prompt"),
        ("yes|", TERMS, ""),
        ("yes", TERMS, ""),
        ("yes", TERMS.model_copy(update={"truncated": "drop"}), "length"),
        (" b" * 30 + "|", TERMS, "loop"),
        ("x y z|", TERMS, "too_long"),
    ],
    ids=str,
)
def test_what_is_not_learned_from_has_a_reason(ids: Any, terms: OnPolicySection, why: str) -> None:
    voice = opened(STUDENT)[0]
    if isinstance(ids, str):
        ids = [
            i for part in ids.split("|") for i in next(iter(voice.vocabulary.encode_batch([part])))
        ] + [voice.stop_ids[0]] * ids.count("|")
    prompt = GENERATED_TASKS[0].items(Split.TRAIN, 1, 0)[0].prompt
    found = parse_rollout(
        RolloutPrompt(prompt, "t"),
        voice,
        np.array(ids, np.int32),
        terms,
        4 if why == "too_long" else 512,
    )
    if why:
        assert found == why
    else:
        assert isinstance(found, RolloutAnswer)
        assert (found.conversation.messages[-1].text, found.tokens.ids_T[-len(ids) :].tolist()) == (
            "yes",
            ids,
        )
        assert found.finish is (
            FinishReason.STOP if ids[-1] in voice.stop_ids else FinishReason.LENGTH
        )


# --- the loss ---


def test_with_the_same_tokenizer_it_is_the_ordinary_reverse_kl_of_every_own_token() -> None:
    own = source(STUDENT)
    with torch.no_grad():
        for p in own.student.model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.02)
    out, taught = own.loss(2)
    said, left_out, _ = own._parse_answers(2, 0, 1)
    assert said and not left_out
    values = []
    for one in said:
        ids = torch.from_numpy(one.tokens.ids_T)[None].long()
        at = (
            np.flatnonzero(one.tokens.loss_mask_T & (one.tokens.starts_T >= 0)) - 1
        )  # a call's markers have no bytes, and no common boundary
        with torch.no_grad():
            q, p = (
                torch.log_softmax(
                    m(input_ids=ids).logits[0, at, : len(own.student.renderer.vocabulary)].double(),
                    -1,
                )
                for m in (own.student.model, opened(STUDENT)[1])
            )
        values.append((q.exp() * (q - p)).sum(-1))
    expected = torch.cat(values)
    assert out.num_tokens == sum(t.num_tokens for t in taught.values()) == len(expected)
    assert set(taught) == {
        Group(STUDENT, one.rollout_prompt.prompt.skill, on_policy=True) for one in said
    }
    assert sum(t.loss_sum for t in taught.values()) == pytest.approx(
        float(expected.sum()), rel=1e-4
    )
    assert sum(t.squared_loss_sum for t in taught.values()) == pytest.approx(
        float(expected.square().sum()), rel=1e-4
    )
    assert float(out.loss.detach()) == pytest.approx(float(expected.mean()), rel=1e-4)
    assert float(expected.mean()) > 1e-3
    again, _ = source(STUDENT).loss(2)
    assert float(again.loss.detach()) == pytest.approx(0, abs=1e-5)  # a student that is its teacher


def test_each_teacher_speaks_in_its_own_template_of_the_common_boundaries_alone() -> None:
    own = source(
        "qwen-sapling",
        "gemma-sapling",
        "gpt-oss-sapling",
        terms=TERMS.model_copy(update={"rollouts": 6}),
        size=6,
    )
    own.student.model.train()
    out, taught = own.loss(2)
    share = Counter[str]()
    for group, one in taught.items():
        share[group.teacher] += one.num_tokens
    assert own.student.model.training
    said, _, _ = own._parse_answers(2, 0, 1)
    assert (
        set(share) == {"qwen-sapling", "gemma-sapling", "gpt-oss-sapling"}
        and sum(share.values()) == out.num_tokens
    )
    total, n = 0.0, 0
    for name in share:
        for one in said:
            if one.rollout_prompt.teacher != name:
                continue
            theirs = pair(name).teacher.renderer.render(
                replace(one.conversation, effort=pair(name).teacher.effort)
            )
            between, b = pair(name).score_boundaries([(one.tokens, theirs)]), bridge(name)
            with torch.no_grad():
                q = (
                    own.student.model(input_ids=torch.from_numpy(one.tokens.ids_T)[None].long())
                    .logits[0]
                    .float()
                )
            at = np.flatnonzero(one.tokens.loss_mask_T)[between.position_C.numpy()] - 1
            alone = event_divergence_loss(
                q[at, : len(b.student_event_V)],
                between.logprobs_CW,
                b,
                Divergence.REVERSE,
                student_impossible_tokens=between.student_impossible_tokens,
                teacher_impossible_tokens=between.teacher_impossible_tokens,
            )
            learned = np.flatnonzero(one.tokens.loss_mask_T)
            found, targets = [alone], torch.from_numpy(one.tokens.ids_T[learned]).long()
            if len(between.marker_spans.teacher_logprob_C):
                found.append(
                    span_likelihood_loss(
                        q[learned - 1, : len(b.student_event_V)],
                        targets,
                        between.marker_spans,
                        between.marker_impossible_tokens,
                    )
                )
            assert (
                len(found) == 2 or name != "gpt-oss-sapling"
            )  # its channel, and the first word behind it
            total, n = (
                total + sum(float(part.loss) * part.num_tokens for part in found),
                n + sum(part.num_tokens for part in found),
            )
    assert n == out.num_tokens
    assert float(out.loss.detach()) == pytest.approx(total / n, rel=1e-3)


def test_where_a_thought_ends_is_taught_too() -> None:
    """The same tokenizer: reverse KL of every own token of content, and of each run of markers half
    the squared difference of its likelihoods.
    """
    own = source(STUDENT)
    with torch.no_grad():
        for p in own.student.model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.02)
    voice = own.student.renderer
    tasks = tuple(
        RolloutPrompt(replace(task.prompt, effort=ThinkingEffort.HIGH), STUDENT)
        for task in own.prompts
    )
    own = replace(
        own,
        prompts=tasks,
        scorers={
            STUDENT: replace(
                own.scorers[STUDENT],
                teacher=replace(own.scorers[STUDENT].teacher, effort=ThinkingEffort.HIGH),
            )
        },
    )
    ids = []
    for k in range(TERMS.rollouts):
        asked = own._prompt_at(0, k).conversation
        whole, prompt = (
            voice.render(asked.with_answer(Thinking("one. two."), Text(f"it is {k}"))),
            voice.render_prompt(asked),
        )
        last = int(np.flatnonzero(np.isin(whole.ids_T[len(prompt) :], voice.stop_ids))[0])
        ids.append(whole.ids_T[len(prompt) : len(prompt) + last + 1])
    own._in_flight = rollouts.RolloutBatch(0, 2, tuple(ids))
    own._sample = lambda number, step: rollouts.RolloutBatch(number, step, tuple(ids))  # type: ignore[method-assign]
    out, share = own.loss(3)
    said, left_out, _ = own._parse_answers(3, 0, 1)
    assert len(said) == 2 and not left_out
    values = []
    for one in said:
        tokens, found = one.tokens, align_marker_runs(one.tokens, one.tokens)[0]
        assert len(found) == 2  # it opens, and it ends
        with torch.no_grad():
            q, p = (
                torch.log_softmax(
                    m(input_ids=torch.from_numpy(tokens.ids_T)[None].long())
                    .logits[0, :, : len(voice.vocabulary)]
                    .double(),
                    -1,
                )
                for m in (own.student.model, opened(STUDENT)[1])
            )
        at = np.flatnonzero(tokens.loss_mask_T & (tokens.starts_T >= 0)) - 1
        at = at[
            ~(tokens.loss_mask_T[at] & (tokens.starts_T[at] < 0))
        ]  # right behind a run its stretch speaks
        values += (q[at].exp() * (q[at] - p[at])).sum(-1).tolist()
        for a, b in found.tolist():
            here = range(a - 1, b - 1), torch.from_numpy(tokens.ids_T[a:b]).long()
            values.append(float((q[here] - p[here]).sum() ** 2 / 2))
    assert out.num_tokens == sum(t.num_tokens for t in share.values()) == len(values) and {
        g.teacher for g in share
    } == {STUDENT}
    assert sum(t.loss_sum for t in share.values()) == pytest.approx(sum(values), rel=1e-4)
    assert float(out.loss.detach()) == pytest.approx(float(np.mean(values)), rel=1e-4)
    out.loss.backward()
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all()
        for p in own.student.trainable_parameters
    )


def test_where_only_log_probabilities_are_known_chunks_teach() -> None:
    """The same tokenizer: half the mean squared difference of the two log-probabilities of every
    own token of content.
    """
    own = source(STUDENT, terms=TERMS.model_copy(update={"objective": "span_likelihood"}))
    with torch.no_grad():
        for p in own.student.model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.02)
    out, taught = own.loss(3)
    said, _, _ = own._parse_answers(3, 0, 1)
    values = []
    for one in said:
        ids = torch.from_numpy(one.tokens.ids_T)[None].long()
        at = np.flatnonzero(one.tokens.loss_mask_T & (one.tokens.starts_T >= 0)) - 1
        with torch.no_grad():
            q, p = (
                torch.log_softmax(
                    m(input_ids=ids).logits[0, at, : len(own.student.renderer.vocabulary)].double(),
                    -1,
                )[range(len(at)), ids[0, at + 1]]
                for m in (own.student.model, opened(STUDENT)[1])
            )
        values.append((q - p) ** 2 / 2)
    expected = torch.cat(values)
    assert (
        sum(t.num_tokens for t in taught.values()) == len(expected)
        and out.metrics["span_likelihood"] > 1e-3
    )
    assert float(out.loss.detach()) == pytest.approx(float(expected.mean()), rel=1e-3)
    mixed, _ = source(
        "qwen-sapling",
        "gemma-sapling",
        terms=TERMS.model_copy(update={"objective": "span_likelihood"}),
    ).loss(3)
    mixed.loss.backward()
    assert torch.isfinite(mixed.loss)


@pytest.mark.parametrize("objective", ["events", "span_likelihood"])
def test_a_groups_weight_multiplies_its_part_of_the_loss(objective: str) -> None:
    def own() -> Rollouts:
        return source(
            "qwen-sapling",
            "gemma-sapling",
            terms=TERMS.model_copy(update={"objective": objective, "rollouts": 6}),
            size=6,
        )

    plain, taught = own().loss(2)
    assert len(taught) > 1
    weight = {group: 1.5 + k for k, group in enumerate(taught)}
    del weight[next(iter(taught))]  # not heard yet: 1
    out, told = own().loss(2, weights=weight)
    expected = (
        sum(weight.get(group, 1.0) * t.loss_sum for group, t in taught.items()) / plain.num_tokens
    )
    assert float(out.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(plain.loss.detach()) == pytest.approx(
        sum(t.loss_sum for t in taught.values()) / plain.num_tokens, rel=1e-5
    )
    name = {"events": "reverse_kl", "span_likelihood": "span_likelihood"}[objective]
    assert (
        out.metrics[name] == pytest.approx(plain.metrics[name]) == float(plain.loss.detach())
    )  # terms are without weights
    for group, t in told.items():
        assert (t.num_tokens, t.loss_sum, t.squared_loss_sum) == pytest.approx(
            (taught[group].num_tokens, taught[group].loss_sum, taught[group].squared_loss_sum)
        )
        assert t.grad_norm_sum == pytest.approx(
            weight.get(group, 1.0) * taught[group].grad_norm_sum, nan_ok=True
        )
        assert np.isnan(t.grad_norm_sum) == (objective == "span_likelihood")


def test_steps_on_its_own_words_bring_the_student_nearer() -> None:
    own = source(
        "qwen-sapling",
        terms=TERMS.model_copy(
            update={"share": 1.0, "start_step": 0, "rollouts": 8, "max_staleness_steps": 100}
        ),
        size=8,
    )
    optimizer = torch.optim.AdamW(own.student.trainable_parameters, 1e-3)
    losses = []
    for _ in range(6):  # the same answers: the round of step 0
        out, _ = own.loss(0)
        losses.append(float(out.loss.detach()))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.85 * losses[0]


def test_a_part_of_which_nothing_can_be_learned_has_no_positions_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with `--procs 2` where all of one process' answers loop: each still runs the model once,
    and its backward reaches every weight.
    """
    real = rollouts.parse_rollout
    first: list[RolloutPrompt] = []

    def deaf(task: RolloutPrompt, *rest: Any) -> RolloutAnswer | str:
        first[:] = first or [task]
        return "loop" if task is first[0] else real(task, *rest)

    monkeypatch.setattr(rollouts, "parse_rollout", deaf)
    own = source("qwen-sapling")
    (none, nobody), (some, taught) = (own.loss(3, part, 2) for part in range(2))
    whole, _ = own.loss(3)
    assert (none.num_tokens, float(none.loss.detach()), nobody) == (0, 0.0, {})
    assert some.num_tokens == whole.num_tokens == sum(t.num_tokens for t in taught.values()) > 0
    none.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in own.student.trainable_parameters)
    for name in (
        "rollouts_left_out",
        "left_out_loop",
        "rollout_tokens",
    ):  # of the step, whoever tells it
        assert none.metrics[name] == some.metrics[name] == whole.metrics[name]
    assert whole.metrics["left_out_loop"] == 0.5


def test_where_nothing_can_be_learned_the_run_is_refused() -> None:
    own = source(
        "qwen-sapling", terms=TERMS.model_copy(update={"max_new_tokens": 1, "truncated": "drop"})
    )
    with pytest.raises(
        RefusedError,
        match=r"train, step 2: of 2 answers of the student none can be trained on "
        r"\(\{'length': 2\}\) -> raise training",
    ):
        own.loss(2)


# --- when, and in flight ---


@given(st.integers(0, 50), st.floats(0.01, 1))
def test_shares_of_steps_hold_in_every_stretch(after: int, share: float) -> None:
    own = replace_terms(start_step=after, share=share)
    due = [own.is_due(step) for step in range(400)]
    assert not any(due[:after])
    for n in (10, 50, 300):
        assert abs(sum(due[after : after + n]) - share * n) <= 1


def replace_terms(**changes: Any) -> Rollouts:
    return Rollouts(None, (), {}, TERMS.model_copy(update=changes), 2, 0, 512)


def test_what_is_in_flight_is_carried_by_a_checkpoint() -> None:
    """A round of 4 answers is used at its first two due steps, 3 and 5; one that resumes between
    them needs what was drawn.
    """
    own = source("qwen-sapling")
    steps = [step for step in range(2, 12) if own.is_due(step)]
    assert steps[:4] == [3, 5, 7, 9]
    first, _ = own.loss(3)
    kept = own.state()
    drawn = own._in_flight
    with torch.no_grad():
        next(iter(own.student.trainable_parameters)).add_(
            0.01
        )  # a step: what it would draw now is something else
    second, _ = own.loss(5)
    assert own._in_flight is drawn
    resumed = source("qwen-sapling", of=own.student)
    with pytest.raises(DataError, match="the sampled answers of batch 0 are missing at step 5"):
        resumed.loss(5)
    resumed.restore((kept,))
    assert resumed.state() == kept
    assert resumed.loss(5)[0].loss.item() == second.loss.item() != first.loss.item()
    own.loss(7)
    assert own._in_flight is not None and (own._in_flight.index, own._in_flight.step) == (1, 7)
    assert Rollouts(**{k: v for k, v in vars(own).items() if not k.startswith("_")}).state() == b""


def test_the_same_step_draws_the_same_and_another_step_or_seed_something_else() -> None:
    one, two, other = source("qwen-sapling"), source("qwen-sapling"), source("qwen-sapling", seed=4)
    assert one.state() == b""
    for own in (one, two, other):
        own.loss(3)
    assert one.state() == two.state() != other.state()
    parts = [source("qwen-sapling").loss(3, part, 2)[0] for part in range(2)]
    assert sum(p.num_tokens for p in parts) == one.loss(3)[0].num_tokens


def test_a_stale_answer_is_refused() -> None:
    own = source("qwen-sapling", terms=TERMS.model_copy(update={"max_staleness_steps": 1}))
    own.loss(3)
    with pytest.raises(
        RefusedError,
        match="answers sampled at step 3 are too old at step 5: at most 1 steps are allowed",
    ):
        own.loss(5)


def test_answers_of_older_weights_than_allowed_are_never_trained_on() -> None:
    """Their age counts by the step that they carry, whenever they came."""

    class Late:
        def sample(
            self, student: StudentModel, units: Sequence[SamplingUnit]
        ) -> list[SampledAnswers]:
            return [
                SampledAnswers(unit.step - late, sample_unit(student, unit), "digest")
                for unit in units
            ]

    for late in (2, 3):
        own = replace(source("qwen-sapling"), sampler=Late())
        if late == 2:
            own.loss(3)
            assert own._in_flight is not None
            assert (own._in_flight.step, own._in_flight.weights) == (1, "digest")
            assert json.loads(own.state())["weights"] == "digest"
            continue
        with pytest.raises(RefusedError, match="answers sampled at step 0 are too old at step 3"):
            own.loss(3)


def test_units_have_a_seed_and_a_batch_of_their_own() -> None:
    prompts = [np.arange(k + 1, dtype=np.int32) for k in range(5)]
    whole = split_batch(prompts, (0,), TERMS, 3, 7)
    assert [len(u.prompts) for u in whole] == [4, 1]  # `rollouts` is 4
    two = split_batch(prompts, (0,), TERMS.model_copy(update={"rollouts_per_unit": 2}), 3, 7)
    assert [len(u.prompts) for u in two] == [2, 2, 1]
    assert len({u.seed for u in two}) == 3
    assert two[0].seed == whole[0].seed


@pytest.mark.parametrize("name", NAMES[:1])
def test_drawing_is_the_models_own_distribution(name: str) -> None:
    voice, model = opened(name)
    prompt = voice.render_prompt(Conversation.from_question("Hi")).ids_T
    before = torch.get_rng_state()
    drawn = engine(name, 600).generate_rollouts(
        [prompt] * 600, voice.stop_ids, 1, temperature=1.5, seed=5
    )
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        p = torch.softmax(
            model(input_ids=torch.from_numpy(prompt)[None].long())
            .logits[0, -1, : len(voice.vocabulary)]
            .double()
            / 1.5,
            -1,
        ).numpy()
    found = np.bincount([int(d[0]) for d in drawn], minlength=len(p)) / 600
    assert np.abs(found - p).max() < 5 * np.sqrt(0.25 / 600)
    assert (p[found > 0] > 1e-6).all()
    again = engine(name, 600).generate_rollouts(
        [prompt] * 600, voice.stop_ids, 1, temperature=1.5, seed=5
    )
    assert [d.tolist() for d in again] == [d.tolist() for d in drawn]
    other = engine(name, 600).generate_rollouts(
        [prompt] * 600, voice.stop_ids, 1, temperature=1.5, seed=6
    )
    assert [d.tolist() for d in other] != [d.tolist() for d in drawn]


def test_both_sides_use_the_recipes_candidate_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's side had a threshold of its own, whatever that of the teacher's scorer."""
    one = student()
    config = TERMS.model_copy(update={"min_candidate_prob": 0.01, "start_step": 0})
    prompts = [i.prompt for i in GENERATED_TASKS[0].items(Split.TRAIN, 4, 0)]
    used: list[float] = []
    real = rollouts.candidates_from_hidden

    def noted(hidden: torch.Tensor, head: Any, min_prob: float) -> Any:
        used.append(min_prob)
        return real(hidden, head, min_prob)

    monkeypatch.setattr(rollouts, "candidates_from_hidden", noted)
    source = rollouts.build_rollouts(
        [(prompt, "qwen-sapling") for prompt in prompts],
        one,
        lambda name: pair(name).teacher,
        {"qwen-sapling": bridge("qwen-sapling")},
        config,
        2,
        3,
        512,
    )
    assert source.scorers["qwen-sapling"].min_prob == 0.01
    source.loss(0)
    assert used == [0.01]


def test_a_loop_is_what_the_recipe_says() -> None:
    ids = list(b"no " * 3)
    assert not has_repetition_loop(ids)
    assert has_repetition_loop(ids, min_repeats=3, min_tokens=9)
    assert not has_repetition_loop(ids, min_repeats=3, max_period=2, min_tokens=9)
