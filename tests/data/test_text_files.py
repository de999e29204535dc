"""Text files are read line by line; a broken one is refused with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from persea.data.prompts import MalformedLine
from persea.data.text_files import read_documents, read_text_lines
from persea.errors import DataError


def test_lines_are_numbered_normalised_and_empty_ones_left_out(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes("\ufeffone\r\n\n  \ne\u0301\u2028same line\rlast".encode())
    assert read_text_lines(str(file), "here") == [
        (1, "one"),
        (4, "\u00e9\u2028same line"),
        (5, "last"),
    ]
    assert read_text_lines(str(file), "here", 1) == [(1, "one")]


def test_a_key_of_json_lines_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text('{"a": "x"}\n{"a": "y", "b": 1}\n')
    assert read_text_lines(f"{file}#a", "here") == [(1, "x"), (2, "y")]
    with pytest.raises(DataError, match=r"here:1: no text under 'b'"):
        read_text_lines(f"{file}#b", "here")


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"ok\n\xff", "here:2: cannot read the text: not UTF-8"), (b" \n", "no line with a text")],
)
def test_what_holds_no_text_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "text"
    file.write_bytes(content)
    with pytest.raises(DataError, match=problem):
        read_text_lines(str(file), "here")


def test_documents_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "one\\ntwo", "id": 3}\n\n"three"\r\n{"text": "e\\u0301"}\n{"text": ""}'
    )
    assert list(read_documents(path)) == [
        ("a.jsonl:1", "one\ntwo"),
        ("a.jsonl:3", "three"),
        ("a.jsonl:4", "\u00e9"),
        ("a.jsonl:5", ""),
    ]


@pytest.mark.parametrize("line", ['{"body": "x"}', '{"text": 3}', "[1]", "{", '"\\ud83d"', "null"])
def test_a_line_that_is_no_document_is_refused_or_quarantined(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'"fine"\n{line}\n"also"\n')
    with pytest.raises(DataError) as caught:
        list(read_documents(path))
    assert caught.value.where == f"{path}:2"
    malformed: list[MalformedLine] = []
    found = list(read_documents(path, on_malformed=malformed.append))
    assert [text for _, text in found] == ["fine", "also"]
    assert [m.location for m in malformed] == [f"{path}:2"]


def test_another_column_and_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n')
    assert list(read_documents(path, "body")) == [("a.jsonl:1", "x")]
    with pytest.raises(DataError, match="a line of 13 bytes"):
        list(read_documents(path, "body", max_line_bytes=12))


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfline\r\n\nmore e\xcc\x81\n")
    assert list(read_documents(path)) == [("a.txt", "line\r\n\nmore \u00e9\n")]
    path.write_bytes(b"ok\n\xff")
    with pytest.raises(DataError, match="not UTF-8 at byte 3") as caught:
        list(read_documents(path))
    assert caught.value.where == f"{path}:2"
    for name in ("none.txt", "none.jsonl"):
        with pytest.raises(DataError, match=r"(?i)no such file"):
            list(read_documents(tmp_path / name))
