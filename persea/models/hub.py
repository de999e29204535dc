"""Models on the hub: a name is resolved to its commit once, and everything is read at that commit.

A branch can move while a run reads one file after the other. So the commit is asked for once a
process, and it is the model's identity from then on.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from persea.errors import DataError
from persea.models.folder_files import refuse_unsafe_files

COMMIT = re.compile("[0-9a-f]{40}")
TEMPLATE_PATTERN = "*.jinja"  # also in the folder additional_chat_templates
# Configurations, templates and tokenizers of any form.
TEXT_PATTERNS = (
    TEMPLATE_PATTERN,
    "*.json",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
    "tokenization_*.py",
)


@lru_cache(maxsize=256)
def resolve_commit(model: str, revision: str) -> str:
    """Return the commit of a hub model; its revision where the commit cannot be found out.

    Args:
        model: Hub id.
        revision: Commit, branch or tag; "" = the main branch.
    """
    if COMMIT.fullmatch(revision):
        return revision
    path = _download_file(model, "config.json", revision)
    commit = "" if path is None else path.parent.name
    return commit if COMMIT.fullmatch(commit) else revision


def download_hub_file(model: str, revision: str, name: str) -> Path | None:
    """Return a small file of a hub model; None if it has none or the hub cannot be reached.

    Loading the weights then reports the reason.
    """
    return _download_file(model, name, resolve_commit(model, revision))


def _download_file(model: str, name: str, revision: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, name, revision=revision or None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
        return None


@lru_cache(maxsize=256)
def download_snapshot(model: str, revision: str, where: str, with_weights: bool = True) -> Path:
    """Return the folder of a hub model's commit; it is downloaded, with or without its weights.

    Only the weights that transformers reads are downloaded: some repositories hold them twice, in a
    folder or under another name. Its files are checked as those of a local folder before any
    library reads them.

    Raises:
        DataError: The model cannot be downloaded, or its files cannot be read safely.
    """
    from huggingface_hub import snapshot_download

    patterns = [*TEXT_PATTERNS, *(["model*.safetensors"] if with_weights else [])]
    try:
        folder = Path(
            snapshot_download(
                model,
                revision=resolve_commit(model, revision) or None,
                allow_patterns=patterns,
                ignore_patterns=[f"*/{p}" for p in patterns if p != TEMPLATE_PATTERN],
            )
        )
    except Exception as error:  # a missing model, no network, no licence, ...
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"cannot fetch {model!r}: {first_line.rstrip(':')}",
            where=where,
            remedy="fetch it first where there is network (`hf download`), accept its licence "
            "there, or give a folder in Hugging Face form",
        ) from error
    refuse_unsafe_files(folder, where)
    return folder
