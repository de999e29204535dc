"""Split documents into windows that fit every model's context.

Teacher and student see the same windows: the same bytes, each with the tokens that the model puts
around a text. The windows of a document are its bytes, each once and in order.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import numpy.typing as npt

from persea.errors import DataError
from persea.tokenization.vocabulary import Vocabulary

MIN_WINDOW_TOKENS = 4  # a character has at most four bytes, and a byte is at most one token
EVEN_SLACK = 1.05  # a window may be so much longer than an even share of what is left
SENTENCE_ENDS = "。！？」』។။"  # of scripts without spaces
JOINERS = ("\u200d",)


@dataclass(frozen=True)
class TokenLimit:
    """How much text a model takes at once.

    Attributes:
        vocabulary: The model's tokenizer.
        max_tokens: Most tokens of a window, without those around it.
    """

    vocabulary: Vocabulary
    max_tokens: int


@dataclass(frozen=True)
class _TokenEnds:
    """Where each token of a document ends, in bytes; the limit that belongs to it."""

    ends_T: npt.NDArray[np.int64]
    max_tokens: int

    def furthest_byte(self, begin: int) -> int:
        """Return the last byte that a window from `begin` may reach.

        What is left is divided evenly, so that the last window is not a short one.
        """
        done = int(np.searchsorted(self.ends_T, begin, side="right"))
        left = len(self.ends_T) - done
        even = ceil(EVEN_SLACK * left / ceil(left / self.max_tokens)) if left else 0
        last = min(done + min(even, self.max_tokens), len(self.ends_T))
        return int(self.ends_T[last - 1]) if last else begin


def split_document(text: str, limits: Sequence[TokenLimit]) -> list[str]:
    r"""Split a document into windows.

    A window ends after a line break where there is one in its second half, else before a space,
    else after a full stop of a script without spaces, else between two characters.

    Args:
        text: The document, in NFC.
        limits: The tokenizers that must take every window, with their limits of at least
            MIN_WINDOW_TOKENS.

    Returns:
        The windows; joined they are the text.

    Example:
        >>> import persea
        >>> from persea.data.windows import TokenLimit, split_document
        >>> limit = TokenLimit(persea.load_renderer("saplings/qwen-sapling").vocabulary, 8)
        >>> windows = split_document("One line.\nAnother line of text.", [limit])
        >>> "".join(windows) == "One line.\nAnother line of text.", len(windows) > 1
        (True, True)
    """
    if any(limit.max_tokens < MIN_WINDOW_TOKENS for limit in limits):
        raise ValueError(f"a window of less than {MIN_WINDOW_TOKENS} tokens")
    num_bytes = len(text.encode(errors="replace"))
    if all(num_bytes <= limit.max_tokens for limit in limits):
        return [text]
    token_ends = [_find_token_ends(text, limit) for limit in limits]
    if all(len(one.ends_T) <= one.max_tokens for one in token_ends):
        return [text]
    byte_of_char = _byte_offsets(text)
    windows: list[str] = []
    begin = 0
    while begin < len(text):
        furthest = min(one.furthest_byte(int(byte_of_char[begin])) for one in token_ends)
        end = int(np.searchsorted(byte_of_char, furthest, side="right")) - 1
        cut = _best_cut(text, begin, max(end, begin + 1))
        # a text cut out of another can have more tokens than it had inside
        while not _fits(text[begin:cut], limits):
            cut = _best_cut(text, begin, begin + max(1, (cut - begin) * 7 // 8))
        windows.append(text[begin:cut])
        begin = cut
    return windows


def _find_token_ends(text: str, limit: TokenLimit) -> _TokenEnds:
    """Encode a document; a text that the tokenizer does not reproduce has a token a byte."""
    try:
        ids = np.asarray(limit.vocabulary.encode(text), np.int64)
    except DataError:
        return _TokenEnds(
            np.arange(1, len(text.encode(errors="replace")) + 1, dtype=np.int64), limit.max_tokens
        )
    return _TokenEnds(np.cumsum(limit.vocabulary.lengths_W[ids], dtype=np.int64), limit.max_tokens)


def _byte_offsets(text: str) -> npt.NDArray[np.int64]:
    """Return the first byte of each character, and the number of all bytes."""
    code_points = np.frombuffer(text.encode("utf-32-le", errors="replace"), np.uint32)
    sizes = 1 + sum((code_points >= least).astype(np.int64) for least in (0x80, 0x800, 0x10000))
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _fits(window: str, limits: Sequence[TokenLimit]) -> bool:
    num_bytes = len(window.encode(errors="replace"))
    return all(
        num_bytes <= limit.max_tokens
        or len(_find_token_ends(window, limit).ends_T) <= limit.max_tokens
        for limit in limits
    )


def _best_cut(text: str, begin: int, end: int) -> int:
    """Return the character after the window's last: more than `begin`, at most `end`."""
    if end >= len(text) or end - begin < 2:
        return end
    middle = begin + (end - begin) // 2
    if (line_break := text.rfind("\n", middle, end)) >= 0:
        return line_break + 1
    if (space := text.rfind(" ", middle, end + 1)) > begin:
        return space
    if (stop := max(text.rfind(mark, middle, end) for mark in SENTENCE_ENDS)) >= 0:
        return stop + 1
    cut = end
    while cut > middle + 1 and (unicodedata.category(text[cut])[0] == "M" or text[cut] in JOINERS):
        cut -= 1
    return cut
