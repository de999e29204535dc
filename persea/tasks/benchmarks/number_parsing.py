"""Exact values of numbers in text: 1,234.5 and 1.234,5, Thai and full-width digits, 3/4, 7万.

A written number can have several values; all of them are returned.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

# Languages whose decimal sign is the comma. ms and jv follow Indonesian or British usage and are
# not listed.
COMMA_DECIMAL_LANGUAGES = frozenset("vi id de es fr it pt ru nl tr pl".split())
# Powers of ten: ten thousand and a hundred million.
EAST_ASIAN_UNIT_POWERS = {"万": 4, "萬": 4, "만": 4, "亿": 8, "億": 8, "억": 8}
MAX_NUMBER_CHARS = 400  # a longer number comes from a model that cannot stop
WRITTEN_NUMBER = re.compile(
    r"(?<![0-9A-Za-z.,])[-+−–]?\s?(?:[$€£¥฿₫₩]|US\$|Rp\.?\s?)?"
    r"\s?\d[\d.,  ']*+(?![eE][-+]?\d|[xX]\d)"
    r"(?:\s?[万萬만亿億억])?(?:\s?/\s?\d+)?"
)
SUPERSCRIPT_DIGITS = re.compile("([⁰¹²³⁴-⁹]+)")


def normalize_digits(text: str) -> str:
    """Write the digits of every script as 0-9, ½ as 1/2 and ² as ^2."""
    plain = unicodedata.normalize("NFKC", SUPERSCRIPT_DIGITS.sub(r"^\1", text)).replace(
        "\N{FRACTION SLASH}", "/"
    )
    return "".join(
        str(unicodedata.digit(c)) if c.isdecimal() and not c.isascii() else c for c in plain
    )


def find_numbers(text: str) -> list[str]:
    """Return the numbers in a text, as written, in order."""
    return [
        m.group().strip().rstrip(".,'") for m in WRITTEN_NUMBER.finditer(normalize_digits(text))
    ]


def possible_values(number_text: str, language: str) -> frozenset[Fraction]:
    """Return every value that a written number can have in a language.

    In Vietnamese 1.234 is 1234, or 1.234 if the writer follows English usage; people and models
    write both.

    Args:
        number_text: The number as written.
        language: Language of the text around it.

    Returns:
        The values; empty for a text that is no number, such as nan, inf, 1.2.3 or 12,34,5.

    Example:
        >>> sorted(possible_values("1.234", "vi"))
        [Fraction(617, 500), Fraction(1234, 1)]
    """
    text = normalize_digits(number_text).strip().rstrip("%.,。").strip()
    text = (
        re.sub(r"^([-+−–]?)\s?(?:[$€£¥฿₫₩]|US\$|Rp\.?\s?)\s?", r"\1", text)
        .replace("−", "-")
        .replace("–", "-")
    )
    if len(text) > MAX_NUMBER_CHARS:
        return frozenset()
    if fraction := re.fullmatch(r"(.+?)\s?/\s?(\d+)", text):
        denominator = int(fraction[2])
        return (
            frozenset(v / denominator for v in possible_values(fraction[1], language))
            if denominator
            else frozenset()
        )
    power = 0
    if text and text[-1] in EAST_ASIAN_UNIT_POWERS:
        power, text = EAST_ASIAN_UNIT_POWERS[text[-1]], text[:-1].strip()
    sign, text = (-1 if text.startswith("-") else 1), text.lstrip("+-").strip()
    return frozenset(
        sign * v * 10**power
        for v in _parse_separators(re.sub(r"(?<=\d)[\s  '](?=\d{3}(?!\d))", "", text), language)
    )


def _parse_separators(text: str, language: str) -> set[Fraction]:
    """Return the values of digits with thousands separators and a decimal sign, both ways round."""
    values = set[Fraction]()
    for thousands, decimal in ((",", "."), (".", ",")):
        whole, mark, decimals = text.partition(decimal)
        groups = whole.split(thousands)
        if not (
            all(g.isascii() and g.isdecimal() for g in groups)
            and (not mark or (decimals.isascii() and decimals.isdecimal()))
        ):
            continue
        if len(groups) > 1 and not (
            1 <= len(groups[0]) <= 3 and all(len(g) == 3 for g in groups[1:])
        ):
            continue
        # 12,5 and 1.234.567 have a decimal comma if the language uses one, or if the two signs
        # allow nothing else.
        if (
            decimal == ","
            and language not in COMMA_DECIMAL_LANGUAGES
            and not (len(groups) > 1 and (mark or len(groups) > 2))
        ):
            continue
        values.add(Fraction(f"{''.join(groups)}.{decimals}" if decimals else "".join(groups)))
    return values
