"""One number with its interval; and who may see which question, for ever."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from persea.chat.messages import Conversation, Effort, Finish, Message
from persea.data.prompts import Prompt
from persea.errors import EnvironmentLacks, PerseaError, Refused, StorageError, TeacherError
from persea.tasks.intervals import of_difference, of_mean, of_ratio, wilson
from persea.tasks.task import Grade, Item, Score, Skill, Split, Verdict, draw, grade, paired, score, split_of


def item(question: str, reference: str = "", language: str = "en") -> Item:
    return Item(Prompt(f"id {question}", Conversation.ask(question), "echo", language), reference or question)


def make(number: int) -> tuple[str, Item]:
    """500 questions, many numbers each."""
    question = f"What is {number % 500}?"
    return question, item(question)


ECHO = Skill("echo", ("en", "th"), lambda split, n, seed: draw(make, split, n, seed),
             lambda i, said: Verdict.MALFORMED if not said.text else Verdict.RIGHT if said.text == i.reference else Verdict.WRONG)


@pytest.mark.parametrize(("question", "split"), [  # from published SHA-256 values: first byte * 100 // 256
    ("hello", Split.GROW), ("foo", Split.GROW), ("123456", Split.GROW), ("", Split.AUDITION), ("abc", Split.TEACH), ("test", Split.TEACH),
    ("The quick brown fox jumps over the lazy dog", Split.TEACH), ("bar", Split.TEST)])
def test_a_question_stays_in_its_split_for_ever(question: str, split: Split):
    assert split_of(question) is split


def test_the_shares_of_the_splits():
    counts = Counter(split_of(f"question {k} มี {k * k}") for k in range(20_000))
    shares = {s: counts[s] / 200 for s in Split}
    assert shares == pytest.approx({Split.GROW: 60, Split.TEACH: 26, Split.AUDITION: 6, Split.TEST: 8}, abs=1)


def test_draw_gives_different_items_of_one_split():
    drawn = {s: draw(make, s, 20, 3) for s in Split}
    for split, items in drawn.items():
        questions = [i.prompt.conversation.messages[-1].text for i in items]
        assert len(set(questions)) == len(questions) == 20
        assert {split_of(q) for q in questions} == {split}


def test_draw_is_the_same_every_time_and_another_with_another_seed():
    assert draw(make, Split.GROW, 50, 1) == draw(make, Split.GROW, 50, 1)
    assert draw(make, Split.GROW, 50, 1)[:20] == draw(make, Split.GROW, 20, 1)  # more items = the same and then others
    assert draw(make, Split.GROW, 50, 1) != draw(make, Split.GROW, 50, 2)


def test_draw_keeps_the_first_item_of_a_question():
    """六百二十七 is drawn as Chinese or as Japanese; which one must not depend on how many are drawn."""
    def numbered(number: int) -> tuple[str, Item]:
        return str(number % 50), Item(Prompt(str(number), Conversation.ask(str(number % 50)), "echo", "en"), "")

    few, many = draw(numbered, Split.GROW, 5, 0), draw(numbered, Split.GROW, 500, 0)
    assert few == many[:5]
    assert [i.prompt.id for i in few] == [str(k * 1_000_003) for k in range(20) if split_of(str(k * 1_000_003 % 50)) is Split.GROW][:5]


def test_draw_of_a_small_space_ends_with_all_of_it():
    everything = {make(k)[0] for k in range(500)}
    drawn = {s: {i.prompt.conversation.messages[-1].text for i in draw(make, s, 500, 0)} for s in Split}
    assert set().union(*drawn.values()) == everything
    assert sum(map(len, drawn.values())) == 500
    assert draw(make, Split.TEST, 0, 0) == ()


def test_grade_counts_only_answers_that_stopped():
    items = [item(q) for q in "abcdef"]
    finishes = [Finish.STOP, Finish.STOP, Finish.STOP, Finish.LENGTH, Finish.MALFORMED, Finish.REFUSED]
    results = grade(ECHO, items, list(zip(map(Message.said, ("a", "x", "", "d", "e", "f")), finishes, strict=True)))
    assert [r.verdict for r in results] == [Verdict.RIGHT, Verdict.WRONG, *[Verdict.MALFORMED] * 4]
    assert [r.item for r in results] == items
    assert [(r.answer, r.finish) for r in results] == list(zip(map(Message.said, ("a", "x", "", "d", "e", "f")), finishes, strict=True))


def test_a_grader_that_breaks_is_counted_and_named_and_ends_nothing():
    def moody(i: Item, said: Message) -> Verdict | Grade:
        if said.text == "boom":
            raise ZeroDivisionError("no digits here")
        return Grade(Verdict.RIGHT, 7.0) if said.text == "seven" else Verdict.RIGHT

    answers = [(Message.said(text), Finish.STOP) for text in ("fine", "boom", "seven")]
    results = grade(replace(ECHO, grade=moody), [item(q) for q in "abc"], answers)
    assert [(r.verdict, r.value) for r in results] == [(Verdict.RIGHT, 1.0), (Verdict.FAILED, 0.0), (Verdict.FAILED, 0.0)]
    assert results[1].why == "ZeroDivisionError: no digits here"
    assert "not in [0, 1]" in results[2].why
    assert json.loads(json.dumps(results[1].to_json()))["why"] == results[1].why
    told = score("me", "echo", results, Effort.NONE)
    assert (told.value, told.n, told.failed, told.malformed) == (1 / 3, 3, 2, 0)


def test_an_answer_may_be_good_in_part():
    skill = replace(ECHO, grade=lambda i, said: Grade(Verdict.RIGHT if said.text == "1.0" else Verdict.WRONG, float(said.text), "chrF"))
    values = (0.0, 0.25, 0.625, 1.0)
    results = grade(skill, [item(q) for q in "abcd"], [(Message.said(str(v)), Finish.STOP) for v in values])
    assert tuple(r.value for r in results) == values
    assert [r.why for r in results] == ["chrF"] * 4
    told = score("me", "echo", results, Effort.NONE)
    assert (told.value, told.n) == (sum(values) / 4, 4)
    assert 0 <= told.low < told.value < told.high <= 1


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_grade_outside_its_bounds_is_none(value: float):
    with pytest.raises(ValueError, match=r"not in \[0, 1\]"):
        Grade(Verdict.RIGHT, value)


def test_grade_wants_one_answer_an_item():
    with pytest.raises(ValueError, match="shorter"):
        grade(ECHO, [item("a"), item("b")], [(Message.said("a"), Finish.STOP)])


def test_score_of_all_and_of_one_language():
    items = [item("a"), item("b"), item("c", language="th"), item("d", language="th"), item("e", language="th")]
    answers = [*((Message.said(text), Finish.STOP) for text in "abcx"), (Message.said("e"), Finish.LENGTH)]
    results = grade(ECHO, items, answers)
    assert score("me", "echo", results, Effort.LOW) == Score("me", "echo", "", Effort.LOW, 3 / 5, 5, *of_mean([1, 1, 1, 0, 0]), malformed=1)
    assert score("me", "echo", results, Effort.LOW, "th") == Score("me", "echo", "th", Effort.LOW, 1 / 3, 3, *of_mean([1, 0, 0]), malformed=1)
    assert score("me", "echo", results, Effort.LOW, "vi") == Score("me", "echo", "vi", Effort.LOW, 0.0, 0, 0.0, 1.0)


def test_scores_and_results_are_json():
    results = grade(ECHO, [item("a")], [(Message.said("x"), Finish.STOP)])
    assert json.loads(json.dumps(results[0].to_json())) == {
        "id": "id a", "language": "en", "question": "a", "reference": "a", "answer": "x", "finish": "stop", "verdict": "wrong",
        "value": 0.0}
    assert json.loads(json.dumps(score("me", "echo", results, Effort.NONE).to_json())) == {
        "speaker": "me", "skill": "echo", "language": "", "effort": "none", "value": 0.0, "n": 1,
        "low": 0.0, "high": pytest.approx(wilson(0, 1)[1]), "failed": 0, "malformed": 0}


def test_a_pair_is_of_the_items_both_were_asked():
    items = [item(q, language="th" if q in "ab" else "en") for q in "abcdef"]
    mine = grade(ECHO, items[:5], [(Message.said(x), Finish.STOP) for x in ("a", "x", "c", "d", "e")])
    its = grade(ECHO, items[::-1], [(Message.said(x), Finish.STOP) for x in ("f", "x", "x", "c", "x", "a")])
    told = paired(("me", "you"), "echo", mine, its, Effort.NONE)
    x, y = [1.0, 0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0, 0.0]
    assert (told.speaker, told.other, told.skill, told.language, told.n) == ("me", "you", "echo", "", 5)
    assert (told.difference, told.kept) == pytest.approx((2 / 5, 4 / 2))
    assert (told.low, told.high) == of_difference(x, y)
    assert told.least == of_ratio(x, y)[0]
    assert told.most == (None if of_ratio(x, y)[1] == float("inf") else of_ratio(x, y)[1])
    thai = paired(("me", "you"), "echo", mine, its, Effort.NONE, "th", confidence=0.99)
    assert (thai.n, thai.difference, thai.low) == (2, 0.0, of_difference([1, 0], [1, 0], 0.99)[0])
    assert json.loads(json.dumps(told.to_json(), allow_nan=False))["kept"] == 2.0


def test_beside_somebody_with_nothing_right_nothing_is_kept():
    items = [item(q) for q in "ab"]
    mine, its = (grade(ECHO, items, [(Message.said(x), Finish.STOP) for x in said]) for said in ("ab", "xx"))
    told = paired(("me", "you"), "echo", mine, its, Effort.NONE)
    assert (told.kept, told.least, told.most) == (None, None, None)


def test_without_a_common_item_there_is_no_pair():
    mine, its = (grade(ECHO, [item(q)], [(Message.said(q), Finish.STOP)]) for q in "ab")
    with pytest.raises(ValueError, match="no pairs"):
        paired(("me", "you"), "echo", mine, its, Effort.NONE)


@pytest.mark.parametrize("gone", [EnvironmentLacks, Refused, StorageError, TeacherError])
def test_what_graders_grade_with_is_no_answers_fault(gone: type[PerseaError]):
    def breaks(one: Item, said: Message) -> Verdict:
        raise gone("the sandbox, the judge or the disk is gone")

    with pytest.raises(gone):
        grade(replace(ECHO, grade=breaks), [item("a")], [(Message.said("a"), Finish.STOP)])
