"""Identify the language of a text by its script, or by py3langid where it is sure."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache

LANGUAGE_NAMES = {
    "en": "English",
    "zh": "Chinese",
    "ja": "Japanese",
    "ko": "Korean",
    "vi": "Vietnamese",
    "id": "Indonesian",
    "ms": "Malay",
    "th": "Thai",
    "km": "Khmer",
    "lo": "Lao",
    "my": "Burmese",
    "tl": "Filipino",
    "jv": "Javanese",
    "bn": "Bengali",
    "ar": "Arabic",
    "sw": "Swahili",
    "it": "Italian",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "ru": "Russian",
    "hi": "Hindi",
}
# language identifiers such as py3langid confuse these in texts of one or two sentences
CONFUSABLE_LANGUAGES = ({"id", "ms", "jv"}, {"zh", "yue"}, {"tl", "fil"})
LANGUAGE_OF_SCRIPT = {  # scripts that are used by one language almost alone
    "THAI": "th",
    "KHMER": "km",
    "LAO": "lo",
    "MYANMAR": "my",
    "HANGUL": "ko",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "CJK": "zh",
    "BENGALI": "bn",
    "TAMIL": "ta",
    "TELUGU": "te",
    "GUJARATI": "gu",
    "KANNADA": "kn",
    "GURMUKHI": "pa",
}
# Thresholds of `detect_language`. Language scores depend on them.
MIN_KANA_SHARE = 0.05  # share of kana from which text with Chinese characters is Japanese
MIN_LETTERS = 12  # below it a text is too short to identify, in scripts before Thai (U+0E00)
MIN_LETTERS_DENSE = MIN_LETTERS // 3  # in later scripts, where a letter carries more information
MIN_LETTER_SHARE = 1 / 3  # of the characters: formulas and tables are in no language
MIN_SCRIPT_SHARE = 1 / 2  # of the letters, more than which decide by their script
# py3langid's probability: random letters and bare sums get at most 0.02, a sentence of six words
# 0.45 and more
MIN_LANGID_PROB = 0.4
NO_LANGUAGE_CODE = "zxx"  # py3langid's code for text without a language
# code, formulas and addresses are in no language
NON_PROSE_PATTERN = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\$[^$\n]*\$|https?://\S+", re.DOTALL)


@cache
def _language_of_character(character: str) -> str:
    script = re.split("[ -]", unicodedata.name(character, ""), maxsplit=1)[0]
    return LANGUAGE_OF_SCRIPT.get(script, "")


@cache
def _langid_classifier() -> Callable[[str], tuple[str, float]]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    classify: Callable[[str], tuple[str, float]] = LanguageIdentifier.from_model_file(
        MODEL_FILE, norm_probs=True
    ).classify
    return classify


def detect_language(text: str) -> str:
    """Return the language code of a text, such as "vi".

    The script of most letters decides for th, km, lo, my, ko, ja, zh and the scripts of India;
    py3langid (Lui and Baldwin 2012, langid.py) decides the rest.

    Args:
        text: Any text. Code, formulas and addresses in it are ignored.

    Returns:
        The code; "" if the text has fewer than `MIN_LETTERS` letters (`MIN_LETTERS_DENSE` with a
        letter from U+0E00 on), is less than a third letters, or py3langid is not sure.

    Example:
        >>> detect_language("สวัสดีครับ"), detect_language("1 + 1 = 2")
        ('th', '')
    """
    text = NON_PROSE_PATTERN.sub(" ", unicodedata.normalize("NFC", text))
    letters = [c for c in text if unicodedata.category(c)[0] in "LM"]
    fewest = MIN_LETTERS if letters and ord(max(letters)) < 0x0E00 else MIN_LETTERS_DENSE
    visible = sum(not c.isspace() for c in text)
    if len(letters) < fewest or len(letters) < MIN_LETTER_SHARE * visible:
        return ""
    scripts = Counter(map(_language_of_character, letters))
    if scripts["ja"] + scripts["zh"] > MIN_SCRIPT_SHARE * len(letters):
        return "ja" if scripts["ja"] > MIN_KANA_SHARE * (scripts["ja"] + scripts["zh"]) else "zh"
    found, count = scripts.most_common(1)[0]
    if found and count > MIN_SCRIPT_SHARE * len(letters):
        return found
    prose = "".join(c if unicodedata.category(c)[0] in "LM" else " " for c in text)
    language, probability = _langid_classifier()(prose)
    is_sure = probability >= MIN_LANGID_PROB and language != NO_LANGUAGE_CODE
    return str(language) if is_sure else ""


def is_same_language(found: str, wanted: str) -> bool:
    """Return whether two codes are equal, or confusable in short texts.

    Args:
        found: Code from `detect_language`.
        wanted: Code of the expected language.
    """
    return found == wanted or any({found, wanted} <= group for group in CONFUSABLE_LANGUAGES)
