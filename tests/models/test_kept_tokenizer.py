"""A tokenizer is opened by transformers once; what is kept is never trusted unchecked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from persea import storage
from persea.chat.messages import Conversation, Text
from persea.chat.renderer import ChatRenderer
from persea.models import kept_tokenizer, loading
from persea.models.loading import ModelSource, load_renderer
from tests.models.conftest import configure

HELLO = Conversation.from_question("2 + 3?").with_answer(Text("5, ไทย 你好"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERSEA_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "tokenizers"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each tokenizer that transformers opens."""
    seen: list[str] = []
    load = loading.load_tokenizer

    def counted(source: ModelSource, where: str) -> object:
        seen.append(source.tokenizer_name_or_path)
        return load(source, where)

    monkeypatch.setattr(loading, "load_tokenizer", counted)
    return seen


def same(one: ChatRenderer, two: ChatRenderer) -> bool:
    a, b = one.render(HELLO), two.render(HELLO)
    return one.digest == two.digest and (a.ids_T == b.ids_T).all() and (a.ends_T == b.ends_T).all()


def kept_in(home: Path) -> list[Path]:
    """The kept tokenizers; how their opening in a child process ended lies beside them."""
    return [path for path in home.iterdir() if not path.name.endswith(".ends.json")]


def test_the_second_opening_needs_no_transformers(copy: Path, home: Path, loads: list[str]):
    first, second = load_renderer(str(copy)), load_renderer(str(copy))
    assert len(loads) == 1
    assert same(first, second)
    assert first.special_tokens == second.special_tokens
    assert len(kept_in(home)) == 1
    # a fresh process imports neither transformers nor torch
    code = (
        "import sys; from persea.models.loading import load_renderer;"
        f"load_renderer({str(copy)!r});"
        "print('transformers' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.split() == ["False", "False"]


def test_another_folder_with_the_same_files_uses_the_kept_one(
    copy: Path, llama: tuple[Path, ChatRenderer], home: Path, loads: list[str]
):
    assert load_renderer(str(copy)).vocabulary.name == str(copy)
    assert load_renderer(str(llama[0])).vocabulary.name == str(llama[0])
    assert len(loads) == 1


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"]
)
def test_a_changed_file_is_read_anew(copy: Path, home: Path, loads: list[str], name: str):
    load_renderer(str(copy))
    path = copy / name
    path.write_text(path.read_text() + "\n")
    load_renderer(str(copy))
    assert len(loads) == 2
    assert len(kept_in(home)) == 2


def test_weights_do_not_count(copy: Path, home: Path, loads: list[str]):
    load_renderer(str(copy))
    (copy / "model.safetensors").write_bytes(b"other weights")
    load_renderer(str(copy))
    assert len(loads) == 1


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "garbage", "foreign"])
def test_a_damaged_or_foreign_file_is_written_anew(
    copy: Path, llama: tuple[Path, ChatRenderer], home: Path, loads: list[str], damage: str
):
    first = load_renderer(str(copy))
    (path,) = kept_in(home)
    data = path.read_bytes()
    if damage == "foreign":  # another tokenizer's file under this name, whole in itself
        configure(copy, tokenizer_config={"more": 1})
        load_renderer(str(copy))
        (other,) = set(kept_in(home)) - {path}
        path.write_bytes(other.read_bytes())
        shutil.copyfile(llama[0] / "tokenizer_config.json", copy / "tokenizer_config.json")
    else:
        damaged = {
            "cut": data[:-7],
            "bit": data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
            "empty": b"",
            "garbage": os.urandom(4000),
        }
        path.write_bytes(damaged[damage])
    before = len(loads)
    again = load_renderer(str(copy))
    assert len(loads) == before + 1
    assert same(first, again)
    assert path.read_bytes() == data
    load_renderer(str(copy))
    assert len(loads) == before + 1


def test_a_home_that_cannot_be_written_costs_time_only(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: list[str]
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PERSEA_HOME", str(tmp_path / "file"))
    load_renderer(str(copy))
    load_renderer(str(copy))
    assert len(loads) == 2


def test_other_code_reads_anew(
    copy: Path, home: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
):
    load_renderer(str(copy))
    monkeypatch.setattr(kept_tokenizer, "_digest_of_code", lambda: ("another version",))
    load_renderer(str(copy))
    assert len(loads) == 2
    assert storage.persea_home() == home.parent
