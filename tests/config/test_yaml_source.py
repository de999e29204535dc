"""YAML as plain data with the location of every key."""

from __future__ import annotations

from pathlib import Path

import pytest

from persea.config.yaml_source import apply_override, read_yaml
from persea.errors import RecipeError


def page(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "page.yaml"
    path.write_text(text)
    return path


def test_every_key_and_entry_has_a_location(tmp_path: Path) -> None:
    path = page(tmp_path, "a: 1\nb:\n  - {c: x}\n  - 3e-3\n")
    reading = read_yaml(path)
    assert reading.data == {"a": 1, "b": [{"c": "x"}, 0.003]}
    assert reading.locations[("a",)] == f"{path}:1:1"
    assert reading.locations[("b", 0, "c")] == f"{path}:3:6"
    assert reading.locations[("b", 1)] == f"{path}:4:5"


def test_an_override_is_its_own_location(tmp_path: Path) -> None:
    reading = read_yaml(page(tmp_path, "a: {b: 1, c: 2}\n"))
    apply_override(reading, "a.b=7")
    assert reading.data == {"a": {"b": 7, "c": 2}}
    assert reading.locations[("a", "b")] == "--set a.b=7"


def test_a_key_written_twice_is_a_problem_that_names_both_lines(tmp_path: Path) -> None:
    reading = read_yaml(page(tmp_path, "a: 1\nb: 2\na: 3\n"))
    assert "lines 1 and 3" in str(reading.problems[("a",)])


@pytest.mark.parametrize(
    "text", ["", "- a\n", "a: [1\n", "a: !!python/object:x {}\n", "? [1]\n: 2\n", "a: \x01\n"]
)
def test_files_without_keys_and_values_are_refused_with_their_location(
    tmp_path: Path, text: str
) -> None:
    with pytest.raises(RecipeError, match=r"page\.yaml:\d+:\d+"):
        read_yaml(page(tmp_path, text))


def test_an_alias_bomb_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"] + [
        f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 8)
    ]
    with pytest.raises(RecipeError):
        read_yaml(page(tmp_path, "\n".join(lines)))
