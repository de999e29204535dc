"""Numbers and lists as short texts, for the page, the model card and the report's sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

NBSP, NARROW_NBSP = "\u00a0", "\u202f"  # keep a number and its unit on one line
COUNT_WORDS = "no one two three four five six seven eight nine ten eleven twelve".split()


def format_percent(share: float) -> str:
    r"""Return whole percents. Rounding never hides a loss: "100 %" means 1 or more, "0 %" means 0.

    Example:
        >>> format_percent(0.997).replace("\u00a0", " ")
        '>99 %'
    """
    if share < 0:
        return f"\u2212{format_percent(-share)}"
    if 0 < share < 0.005:
        return f"<1{NBSP}%"
    if 0.995 <= share < 1:
        return f">99{NBSP}%"
    return f"{100 * share:.0f}{NBSP}%"


def format_points(share: float) -> str:
    """Return a score out of 100, with one decimal."""
    return f"{100 * share:.1f}"


def format_signed(difference: float) -> str:
    """Return a difference of scores out of 100, with one decimal and its sign (a true minus)."""
    rounded = round(100 * difference, 1) or 0.0  # no negative zero
    return f"{rounded:+.1f}".replace("-", "\u2212")


def format_count(n: float) -> str:
    """Return a whole number with thousands separators."""
    return f"{n:,.0f}".replace(",", NARROW_NBSP)


def format_bytes(num_bytes: float) -> str:
    """Return a size in B, kB, MB, GB or TB (powers of 1000)."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f}{NBSP}B"
    power = next(
        k for k in (1, 2, 3, 4) if num_bytes < 999.95 * 1000**k or k == 4
    )  # 999.95 kB is 1.0 MB
    return f"{num_bytes / 1000**power:.1f}{NBSP}{('kB', 'MB', 'GB', 'TB')[power - 1]}"


def format_duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours."""
    if seconds < 59.95:
        return f"{seconds:.1f}{NBSP}s"
    if seconds < 3599.5:
        return "{} min {:02d} s".format(*divmod(round(seconds), 60)).replace(" ", NBSP)
    return "{} h {:02d} min".format(*divmod(round(seconds / 60), 60)).replace(" ", NBSP)


def spell_count(n: int) -> str:
    """Return a count as a word up to twelve, else in digits."""
    return COUNT_WORDS[n] if n < len(COUNT_WORDS) else format_count(n)


def join_list(parts: Sequence[str], conjunction: str = "and") -> str:
    """Join parts as "a, b and c"; the empty text for no part."""
    return (
        f" {conjunction} ".join([", ".join(parts[:-1]), parts[-1]])
        if len(parts) > 1
        else "".join(parts)
    )


def markdown_cell(text: object) -> str:
    """Return a text for a cell of a Markdown table: one line, its markup escaped."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(str(text).split()))


def model_label(model: object) -> str:
    """Return a model's name for the card; of a local folder the last name only, because cards are
    published.
    """
    return markdown_cell(Path(str(model)).name if str(model).startswith((".", "/", "~")) else model)
