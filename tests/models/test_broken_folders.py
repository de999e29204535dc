"""Each broken model folder is refused in one line with exit code 3, and none hangs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from persea.chat.renderer import ChatRenderer
from persea.errors import DataError
from persea.models.folder_files import refuse_unsafe_files
from persea.models.identity import fingerprint
from persea.models.loading import ModelSource, load_model, load_renderer
from persea.models.weight_files import find_weight_files, read_header
from tests.models.broken_folders import REFUSED

NUM_FORMS = 131


def open_fully(folder: Path) -> None:
    """What a run does with a model, in its order."""
    source = ModelSource(str(folder))
    renderer = load_renderer(source, "teachers.0")
    fingerprint(source, "teachers.0")
    load_model(source, renderer, "teachers.0")


def test_there_are_enough_forms() -> None:
    assert len(REFUSED) >= NUM_FORMS


@pytest.mark.timeout(60)
@pytest.mark.parametrize("form", REFUSED)
def test_a_broken_folder_is_refused(form: str, copy: Path) -> None:
    REFUSED[form](copy)
    with pytest.raises(DataError) as caught:
        open_fully(copy)
    text = str(caught.value)
    assert "\n" not in text
    assert " -> " in text
    assert not re.search(r"object has no attribute|Traceback|NoneType", text), text


def test_the_whole_folder_opens(copy: Path) -> None:
    open_fully(copy)


def test_what_can_be_read_is_not_refused(
    copy: Path, tmp_path: Path, llama: tuple[Path, ChatRenderer]
) -> None:
    """Links inside a folder, a hub cache's links to its blobs, a linked folder, other files."""
    (copy / "model.safetensors").rename(copy / "weights.safetensors")
    (copy / "model.safetensors").symlink_to("weights.safetensors")
    (copy / "onnx").symlink_to("/tmp")
    (copy / "notes.bin").write_bytes(b"")
    open_fully(copy)
    commit = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--a--b" / "blobs"
    commit.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(llama[0].iterdir())):
        shutil.copy(path, blobs / str(number))
        (commit / path.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "linked").symlink_to(commit)
    for folder in (commit, tmp_path / "linked"):
        refuse_unsafe_files(folder, "w")
        open_fully(folder)


def test_an_index_inside_the_folder_is_read(copy: Path) -> None:
    from tests.models.broken_folders import indexed

    before = find_weight_files(copy, "w")
    indexed("model-00001-of-00001.safetensors", "model-00001-of-00001.safetensors")(copy)
    (found,) = find_weight_files(copy, "w")
    assert found.name == "model-00001-of-00001.safetensors" != before[0].name
    assert "model.norm.weight" in read_header(found, "w")
    open_fully(copy)
