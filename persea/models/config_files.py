"""Read the configuration files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from persea.errors import DataError


def refuse_remote_code(folder: Path, where: str) -> None:
    """Check that a model folder brings no code of its own, before any library reads it.

    Raises:
        DataError: A configuration has `auto_map`, or is broken.
    """
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        if not path.is_file():
            continue
        if "auto_map" in read_json_config(path, where):
            raise DataError(
                f"{path} brings its own code (auto_map)",
                where=where,
                remedy="use a model that transformers supports itself",
            )


def read_json_config(path: Path, where: str) -> dict[str, Any]:
    """Read a configuration file of a model.

    Raises:
        DataError: The file is no JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not JSON: {error}", where=where, remedy="fetch the model again"
        ) from error
    if not isinstance(config, dict):
        raise DataError(f"{path} is no JSON object", where=where, remedy="fetch the model again")
    return config
