"""Questions whose answers are right, graders that know it, and an evaluator that no program gets out of."""

from __future__ import annotations

import ast
import datetime
import re
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persea import skills
from persea.chat import Message
from persea.errors import DataError
from persea.measure import Item, Skill, Split, Verdict
from persea.skills import CODE, LANGUAGES, REASONING, SKILLS
from persea.skills.code import PROBES_OF_LIST, PROBES_OF_NUMBER, NotAllowed, function
from persea.skills.languages import NAMES, day, number
from persea.skills.reasoning import final_number


@pytest.fixture(scope="module", params=SKILLS, ids=lambda s: s.name)
def drawn(request: pytest.FixtureRequest) -> tuple[Skill, dict[Split, tuple[Item, ...]]]:
    """A skill and 300 items of each of its splits."""
    return request.param, {split: request.param.items(split, 300, 5) for split in Split}


def question(item: Item) -> str:
    return item.prompt.conversation.messages[-1].text


# ---- all skills ----------------------------------------------------------------------------------------------------


def test_skills_are_found_by_name():
    assert [skills.named(s.name) for s in SKILLS] == list(SKILLS)
    with pytest.raises(DataError, match="unknown skill 'cooking'") as caught:
        skills.named("cooking")
    assert all(s.name in caught.value.remedy for s in SKILLS)


def test_items_are_tagged_different_and_normalised(drawn):
    skill, by_split = drawn
    for items in by_split.values():
        assert len(items) == 300
        assert len({i.prompt.id for i in items}) == 300
        for i in items:
            assert i.prompt.skill == skill.name
            assert i.prompt.language in skill.languages
            assert unicodedata.is_normalized("NFC", question(i) + i.reference)
            assert i.reference == i.reference.strip()
    assert {i.prompt.language for items in by_split.values() for i in items} == set(skill.languages)


def test_references_are_right(drawn):
    skill, by_split = drawn
    for items in by_split.values():
        assert {skill.grade(i, Message.said(i.reference)) for i in items} == {Verdict.RIGHT}
        assert {skill.grade(i, Message.said(f"\n{i.reference} \n")) for i in items} == {Verdict.RIGHT}


def test_nothing_and_noise_are_never_right(drawn):
    skill, by_split = drawn
    for i in by_split[Split.TEST]:
        for answer in ("", " ", "I do not know.", "Sure!", question(i), "\x00", "๙" * 5000, "9" * 5000):
            lucky = skill is REASONING and final_number(answer) == final_number(i.reference)  # the question ends with its answer
            assert lucky or skill.grade(i, Message.said(answer)) is not Verdict.RIGHT


def test_no_question_is_in_two_splits(drawn):
    """By its words, whatever its language and its id: 六百二十七 is one question in Chinese and in Japanese."""
    _, by_split = drawn
    seen = {split: {question(i) for i in items} for split, items in by_split.items()}
    for one in Split:
        for other in Split:
            assert one is other or not seen[one] & seen[other]


def test_items_are_the_same_every_time(drawn):
    skill, by_split = drawn
    assert skill.items(Split.TEST, 40, 5) == by_split[Split.TEST][:40]
    assert skill.items(Split.TEST, 40, 6) != by_split[Split.TEST][:40]


# ---- languages -----------------------------------------------------------------------------------------------------

# The standard written forms, from outside this project: number -> zh ja ko vi id th en
WORDS = {
    0: "零 | 零 | 영 | không | nol | ศูนย์ | zero",
    1: "一 | 一 | 일 | một | satu | หนึ่ง | one",
    5: "五 | 五 | 오 | năm | lima | ห้า | five",
    10: "十 | 十 | 십 | mười | sepuluh | สิบ | ten",
    11: "十一 | 十一 | 십일 | mười một | sebelas | สิบเอ็ด | eleven",
    15: "十五 | 十五 | 십오 | mười lăm | lima belas | สิบห้า | fifteen",
    20: "二十 | 二十 | 이십 | hai mươi | dua puluh | ยี่สิบ | twenty",
    21: "二十一 | 二十一 | 이십일 | hai mươi mốt | dua puluh satu | ยี่สิบเอ็ด | twenty-one",
    25: "二十五 | 二十五 | 이십오 | hai mươi lăm | dua puluh lima | ยี่สิบห้า | twenty-five",
    55: "五十五 | 五十五 | 오십오 | năm mươi lăm | lima puluh lima | ห้าสิบห้า | fifty-five",
    100: "一百 | 百 | 백 | một trăm | seratus | หนึ่งร้อย | one hundred",
    101: "一百零一 | 百一 | 백일 | một trăm linh một | seratus satu | หนึ่งร้อยเอ็ด | one hundred one",
    105: "一百零五 | 百五 | 백오 | một trăm linh năm | seratus lima | หนึ่งร้อยห้า | one hundred five",
    110: "一百一十 | 百十 | 백십 | một trăm mười | seratus sepuluh | หนึ่งร้อยสิบ | one hundred ten",
    111: "一百一十一 | 百十一 | 백십일 | một trăm mười một | seratus sebelas | หนึ่งร้อยสิบเอ็ด | one hundred eleven",
    115: "一百一十五 | 百十五 | 백십오 | một trăm mười lăm | seratus lima belas | หนึ่งร้อยสิบห้า | one hundred fifteen",
    121: "一百二十一 | 百二十一 | 백이십일 | một trăm hai mươi mốt | seratus dua puluh satu | หนึ่งร้อยยี่สิบเอ็ด | one hundred twenty-one",
    205: "二百零五 | 二百五 | 이백오 | hai trăm linh năm | dua ratus lima | สองร้อยห้า | two hundred five",
    999: "九百九十九 | 九百九十九 | 구백구십구 | chín trăm chín mươi chín | sembilan ratus sembilan puluh sembilan | เก้าร้อยเก้าสิบเก้า"
         " | nine hundred ninety-nine",
}
SPOKEN = ("zh", "ja", "ko", "vi", "id", "th", "en")


