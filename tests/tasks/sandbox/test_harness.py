"""The processes of tests and program exchange plain values unchanged, and nothing else."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persea.tasks.sandbox.harness import (
    ExchangeError,
    decode_value,
    encode_value,
    free_names,
    used_stdlib_modules,
)

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False)
    | st.text(max_size=9)
    | st.binary(max_size=9)
    | st.complex_numbers(allow_nan=False)
    | st.sets(st.integers(), max_size=3)
    | st.frozensets(st.text(max_size=2), max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


def refuse(value: object) -> object:
    raise ExchangeError(type(value).__name__)


@given(plain)
def test_plain_values_come_through(value: object):
    again = decode_value(encode_value(value, refuse), refuse)
    assert again == value
    assert type(again) is type(value)


def test_what_is_not_plain_does_not():
    assert math.isnan(decode_value(encode_value(math.nan, refuse), refuse))
    for strange in (object(), len, type, [[object()]]):
        with pytest.raises(ExchangeError):
            encode_value(strange, refuse)
    for raw in (
        [],
        {},
        3,
        ["int"],
        ["int", 3],
        ["int", "zz"],
        ["float", "x"],
        ["set", ["list"]],
        ["dict", 3],
        ["handle"],
        ["float", "0x1p99999"],
    ):
        with pytest.raises(ExchangeError):
            decode_value(raw, lambda v: refuse(v))
    with pytest.raises(ExchangeError, match="items"):
        encode_value(iter(range(10**9)), refuse)


def test_the_names_that_tests_leave_open():
    tests = (
        "import math as m\nfrom os import path\nx = 1\ndef check(candidate, *, k=top):\n    with a "
        "as b: return [c for c in d]\n"
        "assert f(x, m.pi) == len(path)"
    )
    assert free_names(tests) == {"top", "a", "d", "f"}
    assert used_stdlib_modules("assert math.pi == f(sys) and heapq(3) and mine.x") == {"math"}
    assert used_stdlib_modules("import math\nassert math.pi") == set()
