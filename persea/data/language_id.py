"""Which language a text is in: by its script where that settles it, else by py3langid where it is sure."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache

NAMES = {"en": "English", "zh": "Chinese", "ja": "Japanese", "ko": "Korean", "vi": "Vietnamese", "id": "Indonesian", "ms": "Malay", "th": "Thai",
         "km": "Khmer", "lo": "Lao", "my": "Burmese", "tl": "Filipino", "jv": "Javanese", "bn": "Bengali", "ar": "Arabic", "sw": "Swahili",
         "it": "Italian", "de": "German", "fr": "French", "es": "Spanish", "ru": "Russian", "hi": "Hindi"}
ALIKE = ({"id", "ms", "jv"}, {"zh", "yue"}, {"tl", "fil"})  # py3langid and its peers cannot tell these apart in a sentence or two
SCRIPTS = {  # of one language each, near enough
    "THAI": "th", "KHMER": "km", "LAO": "lo", "MYANMAR": "my", "HANGUL": "ko", "HIRAGANA": "ja", "KATAKANA": "ja", "CJK": "zh", "BENGALI": "bn",
    "TAMIL": "ta", "TELUGU": "te", "GUJARATI": "gu", "KANNADA": "kn", "GURMUKHI": "pa"}
KANA = 0.05  # share of kana from which a text with Chinese characters is Japanese
LETTERS = 12  # fewer (a third of it where a letter says more) say nothing of a language, nor do texts that are letters by less than a third
SURE = 0.4  # py3langid's probability: it gives random letters and bare sums at most 0.02, a sentence of six words 0.45 and more
NO_LANGUAGE = "zxx"  # what py3langid says of texts in none
FENCED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\$[^$\n]*\$|https?://\S+", re.DOTALL)  # code, formulas and addresses are in no language


@cache
def _script(character: str) -> str:
    return SCRIPTS.get(re.split("[ -]", unicodedata.name(character, ""), maxsplit=1)[0], "")


@cache
def _identifier() -> Callable[[str], tuple[str, float]]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    classify: Callable[[str], tuple[str, float]] = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True).classify
    return classify


def tongue(text: str) -> str:
    """The code of a text's language, such as "vi"; "" where it has too few letters to say, is letters by less than a third, or py3langid is not sure.

    The script that most of its letters are in decides for th, km, lo, my, ko, ja, zh and scripts of India; the rest is py3langid's word.
    """
    text = FENCED.sub(" ", unicodedata.normalize("NFC", text))
    letters = [c for c in text if unicodedata.category(c)[0] in "LM"]
    fewest = LETTERS if letters and ord(max(letters)) < 0x0E00 else LETTERS // 3
    if len(letters) < fewest or 3 * len(letters) < sum(not c.isspace() for c in text):
        return ""
    scripts = Counter(map(_script, letters))
    if scripts["ja"] + scripts["zh"] > len(letters) / 2:
        return "ja" if scripts["ja"] > KANA * (scripts["ja"] + scripts["zh"]) else "zh"
    found, count = scripts.most_common(1)[0]
    if found and count > len(letters) / 2:
        return found
    language, sure = _identifier()("".join(c if unicodedata.category(c)[0] in "LM" else " " for c in text))
    return str(language) if sure >= SURE and language != NO_LANGUAGE else ""


def same(found: str, wanted: str) -> bool:
    """Whether a found language is the wanted one, as far as texts tell."""
    return found == wanted or any({found, wanted} <= alike for alike in ALIKE)
