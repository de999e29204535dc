"""Which language a text is in: by its script where that settles it, else by py3langid where it is sure."""

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
CONFUSABLE_LANGUAGES = (
    {"id", "ms", "jv"},
    {"zh", "yue"},
    {"tl", "fil"},
)  # py3langid and its peers cannot tell these apart in a sentence or two
LANGUAGE_OF_SCRIPT = {  # of one language each, near enough
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
MIN_KANA_SHARE = 0.05  # share of kana from which a text with Chinese characters is Japanese
MIN_LETTERS = 12  # fewer (a third of it where a letter says more) say nothing of a language, nor do texts that are letters by less than a third
MIN_LANGID_PROB = 0.4  # py3langid's probability: it gives random letters and bare sums at most 0.02, a sentence of six words 0.45 and more
NO_LANGUAGE_CODE = "zxx"  # what py3langid says of texts in none
NON_PROSE_PATTERN = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$[^$\n]*\$|https?://\S+", re.DOTALL
)  # code, formulas and addresses are in no language


@cache
def _language_of_character(character: str) -> str:
    return LANGUAGE_OF_SCRIPT.get(
        re.split("[ -]", unicodedata.name(character, ""), maxsplit=1)[0], ""
    )


@cache
def _langid_classifier() -> Callable[[str], tuple[str, float]]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    classify: Callable[[str], tuple[str, float]] = LanguageIdentifier.from_model_file(
        MODEL_FILE, norm_probs=True
    ).classify
    return classify


def detect_language(text: str) -> str:
    """The code of a text's language, such as "vi"; "" where it has too few letters to say, is letters by less than a third, or py3langid is not sure.

    The script that most of its letters are in decides for th, km, lo, my, ko, ja, zh and scripts of India; the rest is py3langid's word.
    """
    text = NON_PROSE_PATTERN.sub(" ", unicodedata.normalize("NFC", text))
    letters = [c for c in text if unicodedata.category(c)[0] in "LM"]
    fewest = MIN_LETTERS if letters and ord(max(letters)) < 0x0E00 else MIN_LETTERS // 3
    if len(letters) < fewest or 3 * len(letters) < sum(not c.isspace() for c in text):
        return ""
    scripts = Counter(map(_language_of_character, letters))
    if scripts["ja"] + scripts["zh"] > len(letters) / 2:
        return "ja" if scripts["ja"] > MIN_KANA_SHARE * (scripts["ja"] + scripts["zh"]) else "zh"
    found, count = scripts.most_common(1)[0]
    if found and count > len(letters) / 2:
        return found
    language, sure = _langid_classifier()(
        "".join(c if unicodedata.category(c)[0] in "LM" else " " for c in text)
    )
    return str(language) if sure >= MIN_LANGID_PROB and language != NO_LANGUAGE_CODE else ""


def is_same_language(found: str, wanted: str) -> bool:
    """Whether a found language is the wanted one, as far as texts tell."""
    return found == wanted or any({found, wanted} <= alike for alike in CONFUSABLE_LANGUAGES)
