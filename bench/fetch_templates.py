"""Fetch chat templates of published models, a folder for each source.

    python bench/fetch_templates.py FOLDER     (make templates)

Sources, all of a fixed version: the source of llama-cpp-python (llama.cpp's templates), axolotl,
the npm package @huggingface/ollama-utils (the templates of 97 GGUF files), and files of GitHub
repositories. A source that cannot be had is named in one line, and the others are fetched. Each
becomes the folder `FOLDER/NAME VERSION` with one *.jinja a template; no template is part of persea.
GITHUB=URL takes the files of repositories from another address.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.request import urlopen

GITHUB = "https://raw.githubusercontent.com"
# (package, version, whether its source is fetched, folder of its templates)
PYTHON_PACKAGES = (
    ("llama-cpp-python", "0.3.36", True, "models/templates"),
    ("axolotl", "0.19.0", False, "chat_templates/templates"),
)
NPM_PACKAGE, NPM_VERSION = "@huggingface/ollama-utils", "0.0.18"
NPM_TABLE = "package/src/chat-template-automap.ts"
NPM_ENTRY = re.compile(
    r"\bmodel: \"library/([^\"]+)\",\s*gguf:\s*(?:\"((?:[^\"\\]|\\.)*)\"|'((?:[^'\\]|\\.)*)')", re.S
)


@dataclass(frozen=True)
class GithubFile:
    """A template in a GitHub repository.

    Attributes:
        name: The template's name.
        repository: OWNER/NAME.
        commit: The commit that has the file.
        path: Its path. A *.json is a history of templates, of which the last counts.
    """

    name: str
    repository: str
    commit: str
    path: str


LLM_JP = "llm-jp/llm-jp-tokenizer"
# Chat templates of the thousand most downloaded models on Hugging Face's hub, with their history.
DRIFT, DRIFT_COMMIT = "s1mar/chat-template-drift", "6dee80f6ffd401d97cb431f12d03940139c76de1"
GITHUB_FILES = (
    GithubFile(
        "llm-jp-4",
        LLM_JP,
        "925b87aa2b55cebcb66a36a80431e28c533f70b5",
        "hf/ver4.0/alpha_1.0/chat_template.jinja",
    ),
    GithubFile(
        "llm-jp-4.1",
        LLM_JP,
        "ce443de19498cf0639bbdfbb8f95952e4ca4e7a8",
        "hf/ver4.0/alpha_1.1/chat_template.jinja",
    ),
    GithubFile(
        "llm-jp-4-alpha-2.0",
        LLM_JP,
        "0700519ceaeeb1df7961c98cfed9820dee63398a",
        "hf/ver4.0/alpha_2.0/chat_template.jinja",
    ),
    GithubFile(
        "glm-5.3-flash",
        "sgl-project/sglang",
        "cd1e1632e2f97a5e0bca38438319cbd4af48f428",
        "docker/glm53-flash/chat_template.jinja",
    ),
    GithubFile(
        "StepFun3.7-Flash",
        "ggml-org/llama.cpp",
        "ca13f4c01cae739755fedfae817d266846e27b30",
        "models/templates/StepFun3.7-Flash.jinja",
    ),
    *(
        GithubFile(model.split("__")[1], DRIFT, DRIFT_COMMIT, f"data/history/{model}.json")
        for model in (
            "LGAI-EXAONE__K-EXAONE-236B-A23B",
            "XiaomiMiMo__MiMo-V2.5",
            "allenai__Olmo-3-7B-Instruct",
            "allenai__Olmo-3-7B-Think",
            "microsoft__phi-4",
            "nvidia__Kimi-K2.7-Code-NVFP4",
            "zai-org__GLM-5",
            "zai-org__GLM-5.2",
        )
    ),
)


class NotFetchedError(Exception):
    """A source that cannot be had, with the reason."""


def run(*command: str) -> None:
    """Run a command; raise NotFetchedError with its last line if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines() or [f"exit {done.returncode}"]
        raise NotFetchedError(lines[-1])


