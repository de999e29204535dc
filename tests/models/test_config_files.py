"""Configurations are JSON objects, and a folder that brings code is refused before it is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from persea.errors import DataError
from persea.models.config_files import read_json_config, refuse_remote_code


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000])
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: str):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"config\.json") as caught:
        read_json_config(path, "student.model")
    assert caught.value.where == "student.model"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_folder_with_its_own_code_is_refused(tmp_path: Path, name: str):
    refuse_remote_code(tmp_path, "w")
    (tmp_path / name).write_text('{"auto_map": {}}')
    with pytest.raises(DataError, match="brings its own code"):
        refuse_remote_code(tmp_path, "w")
