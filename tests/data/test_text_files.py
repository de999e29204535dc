"""Text files are read line by line; a broken one is refused with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from persea.data.text_files import read_text_lines
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
