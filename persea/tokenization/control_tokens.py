"""Find control tokens in a text as the `tokenizers` library does, with the flags of each token.

A token may swallow the white space beside it (`lstrip`, `rstrip`: Phi-3's `<|user|>`), or count
only where no letter touches it (`single_word`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tokenizers import AddedToken

# Unicode's White_Space, the `\\s` of the tokenizers library.
WHITESPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
    + "".join(map(chr, range(0x2000, 0x200B)))
)  # fmt: skip


@dataclass(frozen=True)
class ControlFlags:
    """Flags of a control token.

    Attributes:
        lstrip: The white space before the token belongs to it.
        rstrip: The white space after it belongs to it.
        single_word: The token counts only where no letter, digit or underscore touches it.
    """

    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class ControlMatch:
    """A control token in a text.

    Attributes:
        name: The token.
        begin: First character of the token.
        swallowed_from: First character that belongs to it; before `begin` under `lstrip`.
        swallowed_to: One past the last character that belongs to it.
    """

    name: str
    begin: int
    swallowed_from: int
    swallowed_to: int


def read_control_flags(
    added: Iterable[AddedToken], control: Iterable[str]
) -> dict[str, ControlFlags]:
    """Return the flags of those control tokens that have any."""
    names = set(control)
    flags = {t.content: ControlFlags(t.lstrip, t.rstrip, t.single_word) for t in added}
    return {n: f for n, f in flags.items() if n in names and f != ControlFlags()}


def resolve_matches(
    text: str, found: Iterable[re.Match[str]], flags: Mapping[str, ControlFlags]
) -> list[ControlMatch]:
    """Return the control tokens of a text and the white space that they swallow.

    Args:
        text: The whole text.
        found: Occurrences of control tokens in it, in order.
        flags: Flags of the tokens that have any.
    """
    matches: list[ControlMatch] = []
    taken = 0
    for match in found:
        name, (begin, end) = match.group(), match.span()
        flag = flags.get(name, ControlFlags())
        touching = text[max(0, begin - 1) : begin] + text[end : end + 1]
        if flag.single_word and re.search(r"\w", touching):
            continue
        first = begin
        if flag.lstrip:
            first = max(taken, len(text[:begin].rstrip(WHITESPACE)))
        if flag.rstrip:
            end = len(text) - len(text[end:].lstrip(WHITESPACE))
        matches.append(ControlMatch(name, begin, first, end))
        taken = end
    return matches
