"""Frequency tables of a unit's columns, and the entropy coder that uses them.

The coder is ANS from `constriction` (Bamler 2022; asymmetric numeral systems: Duda 2014). It models
a column by counts alone: decoding a symbol of 50,000 takes 40 ns, and a table, which is coded too,
costs about one byte a value.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from constriction import stream as ans

from persea.tokenization.tokens import IntArray

# values within this range are counted and looked up in an array: a sort costs ten times as much
MAX_DENSE_RANGE = 1 << 20

EncodedStream: TypeAlias = npt.NDArray[np.uint32]


def concat_or_empty(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Concatenate arrays; return an empty int64 array for an empty sequence."""
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class FrequencyTable:
    """The values of a column in a unit and their counts.

    Attributes:
        values_U: int64, the distinct values in rising order.
        counts_U: int64, how often each occurs.
    """

    values_U: IntArray
    counts_U: IntArray

    @staticmethod
    def from_values(values: IntArray) -> FrequencyTable:
        """Count the values of a column."""
        low = int(values.min(initial=0))
        if int(values.max(initial=0)) - low < MAX_DENSE_RANGE:
            counts = np.bincount(values - low)
            found = np.flatnonzero(counts)
            return FrequencyTable(found + low, counts[found])
        return FrequencyTable(*np.unique(values, return_counts=True))

    def index(self, values: IntArray) -> npt.NDArray[np.int32]:
        """Return the int32 index of each value in the table. Every value must be in the table."""
        low, high = int(self.values_U[0]), int(self.values_U[-1])
        if high - low >= MAX_DENSE_RANGE:
            return np.searchsorted(self.values_U, values).astype(np.int32)
        index = np.zeros(high - low + 1, np.int32)
        index[self.values_U - low] = np.arange(len(self.values_U), dtype=np.int32)
        found: npt.NDArray[np.int32] = index[values - low]
        return found

    @cached_property
    def entropy_model(self) -> Any:
        """The coder's model of the column; None if the column has one value and costs nothing."""
        return (
            ans.model.Categorical(self.counts_U.astype(np.float64), perfect=False)
            if len(self.values_U) > 1
            else None
        )


FrequencyTables: TypeAlias = Mapping[str, FrequencyTable]


class ColumnSource(Protocol):
    """Where the columns of a block come from: arrays when encoding, a stream when decoding."""

    def __call__(self, name: str, contexts: IntArray) -> IntArray:
        """Return a column.

        Args:
            name: Name of the column.
            contexts: Context of each value. A value is coded with the table "name.context".

        Returns:
            int64 values, one for each context.
        """
        ...


@dataclass(frozen=True, eq=False)
class ArrayColumns:
    """Known columns. Each call also records the part of the column that each table codes.

    Attributes:
        arrays: Column name -> values.
        coded_parts: (table name, values) in the order of the calls; filled by the calls.
    """

    arrays: Mapping[str, IntArray]
    coded_parts: list[tuple[str, IntArray]]

    def __call__(self, name: str, contexts: IntArray) -> IntArray:
        """Return a known column, and record the values that each table codes."""
        values = self.arrays[name]
        if len(values) != len(contexts):
            raise AssertionError(f"{name}: {len(values)} values for {len(contexts)} contexts")
        for context in np.unique(contexts).tolist():
            self.coded_parts.append((f"{name}.{context}", values[contexts == context]))
        return values


@dataclass(frozen=True, eq=False)
class StreamColumns:
    """Columns decoded from a stream.

    Attributes:
        coder: constriction's ANS coder, which keeps the position in the stream.
        tables: Table name -> frequency table.
    """

    coder: Any
    tables: FrequencyTables

    @staticmethod
    def from_stream(stream: EncodedStream, tables: FrequencyTables) -> StreamColumns:
        """Start to decode a stream."""
        return StreamColumns(ans.stack.AnsCoder(stream), tables)

    def check_fully_read(self) -> None:
        """Raise AssertionError if part of the stream was not read: it belongs to other columns."""
        if not self.coder.is_empty():
            raise AssertionError("the stream is longer than its columns")

    def __call__(self, name: str, contexts: IntArray) -> IntArray:
        """Decode a column."""
        if not len(contexts):
            return contexts
        counts = np.bincount(contexts)
        if counts[-1] == len(contexts):
            return self._decode_column(f"{name}.{len(counts) - 1}", len(contexts))
        order = np.argsort(contexts.astype(np.uint8), kind="stable")  # a radix sort
        out = np.empty(len(contexts), np.int64)
        out[order] = np.concatenate(
            [
                self._decode_column(f"{name}.{context}", int(counts[context]))
                for context in np.flatnonzero(counts).tolist()
            ]
        )
        return out

    def _decode_column(self, name: str, count: int) -> IntArray:
        table = self.tables[name]
        if table.entropy_model is None:
            return np.full(count, table.values_U[0])
        values: IntArray = table.values_U[self.coder.decode(table.entropy_model, count)]
        return values


def encode_columns(parts: Sequence[tuple[FrequencyTable, IntArray]]) -> EncodedStream:
    """Encode columns into one stream, from which they are decoded in this order.

    Args:
        parts: (table, column) pairs.

    Returns:
        The stream, uint32.
    """
    coder = ans.stack.AnsCoder()
    for table, column in reversed(parts):
        if table.entropy_model is not None and len(column):
            coder.encode_reverse(table.index(column), table.entropy_model)
    words: EncodedStream = coder.get_compressed()
    return words


def tables_to_bytes(tables: FrequencyTables, extra: IntArray) -> bytes:
    """Serialize frequency tables and one more int64 array.

    Values are stored as differences, counts as they are. Both are entropy coded with tables of
    their own, which are stored as JSON; zlib compresses the result.
    """
    columns = (
        concat_or_empty([np.diff(t.values_U, prepend=0) for t in tables.values()]),
        concat_or_empty([t.counts_U for t in tables.values()]),
        extra,
    )
    under = [FrequencyTable.from_values(c) for c in columns]
    words = encode_columns(list(zip(under, columns, strict=True)))
    head = {
        "columns": {name: len(t.values_U) for name, t in tables.items()},
        "under": [[np.diff(t.values_U, prepend=0).tolist(), t.counts_U.tolist()] for t in under],
    }
    text = json.dumps(head, separators=(",", ":")).encode()
    return zlib.compress(len(text).to_bytes(8, "little") + text + words.astype("<u4").tobytes(), 9)


def tables_from_bytes(data: bytes) -> tuple[FrequencyTables, IntArray]:
    """Return the tables and the extra array that `tables_to_bytes` serialized."""
    plain = zlib.decompress(data)
    size = 8 + int.from_bytes(plain[:8], "little")
    head = json.loads(plain[8:size])
    under = [
        FrequencyTable(np.cumsum(np.array(values, np.int64)), np.array(counts, np.int64))
        for values, counts in head["under"]
    ]
    read = StreamColumns.from_stream(
        np.frombuffer(plain[size:], "<u4").astype(np.uint32),
        {f"{k}.0": t for k, t in enumerate(under)},
    )
    steps, counts, extra = (
        read(str(k), np.zeros(int(t.counts_U.sum()), np.int64)) for k, t in enumerate(under)
    )
    tables, begin = {}, 0
    for name, size in head["columns"].items():
        tables[name] = FrequencyTable(
            np.cumsum(steps[begin : begin + size]), counts[begin : begin + size]
        )
        begin += size
    return tables, extra
