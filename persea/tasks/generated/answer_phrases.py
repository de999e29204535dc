"""Phrasing of answers in seven languages.

An optional lead-in, one of several answer forms, an optional closing.

The pretraining text of the saplings draws phrases at random, so that teachers have real entropy;
graders strip the phrases again. The tables and shares are part of that text and must not change.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

LEAD_INS: Mapping[str, Sequence[str]] = {
    "en": ("Sure. ", "Okay. ", "Of course. ", "Gladly. "),
    "zh": ("好的。", "当然。", "没问题。", "可以。"),
    "ja": ("はい。", "もちろん。", "わかりました。", "ええ。"),
    "ko": ("네. ", "물론. ", "좋아요. ", "그럼요. "),
    "vi": ("Vâng. ", "Được. ", "Tất nhiên. ", "Rồi. "),
    "id": ("Baik. ", "Tentu. ", "Boleh. ", "Siap. "),
    "th": ("ได้ ", "แน่นอน ", "ยินดี ", "โอเค "),
}
ANSWER_FORMS: Mapping[str, Sequence[str]] = {
    "en": ("{}", "{}.", "It is {}.", "That is {}.", "One says {}."),
    "zh": ("{}", "{}。", "是{}。", "就是{}。", "说{}。"),
    "ja": ("{}", "{}。", "{}です。", "{}ですね。", "{}といいます。"),
    "ko": ("{}", "{}.", "{}입니다.", "{}예요.", "답은 {}."),
    "vi": ("{}", "{}.", "Là {}.", "Đó là {}.", "Nói {}."),
    "id": ("{}", "{}.", "Yaitu {}.", "Itu {}.", "Artinya {}."),
    "th": ("{}", "คือ {}", "{} ครับ", "{} ค่ะ", "พูดว่า {}"),
}
CLOSINGS: Mapping[str, Sequence[str]] = {
    "en": (" Anything else?", " Good luck!", " Cheers."),
    "zh": ("还有吗？", "加油！", "不客气。"),
    "ja": ("ほかには？", "がんばって！", "どうぞ。"),
    "ko": (" 또 있나요?", " 힘내요!", " 천만에요."),
    "vi": (" Còn gì nữa?", " Chúc may mắn!", " Không có gì."),
    "id": (" Ada lagi?", " Semoga berhasil!", " Sama-sama."),
    "th": (" มีอีกไหม", " โชคดี", " ไม่เป็นไร"),
}
# Shares of answers without a lead-in and without a closing: the most likely answer stays short.
NO_LEAD_IN_SHARE, NO_CLOSING_SHARE = 0.6, 0.75


def phrase_answer(answer: str, language: str, rng: random.Random, forms: Sequence[str] = ()) -> str:
    """Return an answer in a random phrasing.

    Args:
        answer: The bare answer.
        language: Language of the phrases.
        rng: Source of the random choices.
        forms: Answer forms with one `{}`; those of the language by default.

    Returns:
        Lead-in, answer form and closing, NFC.
    """
    lead = "" if rng.random() < NO_LEAD_IN_SHARE else rng.choice(LEAD_INS[language])
    closing = "" if rng.random() < NO_CLOSING_SHARE else rng.choice(CLOSINGS[language])
    return unicodedata.normalize(
        "NFC", lead + rng.choice(forms or ANSWER_FORMS[language]).format(answer) + closing
    )


def strip_lead_in_and_closing(text: str, language: str) -> str:
    """Strip a known lead-in and a known closing from a text; NFC and trimmed."""
    text = unicodedata.normalize("NFC", text.strip())
    for lead in map(str.strip, LEAD_INS[language]):
        if text.startswith(unicodedata.normalize("NFC", lead)) and len(text) > len(lead):
            text = text[len(unicodedata.normalize("NFC", lead)) :].lstrip()
            break
    for closing in map(str.strip, CLOSINGS[language]):
        if text.endswith(unicodedata.normalize("NFC", closing)) and len(text) > len(closing):
            text = text[: -len(unicodedata.normalize("NFC", closing))].rstrip()
            break
    return text


def answer_candidates(text: str, language: str, forms: Sequence[str] = ()) -> Iterator[str]:
    """Yield every bare answer that the text can be a phrasing of.

    Example:
        >>> list(answer_candidates("It is 12.", "en"))
        ['It is 12.', 'It is 12', '12']
    """
    bare = strip_lead_in_and_closing(text, language)
    for form in forms or ANSWER_FORMS[language]:
        before, _, behind = unicodedata.normalize("NFC", form).partition("{}")
        found = re.fullmatch(re.escape(before) + "(.+)" + re.escape(behind), bare, re.DOTALL)
        if found:
            yield found[1]
