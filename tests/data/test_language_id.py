"""Language identification in every script, without code and formulas; "" if unsure."""

from __future__ import annotations

from pathlib import Path

import pytest

from persea.data.language_id import detect_language, is_same_language

SAID = {
    "en": "The weather is nice today and we are going out.",
    "vi": "Hôm nay trời đẹp và chúng tôi sẽ đi chơi.",
    "id": "Hari ini cuacanya cerah dan kami akan pergi.",
    "th": "วันนี้อากาศดีมาก",
    "zh": "今天天气很好",
    "ja": "今日は天気がいいです",
    "ko": "오늘은 날씨가 좋아요",
    "km": "ថ្ងៃនេះអាកាសធាតុល្អ",
    "lo": "ມື້ນີ້ອາກາດດີ",
    "my": "ဒီနေ့ရာသီဥတုကောင်းတယ်",
    "bn": "আজ আবহাওয়া ভালো",
    "it": "Oggi il tempo è bello e noi usciamo.",
    "ar": "الطقس جميل اليوم وسوف نخرج معا إلى الحديقة بعد الظهر",
}


@pytest.mark.parametrize("language", SAID)
def test_the_language_of_a_text(language: str):
    assert is_same_language(detect_language(SAID[language]), language)
    assert [
        other
        for other in SAID
        if other != language and is_same_language(detect_language(SAID[other]), language)
    ] == []
    coded = (
        SAID[language]
        + "\n```python\n"
        + "print('an English word in code')\n" * 9
        + "```\nhttps://example.org/an/english/address"
    )
    assert is_same_language(detect_language(coded), language)


@pytest.mark.parametrize(
    "text", ["", "123", "...", "```python\nx = 1\n```", "OK", "$x$", "\0\0", "😀😀"]
)
def test_texts_too_short_for_a_language(text: str):
    assert detect_language(text) == ""
    assert not is_same_language(detect_language(text), "en")


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("code", "language"),
    [
        ("eng", "en"),
        ("ind", "id"),
        ("msa", "ms"),
        ("vie", "vi"),
        ("tha", "th"),
        ("khm", "km"),
        ("lao", "lo"),
        ("mya", "my"),
        ("kor", "ko"),
        ("jpn", "ja"),
        ("zho-CN", "zh"),
        ("zho-TW", "zh"),
        ("fil", "tl"),
    ],
)
def test_languages_of_real_news(data: Path, code: str, language: str):
    some = (data / "parallel" / f"ntrex.{code}.txt").read_text(encoding="utf-8").splitlines()[:120]
    assert (
        sum(is_same_language(detect_language(line), language) for line in some) >= 117
    )  # 97.5 %; headlines of a name and a number are the rest
