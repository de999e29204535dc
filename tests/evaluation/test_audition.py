"""The strongest teaches, those that cannot be told from it share, a pin overrules, a bad teacher
gets nothing, the best of nothing is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persea.cache.capture import plan_units
from persea.chat.messages import Conversation, FinishReason, ThinkingEffort
from persea.data.prompts import Prompt
from persea.errors import RefusedError
from persea.evaluation.audition import Cast, PartDecision, build_cast, cast_markdown, cast_table
from persea.evaluation.racing import EffortComparison, StopReason, TaskRace
from persea.tasks.task import Score
from tests.evaluation.test_racing import course

TEACHERS = ("qwen", "gemma", "oss")
EFFORTS = dict.fromkeys(TEACHERS, ThinkingEffort.LOW)


def chosen(
    *courses: TaskRace, floor: float = 0.05, **pinned: str
) -> dict[str, tuple[tuple[str, float], ...]]:
    parts = dict(build_cast(courses, EFFORTS, pinned, floor).parts)
    assert all(sum(share for _, share in part) == pytest.approx(1) for part in parts.values())
    return parts


def rights(*counts: int, of: int = 100, name: str = "code") -> TaskRace:
    """A course at its end: each teacher right on the first so many items."""
    done = course(
        dict(
            zip(TEACHERS, ([1.0] * right + [0.0] * (of - right) for right in counts), strict=True)
        ),
        name,
    )
    done.update_eliminated(of)
    return done


def test_the_strongest_teaches_each_skill() -> None:
    assert chosen(rights(20, 90, 30), rights(80, 10, 60, name="languages")) == {
        "code": (("gemma", 1.0),),
        "languages": (("qwen", 1.0),),
    }


def test_teachers_that_cannot_be_told_apart_share() -> None:
    assert chosen(rights(80, 10, 79)) == {"code": (("qwen", 0.5), ("oss", 0.5))}
    assert chosen(rights(50, 50, 50)) == {"code": tuple((t, 1 / 3) for t in TEACHERS)}


def test_a_deliberately_bad_teacher_gets_no_share() -> None:
    for bad in range(12):
        assert [t for t, _ in chosen(rights(60, bad, 55))["code"]] == ["qwen", "oss"]


@pytest.mark.parametrize(
    ("floor", "who"), [(0.0, ["qwen", "gemma", "oss"]), (0.3, ["qwen", "gemma"]), (0.5, ["qwen"])]
)
def test_a_teacher_below_the_floor_teaches_nothing(floor: float, who: list[str]) -> None:
    assert [
        t for t, _ in chosen(rights(5, 3, 2, of=8), floor=floor)["code"]
    ] == who  # eight items tell none of them apart


def test_a_pinned_teacher_teaches_whatever_was_measured() -> None:
    out = build_cast(
        [rights(90, 50, 0), rights(90, 0, 0, name="languages")], EFFORTS, {"code": "oss"}, 0.05
    )
    assert out.parts == {"code": (("oss", 1.0),), "languages": (("qwen", 1.0),)}
    assert out.pinned == ("code",)
    assert chosen(rights(0, 0, 0), code="gemma") == {"code": (("gemma", 1.0),)}


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((0, 0, 0), r"no teacher has a correct answer on code \(n = 100\)"),
        (
            (3, 4, 2),
            r"the best teacher of code, gemma, scores 0\.04, below the floor of 0\.05 \(n = 100\)",
        ),
    ],
)
def test_a_skill_that_nobody_is_good_enough_at_is_refused(
    counts: tuple[int, ...], words: str
) -> None:
    with pytest.raises(
        RefusedError, match=rf"audition: {words} -> .*audition\.pinned\.code"
    ) as caught:
        chosen(rights(*counts))
    assert caught.value.exit_code == 4


def test_answers_that_hit_the_limit_are_named_so() -> None:
    race = rights(0, 0, 0, of=20)
    cut = [replace(r, finish=FinishReason.LENGTH) for r in race.results["qwen"]]
    race.results["qwen"][:] = cut
    with pytest.raises(RefusedError, match="20 of 20 answers of qwen on code were cut off") as no:
        chosen(race)
    assert "capture.max_new_tokens" in (no.value.remedy or "")


def by_language(**rights_of: Sequence[int]) -> TaskRace:
    """A course of 60 items in two languages: how many of each language's 30 a teacher has right."""
    languages = ["th", "zh"]
    values = {t: [float(k // 2 < rights_of[t][k % 2]) for k in range(60)] for t in TEACHERS}
    done = course(values, "words", [languages[k % 2] for k in range(60)])
    done.update_eliminated(60)
    return done


def test_a_language_whose_ranking_differs_is_a_part_of_its_own() -> None:
    parts = chosen(by_language(qwen=(20, 30), gemma=(0, 0), oss=(29, 20)))
    assert parts == {
        "words": (("qwen", 0.5), ("oss", 0.5)),
        "words/th": (("oss", 1.0),),
        "words/zh": (("qwen", 1.0),),
    }


def test_a_language_that_another_teacher_wins_is_its_own() -> None:
    parts = chosen(by_language(qwen=(8, 30), gemma=(0, 0), oss=(20, 1)))
    assert parts == {"words": (("qwen", 1.0),), "words/th": (("oss", 1.0),)}


def test_who_is_left_out_of_a_language_is_not_said_to_be_below_the_floor() -> None:
    out = build_cast([by_language(qwen=(20, 30), gemma=(13, 13), oss=(29, 20))], EFFORTS, {}, 0.05)
    why = {(r[0], r[1]): r[5] for r in cast_table(out)}
    assert out.decisions["words"].eliminated.keys() == {"gemma"}
    assert (
        why["words", "gemma"].startswith("worse than ")
        and "floor" not in why["words/th", "gemma"] + why["words/zh", "gemma"]
    )
    assert why["words/th", "gemma"].startswith("worse than ")
    left = Cast(
        {"words": (("qwen", 1.0),), "words/th": (("qwen", 1.0),)},
        (Score("oss", "words", "th", ThinkingEffort.LOW, 0.4, 9, 0.1, 0.8),),
        (),
        {
            "words": PartDecision(60, StopReason.BUDGET, {"oss": "qwen"}),
            "words/th": PartDecision(9, StopReason.BUDGET, {"gemma": "qwen"}),
        },
    )
    assert [r[5] for r in cast_table(left)] == ["worse than qwen over all languages"]


def test_a_language_that_differs_by_chance_is_not() -> None:
    assert chosen(by_language(qwen=(22, 28), gemma=(0, 0), oss=(26, 1))) == {
        "words": (("qwen", 1.0),)
    }


def test_prompts_go_to_the_part_of_their_language_and_shares_hold_in_every_stretch() -> None:
    one = Cast({"words": (("qwen", 0.5), ("oss", 0.5)), "words/th": (("gemma", 1.0),)}, ())
    assert [one.part_of("words", x) for x in ("th", "zh", "")] == ["words/th", "words", "words"]
    assert {one.teacher_of("words/th", k) for k in range(50)} == {"gemma"}
    asked = [one.teacher_of("words", k) for k in range(1000)]
    assert all(abs(asked[k : k + 100].count("qwen") - 50) <= 2 for k in range(900))


def test_the_table_tells_every_teacher_and_why() -> None:
    out = build_cast(
        [rights(90, 0, 88), rights(40, 90, 1, name="languages")],
        EFFORTS,
        {"languages": "oss"},
        0.05,
        [
            EffortComparison(
                Score("oss", "code", "", ThinkingEffort.HIGH, 0.97, 100, 0.91, 0.99),
                ThinkingEffort.LOW,
                0.01,
                0.17,
            )
        ],
    )
    rows = cast_table(out)
    assert [(r[0], r[1], r[3], r[4], r[5]) for r in rows] == [
        ("code", "qwen", "100", "50%", "tied"),
        ("code", "oss", "100", "50%", "tied"),
        ("code", "gemma", "100", "-", "worse than qwen"),
        ("languages", "gemma", "100", "-", "another is pinned"),
        ("languages", "qwen", "100", "-", "another is pinned"),
        ("languages", "oss", "100", "100%", "pinned"),
        ("code", "oss at high", "100", "-", "better than at low"),
    ]
    page = cast_markdown(out)
    assert "| code | qwen | 0.90 (0.83-0.94) | 100 | 50% | tied |" in page.splitlines()
    assert "- code: 100 items, all items used" in page
    assert len({line.count("|") for line in page.splitlines() if line.startswith("|")}) == 1


shares = st.lists(
    st.tuples(st.sampled_from(TEACHERS), st.floats(0.01, 1)), min_size=1, max_size=3
).map(tuple)
efforts = st.sampled_from(ThinkingEffort)
measured = st.builds(
    Score,
    st.sampled_from(TEACHERS),
    st.sampled_from(("code", "languages")),
    st.sampled_from(("", "vi", "zh")),
    efforts,
    st.floats(0, 1),
    st.integers(1, 99),
    st.just(0.0),
    st.just(1.0),
    st.integers(0, 3),
    st.integers(0, 3),
)
decided = st.builds(
    PartDecision,
    st.integers(1, 99),
    st.sampled_from(StopReason),
    st.dictionaries(st.sampled_from(TEACHERS), st.sampled_from(TEACHERS)),
)


@given(
    st.dictionaries(st.sampled_from(("code", "languages", "languages/vi")), shares),
    st.lists(measured).map(tuple),
    st.lists(st.sampled_from(("code", "languages"))).map(tuple),
    st.dictionaries(st.sampled_from(("code", "languages/vi")), decided),
    st.lists(
        st.builds(EffortComparison, measured, efforts, st.floats(-1, 1), st.floats(-1, 1))
    ).map(tuple),
)
def test_a_cast_comes_back_from_json(
    parts: dict[str, tuple[tuple[str, float], ...]],
    scores: tuple[Score, ...],
    pinned: tuple[str, ...],
    contests: dict[str, PartDecision],
    dials: tuple[EffortComparison, ...],
) -> None:
    one = Cast(parts, scores, pinned, contests, dials)
    other = Cast.from_json(json.loads(json.dumps(one.to_json())))
    assert other == one
    assert all(isinstance(s.effort, ThinkingEffort) for s in other.scores)


def test_a_cast_of_an_earlier_version_is_read() -> None:
    old = {
        "parts": {"code": [["qwen", 1.0]]},
        "pinned": [],
        "scores": [
            {
                "model_name": "qwen",
                "skill": "code",
                "language": "",
                "effort": "none",
                "value": 0.5,
                "n": 2,
                "low": 0.1,
                "high": 0.9,
            }
        ],
    }
    assert Cast.from_json(old).teacher_of("code", 0) == "qwen"


def test_prompts_are_asked_of_the_teacher_of_their_language() -> None:
    out = Cast({"words": (("qwen", 1.0),), "words/th": (("oss", 0.5), ("gemma", 0.5))}, ())
    prompts = [
        Prompt(f"{language}/{k}", Conversation.from_question(str(k)), "words", language)
        for k in range(10)
        for language in ("th", "zh")
    ]
    units = plan_units(prompts, out, dict.fromkeys(TEACHERS, "identity"), 100, {})
    asked = {u.teacher: [p.language for p in u.prompts] for u in units}
    assert asked == {"qwen": ["zh"] * 10, "oss": ["th"] * 5, "gemma": ["th"] * 5}
