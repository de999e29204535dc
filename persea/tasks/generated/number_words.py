"""Numbers, dates, quantities, hours and short sentences in seven languages.

Tables and the rules that join them.

Part of the saplings' pretraining text: the texts must not change.
"""

from __future__ import annotations

import unicodedata

TRANSLATION_LANGUAGES = {
    "zh": "Chinese",
    "ja": "Japanese",
    "ko": "Korean",
    "vi": "Vietnamese",
    "id": "Indonesian",
    "th": "Thai",
}

EN_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
EN_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
ZH_DIGITS = "零一二三四五六七八九"
KO_DIGITS = "영일이삼사오육칠팔구"
VI_DIGITS = "không một hai ba bốn năm sáu bảy tám chín".split()
ID_DIGITS = "nol satu dua tiga empat lima enam tujuh delapan sembilan".split()
TH_DIGITS = "ศูนย์ หนึ่ง สอง สาม สี่ ห้า หก เจ็ด แปด เก้า".split()

EN_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
EN_MONTHS = (
    "January February March April May June July August September October November December".split()
)
ID_DAYS = "Senin Selasa Rabu Kamis Jumat Sabtu Minggu".split()
ID_MONTHS = (
    "Januari Februari Maret April Mei Juni Juli Agustus September Oktober November Desember".split()
)
TH_DAYS = "จันทร์ อังคาร พุธ พฤหัสบดี ศุกร์ เสาร์ อาทิตย์".split()
TH_MONTHS = (
    "มกราคม กุมภาพันธ์ มีนาคม เมษายน พฤษภาคม มิถุนายน กรกฎาคม สิงหาคม กันยายน ตุลาคม พฤศจิกายน ธันวาคม".split()
)
VI_DAYS = ("thứ hai", "thứ ba", "thứ tư", "thứ năm", "thứ sáu", "thứ bảy", "chủ nhật")
ZH_DAYS = "一二三四五六日"
JA_DAYS = "月火水木金土日"
KO_DAYS = "월화수목금토일"


