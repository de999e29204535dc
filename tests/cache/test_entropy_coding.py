"""A stream gives back the columns it was made of, for close to what their counts say they cost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from persea.cache import entropy_coding as tables
from persea.cache.entropy_coding import ArrayColumns, FrequencyTable, StreamColumns, encode_columns

columns = st.lists(st.lists(st.integers(-5, 10**12), max_size=40), max_size=5)


@given(columns)
@example([])
@example([[], [7], [7, 7]])
def test_columns_come_back(some: list[list[int]]) -> None:
    parts = [
        (FrequencyTable.from_values(np.array(c, np.int64)), np.array(c, np.int64)) for c in some
    ]
    read = StreamColumns.from_stream(
        encode_columns(parts), {f"{k}.0": table for k, (table, _) in enumerate(parts)}
    )
    for k, (_, column) in enumerate(parts):
        assert np.array_equal(read(str(k), np.zeros(len(column), np.int64)), column)
    read.check_fully_read()


@given(columns, st.lists(st.integers(-1, 50)))
@example([], [])
def test_tables_come_back(some: list[list[int]], extra: list[int]) -> None:
    written = {
        f"{k}.0": FrequencyTable.from_values(np.array(c, np.int64)) for k, c in enumerate(some) if c
    }
    read, also = tables.tables_from_bytes(
        tables.tables_to_bytes(written, np.array(extra, np.int64))
    )
    assert list(read) == list(written)
    assert also.tolist() == extra
    for name, table in written.items():
        assert np.array_equal(read[name].values_U, table.values_U)
        assert np.array_equal(read[name].counts_U, table.counts_U)


def test_a_context_has_a_table_of_its_own() -> None:
    rng = np.random.default_rng(0)
    contexts = rng.integers(0, 3, 1000)
    column = 10 * contexts + (rng.random(1000) < 0.1)
    taken = ArrayColumns({"x": column}, [])
    assert np.array_equal(taken("x", contexts), column)
    found = {name: FrequencyTable.from_values(part) for name, part in taken.coded_parts}
    assert {name: t.values_U.tolist() for name, t in found.items()} == {
        "x.0": [0, 1],
        "x.1": [10, 11],
        "x.2": [20, 21],
    }
    read = StreamColumns.from_stream(
        encode_columns([(found[name], part) for name, part in taken.coded_parts]), found
    )
    assert np.array_equal(read("x", contexts), column)
    read.check_fully_read()


def test_a_column_of_another_length_than_its_places_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="x: 2 values for 3 contexts"):
        ArrayColumns({"x": np.arange(2)}, [])("x", np.zeros(3, np.int64))


def test_what_is_left_of_a_stream_is_a_bug() -> None:
    column = np.arange(100)
    read = StreamColumns.from_stream(
        encode_columns([(FrequencyTable.from_values(column), column)]),
        {"x.0": FrequencyTable.from_values(column)},
    )
    read("x", np.zeros(50, np.int64))
    with pytest.raises(AssertionError, match="longer than its columns"):
        read.check_fully_read()


def test_a_column_costs_its_entropy_and_a_table_about_a_byte_a_value() -> None:
    rng = np.random.default_rng(0)
    column = np.minimum(rng.zipf(1.3, 60_000), 200_000).astype(np.int64)
    table = FrequencyTable.from_values(column)
    share = table.counts_U / len(column)
    entropy = -(table.counts_U * np.log2(share)).sum() / 8
    assert entropy <= 4 * len(encode_columns([(table, column)])) <= 1.01 * entropy + 16
    assert (
        len(tables.tables_to_bytes({"x.0": table}, np.empty(0, np.int64)))
        <= 1.6 * len(table.values_U) + 200
    )


def test_the_bytes_of_a_stream_are_pinned() -> None:
    """What was written by one release is read by the next, on any machine."""
    column = np.array([3, 1, 1, 2, 1, 1, 900, 1], np.int64)
    assert encode_columns([(FrequencyTable.from_values(column), column)] * 9).tolist() == [
        4253683705,
        3680227962,
        2273007264,
        4057534594,
        10,
    ]
