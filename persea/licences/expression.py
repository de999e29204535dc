"""Read licence expressions such as "Apache-2.0 AND (MIT OR Gemma)"."""

from __future__ import annotations

from itertools import product
from typing import Any

from license_expression import ExpressionError, Licensing

from persea.licences.table import find_licence

MAX_ALTERNATIVES = 64
MAX_CHARS = 1000


def licence_alternatives(text: str) -> tuple[tuple[str, ...], ...]:
    """Return the alternatives of a licence expression; all licences of one hold at once.

    A list ("mit, apache-2.0") holds as a whole. A text that is neither a known name nor an
    expression is one name.

    Example:
        >>> licence_alternatives("MIT OR (Apache-2.0 AND Gemma)")
        (('MIT',), ('Apache-2.0', 'Gemma'))
    """
    text = text.strip()
    if not text or len(text) > MAX_CHARS or find_licence(text) is not None:
        return ((text,),)
    slug = text.split("-and-")  # how a card writes an expression
    if len(slug) > 1 and all(map(find_licence, slug)):
        return (tuple(slug),)
    if "," in text:
        return _combine([licence_alternatives(part) for part in text.split(",") if part.strip()])
    try:
        parsed = Licensing().parse(text, simple=True)
    except (ExpressionError, RecursionError):
        return ((text,),)
    return _alternatives(parsed) or ((text,),)


def _alternatives(node: Any) -> tuple[tuple[str, ...], ...]:
    if not getattr(node, "args", ()):
        # of "X WITH exception" the licence counts: an exception only adds permissions
        return ((getattr(node, "license_symbol", node).key,),)
    parts = [_alternatives(arg) for arg in node.args]
    if type(node).__name__ == "OR":
        return tuple(alternative for part in parts for alternative in part)
    return _combine(parts)


def _combine(parts: list[tuple[tuple[str, ...], ...]]) -> tuple[tuple[str, ...], ...]:
    count = 1
    for part in parts:
        count *= len(part)
    if count > MAX_ALTERNATIVES:  # no licence reads so; every licence in it holds
        return (tuple(dict.fromkeys(n for part in parts for alt in part for n in alt)),)
    return tuple(
        tuple(dict.fromkeys(name for alternative in chosen for name in alternative))
        for chosen in product(*parts)
    )
