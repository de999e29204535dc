"""Read a model's licence from its own folder or card, never from what its template looks like.

Licences differ between the checkpoints of one family: Qwen2.5-7B is Apache-2.0, Qwen2.5-3B is for
research only.
"""

from __future__ import annotations

from functools import partial

from persea.models.licence_text import (
    LICENCE_FILE_NAMES,
    UNKNOWN_LICENCE,
    ancestors_of_files,
    licence_of_card,
    licence_of_files,
    licence_of_text,
)
from persea.models.loading import ModelSource, download_hub_file, local_folder

__all__ = [
    "UNKNOWN_LICENCE",
    "licence_of_card",
    "licence_of_text",
    "read_ancestors",
    "read_licence",
]


def read_licence(source: ModelSource, where: str) -> str:
    """Return the licence that a model's own files state; UNKNOWN_LICENCE if they state none.

    Read are, in this order: the front matter of the card (`license_name` where `license` is
    "other", else `license`), `license` in config.json, and a licence file. Nothing is inferred.

    Args:
        source: The model.
        where: The place for error messages.

    Raises:
        DataError: The folder does not exist.
    """
    if source.is_random:
        return UNKNOWN_LICENCE
    is_local = local_folder(source.model, where) is not None
    return licence_of_files(
        partial(_read_file, source, where),
        LICENCE_FILE_NAMES if is_local else LICENCE_FILE_NAMES[:1],
    )


def read_ancestors(source: ModelSource, where: str) -> tuple[str, ...]:
    """Return the models that a model was made from, as its card and its configuration name them.

    Args:
        source: The model.
        where: The place for error messages.

    Raises:
        DataError: The folder does not exist.
    """
    return () if source.is_random else ancestors_of_files(partial(_read_file, source, where))


def _read_file(source: ModelSource, where: str, name: str) -> str:
    """Return the text of a file of a model; "" if it has none of this name."""
    folder = local_folder(source.model, where)
    path = download_hub_file(source, name) if folder is None else folder / name
    if path is None or not path.is_file():
        return ""
    return path.read_text(encoding="utf-8", errors="replace")
