"""An unknown tokenizer is opened in a child with limits first, once for the same file."""

from __future__ import annotations

import base64
import json
import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest

from persea.errors import DataError
from persea.models.loading import ModelSource, load_tokenizer
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


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_hostile_tokenizer_ends_after_three_seconds_of_work(tmp_path: Path) -> None:
    """Its limits are CPU time, so a loaded machine changes the wall time alone."""
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 16}
    path = changed(tmp_path, normalizer={"type": "Sequence", "normalizers": [grow] * 12})
    begin = cpu_of_children()
    with pytest.raises(DataError, match="takes more than"):
        refuse_endless_tokenizer(path, "teachers.0")
    assert 0 < cpu_of_children() - begin < 3


def write_vocabulary_and_merges(folder: Path) -> None:
    """The qwen-sapling's tokenizer as vocab.json and merges.txt."""
    model = json.loads(QWEN.read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))


def write_tiktoken(folder: Path, pattern: str) -> None:
    """A tiktoken file of single bytes, and the split pattern beside it."""
    lines = [f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256)]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    (folder / "tokenization_it.py").write_text(f"pat_str = {pattern!r}\n")
    (folder / "tokenizer_config.json").write_text("{}")


@pytest.mark.parametrize("form", ["vocabulary and merges", "tiktoken"])
def test_tokenizers_of_other_forms_are_opened_in_the_child_first(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSEA_HOME", str(tmp_path / "home"))
    folder = tmp_path / "model"
    folder.mkdir()
    if form == "tiktoken":
        write_tiktoken(folder, r"[a-z]+|\s+|[^a-z\s]+")
    else:
        write_vocabulary_and_merges(folder)
    opened: list[str] = []

    def killed(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        opened.append(command[3])
        return subprocess.CompletedProcess(command, -27, b"", b"")

    with monkeypatch.context() as ended:
        ended.setattr(subprocess, "run", killed)
        with pytest.raises(DataError, match="opening it takes more than"):
            load_tokenizer(ModelSource(str(folder)), "teachers.0")
    assert opened == [str(folder)]
    tokenizer = load_tokenizer(ModelSource(str(folder)), "teachers.0")
    assert tokenizer.decode(tokenizer.encode("a b c")) == "a b c"
    monkeypatch.setattr(subprocess, "run", None)  # known by now
    load_tokenizer(ModelSource(str(folder)), "teachers.0")


def test_a_folder_without_a_tokenizer_starts_no_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    refuse_endless_tokenizer(tmp_path, "w")
