"""The weights run on a seeded sample of bounded cost, with each skill and language in it."""

from __future__ import annotations

import numpy as np
import pytest

from persea.chat.messages import Conversation, Text
from persea.chat.renderer import ChatRenderer
from persea.evaluation.check_sampling import (
    PASSES,
    choose_measured,
    chosen_conversations,
    describe_measured,
)
from persea.evaluation.compatibility import ConversationSample
from persea.evaluation.retained_mass import summarize_mass
from persea.models.loading import load_renderer
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return load_renderer(str(ROOT / "saplings" / "llama-sapling"))


def sample(skill: str, language: str, n: int) -> ConversationSample:
    said = [
        Conversation.from_question(f"{language} {k}").with_answer(Text("word " * (1 + k % 7)))
        for k in range(n)
    ]
    return ConversationSample(skill, language, tuple(said), tuple(map(str, range(n))))


SAMPLES = [sample("languages", "vi", 60), sample("languages", "th", 60), sample("code", "en", 9)]


def cost(renderer: ChatRenderer, chosen: tuple[tuple[int, ...], ...]) -> int:
    tokens = sum(
        len(t)
        for one, some in zip(SAMPLES, chosen, strict=True)
        for k, t in enumerate(one.render(renderer))
        if k in some
    )
    return tokens * len(renderer.vocabulary) * PASSES


def test_with_room_for_all_all_are_measured(renderer: ChatRenderer) -> None:
    found = choose_measured("qwen", SAMPLES, renderer, 1 << 40, 0)
    assert [len(some) for some in found.chosen] == [60, 60, 9]
    assert found.positions == found.positions_available > 0
    assert describe_measured(found.to_json()) == (
        f"qwen: measured on all {found.positions:,} positions"
    )


def test_the_cost_is_bounded_and_every_sample_has_its_share(renderer: ChatRenderer) -> None:
    every = cost(renderer, tuple(tuple(range(len(s.conversations))) for s in SAMPLES))
    found = choose_measured("qwen", SAMPLES, renderer, every // 4, 0)
    assert every // 5 < cost(renderer, found.chosen) <= every // 4
    vi, th, code = map(len, found.chosen)
    assert abs(vi - th) <= 4 and code == 9
    assert found == choose_measured("qwen", SAMPLES, renderer, every // 4, 0)  # deterministic
    assert found.chosen != choose_measured("qwen", SAMPLES, renderer, every // 4, 1).chosen
    kept = chosen_conversations(SAMPLES, found)
    assert [len(s.conversations) for s in kept] == [vi, th, code]
    assert kept[0].labels == tuple(str(k) for k in found.chosen[0])
    words = describe_measured(found.to_json())
    assert f"measured on {found.positions:,} of {found.positions_available:,} positions" in words


def test_a_limit_that_is_too_low_leaves_the_shortest_of_each(renderer: ChatRenderer) -> None:
    found = choose_measured("qwen", SAMPLES, renderer, 1, 0)
    lengths = [[len(t) for t in s.render(renderer)] for s in SAMPLES]
    assert [len(some) for some in found.chosen] == [1, 1, 1]
    assert all(n[some[0]] == min(n) for n, some in zip(lengths, found.chosen, strict=True))
    assert choose_measured("qwen", [], renderer, 1, 0).positions == 0


def test_the_mean_mass_has_an_interval_over_conversations(renderer: ChatRenderer) -> None:
    tokens = SAMPLES[0].render(renderer)
    rng = np.random.default_rng(0)
    level = {id(t): rng.uniform(0.7, 1) for t in tokens}

    def mass(student, teacher, boundaries):  # type: ignore[no-untyped-def]
        ends = np.cumsum([len(t) for t in student])
        which = np.searchsorted(ends, boundaries.student_C, side="right")
        return np.array([level[id(student[k])] for k in which])

    found = summarize_mass(mass, tokens, tokens)
    assert found["retained_mass_low"] < found["retained_mass_mean"] < found["retained_mass_high"]
    assert found["num_mass_boundaries"] > len(tokens)
    few = summarize_mass(mass, tokens[:6], tokens[:6])
    assert few["retained_mass_high"] - few["retained_mass_low"] > 2 * (
        found["retained_mass_high"] - found["retained_mass_low"]
    )
    one = summarize_mass(mass, tokens[:1], tokens[:1])
    assert one["retained_mass_low"] is None and one["retained_mass_mean"] > 0.6
    assert summarize_mass(mass, [], []) == {}
