"""Rounds of questions: the ranking is settled when it is, an error is as rare as promised however
often one looks, the hopeless are left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persea.chat.messages import Conversation, FinishReason, Message, ThinkingEffort
from persea.data.prompts import Prompt
from persea.evaluation.racing import (
    FIRST_ROUND_ITEMS,
    MIN_ITEMS_PER_LANGUAGE,
    StopReason,
    TaskRace,
    compare_efforts,
    find_eliminated,
    interleave_languages,
    race_teachers,
    round_bounds,
)
from persea.tasks.task import ItemResult, Split, Task, TaskItem, Verdict

TEACHERS = ("qwen", "gemma", "oss")


def item(number: int, language: str = "en", skill: str = "code") -> TaskItem:
    return TaskItem(
        Prompt(f"{skill}/{number}", Conversation.from_question(str(number)), skill, language), "x"
    )


def result(of: TaskItem, value: float) -> ItemResult:
    return ItemResult(
        of,
        Message.from_assistant("x"),
        FinishReason.STOP,
        Verdict.RIGHT if value == 1 else Verdict.WRONG,
        value,
    )


def course(
    values: dict[str, list[float]], name: str = "code", languages: Sequence[str] = ()
) -> TaskRace:
    """A course whose items have all been asked."""
    n = len(next(iter(values.values())))
    items = tuple(item(k, languages[k] if languages else "en", name) for k in range(n))
    return TaskRace(
        name,
        items,
        values,
        {t: [result(i, v) for i, v in zip(items, mine, strict=True)] for t, mine in values.items()},
    )


def skill(name: str = "code") -> Task:
    return Task(name, ("en",), lambda split, n, seed: (), lambda i, said: Verdict.WRONG)


def held(
    ability: Callable[[str, TaskItem], float],
    items: Sequence[TaskItem],
    seed: int = 0,
    teachers: Sequence[str] = TEACHERS,
) -> tuple[TaskRace, list[tuple[str, int]]]:
    """A contest of one skill whose teachers are right where `ability` says so, and who was asked
    how many in each turn.
    """
    asked: list[tuple[str, int]] = []

    def ask(name: str, skill: Task, some: Sequence[TaskItem]) -> list[ItemResult]:
        asked.append((name, len(some)))
        return [result(i, ability(name, i)) for i in some]

    (one,) = race_teachers(teachers, [(skill(), items)], seed, ask)
    return one, asked


def draws(seed: int, **shares: float) -> Callable[[str, TaskItem], float]:
    """Each teacher right on a share of items that chance draws."""
    return lambda name, i: float(
        np.random.default_rng([seed, *name.encode(), *i.prompt.id.encode()]).random() < shares[name]
    )


# --- in what order ---


@given(st.lists(st.sampled_from(("zh", "th", "id")), min_size=1, max_size=60), st.integers(0, 9))
def test_blocks_hold_one_item_of_each_language_as_long_as_they_last(
    languages: list[str], seed: int
) -> None:
    items = [item(k, language) for k, language in enumerate(languages)]
    order = interleave_languages(items, seed)
    assert sorted(i.prompt.id for i in order) == sorted(i.prompt.id for i in items)
    least, kinds = min(Counter(languages).values()), len(set(languages))
    for begin in range(0, least * kinds, kinds):
        assert len({i.prompt.language for i in order[begin : begin + kinds]}) == kinds
    assert (
        interleave_languages(items[::-1], seed) == order or kinds > 1
    )  # of what it is given in another order chance makes the same


def test_another_seed_is_another_order() -> None:
    items = [item(k) for k in range(40)]
    assert interleave_languages(items, 0) != interleave_languages(items, 1)


@given(st.integers(1, 12), st.integers(1, 500))
def test_rounds_tile_the_questions_in_whole_blocks(languages: int, most: int) -> None:
    spans = list(round_bounds(languages, most))
    assert spans[0][0] == 0
    assert spans[-1][1] == most
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert all(end % languages == 0 for _, end in spans[:-1])
    assert all(end - begin >= FIRST_ROUND_ITEMS for begin, end in spans[:-1])
    assert len(spans) <= 12


# --- who is beaten ---


def test_ten_clean_wins_settle_five_teachers_and_nine_settle_three() -> None:
    def wins(n: int, teachers: int) -> dict[str, str]:
        return find_eliminated(
            {"a": [1.0] * n, **{f"t{k}": [0.0] * n for k in range(teachers - 1)}},
            0.05,
            is_last_look=False,
            eliminated={},
        )

    assert wins(10, 5) == {f"t{k}": "a" for k in range(4)}
    assert wins(9, 5) == {}
    assert wins(9, 3) == {"t0": "a", "t1": "a"}
    assert wins(8, 3) == {}


def test_the_last_look_tells_more_apart() -> None:
    values = {"a": [1.0] * 25 + [0.0] * 10 + [1.0] * 65, "b": [0.0] * 25 + [1.0] * 10 + [1.0] * 65}
    assert find_eliminated(values, 0.05, is_last_look=False, eliminated={}) == {}
    assert find_eliminated(values, 0.05, is_last_look=True, eliminated={}) == {"b": "a"}
    assert (
        find_eliminated(
            {t: v[:60] for t, v in values.items()} | {"c": []},
            0.05,
            is_last_look=False,
            eliminated={},
        )
        == {}
    )


def test_who_is_out_stays_out_and_beats_nobody() -> None:
    values = {"a": [1.0] * 20, "b": [0.0] * 20, "c": [0.0] * 20}
    assert find_eliminated(values, 0.05, is_last_look=False, eliminated={"a": "b"}) == {"a": "b"}


def test_equal_teachers_are_seldom_told_apart_however_often_one_looks() -> None:
    """300 contests of three equal teachers, each looked at after every round: each is dropped in at
    most 5 % of them.
    """
    dropped, contests = Counter[str](), 300
    rng = np.random.default_rng(5)
    for _ in range(contests):
        values = (rng.random((3, 100)) < 0.5).astype(float)
        done = course(dict(zip(TEACHERS, values.tolist(), strict=True)))
        whole = done.scores
        for _, end in round_bounds(1, 100):
            done.scores = {t: v[:end] for t, v in whole.items()}
            done.update_eliminated(end)
        dropped.update(done.eliminated.keys())
    assert all(0 < dropped[t] <= 0.05 * contests for t in TEACHERS), (
        dropped
    )  # 0 would say that nothing was tested


# --- a whole contest ---


def test_a_clear_ranking_is_settled_with_the_first_round() -> None:
    one, asked = held(lambda name, i: float(name == "gemma"), [item(k) for k in range(100)])
    assert one.stop_reason is StopReason.SETTLED
    assert asked == [(t, FIRST_ROUND_ITEMS) for t in TEACHERS]
    assert one.eliminated == {"qwen": "gemma", "oss": "gemma"}


def test_teachers_come_in_turn_and_back() -> None:
    _, asked = held(draws(0, qwen=0.5, gemma=0.5, oss=0.5), [item(k) for k in range(40)])
    assert [t for t, _ in asked] == [*TEACHERS, *TEACHERS[::-1]] * 2
    assert sum(n for _, n in asked) == 120


def test_equals_use_up_the_questions() -> None:
    one, _ = held(draws(1, qwen=0.7, gemma=0.0, oss=0.7), [item(k) for k in range(60)])
    assert one.stop_reason is StopReason.BUDGET
    assert set(one.eliminated) == {"gemma"}
    assert [len(one.scores[t]) for t in TEACHERS] == [60, 10, 60]  # the beaten one is asked no more


@pytest.mark.parametrize("seed", range(5))
def test_the_strongest_is_found_with_a_part_of_the_questions(seed: int) -> None:
    one, asked = held(
        draws(seed, qwen=0.3, gemma=0.9, oss=0.2), [item(k) for k in range(400)], seed
    )
    assert one.stop_reason is StopReason.SETTLED
    assert set(one.eliminated) == {"qwen", "oss"}
    assert sum(n for _, n in asked) < 0.25 * 3 * 400


def test_one_teacher_alone_is_asked_one_round() -> None:
    one, asked = held(lambda name, i: 1.0, [item(k) for k in range(100)], teachers=("qwen",))
    assert (one.stop_reason, asked) == (StopReason.SETTLED, [("qwen", FIRST_ROUND_ITEMS)])


def test_every_language_is_looked_at_before_a_skill_is_settled() -> None:
    items = [item(k, f"l{k % 6}") for k in range(120)]
    one, _ = held(lambda name, i: float(name == "gemma"), items)
    assert (one.stop_reason, len(one.scores["gemma"])) == (
        StopReason.SETTLED,
        6 * MIN_ITEMS_PER_LANGUAGE,
    )


def test_a_beaten_teacher_that_is_ahead_in_a_language_is_asked_on() -> None:
    """gemma is best nearly everywhere; oss, beaten on the whole, is the only one that knows l0."""
    items = [item(k, f"l{k % 4}") for k in range(200)]
    one, _ = held(
        lambda name, i: (
            float(name == "oss") if i.prompt.language == "l0" else float(name == "gemma")
        ),
        items,
    )
    assert one.eliminated["oss"] == "gemma"
    assert len(one.scores["oss"]) == len(one.scores["gemma"]) > 6 * MIN_ITEMS_PER_LANGUAGE
    assert len(one.scores["qwen"]) < len(one.scores["oss"])


def test_other_efforts_are_asked_the_same_questions() -> None:
    one, _ = held(lambda name, i: float(name == "gemma"), [item(k) for k in range(100)])
    asked: list[tuple[str, ThinkingEffort, tuple[TaskItem, ...]]] = []

    def ask(
        name: str, effort: ThinkingEffort, skill: Task, some: Sequence[TaskItem]
    ) -> list[ItemResult]:
        asked.append((name, effort, tuple(some)))
        return [result(i, 1.0) for i in some]

    efforts = {
        "qwen": (ThinkingEffort.NONE, ThinkingEffort.HIGH),
        "gemma": (ThinkingEffort.NONE,),
        "oss": (ThinkingEffort.LOW, ThinkingEffort.HIGH),
    }
    dials, said = compare_efforts([one], [skill()], efforts, ask)
    assert asked == [
        (t, ThinkingEffort.HIGH, one.items[:FIRST_ROUND_ITEMS]) for t in ("qwen", "oss")
    ]
    assert [
        (d.score.model_name, d.score.effort, d.own_effort, d.score.value, d.low > 0) for d in dials
    ] == [
        ("qwen", ThinkingEffort.HIGH, ThinkingEffort.NONE, 1.0, True),
        ("oss", ThinkingEffort.HIGH, ThinkingEffort.LOW, 1.0, True),
    ]
    assert {(t, e): len(r) for (t, _, e), r in said.items()} == {
        (t, e): FIRST_ROUND_ITEMS for t, mine in efforts.items() for e in mine
    }


def test_the_split_of_the_audition_is_not_the_test() -> None:
    from persea.tasks.generated import GENERATED_TASKS

    for one in GENERATED_TASKS:
        mine, its = (
            {i.prompt.id for i in one.items(split, 60, 3)} for split in (Split.AUDITION, Split.TEST)
        )
        assert mine and its and not mine & its
