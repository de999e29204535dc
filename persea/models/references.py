"""The path that a reference to a model has, looked at without surprises."""

from __future__ import annotations

from pathlib import Path

from persea.errors import DataError

SHOWN_CHARS = 80


def model_path(name_or_path: str, where: str) -> Path:
    """Return the path of a model reference, whether or not there is a file.

    Args:
        name_or_path: A folder, a file, or a hub id, which has no file.
        where: The place for error messages.

    Raises:
        DataError: The system cannot look there: the name is too long or has a NUL, the folder may
            not be entered, or a link leads to itself.

    Example:
        >>> model_path("saplings/qwen-sapling", "teachers.0").name
        'qwen-sapling'
    """
    try:
        path = Path(name_or_path).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"no model folder {name_or_path[:SHOWN_CHARS]!r}: {reason}",
            where=where,
            remedy="give a folder in Hugging Face form, a GGUF file, or a hub id such as "
            "Qwen/Qwen3-8B",
        ) from error
    return path
