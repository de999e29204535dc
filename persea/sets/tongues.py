"""Which language a text is in: by its script where that settles it, else by py3langid."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache

NAMES = {"en": "English", "zh": "Chinese", "ja": "Japanese", "ko": "Korean", "vi": "Vietnamese", "id": "Indonesian", "ms": "Malay", "th": "Thai",
         "km": "Khmer", "lo": "Lao", "my": "Burmese", "tl": "Filipino", "jv": "Javanese", "bn": "Bengali", "ar": "Arabic", "sw": "Swahili",
         "it": "Italian", "de": "German", "fr": "French", "es": "Spanish", "ru": "Russian", "hi": "Hindi"}
ALIKE = ({"id", "ms", "jv"}, {"zh", "yue"}, {"tl", "fil"})  # py3langid and its peers cannot tell these apart in a sentence or two
SCRIPTS = {  # of one language each, near enough
           "THAI": "th", "KHMER": "km", "LAO": "lo", "MYANMAR": "my", "HANGUL": "ko", "HIRAGANA": "ja", "KATAKANA": "ja",
           "CJK": "zh", "BENGALI": "bn", "TAMIL": "ta", "TELUGU": "te", "GUJARATI": "gu", "KANNADA": "kn", "GURMUKHI": "pa"}
KANA = 0.05  # share of kana from which a text with Chinese characters is Japanese
FENCED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\$[^$\n]*\$|https?://\S+", re.DOTALL)  # code, formulas and addresses are in no language


@cache
def _script(character: str) -> str:
    name = unicodedata.name(character, "")
    return next((s for s in SCRIPTS if name.startswith(s)), name.partition(" ")[0])


def tongue(text: str) -> str:
    """The code of a text's language, such as "vi"; "" where it has too few letters to say.

    The script that most of its letters are in decides for th, km, lo, my, ko, ja, zh and scripts of India; the rest is py3langid's word.
    """
    text = FENCED.sub(" ", unicodedata.normalize("NFC", text))
    scripts = Counter(_script(c) for c in text if c.isalpha())
    letters = scripts.total()
    if not letters:
        return ""
    kana, han = scripts["HIRAGANA"] + scripts["KATAKANA"], scripts["CJK"]
    if kana + han > letters / 2:
        return "ja" if kana > KANA * (kana + han) else "zh"
    most, count = scripts.most_common(1)[0]
    if most in SCRIPTS:
        return SCRIPTS[most] if count > letters / 2 else ""
    if letters < 8:
        return ""  # a name or a number's unit
    from py3langid import classify

    return str(classify(text)[0])


def same(found: str, wanted: str) -> bool:
    """Whether a found language is the wanted one, as far as texts tell."""
    return found == wanted or any({found, wanted} <= alike for alike in ALIKE)
