"""Read the configurations of a model folder; refuse those that name code or other weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from persea.errors import DataError

# The end of keys whose value can name a kernel on the hub (`owner/name`), which is foreign code.
CODE_KEY_ENDING = "_implementation"


def refuse_remote_code(folder: Path, where: str) -> None:
    """Check that a model folder brings no code of its own, before any library reads it.

    Raises:
        DataError: A configuration has `auto_map`, names a kernel of the hub, or is broken; or the
            folder is an adapter, whose configuration names other weights.
    """
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        if not path.is_file():
            continue
        config = read_json_config(path, where)
        if "auto_map" in config:
            raise DataError(
                f"{path} brings its own code (auto_map)",
                where=where,
                remedy="use a model that transformers supports itself",
            )
        if kernel := next(_named_kernels(config), ""):
            raise DataError(
                f"{path} names code of the hub ({kernel})",
                where=where,
                remedy="delete this key from the configuration",
            )
    if (folder / "adapter_config.json").exists():
        raise DataError(
            f"{folder} holds an adapter (adapter_config.json)",
            where=where,
            remedy="merge it into its base model (peft: merge_and_unload) and save that, or delete "
            "the adapter from the folder",
        )


def _named_kernels(config: Any) -> Iterator[str]:
    """Yield `key: value` of each kernel on the hub that a configuration names, nested or not."""
    if isinstance(config, list):
        for value in config:
            yield from _named_kernels(value)
        return
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        names = list(value.values()) if isinstance(value, dict) else [value]
        if key.endswith(CODE_KEY_ENDING):
            yield from (f"{key}: {n}" for n in names if isinstance(n, str) and "/" in n)
        yield from _named_kernels(value)


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
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}", where=where, remedy="fetch the model again"
        ) from error
    if not isinstance(config, dict):
        raise DataError(f"{path} is no JSON object", where=where, remedy="fetch the model again")
    return config
