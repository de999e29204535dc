"""Scores with intervals, paired comparisons, and splits that never change."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from persea.chat.messages import Conversation, FinishReason, Message, ThinkingEffort
from persea.data.prompts import Prompt
from persea.errors import (
    MissingRequirementError,
    PerseaError,
    RefusedError,
    StorageError,
    TeacherError,
)
from persea.tasks.generated.draw import draw_items
from persea.tasks.intervals import (
    mean_interval,
    paired_difference_interval,
    paired_ratio_interval,
    wilson_interval,
)
from persea.tasks.task import (
    Grade,
    Score,
    Split,
    Task,
    TaskItem,
    Verdict,
    assign_split,
    compare_paired_results,
    grade_answers,
    score_results,
)


def item(question: str, reference: str = "", language: str = "en") -> TaskItem:
    return TaskItem(
        Prompt(f"id {question}", Conversation.from_question(question), "echo", language),
        reference or question,
    )


def make(number: int) -> tuple[str, TaskItem]:
    """500 questions, many numbers each."""
    question = f"What is {number % 500}?"
    return question, item(question)


ECHO = Task(
    "echo",
    ("en", "th"),
    lambda split, n, seed: draw_items(make, split, n, seed),
    lambda i, said: (
        Verdict.MALFORMED
        if not said.text
        else Verdict.RIGHT
        if said.text == i.reference
        else Verdict.WRONG
    ),
)


@pytest.mark.parametrize(
    ("question", "split"),
    [  # from published SHA-256 values: first byte * 100 // 256
        ("hello", Split.PRETRAIN),
        ("foo", Split.PRETRAIN),
        ("123456", Split.PRETRAIN),
        ("", Split.AUDITION),
        ("abc", Split.TRAIN),
        ("test", Split.TRAIN),
        ("The quick brown fox jumps over the lazy dog", Split.TRAIN),
        ("bar", Split.TEST),
    ],
)
def test_a_question_stays_in_its_split_for_ever(question: str, split: Split):
    assert assign_split(question) is split


def test_the_shares_of_the_splits():
    counts = Counter(assign_split(f"question {k} มี {k * k}") for k in range(20_000))
    shares = {s: counts[s] / 200 for s in Split}
    assert shares == pytest.approx(
        {Split.PRETRAIN: 60, Split.TRAIN: 26, Split.AUDITION: 6, Split.TEST: 8}, abs=1
    )


def test_draw_gives_different_items_of_one_split():
    drawn = {s: draw_items(make, s, 20, 3) for s in Split}
    for split, items in drawn.items():
        questions = [i.prompt.conversation.messages[-1].text for i in items]
        assert len(set(questions)) == len(questions) == 20
        assert {assign_split(q) for q in questions} == {split}


def test_draw_is_the_same_every_time_and_another_with_another_seed():
    assert draw_items(make, Split.PRETRAIN, 50, 1) == draw_items(make, Split.PRETRAIN, 50, 1)
    assert draw_items(make, Split.PRETRAIN, 50, 1)[:20] == draw_items(
        make, Split.PRETRAIN, 20, 1
    )  # more items = the same and then others
    assert draw_items(make, Split.PRETRAIN, 50, 1) != draw_items(make, Split.PRETRAIN, 50, 2)


def test_draw_keeps_the_first_item_of_a_question():
    """六百二十七 is drawn as Chinese or as Japanese, and not by how many items are drawn."""

    def numbered(number: int) -> tuple[str, TaskItem]:
        return str(number % 50), TaskItem(
            Prompt(str(number), Conversation.from_question(str(number % 50)), "echo", "en"), ""
        )

    few, many = (
        draw_items(numbered, Split.PRETRAIN, 5, 0),
        draw_items(numbered, Split.PRETRAIN, 500, 0),
    )
    assert few == many[:5]
    assert [i.prompt.id for i in few] == [
        str(k * 1_000_003)
        for k in range(20)
        if assign_split(str(k * 1_000_003 % 50)) is Split.PRETRAIN
    ][:5]


def test_draw_of_a_small_space_ends_with_all_of_it():
    everything = {make(k)[0] for k in range(500)}
    drawn = {
        s: {i.prompt.conversation.messages[-1].text for i in draw_items(make, s, 500, 0)}
        for s in Split
    }
    assert set().union(*drawn.values()) == everything
    assert sum(map(len, drawn.values())) == 500
    assert draw_items(make, Split.TEST, 0, 0) == ()


def test_grade_counts_only_answers_that_stopped():
    items = [item(q) for q in "abcdef"]
    finishes = [
        FinishReason.STOP,
        FinishReason.STOP,
        FinishReason.STOP,
        FinishReason.LENGTH,
        FinishReason.MALFORMED,
        FinishReason.REFUSED,
    ]
    results = grade_answers(
        ECHO,
        items,
        list(
            zip(map(Message.from_assistant, ("a", "x", "", "d", "e", "f")), finishes, strict=True)
        ),
    )
    assert [r.verdict for r in results] == [Verdict.RIGHT, Verdict.WRONG, *[Verdict.MALFORMED] * 4]
    assert [r.item for r in results] == items
    assert [(r.answer, r.finish) for r in results] == list(
        zip(map(Message.from_assistant, ("a", "x", "", "d", "e", "f")), finishes, strict=True)
    )


def test_a_grader_that_raises_is_counted_and_does_not_end_the_run():
    def moody(i: TaskItem, said: Message) -> Verdict | Grade:
        if said.text == "boom":
            raise ZeroDivisionError("no digits here")
        return Grade(Verdict.RIGHT, 7.0) if said.text == "seven" else Verdict.RIGHT

    answers = [
        (Message.from_assistant(text), FinishReason.STOP) for text in ("fine", "boom", "seven")
    ]
    results = grade_answers(replace(ECHO, grade=moody), [item(q) for q in "abc"], answers)
    assert [(r.verdict, r.value) for r in results] == [
        (Verdict.RIGHT, 1.0),
        (Verdict.GRADER_ERROR, 0.0),
        (Verdict.GRADER_ERROR, 0.0),
    ]
    assert results[1].reason == "ZeroDivisionError: no digits here"
    assert "not in [0, 1]" in results[2].reason
    assert json.loads(json.dumps(results[1].to_json()))["reason"] == results[1].reason
    told = score_results("me", "echo", results, ThinkingEffort.NONE)
    assert (told.value, told.n, told.grader_errors, told.malformed) == (1 / 3, 3, 2, 0)


def test_an_answer_can_be_partly_right():
    skill = replace(
        ECHO,
        grade=lambda i, said: Grade(
            Verdict.RIGHT if said.text == "1.0" else Verdict.WRONG, float(said.text), "chrF"
        ),
    )
    values = (0.0, 0.25, 0.625, 1.0)
    results = grade_answers(
        skill,
        [item(q) for q in "abcd"],
        [(Message.from_assistant(str(v)), FinishReason.STOP) for v in values],
    )
    assert tuple(r.value for r in results) == values
    assert [r.reason for r in results] == ["chrF"] * 4
    told = score_results("me", "echo", results, ThinkingEffort.NONE)
    assert (told.value, told.n) == (sum(values) / 4, 4)
    assert 0 <= told.low < told.value < told.high <= 1


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_grade_outside_its_bounds_is_none(value: float):
    with pytest.raises(ValueError, match=r"not in \[0, 1\]"):
        Grade(Verdict.RIGHT, value)


def test_grading_needs_one_answer_for_each_item():
    with pytest.raises(ValueError, match="shorter"):
        grade_answers(
            ECHO, [item("a"), item("b")], [(Message.from_assistant("a"), FinishReason.STOP)]
        )


def test_score_of_all_and_of_one_language():
    items = [
        item("a"),
        item("b"),
        item("c", language="th"),
        item("d", language="th"),
        item("e", language="th"),
    ]
    answers = [
        *((Message.from_assistant(text), FinishReason.STOP) for text in "abcx"),
        (Message.from_assistant("e"), FinishReason.LENGTH),
    ]
    results = grade_answers(ECHO, items, answers)
    assert score_results("me", "echo", results, ThinkingEffort.LOW) == Score(
        "me", "echo", "", ThinkingEffort.LOW, 3 / 5, 5, *mean_interval([1, 1, 1, 0, 0]), malformed=1
    )
    assert score_results("me", "echo", results, ThinkingEffort.LOW, "th") == Score(
        "me", "echo", "th", ThinkingEffort.LOW, 1 / 3, 3, *mean_interval([1, 0, 0]), malformed=1
    )
    assert score_results("me", "echo", results, ThinkingEffort.LOW, "vi") == Score(
        "me", "echo", "vi", ThinkingEffort.LOW, 0.0, 0, 0.0, 1.0
    )


def test_scores_and_results_are_json():
    results = grade_answers(ECHO, [item("a")], [(Message.from_assistant("x"), FinishReason.STOP)])
    assert json.loads(json.dumps(results[0].to_json())) == {
        "id": "id a",
        "language": "en",
        "question": "a",
        "reference": "a",
        "answer": "x",
        "finish": "stop",
        "verdict": "wrong",
        "value": 0.0,
    }
    assert json.loads(
        json.dumps(score_results("me", "echo", results, ThinkingEffort.NONE).to_json())
    ) == {
        "model_name": "me",
        "skill": "echo",
        "language": "",
        "effort": "none",
        "value": 0.0,
        "n": 1,
        "low": 0.0,
        "high": pytest.approx(wilson_interval(0, 1)[1]),
        "grader_errors": 0,
        "malformed": 0,
    }


def test_a_pair_is_of_the_items_both_were_asked():
    items = [item(q, language="th" if q in "ab" else "en") for q in "abcdef"]
    mine = grade_answers(
        ECHO,
        items[:5],
        [(Message.from_assistant(x), FinishReason.STOP) for x in ("a", "x", "c", "d", "e")],
    )
    its = grade_answers(
        ECHO,
        items[::-1],
        [(Message.from_assistant(x), FinishReason.STOP) for x in ("f", "x", "x", "c", "x", "a")],
    )
    told = compare_paired_results(("me", "you"), "echo", mine, its, ThinkingEffort.NONE)
    x, y = [1.0, 0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0, 0.0]
    assert (told.model_name, told.other_model_name, told.skill, told.language, told.n) == (
        "me",
        "you",
        "echo",
        "",
        5,
    )
    assert (told.difference, told.retained) == pytest.approx((2 / 5, 4 / 2))
    assert (told.low, told.high) == paired_difference_interval(x, y)
    assert told.retained_low == paired_ratio_interval(x, y)[0]
    assert told.retained_high == (
        None if paired_ratio_interval(x, y)[1] == float("inf") else paired_ratio_interval(x, y)[1]
    )
    thai = compare_paired_results(
        ("me", "you"), "echo", mine, its, ThinkingEffort.NONE, "th", confidence=0.99
    )
    assert (thai.n, thai.difference, thai.low) == (
        2,
        0.0,
        paired_difference_interval([1, 0], [1, 0], 0.99)[0],
    )
    assert json.loads(json.dumps(told.to_json(), allow_nan=False))["retained"] == 2.0


def test_nothing_is_retained_of_a_model_with_nothing_right():
    items = [item(q) for q in "ab"]
    mine, its = (
        grade_answers(ECHO, items, [(Message.from_assistant(x), FinishReason.STOP) for x in said])
        for said in ("ab", "xx")
    )
    told = compare_paired_results(("me", "you"), "echo", mine, its, ThinkingEffort.NONE)
    assert (told.retained, told.retained_low, told.retained_high) == (None, None, None)


def test_models_without_a_common_item_are_not_compared():
    mine, its = (
        grade_answers(ECHO, [item(q)], [(Message.from_assistant(q), FinishReason.STOP)])
        for q in "ab"
    )
    with pytest.raises(ValueError, match="no pairs"):
        compare_paired_results(("me", "you"), "echo", mine, its, ThinkingEffort.NONE)


@pytest.mark.parametrize(
    "gone", [MissingRequirementError, RefusedError, StorageError, TeacherError]
)
def test_errors_of_a_graders_resources_are_raised(gone: type[PerseaError]):
    def breaks(one: TaskItem, said: Message) -> Verdict:
        raise gone("the sandbox, the judge or the disk is gone")

    with pytest.raises(gone):
        grade_answers(
            replace(ECHO, grade=breaks),
            [item("a")],
            [(Message.from_assistant("a"), FinishReason.STOP)],
        )