def python_package(name: str, version: str, is_source: bool, folder: Path) -> Path:
    """Return the archive of a Python package, fetched by pip into the folder."""
    kind = ["--no-binary" if is_source else "--only-binary", name]
    wanted = f"{name.replace('-', '_')}-{version}*"
    if not list(folder.glob(wanted)):
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        run(*pip, *kind, f"{name}=={version}", "-d", str(folder))
    return next(folder.glob(wanted))


def npm_package(name: str, version: str, folder: Path) -> Path:
    """Return the archive of an npm package, fetched by npm into the folder."""
    path = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    npm = shutil.which("npm")
    if not path.is_file():
        if npm is None:
            raise NotFetchedError("npm is not installed")
        run(npm, "pack", "--silent", f"{name}@{version}", "--pack-destination", str(folder))
    return path


def archived_files(archive: Path) -> Iterator[tuple[PurePosixPath, str]]:
    """Yield (path, text) of the templates and tables in a package."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if name.endswith(".jinja"):
                    yield PurePosixPath(name), wheel.read(name).decode()
        return
    with tarfile.open(archive) as source:
        for member in source:
            path = PurePosixPath(member.name)
            if member.isfile() and (path.suffix == ".jinja" or member.name == NPM_TABLE):
                content = source.extractfile(member)
                assert content is not None
                yield path, content.read().decode()


def read_table(source: str) -> Iterator[tuple[str, str]]:
    """Yield (name, template) of a table in TypeScript; texts of one name are numbered."""
    seen: dict[str, list[str]] = {}
    for match in NPM_ENTRY.finditer(source):
        name = re.sub(r"[^\w.]+", "-", match[1])
        literal = match[2] or match[3]
        text = re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], literal)
        texts = seen.setdefault(name, [])
        if text not in texts:
            texts.append(text)
            yield name if len(texts) == 1 else f"{name}-{len(texts)}", text


def github_template(file: GithubFile, address: str) -> str:
    """Return a template of a GitHub repository."""
    try:
        with urlopen(f"{address}/{file.repository}/{file.commit}/{file.path}", timeout=60) as got:
            text = str(got.read().decode())
    except OSError as error:
        raise NotFetchedError(f"{file.name}: {error}") from error
    return (
        str(json.loads(text)["_templates"][-1]["template"]) if file.path[-5:] == ".json" else text
    )


def write_templates(folder: Path, templates: dict[str, str]) -> None:
    """Write one source's folder anew and print how many templates it has."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, text in templates.items():
        (folder / f"{name}.jinja").write_text(text, encoding="utf-8")
    print(f"{folder.name}: {len(templates)} templates", flush=True)


def fetch_all(folder: Path, address: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (source and version, name -> template); print the sources that cannot be had."""
    for name, version, is_source, where in PYTHON_PACKAGES:
        try:
            files = archived_files(python_package(name, version, is_source, folder))
            inside = {p.stem: text for p, text in files if str(p.parent).endswith(where)}
            yield f"{name} {version}", inside
        except NotFetchedError as error:
            print(f"{name} {version}: not fetched: {error}")
    try:
        files = archived_files(npm_package(NPM_PACKAGE, NPM_VERSION, folder))
        table = next(text for p, text in files if str(p) == NPM_TABLE)
        yield f"{NPM_PACKAGE.split('/')[1]} {NPM_VERSION}", dict(read_table(table))
    except NotFetchedError as error:
        print(f"{NPM_PACKAGE} {NPM_VERSION}: not fetched: {error}")
    for repository in dict.fromkeys(f.repository for f in GITHUB_FILES):
        found = {}
        for file in (f for f in GITHUB_FILES if f.repository == repository):
            try:
                found[file.name] = github_template(file, address)
            except NotFetchedError as error:
                print(f"github.com/{repository}: not fetched: {error}")
        if found:
            commits = dict.fromkeys(
                f.commit[:7] for f in GITHUB_FILES if f.repository == repository
            )
            yield f"{repository.split('/')[1]} {' '.join(commits)}", found


def main() -> None:
    """Fetch every source."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for source, templates in fetch_all(folder, os.environ.get("GITHUB", GITHUB)):
        write_templates(folder / source, templates)


if __name__ == "__main__":
    main()
