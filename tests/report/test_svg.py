"""Texts never round a loss away; charts draw the numbers to scale and describe them in text."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persea.report import svg as charts
from persea.report import text as text_of
from persea.report.svg import Dot, ShareBin

FINITE = st.floats(-1e6, 1e6)


def parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def of_class(svg: ET.Element, tag: str, name: str) -> list[ET.Element]:
    return [x for x in svg.iter(tag) if name in (x.get("class") or "").split()]


# --- texts ---


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0 %"),
        (0.0001, "<1 %"),
        (0.004, "<1 %"),
        (0.006, "1 %"),
        (0.5, "50 %"),
        (0.94, "94 %"),
        (0.9949, "99 %"),
        (0.996, ">99 %"),
        (0.99999, ">99 %"),
        (1, "100 %"),
        (1.004, "100 %"),
        (1.12, "112 %"),
    ],
)
def test_percent(share: float, text: str) -> None:
    assert text_of.format_percent(share) == text.replace(" ", text_of.NBSP)


@given(st.floats(0, 1, exclude_max=True))
def test_only_all_is_called_all(share: float) -> None:
    assert not text_of.format_percent(share).startswith("100")
    assert text_of.format_percent(share).startswith("0") == (share == 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (12.44, "12.4 s"),
        (59.94, "59.9 s"),
        (59.99, "1 min 00 s"),
        (61, "1 min 01 s"),
        (3599.4, "59 min 59 s"),
        (3599.7, "1 h 00 min"),
        (5400.5, "1 h 30 min"),
        (90_000, "25 h 00 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert text_of.format_duration(seconds) == text.replace(" ", text_of.NBSP)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (27_904_120, "27.9 MB"),
        (999_960, "1.0 MB"),
        (3.2e9, "3.2 GB"),
        (4e12, "4.0 TB"),
        (4e15, "4000.0 TB"),
    ],
)
def test_size(number: float, text: str) -> None:
    assert text_of.format_bytes(number) == text.replace(" ", text_of.NBSP)


def test_small_texts() -> None:
    assert (
        text_of.format_count(1_204_311) == "1\u202f204\u202f311" and text_of.format_count(7) == "7"
    )
    assert text_of.format_points(0.71049) == "71.0"
    assert [text_of.spell_count(n) for n in (0, 3, 12, 13)] == ["no", "three", "twelve", "13"]
    assert [text_of.join_list(x) for x in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]
    assert text_of.markdown_cell("a|b\n *c* <d>") == "a\\|b \\*c\\* \\<d\\>"
    assert [
        text_of.model_label(m) for m in ("Qwen/Qwen3-8B", "/home/me/tree", "./tree", "~/tree")
    ] == ["Qwen/Qwen3-8B", "tree", "tree", "tree"]


# --- marks ---


def test_thirty_teachers_look_different() -> None:
    marks = [charts.teacher_mark(k) for k in range(30)]
    assert len(set(marks)) == 30 and charts.teacher_mark(30) == marks[0]
    assert len({charts.glyph(m, 0, 0) for m in [*marks, "student", "base"]}) == 32
    assert all(parsed(charts.swatch(m)).get("aria-hidden") == "true" for m in marks)


# --- pictures ---


def test_dots_stand_at_their_values() -> None:
    rows = [
        Dot("me", "student", 0.5, 0.25, 0.75),
        Dot("before", "base", 0.0, 0.0, 0.1),
        Dot("a-very-long-teacher-name", "t0 s0", 1.0, 0.9, 1.0),
    ]
    svg = parsed(charts.dot_plot("d", "code", rows, (0.9, 1.0)))
    ticks = {t.text: float(t.get("x", "")) for t in of_class(svg, "text", "tick")}
    assert list(ticks) == ["0", "25", "50", "75", "100"]
    circles = {c.get("class"): float(c.get("cx", "")) for c in svg.iter("circle")}
    assert circles == {"student": ticks["50"], "base": ticks["0"]}
    whisker = of_class(svg, "line", "student")[0]
    assert (float(whisker.get("x1", "")), float(whisker.get("x2", ""))) == (
        ticks["25"],
        ticks["75"],
    )
    band = of_class(svg, "rect", "band")[0]
    assert float(band.get("x", "")) + float(band.get("width", "")) == pytest.approx(
        ticks["100"], abs=0.1
    )
    assert [t.text for t in of_class(svg, "text", "value")] == ["50.0", "0.0", "100.0"]
    assert of_class(svg, "text", "name")[2].text == "a-very-long-te…"
    assert "a-very-long-teacher-name 100.0, 95 % interval 90.0 to 100.0" in (
        svg.findtext("desc") or ""
    )


@pytest.mark.parametrize(
    "svg",
    [
        charts.dot_plot("a", "<code>", [Dot('<i>"&', "student", 0.5, 0.4, 0.6)], (0.4, 0.6)),
        charts.line_chart("b", "<loss>", [(1, 2.0)]),
        charts.stacked_bars("c", "<share>", [ShareBin(1, 2, (0.5,))], [('<i>"&', "t0 s0")]),
    ],
)
def test_names_are_escaped_and_pictures_named(svg: str) -> None:
    tree = parsed(svg)
    assert tree.get("role") == "img"
    assert (tree.get("aria-labelledby") or "").split() == [
        next(tree.iter(tag)).get("id") for tag in ("title", "desc")
    ]
    assert (tree.findtext("title") or "").startswith("<") and not list(tree.iter("i"))


def test_curve_falls_when_the_loss_does() -> None:
    svg = parsed(
        charts.line_chart("l", "events", [(step, 3 - step / 100) for step in range(0, 101, 10)])
    )
    corners = [
        tuple(map(float, p.split(",")))
        for p in next(svg.iter("polyline")).get("points", "").split()
    ]
    assert len(corners) == 11
    assert [x for x, _ in corners] == sorted(x for x, _ in corners)
    assert [y for _, y in corners] == sorted(y for _, y in corners)  # downward on the page
    assert "3 at step 0, 2 at step 100." in (svg.findtext("desc") or "")


def test_many_points_become_means_and_say_so() -> None:
    values = [(k, float(k % 2)) for k in range(1000)]
    drawn, each = charts.downsample(values)
    assert each == 7 and len(drawn) == 143
    assert (
        sum(v for _, v in charts.downsample(values, max_points=500)[0]) == 250
    )  # means of two: the mean survives
    assert "Each point is the mean of 7 logged steps." in charts.line_chart("l", "x", values)
    assert charts.downsample(values[:160]) == (values[:160], 1)


def test_bars_stack_to_the_top() -> None:
    columns = charts.bin_shares(
        [(k, {"a": 0.75, "b": 0.25}) for k in range(1, 51)], ["a", "b"], max_bins=10
    )
    assert [(c.first_step, c.last_step) for c in columns[:2]] == [(1, 5), (6, 10)] and len(
        columns
    ) == 10
    svg = parsed(charts.stacked_bars("s", "share", columns, [("a", "t0 s0"), ("b", "t1 s1")]))
    bars = of_class(svg, "rect", "part")
    assert len(bars) == 20
    lower, upper = bars[0], bars[1]
    assert float(lower.get("height", "")) == 3 * float(upper.get("height", ""))
    assert float(upper.get("y", "")) == 10 and float(upper.get("y", "")) + float(
        upper.get("height", "")
    ) == float(lower.get("y", ""))
    assert lower.findtext("title") == f"a 75{text_of.NBSP}%, steps 1 to 5"


def test_a_teacher_who_is_not_there_yet_has_no_share() -> None:
    (only,) = charts.bin_shares(
        [(1, {"a": 1.0}), (2, {"a": 0.5, "b": 0.5})], ["a", "b"], max_bins=1
    )
    assert only == ShareBin(1, 2, (0.75, 0.25))


@given(FINITE, FINITE)
def test_ticks_enclose_and_are_few(one: float, other: float) -> None:
    low, high = sorted((one, other))
    ticks = charts.nice_ticks(low, high)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert 2 <= len(ticks) <= 7 and ticks == sorted(set(ticks))
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack


@settings(max_examples=40)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=400))
def test_any_finite_curve_can_be_drawn(values: list[float]) -> None:
    svg = charts.line_chart("l", "x", list(enumerate(values)))
    assert "nan" not in svg and "inf" not in svg
    parsed(svg)


def test_differences_have_their_sign() -> None:
    assert [text_of.format_signed(d) for d in (0.214, -0.05, 0.0)] == ["+21.4", "−5.0", "+0.0"]


def test_a_matrix_is_deeper_where_the_score_is_higher_and_is_described() -> None:
    columns, rows = (
        [("student", "student"), ("qwen", "t0 s0"), ("a teacher of a long name", "t1 s1")],
        [("code", (0.2, 0.9, None)), ("a skill of a long name", (0.0, 1.0, 0.5))],
    )
    svg = parsed(charts.heatmap("h", "all", columns, rows))
    cells = of_class(svg, "rect", "heat")
    depth = [float(c.get("fill-opacity", "")) for c in cells]
    assert len(cells) == 6
    assert depth[1] > depth[0] > depth[3] == depth[2] and depth[4] == max(depth) <= 0.6
    assert all(
        0 <= float(c.get("x", ""))
        and float(c.get("x", "")) + float(c.get("width", "")) <= charts.CHART_WIDTH
        for c in cells
    )
    words = [t.text for t in svg.iter("text")]
    assert {"20", "90", "–", "0", "100", "50", "code"} <= set(words) and any(
        w and w.endswith("…") for w in words
    )
    (told,) = svg.iter("desc")
    assert told.text == (
        "Score out of 100. code: student 20.0, qwen 90.0, a teacher of a long name not measured; "
        "a skill of a long name: student 0.0, qwen 100.0, a teacher of a long name 50.0."
    )


def test_the_gap_from_base_to_best_is_drawn_as_far_as_it_was_closed() -> None:
    def dot(label: str, mark: str, value: float) -> Dot:
        return Dot(label, mark, value, value, value)

    def row(
        skill: str, base: float, student: float, best: float, closed: float | None
    ) -> tuple[str, Dot, Dot, Dot, float | None]:
        return (
            skill,
            dot("base", "base", base),
            dot("me", "student", student),
            dot("qwen", "t0 s0", best),
            closed,
        )

    svg = parsed(
        charts.gap_chart(
            "g",
            "way",
            [
                row("code", 0.2, 0.6, 1.0, 0.5),
                row("safety", 0.5, 0.3, 0.9, -0.5),
                row("none", 0.9, 0.9, 0.1, None),
            ],
        )
    )
    went, fell, ways = (
        of_class(svg, "line", "went"),
        of_class(svg, "line", "fell"),
        of_class(svg, "line", "way"),
    )
    assert (len(went), len(fell), len(ways)) == (2, 1, 3)
    assert float(went[0].get("x2", "")) - float(went[0].get("x1", "")) == pytest.approx(
        (float(ways[0].get("x2", "")) - float(ways[0].get("x1", ""))) / 2, abs=0.2
    )
    assert float(fell[0].get("x2", "")) < float(fell[0].get("x1", ""))
    assert [t.text for t in of_class(svg, "text", "value")] == [
        x.replace(" ", text_of.NBSP) for x in ("50 %", "−50 %", "–")
    ]
    (told,) = svg.iter("desc")
    assert (
        told.text
        and "code: base 20.0, student 60.0, best teacher qwen 100.0, 50" in told.text
        and "is not ahead of the base" in told.text
    )
