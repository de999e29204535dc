"""The strongest teaches, the recipe's order breaks ties, a pin overrules, and the best of nothing is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_teacher import scripted, words

from persea.audition import Cast, ask, cast
from persea.chat import Effort, Finish
from persea.errors import Refused
from persea.measure import Score, Split, Verdict
from persea.skills import LANGUAGES, REASONING

TEACHERS = ("qwen", "gemma", "oss")


def score(speaker: str, skill: str, value: float, language: str = "") -> Score:
    return Score(speaker, skill, language, Effort.LOW, value, 10, max(0.0, value - 0.1), min(1.0, value + 0.1))


def chosen(scores: list[Score], skills: tuple[str, ...] = ("code",), **pinned: str) -> dict[str, str]:
    parts = cast(skills, TEACHERS, scores, pinned).parts
    assert all(share == 1.0 and len(part) == 1 for part in parts.values() for _, share in part)
    return {skill: part[0][0] for skill, part in parts.items()}


def test_the_strongest_teaches_each_skill() -> None:
    scores = [score("qwen", "code", 0.2), score("gemma", "code", 0.9), score("oss", "code", 0.3),
              score("qwen", "languages", 0.8), score("gemma", "languages", 0.1), score("oss", "languages", 0.7)]
    assert chosen(scores, ("languages", "code")) == {"languages": "qwen", "code": "gemma"}


@given(st.lists(st.sampled_from((0.0, 0.25, 0.5, 1.0)), min_size=3, max_size=3), st.permutations(range(3)))
def test_the_first_of_the_recipe_wins_a_tie_in_whatever_order_they_were_measured(values: list[float], order: list[int]) -> None:
    scores = [score(TEACHERS[k], "code", values[k]) for k in order]
    if max(values) == 0:
        with pytest.raises(Refused):
            chosen(scores)
    else:
        assert chosen(scores) == {"code": TEACHERS[values.index(max(values))]}


def test_a_score_of_one_language_decides_nothing() -> None:
    scores = [score("qwen", "code", 0.3), score("gemma", "code", 0.2), score("gemma", "code", 1.0, "vi"), score("qwen", "code", 0.0, "vi")]
    assert chosen(scores) == {"code": "qwen"}


def test_a_pinned_teacher_teaches_whatever_was_measured() -> None:
    scores = [score("qwen", "code", 0.9), score("oss", "code", 0.0), score("qwen", "languages", 0.9)]
    out = cast(("code", "languages"), TEACHERS, scores, {"code": "oss"})
    assert {k: v[0][0] for k, v in out.parts.items()} == {"code": "oss", "languages": "qwen"}
    assert out.pinned == ("code",)
    assert chosen([], pinned_skill="x", code="gemma") == {"code": "gemma"}  # not measured at all


@pytest.mark.parametrize("scores", [[], [score("qwen", "code", 0.0), score("gemma", "code", 0.0)], [score("qwen", "languages", 1.0)]])
def test_a_skill_that_nobody_answered_once_is_refused(scores: list[Score]) -> None:
    with pytest.raises(Refused, match=r"audition: no teacher has a right answer on code \(n = \d+\) -> .*audition\.pinned\.code") as caught:
        chosen(scores)
    assert caught.value.exit_code == 4


shares = st.lists(st.tuples(st.sampled_from(TEACHERS), st.floats(0.01, 1)), min_size=1, max_size=3).map(tuple)
measured = st.builds(score, st.sampled_from(TEACHERS), st.sampled_from(("code", "languages")), st.floats(0, 1), st.sampled_from(("", "vi", "zh")))


@given(st.dictionaries(st.sampled_from(("code", "languages", "reasoning")), shares), st.lists(measured).map(tuple),
       st.lists(st.sampled_from(("code", "languages"))).map(tuple))
def test_a_cast_comes_back_from_json(parts: dict[str, tuple[tuple[str, float], ...]], scores: tuple[Score, ...], pinned: tuple[str, ...]) -> None:
    one = Cast(parts, scores, pinned)
    other = Cast.from_json(json.loads(json.dumps(one.to_json())))
    assert other == one
    assert all(isinstance(s.effort, Effort) for s in other.scores)


def test_asking_grades_every_answer_and_scores_all_and_each_language() -> None:
    name, items = "llama-sapling", LANGUAGES.items(Split.AUDITION, 40, 0)
    languages = [i.prompt.language for i in items]
    assert len(set(languages)) > 2
    stop = ("<|eot_id|>",)
    says = [(words(name, i.reference, *stop), words(name, "no", *stop), words(name, "n"))[k % 3] for k, i in enumerate(items)]
    results, scores = ask(scripted(name, *says), LANGUAGES, items, 60)
    verdicts = [Verdict.RIGHT, Verdict.WRONG, Verdict.MALFORMED]
    assert [r.item for r in results] == list(items)
    assert [(r.verdict, r.finish) for r in results] == [(verdicts[k % 3], Finish.LENGTH if k % 3 == 2 else Finish.STOP) for k in range(len(items))]
    assert (scores[0].language, scores[0].n, scores[0].value) == ("", len(items), sum(k % 3 == 0 for k in range(len(items))) / len(items))
    assert [s.language for s in scores[1:]] == sorted(set(languages))
    for s in scores[1:]:
        mine = [k for k, language in enumerate(languages) if language == s.language]
        assert (s.n, s.value) == (len(mine), sum(k % 3 == 0 for k in mine) / len(mine))
        assert s.low <= s.value <= s.high


def test_a_skill_of_one_language_has_one_score() -> None:
    name, items = "llama-sapling", REASONING.items(Split.AUDITION, 3, 0)
    _, scores = ask(scripted(name, *(words(name, i.reference, "<|eot_id|>") for i in items)), REASONING, items, 60)
    assert [(s.language, s.value, s.n) for s in scores] == [("", 1.0, 3)]