def number_en(n: int) -> str:
    """Write 0..999 in English."""
    hundreds, rest = divmod(n, 100)
    head = [f"{EN_ONES[hundreds]} hundred"] if hundreds else []
    if rest >= 20:
        ones = f"-{EN_ONES[rest % 10]}" if rest % 10 else ""
        head.append(EN_TENS[rest // 10] + ones)
    elif rest or not n:
        head.append(EN_ONES[rest])
    return " ".join(head)


def number_zh(n: int) -> str:
    """Write 0..999 in Chinese."""
    hundreds, tens, ones = n // 100, n // 10 % 10, n % 10
    if n < 10:
        return ZH_DIGITS[n]
    head = f"{ZH_DIGITS[hundreds]}百" if hundreds else ""
    if tens:
        head += ("" if tens == 1 and not hundreds else ZH_DIGITS[tens]) + "十"
    elif ones:
        head += "零"
    return head + (ZH_DIGITS[ones] if ones else "")


def _number_ja_ko(n: int, digits: str, hundred: str, ten: str) -> str:
    """Write 0..999 in Japanese or Korean: no "one" before hundred and ten, no filler zero."""
    if n == 0:
        return digits[0]
    out = ""
    for digit, unit in ((n // 100, hundred), (n // 10 % 10, ten), (n % 10, "")):
        if digit:
            out += (digits[digit] if digit > 1 or not unit else "") + unit
    return out


def number_ja(n: int) -> str:
    """Write 0..999 in Japanese."""
    return _number_ja_ko(n, ZH_DIGITS, "百", "十")


def number_ko(n: int) -> str:
    """Write 0..999 in Sino-Korean."""
    return _number_ja_ko(n, KO_DIGITS, "백", "십")


def number_vi(n: int) -> str:
    """Write 0..999 in Vietnamese."""
    hundreds, tens, ones = n // 100, n // 10 % 10, n % 10
    if n < 10:
        return VI_DIGITS[n]
    words = [VI_DIGITS[hundreds], "trăm"] if hundreds else []
    if tens == 1:
        words.append("mười")
    elif tens:
        words += [VI_DIGITS[tens], "mươi"]
    elif ones:
        words.append("linh")
    if ones:
        words.append(
            "mốt" if ones == 1 and tens > 1 else "lăm" if ones == 5 and tens else VI_DIGITS[ones]
        )
    return " ".join(words)


def number_id(n: int) -> str:
    """Write 0..999 in Indonesian."""
    hundreds, rest = divmod(n, 100)
    words = [] if not hundreds else ["seratus"] if hundreds == 1 else [ID_DIGITS[hundreds], "ratus"]
    if rest >= 20:
        words += [ID_DIGITS[rest // 10], "puluh"] + ([ID_DIGITS[rest % 10]] if rest % 10 else [])
    elif rest >= 12:
        words += [ID_DIGITS[rest - 10], "belas"]
    elif rest >= 10:
        words.append("sebelas" if rest == 11 else "sepuluh")
    elif rest or not n:
        words.append(ID_DIGITS[rest])
    return " ".join(words)


def number_th(n: int) -> str:
    """Write 0..999 in Thai."""
    hundreds, tens, ones = n // 100, n // 10 % 10, n % 10
    if n < 10:
        return TH_DIGITS[n]
    out = f"{TH_DIGITS[hundreds]}ร้อย" if hundreds else ""
    if tens:
        out += {1: "", 2: "ยี่"}.get(tens, TH_DIGITS[tens]) + "สิบ"
    return out + ("เอ็ด" if ones == 1 else TH_DIGITS[ones] if ones else "")


def number_in_words(n: int, language: str) -> str:
    """Write 0..999 in words, NFC."""
    words = {
        "en": number_en,
        "zh": number_zh,
        "vi": number_vi,
        "id": number_id,
        "th": number_th,
        "ja": number_ja,
        "ko": number_ko,
    }[language](n)
    return unicodedata.normalize("NFC", words)


def date_in_words(weekday: int, day_of_month: int, month: int, language: str) -> str:
    """Write a date, NFC: weekday 0 = Monday, day of the month, month 1..12."""
    text = {
        "en": f"{EN_DAYS[weekday]}, {day_of_month} {EN_MONTHS[month - 1]}",
        "zh": f"{month}月{day_of_month}日星期{ZH_DAYS[weekday]}",
        "ja": f"{month}月{day_of_month}日{JA_DAYS[weekday]}曜日",
        "ko": f"{month}월 {day_of_month}일 {KO_DAYS[weekday]}요일",
        "vi": f"{VI_DAYS[weekday]}, ngày {day_of_month} tháng {month}",
        "id": f"{ID_DAYS[weekday]}, {day_of_month} {ID_MONTHS[month - 1]}",
        "th": f"วัน{TH_DAYS[weekday]}ที่ {day_of_month} {TH_MONTHS[month - 1]}",
    }[language]
    return unicodedata.normalize("NFC", text)


# English singular -> English plural, then noun and counter as `quantity_in_words` joins them, in
# LANGUAGE_ORDER.
COUNTED_NOUNS = {
    "book": ("books", "本 书", "本 冊", "책 권", "quyển sách", "buku", "หนังสือ เล่ม"),
    "cup": ("cups", "个 杯子", "カップ 個", "컵 개", "cái cốc", "cangkir", "ถ้วย ใบ"),
    "car": ("cars", "辆 车", "車 台", "차 대", "chiếc xe", "mobil", "รถ คัน"),
    "cat": ("cats", "只 猫", "猫 匹", "고양이 마리", "con mèo", "kucing", "แมว ตัว"),
    "tree": ("trees", "棵 树", "木 本", "나무 그루", "cái cây", "pohon", "ต้นไม้ ต้น"),
    "letter": ("letters", "封 信", "手紙 通", "편지 통", "bức thư", "surat", "จดหมาย ฉบับ"),
    "ticket": ("tickets", "张 票", "切符 枚", "표 장", "tấm vé", "tiket", "ตั๋ว ใบ"),
    "house": ("houses", "栋 房子", "家 軒", "집 채", "ngôi nhà", "rumah", "บ้าน หลัง"),
}
LANGUAGE_ORDER = ("en", "zh", "ja", "ko", "vi", "id", "th")
SENTENCE_NOUNS = (
    ("water", "水", "水", "물이", "nước", "air", "น้ำ"),
    ("soup", "汤", "スープ", "국이", "canh", "sup", "ซุป"),
    ("room", "房间", "部屋", "방이", "căn phòng", "kamar", "ห้อง"),
    ("car", "车", "車", "차가", "chiếc xe", "mobil", "รถ"),
    ("house", "房子", "家", "집이", "ngôi nhà", "rumah", "บ้าน"),
    ("market", "市场", "市場", "시장이", "khu chợ", "pasar", "ตลาด"),
    ("river", "河", "川", "강이", "dòng sông", "sungai", "แม่น้ำ"),
    ("book", "书", "本", "책이", "quyển sách", "buku", "หนังสือ"),
    ("city", "城市", "町", "도시가", "thành phố", "kota", "เมือง"),
    ("bed", "床", "ベッド", "침대가", "cái giường", "ranjang", "เตียง"),
)
SENTENCE_ADJECTIVES = (
    ("big", "大", "大きい", "크다", "lớn", "besar", "ใหญ่"),
    ("small", "小", "小さい", "작다", "nhỏ", "kecil", "เล็ก"),
    ("new", "新", "新しい", "새롭다", "mới", "baru", "ใหม่"),
    ("old", "旧", "古い", "낡았다", "cũ", "lama", "เก่า"),
    ("clean", "干净", "清潔だ", "깨끗하다", "sạch", "bersih", "สะอาด"),
    ("cold", "冷", "冷たい", "차갑다", "lạnh", "dingin", "เย็น"),
    ("hot", "热", "熱い", "뜨겁다", "nóng", "panas", "ร้อน"),
    ("beautiful", "漂亮", "美しい", "아름답다", "đẹp", "indah", "สวย"),
    ("expensive", "贵", "高い", "비싸다", "đắt", "mahal", "แพง"),
    ("good", "好", "いい", "좋다", "tốt", "bagus", "ดี"),
)
SENTENCE_TEMPLATES = {
    "en": "the {} is very {}",
    "zh": "{}很{}",
    "ja": "{}はとても{}",
    "ko": "{} 아주 {}",
    "vi": "{} rất {}",
    "id": "{} itu sangat {}",
    "th": "{}{}มาก",
}
KO_NATIVE_ONES = ("", "한", "두", "세", "네", "다섯", "여섯", "일곱", "여덟", "아홉")
KO_NATIVE_TENS = ("", "열", "스물", "서른", "마흔", "쉰", "예순", "일흔", "여든", "아흔")


def native_number_ko(n: int) -> str:
    """Write 1..99 in native Korean numerals, in the form before a counter: 20 alone is 스무."""
    return "스무" if n == 20 else KO_NATIVE_TENS[n // 10] + KO_NATIVE_ONES[n % 10]


def quantity_in_words(n: int, noun: str, language: str) -> str:
    """Write 2..99 of a noun with the counter that the language needs, NFC."""
    words = dict(zip(LANGUAGE_ORDER, COUNTED_NOUNS[noun], strict=True))[language]
    first, _, second = words.partition(" ")
    text = {
        "en": lambda: f"{number_en(n)} {words}",
        "zh": lambda: f"{'两' if n == 2 else number_zh(n)}{first}{second}",
        "ja": lambda: f"{number_ja(n)}{second}の{first}",
        "ko": lambda: f"{first} {native_number_ko(n)} {second}",
        "vi": lambda: f"{number_vi(n)} {words}",
        "id": lambda: f"{number_id(n)} {words}",
        "th": lambda: f"{first}{number_th(n)}{second}",
    }[language]()
    return unicodedata.normalize("NFC", text)


def adjective_sentence(noun: int, adjective: int, language: str) -> str:
    """Write a sentence such as "the water is very cold", NFC. Both arguments index their table."""
    at = LANGUAGE_ORDER.index(language)
    return unicodedata.normalize(
        "NFC",
        SENTENCE_TEMPLATES[language].format(
            SENTENCE_NOUNS[noun][at], SENTENCE_ADJECTIVES[adjective][at]
        ),
    )


def meeting_sentence(weekday: int, hour: int, language: str) -> str:
    """Write "see you on <weekday> at <hour>", NFC: weekday 0 = Monday, hour 1..12."""
    text = {
        "en": lambda: f"see you on {EN_DAYS[weekday]} at {EN_ONES[hour]}",
        "zh": lambda: f"星期{ZH_DAYS[weekday]}{'两' if hour == 2 else number_zh(hour)}点见",
        "ja": lambda: f"{JA_DAYS[weekday]}曜日の{number_ja(hour)}時に会いましょう",
        "ko": lambda: f"{KO_DAYS[weekday]}요일 {native_number_ko(hour)} 시에 만나요",
        "vi": lambda: f"hẹn gặp {VI_DAYS[weekday]} lúc {number_vi(hour)} giờ",
        "id": lambda: f"sampai jumpa hari {ID_DAYS[weekday]} jam {number_id(hour)}",
        "th": lambda: f"เจอกันวัน{TH_DAYS[weekday]}เวลา{number_th(hour)}นาฬิกา",
    }[language]()
    return unicodedata.normalize("NFC", text)
