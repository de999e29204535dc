"""The pattern of many names finds what an alternation of them finds, the longest first."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from persea.tokenization.name_pattern import MAX_TREE_NAME_CHARS, compile_names

names = st.lists(st.text("ab<>|^]-\\.*\n", min_size=0, max_size=5), max_size=12)


@given(names=names, text=st.text("ab<>|^]-\\.*\n", max_size=40))
def test_it_finds_what_an_alternation_finds(names: list[str], text: str):
    ordered = sorted({n for n in names if n}, key=len, reverse=True)
    plain = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
    found = [m.span() for m in compile_names(names).finditer(text)]
    assert found == [m.span() for m in plain.finditer(text)]


def test_thousands_of_names_become_a_short_pattern():
    many = [f"<unused{k}>" for k in range(6242)]
    pattern = compile_names(many)
    assert len(pattern.pattern) < sum(map(len, many)) / 5, "they share what they begin with"
    assert pattern.findall("<unused0><unused6241><unused6242> <unused12>") == [
        "<unused0>",
        "<unused6241>",
        "<unused12>",
    ]


def test_a_very_long_name_and_no_name():
    long = "x" * (MAX_TREE_NAME_CHARS + 1)
    assert compile_names([long, "xy"]).findall(long + "xy") == [long, "xy"]
    assert compile_names([]).search("anything") is None
    assert compile_names([""]).search("anything") is None
