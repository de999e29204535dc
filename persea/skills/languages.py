"""Languages: English <-> zh, ja, ko, vi, id, th; numbers in words (0-999) and dates. Graded by exact match.

About 42,000 questions: 1,000 numbers and 2,562 dates, six languages, both ways.
"""

from __future__ import annotations

import random
import unicodedata

from persea.chat import Conversation, Message
from persea.corpus import Prompt
from persea.measure import Item, Skill, Split, Verdict, draw

NAMES = {"zh": "Chinese", "ja": "Japanese", "ko": "Korean", "vi": "Vietnamese", "id": "Indonesian", "th": "Thai"}

EN_ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
           "eighteen nineteen").split()
EN_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
ZH = "零一二三四五六七八九"
KO = "영일이삼사오육칠팔구"
VI = "không một hai ba bốn năm sáu bảy tám chín".split()
ID = "nol satu dua tiga empat lima enam tujuh delapan sembilan".split()
TH = "ศูนย์ หนึ่ง สอง สาม สี่ ห้า หก เจ็ด แปด เก้า".split()

EN_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
EN_MONTHS = "January February March April May June July August September October November December".split()
ID_DAYS = "Senin Selasa Rabu Kamis Jumat Sabtu Minggu".split()
ID_MONTHS = "Januari Februari Maret April Mei Juni Juli Agustus September Oktober November Desember".split()
TH_DAYS = "จันทร์ อังคาร พุธ พฤหัสบดี ศุกร์ เสาร์ อาทิตย์".split()
TH_MONTHS = "มกราคม กุมภาพันธ์ มีนาคม เมษายน พฤษภาคม มิถุนายน กรกฎาคม สิงหาคม กันยายน ตุลาคม พฤศจิกายน ธันวาคม".split()
VI_DAYS = ("thứ hai", "thứ ba", "thứ tư", "thứ năm", "thứ sáu", "thứ bảy", "chủ nhật")
ZH_DAYS = "一二三四五六日"
JA_DAYS = "月火水木金土日"
KO_DAYS = "월화수목금토일"


def number_en(n: int) -> str:
    hundreds, rest = divmod(n, 100)
    head = [f"{EN_ONES[hundreds]} hundred"] if hundreds else []
    if rest >= 20:
        ones = f"-{EN_ONES[rest % 10]}" if rest % 10 else ""
        head.append(EN_TENS[rest // 10] + ones)
    elif rest or not n:
        head.append(EN_ONES[rest])
    return " ".join(head)


def number_zh(n: int) -> str:
    hundreds, tens, ones = n // 100, n // 10 % 10, n % 10
    if n < 10:
        return ZH[n]
    head = f"{ZH[hundreds]}百" if hundreds else ""
    if tens:
        head += ("" if tens == 1 and not hundreds else ZH[tens]) + "十"
    elif ones:
        head += "零"
    return head + (ZH[ones] if ones else "")


def _east(n: int, digits: str, hundred: str, ten: str) -> str:
    """Japanese and Korean: no "one" before hundred and ten, no filler zero."""
    if n == 0:
        return digits[0]
    out = ""
    for digit, unit in ((n // 100, hundred), (n // 10 % 10, ten), (n % 10, "")):
        if digit:
            out += (digits[digit] if digit > 1 or not unit else "") + unit
    return out


def number_ja(n: int) -> str:
    return _east(n, ZH, "百", "十")


def number_ko(n: int) -> str:
    return _east(n, KO, "백", "십")


def number_vi(n: int) -> str:
    hundreds, tens, ones = n // 100, n // 10 % 10, n % 10
    if n < 10:
        return VI[n]
    words = [VI[hundreds], "trăm"] if hundreds else []
    if tens == 1:
        words.append("mười")
    elif tens:
        words += [VI[tens], "mươi"]
    elif ones:
        words.append("linh")
    if ones:
        words.append("mốt" if ones == 1 and tens > 1 else "lăm" if ones == 5 and tens else VI[ones])
    return " ".join(words)


def number_id(n: int) -> str:
    hundreds, rest = divmod(n, 100)
    words = [] if not hundreds else ["seratus"] if hundreds == 1 else [ID[hundreds], "ratus"]
    if rest >= 20:
        words += [ID[rest // 10], "puluh"] + ([ID[rest % 10]] if rest % 10 else [])
    elif rest >= 12:
        words += [ID[rest - 10], "belas"]
    elif rest >= 10:
        words.append("sebelas" if rest == 11 else "sepuluh")
    elif rest or not n:
        words.append(ID[rest])
    return " ".join(words)


def number_th(n: int) -> str:
    hundreds, tens, ones = n // 100, n // 10 % 10, n % 10
    if n < 10:
        return TH[n]
    out = f"{TH[hundreds]}ร้อย" if hundreds else ""
    if tens:
        out += {1: "", 2: "ยี่"}.get(tens, TH[tens]) + "สิบ"
    return out + ("เอ็ด" if ones == 1 else TH[ones] if ones else "")


def number(n: int, language: str) -> str:
    """0..999 in words."""
    words = {"en": number_en, "zh": number_zh, "vi": number_vi, "id": number_id, "th": number_th,
             "ja": number_ja, "ko": number_ko}[language](n)
    return unicodedata.normalize("NFC", words)


def day(weekday: int, date: int, month: int, language: str) -> str:
    """A date: weekday 0 = Monday, day of the month, month 1..12."""
    text = {
        "en": f"{EN_DAYS[weekday]}, {date} {EN_MONTHS[month - 1]}",
        "zh": f"{month}月{date}日星期{ZH_DAYS[weekday]}",
        "ja": f"{month}月{date}日{JA_DAYS[weekday]}曜日",
        "ko": f"{month}월 {date}일 {KO_DAYS[weekday]}요일",
        "vi": f"{VI_DAYS[weekday]}, ngày {date} tháng {month}",
        "id": f"{ID_DAYS[weekday]}, {date} {ID_MONTHS[month - 1]}",
        "th": f"วัน{TH_DAYS[weekday]}ที่ {date} {TH_MONTHS[month - 1]}",
    }[language]
    return unicodedata.normalize("NFC", text)


def make(number_of_item: int) -> tuple[str, Item]:
    """One item from a number: numbers in three of four, dates otherwise."""
    rng = random.Random(f"languages {number_of_item}")
    language, away = rng.choice(list(NAMES)), rng.random() < 0.5
    if rng.random() < 0.75:
        n = rng.randrange(1000)
        key, english, foreign = f"number/{n}", number(n, "en"), number(n, language)
    else:
        month = rng.randint(1, 12)
        when = rng.randrange(7), rng.randint(1, (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)[month - 1]), month
        key, english, foreign = "date/{}-{}-{}".format(*when), day(*when, "en"), day(*when, language)
    source, target = (english, foreign) if away else (foreign, english)
    id_ = f"languages/{language}/{'from' if away else 'to'}-english/{key}"
    question = f"Translate to {NAMES[language] if away else 'English'}: {source}"
    # the key is the question, not the id: 六百二十七 is the same question in Chinese and in Japanese
    return question, Item(Prompt(id_, Conversation.ask(question), "languages", language), target)


def items(split: Split, n: int, seed: int) -> tuple[Item, ...]:
    return draw(make, split, n, seed)


def grade(item: Item, said: Message) -> Verdict:
    """Exact, after NFC and trimming."""
    return Verdict.RIGHT if unicodedata.normalize("NFC", said.text.strip()) == item.reference else Verdict.WRONG


LANGUAGES = Skill("languages", tuple(NAMES), items, grade)
