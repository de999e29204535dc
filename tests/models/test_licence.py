"""A model's licence is read from its own card or folder; nothing is inferred from its family."""

from __future__ import annotations

from pathlib import Path

import pytest

from persea.errors import DataError
from persea.models import licence
from persea.models.licence import licence_of_card, licence_of_text, read_licence
from persea.models.licence_text import ancestors_of_files
from persea.models.loading import ModelSource

APACHE = "\n          Apache License\n          Version 2.0, January"


@pytest.mark.parametrize(
    ("card", "want"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# M", "apache-2.0"),
        (
            "---\nlicense: other\nlicense_name: qwen-research\nlicense_link: x\n---\n",
            "qwen-research",
        ),
        ("---\nlicense: other\n---\n", ""),
        ("---\nlicense: unknown\n---\n", ""),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", "mit, apache-2.0"),
        ("---\ntags: [x]\n---\n", ""),
        ("# no front matter\nlicense: mit\n", ""),
        ("---\nlicense: [\n---\n", ""),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("", ""),
    ],
)
def test_the_front_matter_of_a_card(card: str, want: str):
    assert licence_of_card(card) == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (APACHE, "Apache-2.0"),
        ("MIT License\n\nCopyright (c)", "MIT"),
        ("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n", "Llama 3.1 Community License"),
        ("Gemma Terms of Use\nLast modified", "Gemma Terms of Use"),
        ("Qwen RESEARCH LICENSE AGREEMENT\n", "Qwen Research License"),
        ("# NVIDIA Open Model License\ntext", "NVIDIA Open Model License"),
        ("\n\n", ""),
    ],
)
def test_the_title_of_a_licence_text(text: str, want: str):
    assert licence_of_text(text) == want


def test_the_card_counts_before_configuration_and_licence_file(tmp_path: Path):
    source = ModelSource(str(tmp_path))
    assert read_licence(source, "w") == "unknown"
    (tmp_path / "LICENSE").write_text(APACHE)
    assert read_licence(source, "w") == "Apache-2.0"
    (tmp_path / "config.json").write_text('{"license": "mit"}')
    assert read_licence(source, "w") == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: qwen-research\n---\n")
    assert read_licence(source, "w") == "qwen-research"


def test_a_folder_with_a_broken_configuration_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json is not JSON"):
        read_licence(ModelSource(str(tmp_path)), "w")


def test_broken_files_of_a_hub_model_state_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "README.md").write_bytes(b"\xff---\nlicense: mit\n---\n")
    monkeypatch.setattr(licence, "download_hub_file", lambda _, name: tmp_path / name)
    assert read_licence(ModelSource("google/gemma-3-1b-it"), "w") == "unknown"


def test_a_hub_model_states_it_in_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n")
    asked = []

    def download(source: ModelSource, name: str) -> Path | None:
        asked.append(name)
        return tmp_path / name if (tmp_path / name).is_file() else None

    monkeypatch.setattr(licence, "download_hub_file", download)
    assert read_licence(ModelSource("google/gemma-3-1b-it"), "w") == "gemma"
    (tmp_path / "README.md").unlink()
    assert read_licence(ModelSource("google/gemma-3-1b-it"), "w") == "unknown"
    assert read_licence(ModelSource("random", tokenizer="x"), "w") == "unknown"
    assert asked == ["README.md", "README.md", "config.json", "LICENSE"]


def test_a_modified_mit_licence_is_not_mit():
    assert licence_of_text("Modified MIT License\n\nCopyright") == "Modified MIT License"


def test_the_ancestors_that_a_card_and_a_configuration_name():
    files = {
        "README.md": "---\nbase_model: [a/b, '', 3]\n---\n",
        "config.json": '{"_name_or_path": "c/d"}',
    }
    assert ancestors_of_files(lambda name: files.get(name, "")) == ("a/b", "c/d")
    assert ancestors_of_files(lambda name: "---\nbase_model: a/b\n---\n") == ("a/b",)
    assert ancestors_of_files(lambda name: "") == ()


def test_an_extended_student_descends_from_its_base_and_from_the_teacher_of_its_rows() -> None:
    files = {
        "config.json": '{"_name_or_path": "some/base"}',
        "extension.json": '{"model": "some/base", "teacher_rows": {"model": "other/teacher"}}',
    }
    assert ancestors_of_files(lambda name: files.get(name, "")) == ("some/base", "other/teacher")
    files["extension.json"] = '{"model": "some/base", "teacher_rows": null}'
    assert ancestors_of_files(lambda name: files.get(name, "")) == ("some/base",)