@pytest.mark.parametrize("n", WORDS)
def test_numbers_in_words(n: int):
    want = dict(zip(SPOKEN, (unicodedata.normalize("NFC", w.strip()) for w in WORDS[n].split("|")), strict=True))
    assert {language: number(n, language) for language in SPOKEN} == want


@pytest.mark.parametrize("language", SPOKEN)
def test_every_number_has_its_own_words(language: str):
    words = [number(n, language) for n in range(1000)]
    assert len(set(words)) == 1000
    assert not any(re.search(r"\d|  |^ | $", w) for w in words)


@pytest.mark.parametrize(("language", "want"), [
    ("en", "Thursday, 29 February"), ("zh", "2月29日星期四"), ("ja", "2月29日木曜日"), ("ko", "2월 29일 목요일"),
    ("vi", "thứ năm, ngày 29 tháng 2"), ("id", "Kamis, 29 Februari"), ("th", "วันพฤหัสบดีที่ 29 กุมภาพันธ์")])
def test_dates_in_words(language: str, want: str):
    assert day(3, 29, 2, language) == unicodedata.normalize("NFC", want)


@pytest.mark.parametrize(("language", "days"), [
    ("zh", "星期一 星期二 星期三 星期四 星期五 星期六 星期日"), ("ja", "月曜日 火曜日 水曜日 木曜日 金曜日 土曜日 日曜日"),
    ("ko", "월요일 화요일 수요일 목요일 금요일 토요일 일요일"), ("id", "Senin Selasa Rabu Kamis Jumat Sabtu Minggu"),
    ("vi", "thứ_hai thứ_ba thứ_tư thứ_năm thứ_sáu thứ_bảy chủ_nhật"), ("th", "จันทร์ อังคาร พุธ พฤหัสบดี ศุกร์ เสาร์ อาทิตย์"),
    ("en", "Monday Tuesday Wednesday Thursday Friday Saturday Sunday")])
def test_the_days_of_the_week(language: str, days: str):
    names = [unicodedata.normalize("NFC", d.replace("_", " ")) for d in days.split()]
    for weekday, name in enumerate(names):
        said = day(weekday, 5, 5, language)
        assert [n for n in names if n in said] == [name]


def test_english_months_are_the_calendars():
    for month in range(1, 13):
        assert day(0, 7, month, "en") == f"Monday, 7 {datetime.date(2024, month, 1):%B}"


def test_translations_are_exact_or_wrong():
    for i in LANGUAGES.items(Split.AUDITION, 100, 1):
        assert LANGUAGES.grade(i, Message.said(unicodedata.normalize("NFD", i.reference))) is Verdict.RIGHT
        assert LANGUAGES.grade(i, Message.said(i.reference + ".")) is Verdict.WRONG
        assert LANGUAGES.grade(i, Message.said(i.reference[:-1])) is Verdict.WRONG
        assert LANGUAGES.grade(i, Message.said(i.reference.upper() + "!")) is Verdict.WRONG


def test_translations_go_both_ways_and_say_where_to():
    items = LANGUAGES.items(Split.TEACH, 300, 1)
    for i in items:
        target = re.fullmatch(r"Translate to (\w+): (.+)", question(i))
        assert target
        assert target[1] in ("English", NAMES[i.prompt.language])
        assert ("/to-english/" in i.prompt.id) == (target[1] == "English")
    assert {"/to-english/" in i.prompt.id for i in items} == {True, False}


# ---- reasoning -----------------------------------------------------------------------------------------------------


