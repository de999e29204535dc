"""Numbers as people write them: 1,234.5 and 1.234,5, Thai and full-width digits, 3/4, 7万; each reading a text allows, exactly."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

COMMA_DECIMAL_LANGUAGES = frozenset(
    "vi id de es fr it pt ru nl tr pl".split()
)  # languages whose decimal sign is the comma; ms, jv follow Indonesia or Britain
EAST_ASIAN_UNIT_POWERS = {
    "万": 4,
    "萬": 4,
    "만": 4,
    "亿": 8,
    "億": 8,
    "억": 8,
}  # ten thousand, hundred million
MAX_NUMBER_CHARS = 400  # of a number; one with more is a model that cannot stop
WRITTEN_NUMBER = re.compile(
    r"(?<![0-9A-Za-z.,])[-+−–]?\s?(?:[$€£¥฿₫₩]|US\$|Rp\.?\s?)?\s?\d[\d.,  ']*+(?![eE][-+]?\d|[xX]\d)"
    r"(?:\s?[万萬만亿億억])?(?:\s?/\s?\d+)?"
)


SUPERSCRIPT_DIGITS = re.compile("([⁰¹²³⁴-⁹]+)")


def normalize_digits(text: str) -> str:
    """Every script's digits as 0-9, ½ as 1/2, ² as ^2."""
    plain = unicodedata.normalize("NFKC", SUPERSCRIPT_DIGITS.sub(r"^\1", text)).replace(
        "\N{FRACTION SLASH}", "/"
    )
    return "".join(
        str(unicodedata.digit(c)) if c.isdecimal() and not c.isascii() else c for c in plain
    )


def find_numbers(text: str) -> list[str]:
    """The numbers that stand in a text, as they are written, in order."""
    return [
        m.group().strip().rstrip(".,'") for m in WRITTEN_NUMBER.finditer(normalize_digits(text))
    ]


def possible_values(number_text: str, language: str) -> frozenset[Fraction]:
    """Every value that a written number can have in a language: 1.234 in Vietnamese is 1234, or 1.234 where the English way is meant,
    for people and models write both.

    Empty for what is no number: nan, inf, 1.2.3, 12,34,5.
    """
    text = normalize_digits(number_text).strip().rstrip("%.,。").strip()
    text = (
        re.sub(r"^([-+−–]?)\s?(?:[$€£¥฿₫₩]|US\$|Rp\.?\s?)\s?", r"\1", text)
        .replace("−", "-")
        .replace("–", "-")
    )
    if len(text) > MAX_NUMBER_CHARS:
        return frozenset()
    if over := re.fullmatch(r"(.+?)\s?/\s?(\d+)", text):
        below = int(over[2])
        return (
            frozenset(v / below for v in possible_values(over[1], language))
            if below
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
    values = set[Fraction]()
    for thousands, decimal in ((",", "."), (".", ",")):
        whole, mark, part = text.partition(decimal)
        groups = whole.split(thousands)
        if not (
            all(g.isascii() and g.isdecimal() for g in groups)
            and (not mark or (part.isascii() and part.isdecimal()))
        ):
            continue
        if len(groups) > 1 and not (
            1 <= len(groups[0]) <= 3 and all(len(g) == 3 for g in groups[1:])
        ):
            continue
        # 12,5 and 1.234.567 are read the continental way where that is the language's own, or where both signs leave no other way
        if (
            decimal == ","
            and language not in COMMA_DECIMAL_LANGUAGES
            and not (len(groups) > 1 and (mark or len(groups) > 2))
        ):
            continue
        values.add(Fraction(f"{''.join(groups)}.{part}" if part else "".join(groups)))
    return values
