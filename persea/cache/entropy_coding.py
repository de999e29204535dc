"""Tables: what values the columns of a unit take and how often, and the entropy coder that uses them.

The coder is ANS from `constriction` (Bamler 2022; asymmetric numeral systems: Duda 2014). Counts are all it is told of a column:
40 ns decode a symbol of 50,000, and a table that is coded itself costs about a byte a value.
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

MAX_DENSE_RANGE = (
    1 << 20
)  # values this near together are counted and looked up in an array: a sort costs ten times that

IntArray: TypeAlias = npt.NDArray[np.int64]
EncodedStream: TypeAlias = npt.NDArray[np.uint32]


def concat_or_empty(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """All arrays end to end; of none, no integers."""
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class FrequencyTable:
    """The values a column takes in a unit, in rising order, and how often each stands there."""

    values_U: IntArray
    counts_U: IntArray

    @staticmethod
    def from_values(values: IntArray) -> FrequencyTable:
        low = int(values.min(initial=0))
        if int(values.max(initial=0)) - low < MAX_DENSE_RANGE:
            counts = np.bincount(values - low)
            found = np.flatnonzero(counts)
            return FrequencyTable(found + low, counts[found])
        return FrequencyTable(*np.unique(values, return_counts=True))

    def index(self, values: IntArray) -> npt.NDArray[np.int32]:
        """Which of the table's values each is."""
        low, high = int(self.values_U[0]), int(self.values_U[-1])
        if high - low >= MAX_DENSE_RANGE:
            return np.searchsorted(self.values_U, values).astype(np.int32)
        index = np.zeros(high - low + 1, np.int32)
        index[self.values_U - low] = np.arange(len(self.values_U), dtype=np.int32)
        found: npt.NDArray[np.int32] = index[values - low]
        return found

    @cached_property
    def entropy_model(self) -> Any:
        """None where there is nothing to tell apart."""
        return (
            ans.model.Categorical(self.counts_U.astype(np.float64), perfect=False)
            if len(self.values_U) > 1
            else None
        )


FrequencyTables: TypeAlias = Mapping[str, FrequencyTable]


class ColumnSource(Protocol):
    """Where the columns of a block come from: its arrays when packing, its stream when unpacking."""

    def __call__(self, name: str, contexts: IntArray) -> IntArray:
        """One value an entry of `contexts`, which says under which of the column's tables each is coded."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayColumns:
    """Columns that are known, noted table by table in the order they are asked for."""

    arrays: Mapping[str, IntArray]
    coded_parts: list[tuple[str, IntArray]]

    def __call__(self, name: str, contexts: IntArray) -> IntArray:
        values = self.arrays[name]
        if len(values) != len(contexts):
            raise AssertionError(f"{name}: {len(values)} values for {len(contexts)} places")
        for context in np.unique(contexts).tolist():
            self.coded_parts.append((f"{name}.{context}", values[contexts == context]))
        return values


@dataclass(frozen=True, eq=False)
class StreamColumns:
    """Columns read from a stream."""

    coder: Any
    tables: FrequencyTables

    @staticmethod
    def from_stream(stream: EncodedStream, tables: FrequencyTables) -> StreamColumns:
        return StreamColumns(ans.stack.AnsCoder(stream), tables)

    def check_fully_read(self) -> None:
        """Everything was read, or it was not this stream."""
        if not self.coder.is_empty():
            raise AssertionError("a stream longer than its columns")

    def __call__(self, name: str, contexts: IntArray) -> IntArray:
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
    """The stream from which the columns are decoded in this order."""
    coder = ans.stack.AnsCoder()
    for table, column in reversed(parts):
        if table.entropy_model is not None and len(column):
            coder.encode_reverse(table.index(column), table.entropy_model)
    words: EncodedStream = coder.get_compressed()
    return words


def tables_to_bytes(tables: FrequencyTables, extra: IntArray) -> bytes:
    """Tables, and one more array, as steps between values and counts, each coded under how often it stands there; zlib over it all."""
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
    """What `to_bytes` was given."""
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
