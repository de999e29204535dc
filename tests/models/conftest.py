"""A small model folder for the tests of this package, and a copy of it that a test may damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from persea.chat.renderer import ChatRenderer
from persea.models.loading import ModelSource
from persea.models.random_init import random_init

SIZES = {"hidden": 32, "layers": 1, "heads": 2, "seed": 1, "experts": 2}
RANDOM = tuple(SIZES.items())


@pytest.fixture(scope="module")
def llama(tiny_of, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ChatRenderer]:
    """A model folder: the tiny Llama tokenizer and weights that fit it."""
    speaker = tiny_of("llama")
    folder = tmp_path_factory.mktemp("models") / "llama"
    shutil.copytree(speaker.folder, folder)
    random_init("llama", len(speaker.renderer.vocabulary), SIZES).save_pretrained(folder)
    return folder, speaker.renderer


@pytest.fixture
def copy(llama: tuple[Path, ChatRenderer], tmp_path: Path) -> Path:
    """A copy of the folder that a test may damage."""
    return Path(shutil.copytree(llama[0], tmp_path / "copy"))


def configure(folder: Path, **files: dict[str, Any] | None) -> ModelSource:
    """Set these keys in the folder's configurations; None deletes the file."""
    for name, keys in files.items():
        path = folder / f"{name}.json"
        if keys is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(
                json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | keys)
            )
    return ModelSource(str(folder))
