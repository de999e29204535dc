"""Griffe extension: read a docstring's section `Example:` as `Examples:`, so doctests are code."""

from __future__ import annotations

import re
from typing import Any

import griffe


class PluralExamples(griffe.Extension):
    """Rename the section in every docstring that is collected."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.M)
