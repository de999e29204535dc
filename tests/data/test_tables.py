"""Tables of every kind give the same rows, each with its place."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from persea.data.formats import read_prompts
from persea.data.tables import iter_hub_table, iter_table
from persea.errors import DataError

ROWS = [
    {"question": "2 + 2?", "answer": "4", "code": "007"},
    {"question": 'Say "hi",\nplease.', "answer": "hi", "code": "null"},
    {"question": "ชื่ออะไร", "answer": "ไม่มี", "code": "2024-01-01"},
]


def jsonl(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(r).encode() for r in ROWS) + b"\n\n")


def array(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1))


def lines_as_json(path: Path) -> None:
    path.write_text("\n".join(map(json.dumps, ROWS)))


def wrapped(path: Path) -> None:
    path.write_text(json.dumps({"version": 1, "data": ROWS}))


def comma(path: Path, delimiter: str = ",") -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def tabs(path: Path) -> None:
    comma(path, "\t")


def columns(path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def zipped(path: Path) -> None:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("x.jsonl", jsonl),
        ("x.ndjson", jsonl),
        ("x.json", array),
        ("x.json", lines_as_json),
        ("x.json", wrapped),
        ("x.csv", comma),
        ("x.tsv", tabs),
        ("x.parquet", columns),
        ("x.jsonl.gz", zipped),
    ],
)
def test_a_table_gives_its_rows_and_no_text_changes(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    write(tmp_path / name)
    rows = list(iter_table(tmp_path / name))
    assert [row.value for row in rows] == ROWS
    assert not any(row.error for row in rows)
    assert len({row.name for row in rows}) == 3
    assert all(row.name.startswith(f"{name}:") for row in rows)


def test_lines_are_counted_where_fields_have_several(tmp_path: Path) -> None:
    comma(tmp_path / "x.csv")
    assert [row.name for row in iter_table(tmp_path / "x.csv")] == ["x.csv:2", "x.csv:3", "x.csv:5"]


def test_a_table_of_old_macintosh_line_ends_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"a,b\r1,2\r3,4\r")
    assert [(row.name, row.value, row.error) for row in iter_table(path)] == [
        ("x.csv:2", {"a": "1", "b": "2"}, ""),
        ("x.csv:3", {"a": "3", "b": "4"}, ""),
    ]


def test_trailing_commas_and_comments_of_a_table_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2,\n# a comment\n3,4\n")
    assert [row.error for row in iter_table(path)] == [
        "3 fields, 2 columns",
        "1 fields, 2 columns",
        "",
    ]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    jsonl(tmp_path / "b" / "two.jsonl")
    comma(tmp_path / "a.csv")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")
    rows = list(iter_table(tmp_path))
    assert [row.value for row in rows] == ROWS * 2
    assert (rows[0].name, rows[3].name) == ("a.csv:2", "b/two.jsonl:1")


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert [row.value for row in iter_table(tmp_path / "saved")] == ROWS


def test_a_broken_row_has_its_reason_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": "\\ud83d"}\n' + b"x" * 99 + b'\n{"a": 2}\n')
    rows = list(iter_table(path, max_line_bytes=50))
    assert [row.value for row in rows if not row.error] == [{"a": 1}, {"a": 2}]
    assert [row.error[:12] for row in rows if row.error] == [
        "not JSON: Ex",
        "not JSON: 'u",
        "a line of 99",
    ]
    table = tmp_path / "x.csv"
    table.write_text("a,b\n1,2\n3\n")
    assert [row.error for row in iter_table(table)] == ["", "1 fields, 2 columns"]


def test_semicolons_of_a_spreadsheet_separate_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('question;gold\n"How; then?";1,5\n')
    assert [row.value for row in iter_table(path)] == [{"question": "How; then?", "gold": "1,5"}]


def test_a_table_in_another_encoding_is_refused_with_the_encoding_to_use(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes("question,gold\nété?,oui\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8 at byte 14 -> save it as UTF-8"):
        list(iter_table(path))


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("x.txt", b"x", ".txt is no table"),
        ("x.json", b"[1, ", "not JSON"),
        ("x.json", b'[{"a": 1},]', "not JSON"),
        ("x.json", b'[\n// a comment\n{"a": 1}]', "not JSON"),
        ("x.json", b'{"a": 1}', "no single list of rows"),
        ("x.json", b"3", "int instead of an array"),
        ("x.csv", b"a,a\n1,2\n", "two of one name"),
        ("x.csv", b"a,b,\n1,2,\n", "a column without a name"),
        ("x.csv", b"a,b\n\xff,2\n", "not UTF-8"),
        ("x.csv", b'a,b\n"1,2\n', "broken CSV"),
        ("x.parquet", b"PAR1", "broken Parquet"),
        ("x.jsonl.gz", b"no", "cannot be read"),
        ("missing.jsonl", None, "no such file"),
        ("folder", None, "no table"),
    ],
)
def test_a_broken_table_is_refused_with_its_place(
    tmp_path: Path, name: str, data: bytes | None, why: str
) -> None:
    path: Any = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    elif name == "folder":
        path.mkdir()
    with pytest.raises(DataError, match=why) as caught:
        list(iter_table(path))
    assert str(path) in caught.value.where


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", ["FIFO", "device", "loop", "long name", "NUL", "under a file"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows.jsonl"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind in ("device", "loop"):
        path.symlink_to("/dev/zero" if kind == "device" else path)
    elif kind == "under a file":
        path.write_text("{}")
        path = path / "rows.jsonl"
    else:
        path = tmp_path / (("x" * 300 if kind == "long name" else "a\0b") + ".jsonl")
    with pytest.raises(DataError) as caught:
        list(iter_table(path))
    assert caught.value.where and caught.value.remedy and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_nested_records_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    row = '{"question": ' + "[" * 200_000 + "]" * 200_000 + "}"
    path = tmp_path / name
    path.write_text(row + "\n" if name == "rows.jsonl" else f"[{row}]")
    with pytest.raises(DataError, match="not JSON: maximum recursion depth") as caught:
        list(read_prompts(path, "code", "en"))
    assert "\n" not in str(caught.value)


def test_a_data_set_is_loaded_by_name_split_and_revision(tmp_path: Path) -> None:
    """A folder stands for a repository of the hub: `datasets` reads both."""
    columns(tmp_path / "train.parquet")
    for streaming in (False, True):
        rows = list(iter_hub_table(str(tmp_path), "train", streaming=streaming))
        assert [row.value for row in rows] == ROWS
        assert rows[1].name == f"{tmp_path}/train:1"
    with pytest.raises(DataError, match="cannot be read") as caught:
        list(iter_hub_table(str(tmp_path), "nope"))
    assert caught.value.where == f"{tmp_path}, nope"


def test_a_data_set_of_the_hub_is_refused_offline() -> None:
    with pytest.raises(DataError, match="the data set cannot be read: ") as caught:
        list(iter_hub_table("persea/no-such-data-set", "train"))
    assert caught.value.where == "persea/no-such-data-set, train"
    assert "the network; a local copy is read as a folder" in (caught.value.remedy or "")


def test_a_stream_that_breaks_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[dict[str, str]]:
        yield ROWS[0]
        raise ConnectionError("Server Disconnected")

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: broken())
    rows = iter_hub_table("a/b", "train", streaming=True)
    assert next(rows).value == ROWS[0]
    with pytest.raises(DataError, match="cannot be read after row 0: Server"):
        next(rows)