def test_every_sum_is_right_by_another_reading():
    """The figures are read from the question again, and the answer is worked out here."""
    kinds = set()
    for i in REASONING.items(Split.GROW, 600, 3):
        figures = [int(f) for f in re.findall(r"\d+", question(i))]
        signs = [{"gets": 1, "loses": -1}[w] for w in re.findall("gets|loses", question(i))]
        want = max(figures) if "Which is more" in question(i) else figures[0] + sum(s * f for s, f in zip(signs, figures[1:], strict=True))
        assert i.reference.rpartition("Answer: ")[2] == str(want)
        assert want >= 0
        assert all(eval(step.replace("=", "==")) for step in re.findall(r"[\d+-]+=\d+", i.reference))
        kinds.add((len(figures), tuple(signs)))
    assert kinds == {(2, (1,)), (2, (-1,)), (3, (1, -1)), (2, ())}


@pytest.mark.parametrize(("text", "want"), [
    ("Answer: 12", 12), ("5+7=12. Answer: 12.", 12), ("12 apples, not 13", 13), ("-3", -3), ("no number", None), ("", None),
    ("๑๒", 12), ("007", 7), ("9" * 5000, None), ("12 " + "9" * 5000, None)])
def test_the_last_number_of_an_answer(text: str, want: int | None):
    assert final_number(text) == want


def test_sums_are_right_wrong_or_no_number():
    for i in REASONING.items(Split.TEST, 60, 1):
        right = final_number(i.reference)
        assert right is not None
        assert REASONING.grade(i, Message.said(f"So it is {right}.")) is Verdict.RIGHT
        assert REASONING.grade(i, Message.said(f"Answer: {right + 1}")) is Verdict.WRONG
        assert REASONING.grade(i, Message.said(f"Answer: -{right + 1}")) is Verdict.WRONG
        assert REASONING.grade(i, Message.said("Answer: many")) is Verdict.MALFORMED


# ---- code ----------------------------------------------------------------------------------------------------------


def test_references_compute_what_python_computes():
    for i in CODE.items(Split.GROW, 200, 2):
        names: dict[str, object] = {}
        exec(i.reference, names)  # our own generator's one-liners
        for probe in PROBES_OF_LIST if "/list/" in i.prompt.id else PROBES_OF_NUMBER:
            assert function(i.reference)(probe) == names["f"](probe)  # type: ignore[operator]


@pytest.fixture(scope="module")
def line() -> Item:
    """An item whose answer is of the form x * 3 + 4."""
    return next(i for i in CODE.items(Split.TEST, 20, 1) if "/line/" in i.prompt.id)


def test_programs_are_graded_by_their_values(line: Item):
    body = line.reference.partition("return ")[2]
    for right in (f"def f(x): return {body}", f"def f(y):\n    return {body.replace('x', 'y')}", f"def f(x):\n  return 0 + ({body}) * 1",
                  f"def f(x: int) -> int:\n    return {body}"):
        assert CODE.grade(line, Message.said(right)) is Verdict.RIGHT
    for wrong in ("def f(x):\n    return x", f"def f(x):\n    return {body} + 1", f"def f(x):\n    return {body} if x < 90 else 0"):
        assert CODE.grade(line, Message.said(wrong)) is Verdict.WRONG


@pytest.mark.parametrize("source", [
    "", "f", "return 1", "def f(x):\n    pass", "def f(x):\n    return", "def g(x):\n    return x", "def f():\n    return 1",
    "def f(x, y):\n    return x", "def f(x=1):\n    return x", "def f(*x):\n    return x", "def f(x, *y):\n    return x",
    "def f(x, **y):\n    return x", "def f(x, *, y):\n    return x", "def f(a, /, x):\n    return x",
    "@staticmethod\ndef f(x):\n    return x", "async def f(x):\n    return x", "f = lambda x: x", "def f(x):\n    y = x\n    return y",
    "import os\ndef f(x):\n    return x", "def f(x):\n    return x\nprint(1)", "def f(x):\n    yield x", "def f(x):\n    return x\x00",
    "def f(x):\n    return '\ud800'", "def f(x):\nreturn x", "```python\ndef f(x):\n    return x\n```",
    "def f(x):\n    return x" + " + 1" * 100, "x" * 10**6, "(" * 10**6, "def f(x):\n    return " + "9" * 10**6, "\n" * 10**6 + "x",
])
def test_what_is_no_function_of_x(source: str):
    begin = time.process_time()
    with pytest.raises(NotAllowed):
        function(source)(3)
    assert time.process_time() - begin < 0.1


