"""The recipes and models that come with persea."""

from __future__ import annotations

from pathlib import Path

BUNDLED_PREFIX = "bundled:"  # of a model in a recipe: bundled:saplings/qwen-sapling


def bundled_folder(kind: str) -> Path:
    """Return the folder of bundled recipes or saplings.

    It lies inside an installed package, and next to the package in a checkout.
    """
    package = Path(__file__).resolve().parent.parent
    inside = package / "bundled" / kind
    return inside if inside.is_dir() else package.parent / kind


def bundled_path(reference: str) -> str:
    """Return the path that `bundled:KIND/NAME` names."""
    kind, _, name = reference.removeprefix(BUNDLED_PREFIX).partition("/")
    return str(bundled_folder(kind) / name)


def bundled_models() -> list[str]:
    """Return the names of the bundled models, as a recipe gives them."""
    folders = sorted(bundled_folder("saplings").glob("*-sapling"))
    return [f"{BUNDLED_PREFIX}saplings/{folder.name}" for folder in folders]


def portable_recipe(text: str) -> str:
    """Return a bundled recipe's text as one that runs from any folder, named after its file."""
    lines = text.replace("../saplings/", f"{BUNDLED_PREFIX}saplings/").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("name:"))
