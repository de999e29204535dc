"""An unknown tokenizer is opened in a child with limits first, once for the same file."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from persea.errors import DataError
from persea.models.tokenizer_containment import refuse_endless_tokenizer
from tests.conftest import FAMILIES, ROOT

QWEN = ROOT / "saplings" / "qwen-sapling" / "tokenizer.json"


def changed(tmp_path: Path, **keys: Any) -> Path:
    content = json.loads(QWEN.read_text()) | keys
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_good_tokenizers_pass_and_are_opened_once(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSEA_HOME", str(tmp_path))
    path = ROOT / "saplings" / f"{family}-sapling" / "tokenizer.json"
    refuse_endless_tokenizer(path, "w")
    monkeypatch.setattr(subprocess, "run", None)
    refuse_endless_tokenizer(path, "w")


@pytest.mark.parametrize("pattern", ["(a+)+$", "(?:a|a)*b", "(a|aa)+$", "^(([a-z])+.)+[A-Z]"])
def test_an_exponential_pattern_ends_here_or_is_refused(pattern: str, tmp_path: Path) -> None:
    """The library's own engine stops some of them; none reaches this process."""
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    path = changed(tmp_path, pre_tokenizer=split)
    try:
        refuse_endless_tokenizer(path, "w")
    except DataError as error:
        assert "no tokenizer in" in error.message


def test_a_normalizer_that_grows_is_refused(tmp_path: Path) -> None:
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 16}
    for times in (2, 12):  # 256 and 10^14 letters for one
        path = changed(tmp_path, normalizer={"type": "Sequence", "normalizers": [grow] * times})
        with pytest.raises(DataError, match=r"takes more than|tokens of 3,001 characters"):
            refuse_endless_tokenizer(path, "teachers.0")


def test_a_broken_tokenizer_is_refused_with_the_librarys_reason(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer in") as caught:
        refuse_endless_tokenizer(changed(tmp_path, model={"type": "none"}), "w")
    assert "Traceback" not in str(caught.value)