HOSTILE = [
    "__import__('os').system('id')", "open('/etc/passwd')", "eval('1')", "exec('1')", "print(x)", "x.__class__", "x.real",
    "().__class__.__base__", "10**10**10", "x ** 2", "2 << 10**9", "x * 10**9 * 10**9", "'a' * 10**9", "[0] * 10**9", "(0,) * 10**9",
    "x / 0", "x // 0", "x % 0", "1.5", "1e308 * 10", "1j", "'text'", "b'text'", "None", "...", "[1, 2]", "(1, 2)", "{1}", "{1: 2}",
    "lambda: 1", "(lambda y: y)(x)", "[y for y in x]", "sum(y for y in (1, 2))", "{y: y for y in (1,)}", "f'{x}'",
    "f'{x!r:>1000000000}'", "y if x else x", "y", "f(x)", "sum", "max(x, x)", "max(1, 2)", "abs(x=1)", "sum(*x)", "len(range(9))",
    "x[0]", "x[0:1]", "x[::10**9]", "x[x]", "x[10**30]", "not x", "~x", "+x", "x and 1", "x or 1", "x | 1", "x & 1", "x ^ 1", "x >> 1",
    "x is x", "x in x", "1 < x < 9", "(y := 3)", "await x", "(yield)", "x @ x", "9999999999999", "999999999999 + 2", "-999999999999 - 2",
    "x * 999999999999", "999999 * 9999999 * 0", "abs(-9999999999999)", "globals()", "vars()", "type(x)", "input()", "breakpoint()",
    "exit()", "sum(sum)",
]


@pytest.mark.parametrize("expression", HOSTILE)
def test_hostile_programs_are_refused_at_once(line: Item, expression: str):
    begin = time.process_time()
    with pytest.raises(NotAllowed):
        function(f"def f(x):\n    return {expression}")(3)
    assert CODE.grade(line, Message.said(f"def f(x):\n    return {expression}")) is Verdict.MALFORMED
    assert time.process_time() - begin < 0.1


LISTS = ["x + x", "x * 3", "3 * x", "x[0:1]", "x < 1", "abs(x)", "-x", "x[99]", "x[x]", "sum(x) * 999999999999"]


@pytest.mark.parametrize("expression", LISTS)
def test_lists_cannot_grow(expression: str):
    with pytest.raises(NotAllowed):
        function(f"def f(x):\n    return {expression}")([3, 1, 2])


@pytest.mark.parametrize("expression", [
    "-" * 370 + "x", "x" + "+1" * 180, "x" + "[0]" * 120, "abs(" * 70 + "x" + ")" * 70, "(" * 190 + "x" + ")" * 190,
    "1 if x else " * 30 + "x", "x if x > 1 else 2",
])
@pytest.mark.parametrize("depth", [0, 600])
def test_deep_nesting_is_refused_or_right_at_any_depth_of_the_stack(expression: str, depth: int):
    """A grader may be called from deep inside a run: a verdict, never a crash."""
    source = f"def f(x):\n    return {expression}"
    begin = time.process_time()

    def call(left: int) -> object:
        if left:
            return call(left - 1)
        try:
            return function(source)(3)
        except NotAllowed:
            return NotAllowed

    got = call(depth)
    assert got is NotAllowed or got == eval(expression, {"x": 3, "abs": abs})
    assert time.process_time() - begin < 0.1


numbers = st.integers(-99, 99)
expressions = st.recursive(
    st.one_of(st.just("x"), numbers.map(str)),
    lambda e: st.one_of(
        st.tuples(e, st.sampled_from("+ - * // % < > <= >= == !=".split()), e).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        e.map("abs({})".format), e.map("(-{})".format), st.tuples(e, e, e).map(lambda t: f"({t[0]} if {t[1]} else {t[2]})")),
    max_leaves=8)


@given(expression=expressions, x=numbers)
def test_the_evaluator_agrees_with_python(expression: str, x: int):
    try:
        want = eval(expression, {"x": x, "abs": abs})
    except ZeroDivisionError:
        want = NotAllowed
    try:
        got = function(f"def f(x):\n    return {expression}")(x)
    except NotAllowed:
        got = NotAllowed
    assert got == want or (got is NotAllowed and (len(expression) > 350 or _largest(expression, x) > 10**12))


def _largest(expression: str, x: int) -> int:
    """The largest value any sub-expression has."""
    values = []
    for node in ast.walk(ast.parse(expression, mode="eval")):
        if isinstance(node, ast.expr) and not (isinstance(node, ast.Name) and node.id == "abs"):
            try:
                values.append(abs(eval(ast.unparse(node), {"x": x, "abs": abs})))
            except ZeroDivisionError:
                continue
    return max(values)


@given(source=st.text(max_size=60))
def test_noise_is_never_an_error(line: Item, source: str):
    assert CODE.grade(line, Message.said(source)) in (Verdict.MALFORMED, Verdict.WRONG)
    assert CODE.grade(line, Message.said(f"def f(x):\n    return {source}")) in tuple(Verdict)
