"""One regular expression for thousands of names, such as Gemma's 6,242 unused control tokens.

A plain alternation of them takes a second to compile and is tried name by name. Names that begin
alike share their beginning here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import TypeAlias

_Tree: TypeAlias = dict[str, "_Tree"]  # next character -> the rest; "" = a name ends here
MAX_TREE_NAME_CHARS = 200  # each character is one level of the tree


def compile_names(names: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches the names, at each place the longest.

    Without a name it matches nothing.

    Example:
        >>> compile_names(["<a>", "<a>b", "<c>"]).findall("<a>b <a> <c> <d>")
        ['<a>b', '<a>', '<c>']
    """
    return _compile(tuple(names))


@lru_cache(maxsize=64)
def _compile(names: tuple[str, ...]) -> re.Pattern[str]:
    """Compile names; kept, because Gemma's take .2 s and each copy of a renderer needs them."""
    distinct = sorted({n for n in names if n}, key=len, reverse=True)
    if not distinct:
        return re.compile(r"(?!)")
    if len(distinct[0]) > MAX_TREE_NAME_CHARS:
        return re.compile("|".join(map(re.escape, distinct)))
    root: _Tree = {}
    for name in distinct:
        node = root
        for c in name:
            node = node.setdefault(c, {})
        node[""] = {}
    return re.compile(_spell(root))


def _spell(node: _Tree) -> str:
    """Return the expression of a tree; longer names come before those that they begin with."""
    by_rest: dict[str, list[str]] = {}
    for c, child in node.items():
        if c:
            by_rest.setdefault(_spell(child), []).append(re.escape(c))
    if not by_rest:
        return ""
    parts = [
        (chars[0] if len(chars) == 1 else f"[{''.join(chars)}]") + rest
        for rest, chars in by_rest.items()
    ]
    if "" in node:
        return f"(?:{'|'.join(parts)})?"
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"
