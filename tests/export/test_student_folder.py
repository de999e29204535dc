"""A finished run is exported whole: weights, tokenizer, card and NOTICE, or nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from persea.errors import DataError, MissingRequirementError, RefusedError, TeacherError
from persea.export import student_folder as folders
from persea.export.student_folder import (
    StudentRecord,
    describe_push,
    push_folder,
    read_student,
    write_gguf_folder,
    write_model_folder,
)
from persea.storage import write_json
from tests.export.test_gguf_file import SAPLINGS


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with what an export reads."""
    run = tmp_path / "run"
    shutil.copytree(SAPLINGS / "qwen-sapling", run / "train" / "student")
    write_json(
        run / "lineage" / "lineage.json", {"student": {"name": "Llama mine", "licence": "mit"}}
    )
    (run / "lineage" / "NOTICE").write_text("Made from qwen-sapling.\n")
    (run / "report").mkdir()
    (run / "report" / "README.md").write_text("---\nlicense: mit\n---\n# Llama mine\n")
    return run


def student(run: Path) -> StudentRecord:
    return read_student(run)


def test_a_model_folder_is_whole(run: Path, tmp_path: Path) -> None:
    write_model_folder(student(run), tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
        "NOTICE",
    }
    assert (tmp_path / "out" / "README.md").read_text().endswith("# Llama mine\n")
    with pytest.raises(RefusedError, match="not empty"):
        write_model_folder(student(run), tmp_path / "out")


def test_adapters_are_copied_with_the_tokenizer(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="trained whole"):
        write_model_folder(student(run), tmp_path / "out", only_adapter=True)
    assert not (tmp_path / "out").exists()
    (run / "train" / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run / "train" / "adapter" / name).write_text("{}")
    write_model_folder(student(run), tmp_path / "out", only_adapter=True)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "NOTICE"}
    assert not names & {"model.safetensors", "config.json"}


def test_gguf_and_ollama_folders(run: Path, tmp_path: Path) -> None:
    file = write_gguf_folder(student(run), tmp_path / "out", for_ollama=True)
    assert file.path == tmp_path / "out" / "Llama-mine.gguf" and file.path.is_file()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "Llama-mine.gguf",
        "Modelfile",
        "README.md",
        "NOTICE",
    }
    assert "FROM ./Llama-mine.gguf" in (tmp_path / "out" / "Modelfile").read_text()


def test_a_refused_export_leaves_nothing(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "train" / "student")
    shutil.copytree(SAPLINGS / "gpt-oss-sapling", run / "train" / "student")
    with pytest.raises(RefusedError, match="no GGUF export"):
        write_gguf_folder(student(run), tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("train/student/model.safetensors", "no trained student"),
        ("train/student/tokenizer.json", "has no tokenizer"),
        ("report/README.md", "no model card yet"),
        ("lineage/lineage.json", "not there"),
    ],
)
def test_what_a_run_lacks_is_named(run: Path, missing: str, words: str) -> None:
    (run / missing).unlink()
    with pytest.raises(DataError, match=words):
        read_student(run)


class Hub:
    """Stands for the hub, which no test reaches: records calls, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, list[tuple[str, dict[str, Any]]]()

    def create_repo(self, repository: str, **options: Any) -> None:
        if self.error:
            raise self.error
        self.calls.append((repository, options))

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", options))


def test_a_push_creates_a_private_repository(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalTokenNotFoundError

    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    assert push_folder(run, "me/mine") == "https://huggingface.co/me/mine"
    assert hub.calls[0] == ("me/mine", {"private": True, "exist_ok": True})
    assert hub.calls[1][1]["repo_id"] == "me/mine"
    for error, expected in (
        (LocalTokenNotFoundError("no token"), MissingRequirementError),
        (OSError("no route to host\nmore"), TeacherError),
    ):
        monkeypatch.setattr("huggingface_hub.HfApi", lambda error=error: Hub(error))
        with pytest.raises(expected):
            push_folder(run, "me/mine")
    for bad in ("mine", "a/b/c", "/x", "a/ b"):
        with pytest.raises(RefusedError, match="no name of a repository"):
            folders.refuse_bad_repository(bad)


def test_a_dry_run_lists_the_files(run: Path) -> None:
    lines = describe_push(run / "report", "me/mine")
    assert lines == [
        "me/mine: 1 files, 34 bytes, as a private model repository",
        "  README.md (34 bytes)",
    ]
