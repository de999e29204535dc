"""Look at what a run needs from this machine: packages, devices, disk, sandbox, hub, endpoints."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persea import storage
from persea.errors import PerseaError

if TYPE_CHECKING:
    from persea.config.recipe import Recipe

REQUIRED_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "peft",
    "detect-secrets",
)
OPTIONAL_PACKAGES = {  # package -> the extra that brings it
    "fastapi": "serve",
    "gguf": "gguf",
    "sentencepiece": "sentencepiece",
    "sacrebleu": "eval",
    "math-verify": "eval",
    "model-signing": "sign",
}
MIN_FREE_BYTES = 5 << 30


class State(StrEnum):
    """State of one thing that was looked at."""

    OK = "ok"
    ABSENT = "not there"  # and only needed for some recipes
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: The thing.
        state: Its state.
        detail: What was found.
        remedy: How to get it; "" if nothing is wrong.
    """

    what: str
    state: State
    detail: str
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the finding as JSON."""
        return asdict(self)


def examine(recipe: Recipe | None, out: Path) -> tuple[Finding, ...]:
    """Look at this machine, and at what a recipe needs of it.

    Args:
        recipe: A recipe whose endpoints and licences are looked at too; None = the machine alone.
        out: Folder that runs are written to.
    """
    found = [*_packages(), _device(), *_disks(out), _sandbox(), _hub()]
    if recipe is not None:
        found += [*_endpoints(recipe), _licences(recipe)]
    return tuple(found)


def _packages() -> Iterator[Finding]:
    yield Finding("python", State.OK, f"{platform.python_version()} on {platform.machine()}")
    for name in (*REQUIRED_PACKAGES, *OPTIONAL_PACKAGES):
        try:
            yield Finding(name, State.OK, metadata.version(name))
        except metadata.PackageNotFoundError:
            extra = OPTIONAL_PACKAGES.get(name)
            yield Finding(
                name,
                State.ABSENT if extra else State.PROBLEM,
                f"only for persea[{extra}]" if extra else "persea needs it",
                f"pip install 'persea[{extra}]'" if extra else f"pip install {name}",
            )


def _device() -> Finding:
    import torch

    from persea.models.placement import has_fast_bfloat16

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not torch.cuda.is_available():
        slow = "" if has_fast_bfloat16(torch.device("cpu")) else ", slow in bfloat16"
        return Finding("devices", State.OK, f"no GPU; {cores} CPU cores{slow}")
    names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return Finding("devices", State.OK, f"{', '.join(names)}; {cores} CPU cores")


def _disks(out: Path) -> Iterator[Finding]:
    for name, folder in (("disk of the runs", out), ("disk of PERSEA_HOME", storage.persea_home())):
        existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        is_writable = os.access(existing, os.W_OK)
        is_enough = free >= MIN_FREE_BYTES and is_writable
        yield Finding(
            name,
            State.OK if is_enough else State.PROBLEM,
            f"{free / 1e9:.0f} GB free at {existing}" + ("" if is_writable else ", not writable"),
            "" if is_enough else "free space, or choose another folder (--out, PERSEA_HOME)",
        )


def _sandbox() -> Finding:
    """Run the sandbox's self-test."""
    from persea.tasks.sandbox.sandbox import open_sandbox

    try:
        return Finding("sandbox", State.OK, f"{open_sandbox().isolation}, the self-test passes")
    except PerseaError as error:
        return Finding("sandbox", State.ABSENT, error.message, error.remedy)


def _hub() -> Finding:
    from huggingface_hub import constants, get_token

    mode = "offline" if constants.HF_HUB_OFFLINE else "online"
    token = "a token is set" if get_token() else "no token: gated models cannot be fetched"
    return Finding("hub", State.OK, f"{mode}, {constants.ENDPOINT}, {token}, {constants.HF_HOME}")


def _endpoints(recipe: Recipe) -> Iterator[Finding]:
    """Look whether the keys of servers are set, and whether the servers accept connections."""
    import socket
    from urllib.parse import urlsplit

    for teacher in recipe.teachers:
        at = teacher.endpoint
        if at is None:
            continue
        name = f"endpoint of {teacher.name}"
        if at.key_env and not os.environ.get(at.key_env):
            yield Finding(
                name, State.PROBLEM, f"{at.key_env} is not set", f"export {at.key_env}=..."
            )
            continue
        for url in at.addresses:
            parts = urlsplit(url)
            address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
            try:
                socket.create_connection(address, 5).close()
            except OSError as error:
                reason = error.strerror or str(error)
                remedy = "start the server, or mend `url:`"
                yield Finding(name, State.PROBLEM, f"{url}: {reason}", remedy)
            else:
                yield Finding(name, State.OK, f"{url} accepts connections")


def _licences(recipe: Recipe) -> Finding:
    from persea.licences.notice import verdict_lines
    from persea.pipeline.licence_gate import licence_verdict

    verdict = licence_verdict(recipe, None)
    is_fine = verdict.outcome in ("ok", "ok with duties")
    return Finding(
        "licences",
        State.OK if is_fine else State.PROBLEM,
        " ".join(line.strip() for line in verdict_lines(verdict)),
        "" if is_fine else "docs/licences.md",
    )
